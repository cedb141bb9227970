"""Checkpoints of ClearML tasks: found, downloaded, verified, and kept in the project's cache.

```
data/cache/checkpoints/
    <sha256>.ckpt   a checkpoint; of a model without a known sha256, the name is made of its address
    <sha256>.json   what it is: its sha256 and size, its task, model, step and epoch
```

Nothing is ever moved from where it lies, and no name that a server tells becomes part of a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

from torch_lab.errors import (
    CheckpointError,
    DamagedError,
    ServerError,
    UnreachableError,
    UserError,
    did_you_mean,
    listed,
)
from torch_lab.files import publish, sha256_of, written_whole
from torch_lab.processes import FolderLock
from torch_lab.runs import unversioned
from torch_lab.server import Server
from torch_lab.tracking import connected
from torch_lab.utils import shown

__all__ = [
    "Access",
    "Remote",
    "access",
    "alone_in",
    "asking",
    "downloaded",
    "fetched",
    "find_remote",
    "in_words",
    "is_id",
]

log = logging.getLogger(__name__)

_ID: Final = re.compile(r"[0-9a-f]{32}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NEVER_UPLOADED: Final = ("failed_uploading", "uploading_file")
"""How the SDK's addresses end of what it has not uploaded, or not yet."""
_TASK_FIELDS: Final = ("id", "name", "models.output", "hyperparams.run")
_WAIT_S: Final = 3600.0
_FORBIDDEN: Final = (401, 403)


# Who may ask, and how.


@dataclass
class Access:
    """How a command may ask ClearML, and what it was given there.

    Args:
        mode: `auto` for a server if there is one, `online` to insist on it, `offline` to touch
            nothing of ClearML.
    """

    mode: str = "auto"
    datasets: list[dict[str, Any]] = field(default_factory=list)
    """The datasets that were asked for: id, name, project and version of each."""
    _found: tuple[Server | None, str] | None = None

    def server(self) -> tuple[Server | None, str]:
        """Return the server, and if there is none why; it is looked for once.

        Raises:
            TrackingError: It is insisted on, and not to be had.
        """
        if self.mode == "offline":
            return None, "offline, ClearML is not asked for it"
        if self._found is None:
            self._found = connected(self.mode)
        return self._found


_access: ContextVar[Access | None] = ContextVar("access to ClearML", default=None)


@contextlib.contextmanager
def asking(mode: str) -> Iterator[Access]:
    """Let what is called meanwhile ask ClearML as `mode` allows; see `Access`."""
    token = _access.set(found := Access(mode))
    try:
        yield found
    finally:
        _access.reset(token)


def access() -> Access:
    """Return how the command that is running may ask ClearML; outside of commands, a new one."""
    return _access.get() or Access()


@contextlib.contextmanager
def in_words(what: str, kind: type[UserError] = CheckpointError) -> Iterator[None]:
    """Raise what a server refuses, or a disk, as an error of the user's about `what`.

    Raises:
        UserError: Of that kind: a server does not answer, or refuses, or a file cannot be written.
    """
    try:
        yield
    except ServerError as error:
        why = "no permission: " if error.code in _FORBIDDEN else ""
        raise kind(f"{what}: {why}{error.message}", error.hint) from error
    except OSError as error:
        place = f"{shown(Path(error.filename))}: " if error.filename else ""
        raise kind(f"{what}: {place}{error.strerror or error}") from error


def is_id(text: str) -> bool:
    """Return whether `text` looks like the id of a task, a model or a run."""
    return _ID.fullmatch(text) is not None


# Finding.


@dataclass(frozen=True)
class Remote:
    """A checkpoint on a ClearML server: an output model of a task."""

    name: str
    model: str
    """The model's id."""
    task: str
    """The task's id."""
    run: str
    """The name of the run, or of the task where that is no run of ours."""
    uri: str
    run_id: str | None = None
    experiment: str | None = None
    """The name of the experiment's folder, where it is known."""
    sha256: str | None = None
    step: int | None = None
    epoch: int | None = None
    changed: str = ""
    """When the server's knowledge of the model changed last."""

    def __str__(self) -> str:
        return f"{self.name} of {self.run}"

    @property
    def key(self) -> str:
        """What names it in the cache: letters and digits."""
        where = f"{self.model} {self.uri} {self.changed}"
        return self.sha256 or hashlib.sha256(where.encode()).hexdigest()


def find_remote(server: Server, wanted: str, name: str) -> Remote:
    """Return what the server tells of a checkpoint.

    Args:
        server: Where it is.
        wanted: The id of a task; or a run's name, with its version, or without for the newest one
            that has the checkpoint.
        name: The checkpoint's name, or the id of its model.

    Raises:
        CheckpointError: There is no such task or checkpoint, it was never uploaded, the server does
            not answer, or does not let us see it.
    """
    with in_words(f"ClearML: {name} of {wanted}"):
        task = _task(server, wanted) if is_id(wanted) else _task_named(server, wanted, name)
        return _remote(task, _model(server, task, name))


def _task(server: Server, task: str) -> dict[str, Any]:
    for found in _tasks(server, id=[task]):
        return found
    raise CheckpointError(f"ClearML has no task {task}")


def _tasks(server: Server, **wanted: Any) -> Iterator[dict[str, Any]]:
    fields = list(_TASK_FIELDS)
    return server.every("tasks.get_all", "tasks", only_fields=fields, search_hidden=True, **wanted)


def _task_named(server: Server, wanted: str, having: str) -> dict[str, Any]:
    """Return the task of a run's name: of its highest version that has the checkpoint `having`."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for task in _tasks(server, name=f"^{re.escape(wanted)}(-|$)"):
        run = _run_name(task)
        if wanted in (run, unversioned(run)):
            runs.setdefault(run, []).append(task)
    if not runs:
        raise _unknown_run(server, wanted)
    ordered = sorted(runs, key=_version, reverse=True)
    complete = (run for run in ordered if any(_has(task, having) for task in runs[run]))
    run = next(complete, ordered[0])
    if len(runs[run]) > 1:
        ids = listed(task["id"] for task in runs[run])
        raise CheckpointError(
            f"ClearML has {len(runs[run])} tasks of the run {run}: {ids}",
            "give the id of the one that is meant",
        )
    return runs[run][0]


def _unknown_run(server: Server, wanted: str) -> CheckpointError:
    experiment = wanted.partition("-")[0]
    known = {_run_name(task) for task in _tasks(server, name=f"^{re.escape(experiment)}-")}
    near = did_you_mean(wanted, known | {unversioned(run) for run in known})
    return CheckpointError(f"there is no run {wanted!r}, neither here nor on ClearML{near}")


def _version(run: str) -> int:
    _, _, version = run.rpartition("-v")
    return int(version) if version.isdecimal() else 0


def _run_name(task: Mapping[str, Any]) -> str:
    """Return the name of a task's run: that of the task, without what a user put behind it."""
    name, base = str(task["name"]), _base_name(task)
    match = re.match(re.escape(base) + r"-v\d+(?=-|$)", name) if base else None
    return match[0] if match else name


def _base_name(task: Mapping[str, Any]) -> str | None:
    script = _script(task)
    return f"{script.parent.name}-{script.stem}" if script else None


def _script(task: Mapping[str, Any]) -> Path | None:
    found = _fact(task, "script")
    return Path(found) if found else None


def _fact(task: Mapping[str, Any], name: str) -> str | None:
    """Return what a task says of its run, if it is one of ours."""
    section = (task.get("hyperparams") or {}).get("run") or {}
    return str((section.get(name) or {}).get("value") or "") or None


def _entries(task: Mapping[str, Any]) -> dict[str, str]:
    """Return the output models of a task: their ids, by their names."""
    entries = (task.get("models") or {}).get("output") or []
    return {str(each["name"]).removesuffix(".ckpt"): str(each["model"]) for each in entries}


def _has(task: Mapping[str, Any], name: str) -> bool:
    entries = _entries(task)
    return name in entries or name in entries.values()


def _model(server: Server, task: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what the server tells of a task's model, under the name that the task has for it."""
    entries = _entries(task)
    if not _has(task, name):
        hint = f"it has: {', '.join(sorted(entries)) or 'none'}"
        what = "model" if is_id(name) else "checkpoint"
        raise CheckpointError(
            f"task {_run_name(task)} has no {what} {name!r}{did_you_mean(name, entries)}", hint
        )
    id_ = entries.get(name, name)
    name = next(own for own, model in entries.items() if model == id_)
    for found in server.every("models.get_all", "models", id=[id_]):
        return {**found, "name": name}
    raise CheckpointError(f"{name} of task {_run_name(task)} was removed from ClearML")


def _remote(task: Mapping[str, Any], model: Mapping[str, Any]) -> Remote:
    told, script = _metadata(model), _script(task)
    digest = told.get("sha256", "")
    found = Remote(
        name=str(model["name"]),
        model=str(model["id"]),
        task=str(task["id"]),
        run=_run_name(task),
        uri=str(model.get("uri") or ""),
        run_id=_fact(task, "id"),
        experiment=script.parent.name if script else None,
        sha256=digest if _SHA256.fullmatch(digest) else None,
        step=_number(told.get("step")),
        epoch=_number(told.get("epoch")),
        changed=str(model.get("last_update") or ""),
    )
    if not found.uri or found.uri.rstrip("/").endswith(_NEVER_UPLOADED):
        raise CheckpointError(
            f"{found} was never uploaded to ClearML",
            f"if its run is on another machine, run there: torch-lab sync {found.run}",
        )
    return found


def _metadata(model: Mapping[str, Any]) -> dict[str, str]:
    given = model.get("metadata") or {}
    items: Sequence[Mapping[str, Any]] = list(
        given.values() if isinstance(given, Mapping) else given
    )
    return {str(item["key"]): str(item.get("value", "")) for item in items}


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


# Fetching.


def fetched(server: Server, remote: Remote, root: Path) -> tuple[Path, str]:
    """Return a verified copy of a checkpoint in the cache of the project at `root`, and its sha256.

    Raises:
        CheckpointError: The server does not answer, or refuses, or the file cannot be written.
        DamagedError: What came is not what was uploaded.
    """
    folder = root / "data" / "cache" / "checkpoints"
    target = folder / f"{remote.key}.ckpt"
    with in_words(str(remote)), alone_in(folder):
        known = _digest_of_whole(target)
        if known is not None and remote.sha256 in (None, known):
            return target, known
        log.info("downloading %s from ClearML", remote)
        incoming = folder / f"{remote.key}.incoming"
        digest = downloaded(server, remote.uri, incoming)
        if remote.sha256 not in (None, digest):
            incoming.unlink()
            raise DamagedError(
                f"{remote} is damaged on ClearML, or on its way: its sha256 is {digest[:12]}…, not "
                f"{str(remote.sha256)[:12]}…",
                "give the command again to download it anew",
            )
        _describe(remote, digest, incoming, target)
        publish(incoming, target)
        return target, digest


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Have a folder of the cache, which is made, to this process alone.

    Raises:
        UserError: Another process has had it for an hour.
        OSError: It cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    if not lock.take():
        log.info("another process downloads to %s; waiting for it", shown(folder))
        if not lock.take(_WAIT_S):
            raise UserError(f"another process has {shown(folder)} to itself")
    try:
        yield
    finally:
        lock.release()


def _digest_of_whole(path: Path) -> str | None:
    """Return the sha256 of a file in the cache, if it is that which its sidecar tells."""
    try:
        recorded = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
        digest = sha256_of(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if digest == recorded else None


def _describe(remote: Remote, digest: str, written: Path, target: Path) -> None:
    told = {
        "sha256": digest,
        "size": written.stat().st_size,
        "step": remote.step,
        "epoch": remote.epoch,
        "name": remote.name,
        "run": remote.run,
        "task": remote.task,
        "model": remote.model,
    }
    with written_whole(target.with_suffix(".json")) as file:
        file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def downloaded(server: Server, uri: str, path: Path) -> str:
    """Copy what is at `uri` to `path`, and return its sha256.

    A download that was interrupted goes on where it stopped.

    Raises:
        ServerError: The server does not answer, or refuses, or nothing can be read there.
        OSError: Nothing can be written here.
    """
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        return _downloaded(_reader_of(server, uri), uri, path)
    if scheme != "file":
        raise ServerError(
            f"{uri} is where only tools of ClearML's own read",
            "download it with them, and give the path of the file",
        )
    there = Path(url2pathname(urlsplit(uri).path))
    if not there.is_file():
        raise ServerError(f"{uri} is a file of another machine: it was never uploaded")
    shutil.copyfile(there, path)
    return sha256_of(path)


def _downloaded(server: Server, uri: str, path: Path) -> str:
    with contextlib.suppress(UnreachableError):
        return server.download(uri, path)
    try:
        return server.download(uri, path)
    except UnreachableError as error:
        hint = "give the command again: it goes on where the download has stopped"
        raise UnreachableError(error.message, hint, error.code) from error


def _reader_of(server: Server, uri: str) -> Server:
    """Return who reads `uri`: the server, or for another host somebody without its credentials."""
    if urlsplit(uri).netloc == urlsplit(server.address.files).netloc:
        return server
    return Server(replace(server.address, access_key="", secret_key="", token=""), server.limit_s)
