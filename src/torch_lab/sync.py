"""`torch-lab sync`: the server agrees with the runs on disk, and it is read back that it does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch_lab.errors import CheckpointError, UserError
from torch_lab.event_reader import event_files, points_in
from torch_lab.mirror import Mirror, Sent, split_tag
from torch_lab.runs import Run, find_run
from torch_lab.server import Server
from torch_lab.task_record import parent_task, project_of, task_name

__all__ = ["TITLES", "Synced", "create_task", "sync", "to_sync"]

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
        models = ", ".join(f"{name} {digest[:12]}" for name, digest in self.models.items())
        return [
            self.run.name,
            self.task,
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
    if everything:
        runs = list(_all_runs(artifacts))
    else:
        runs = [find_run(artifacts, name, having="last") for name in names]
    if not runs and not everything:
        raise UserError("which runs? name them, or give --all")
    by_id = {run.record.id: run for run in _all_runs(artifacts)} if runs else {}
    ordered: dict[str, Run] = {}
    for run in runs:
        for each in reversed(list(_ancestry(run, by_id))):
            ordered.setdefault(each.record.id, each)
    return list(ordered.values())


def _all_runs(artifacts: Path) -> Iterator[Run]:
    found = []
    for record in artifacts.glob("*/run.json"):
        try:
            found.append(Run.read(record.parent))
        except CheckpointError as error:
            log.warning("%s", error)
    # A dev run leaves nothing to look at.
    kept = [run for run in found if not run.name.startswith("dev_")]
    return iter(sorted(kept, key=lambda run: run.record.started))


def _ancestry(run: Run, by_id: dict[str, Run]) -> Iterator[Run]:
    """Yield a run and those that it comes from, as far as they have no task yet."""
    seen = set()
    current: Run | None = run
    while current is not None and current.record.id not in seen:
        yield current
        seen.add(current.record.id)
        parent = by_id.get((current.record.parent or {}).get("id") or "")
        current = parent if parent and parent.record.clearml_task_id is None else None


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
    if run.state == "running":
        raise UserError(
            f"run {run.name} is being trained by process {run.record.pid} on host "
            f"{run.record.host}",
            "what it logs is sent meanwhile; sync it when it has ended",
        )
    task = _task_of(run, server)
    mirror = Mirror(server, run, task, project_of(run))
    say(f"{run.name}: what it logged")
    mirror.describe()
    while mirror.send_logged():
        pass
    mirror.send_artifacts()
    say(f"{run.name}: checkpoints")
    mirror.send_checkpoints()
    mirror.end()
    say(f"{run.name}: reading back")
    return _verified(mirror)


def _task_of(run: Run, server: Server) -> str:
    """Return the id of the run's task, which is made if there is none."""
    known = run.record.clearml_task_id
    if known is not None and list(
        server.every("tasks.get_all", "tasks", id=[known], only_fields=["id"])
    ):
        return known
    task = _made_before(run, server) or create_task(run, server, parent_task(run))
    run.record.clearml_task_id = task
    run.write()
    return task


def _made_before(run: Run, server: Server) -> str | None:
    """Return the task that was made for the run by somebody who was killed before noting it."""
    project = server.project(project_of(run), create=False)
    if project is None:
        return None
    found = server.every(
        "tasks.get_all",
        "tasks",
        project=[project],
        system_tags=[_tag_of(run)],
        only_fields=["id"],
        search_hidden=True,
    )
    return next((str(task["id"]) for task in found), None)


def _tag_of(run: Run) -> str:
    return f"torch_lab:{run.record.id}"


def create_task(run: Run, server: Server, parent: str | None) -> str:
    """Return the id of a new task for `run`, which is started."""
    section = run.record.hparams.get("task") or {}
    task = server.call(
        "tasks.create",
        name=task_name(run),
        project=server.project(project_of(run)),
        type=section.get("task_type") or "training",
        tags=list(section.get("tags") or []),
        system_tags=[_tag_of(run)],
        **({"parent": parent} if parent else {}),
    )
    return str(task["id"])


# Reading back.


def _verified(mirror: Mirror) -> Synced:
    """Compare what the server has with the folder, by what it answers now."""
    expected = _points(mirror.run)
    there = _points_there(mirror)
    found = Synced(
        mirror.run, mirror.task, mirror.sent, sum(len(steps) for steps in expected.values())
    )
    for name in sorted(expected.keys() | there.keys()):
        own, other = expected.get(name, {}), there.get(name, {})
        if name[0].startswith(":"):  # What the SDK watches the machine with.
            continue
        if own.keys() != other.keys():
            found.differences.append(
                f"{'/'.join(name)}: {len(own)} points here, {len(other)} there"
            )
        elif any(not math.isclose(own[step], other[step], rel_tol=1e-6) for step in own):
            found.differences.append(f"{'/'.join(name)}: other values there")
    for checkpoint, model in mirror.progress.models.items():
        found.models[checkpoint] = digest = mirror.server.sha256(model["uri"])
        if digest != model["sha256"]:
            found.differences.append(f"{checkpoint}: other bytes there")
    return found


def _points(run: Run) -> dict[tuple[str, str], dict[int, float]]:
    """Return the finite scalars of a run's folder, by graph and line, and step."""
    series: dict[tuple[str, str], dict[int, float]] = {}
    for _, path in event_files(run.metrics_folder):
        start, end = -1, 0
        while end != start:
            start = end
            points, end = points_in(path, start)
            for point in points:
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
