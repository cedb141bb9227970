"""Which processes live, and which of them a run belongs to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

__all__ = ["ENDLESS", "FolderLock", "has_left", "is_alive", "leave", "process_started"]

ENDLESS = "torch_lab-endless"
"""The name of threads that may never end, though the process is to."""

_SCRIPTS = "torch_lab.scripts."
"""Below it are the user's scripts, as modules."""
_CLOCK_SLACK_S = 2.0
"""The start of a process is told from the boot, whose time moves a little when clocks are set."""
_RETRY_S = 0.1


def leave(code: int) -> NoReturn:
    """End this process with an exit code, at once where a thread might keep it for ever."""
    if any(thread.name == ENDLESS and thread.is_alive() for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    if not any(name.startswith(_SCRIPTS) for name in sys.modules):
        # Nothing of the user's is here, such as a file to be flushed; so the interpreter need not
        # look for it, three times, which is a sixth of a short command.
        gc.freeze()
    sys.exit(code)


def has_left(parent: int) -> bool:
    """Return whether the process that started this one is gone, be it in this moment.

    Args:
        parent: The number that it had.
    """
    until = time.monotonic() + _RETRY_S
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(_RETRY_S / 10)
    return os.getppid() != parent


def process_started(pid: int | None = None) -> float | None:
    """Return when a process was started, in seconds since 1970; None if it is gone.

    Args:
        pid: Its number; that of this process if not given.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        # What was killed and not waited for keeps its number, and does nothing any more.
        gone = process.status() == psutil.STATUS_ZOMBIE
        return None if gone else float(process.create_time())
    except psutil.Error:
        return None


def is_alive(pid: int, started: float | None) -> bool:
    """Return whether the process `pid` of this host lives.

    Args:
        pid: Its number, which another process may have got since.
        started: When it was started; None if that is not known, then its number is believed.
    """
    found = process_started(pid)
    if found is None or started is None:
        return found is not None
    return abs(found - started) <= _CLOCK_SLACK_S


class FolderLock:
    """A folder that one process has to itself, with those that it takes in.

    The operating system lets go of it when the last of these processes ends, however it ends. Where
    the file system knows no locks, everybody gets it.

    It is a `flock`. POSIX locks (`lockf`) are lost as soon as anything in the process closes the
    file, be it a copy of the folder. A `flock` is shared by forks instead: a DataLoader worker
    would keep it for the seconds by which it outlives a killed parent, so forks give it up at once.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._descriptor: int | None = None
        self._close: Callable[[], object] | None = None

    def take(self, wait_s: float = 0.0) -> bool:
        """Take the folder, and return whether it was free.

        Args:
            wait_s: How long to wait for it.

        Raises:
            OSError: The folder is not there, or nothing can be written in it.
        """
        until = time.monotonic() + wait_s
        while not self._locked(fcntl.LOCK_EX):
            if time.monotonic() >= until:
                return False
            time.sleep(_RETRY_S)
        # From here on it is shared with the processes that join. In between somebody else may take
        # it, as this is not one step.
        return self._locked(fcntl.LOCK_SH)

    def join(self) -> bool:
        """Hold the folder together with the process that took it, and return whether that works.

        For a process that writes to the folder too, and may outlive the one that took it.
        """
        return self._locked(fcntl.LOCK_SH)

    def release(self) -> None:
        """Let go of it, if it is held."""
        # To close a fork's copy takes nothing from the process that it comes from; to unlock would.
        if self._close is not None:
            self._close()
        self._close = self._descriptor = None

    def _locked(self, how: int) -> bool:
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.release()
                return False
        return True

    def _open(self) -> int:
        if self._descriptor is None:
            # Not inherited by programs that are started (Python's default), for writing because
            # NFS wants it so.
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            self._close = weakref.finalize(self, os.close, self._descriptor)
            os.register_at_fork(after_in_child=_Release(self))
        return self._descriptor


class _Release:
    """Releases a lock that still exists; what is registered for forks cannot be taken back."""

    def __init__(self, lock: FolderLock) -> None:
        self.lock = weakref.ref(lock)

    def __call__(self) -> None:
        lock = self.lock()
        if lock is not None:
            lock.release()
