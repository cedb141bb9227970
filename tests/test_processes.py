"""Which processes live, and who has a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from torch_lab.processes import FolderLock, is_alive, process_started

HOLDER = """
import os, sys, time
from pathlib import Path
from torch_lab.processes import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
{then}
time.sleep(60)
"""


@contextmanager
def holder(folder: Path, then: str = "") -> Iterator[subprocess.Popen[str]]:
    """Start a process that takes `folder`, does `then`, and lives on."""
    command = [sys.executable, "-c", HOLDER.format(then=then), folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_process_is_known_by_when_it_was_started() -> None:
    """Its number alone is given to others later."""
    started = process_started()
    assert started is not None and started <= time.time()
    assert is_alive(os.getpid(), started)
    assert is_alive(os.getpid(), None)
    assert not is_alive(os.getpid(), started - 60)


def test_what_was_killed_is_gone_even_if_nobody_waited_for_it() -> None:
    """A zombie has a number, and does nothing any more."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        started = process_started(process.pid)
        assert is_alive(process.pid, started)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(process.pid, started)
        assert process_started(process.pid) is None
    assert not is_alive(process.pid, None)


def test_one_process_has_a_folder_until_it_ends(tmp_path: Path) -> None:
    """However it ends; who waits for it gets the folder then."""
    lock = FolderLock(tmp_path)
    with holder(tmp_path) as process:
        assert not lock.take()
        process.kill()
        process.wait()
        assert lock.take(wait_s=5.0)
    assert not FolderLock(tmp_path).take(wait_s=0.2)
    lock.release()
    assert FolderLock(tmp_path).take()


def test_a_fork_does_not_keep_the_folder(tmp_path: Path) -> None:
    """A worker may outlive its parent by seconds, in which the run can be gone on with."""
    fork = "child = os.fork()\nif child: print(child, flush=True)"
    with holder(tmp_path, fork) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            assert not FolderLock(tmp_path).take()
            process.kill()
            process.wait()
            assert is_alive(child, None)
            assert FolderLock(tmp_path).take(wait_s=1.0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_fork_that_ends_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    """The lock is the parent's until it lets go of it."""
    lock = FolderLock(tmp_path)
    assert lock.take()
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    code = HOLDER.format(then="sys.exit()")
    other = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert other.stdout == "False\n"
    lock.release()


def test_who_joins_keeps_the_folder_too(tmp_path: Path) -> None:
    """A process that was spawned to train may outlive the one that took the folder."""
    member = FolderLock(tmp_path)
    with holder(tmp_path) as process:
        # It is there as soon as it says so, and is shared then.
        assert member.join()
        process.kill()
        process.wait()
    assert not FolderLock(tmp_path).take()
    member.release()
    assert FolderLock(tmp_path).take()


def test_where_there_are_no_locks_everybody_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems know none."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.take() and second.take()
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "gone").take()
