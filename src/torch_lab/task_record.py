"""What a ClearML task says of a run: its hparams, its scripts, its code, its parent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch_lab.errors import CheckpointError
from torch_lab.runs import Run, decoded

__all__ = [
    "HPARAMS",
    "described",
    "parameters",
    "parent_task",
    "project_of",
    "script_of",
    "task_name",
    "value_of",
]

HPARAMS: Final = "hparams"
"""The section of the hparams, and the configuration object that has them with their types."""
_RUN: Final = "run"


def project_of(run: Run) -> str:
    """Return the project that the run's task belongs to: the hparams' or that of the experiment."""
    return str(_task_section(run).get("project_name") or run.record.experiment)


def task_name(run: Run) -> str:
    """Return the name of the run's task: its own, and a `task_name` in the hparams behind it."""
    suffix = _task_section(run).get("task_name")
    return f"{run.name}-{suffix}" if suffix else run.name


def _task_section(run: Run) -> Mapping[str, Any]:
    section = run.record.hparams.get("task")
    return section if isinstance(section, Mapping) else {}


def parent_task(run: Run) -> str | None:
    """Return the id of the task of the run that `run` started from, if it has one."""
    parent = run.record.parent or {}
    if parent.get("task"):
        return str(parent["task"])
    name = parent.get("run")
    try:
        found = Run.read(run.folder.parent / name) if name else None
    except CheckpointError:
        return None
    return found.record.clearml_task_id if found and found.record.id == parent.get("id") else None


def described(run: Run) -> dict[str, Any]:
    """Return what `tasks.edit` gets: the hparams to read, the typed originals, the scripts."""
    return {
        "hyperparams": {
            HPARAMS: dict(parameters(decoded(run.record.hparams), HPARAMS)),
            _RUN: dict(parameters(_facts(run), _RUN)),
        },
        "configuration": {
            HPARAMS: _object(HPARAMS, json.dumps(run.record.hparams, indent=2), "json"),
            **{name: _object(name, text, kind) for name, text, kind in _sources(run)},
        },
        "comment": f"{run.name}: {run.record.script}",
    }


def _facts(run: Run) -> dict[str, Any]:
    record = run.record
    return {
        "id": record.id,
        "script": record.script,
        "seed": record.seed,
        "host": record.host,
        "python": record.python,
        "command": " ".join(record.argv),
        "started": record.started,
        "ended": record.ended,
        "parent": (record.parent or {}).get("run"),
        "parent_checkpoint": (record.parent or {}).get("checkpoint"),
        "parent_model": (record.parent or {}).get("model"),
        "datasets": record.datasets,
    }


def parameters(values: Mapping[str, Any], section: str, prefix: str = "") -> Iterator[Any]:
    """Yield the leaves of nested dictionaries as a task's hyperparameters, by their paths."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from parameters(value, section, f"{path}/")
        else:
            kind = type(value).__name__
            yield (
                path,
                {"section": section, "name": path, "value": value_of(value), "type": kind},
            )


def value_of(value: Any) -> str:
    """Return a value as a task shows it: a string as it is, None as nothing, else its `repr`."""
    if value is None:
        return ""
    return value if isinstance(value, str) else repr(value)


def _object(name: str, text: str, kind: str) -> dict[str, str]:
    return {"name": name, "value": text, "type": kind}


def _sources(run: Run) -> Iterator[tuple[str, str, str]]:
    folder = run.folder / "sources"
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        yield name, path.read_text(encoding="utf-8", errors="replace"), "py"


def script_of(run: Run) -> dict[str, Any]:
    """Return which code the run is of: repository, commit, changes, packages."""
    record, changes = run.record, run.folder / "sources" / "changes.diff"
    packages = "\n".join(f"{name}=={version}" for name, version in record.packages.items())
    return {
        "binary": f"python{'.'.join(record.python.split('.')[:2])}",
        "repository": record.repository or "",
        "branch": record.branch or "",
        "version_num": record.commit or "",
        "working_dir": ".",
        "entry_point": Path(record.script).name,
        "diff": changes.read_text(errors="replace") if changes.is_file() else "",
        "requirements": {"pip": f"# Python {record.python}\n\n{packages}\n"},
    }
