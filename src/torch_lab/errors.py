"""Everything that can go wrong, and the exit code that each ends the command with.

```
Exception
└── TorchLabError               1   the base of all of ours: a message, and often a hint
    ├── UserError               2   a mistake in what the user gave; nothing was created
    │   ├── ScriptError             a script that is not there, or that does not run
    │   ├── HparamsError            a wrong key, type or value in `hparams`
    │   ├── ComponentsError         a config function is missing, or returned something wrong
    │   └── CheckpointError         a run or a checkpoint is missing, or does not fit
    │       └── DamagedError    1   a checkpoint is damaged, and so is the one before it
    ├── NotWrittenError         1   checkpoints could not be written, several times in a row
    ├── LoaderError             1   a worker process of a DataLoader died or hangs
    ├── DeviceMemoryError       1   a device has too little memory
    ├── TrackingError           5   ClearML was demanded, and is not to be had
    ├── ServerError             1   a ClearML server refused what it was asked for
    │   └── UnreachableError    5   it does not answer, or cannot now
    ├── SomeRunsFailedError     3   several runs were asked for, and some failed
    ├── NonFiniteError          4   a loss became NaN or infinite
    └── UnbrokenRunError            verify-resume: the run fails unkilled; with its own exit code
BaseException
└── Interrupted     128 + signal    a signal asked the run to end
```
"""

from __future__ import annotations

import difflib
import enum
import signal
from collections.abc import Iterable
from typing import Final

__all__ = [
    "CheckpointError",
    "ComponentsError",
    "DamagedError",
    "DeviceMemoryError",
    "ExitCode",
    "HparamsError",
    "Interrupted",
    "LoaderError",
    "NonFiniteError",
    "NotWrittenError",
    "ScriptError",
    "ServerError",
    "SomeRunsFailedError",
    "TorchLabError",
    "TrackingError",
    "UnbrokenRunError",
    "UnreachableError",
    "UserError",
    "did_you_mean",
    "listed",
]

_LEAST_ALIKE: Final = 0.6
"""How much a name must have in common with the one that is suggested for it."""


class ExitCode(enum.IntEnum):
    """What the commands' exit codes mean."""

    DONE = 0
    """The run completed."""
    CODE_FAILED = 1
    """The user's code raised an exception, or what the run needs failed: disk, worker, memory."""
    USAGE = 2
    """The command line, a script or the hparams are wrong; nothing was created."""
    SOME_FAILED = 3
    """Several runs were asked for, and some of them failed."""
    NON_FINITE = 4
    """A loss became NaN or infinite."""
    NO_TRACKING = 5
    """Tracking was demanded, and is not to be had."""
    HANGUP = 128 + signal.SIGHUP
    """Stopped by SIGHUP."""
    INTERRUPT = 128 + signal.SIGINT
    """Stopped by SIGINT (Ctrl-C)."""
    WARNED = 128 + signal.SIGUSR1
    """Stopped by SIGUSR1, by which a scheduler says that time is up."""
    TERMINATED = 128 + signal.SIGTERM
    """Stopped by SIGTERM."""


class TorchLabError(Exception):
    """The base of all errors of torch_lab.

    Args:
        message: What is wrong and where, in one line.
        hint: How to mend it, when the message does not say it already.
    """

    exit_code = ExitCode.CODE_FAILED

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[TorchLabError], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)


class UserError(TorchLabError):
    """A mistake in what the user gave, found before anything was created."""

    exit_code = ExitCode.USAGE


class ScriptError(UserError):
    """A script that is not there, or that does not run."""


class HparamsError(UserError):
    """A wrong key, type or value in `hparams`."""


class ComponentsError(UserError):
    """A config function that is missing, or that returned something wrong."""


class CheckpointError(UserError):
    """A run or a checkpoint that is not there or does not fit."""


class DamagedError(CheckpointError):
    """A checkpoint is damaged, and there is no whole one to take instead."""

    exit_code = ExitCode.CODE_FAILED


class NotWrittenError(TorchLabError):
    """Checkpoints could not be written, several times in a row."""


class LoaderError(TorchLabError):
    """A worker process of a DataLoader died, or gives no batch."""


class DeviceMemoryError(TorchLabError):
    """A device has too little memory for a batch."""


class TrackingError(TorchLabError):
    """ClearML is not to be had: it is not set up here, does not answer, or does not let us in."""

    exit_code = ExitCode.NO_TRACKING


class ServerError(TorchLabError):
    """A ClearML server refused what it was asked for."""

    def __init__(self, message: str, hint: str | None = None, code: int = 0) -> None:
        super().__init__(message, hint)
        self.code = code
        """The HTTP status; 0 if there was no answer."""


class UnreachableError(ServerError):
    """A ClearML server did not answer, or cannot now: it may later."""

    exit_code = ExitCode.NO_TRACKING


class SomeRunsFailedError(TorchLabError):
    """Several runs were asked for, and some of them failed."""

    exit_code = ExitCode.SOME_FAILED


class NonFiniteError(TorchLabError):
    """A loss became NaN or infinite."""

    exit_code = ExitCode.NON_FINITE


class UnbrokenRunError(TorchLabError):
    """The training of a verification fails without any interruption.

    Args:
        message: What is wrong.
        exit_code: How its process ended.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code > 0 else 128 - exit_code  # type: ignore[assignment]


class Interrupted(BaseException):
    """A signal asked the run to end.

    Not an `Exception`, so that a user's `except Exception` does not swallow it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signal.Signals(signum)
        self.why = ""
        """Who wanted it, if it is known."""

    def __str__(self) -> str:
        return self.signum.name

    @property
    def exit_code(self) -> ExitCode:
        """128 and the signal's number, as shells have it."""
        return ExitCode(128 + self.signum)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean X?"` for the choice nearest to `name`, or `""` when none is near.

    Case does not count. Of several that are as near, the first is named; of a set, that of the
    alphabet.
    """
    matcher = difflib.SequenceMatcher(b=name.casefold())
    near, nearest = "", 0.0
    for choice in sorted(choices) if isinstance(choices, (set, frozenset)) else choices:
        matcher.set_seq1(choice.casefold())
        # Each is at least as much as the next, and quicker.
        ratios = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
        if all(ratio() >= _LEAST_ALIKE for ratio in ratios) and matcher.ratio() > nearest:
            near, nearest = choice, matcher.ratio()
    return f"; did you mean {near}?" if near else ""


def listed(things: Iterable[object], most: int = 3) -> str:
    """Return the first of `things` in words, and how many more there are: `"a, b, c and 2 more"`.

    Args:
        things: What to name.
        most: How many of them at most.
    """
    words = [str(thing) for thing in things]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
