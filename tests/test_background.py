"""`checkpoint.async`: checkpoints are copied at their point, and written while training goes on."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CONFIG, Lab
from test_resume import STRUCK, same_as_unbroken, strike
from test_train import scalars
from torch_lab import checkpoints
from torch_lab.checkpoints import AtomicCheckpointIO
from torch_lab.errors import ExitCode

WATCHED = (
    STRUCK
    + """
STEPS = []


class Watch(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        STEPS.append(trainer.global_step)
        time.sleep(float(os.environ.get("STEP_TAKES", "0")))
        if os.environ.get("FAIL") == f"{trainer.global_step}":
            raise ArithmeticError("enough")
"""
)


@pytest.fixture
def background(lab: Lab) -> Lab:
    """A project whose checkpoints are written in the background: 4 steps an epoch, 3 epochs."""
    main = CONFIG.replace('"module": module', '"callbacks": [Strike(), Watch()], "module": module')
    lab.write("__main__.py", main + WATCHED)
    trainer = {"init": {"max_epochs": 3, "log_every_n_steps": 1, "enable_progress_bar": False}}
    lab.hparams("hparams", {"trainer": trainer, "checkpoint": {"async": True}})
    return lab


class Writing:
    """What happens while checkpoints are written in the background."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at_once = self.most_at_once = self.count = 0
        self._write = checkpoints._write
        self.happens: Callable[[Path], None] = lambda path: None
        patch.setattr(checkpoints, "_write", self.write)

    def write(self, values: Mapping[str, Any], path: Path) -> str:
        if threading.current_thread() is threading.main_thread():
            return self._write(values, path)
        self.at_once += 1
        self.count += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.happens(path)
            return self._write(values, path)
        finally:
            self.at_once -= 1


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Writing:
    return Writing(monkeypatch)


def odd_state() -> dict[str, Any]:
    """Return a state that shares memory and objects, and holds tensors of all kinds."""
    x, numbers = torch.arange(24.0).reshape(4, 6), [1, 2]
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6))
    return {
        "state_dict": {**model.state_dict(), "tied": x, "view": x[1:3], "turned": x.t()},
        "bare": model.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "sparse": torch.eye(3).to_sparse(),
        "numbers": [numbers, numbers, (1, numbers), {"a": numbers}],
        "global_step": 3,
    }


def test_a_snapshot_makes_the_same_file(tmp_path: Path) -> None:
    """Byte by byte, sidecar and all, and whatever the training does to its state meanwhile."""
    files, state = AtomicCheckpointIO(), odd_state()
    files.save_checkpoint(state, tmp_path / "waited.ckpt")
    for _ in range(2):  # The second lies in the memory of the first.
        snapshot = files.snapshot(state)
        for tensor in (state["state_dict"]["tied"], state["half"], state["parameter"].data):
            tensor.add_(1)
        state["numbers"][0].append(3)
        files.save_checkpoint(snapshot, tmp_path / "copied.ckpt")
        names = [f"{stem}.{kind}" for kind in ("ckpt", "json") for stem in ("waited", "copied")]
        waited, copied, *sidecars = ((tmp_path / name).read_bytes() for name in names)
        assert hashlib.sha256(waited).digest() == hashlib.sha256(copied).digest()
        assert sidecars[0] == sidecars[1]
        state["numbers"][0].pop()
        for tensor in (state["state_dict"]["tied"], state["half"], state["parameter"].data):
            tensor.sub_(1)


def test_what_shares_no_memory_with_a_file_is_copied_too() -> None:
    """Conjugates, which are a flag on somebody else's memory, are what they were."""
    x = torch.view_as_complex(torch.randn(3, 2))
    snapshot = AtomicCheckpointIO().snapshot({"x": x.conj()})
    before = x.conj().clone()
    x.zero_()
    assert torch.equal(snapshot["x"], before)


def test_training_goes_on_meanwhile(background: Lab, writing: Writing) -> None:
    """Steps are made while a file is written; the last file is waited for; the end is the same."""
    assert background.train(background.path).code == 0
    plain, made = background.run(), []

    def two_steps(path: Path) -> None:
        steps = own_steps()
        began, deadline = len(steps), time.monotonic() + 10
        while len(steps) < began + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        made.append(len(steps) - began)

    writing.happens = two_steps
    result = background.train(background.path)
    assert result.code == 0, result.err
    assert len(made) == 2 and min(made) >= 2
    slow = background.runs[-1]
    assert scalars(slow) == scalars(plain) and slow.metrics == plain.metrics
    assert slow.sidecar("last")["step"] == 12  # type: ignore[index]
    assert slow.record.hparams["checkpoint"]["async"] is True


def own_steps() -> list[int]:
    """Return the list that the project's own module, the one that was loaded last, appends to."""
    steps: list[int] = next(m for m in reversed(sys.modules.values()) if hasattr(m, "STEPS")).STEPS
    return steps


def test_the_next_one_waits(background: Lab, writing: Writing) -> None:
    """With one due at every step none is left out, and two are never written at once."""
    background.hparams(
        "hparams",
        {
            "trainer": {"init": {"max_epochs": 2, "log_every_n_steps": 1}},
            "checkpoint": {"async": True, "every_n_steps": 1, "keep": 2},
        },
    )
    writing.happens = lambda path: time.sleep(0.02)
    assert background.train(background.path).code == 0
    assert writing.most_at_once == 1 and writing.count >= 6
    run = background.run()
    assert not list(run.checkpoints_folder.glob(".*"))
    names = sorted(path.stem for path in run.checkpoints_folder.glob("best*.ckpt"))
    assert names == ["best", "best-4", "best-8"]
    same_as_unbroken(background, run)


@pytest.mark.parametrize("step", [5, 6])
def test_a_signal_waits(background: Lab, writing: Writing, step: int) -> None:
    """For the file that is being written, and for the one of its own moment."""
    writing.happens = lambda path: time.sleep(0.3)
    stopped = strike(background, signal.SIGTERM, step=step)
    assert stopped.code == ExitCode.TERMINATED, stopped.err
    run = background.run()
    assert (run.state, run.sidecar("last")["step"]) == ("stopped", step)  # type: ignore[index]
    assert run.sidecar("previous")["step"] == 4  # type: ignore[index]
    assert background.train(background.path, "--resume").code == 0
    same_as_unbroken(background, background.run())


@pytest.mark.parametrize("writes", [1, 2])
def test_a_kill_within_a_write_leaves_the_one_before(
    background: Lab, writing: Writing, writes: int
) -> None:
    """Half of a file is no checkpoint; the run goes on from the one of before, or begins again."""

    def die(path: Path) -> None:
        if writing.count == writes:
            path.write_bytes(b"PK" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    writing.happens = die
    assert background.forked(background.path).code == -signal.SIGKILL
    run = background.run()
    assert run.state == "lost"
    last = run.sidecar("last") or {}
    assert last.get("step") == {1: None, 2: 4}[writes]
    writing.happens = lambda path: None
    result = background.train(background.path, "--resume")
    assert result.code == 0, result.err
    run = background.run()
    assert not list(run.checkpoints_folder.glob(".*"))
    same_as_unbroken(background, run)


@pytest.mark.slow
def test_kills_at_any_moment(background: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is being written: the run goes on, again and again, and ends with the same bits."""
    trainer = {"init": {"max_epochs": 3, "log_every_n_steps": 1, "enable_progress_bar": False}}
    section = {"async": True, "every_n_steps": 1}
    background.hparams("hparams", {"trainer": trainer, "checkpoint": section})
    monkeypatch.setenv("STEP_TAKES", "0.02")
    words: list[str] = []
    for kill in range(12):
        child = os.fork()
        if not child:
            background._in_fork(
                [background.path, *words],
                {},
                [background.root / name for name in ("killed.out", "killed.err")],
            )
            os._exit(0)
        time.sleep(0.5 + 0.04 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        words = ["--resume"] if background.runs else []
    result = background.train(background.path, *words)
    assert result.code == 0, result.err
    same_as_unbroken(background, background.runs[0])


def full(count: int, writing: Writing, path: Path) -> None:
    """Fail as a full disk does, for the first so many times."""
    if writing.count <= count:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_failed_write_counts(background: Lab, writing: Writing) -> None:
    """It is told at the next point, and the next one is written; the best is one that is there."""
    writing.happens = functools.partial(full, 1, writing)
    result = background.train(background.path)
    assert result.code == 0, result.err
    told = "checkpoints last and best were not written: No space left on device; none was since"
    assert result.err.count(told) == 1 and "(1 of 3 before the run stops)" in result.err
    assert "checkpoints are written again" in result.err
    run = background.run()
    assert run.sidecar("last")["step"] == 12 and run.sidecar("best")["step"] == 12  # type: ignore[index]
    assert run.best_score == run.sidecar("best")["score"]  # type: ignore[index]


def test_so_many_failed_writes_end_the_run(background: Lab, writing: Writing) -> None:
    """As `give_up_after` says; what stands is resumed from."""
    trainer = {"init": {"max_epochs": 3, "log_every_n_steps": 1, "enable_progress_bar": False}}
    section = {"async": True, "give_up_after": 2}
    background.hparams("hparams", {"trainer": trainer, "checkpoint": section})
    writing.happens = functools.partial(full, 2, writing)
    result = background.train(background.path)
    assert result.code == ExitCode.CODE_FAILED
    assert "2 checkpoints in a row could not be written since" in result.err
    assert background.run().state == "failed"
    assert background.train(background.path, "--resume").code == 0
    same_as_unbroken(background, background.run())


def test_another_error_in_the_thread_ends_the_run(background: Lab, writing: Writing) -> None:
    """It is no fault of the disk, and is raised in the training."""

    def refuse(path: Path) -> None:
        raise RuntimeError("not today")

    writing.happens = refuse
    result = background.train(background.path)
    assert result.code == ExitCode.CODE_FAILED and "not today" in result.err


def test_an_error_waits(background: Lab, writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun before a training failed is there when its run is closed."""
    writing.happens = lambda path: time.sleep(0.5)
    monkeypatch.setenv("FAIL", "5")
    result = background.train(background.path)
    assert result.code == ExitCode.CODE_FAILED and "enough" in result.err
    run = background.run()
    assert run.sidecar("last")["step"] == 4  # type: ignore[index]
    assert not list(run.checkpoints_folder.glob(".*"))
    monkeypatch.delenv("FAIL")
    assert background.train(background.path, "--resume").code == 0
    same_as_unbroken(background, background.run())


def test_an_error_tells_of_a_failed_write(
    background: Lab, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no next point that would."""
    writing.happens = functools.partial(full, 1, writing)
    monkeypatch.setenv("FAIL", "5")
    result = background.train(background.path)
    assert result.code == ExitCode.CODE_FAILED and "enough" in result.err
    assert "checkpoints last and best were not written: No space left on device" in result.err


def test_files_of_somebody_else_are_waited_for(background: Lab, writing: Writing) -> None:
    """Of another plugin nothing is known; a line says so."""
    script = background.folder / "hparams.py"
    script.write_text(
        "from lightning_fabric.plugins import TorchCheckpointIO\n\n"
        + script.read_text().replace("'init': {", "'init': {'plugins': [TorchCheckpointIO()], ")
    )
    result = background.train(background.path)
    assert result.code == 0, result.err
    assert (
        "training waits for checkpoints all the same: TorchCheckpointIO writes them" in result.err
    )
    assert writing.count == 0 and background.run().checkpoint("last").is_file()


def test_async_is_yes_or_no(lab: Lab) -> None:
    """As any other key of its kind."""
    result = lab.train(lab.hparams("hparams", {"checkpoint": {"async": 1}}))
    assert result.code == ExitCode.USAGE
    assert "checkpoint.async must be True or False, not 1 (int)" in result.err
