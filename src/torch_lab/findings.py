"""What a check of a script finds, one thing after another."""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch_lab.console import place_of, rendered
from torch_lab.errors import TorchLabError

__all__ = ["Finding", "Findings", "Verdict"]

_OURS = logging.getLogger("torch_lab")
_OF_SCRIPTS = "torch_lab.scripts."
"""How the names of the loggers begin that scripts have, of which the user is the author."""


class Verdict(enum.StrEnum):
    """What a check says of what it looked at."""

    OK = "ok"
    WARNING = "warning"
    """It may be meant so."""
    NOT_OK = "not ok"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    """What it looked at."""
    verdict: Verdict
    told: str = ""
    """What there is to say of it, in a line."""
    details: str = ""
    """What more there is to say of what is not ok: a hint, or a traceback."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, for programs."""

    def record(self) -> dict[str, Any]:
        """Return all of it for a program."""
        return {
            "check": self.check,
            "verdict": str(self.verdict),
            "told": self.told,
            "details": self.details or None,
            **({"values": dict(self.values)} if self.values else {}),
        }


class _Ended(Exception):  # noqa: N818
    """Something is not ok that all that would come after it needs."""


class Findings:
    """What is found of one script, in the order in which it is."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def add(self, check: str, verdict: Verdict, told: str = "", **values: Any) -> None:
        """Note what a check found.

        Args:
            check: What it looked at.
            verdict: What it says of it.
            told: What there is to say, in a line.
            values: What was measured, for programs.
        """
        self.all.append(Finding(check, verdict, told, values=values))

    def ok(self, check: str, told: str = "", **values: Any) -> None:
        """Note that something is as it should be; arguments are those of `add`."""
        self.add(check, Verdict.OK, told, **values)

    def warn(self, check: str, told: str, **values: Any) -> None:
        """Note what may be a mistake, or be meant so; arguments are those of `add`."""
        self.add(check, Verdict.WARNING, told, **values)

    @contextlib.contextmanager
    def step(self, check: str, **others: type[Exception]) -> Iterator[None]:
        """Note what is raised meanwhile as not ok, and what torch_lab warns of as warnings.

        What is raised ends the check of the script: see `until_the_end`.

        Args:
            check: What is looked at.
            others: Errors that say something of another check, by its name.
        """
        with _warnings_of_ours() as warned:
            try:
                yield
            except (Exception, SystemExit) as error:
                check = next((name for name in others if isinstance(error, others[name])), check)
                self.all.append(Finding(check, Verdict.NOT_OK, *_words_of(error)))
                raise _Ended from None
            finally:
                self.all += [Finding(check, Verdict.WARNING, told) for told in warned]

    def end(self) -> None:
        """End the check of the script: nothing that would come needs to be looked at, or can be."""
        raise _Ended

    def until_the_end(self) -> contextlib.suppress:
        """Go through the steps of a script, as far as they can be gone."""
        return contextlib.suppress(_Ended)


def _words_of(error: BaseException) -> tuple[str, str]:
    """Return what went wrong in a line, and where in the user's code; and all the rest."""
    if isinstance(error, TorchLabError):
        first, *rest = error.message.splitlines() or [""]
        return first, "\n".join([*rest, *(error.hint or "").splitlines()])
    first = next(iter(str(error).splitlines()), "")
    told = f"{type(error).__name__}: {first}" if first else type(error).__name__
    place = place_of(error)
    return f"{place}: {told}" if place else told, rendered(error)


class _Collector(logging.Handler):
    """Keeps what torch_lab warns of; what scripts log goes its way."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.warned: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(_OF_SCRIPTS):
            logging.getLogger().handle(record)
        elif record.levelno >= logging.WARNING:
            self.warned.append(record.getMessage())


@contextlib.contextmanager
def _warnings_of_ours() -> Iterator[list[str]]:
    """Yield a list that gets what torch_lab warns of meanwhile; it is shown nowhere else."""
    collector, propagates = _Collector(), _OURS.propagate
    _OURS.addHandler(collector)
    _OURS.propagate = False
    try:
        yield collector.warned
    finally:
        _OURS.removeHandler(collector)
        _OURS.propagate = propagates
