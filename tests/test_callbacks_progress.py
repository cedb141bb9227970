"""What `EpochProgress` shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torch_lab.callbacks import EpochProgress
from warm import Warm

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")


class Squares(pl.LightningModule):
    """Trains on losses that are given, and validates to fixed values."""

    def __init__(self, pause: float = 0.0, manual: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.pause = pause
        self.automatic_optimization = not manual

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        time.sleep(self.pause)
        loss = (batch[0] * self.weight).mean()
        self.log("rate", 0.5, on_step=True, on_epoch=True)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        self.optimizers().step()
        return None

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        time.sleep(self.pause)
        self.log("accuracy/validate", 0.967, add_dataloader_idx=False)
        self.log("loss/validate", 0.12, add_dataloader_idx=False)
        self.log("big/validate", 1797.0, add_dataloader_idx=False)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("accuracy/test", 0.5)

    def predict_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        time.sleep(self.pause)
        return batch[0]

    def on_train_epoch_end(self) -> None:
        self.log("accuracy/train", 0.75)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Endless(IterableDataset[list[Tensor]]):
    """Data without a length."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([[torch.full((1,), 3.0)]] * 6)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def drawn(self) -> list[str]:
        """Return each state of the live line, without colours."""
        states = re.sub(r"\x1b\[[\d;]*m", "", self.getvalue()).split("\r\x1b[2K")
        return [state for state in states if state and not state.endswith("\n")]

    def kept(self) -> list[str]:
        """Return the lines that stay."""
        return [line.rpartition("\x1b[2K")[2] for line in self.getvalue().split("\n")][:-1]


def loader(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(1.0, batches + 1)), batch_size=1)


def trainer(progress: EpochProgress, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": [progress],
        }
        | kwargs
    )


def seconds_out(text: str) -> str:
    return re.sub(r"\d+\.\d s", "T s", text)


def test_there_is_a_plain_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    """Away from a terminal an epoch is one line: the mean train loss, other losses, the rest."""
    trainer(EpochProgress()).fit(Squares(), loader(), loader())
    values = (
        "loss/train 2.5000  loss/validate 0.1200  rate 0.5000  accuracy/validate 0.9670  "
        "big/validate 1797.0  accuracy/train 0.7500"
    )
    assert seconds_out(capsys.readouterr().err) == (
        f"epoch 1/2  step 4  T s  {values}\nepoch 2/2  step 8  T s  {values}\n"
    )


def test_each_loop_on_its_own_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Validation before a step is the baseline; validation later, test and prediction say so."""
    model, run = Squares(), trainer(EpochProgress(), max_epochs=1)
    run.validate(model, loader(), verbose=False)
    run.fit(model, loader())
    run.validate(model, loader(), verbose=False)
    run.test(model, loader(), verbose=False)
    run.predict(model, [loader(3), loader(2)])
    validated = "loss/validate 0.1200  accuracy/validate 0.9670  big/validate 1797.0"
    assert seconds_out(capsys.readouterr().err).splitlines() == [
        f"baseline  {validated}",
        "epoch 1/1  step 4  T s  loss/train 2.5000  rate 0.5000  accuracy/train 0.7500",
        f"validate  step 4  {validated}",
        "test  step 4  accuracy/test 0.5000",
        "predict  5 batches  T s",
    ]


def test_values_of_earlier_epochs_are_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch without validation shows none, though the trainer remembers the last one."""
    trainer(EpochProgress(), check_val_every_n_epoch=2, max_epochs=3).fit(
        Squares(), loader(), loader()
    )
    lines = capsys.readouterr().err.splitlines()
    assert ["loss/validate" in line for line in lines] == [False, True, False]


def test_validation_amid_an_epoch_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What is validated within an epoch is kept, with the mean train loss so far."""
    trainer(EpochProgress(), val_check_interval=0.5, max_epochs=1).fit(
        Squares(), loader(), loader()
    )
    lines = seconds_out(capsys.readouterr().err).splitlines()
    assert [line.split("  loss/validate")[0] for line in lines] == [
        "epoch 1/1  step 2  T s  loss/train 1.5000",
        "epoch 1/1  step 4  T s  loss/train 2.5000",
    ]


def test_the_loss_is_whole_under_accumulation(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning divides the loss by the number of accumulated batches; the line does not."""
    trainer(EpochProgress(), max_epochs=1, accumulate_grad_batches=2).fit(Squares(), loader())
    assert "epoch 1/1  step 2  " in (err := capsys.readouterr().err)
    assert "loss/train 2.5000" in err


def test_manual_optimisation_may_return_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a loss the line holds what the module logged."""
    trainer(EpochProgress(), max_epochs=1).fit(Squares(manual=True), loader())
    assert seconds_out(capsys.readouterr().err) == (
        "epoch 1/1  step 4  T s  rate 0.5000  accuracy/train 0.7500\n"
    )


@pytest.mark.parametrize(
    ("limits", "lines"),
    [
        ({"max_epochs": -1, "max_steps": 9}, ["epoch 1  step 6", "epoch 2  step 9"]),
        ({"max_epochs": 1}, ["epoch 1/1  step 6"]),
    ],
)
def test_unknown_lengths_are_left_out(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], lines: list[str]
) -> None:
    """Data without a length and a run without a last epoch have no totals and no time left."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    trainer(EpochProgress(), **limits).fit(Squares(0.05), DataLoader(Endless(), batch_size=None))
    assert [line.split("  loss")[0].rpartition("  ")[0] for line in terminal.kept()] == lines
    assert any("left" in line for line in terminal.drawn()) == ("max_steps" in limits)


def test_the_steps_left_bound_the_last_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With max_steps the total is that of the batches that will really run."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    trainer(EpochProgress(), max_steps=2, accumulate_grad_batches=2).fit(Squares(0.11), loader(9))
    counts = [re.search(r"(\d)/(\d)  [\d.]+ steps", line) for line in terminal.drawn()]
    assert [count.groups() for count in counts if count] == [(n, "4") for n in "1234"]


def test_the_live_line_tells_where_the_loop_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a line is redrawn in place, and leaves nothing behind but kept lines."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    model, run = Squares(0.06), trainer(EpochProgress(), max_epochs=1, num_sanity_val_steps=2)
    run.fit(model, loader(), loader())
    run.predict(model, loader())
    patterns = [
        r"sanity check  ━+─*  [12]/2  .*batches/s  0:00 left",
        r"epoch 1/1  ━+─*  \d/4  [\d.]+ steps/s  0:0\d left  loss [\d.]+",
        r"epoch 1/1  validate  ━+─*  \d/4  [\d.]+ batches/s  0:0\d left",
        r"predict  ━+─*  \d/4  [\d.]+ batches/s  0:0\d left",
    ]
    drawn = terminal.drawn()
    assert all(any(re.fullmatch(pattern, line) for line in drawn) for pattern in patterns)
    assert all(any(re.fullmatch(pattern, line) for pattern in patterns) for line in drawn)
    assert "\x1b[3" not in terminal.getvalue()


def test_long_times_are_clock_times(capsys: pytest.CaptureFixture[str]) -> None:
    """From a minute on durations are minutes and hours."""

    class Slow(Squares):
        def on_train_epoch_start(self) -> None:
            clock.offset += 3725 if self.current_epoch else 75

    class Clock:
        offset = 0.0

    clock, monotonic = Clock(), time.monotonic
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_lab.callbacks.progress.time.monotonic", lambda: monotonic() + clock.offset
        )
        trainer(EpochProgress()).fit(Slow(), loader())
    err = capsys.readouterr().err
    assert "epoch 1/2  step 4  1:15  " in err
    assert "epoch 2/2  step 8  1:02:05  " in err


def test_the_line_is_redrawn_ten_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick steps do not cost a line each."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    start = time.monotonic()
    trainer(EpochProgress(), max_epochs=1).fit(Squares(0.001), loader(300))
    drawn = terminal.getvalue().count("steps/s")
    assert 2 <= drawn <= 1 + (time.monotonic() - start) / 0.1


def test_of_a_device_the_loss_of_the_last_logged_step_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where no line is drawn in that very step; before the first one there is none."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("torch_lab.callbacks.progress.waits_for", lambda device: True)
    run = trainer(EpochProgress(), max_epochs=1, log_every_n_steps=149)
    run.fit(Squares(0.002), loader(300))
    drawn = [(re.search(r"(\d+)/300", line), line) for line in terminal.drawn()]
    steps = {int(found[1]): "loss" in line for found, line in drawn if found}
    assert min(steps) < 149 < max(steps)
    assert all(has_loss == (step >= 149) for step, has_loss in steps.items()), steps


@pytest.mark.parametrize(
    ("columns", "encoding", "bar"),
    [("78", "ascii", "  #+-*  "), ("78", None, "  #+-*  "), ("30", "utf-8", r"^epoch 1/1  \d/4  ")],
)
def test_the_live_line_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: str, encoding: str | None, bar: str
) -> None:
    """It is never wider than the terminal, which could not redraw it, and uses its characters."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(Terminal, "encoding", encoding)
    monkeypatch.setenv("COLUMNS", columns)
    trainer(EpochProgress(), max_epochs=1).fit(Squares(0.06), loader())
    drawn = terminal.drawn()
    assert drawn
    assert max(map(len, drawn)) < int(columns)
    assert all(re.search(bar, line) for line in drawn)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where control characters are not understood there are none."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "dumb")
    trainer(EpochProgress(), max_epochs=1).fit(Squares(0.06), loader())
    assert not re.search(r"[\r\x1b]", terminal.getvalue())


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "missing"])
def test_a_lost_stream_does_not_end_the_training(
    monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    """A standard error that is closed, or was never there, is not an error of the training."""
    terminal = Terminal()
    terminal.close()
    monkeypatch.setattr(sys, "stderr", terminal if closed else None)
    run = trainer(EpochProgress(), max_epochs=1)
    run.fit(Squares(), loader())
    assert run.global_step == 4


def test_print_stands_above_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`module.print` clears the live line first, so that lines do not run into each other."""

    class Talkative(Squares):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.print("said", file=sys.stderr)

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    trainer(EpochProgress(), max_epochs=1).fit(Talkative(0.06), loader(2))
    assert terminal.getvalue().count("\r\x1b[2Ksaid\n") >= 1
    assert not re.search(r"steps/s[^\r]*said", terminal.getvalue())


def test_a_disabled_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's tuner turns it off and on."""
    progress = EpochProgress()
    progress.disable()
    model, run = Squares(), trainer(progress, max_epochs=1)
    run.validate(model, loader(), verbose=False)
    run.fit(model, loader(), loader())
    run.predict(model, loader())
    assert capsys.readouterr().err == ""
    progress.enable()
    run.validate(model, loader(), verbose=False)
    assert capsys.readouterr().err.startswith("validate")


def test_it_pickles_before_and_after_use(capsys: pytest.CaptureFixture[str]) -> None:
    """A spawned process gets a working copy, without the trainer."""
    progress = pickle.loads(pickle.dumps(EpochProgress()))
    trainer(progress, max_epochs=1).fit(Squares(), loader())
    assert len(pickle.dumps(progress)) < 2000
    trainer(pickle.loads(pickle.dumps(progress)), max_epochs=1).fit(Squares(), loader())
    first, second = seconds_out(capsys.readouterr().err).splitlines()
    assert first == second


class Failing(pl.Callback):
    """Raises where it is told to."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("no")


def test_a_finished_epoch_is_kept_when_the_next_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception does not lose the line of an epoch that was done."""
    run = trainer(EpochProgress())
    run.callbacks.insert(0, Failing())
    with pytest.raises(RuntimeError, match="no"):
        run.fit(Squares(), loader())
    assert "epoch 1/2  step 4" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_resumes_within_an_epoch_counts_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a checkpoint amid an epoch that epoch still gets its line."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    def run() -> pl.Trainer:
        saving = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}")
        return trainer(
            EpochProgress(),
            callbacks=[EpochProgress(), saving],
            enable_checkpointing=True,
            default_root_dir=tmp_path,
            max_epochs=1,
        )

    run().fit(Squares(), loader(5))
    capsys.readouterr()
    checkpoint = tmp_path / "checkpoints" / "step=3.ckpt"
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
        run().fit(Squares(), loader(5), ckpt_path=checkpoint, weights_only=True)
    assert "epoch 1/1  step 5" in capsys.readouterr().err


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_callbacks_progress import *
trainer(EpochProgress(), max_epochs=1, enable_progress_bar=True).fit(Squares(0.05), loader(8))
"""


def test_a_real_terminal_ends_with_the_kept_lines(tmp_path: Path, warm: Warm) -> None:
    """In a terminal of 72 columns the live line is drawn in colour, within them, and then gone."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    child = pexpect.spawn(
        warm.python,
        [str(script), str(Path(__file__).parent)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "NO_COLOR": ""},
        dimensions=(24, 72),
        encoding="utf-8",
        timeout=60,
    )
    child.expect(pexpect.EOF)
    terminal = Terminal(child.before.replace("\r\n", "\n"))
    assert "\x1b[36m━" in terminal.getvalue()
    assert max(map(len, terminal.drawn())) < 72
    assert re.fullmatch(r"epoch 1/1  step 8  .*loss/train 4.5000.*", terminal.kept()[-1])
