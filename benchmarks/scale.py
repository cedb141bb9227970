"""Whether a very long run stays as it began: its metrics on disk, its memory, the time of a step.

    python benchmarks/scale.py [ROUNDS] [--steps=1000000]

A run of `train` with one linear layer and one image a step, so that what is measured is what is
around it: the loss logged every 50 steps, epochs of a hundredth of the run with a validation, a
checkpoint and three metrics. It stands still after each piece of the run, where its memory and its
metrics are looked at; time is that of the processor, for hours lie between what is compared. The
last tenth is compared with the second, in as many pieces as there are rounds: the first one warms
up. In the end TensorBoard opens the run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from harness import ROUNDS, Figure, Trainee, python, show
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

STEPS = 100_000
"""Enough for 100 epochs of 1,000 steps, in two minutes; a million are for `make bench-million`."""
MILLION = 1_000_000
EPOCHS = 100
TENTHS = 10
LOG_EVERY = 50
MOST_GROWTH = 1.05


@dataclass(frozen=True)
class Piece:
    """A piece of the run."""

    seconds: float
    """Of a step, of the processor."""
    bytes: int
    """Of the metrics folder, at its end."""
    resident: int
    """Bytes in memory, at its end."""


def trained(trainee: Trainee, pieces: int) -> list[Piece]:
    """Train piece by piece, and return them."""
    found: list[Piece] = []
    trainee.begin()
    while True:
        size = sum(path.stat().st_size for path in event_files(trainee.folder))
        found.append(Piece(trainee.processor, size, trainee.resident))
        if len(found) % (pieces // TENTHS) == 0:
            print(f"    {len(found) / pieces:.0%}", end="", flush=True, file=sys.stderr)
        if len(found) == pieces:
            print(file=sys.stderr)
            trainee.finish()
            return found
        trainee.stretch()


def event_files(root: Path) -> list[Path]:
    """Return the files that hold the metrics of the only run."""
    return sorted(root.glob("data/artifacts/*/metrics/**/*tfevents*"))


def opened(root: Path) -> dict[str, list[int]]:
    """Return the steps of all scalars that TensorBoard finds in the only run, by their names."""
    (folder,) = root.glob("data/artifacts/*/metrics")
    began, everything = time.perf_counter(), {SCALARS: 0}
    events = EventAccumulator(str(folder), size_guidance=everything).Reload()
    steps = {tag: [each.step for each in events.Scalars(tag)] for tag in events.Tags()[SCALARS]}
    took = time.perf_counter() - began
    found = ", ".join(f"{len(of_tag):,} of {tag}" for tag, of_tag in steps.items())
    print(f"    TensorBoard opened it in {took:.1f} s: {found}")
    return steps


def compared(pieces: Sequence[Piece], scalars: Sequence[int], steps: int) -> list[Figure]:
    """Return the last tenth of a run against the second."""
    rounds, tenth = len(pieces) // TENTHS, steps // TENTHS
    early, late = pieces[rounds : 2 * rounds], pieces[-rounds:]
    sizes = [
        (pieces[last].bytes - pieces[last - rounds].bytes)
        / sum(tenth * number <= step < tenth * (number + 1) for step in scalars)
        for number, last in ((TENTHS - 1, -1), (1, 2 * rounds - 1))
    ]
    pairs = list(zip(late, early, strict=True))
    name, peer = f"a run of {steps:,} steps, its last tenth", "its second tenth"
    found = {
        "a step": [own.seconds / other.seconds for own, other in pairs],
        "memory": [own.resident / other.resident for own, other in pairs],
        "bytes of metrics for a scalar": [sizes[0] / sizes[1]],
    }
    return [
        Figure("12", f"{name}: {what}", peer, each, MOST_GROWTH) for what, each in found.items()
    ]


def figures(rounds: int = ROUNDS, steps: int = STEPS) -> list[Figure]:
    """Measure; other than those of the other benchmarks, the peer is the run's own beginning."""
    stretch = steps // (TENTHS * rounds)
    steps = stretch * TENTHS * rounds
    asked = {"net": "linear", "batch_size": 1, "images": steps // EPOCHS, "held_out": 100}
    trainee = Trainee(python("our_steps.py", **asked, steps=steps), stretch)
    try:
        pieces = trained(trainee, TENTHS * rounds)
        found = opened(trainee.folder)
    finally:
        trainee.end()
    scalars = [step for of_tag in found.values() for step in of_tag]
    middle, last = median(piece.seconds for piece in pieces), pieces[-1]
    print(f"    {len(scalars):,} scalars, {last.bytes / 1e6:.2f} MB of metrics, ", end="")
    print(
        f"{last.resident / 2**20:.0f} MiB in memory, {middle * 1e6:.0f} us of the processor a step"
    )
    share = len(found["loss/train_step"]) / (steps // LOG_EVERY)
    name = f"a run of {steps:,} steps: what TensorBoard finds"
    whole = Figure("12", name, "what was logged", [share], at_least=1)
    return [*compared(pieces, scalars, steps), whole]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    show(figures(options.rounds, options.steps))
