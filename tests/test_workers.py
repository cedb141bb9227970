"""The processes that make batches: they end with their parent, and their failures are explained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from torch_lab.errors import LoaderError
from torch_lab.loaders import Loaders
from torch_lab.samplers import Position
from torch_lab.workers import explained

PARENT = """
import os
import time
from torch.utils.data import DataLoader, Dataset
from torch_lab.loaders import Loaders
from torch_lab.samplers import Position


class Slow(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        os.write(1, b"%d\\n" % index)  # In one piece: the other worker writes too.
        time.sleep(600)


if __name__ == "__main__":
    loader = DataLoader(Slow(), 1, num_workers=2, multiprocessing_context="{context}")
    next(iter(Loaders(Position(1)).prepare(loader, "train")))
"""


@pytest.mark.parametrize("context", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_no_worker_outlives_its_parent(context: str, tmp_path: Path) -> None:
    """Killed without a word, while the workers sleep in the user's code."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(context=context))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            assert {parent.stdout.readline() for _ in range(2)} == {b"0\n", b"1\n"}
            children = psutil.Process(parent.pid).children(recursive=True)
            assert len(children) >= 2
        finally:
            parent.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


class Mortal(Dataset[int]):
    """Ends its process, or sleeps, at the fifth sample."""

    def __init__(self, end: str) -> None:
        self.end = end

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if index == 5:
            time.sleep(0.3)  # What was made before is handed over: nobody is left with a lock.
            if self.end == "sleep":
                time.sleep(600)
            if self.end.isdigit():
                os._exit(int(self.end))
            os.kill(os.getpid(), signal.Signals[self.end])
        return index


def failure(end: str, **options: Any) -> tuple[LoaderError, int]:
    """Return what a worker's end is explained as, and how many batches arrived before."""
    options = {"batch_size": 2, "num_workers": 2} | options
    loaders = Loaders(Position(1), timeout=1.5 if end == "sleep" else 60.0)
    loader = loaders.prepare({"a": DataLoader(Mortal(end), **options)}, "train")["a"]
    arrived = 0
    iterator = iter(loader)
    with pytest.raises(RuntimeError) as caught:
        for _ in iterator:
            arrived += 1
    error = explained(caught.value, loaders.watches)
    for worker in iterator._workers:
        if worker.is_alive():
            worker.terminate()
    iterator._shutdown_workers()
    assert error is not None
    return error, arrived


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("SIGKILL", "was killed by SIGKILL"),
        pytest.param("3", "ended with exit code 3", marks=pytest.mark.slow),
    ],
)
def test_a_dead_worker_is_named_with_what_it_was_at(end: str, how: str) -> None:
    """Its number, how it ended, the batch and the samples; of memory only what is known."""
    error, _ = failure(end)
    assert error.message.startswith("worker 0 of train_dataloaders['a'] (pid ")
    assert error.message.endswith(f"{how} while it made sample 5 for batch 2")
    assert ("a lack of memory is the usual cause" in (error.hint or "")) == (end == "SIGKILL")


def test_a_worker_that_leaves_without_an_error_is_missed_before_the_time_limit() -> None:
    """Its exit code is 0, so nothing tells that it is gone."""
    error, _ = failure("0")
    assert "ended with exit code 0 while it made sample 5 for batch 2" in error.message


def test_a_hanging_worker_is_given_up_after_a_time() -> None:
    """The error names the key, the time and the samples."""
    error, arrived = failure("sleep")
    assert arrived == 2
    assert error.message == (
        "worker 0 of train_dataloaders['a'] gave no batch for 1.5 s (loader_timeout) while it made"
        " sample 5 for batch 2"
    )
    assert "loader_timeout" in (error.hint or "")


def test_a_time_limit_of_the_users_own_is_kept() -> None:
    """And none is set where there are no workers, or none is wanted."""
    own = Loaders(Position(1)).prepare(DataLoader(range(3), num_workers=1, timeout=7), "train")
    none = Loaders(Position(1), timeout=None).prepare(DataLoader(range(3), num_workers=1), "train")
    here = Loaders(Position(1)).prepare(DataLoader(range(3)), "train")
    ours = Loaders(Position(1)).prepare(DataLoader(range(3), num_workers=1), "train")
    assert [each.timeout for each in (own, none, here, ours)] == [7, 0, 0, 600]


def test_other_errors_are_not_explained() -> None:
    """Neither those of the user's code, nor those of processes that are nobody's worker."""
    loaders = Loaders(Position(1))
    assert explained(RuntimeError("timed out"), loaders.watches) is None
    assert explained(ValueError("DataLoader timed out after 5 seconds"), loaders.watches) is None
    stranger = RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. Details are")
    error = explained(stranger, loaders.watches)
    assert error is not None
    assert error.message == "a worker of a DataLoader (pid 1) was killed (Killed)"


def test_an_error_in_the_chain_is_explained() -> None:
    """User code may have wrapped it."""
    loaders = Loaders(Position(1))
    try:
        try:
            raise RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly")
        except RuntimeError as error:
            raise ValueError("no batch") from error
    except ValueError as error:
        found = explained(error, loaders.watches)
    assert found is not None
    assert found.message == "a worker of a DataLoader (pid 1, 2) ended unexpectedly"


class Groups(Dataset[int]):
    """The process group that makes the samples."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return os.getpgid(0)


def began(worker: int) -> None:
    """Say that the user's function was called."""
    torch.manual_seed(worker)
    os.environ["BEGAN"] = str(worker)


class Environment(Groups):
    """What the user's function has set."""

    def __getitem__(self, index: int) -> int:
        return int(os.environ.get("BEGAN", "-1"))


def test_signals_to_the_group_do_not_reach_workers() -> None:
    """Ctrl-C is for the main process, which may still need them; the user's start is made."""
    loader = Loaders(Position(1)).prepare(DataLoader(Groups(), num_workers=1), "train")
    assert os.getpgid(0) not in [int(group) for group in loader]
    own = DataLoader(Environment(), num_workers=2, worker_init_fn=began)
    assert [int(x) for x in Loaders(Position(1)).prepare(own, "train")] == [0, 1]
