"""Whether a very long run stays as it began: its metrics on disk, its memory, the time of a step.

    python benchmarks/scale.py [ROUNDS] [--steps=1000000]

A run of `train` with one linear layer and one image a step, so that what is measured is what is
around it: the loss logged every 50 steps, epochs of a hundredth of the run with a validation, a
checkpoint and two metrics. When nine tenths of it are over, another one begins, and trains a tenth
to warm up; then they take turns, so that the last tenth of the old run meets what the second one of
the young run meets. Time is that of the processor. In the end TensorBoard opens the old run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

from harness import ROUNDS, Figure, Trainee, in_turn, python, ratios, show, timed
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

STEPS = 100_000
"""Of 100 epochs, in three minutes; a million are for `make bench-million`."""
MILLION = 1_000_000
EPOCHS = 100
TENTHS = 10
LOG_EVERY = 50
MOST_GROWTH = 1.05
RECORD_BYTES = 16
"""Around each event of an event file: its length, and two checksums."""


def trainee(steps: int, stretch: int) -> Trainee:
    """Start a run."""
    asked = {"net": "linear", "batch_size": 1, "images": steps // EPOCHS, "held_out": 100}
    return Trainee(python("our_steps.py", **asked, steps=steps), stretch)


def trained(run: Trainee, tenths: int, rounds: int) -> None:
    """Train the first tenths of a run, each in so many stretches."""
    run.begin()
    for number in range(1, tenths * rounds):
        run.stretch()
        if number % rounds == 0:
            print(f"    {number // rounds / TENTHS:.0%}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)


def compared(old: Trainee, young: Trainee, rounds: int) -> dict[str, list[float]]:
    """Return the ratios of the old to the young run, which take turns."""
    resident: dict[str, list[float]] = {"old": [], "young": []}

    def measured(name: str, run: Trainee) -> Callable[[], float]:
        def stretch() -> float:
            run.stretch()
            resident[name].append(run.resident)
            return run.processor

        return stretch

    took = in_turn({"old": measured("old", old), "young": measured("young", young)}, rounds)
    print(f"    {median(took['old']) * 1e6:.0f} us of the processor a step, ", end="")
    print(f"{median(resident['old']) / 2**20:.0f} MiB in memory")
    return {"a step": ratios(took, "old", "young"), "memory": ratios(resident, "old", "young")}


def opened(folder: Path) -> EventAccumulator:
    """Return what TensorBoard finds among the metrics of a run."""
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    took = timed(events.Reload)
    found = ", ".join(f"{len(events.Scalars(tag)):,} {tag}" for tag in events.Tags()[SCALARS])
    print(f"    TensorBoard opened it in {took:.1f} s: {found}")
    return events


def growth(folder: Path, steps: int) -> float:
    """Return the bytes that a scalar takes in the last tenth, against those in the second."""
    sizes, scalars = Counter[int](), Counter[int]()
    for path in folder.glob("**/*tfevents*"):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            tenth = event.step * TENTHS // steps
            sizes[tenth] += len(record) + RECORD_BYTES
            scalars[tenth] += len(event.summary.value)
    print(f"    {sizes.total() / 1e6:.2f} MB of metrics, {scalars.total():,} scalars")
    last, second = (sizes[tenth] / scalars[tenth] for tenth in (TENTHS - 1, 1))
    return last / second


def figures(rounds: int = ROUNDS, steps: int = STEPS) -> list[Figure]:
    """Measure."""
    stretch = math.ceil(steps / (TENTHS * rounds))
    steps = stretch * TENTHS * rounds
    with closing(trainee(steps, stretch)) as old:
        trained(old, TENTHS - 1, rounds)
        with closing(trainee(steps, stretch)) as young:
            trained(young, 1, rounds)
            found = compared(old, young, rounds)
        old.finish()
        (folder,) = old.folder.glob("data/artifacts/*/metrics")
        logged = len(opened(folder).Scalars("loss/train_step"))
        bytes_each = [growth(folder, steps)]
    name, young = f"a run of {steps:,} steps", "the second tenth of a young one"
    last = f"{name}, its last tenth"
    share = [logged / (steps // LOG_EVERY)]
    return [
        *(
            Figure("12", f"{last}: {what}", young, each, MOST_GROWTH)
            for what, each in found.items()
        ),
        Figure("12", f"{last}: bytes for a scalar", "its second tenth", bytes_each, MOST_GROWTH),
        Figure("12", f"{name}: what TensorBoard finds", "what was logged", share, at_least=1),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    show(figures(options.rounds, options.steps))
