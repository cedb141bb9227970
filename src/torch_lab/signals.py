"""Signals that ask a run to end, as exceptions: the first asks, a second one insists."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from torch_lab.errors import Interrupted

__all__ = ["signals_as_exceptions"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise `Interrupted` in the main thread on SIGINT, SIGTERM and SIGHUP.

    A second signal, while the first is still being answered, ends the process at once. Other
    threads cannot have signal handlers: there the signals do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, _interrupt) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:
        signal.signal(each, _leave)
    raise Interrupted(signum)


def _leave(signum: int, frame: FrameType | None) -> None:
    os._exit(128 + signum)
