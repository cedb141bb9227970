"""`torch-lab sync`: the server agrees with the runs on disk, and it is read back that it does."""

from __future__ import annotations

import functools
import logging
import math
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch_lab.errors import CheckpointError, ServerError, UnreachableError, UserError
from torch_lab.event_reader import event_files, logged_in
from torch_lab.mirror import Mirror, Sent, split_tag
from torch_lab.runs import Run, find_run
from torch_lab.server import Server
from torch_lab.task_record import parent_task, project_of, task_of

__all__ = ["TITLES", "Synced", "sync", "to_sync"]

log = logging.getLogger(__name__)

TITLES = ("run", "task", "sent", "scalars", "models", "verified")
_POINTS_AT_ONCE = 10_000


@dataclass
class Synced:
    """How a run and its task compare, after what was missing was sent."""

    run: Run
    task: str
    sent: Sent
    scalars: int = 0
    """How many points the folder has."""
    models: dict[str, str] = field(default_factory=dict)
    """The sha256 of each on the server, read back."""
    differences: list[str] = field(default_factory=list)

    def words(self) -> list[str]:
        """Return the row of a table; see `TITLES`."""
        models = ", ".join(f"{name} {digest[:8]}" for name, digest in self.models.items())
        return [
            self.run.name,
            self.task[:8],
            _sent_words(self.sent),
            f"{self.scalars:,}",
            models or "none",
            "; ".join(self.differences) or "equal",
        ]

    def record(self) -> dict[str, Any]:
        """Return the same for JSON."""
        return {
            "run": self.run.name,
            "task": self.task,
            "sent": asdict(self.sent),
            "scalars": self.scalars,
            "models": self.models,
            "differences": self.differences,
        }


def _sent_words(sent: Sent) -> str:
    told = [f"{count:,} {name}" for name, count in asdict(sent).items() if count]
    return ", ".join(told) or "nothing"


def to_sync(artifacts: Path, names: Iterable[str], *, everything: bool) -> list[Run]:
    """Return the runs that are meant, parents before their children.

    Args:
        artifacts: The folder of the project's runs.
        names: Names of runs, with their version or without for the newest.
        everything: Whether all runs are meant.

    Raises:
        CheckpointError: There is no such run.
        UserError: Neither names nor all are given.
    """
    named = [find_run(artifacts, name, having="last") for name in names]
    if bool(named) == everything:
        raise UserError("which runs? name them, or give --all")
    known = _all_runs(artifacts)
    runs = [run for run in known if not _is_trained_here(run)] if everything else named
    by_id = {run.record.id: run for run in known}
    ordered: dict[str, Run] = {}
    for run in runs:
        for each in reversed(list(_ancestry(run, by_id))):
            ordered.setdefault(each.record.id, each)
    return list(ordered.values())


def _all_runs(artifacts: Path) -> list[Run]:
    found = []
    for record in artifacts.glob("*/run.json"):
        try:
            found.append(Run.read(record.parent))
        except CheckpointError as error:
            log.warning("%s", error)
    # A dev run leaves nothing to look at.
    kept = [run for run in found if not run.name.startswith("dev_")]
    return sorted(kept, key=lambda run: run.record.started)


def _is_trained_here(run: Run) -> bool:
    return run.state == "running" and run.record.host == socket.gethostname()


def _ancestry(run: Run, by_id: dict[str, Run]) -> Iterator[Run]:
    """Yield a run and those that it comes from, as far as they have no task yet."""
    seen = set()
    current: Run | None = run
    while current is not None and current.record.id not in seen:
        yield current
        seen.add(current.record.id)
        parent = by_id.get((current.record.parent or {}).get("id") or "")
        has_task = parent is None or parent.record.clearml_task_id is not None
        current = None if has_task or (parent and _is_trained_here(parent)) else parent


def sync(run: Run, server: Server, say: Callable[[str], None]) -> Synced:
    """Make the server agree with a run's folder, and read back that it does.

    Args:
        run: One that is not being trained.
        server: Where its task is, or will be.
        say: Told what is being done.

    Raises:
        UserError: The run is being trained.
        ServerError: The server refuses something.
        UnreachableError: It does not answer; what was sent is noted, and the next call goes on.
    """
    if _is_trained_here(run):
        raise UserError(
            f"run {run.name} is being trained by process {run.record.pid} on host "
            f"{run.record.host}",
            "what it logs is sent meanwhile; sync it when it has ended",
        )
    task = task_of(run, server)
    mirror = Mirror(server, run, task, project_of(run))
    _send(mirror, say)
    say(f"{run.name}: reading back")
    found = _verified(mirror)
    if found.differences:
        # What the notes say was sent is not there: all of it once more.
        mirror.start_over(found.models)
        _send(mirror, say)
        found = _verified(mirror)
    return found


def _send(mirror: Mirror, say: Callable[[str], None]) -> None:
    run = mirror.run
    say(f"{run.name}: what it logged")
    mirror.describe()
    if (parent := parent_task(run)) is not None:
        mirror.set_parent(parent)
    mirror.send_logged()
    mirror.send_artifacts()
    say(f"{run.name}: checkpoints")
    mirror.send_checkpoints()
    mirror.end()


# Reading back.


def _verified(mirror: Mirror) -> Synced:
    """Compare what the server has with the folder, by what it answers now."""
    expected = _points(mirror.run)
    there = _points_there(mirror)
    found = Synced(
        mirror.run, mirror.task, mirror.sent, sum(len(steps) for steps in expected.values())
    )
    # There may be more than was logged: the user's own, and what a resume has given up.
    for name, own in sorted(expected.items()):
        other = there.get(name, {})
        if missing := own.keys() - other.keys():
            words = f"{len(missing)} of {len(own)} points are not there"
            found.differences.append(f"{'/'.join(name)}: {words}")
        elif any(not math.isclose(own[step], other[step], rel_tol=1e-6) for step in own):
            found.differences.append(f"{'/'.join(name)}: other values there")
    # The best may be the last, and is one file then.
    digest_of = functools.cache(mirror.server.sha256)
    for checkpoint in mirror.run.checkpoint_names() - {"previous"}:
        _verify_model(mirror, checkpoint, found, digest_of)
    return found


def _verify_model(
    mirror: Mirror, name: str, found: Synced, digest_of: Callable[[str], str]
) -> None:
    """Read a checkpoint back, and note its sha256 there, and what differs."""
    model, sidecar = mirror.progress.models.get(name), mirror.run.sidecar(name)
    if model is None or sidecar is None:
        found.differences.append(f"{name}: not sent, as it is damaged here")
        return
    try:
        found.models[name] = digest_of(model["uri"])
    except UnreachableError:
        raise
    except ServerError:
        found.models[name] = "missing"
    if found.models[name] != sidecar["sha256"]:
        found.differences.append(f"{name}: other bytes there, or none")


def _points(run: Run) -> dict[tuple[str, str], dict[int, float]]:
    """Return the finite scalars of a run's folder, by graph and line, and step."""
    series: dict[tuple[str, str], dict[int, float]] = {}
    for name, _ in event_files(run.metrics_folder):
        start, end = -1, 0
        while end != start:
            start = end
            logged = logged_in(run.metrics_folder, name, start)
            end = logged.end
            for point in logged.points:
                if math.isfinite(point.value):
                    series.setdefault(split_tag(point.tag), {})[point.step] = point.value
    return series


def _points_there(mirror: Mirror) -> dict[tuple[str, str], dict[int, float]]:
    """Return the scalars that the task has, as `_points` does."""
    series: dict[tuple[str, str], dict[int, float]] = {}
    scroll: dict[str, str] = {}
    while True:
        told = mirror.server.call(
            "events.get_task_events",
            task=mirror.task,
            event_type="training_stats_scalar",
            order="asc",
            batch_size=_POINTS_AT_ONCE,
            **scroll,
        )
        for event in told.get("events") or []:
            name = (str(event["metric"]), str(event["variant"]))
            series.setdefault(name, {})[int(event["iter"])] = float(event["value"])
        if not told.get("events") or not told.get("scroll_id"):
            return series
        scroll = {"scroll_id": str(told["scroll_id"])}
