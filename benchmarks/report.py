"""All benchmarks: their figures and plots, as `docs/performance.md` shows them.

    python benchmarks/report.py            # half an hour; writes the page and its plots
    python benchmarks/report.py --million  # as long; writes the page's part on a million steps
    python benchmarks/report.py --short    # a minute; prints, and writes nothing

A benchmark is a module beside this one with `figures(rounds)`, which returns `harness.Figure`s. It
may have `curves(rounds)`, plots as `harness.Curve`s; `REASONS`, why a goal of such a number is not
reached; and `short_figures()`, what is shown beside every change. `--only NAME` runs those that are
named, and prints.
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

from harness import ROUNDS, TITLES, Curve, Figure, show

NAMES = ("start", "steps", "processes", "memory", "inference", "checkpoints", "scale", "sync")
SHOWN = ("start", "steps")
"""Those with a short form, which is shown beside every change."""
DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
PLOTS = DOCS / "performance"
MILLION = "## A run of a million steps\n"
"""The head of the page's last part, which stays when the others are written."""
INTRODUCTION = """\
# Performance

What torch-lab costs, against others that do the same work. Times of one machine say little of
another, so every figure is a ratio to a peer of the same run: each round measures all of them in
turn, and the ratio is that of a round. Shown are the median and the quartiles. "Raw PyTorch" is a
loop without any framework, "plain Lightning" a script with its `Trainer`; both are written as their
best users would, and lie in `benchmarks/peers`. A goal is reached if the median is within it; where
it lies between the quartiles, another run may say otherwise. No figure is of a GPU.
"""


@dataclass
class Measured:
    """What a benchmark has found."""

    module: ModuleType
    figures: Sequence[Figure]
    curves: Sequence[Curve] = ()

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
            self.measured.append(_measured(importlib.import_module(name), rounds))
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
        print(f"    {time.perf_counter() - began:.0f} s", flush=True)

    def goals(self) -> list[Figure]:
        """Return the figures that have a goal, in the order of the goals."""
        found = [figure for each in self.measured for figure in each.figures]
        return sorted((each for each in found if each.number), key=lambda each: int(each.number))


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
    parts = [INTRODUCTION, _circumstances(command), _reached(report.goals())]
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
            f"![{curve.title}](performance/{_file_name(curve.title)})\n"
            for curve in measured.curves
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
        f"`{command}` wrote this on {today}: {machine}, {versions}. The load of the machine\n"
        f"was {load} at the end.\n"
    )


def _reached(figures: Sequence[Figure]) -> str:
    numbers = dict.fromkeys(figure.number for figure in figures)
    missed = {figure.number for figure in figures if figure.is_reached is False}
    reached = ", ".join(number for number in numbers if number not in missed)
    others = ", ".join(number for number in numbers if number in missed)
    return f"Goals that are reached: {reached or 'none'}. Goals that are not: {others or 'none'}.\n"


def _table(figures: Sequence[Figure]) -> str:
    rows = [TITLES, ("---",) * len(TITLES), *(figure.row() for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _file_name(title: str) -> str:
    plain = "".join(character if character.isalnum() else " " for character in title.lower())
    return "-".join(plain.split()) + ".svg"


def draw(curve: Curve) -> None:
    """Draw a plot to the folder of the page: the medians, and the quartiles around them."""
    import matplotlib as mpl

    mpl.use("svg")
    # The same file for the same points, with its words as words.
    mpl.rcParams.update({"svg.hashsalt": curve.title, "svg.fonttype": "none"})
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, line in curve.lines.items():
        points = [Figure("", name, curve.against, found) for found in line.values()]
        (drawn,) = axes.plot([*line], [each.median for each in points], marker="o", label=name)
        low, high = zip(*(each.quartiles for each in points), strict=True)
        axes.fill_between([*line], low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    places = sorted({place for line in curve.lines.values() for place in line})
    if places[0]:
        axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set_title(curve.title, loc="left")
    axes.set(xlabel=curve.grows, ylabel=f"ratio to {curve.against}")
    axes.set_ylim(bottom=0)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle="dotted")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / _file_name(curve.title), metadata={"Date": None})
    plt.close(figure)


def write(report: Report, command: str) -> None:
    """Write the page and its plots."""
    for measured in report.measured:
        for curve in measured.curves:
            draw(curve)
    _, head, million = PAGE.read_text(encoding="utf-8").partition(MILLION)
    _write("\n".join(filter(None, [page(report, command), head + million])))


def write_million(rounds: int, command: str) -> None:
    """Train a million steps, and write the page's part on them."""
    import scale

    found = scale.figures(rounds, scale.MILLION)
    show(found)
    others, _, _ = PAGE.read_text(encoding="utf-8").partition(MILLION)
    _write("\n".join([others + MILLION, _circumstances(command), _table(found)]))


def _write(text: str) -> None:
    PAGE.write_text(text, encoding="utf-8")
    print(f"\nwrote {PAGE}")


def parsed(words: Sequence[str] | None = None) -> Any:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("--short", action="store_true", help="a few; write nothing")
    parser.add_argument("--million", action="store_true", help="a run of a million steps alone")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", action="append", choices=NAMES, help="this one; write nothing")
    parser.add_argument(
        "--page", action="store_true", help="with --only: write the page all the same"
    )
    return parser.parse_args(words)


def main() -> int:
    """Run the benchmarks that there are, and return how many failed."""
    options, report = parsed(), Report()
    command = " ".join(["python benchmarks/report.py", *sys.argv[1:]])
    if options.million:
        write_million(options.rounds, command)
        return 0
    for name in options.only or (SHOWN if options.short else NAMES):
        report.add(name, None if options.short else options.rounds)
    print("\n==> goals")
    show(report.goals())
    print(f"\n{_reached(report.goals())}")
    if report.failed:
        print(f"failed: {', '.join(report.failed)}")
    elif options.page or not (options.short or options.only):
        write(report, command)
    return len(report.failed)


if __name__ == "__main__":
    sys.exit(main())
