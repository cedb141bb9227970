"""All benchmarks: their figures and plots, as `docs/performance.md` shows them.

    python benchmarks/report.py           # an hour; writes the page and its plots
    python benchmarks/report.py --short   # a minute; prints, and writes nothing

A benchmark is a module beside this one with `figures(rounds)`, which returns `harness.Figure`s. It
may have `curves(rounds)`, plots as `(title, label of x, {name: [(x, ratio), …]})`; `REASONS`, why a
goal of such a number is not reached; and `short_figures()`, what is shown beside every change.
`--only NAME` runs those that are named, and prints.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from harness import ROUNDS, TITLES, Figure, show

NAMES = ("start", "steps", "processes", "memory", "inference", "checkpoints", "scale", "sync")
SHOWN = ("start", "steps")
"""Those with a short form, which is shown beside every change."""
DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
PLOTS = DOCS / "performance"
INTRODUCTION = """\
# Performance

What torch-lab costs, against others that do the same work. Times of one machine say little of
another, so every figure is a ratio to a peer of the same run: each round measures all of them in
turn, and the ratio is that of a round. Shown are the median and the quartiles. "Raw PyTorch" is a
loop without any framework, "plain Lightning" a script with its `Trainer`; both are written as their
best users would, and lie in `benchmarks/peers`.
"""


@dataclass
class Measured:
    """What a benchmark has found."""

    module: ModuleType
    figures: Sequence[Figure]
    curves: Sequence[tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]] = ()
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """What it measures: the first sentence of its docstring."""
        return (self.module.__doc__ or self.module.__name__).partition("\n\n")[0].rstrip(".\n")

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why goals are not reached, by their numbers."""
        found: Mapping[str, str] = getattr(self.module, "REASONS", {})
        return found


@dataclass
class Report:
    """What benchmarks have found, and those that failed."""

    measured: list[Measured] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, name: str, rounds: int | None) -> None:
        """Run a benchmark, and print what it found.

        Args:
            name: Its module.
            rounds: How many; None for the short form.
        """
        print(f"\n==> {name}", flush=True)
        began = time.perf_counter()
        try:
            found = _measured(importlib.import_module(name), rounds)
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
            return
        found.seconds = time.perf_counter() - began
        print(f"    {found.seconds:.0f} s", flush=True)
        self.measured.append(found)


def _measured(module: ModuleType, rounds: int | None) -> Measured:
    if rounds is None:
        found = Measured(module, module.short_figures())
        show(found.figures)
        return found
    found = Measured(module, module.figures(rounds))
    show(found.figures)
    if curves := getattr(module, "curves", None):
        found.curves = curves(rounds)
    return found


# The page.


def page(report: Report, command: str) -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION, _circumstances(command), _reached(report.measured)]
    for measured in report.measured:
        parts.append(f"## {measured.title}\n")
        parts.append(_table(measured.figures))
        missed = {each.number for each in measured.figures if each.is_reached is False}
        parts += [
            f"Goal {number}: {why}\n"
            for number, why in measured.reasons.items()
            if number in missed
        ]
        parts += [
            f"![{title}](performance/{_file_name(title)})\n" for title, _, _ in measured.curves
        ]
    return "\n".join(parts)


def _circumstances(command: str) -> str:
    today = datetime.date.today().isoformat()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "pytorch-lightning", "torchmetrics", "clearml")
    )
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    load = " ".join(f"{each:.1f}" for each in os.getloadavg())
    return (
        f"`{command}` wrote this page on {today}: {machine}, {versions}. The load of the machine\n"
        f"was {load} at the end.\n"
    )


def _reached(measured: Sequence[Measured]) -> str:
    found = [figure for each in measured for figure in each.figures]
    goals: dict[str, bool] = {}
    for figure in found:
        if figure.is_reached is not None:
            goals[figure.number] = goals.get(figure.number, True) and figure.is_reached
    told = {
        kind: ", ".join(sorted((n for n in goals if goals[n] is kind), key=_order)) or "none"
        for kind in (True, False)
    }
    return f"Goals that are reached: {told[True]}. Goals that are not: {told[False]}.\n"


def _order(number: str) -> tuple[int, str]:
    digits = "".join(character for character in number if character.isdigit())
    return (int(digits or 0), number)


def _table(figures: Sequence[Figure]) -> str:
    rows = [TITLES, ("---",) * len(TITLES), *(figure.row() for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _file_name(title: str) -> str:
    plain = "".join(character if character.isalnum() else " " for character in title.lower())
    return "-".join(plain.split()) + ".svg"


def draw(title: str, label: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw a plot to the folder of the page, the same file for the same points."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = title
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(title=title, xlabel=label, ylabel="ratio")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / _file_name(title), metadata={"Date": None})
    plt.close(figure)


def write(report: Report, command: str) -> None:
    """Write the page and its plots."""
    for measured in report.measured:
        for curve in measured.curves:
            draw(*curve)
    PAGE.write_text(page(report, command), encoding="utf-8")
    print(f"\nwrote {PAGE}")


def parsed(words: Sequence[str] | None = None) -> Any:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("--short", action="store_true", help="a few; write nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", action="append", choices=NAMES, help="this one; write nothing")
    parser.add_argument(
        "--page", action="store_true", help="with --only: write the page all the same"
    )
    return parser.parse_args(words)


def main() -> int:
    """Run the benchmarks that there are, and return how many failed."""
    options, report = parsed(), Report()
    for name in options.only or (SHOWN if options.short else NAMES):
        report.add(name, None if options.short else options.rounds)
    if report.failed:
        print(f"\nfailed: {', '.join(report.failed)}")
    elif options.page or not (options.short or options.only):
        write(report, " ".join(["python benchmarks/report.py", *sys.argv[1:]]))
    return len(report.failed)


if __name__ == "__main__":
    sys.exit(main())
