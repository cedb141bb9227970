"""What the benchmarks share: peers that are measured in turn, and ratios with their spread.

Times of one machine say little of another, and little of the same one an hour later. So every
figure is a ratio to a peer that is measured in the same run: each round measures all of them, one
after another, and the ratio is that of a round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
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

__all__ = [
    "ENVIRONMENT",
    "PEERS",
    "ROUNDS",
    "TITLES",
    "Curve",
    "Figure",
    "Trainee",
    "asked_rounds",
    "in_turn",
    "python",
    "ratios",
    "show",
    "stretches",
    "timed",
    "toy_project",
    "wall",
]

HERE = Path(__file__).parent
PEERS = HERE / "peers"
ROUNDS = 11
_MODULES = [str(PEERS), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_MODULES)}
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
    def quartiles(self) -> tuple[float, float]:
        """Between what the middle half of the ratios is."""
        if len(self.ratios) == 1:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return low, high

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
        told = {True: "reached", False: "not reached", None: ""}[self.is_reached]
        spread = " to ".join(map(self._told, self.quartiles))
        middle = f"{self._told(self.median)} {self.unit}".rstrip()
        return (self.number, self.name, self.peer, middle, spread, self.goal, told)

    def _told(self, value: float) -> str:
        return f"{value:+.1f}" if self.unit else f"{value:.3f}"


TITLES = ("goal", "what", "against", "ratio", "quartiles", "asked for", "")


@dataclass(frozen=True)
class Curve:
    """A plot of a cost against something that grows."""

    title: str
    grows: str
    """What grows."""
    against: str
    """What the cost is a ratio to."""
    lines: Mapping[str, Mapping[int, Sequence[float]]]
    """By name: the ratios of all rounds at each place."""


def asked_rounds(documentation: str | None, default: int = ROUNDS) -> int:
    """Return how many rounds the command line asks for.

    Args:
        documentation: Of the script.
        default: How many they are if it does not say.
    """
    parser = argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])
    parser.add_argument("rounds", nargs="?", type=int, default=default)
    rounds: int = parser.parse_args().rounds
    return rounds


def in_turn(
    measures: Mapping[str, Callable[[], float]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Return what each of the measures says in each round; every other round goes backwards."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        order = list(measures) if number % 2 == 0 else list(reversed(measures))
        for name in order:
            found[name].append(measures[name]())
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
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
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip(), flush=True)


def toy_project(root: Path, config: str, hparams: Mapping[str, Any], name: str = "hparams") -> Path:
    """Write a project with one experiment, and return its hparams script.

    Args:
        root: Its folder; what is there already is written again.
        config: The config script.
        hparams: What its hparams script holds.
        name: That of the hparams script.
    """
    folder = root / "toys" / "experiments" / "00_toy"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "pyproject.toml").touch()
    (folder / "__main__.py").write_text(config, encoding="utf-8")
    script = folder / f"{name}.py"
    script.write_text(f"hparams = {hparams!r}\n", encoding="utf-8")
    return script


def timed(function: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


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
        self._folder = tempfile.TemporaryDirectory(prefix="trainee-")
        self.folder = Path(self._folder.name)
        self._process = subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder,
            env={**ENVIRONMENT, "STRETCH_STEPS": str(steps), "FOLDER": str(self.folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._steps = steps
        self.processor = 0.0
        """The processor's seconds of a step, in the stretch before."""

    @property
    def resident(self) -> int:
        """How many bytes of it are in memory, with those of libraries that others share."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * resource.getpagesize()

    def begin(self) -> None:
        """Wait until the first stretch is over, which warms it up."""
        self._took()

    def stretch(self) -> float:
        """Train a stretch, and return the seconds of a step."""
        self._go_on()
        return self._took() / self._steps

    def finish(self) -> None:
        """Let it end, when it has trained all that it was asked for.

        Raises:
            RuntimeError: It did not end well.
        """
        self._go_on()
        assert self._process.stdout is not None
        self._process.stdout.read()
        if self._process.wait():
            raise self._failed()

    def _go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def _took(self) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("stretch: "):
                took, processor = map(float, line.split()[1:])
                self.processor = processor / self._steps
                return took
        raise self._failed()

    def _failed(self) -> RuntimeError:
        code = self._process.wait()
        self._errors.seek(0)
        return RuntimeError(
            f"{self._process.args} ended with {code}:\n{self._errors.read()[-2000:]}"
        )

    def close(self) -> None:
        """End the process, and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()


@contextlib.contextmanager
def stretches(
    commands: Mapping[str, Sequence[str | Path]], steps: int
) -> Iterator[dict[str, Callable[[], float]]]:
    """Start the trainees, and yield what `in_turn` takes: the seconds of a step of each."""
    trainees: dict[str, Trainee] = {}
    try:
        for name, command in commands.items():
            trainees[name] = Trainee(command, steps)
        # They start side by side, on as many cores as there are.
        for trainee in trainees.values():
            trainee.begin()
        yield {name: trainee.stretch for name, trainee in trainees.items()}
    finally:
        for trainee in trainees.values():
            trainee.close()


def python(script: str, *words: str | int, **settings: str | int) -> list[str]:
    """Return the command of a peer's script, with its words and its settings."""
    told = (f"{name}={value}" for name, value in settings.items())
    return [sys.executable, str(PEERS / script), *map(str, words), *told]
