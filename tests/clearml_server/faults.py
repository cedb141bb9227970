"""Faults that a test asks for: what a server, or the network in front of it, does wrong."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = [
    "DROP",
    "ERROR500",
    "HANG",
    "REFUSE",
    "UNAUTHORIZED",
    "Fault",
    "FaultKind",
    "FaultSwitch",
    "slow",
]


class FaultKind(StrEnum):
    """What goes wrong."""

    REFUSE = "refuse"
    HANG = "hang"
    DROP = "drop"
    SLOW = "slow"
    ERROR500 = "error500"
    UNAUTHORIZED = "unauthorized401"


def _always(_: str) -> bool:
    return True


@dataclass(frozen=True)
class Fault:
    """A fault, for all requests or for those whose endpoint (or file's path) matches."""

    kind: FaultKind
    seconds: float = 0.0
    matches: Callable[[str], bool] = _always

    def only(self, matches: Callable[[str], bool]) -> "Fault":
        """Return this fault for some requests only.

        Raises:
            ValueError: For `REFUSE`, which happens before there is a request.
        """
        if self.kind is FaultKind.REFUSE:
            raise ValueError("a closed port cannot tell requests apart: use DROP instead of REFUSE")
        return replace(self, matches=matches)


REFUSE = Fault(FaultKind.REFUSE)
"""The port is closed: connecting fails at once."""
HANG = Fault(FaultKind.HANG)
"""A request is read and never answered; once healed, its connection is closed."""
DROP = Fault(FaultKind.DROP)
"""A request is read, then the connection is closed."""
ERROR500 = Fault(FaultKind.ERROR500)
"""The answer is an internal error."""
UNAUTHORIZED = Fault(FaultKind.UNAUTHORIZED)
"""The answer is that the token, or the secret, is not good."""


def slow(seconds: float) -> Fault:
    """Return the fault of answering right, but only after some seconds."""
    return Fault(FaultKind.SLOW, seconds)


class FaultSwitch:
    """The fault of one listener; changing it wakes the requests that wait in the one before."""

    def __init__(self) -> None:
        self._current: Fault | None = None
        self._changed = threading.Event()

    @property
    def current(self) -> Fault | None:
        return self._current

    def set(self, fault: Fault | None) -> None:
        """Change the fault, at any moment and from any thread."""
        previous, self._changed = self._changed, threading.Event()
        self._current = fault
        previous.set()

    def wait(self, endpoint: str) -> FaultKind | None:
        """Sit out what the fault says about a request, and return what is left to do about it."""
        changed, fault = self._changed, self._current
        if fault is None or not fault.matches(endpoint):
            return None
        if fault.kind is FaultKind.SLOW:
            changed.wait(fault.seconds)
            return None
        if fault.kind is FaultKind.HANG:
            changed.wait()
        return fault.kind
