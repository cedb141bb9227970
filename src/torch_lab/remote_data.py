"""ClearML datasets: files that many runs share, fetched into the project's cache, and uploaded.

```
data/cache/datasets/
    <id>/       the files of a dataset
    <id>.json   which they are: name, project, version, and sha256, size and time of each file
```

A dataset that is finalised never changes: what is in the cache needs no server.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final
from zipfile import BadZipFile, ZipFile

from torch_lab.errors import ServerError, TrackingError, UnreachableError, UserError
from torch_lab.files import sha256_of, written_whole
from torch_lab.remote import access, alone_in, downloaded, in_words, is_id
from torch_lab.runs import project_root
from torch_lab.scripts import running_script, shown
from torch_lab.server import Server
from torch_lab.tracking import found_server

__all__ = ["dataset_folder", "upload_dataset"]

log = logging.getLogger(__name__)

_HIDDEN: Final = "/.datasets/"
"""What parts a dataset's project from its name in the project of its task."""
_TAG: Final = "dataset"
_FINAL: Final = ("completed", "published")
_FIELDS: Final = (
    "id",
    "name",
    "project",
    "status",
    "system_tags",
    "runtime",
    "execution.artifacts",
)
_CHUNK: Final = 2**20
_BETWEEN_LOOKS_S: Final = 5.0
_MISSED_LOOKS: Final = 3


@dataclass(frozen=True)
class _File:
    """A file of a dataset, and where it was uploaded."""

    sha256: str
    dataset: str
    """The id of the dataset, this one or one that it is based on, which has it."""
    artifact: str


@dataclass
class _Version:
    """One version of a dataset."""

    id: str
    name: str
    project: str
    version: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each file in the cache its sha256, size and the time when it was written."""

    def facts(self) -> dict[str, str]:
        """Return what a run records of it."""
        return {key: getattr(self, key) for key in ("id", "name", "project", "version")}


# Fetching.


def dataset_folder(dataset_id: str) -> Path:
    """Return the folder with the files of a ClearML dataset, fetched and verified.

    It is in the cache of the project whose script is running, for all its runs: change nothing in
    it. A run records the datasets that its `train_config` asks for.

    Args:
        dataset_id: The id of a version of a dataset.

    Raises:
        UserError: There is no such dataset, it is not finalised, ClearML cannot be asked, or what
            came is not what was uploaded.
    """
    script = running_script()
    asking = f"{shown(script)}: " if script else ""
    if not is_id(str(dataset_id)):
        raise UserError(f"{asking}{dataset_id!r} is no id of a ClearML dataset")
    cache = project_root() / "data" / "cache" / "datasets"
    try:
        with in_words(f"dataset {dataset_id}", UserError), alone_in(cache):
            found = _cached(cache, dataset_id) or _fetched(cache, dataset_id)
    except UserError as error:
        raise type(error)(f"{asking}{error.message}", error.hint) from error
    asked = access().datasets
    if found.facts() not in asked:
        asked.append(found.facts())
    return cache / dataset_id


def _cached(cache: Path, dataset: str) -> _Version | None:
    """Return what is in the cache, if all of it is as it was fetched."""
    try:
        found = _Version(**json.loads((cache / f"{dataset}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    for name, told in found.files.items():
        path = cache / dataset / name
        if not path.is_file():
            return None
        is_touched = _stamp(path) != (told["size"], told["time_ns"])
        if is_touched and sha256_of(path) != told["sha256"]:
            log.warning("%s was changed: the dataset is fetched anew", path)
            return None
    return found


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _fetched(cache: Path, dataset: str) -> _Version:
    server, why = access().server()
    if server is None:
        raise UserError(f"dataset {dataset} is not in the cache; {why}")
    task = _task(server, dataset)
    found = _version_of(server, task)
    log.info("fetching the dataset %s %s from ClearML", found.name, found.version)
    parts = cache / f".{dataset}.parts"
    new = cache / f".{dataset}.new"
    shutil.rmtree(new, ignore_errors=True)
    for path in (parts, new):
        path.mkdir(exist_ok=True)
    files = _files(server, task, parts)
    _fill(server, new, parts, files)
    shutil.rmtree(cache / dataset, ignore_errors=True)
    new.rename(cache / dataset)
    found.files = {
        name: _described(cache / dataset / name, file.sha256) for name, file in files.items()
    }
    with written_whole(cache / f"{dataset}.json") as file:
        file.write_text(json.dumps(asdict(found), indent=2), encoding="utf-8")
    shutil.rmtree(parts)
    return found


def _task(server: Server, dataset: str) -> dict[str, Any]:
    """Return what the server tells of a finalised dataset."""
    for task in _tasks(server, id=[dataset]):
        if _TAG not in (task.get("system_tags") or []):
            raise UserError(f"{dataset} is a task of ClearML's, and no dataset")
        if task.get("status") not in _FINAL:
            raise UserError(f"dataset {dataset} is not finalised: its files may still change")
        return task
    raise UserError(f"ClearML has no dataset {dataset}")


def _tasks(server: Server, **wanted: Any) -> Iterator[dict[str, Any]]:
    return server.every(
        "tasks.get_all", "tasks", only_fields=list(_FIELDS), search_hidden=True, **wanted
    )


def _version_of(server: Server, task: Mapping[str, Any]) -> _Version:
    project = server.call("projects.get_by_id", project=task["project"])["project"]["name"]
    version = str((task.get("runtime") or {}).get("version") or "")
    own = str(project).partition(_HIDDEN)[0]
    return _Version(str(task["id"]), str(task["name"]), own, version)


def _artifacts(task: Mapping[str, Any]) -> dict[str, str]:
    """Return the addresses of a task's artifacts, by their names."""
    found = (task.get("execution") or {}).get("artifacts") or []
    return {str(each["key"]): str(each.get("uri") or "") for each in found}


def _files(server: Server, task: Mapping[str, Any], parts: Path) -> dict[str, _File]:
    """Return the files of a dataset, by their paths in it."""
    uri, path = _artifacts(task).get("state", ""), parts / "state.json"
    try:
        downloaded(server, uri, path)
        state = json.loads(path.read_text(encoding="utf-8"))
        links, entries = state.get("dataset_link_entries"), state["dataset_file_entries"]
        files = {
            _below(each["relative_path"]): _File(
                str(each["hash"]), str(each["parent_dataset_id"]), str(each["artifact_name"])
            )
            for each in entries
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"dataset {task['id']} has a list of files that cannot be read") from error
    if links:
        raise UserError(
            f"dataset {task['id']} has {len(links)} links to files, which are not followed",
            "clearml.Dataset.get(...).get_local_copy() does",
        )
    return files


def _below(name: str) -> str:
    """Return the path of a file, which must lie in the folder that it is written to."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise UserError(f"a dataset has a file {name!r}, which would lie outside of its folder")
    return str(path)


def _fill(server: Server, folder: Path, parts: Path, files: Mapping[str, _File]) -> None:
    """Fetch the archives that have `files`, and unpack them into `folder`, verified."""
    archives: dict[tuple[str, str], list[str]] = {}
    for name, file in files.items():
        archives.setdefault((file.dataset, file.artifact), []).append(name)
    owners = sorted({dataset for dataset, _ in archives})
    tasks = {str(task["id"]): task for task in _tasks(server, id=owners)} if owners else {}
    for (dataset, artifact), names in archives.items():
        uri = _artifacts(tasks.get(dataset, {})).get(artifact)
        if not uri:
            raise UserError(f"dataset {dataset}, which has {names[0]}, was removed from ClearML")
        archive = parts / f"{hashlib.sha256(uri.encode()).hexdigest()}.zip"
        downloaded(server, uri, archive)
        _unpack(archive, folder, {name: files[name].sha256 for name in names})
        archive.unlink()


def _unpack(archive: Path, folder: Path, digests: Mapping[str, str]) -> None:
    try:
        with ZipFile(archive) as opened:
            for name, digest in digests.items():
                if _written(opened, name, folder / name) != digest:
                    raise BadZipFile(name)
    except (BadZipFile, KeyError, EOFError, RuntimeError) as error:
        archive.unlink()
        raise UserError(
            f"a dataset is damaged on ClearML, or on its way ({error})",
            "give the command again to download it anew",
        ) from error


def _written(archive: ZipFile, name: str, path: Path) -> str:
    """Write a file of an archive to `path`, and return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with archive.open(name) as source, path.open("wb") as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


def _described(path: Path, digest: str) -> dict[str, Any]:
    size, time_ns = _stamp(path)
    return {"sha256": digest, "size": size, "time_ns": time_ns}


def _all_files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Uploading.


def upload_dataset(folder: Path, name: str, project: str) -> str:
    """Upload the files in `folder` as a version of a ClearML dataset, and return its id.

    Its parent is the newest version before, of which it stores what has changed; if nothing has,
    that version is returned.

    Args:
        folder: What is uploaded, with the folders below it.
        name: The dataset's name.
        project: The project that it belongs to.

    Raises:
        TrackingError: There is no ClearML server, or it went away meanwhile.
        UserError: There are no files, the server refuses, or has something else afterwards.
    """
    own = {path.relative_to(folder).as_posix(): sha256_of(path) for path in _all_files(folder)}
    if not own:
        raise UserError(f"{folder} has no files to upload")
    server = found_server()
    with in_words(f"dataset {name}", UserError):
        parent = _newest(server, name, project)
        if parent is not None and _digests(server, parent, folder) == own:
            return parent
        before = [] if parent is None else [parent]
        made = _watched(server, lambda: _uploaded(folder, name, project, before))
        if _digests(server, made, folder) != own:
            raise UserError(f"dataset {made} has other files than {folder}", "upload it again")
        return made


def _newest(server: Server, name: str, project: str) -> str | None:
    """Return the id of the newest version of a dataset, if there is one."""
    place = server.project(f"{project}{_HIDDEN}{name}", create=False)
    if place is None:
        return None
    found = _tasks(server, project=[place], system_tags=[_TAG], order_by=["-created"])
    return next((str(task["id"]) for task in found if task.get("status") in _FINAL), None)


def _digests(server: Server, dataset: str, folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a dataset, as the server tells; `folder` is for scratch."""
    parts = folder.parent / f".{folder.name}.parts"
    parts.mkdir(exist_ok=True)
    try:
        files = _files(server, _task(server, dataset), parts)
        return {name: file.sha256 for name, file in files.items()}
    finally:
        shutil.rmtree(parts)


def _uploaded(folder: Path, name: str, project: str, parents: list[str]) -> str:
    """Upload with the SDK, which alone knows how; it has all its say on stderr."""
    from clearml import Dataset, Task

    # A reporter in a process of its own loses its last events.
    Task._report_subprocess_enabled = False  # type: ignore[assignment]
    with contextlib.redirect_stdout(sys.stderr):
        dataset = Dataset.create(name, project, parent_datasets=parents)
        for file in dataset.list_files():
            if not (folder / file).is_file():
                dataset.remove_files(file, verbose=False)
        dataset.add_files(str(folder), verbose=False)
        dataset.upload(show_progress=False, preview=False)
        dataset.finalize()
    return str(dataset.id)


def _watched(server: Server, function: Callable[[], str]) -> str:
    """Return what `function` returns, called in a thread that is left alone if the server is gone.

    Raises:
        TrackingError: The server went away: the SDK would wait for it for ever.
        UserError: The SDK says that it cannot be done.
    """
    results: list[str] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # The SDK has many of its own.
            errors.append(error)

    thread = threading.Thread(target=run, name="torch_lab-uploads-data", daemon=True)
    thread.start()
    missed = 0
    while thread.is_alive() and missed < _MISSED_LOOKS:
        thread.join(_BETWEEN_LOOKS_S)
        missed = 0 if not thread.is_alive() or _answers(server) else missed + 1
    if errors:
        raise UserError(f"the dataset was not uploaded: {errors[0]}") from errors[0]
    if not results:
        raise TrackingError("ClearML went away during the upload", "upload it again")
    return results[0]


def _answers(server: Server) -> bool:
    try:
        server.call("users.get_current_user")
    except UnreachableError:
        return False
    except ServerError:
        return True
    return True
