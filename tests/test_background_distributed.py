"""`checkpoint.async` in two processes: what fails, is killed or stopped while one is written."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import CONFIG, Lab, Result
from test_train import scalars
from torch_lab.errors import ExitCode
from torch_lab.runs import Run
from warm import Warm

FAULTS = """
import contextlib
import errno
import os
import pathlib
import signal
import threading
import time

import pytorch_lightning as pl
from torch_lab import checkpoints

RANK = os.environ.get("LOCAL_RANK", "0")
FAULT, _, NUMBER = os.environ.get("FAULT", "").partition(" ")
pathlib.Path("pid" + RANK).write_text(str(os.getpid()))


class Slow(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        time.sleep(float(os.environ.get("STEP_TAKES", "0")))

    def on_train_epoch_start(self, trainer, *args):
        filler = pathlib.Path(trainer.default_root_dir) / "filler"
        if FAULT == "fill" and RANK == "0" and trainer.current_epoch == 1:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if trainer.current_epoch == int(NUMBER or 0):
            filler.unlink(missing_ok=True)


class Written:
    \"\"\"Files that threads write, of which the environment says what happens to them.\"\"\"

    def __init__(self):
        self.count = 0
        self.write = checkpoints._write

    def __call__(self, values, path):
        if threading.current_thread() is threading.main_thread():
            return self.write(values, path)
        self.count += 1
        if FAULT == "full" and self.count <= int(NUMBER):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if FAULT == "slow" and self.count == int(NUMBER):
            pathlib.Path("writing").touch()
            time.sleep(1)
        if FAULT == "die" and self.count == int(NUMBER):
            path.write_bytes(b"PK" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.write(values, path)


checkpoints._write = Written()
"""
MAIN = CONFIG.replace('"module": module', '"callbacks": [Slow()], "module": module').replace(
    "loader(32,", "loader(64,"
)
INIT = {
    "max_epochs": 3,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "accelerator": "cpu",
    "devices": 2,
    "strategy": "ddp",
}


class Pair:
    """A project whose runs have two processes: 4 steps an epoch, 3 epochs."""

    def __init__(self, lab: Lab, python: str) -> None:
        self.lab = lab
        self.python = python
        lab.write("__main__.py", MAIN + FAULTS)
        lab.hparams("hparams", {"trainer": {"init": INIT}, "checkpoint": {"async": True}})
        assert self.train().code == 0
        self.unbroken = self.run

    @property
    def run(self) -> Run:
        """The newest run."""
        return self.lab.runs[-1]

    def train(self, *words: str, **variables: str) -> Result:
        """Train in processes of their own."""
        return self.lab.command("train", self.lab.path, *words, python=self.python, **variables)

    def start(self, *words: str, until: str, **variables: str) -> subprocess.Popen[str]:
        """Begin to train, and return when there is a file `until`."""
        for name in ("writing", "pid0", "pid1"):
            (self.lab.root / name).unlink(missing_ok=True)
        environment = self.lab.environment(**variables)
        command = ["train", self.lab.path, *words]
        process = self.lab.start(*command, python=self.python, env=environment)
        deadline = time.monotonic() + 60
        while not (self.lab.root / until).exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        return process

    def strike(self, rank: int, signum: int) -> None:
        """Send a signal to one of the processes."""
        os.kill(int((self.lab.root / f"pid{rank}").read_text()), signum)

    def step(self, name: str) -> int | None:
        """Return the step of a checkpoint of the newest run."""
        step: int | None = (self.run.sidecar(name) or {}).get("step")
        return step

    def ends_as_unbroken(self) -> None:
        """Check that the newest run goes on, to the same bits, and leaves nothing behind."""
        result = self.train("--resume")
        assert result.code == 0, result.err
        run = self.run
        assert run.state == "completed" and not list(run.checkpoints_folder.glob(".*"))
        assert scalars(run) == scalars(self.unbroken) and run.metrics == self.unbroken.metrics
        for name in ("last", "best"):
            one, other = (
                torch.load(each.checkpoint(name), weights_only=True)
                for each in (run, self.unbroken)
            )
            assert one["global_step"] == other["global_step"]
            for key, tensor in one["state_dict"].items():
                assert torch.equal(tensor, other["state_dict"][key]), key


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Pair:
    """One for all tests: each begins a run of its own."""
    root = tmp_path_factory.mktemp("pair")
    (root / "pyproject.toml").touch()
    return Pair(Lab(root, None), warm.python)  # type: ignore[arg-type]


@pytest.fixture
def pair(project: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.chdir(project.lab.root)
    yield project
    for rank in (0, 1):
        told = project.lab.root / f"pid{rank}"
        assert not told.exists() or not Path(f"/proc/{told.read_text()}").exists(), rank


def test_a_failed_write_is_told_once(pair: Pair) -> None:
    """Both processes go on, the next one is written, and the end is the same."""
    result = pair.train(FAULT="full 1")
    assert result.code == 0, result.err
    told = "checkpoints last and best were not written: No space left on device; none was since"
    assert result.err.count(told) == 1 and "(1 of 3 before the run stops)" in result.err
    assert result.err.count("checkpoints are written again") == 1
    assert (pair.step("last"), pair.step("best")) == (12, 12)
    assert scalars(pair.run) == scalars(pair.unbroken)


@pytest.mark.slow
def test_so_many_failed_writes_end_both(pair: Pair) -> None:
    """Neither waits for the other; what stands is gone on from."""
    result = pair.train("--set", "checkpoint.give_up_after=2", FAULT="full 2")
    assert result.code == ExitCode.CODE_FAILED
    assert result.err.count("error: 2 checkpoints in a row could not be written since") == 1
    assert pair.run.state == "failed" and pair.step("last") is None
    pair.ends_as_unbroken()


@pytest.mark.parametrize("write", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_kill_within_a_write_leaves_the_one_before(pair: Pair, write: int) -> None:
    """The other process ends by itself; half of a file is no checkpoint."""
    result = pair.train(FAULT=f"die {write}")
    assert result.code == -signal.SIGKILL, result.err
    assert pair.run.state == "lost" and pair.step("last") == {1: None, 2: 4}[write]
    pair.ends_as_unbroken()


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_waits_for_what_is_written(pair: Pair, rank: int) -> None:
    """Whichever process gets it; then the checkpoint of its own moment is written."""
    process = pair.start(until="writing", FAULT="slow 2", STEP_TAKES="0.05")
    pair.strike(rank, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.TERMINATED, err
    assert pair.run.state == "stopped" and pair.step("previous") == 8
    assert 8 < (pair.step("last") or 0) <= 12
    pair.ends_as_unbroken()


@pytest.mark.slow
def test_the_death_of_another_process_waits_for_it(pair: Pair) -> None:
    """What rank zero was writing is whole, and is gone on from."""
    process = pair.start(until="writing", FAULT="slow 2", STEP_TAKES="0.05")
    pair.strike(1, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None), err
    assert pair.run.state == "failed" and pair.step("last") == 8, err
    pair.ends_as_unbroken()


@pytest.mark.slow
def test_kills_of_either_at_any_moment(pair: Pair) -> None:
    """Whatever is being written: the run goes on, again and again, and ends with the same bits."""
    every = ["--set", "checkpoint.every_n_steps=1"]
    before = len(pair.lab.runs)
    for kill in range(10):
        words = ["--resume"] if len(pair.lab.runs) > before else every
        process = pair.start(*words, until="pid1", STEP_TAKES="0.1", FAULT=f"slow {1 + kill % 3}")
        time.sleep(0.8 + 0.1 * kill)
        with contextlib.suppress(ProcessLookupError):  # It was quicker.
            pair.strike(kill % 2, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert "is damaged" not in err
        if pair.run.state == "completed":  # The kill may have come after that.
            break
    pair.ends_as_unbroken()


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: training goes on, says so once, and writes again when there is room."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        result = pair.train(FAULT="fill 2", TORCH_LAB_ROOT=str(tmp_path))
        assert result.code == 0, result.err
        assert result.err.count("checkpoints last and best were not written: No space left") == 1
        assert result.err.count("checkpoints are written again") == 1
        (run,) = [Run.read(path.parent) for path in tmp_path.glob("data/artifacts/*/run.json")]
        assert (run.sidecar("last") or {})["step"] == 12
        assert scalars(run) == scalars(pair.unbroken)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
