"""What the benchmarks share: peers that are measured in turn, and ratios with their spread.

Times of one machine say little of another, and little of the same one an hour later. So every
figure is a ratio to a peer that is measured in the same run: each round measures all of them, one
after another, and the ratio is that of a round.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Figure", "Trainee", "in_turn", "python", "ratios", "show", "stretches", "wall"]

PEERS = Path(__file__).parent / "peers"
ROUNDS = 11
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(PEERS), os.environ.get("PYTHONPATH")])),
}
"""One thread for each process, and the modules that the peers share."""
# What is installed is compiled once, and so shall be what is measured.
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)


@dataclass(frozen=True)
class Figure:
    """A ratio, of which each round gives one, and what it should be; or a difference, in a unit."""

    number: str
    """Of the goal that it belongs to; empty if it belongs to none."""
    name: str
    peer: str
    ratios: Sequence[float]
    at_most: float | None = None
    at_least: float | None = None
    unit: str = ""
    """What a difference is in; a ratio has none."""

    @property
    def median(self) -> float:
        """The ratio in the middle."""
        return statistics.median(self.ratios)

    @property
    def is_reached(self) -> bool | None:
        """Whether the median is what it should be; None where nothing is asked for."""
        if self.at_most is not None:
            return self.median <= self.at_most
        return None if self.at_least is None else self.median >= self.at_least

    @property
    def goal(self) -> str:
        """What it should be, in words."""
        if self.at_most is not None:
            return f"at most {self.at_most:g} {self.unit}".rstrip()
        return "" if self.at_least is None else f"at least {self.at_least:g} {self.unit}".rstrip()

    def row(self) -> tuple[str, ...]:
        """Return what a table says of it."""
        low, _, high = statistics.quantiles(self.ratios, n=4)
        told = {True: "reached", False: "not reached", None: ""}[self.is_reached]
        spread = f"{self._told(low)} to {self._told(high)}"
        middle = f"{self._told(self.median)} {self.unit}".rstrip()
        return (self.number, self.name, self.peer, middle, spread, self.goal, told)

    def _told(self, value: float) -> str:
        return f"{value:+.1f}" if self.unit else f"{value:.3f}"


TITLES = ("goal", "what", "against", "ratio", "quartiles", "asked for", "")


def in_turn(
    measures: Mapping[str, Callable[[], float]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Return what each of the measures says in each round; every other round goes backwards."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        order = list(measures) if number % 2 == 0 else list(reversed(measures))
        for name in order:
            found[name].append(measures[name]())
    return found


def ratios(found: Mapping[str, Sequence[float]], name: str, peer: str) -> list[float]:
    """Return the ratios of one measure to another, round by round."""
    return [own / other for own, other in zip(found[name], found[peer], strict=True)]


def show(figures: Sequence[Figure]) -> None:
    """Print a table."""
    rows = [TITLES, *(figure.row() for figure in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


def wall(command: Sequence[str | Path], code: int = 0, **options: Any) -> float:
    """Return how many seconds a command takes, its output left unread.

    Args:
        command: Its words.
        code: How it should end.
        options: More for `subprocess.run`.

    Raises:
        CalledProcessError: It ended otherwise.
    """
    settings = {"env": ENVIRONMENT, "stdin": subprocess.DEVNULL} | options
    began = time.perf_counter()
    ended = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
        **settings,
    )
    took = time.perf_counter() - began
    if ended.returncode != code:
        raise subprocess.CalledProcessError(ended.returncode, ended.args)
    return took


class Trainee:
    """A process that trains a stretch of steps at a time, and stands still in between.

    Its script has a `gate.Gate` in its training loop.

    Args:
        command: What trains.
        steps: How many steps a stretch has.
    """

    def __init__(self, command: Sequence[str | Path], steps: int) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(word) for word in command],
            env={**ENVIRONMENT, "STRETCH_STEPS": str(steps)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._steps = steps
        try:
            self._took()  # The first stretch warms up.
        except BaseException:
            self.end()
            raise

    def stretch(self) -> float:
        """Train a stretch, and return the seconds of a step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._took() / self._steps

    def _took(self) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("stretch: "):
                return float(line.split()[1])
        code = self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(
            f"{self._process.args} ended with {code}:\n{self._errors.read()[-2000:]}"
        )

    def end(self) -> None:
        """End the process, and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@contextlib.contextmanager
def stretches(
    commands: Mapping[str, Sequence[str | Path]], steps: int
) -> Iterator[dict[str, Callable[[], float]]]:
    """Start the trainees, and yield what `in_turn` takes: the seconds of a step of each."""
    trainees: dict[str, Trainee] = {}
    try:
        for name, command in commands.items():
            trainees[name] = Trainee(command, steps)
        yield {name: trainee.stretch for name, trainee in trainees.items()}
    finally:
        for trainee in trainees.values():
            trainee.end()


def python(script: str, *words: str | int) -> list[str]:
    """Return the command of a peer's script."""
    return [sys.executable, str(PEERS / script), *map(str, words)]
