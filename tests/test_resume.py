"""`--resume`: an interrupted run goes on in its own folder, or says why it cannot."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from conftest import CONFIG, Lab, Result
from test_train import scalars
from torch_lab.errors import ExitCode
from torch_lab.runs import Run

STRUCK = """
import os
import time

import pytorch_lightning as pl


class Strike(pl.Callback):
    \"\"\"Sends a signal to its own process at a step, if the environment says which.\"\"\"

    def on_train_batch_end(self, trainer, *args):
        if os.environ.get("STRIKE") == f"{trainer.global_step}":
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        if "SLOW" in os.environ:
            time.sleep(1)
"""


@pytest.fixture
def struck(lab: Lab) -> Lab:
    """A project whose training can be struck by a signal at a step: 4 an epoch, 3 epochs."""
    main = CONFIG.replace('"module": module', '"callbacks": [Strike()], "module": module')
    lab.write("__main__.py", main + STRUCK)
    trainer = {"init": {"max_epochs": 3, "log_every_n_steps": 1}}
    lab.hparams("hparams", {"trainer": trainer})
    return lab


def strike(lab: Lab, signum: int, step: int = 6) -> Result:
    """Train until `signum` strikes at `step`, in a process of its own."""
    return lab.forked(lab.path, STRIKE=str(step), SIGNAL=str(int(signum)))


def same_as_unbroken(lab: Lab, run: Run) -> None:
    """Check that `run` ended as one does that was never interrupted."""
    assert lab.train(lab.path).code == 0
    unbroken = lab.runs[-1]
    assert unbroken.name != run.name
    assert scalars(unbroken) == scalars(run)
    assert unbroken.metrics == run.metrics
    for name in ("last", "best"):
        one, other = (
            torch.load(each.checkpoint(name), weights_only=True) for each in (unbroken, run)
        )
        assert one["global_step"] == other["global_step"]
        for key, tensor in one["state_dict"].items():
            assert torch.equal(tensor, other["state_dict"][key]), key


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_a_run_that_goes_on_exactly(struck: Lab, signum: signal.Signals) -> None:
    """The batch is finished, a checkpoint written, and the command that goes on is printed."""
    stopped = strike(struck, signum)
    assert stopped.code == 128 + signum
    run = struck.run()
    assert (run.state, run.record.reason) == ("stopped", f"Interrupted: {signum.name}")
    assert run.sidecar("last")["step"] == 6  # type: ignore[index]
    assert (
        f"train toys/experiments/00_toy/hparams.py --resume {run.name}" in stopped.out + stopped.err
    )

    result = struck.train(struck.path, "--resume")
    assert result.code == 0, result.err
    assert "goes on at step 6, after it was stopped" in result.err
    run = struck.run()
    assert (run.state, run.record.version) == ("completed", 1)
    assert run.record.resumed[0]["from_step"] == 6
    same_as_unbroken(struck, run)


def test_a_killed_run_is_lost_and_goes_on(struck: Lab) -> None:
    """SIGKILL leaves a run that is shown as lost; the epoch's end is where it goes on."""
    strike(struck, signal.SIGKILL)
    run = struck.run()
    assert run.state == "lost"
    assert json.loads((run.folder / "run.json").read_text())["state"] == "running"
    assert struck.train(struck.path, "--resume", run.name).code == 0
    same_as_unbroken(struck, struck.run())


def test_a_run_without_a_checkpoint_begins_again(struck: Lab) -> None:
    """Nothing was trained that could be lost; it says so, and has the same end."""
    strike(struck, signal.SIGKILL, step=2)
    result = struck.train(struck.path, "--resume")
    assert result.code == 0, result.err
    assert "has written no checkpoint yet: it begins again" in result.err
    same_as_unbroken(struck, struck.run())


def test_a_completed_run_is_left_alone(lab: Lab) -> None:
    """It says so, and changes nothing."""
    lab.train(lab.path)
    run = lab.run()
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    for words in (["--resume"], ["--resume", run.name]):
        result = lab.train(lab.path, *words)
        assert result.code == 0
        assert f"run {run.name} is completed: there is nothing to resume" in result.err
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}


def test_there_must_be_a_run_to_resume(lab: Lab) -> None:
    """Without one, or with one of another script, nothing is created."""
    result = lab.train(lab.path, "--resume")
    assert result.code == ExitCode.USAGE
    assert "has no run to resume" in result.err and "leave out --resume" in result.err
    lab.train(lab.path)
    other = lab.hparams("other", {})
    result = lab.train(other, "--resume", "00_toy-hparams-v1")
    assert result.code == ExitCode.USAGE
    assert "is not one of toys/experiments/00_toy/other.py" in result.err
    result = lab.train(lab.path, "--resume", "00_tyo-hparams-v1")
    assert "did you mean" in result.err
    assert lab.train(lab.path, "--resume", "--dev-run", "1").code == ExitCode.USAGE
    assert len(lab.runs) == 1


def test_a_run_that_is_alive_is_not_resumed(struck: Lab) -> None:
    """Two processes never write one folder."""
    strike(struck, signal.SIGTERM)
    with struck.start("train", struck.path, env=struck.environment(SLOW="")) as process:
        deadline = time.monotonic() + 30
        record = struck.root / "data/artifacts/00_toy-hparams-v2/run.json"
        while not record.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        result = struck.train(struck.path, "--resume", "00_toy-hparams-v2")
        process.kill()
        process.communicate(timeout=60)
    assert result.code == ExitCode.USAGE
    assert "is being trained by process" in result.err


CHANGES = [
    ('"seed": 0', '"seed": 1', "the seed was 0 and is 1"),
    ('"count": 32', '"count": 40', "had 32 samples in batches of 8 and has 40"),
    ('"size": 8', '"size": 4', "in batches of 8 and has 32 samples in batches of 4"),
]


@pytest.mark.parametrize(("old", "new", "told"), CHANGES)
def test_what_must_not_change_is_refused(struck: Lab, old: str, new: str, told: str) -> None:
    """Other data or another seed would end elsewhere; `--not-exact` goes on all the same."""
    main = (struck.folder / "__main__.py").read_text()
    main = main.replace("loader(32, 1, shuffle=True)", "loader(c['count'], 1, shuffle=True)")
    main = main.replace("batch_size=8", "batch_size=SIZE").replace(
        "    module = TrainLabModule(",
        "    global SIZE\n    c = hparams['config']\n    SIZE = c['size']\n"
        "    module = TrainLabModule(",
    )
    struck.write("__main__.py", main)
    script = (
        '{"seed": 0, "config": {"count": 32, "size": 8}, "trainer": {"init": {"max_epochs": 3}}}'
    )
    struck.write("hparams.py", f"hparams = {script}\n")
    strike(struck, signal.SIGKILL)
    assert struck.run().state == "lost"

    struck.write("hparams.py", f"hparams = {script.replace(old, new)}\n")
    result = struck.train(struck.path, "--resume")
    assert result.code == ExitCode.USAGE, result.err
    assert told in result.err and "--not-exact" in result.err
    assert struck.run().state == "lost"
    result = struck.train(struck.path, "--resume", "--not-exact")
    assert result.code == 0, result.err
    assert told in result.err
    assert struck.run().state == "completed"


def test_not_exact_is_for_a_resume(lab: Lab) -> None:
    """A new run is exact in itself: who asks for less has forgotten something."""
    result = lab.command("train", lab.path, "--not-exact")
    assert result.code == ExitCode.USAGE
    assert "--not-exact is for --resume" in result.err and not lab.runs


def test_changed_hparams_are_listed(struck: Lab) -> None:
    """They are used, and the header says what they were."""
    strike(struck, signal.SIGTERM)
    struck.hparams("hparams", {"config": {"lr": 0.2}, "trainer": {"init": {"max_epochs": 4}}})
    result = struck.train(struck.path, "--resume")
    assert result.code == 0, result.err
    assert "trainer.init.max_epochs 3 -> 4" in result.err
    assert "config.lr nothing -> 0.2" in result.err and "config {}" not in result.err
    assert "the optimizers and schedulers go on with their settings in the checkpoint" in result.err
    assert struck.run().sidecar("last")["epoch"] == 3  # type: ignore[index]


def test_last_is_the_last_though_nothing_improves(lab: Lab) -> None:
    """After 4 epochs of a metric that never improves, `last` is of epoch 4, `best` of the first."""
    lab.config('hparams["config"].get("lr", 0.1)', "0.0")
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 4}}})
    lab.train(lab.path)
    sidecars = [lab.run().sidecar(name) for name in ("last", "previous", "best")]
    assert [sidecar["epoch"] for sidecar in sidecars if sidecar] == [3, 2, 0]


def test_the_best_ones_are_kept(lab: Lab) -> None:
    """`keep` of them, and `best` is the first of these."""
    trainer = {"init": {"max_epochs": 5}}
    lab.hparams("hparams", {"checkpoint": {"keep": 3}, "trainer": trainer})
    lab.train(lab.path)
    run = lab.run()
    names = sorted(path.stem for path in run.checkpoints_folder.glob("best*.ckpt"))
    assert names == ["best", "best-12", "best-16", "best-20"]
    scores = [value for _, value in scalars(run)["loss/validate"][1:]]
    assert run.best_score == pytest.approx(min(scores))


def test_a_damaged_last_is_replaced_by_the_one_before(struck: Lab) -> None:
    """It says so; the end is the same, for going on is exact from anywhere."""
    strike(struck, signal.SIGTERM)
    last = struck.run().checkpoint("last")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    result = struck.train(struck.path, "--resume")
    assert result.code == 0, result.err
    assert "last" in result.err and "is damaged" in result.err and "previous" in result.err
    same_as_unbroken(struck, struck.run())


def test_without_a_whole_checkpoint_nothing_is_trained(struck: Lab) -> None:
    """It never begins again in silence: one line, exit 1, and the run stays as it is."""
    strike(struck, signal.SIGTERM)
    run = struck.run()
    for name in ("last", "previous", "best"):
        run.checkpoint(name).write_bytes(b"")
    result = struck.train(struck.path, "--resume")
    assert result.code == ExitCode.CODE_FAILED
    assert result.err.count("\n") == 1 and "damaged" in result.err
    for path in run.checkpoints_folder.iterdir():
        path.unlink()
    result = struck.train(struck.path, "--resume")
    assert result.code == ExitCode.CODE_FAILED
    assert struck.run().state == "stopped"


def test_layers_that_are_made_late_can_go_on(struck: Lab) -> None:
    """They are not there yet when the checkpoint is looked at."""
    late = """
class Late(TrainLabModule):
    def setup(self, stage):
        self.more = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.more(super().forward(x))


def train_config"""
    path = struck.folder / "__main__.py"
    text = path.read_text().replace("\ndef train_config", late).replace("= TrainLab", "= Late")
    path.write_text(
        text.replace("(hparams):\n    module = LateModule", "(hparams):\n    module = Late")
    )
    assert strike(struck, signal.SIGTERM).code == 143
    result = struck.train(struck.path, "--resume")
    assert result.code == 0, result.err
    same_as_unbroken(struck, struck.run())


def test_a_best_one_that_is_damaged_is_not_tested(struck: Lab) -> None:
    """The run says which file it is."""
    path = struck.folder / "__main__.py"
    spoil = """
class Spoil(pl.Callback):
    def on_fit_end(self, trainer, module):
        for callback in trainer.checkpoint_callbacks:
            callback.run.checkpoint("best").write_bytes(b"spoilt")
"""
    text = path.read_text().replace("[Strike()]", "[Strike(), Spoil()]")
    path.write_text(text.replace('"val_dat', '"test_dataloaders": loader(16, 3), "val_dat') + spoil)
    result = struck.train(struck.path)
    assert result.code == ExitCode.CODE_FAILED
    assert "best of run 00_toy-hparams-v1 is damaged (its size is 6 bytes" in result.err


def test_an_exact_name_is_the_run_that_is_meant(struck: Lab) -> None:
    """Also where it begins the names of others."""
    strike(struck, signal.SIGTERM)
    run = struck.run()
    result = struck.train(struck.path, "--resume", run.name)
    assert result.code == 0, result.err
    assert struck.train(struck.path, "--resume", run.name).code == 0
    assert [each.name for each in struck.runs] == [run.name]


def test_a_signal_in_a_validation_ends_it_at_once(lab: Lab) -> None:
    """The state before it is written, and the validation is made anew when the run goes on."""
    lab.config(
        '"module": module',
        '"callbacks": [Strike()], "module": module',
    )
    main = (lab.folder / "__main__.py").read_text()
    strike_in_validation = STRUCK.replace(
        "def on_train_batch_end(self, trainer, *args):",
        "def on_validation_batch_end(self, trainer, *args):\n"
        "        self.seen = getattr(self, 'seen', 0) + 1",
    ).replace("{trainer.global_step}", "{self.seen}")
    lab.write("__main__.py", main + strike_in_validation)
    # Two batches of the baseline, two of the first epoch, the first of the second.
    assert strike(lab, signal.SIGTERM, step=5).code == ExitCode.TERMINATED
    assert lab.run().sidecar("last")["step"] == 8  # type: ignore[index]
    assert lab.train(lab.path, "--resume").code == 0
    same_as_unbroken(lab, lab.run())


def test_a_signal_at_the_start_leaves_a_run_that_goes_on(struck: Lab, tmp_path: Path) -> None:
    """Whatever was reached: no folder yet, or one that is begun again."""
    with struck.start("train", struck.path) as process:
        deadline = time.monotonic() + 30
        while not list((tmp_path / "data").glob("*/*/run.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPT
    assert struck.run().state == "stopped"
    assert struck.train(struck.path, "--resume").code == 0
    same_as_unbroken(struck, struck.run())
