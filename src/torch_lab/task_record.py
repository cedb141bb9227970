"""What a ClearML task says of a run: its hparams, its scripts, its code, its parent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch_lab.errors import CheckpointError
from torch_lab.runs import Run, decoded
from torch_lab.server import Server

__all__ = [
    "HPARAMS",
    "create_task",
    "described",
    "page_of",
    "parameters",
    "parent_of",
    "parent_task",
    "project_of",
    "script_of",
    "task_name",
    "task_of",
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
    if task := (run.record.parent or {}).get("task"):
        return str(task)
    parent = parent_of(run)
    return parent.record.clearml_task_id if parent else None


def parent_of(run: Run) -> Run | None:
    """Return the run that `run` started from, if it is beside it."""
    told = run.record.parent or {}
    try:
        found = Run.read(run.folder.parent / str(told["run"])) if told.get("run") else None
    except CheckpointError:
        return None
    return found if found and found.record.id == told.get("id") else None


def described(run: Run, parent_model: str | None = None) -> dict[str, Any]:
    """Return what `tasks.edit` gets: the hparams to read, the typed originals, the scripts.

    Args:
        run: The run.
        parent_model: The id of the model that it started from, if the record does not know it.
    """
    return {
        "hyperparams": {
            HPARAMS: dict(parameters(decoded(run.record.hparams), HPARAMS)),
            _RUN: dict(parameters(_facts(run, parent_model), _RUN)),
        },
        "configuration": {
            HPARAMS: _object(HPARAMS, json.dumps(run.record.hparams, indent=2), "json"),
            **{name: _object(name, text, kind) for name, text, kind in _sources(run)},
        },
        "comment": f"{run.name}: {run.record.script}",
    }


def _facts(run: Run, parent_model: str | None) -> dict[str, Any]:
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
        "parent_model": (record.parent or {}).get("model") or parent_model,
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
        "entry_point": f"-m torch_lab train {record.script}",
        "diff": changes.read_text(errors="replace") if changes.is_file() else "",
        "requirements": {"pip": f"# Python {record.python}\n\n{packages}\n"},
    }


# The task itself.


def task_of(run: Run, server: Server) -> str:
    """Return the id of the run's task, which is made if there is none, and noted.

    Args:
        run: The run.
        server: Where the task is, or will be.

    Raises:
        ServerError: The server does not answer, or refuses.
    """
    known = run.record.clearml_task_id
    if known is not None and server.has_task(known):
        run.write()
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


def page_of(run: Run, server: Server, task: str) -> str:
    """Return the address of a run's task in the web application."""
    project = server.project(project_of(run))
    return f"{server.address.web}/projects/{project}/tasks/{task}/output/log"


def create_task(run: Run, server: Server, parent: str | None) -> str:
    """Return the id of a new task for `run`, which is started."""
    section = run.hparams.get("task") or {}
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
