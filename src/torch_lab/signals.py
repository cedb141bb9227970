"""Signals that ask a run to end: the first asks, a second one insists."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from torch_lab.errors import Interrupted

__all__ = ["StopRequest", "stopping_on_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_AT_ONCE = "stopping; a second signal ends the process at once"
_AFTER_BATCH = "stopping after this batch; a second signal ends the run at once"


class StopRequest:
    """The wish that a run ends, made by a signal.

    It is raised as `Interrupted` where the signal finds the program, unless `deferred` is set:
    then whoever set it calls `answer` at a point of its choice.

    Args:
        quiet: Say nothing: another process does.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.signum: int | None = None
        self.deferred = False
        self.last_words: Callable[[], str] = _ended
        """Returns what is said at the second signal. It is called wherever that finds the program,
        so it must neither import, print nor log anything."""
        self._quiet = quiet
        self._owner = os.getpid()

    def answer(self) -> None:
        """Raise `Interrupted` if there was a signal."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def take(self, signum: int, frame: FrameType | None) -> None:
        """Answer a signal: what `signal.signal` is given.

        A second one ends the process at once: whoever insists does not want to wait for files.
        """
        if os.getpid() != self._owner:
            _end_forked_process(signum)
        if self.signum is not None:
            self._leave(signum)
        self.signum = signum
        self._say(_AFTER_BATCH if self.deferred else _AT_ONCE)
        if not self.deferred:
            raise Interrupted(signum)

    def _leave(self, signum: int) -> None:
        try:
            self._say(self.last_words())
        finally:
            os._exit(128 + signum)

    def _say(self, words: str) -> None:
        # No `print`: the signal may have found the program in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"" if self._quiet else f"\n{words}\n".encode())


def _ended() -> str:
    return "ended at once"


@contextlib.contextmanager
def stopping_on_signals(*, quiet: bool = False) -> Iterator[StopRequest]:
    """Yield the wish to end that SIGINT, SIGTERM, SIGHUP and SIGUSR1 make.

    A line on stderr answers the first signal, another one the second, before the process leaves.

    A signal that the process was started to ignore (`nohup`) stays ignored. Other threads than the
    main one cannot have signal handlers: there the signals do what they did before.

    Args:
        quiet: Say nothing: another process does.
    """
    stop = StopRequest(quiet=quiet)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {each: signal.getsignal(each) for each in _SIGNALS}
    answered = [each for each, handler in before.items() if handler not in (None, signal.SIG_IGN)]
    for each in answered:
        signal.signal(each, stop.take)
    try:
        yield stop
    finally:
        for each in answered:
            signal.signal(each, before[each])


def _end_forked_process(signum: int) -> None:
    """End a worker that was forked with our handlers as it would have ended without them."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)
