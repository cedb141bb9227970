"""What goes wrong on the way: values, disks, workers, memory. It is told, and a run can go on."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Lab, Result
from test_train import scalars
from torch_lab.callbacks import nan_monitor
from torch_lab.errors import ExitCode
from torch_lab.runs import Run
from warm import Warm

CONFIG = '''
"""A network learns the sign of a sum, while the environment says what goes wrong."""

import functools
import os
import pathlib
import signal
import subprocess
import time
import traceback

import psutil
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from torch_lab.modules import TrainLabModule


def fault(name):
    return name in os.environ.get("FAULT", "").split()


class Samples(Dataset):
    def __init__(self, seed):
        self.x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
        self.trains = seed == 1

    def __len__(self):
        if self.trains and fault("stop_early"):
            for frame in traceback.extract_stack():
                if frame.name == "__iter__" and "combined_loader" in frame.filename:
                    os.kill(os.getpid(), signal.SIGTERM)
        return len(self.x)

    def __getitem__(self, index):
        x, y = self.x[index], int(self.x[index].sum() > 0)
        if self.trains and index == 13:
            if fault("nan sample"):
                x = x * float("nan")
            if fault("ragged"):
                x = x[:3]
            if fault("hang"):
                time.sleep(600)
        if self.trains and fault("kill"):
            time.sleep(0.1)
        return x, {"y": y} if fault("unnamed") else {"y": y, "idx": 100 + index}


class Net(TrainLabModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 6:
            if fault("nan_loss"):
                return loss * float("nan")
            if fault("steep"):
                weight = self.model.weight.sum()
                return loss + (weight - weight.detach()).sqrt()
            if fault("memory"):
                raise torch.OutOfMemoryError("tried to allocate 7 GiB\\nsecond line")
        return loss

    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx)
        if fault("nan_validation") and self.current_epoch > 0:
            self._epochs["validate"]._totals["loss"] += float("nan")
        if fault("nan_validation_log") and self.current_epoch > 0:
            self.log("own_loss", loss * float("nan"))
            return None
        if fault("nan_validation_loss") and self.current_epoch > 0:
            return loss * float("nan")
        return loss


class Happenings(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 6 and fault("stop"):
            os.kill(os.getpid(), signal.SIGTERM)
        if trainer.global_step == 1 and fault("kill"):
            workers = psutil.Process().children()
            os.kill(workers[0].pid, signal.SIGKILL)

    def on_train_epoch_start(self, trainer, module):
        folder = pathlib.Path(trainer.default_root_dir) / "checkpoints"
        if trainer.current_epoch == 2:
            if fault("read_only"):
                subprocess.run(["chattr", "+i", str(folder)], check=True)
            if fault("full"):
                fill(folder / "filler")
        if trainer.current_epoch == 4 and fault("mended"):
            subprocess.run(["chattr", "-i", str(folder)], capture_output=True)
            (folder / "filler").unlink(missing_ok=True)


def fill(path):
    try:
        with path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass


def train_config(hparams):
    workers = {"num_workers": hparams["config"].get("workers", 0)}
    return {
        "module": Net(
            torch.nn.Linear(4, 2),
            torch.nn.CrossEntropyLoss(),
            functools.partial(torch.optim.SGD, lr=0.1),
        ),
        "train_dataloaders": DataLoader(Samples(1), batch_size=8, shuffle=True, **workers),
        "val_dataloaders": DataLoader(Samples(2), batch_size=8),
        "callbacks": [Happenings()],
    }
'''.replace('"nan sample"', '"nan_sample"')
EPOCHS = {"trainer": {"init": {"max_epochs": 3, "enable_progress_bar": False}}}


class Faulty:
    """A project whose training goes wrong as it is told; 4 steps an epoch."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lab = lab
        self.patch = monkeypatch
        lab.write("__main__.py", CONFIG)
        lab.hparams("hparams", EPOCHS)

    def train(self, *words: str, fault: str = "") -> Result:
        """Train in this process."""
        self.patch.setenv("FAULT", fault)
        return self.lab.train(self.lab.path, *words)

    @property
    def run(self) -> Run:
        """The newest run."""
        return self.lab.runs[-1]

    def finite(self, name: str) -> bool:
        """Return whether the weights in a checkpoint of the newest run are finite."""
        state = torch.load(self.run.checkpoint(name), weights_only=True)["state_dict"]
        return all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.fixture
def faulty(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    return Faulty(lab, monkeypatch)


def same_end(faulty: Faulty, run: Run) -> None:
    """Check that `run` ended as one does in which nothing goes wrong."""
    result = faulty.train()
    assert result.code == 0, result.err
    unbroken = faulty.run
    assert unbroken.name != run.name
    assert scalars(unbroken) == scalars(run)
    assert unbroken.metrics == run.metrics


# Values that are not finite.


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("nan_loss", "in step 7, epoch 2: the batch (samples 1"),
        ("nan_sample", "not finite in the batch: x (4 values, in sample 113)"),
        ("nan_sample unnamed", "not finite in the batch: x (4 values, in sample 13)"),
        (
            "steep",
            "among the parameters: model.weight (8 values), made so by the gradients of step",
        ),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite(faulty: Faulty, fault: str, told: str) -> None:
    """Exit 4, step and samples are named; what was saved is good; so it ends when it goes on."""
    result = faulty.train("--no-validate", fault=fault)
    assert result.code == ExitCode.NON_FINITE, result.err
    assert told in result.err and "step " in result.err and "sample" in result.err
    assert "Traceback" not in result.err
    assert faulty.run.state == "failed"
    (first,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    for name in ("last", "best"):
        assert not faulty.run.checkpoint(name).exists() or faulty.finite(name)

    again = faulty.train("--resume", fault=fault)
    assert again.code == ExitCode.NON_FINITE
    assert first in again.err


def test_a_nan_at_the_step_where_a_run_goes_on(faulty: Faulty) -> None:
    """The same, each time; and once it is mended the run ends as if nothing had been."""
    assert faulty.train(fault="stop").code == ExitCode.TERMINATED
    for _ in range(2):
        result = faulty.train("--resume", fault="nan_loss")
        assert result.code == ExitCode.NON_FINITE, result.err
        assert "the training loss is NaN in step 7" in result.err
        assert faulty.run.sidecar("last")["step"] == 6  # type: ignore[index]
        assert faulty.finite("last") and faulty.finite("best")
    assert faulty.train("--resume").code == 0
    same_end(faulty, faulty.run)


@pytest.mark.parametrize(
    "fault", ["nan_validation_loss", "nan_validation_log", "nan_validation_log unnamed"]
)
def test_a_nan_loss_in_validation_alone(faulty: Faulty, fault: str) -> None:
    """The run ends, and names step and samples; the checkpoints are those of before."""
    result = faulty.train(fault=fault)
    assert result.code == ExitCode.NON_FINITE, result.err
    first = 0 if "unnamed" in fault else 100
    assert "the validation loss is NaN after step 8, epoch 2" in result.err
    assert f"the batch (samples {first}, {first + 1}, {first + 2}, " in result.err
    assert faulty.finite("last") and faulty.finite("best")


def test_a_nan_in_what_validation_logs(faulty: Faulty) -> None:
    """It is met as well; it is never the best, and the record stays readable for all."""
    result = faulty.train(fault="nan_validation")
    assert result.code == ExitCode.NON_FINITE, result.err
    assert "loss/validate is NaN after step 8, epoch 2" in result.err
    run = faulty.run
    assert run.sidecar("last")["step"] == 4 and run.sidecar("best")["step"] == 4  # type: ignore[index]
    assert math.isfinite(run.best_score or math.nan) and faulty.finite("best")
    assert math.isnan(run.metrics["loss/validate"])
    text = (run.folder / "run.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def device_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU treated as a device that is waited for: losses are looked at when due."""
    monkeypatch.setattr(nan_monitor, "waits_for", lambda device: True)


@pytest.mark.usefixtures("device_waits")
@pytest.mark.parametrize("section", [{}, {"every_n_steps": 1}, {"every_n_steps": 1, "async": True}])
def test_a_nan_that_is_seen_later_is_in_no_checkpoint(faulty: Faulty, section: Any) -> None:
    """It is told each time the run goes on, and with --debug in full; mended, the end is exact."""
    faulty.lab.hparams("hparams", {**EPOCHS, "checkpoint": section})
    for words in ([], ["--resume"]):
        result = faulty.train(*words, fault="nan_loss")
        assert result.code == ExitCode.NON_FINITE, result.err
        assert "the training loss is NaN in step 7, epoch 2 (samples 1" in result.err
        noticed = 7 if section else 8
        assert f"noticed after step {noticed}, so the weights may no longer" in result.err
        assert faulty.run.sidecar("last")["step"] == (6 if section else 4)  # type: ignore[index]
        assert faulty.finite("last") and faulty.finite("best")
    result = faulty.train("--resume", "--debug", fault="nan_loss")
    assert result.code == ExitCode.NON_FINITE
    assert "NaN in step 7, epoch 2: the batch (samples 1" in result.err
    assert faulty.train("--resume").code == 0
    same_end(faulty, faulty.run)


@pytest.mark.usefixtures("device_waits")
def test_losses_that_wait_at_a_stop_are_looked_at(faulty: Faulty) -> None:
    """The checkpoint of a signal is good; where they were finite the run goes on exactly."""
    assert faulty.train(fault="stop").code == ExitCode.TERMINATED
    assert faulty.run.sidecar("last")["step"] == 6  # type: ignore[index]
    assert faulty.train("--resume").code == 0
    same_end(faulty, faulty.run)


@pytest.mark.usefixtures("device_waits")
@pytest.mark.parametrize("fault", ["nan_validation_loss", "nan_validation_log", "nan_validation"])
def test_a_nan_in_validation_is_seen_at_its_end(faulty: Faulty, fault: str) -> None:
    """Its checkpoints are those of before, as where each batch is looked at."""
    result = faulty.train(fault=fault)
    assert result.code == ExitCode.NON_FINITE, result.err
    assert "is NaN after step 8, epoch 2: " in result.err
    assert fault == "nan_validation" or "in a batch (samples 100, 101, 102, " in result.err
    assert faulty.run.sidecar("last")["step"] == 4  # type: ignore[index]
    assert faulty.finite("last") and faulty.finite("best")


# Disks.


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 4 MB, where the runs are."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    monkeypatch.setenv("TORCH_LAB_ROOT", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def immutable(tmp_path: Path) -> Iterator[None]:
    """Folders may be made read-only for root, too."""
    if subprocess.run(["chattr", "+i", str(tmp_path)], capture_output=True, check=False).returncode:
        pytest.skip("folders cannot be made immutable here")
    subprocess.run(["chattr", "-i", str(tmp_path)], check=True)
    yield
    for folder in tmp_path.rglob("checkpoints"):
        subprocess.run(["chattr", "-i", str(folder)], check=True)


def errors(result: Result) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("error: ")]


def runs_on(disk: Path) -> list[Run]:
    return [Run.read(path.parent) for path in sorted(disk.glob("data/artifacts/*/run.json"))]


def test_a_disk_that_stays_full_ends_the_run(faulty: Faulty, warm: Warm, small_disk: Path) -> None:
    """Twice it goes on, and says since when; the third time it ends; with room it goes on."""
    faulty.lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 8}}})
    # In a process of its own: that of a run is known to be gone only if it is.
    result = faulty.lab.command("train", faulty.lab.path, FAULT="full", python=warm.python)
    assert result.code == ExitCode.CODE_FAILED
    assert "Traceback" not in result.err
    assert "not written: " in result.err and "(2 of 3 before the run stops)" in result.err
    (told,) = [line for line in errors(result) if "3 checkpoints in a row" in line]
    assert "could not be written since" in told
    (run,) = runs_on(small_disk)
    assert run.state == "failed" and "3 checkpoints in a row" in str(run.record.reason)
    last = json.loads(run.checkpoint("last").with_suffix(".json").read_text())["step"]
    assert 4 <= last <= 12
    assert not [path for path in run.checkpoints_folder.iterdir() if path.name.startswith(".")]

    (run.checkpoints_folder / "filler").unlink()
    result = faulty.train("--resume")
    assert result.code == 0, result.err
    (run,) = runs_on(small_disk)
    assert faulty.train().code == 0
    unbroken = runs_on(small_disk)[-1]
    assert scalars(unbroken) == scalars(run)


@pytest.mark.usefixtures("immutable")
def test_a_folder_that_is_read_only_for_a_while(faulty: Faulty) -> None:
    """Training goes on, says what is not written and since when, and when it is again."""
    faulty.lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 6}}})
    result = faulty.train(fault="read_only mended")
    assert result.code == 0, result.err
    assert "not written: Operation not permitted; none was since" in result.err
    assert "checkpoints are written again" in result.err
    assert faulty.run.sidecar("last")["step"] == 24  # type: ignore[index]
    same_end(faulty, faulty.run)


@pytest.mark.usefixtures("immutable")
def test_a_folder_that_stays_read_only_ends_the_run(faulty: Faulty) -> None:
    """After as many failures as may be; the last good checkpoint stands."""
    faulty.lab.hparams("hparams", {**EPOCHS, "checkpoint": {"give_up_after": 1}})
    result = faulty.train(fault="read_only")
    assert result.code == ExitCode.CODE_FAILED
    (told,) = errors(result)
    assert "a checkpoint could not be written" in told and "Operation not permitted" in told
    assert faulty.run.state == "failed"
    subprocess.run(["chattr", "-i", str(faulty.run.checkpoints_folder)], check=True)
    assert faulty.run.sidecar("last")["step"] == 8  # type: ignore[index]
    assert faulty.train("--resume").code == 0
    same_end(faulty, faulty.run)


# Signals.


def test_a_signal_that_has_lightning_fail_is_a_stop(faulty: Faulty) -> None:
    """Before the first batch, where Lightning cannot clear up after any error."""
    result = faulty.train(fault="stop_early")
    assert result.code == ExitCode.TERMINATED, result.err
    assert "stopped by SIGTERM" in result.err
    assert faulty.run.state == "stopped"
    assert faulty.train("--resume").code == 0
    same_end(faulty, faulty.run)


STEPS_OF_VALIDATION = """

class Net(Net):
    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx)
        self.log("own", loss, on_step=True)
        if fault("stop_validation") and self.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss


def train_config"""


def test_a_broken_off_validation_is_logged_once(faulty: Faulty) -> None:
    """Its steps too, though it begins again; and the best that it finds is written."""
    faulty.lab.write("__main__.py", CONFIG.replace("\n\ndef train_config", STEPS_OF_VALIDATION))
    assert faulty.train(fault="stop_validation").code == ExitCode.TERMINATED
    assert faulty.run.sidecar("last")["step"] == 4  # type: ignore[index]
    assert faulty.train("--resume").code == 0
    run = faulty.run
    assert len(scalars(run)["own_step"]) == 16
    same_end(faulty, run)
    for sidecar in (each.sidecar("best") for each in (run, faulty.run)):
        assert sidecar and (sidecar["step"], sidecar["score"]) == (12, run.best_score)


# Workers, samples and memory.


def test_a_worker_that_is_killed_is_told_with_its_samples(lab: Lab, warm: Warm) -> None:
    """One error names the worker, the signal and the samples; the run goes on when told to."""
    lab.write("__main__.py", CONFIG)
    lab.hparams("hparams", {**EPOCHS, "config": {"workers": 2}})
    result = lab.command("train", lab.path, FAULT="kill", python=warm.python)
    assert result.code == ExitCode.CODE_FAILED, result.err
    (told,) = errors(result)
    assert told.startswith("error: worker 0 of train_dataloaders (pid ")
    assert "was killed by SIGKILL while it made sample" in told
    assert "Traceback" not in result.err
    assert lab.run().state == "failed"
    result = lab.train(lab.path, "--resume")
    assert result.code == 0, result.err


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_do_not_collate_are_named(faulty: Faulty, workers: int) -> None:
    """One error with the shapes; the run can go on once the data is mended."""
    faulty.lab.hparams("hparams", {**EPOCHS, "config": {"workers": workers}})
    result = faulty.train(fault="ragged")
    assert result.code == ExitCode.CODE_FAILED
    assert "sample 13 has shape (3,)" in result.err
    assert faulty.run.state == "failed"
    result = faulty.train("--resume")
    assert result.code == 0, result.err
    same_end(faulty, faulty.run)


def test_a_worker_that_hangs_is_given_up(faulty: Faulty) -> None:
    """After the time that the hparams say; named are the worker and the sample."""
    faulty.lab.hparams("hparams", {**EPOCHS, "config": {"workers": 2}, "loader_timeout": 2})
    result = faulty.train(fault="hang")
    assert result.code == ExitCode.CODE_FAILED
    (told,) = errors(result)
    assert "of train_dataloaders gave no batch for 2 s (loader_timeout)" in told
    assert "while it made sample 13" in told
    result = faulty.train("--resume")
    assert result.code == 0, result.err


def test_a_device_without_memory_is_told_with_what_to_try(faulty: Faulty) -> None:
    """The size of the batches, and half of it; the run goes on from its last checkpoint."""
    result = faulty.train(fault="memory")
    assert result.code == ExitCode.CODE_FAILED
    (told,) = errors(result)
    assert "with batches of 8: tried to allocate 7 GiB" in told
    assert "batches of 4" in result.err and "accumulate_grad_batches" in result.err
    assert faulty.run.state == "failed"
    assert faulty.train("--resume").code == 0
    same_end(faulty, faulty.run)
