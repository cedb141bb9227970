"""The runs of a project as a table: light, as nothing of them is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from torch_lab.errors import CheckpointError, UserError, did_you_mean, listed
from torch_lab.runs import Run, unversioned
from torch_lab.utils import shown

__all__ = ["TITLES", "listed_runs", "listed_words", "seconds_trained"]

TITLES = ("run", "state", "started", "duration", "epoch", "step", "best")


def listed_runs(artifacts: Path, start: str = "") -> list[dict[str, Any]]:
    """Return what there is to say of each run in a folder, the newest last.

    Args:
        artifacts: The folder of the project's runs.
        start: What their names start with.

    Returns:
        For each run its `run`, `state`, `started`, `duration_s`, `epoch` (from 0) and `step` of
        its last checkpoint, the `best` score and what it is of (`monitor`); None for what is not
        known.

    Raises:
        UserError: There are runs, but none whose name starts so.
    """
    runs = sorted(_readable(artifacts), key=lambda run: run.record.started)
    wanted = [run for run in runs if run.name.startswith(start)]
    if runs and not wanted:
        names = {unversioned(run.name) for run in runs}
        near = did_you_mean(start, names)
        raise UserError(
            f"there is no run {start!r} in {shown(artifacts)}{near}",
            f"runs there: {listed(sorted(names), 8)}",
        )
    return [_described(run) for run in wanted]


def _readable(artifacts: Path) -> Iterator[Run]:
    for record in artifacts.glob("*/run.json"):
        with contextlib.suppress(CheckpointError):
            yield Run.read(record.parent)


def _described(run: Run) -> dict[str, Any]:
    last, best = run.sidecar("last") or {}, run.best or {}
    return {
        "run": run.name,
        "state": run.state,
        "started": run.record.started,
        "duration_s": seconds_trained(run),
        "epoch": last.get("epoch"),
        "step": last.get("step"),
        "best": best.get("score"),
        "monitor": best.get("monitor"),
    }


def seconds_trained(run: Run) -> float | None:
    """Return for how long processes have trained `run`, without the pauses between them.

    None for a run that is lost: nobody knows when it ended.
    """
    record = run.record
    now = datetime.now(UTC).isoformat() if run.state == "running" else None
    end = record.ended or now
    if end is None:
        return None
    starts = [record.started, *(each["when"] for each in record.resumed)]
    # Without a word about the end before it, a pause cannot be told from training.
    ends = [*(each.get("ended_before") or each["when"] for each in record.resumed), end]
    pairs = zip(starts, ends, strict=True)
    took = [datetime.fromisoformat(end) - datetime.fromisoformat(start) for start, end in pairs]
    return sum(took, timedelta()).total_seconds()


def listed_words(row: Mapping[str, Any]) -> Sequence[str]:
    """Return one of `listed_runs` as a row of a table with `TITLES`."""
    started = datetime.fromisoformat(row["started"]).astimezone()
    duration, epoch, step, best = row["duration_s"], row["epoch"], row["step"], row["best"]
    return (
        row["run"],
        row["state"],
        f"{started:%Y-%m-%d %H:%M:%S}",
        "" if duration is None else str(timedelta(seconds=round(duration))),
        "" if epoch is None else str(epoch + 1),
        "" if step is None else str(step),
        "" if best is None else f"{row['monitor']} {best:.4g}",
    )
