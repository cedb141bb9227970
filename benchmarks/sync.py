"""How long `torch-lab sync` takes for a run that logged a lot.

    python benchmarks/sync.py [ROUNDS]

A finished run with 100,000 scalars in its folder, four at each step, is brought to a task of its
own on the tests' server, which is in another process. The peer is a loop that has the same scalars
in memory and posts them, as many at once; and ten seconds.
"""

from __future__ import annotations

import itertools
import operator
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import ROUNDS, Figure, asked_rounds, in_turn, ratios, show

from torch_lab.event_files import EventWriter
from torch_lab.runs import Run
from torch_lab.server import Address, Server
from torch_lab.sync import sync

SCALARS = 100_000
TAGS = ("loss/train_step", "rate/train_step", "accuracy/train_step", "f1/train_step")
GOAL_S = 10.0
AT_ONCE = 5_000
TESTS = Path(__file__).parents[1] / "tests"
SERVE = """
import threading
from clearml_server import ClearMLServer

with ClearMLServer() as server:
    print(server.api_url, server.files_url, server.access_key, server.secret_key, flush=True)
    input()
"""


@contextmanager
def serving() -> Iterator[Server]:
    """Start the tests' server, and yield a client of it."""
    command = [sys.executable, "-c", SERVE]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=TESTS, **pipes) as process:
        assert process.stdout is not None
        api, files, key, secret = process.stdout.readline().split()
        try:
            yield Server(Address(api, files, "http://web", key, secret))
        finally:
            process.kill()


def points() -> Iterator[tuple[int, str, float]]:
    """Yield what is logged: step, name, value."""
    for step in range(SCALARS // len(TAGS)):
        yield from ((step, tag, 1 / (1 + step + place)) for place, tag in enumerate(TAGS))


def event(task: str, step: int, tag: str, value: float) -> dict[str, Any]:
    """Return a scalar as the server takes it."""
    metric, _, variant = tag.partition("/")
    kind, now = "training_stats_scalar", int(time.time() * 1000)
    names = {"type": kind, "task": task, "metric": metric, "variant": variant}
    return {"timestamp": now, "iter": step, "value": value, **names}


def logged(artifacts: Path, number: int) -> Run:
    """Return a finished run that has logged all of it."""
    told = {"experiment": "00_toy", "script": "hparams.py", "hparams": {}, "seed": 0}
    run = Run.plan(artifacts, f"00_toy-round_{number}", **told)
    run.reserve()
    writer = EventWriter(run.metrics_folder)
    for step, each in itertools.groupby(points(), key=operator.itemgetter(0)):
        writer.add_values({tag: value for _, tag, value in each}, step)
    writer.close()
    run.close("completed", {})
    return Run.read(run.folder)


def posted() -> float:
    """Post the same scalars from memory to a new task, and return the seconds."""
    with serving() as server:
        task = server.call("tasks.create", name="plain", type="training", project=None)["id"]
        events = [event(task, *each) for each in points()]
        began = time.perf_counter()
        for first in range(0, len(events), AT_ONCE):
            server.add_events(events[first : first + AT_ONCE])
        return time.perf_counter() - began


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Measure."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [logged(Path(folder) / "data" / "artifacts", number) for number in range(rounds + 1)]

        def synced() -> float:
            run = runs.pop()
            with serving() as server:
                began = time.perf_counter()
                found = sync(run, server, lambda line: None)
                took = time.perf_counter() - began
            if found.differences or found.scalars != SCALARS:
                raise RuntimeError(f"{found.scalars} scalars: {found.differences}")
            return took

        measures = {"sync": synced, "posts": posted}
        in_turn(measures, 1)
        found = in_turn(measures, rounds)
    name = f"sync of {SCALARS:,} scalars"
    return [
        Figure("13", name, "10 s", [took / GOAL_S for took in found["sync"]], at_most=1.0),
        Figure("", name, "posts from memory", ratios(found, "sync", "posts")),
    ]


if __name__ == "__main__":
    show(figures(asked_rounds(__doc__)))
