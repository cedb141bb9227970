"""Signals that ask a run to end, as exceptions: the first asks, a second one insists."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType

from torch_lab.errors import Interrupted

__all__ = ["signals_as_exceptions"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise `Interrupted` in the main thread on SIGINT, SIGTERM and SIGHUP.

    A second signal, while the first is still being answered, ends the process at once. A signal
    that the process was started to ignore (`nohup`) stays ignored. Other threads than the main one
    cannot have signal handlers: there the signals do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in _SIGNALS}
    answered = [each for each, handler in before.items() if handler not in (None, signal.SIG_IGN)]
    handler = functools.partial(_interrupt, os.getpid(), answered)
    for each in answered:
        signal.signal(each, handler)
    try:
        yield
    finally:
        for each in answered:
            signal.signal(each, before[each])


def _interrupt(
    owner: int, answered: Iterable[signal.Signals], signum: int, frame: FrameType | None
) -> None:
    if os.getpid() != owner:
        _end_forked_process(signum)
    for each in answered:
        signal.signal(each, signal.SIG_DFL)
    raise Interrupted(signum)


def _end_forked_process(signum: int) -> None:
    """End a worker that was forked with our handlers as it would have ended without them."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)
