"""Runs on disk: their names, their versions, and the folder that is the truth about each.

```
data/artifacts/<experiment>-<hparams>-v<N>/
    run.json        what ran, where, when, how it ended: see `RunRecord`
    sources/        every script of the run, and the uncommitted changes of the project
    metrics/        TensorBoard event files
    checkpoints/    last.ckpt and best.ckpt, each with a sidecar of the same name in JSON
    plots/          figures of metrics
    console.log     what the terminal showed
```
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch_lab.errors import CheckpointError, UserError, did_you_mean, listed
from torch_lab.files import written_whole
from torch_lab.places import VERSION, artifacts_folder, project_of, unversioned
from torch_lab.processes import FolderLock, is_alive, process_started
from torch_lab.redaction import masked, masked_arguments, masked_diff, masked_message, masked_script
from torch_lab.scripts import running_script
from torch_lab.utils import shown

__all__ = [
    "CODE_FILE",
    "CodeState",
    "Run",
    "RunRecord",
    "artifacts_folder",
    "code_state",
    "decoded",
    "encoded",
    "find_run",
    "installed_packages",
    "is_made_here",
    "latest_unfinished",
    "newest_first",
    "path_in_sources",
    "plain_name",
    "project_root",
    "runs_of",
    "untracked_files",
    "unversioned",
    "version_in",
]

log = logging.getLogger(__name__)

_WITHOUT_CREDENTIALS = re.compile(r"^([a-z][a-z0-9+.-]*://)[^/@]*@")
CODE_FILE = ".torch_lab/code.json"
"""Where an agent finds the state of the code that it got, which came without git."""
_RECORD = "run.json"
_SPARE = ".spare"
_SPARE_BYTES = 2**16
_LOCK_WAIT_S = 20.0
"""A run that was just told to stop may still save; what it started may outlive it for a while."""


def project_root(start: Path | None = None) -> Path:
    """Return the project of `start`: the nearest parent with a `pyproject.toml` or `.git`.

    `TORCH_LAB_ROOT` overrides it; without any of them it is the working directory.

    Args:
        start: A path in the project; if not given, the script that is running, be it in
            `train_config` or `infer_config`, or else the working directory.
    """
    return project_of(start or running_script() or Path.cwd())


def version_in(name: str, base_name: str) -> int | None:
    """Return the version in the name of a run or its task, if it is one of `base_name`."""
    match = re.match(re.escape(base_name) + r"-v(\d+)(-|$)", name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class CodeState:
    """The state of the project's code in git; empty outside a git checkout."""

    commit: str | None = None
    branch: str | None = None
    changes: bytes = b""
    """The difference of the working tree to the commit, as a patch."""
    untracked: tuple[str, ...] = ()
    """The files and folders that git neither tracks nor ignores."""
    repository: str | None = None
    """The address of the remote origin, without credentials."""

    def __str__(self) -> str:
        if self.commit is None:
            return "no git commit"
        changed = ", with uncommitted changes" if self.changes else ""
        untracked = f", {len(self.untracked)} untracked" if self.untracked else ""
        return f"{self.branch} {self.commit[:8]}{changed}{untracked}"


def code_state(root: Path) -> CodeState:
    """Return the state of the code below `root`; of code that was queued, as it was there."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        told = json.loads((root / CODE_FILE).read_text(encoding="utf-8"))
        told |= {"changes": told["changes"].encode(), "untracked": tuple(told["untracked"])}
        return CodeState(**told)
    status = _git(root, "status", "--porcelain=v2", "--branch").decode(errors="replace")
    head = dict(re.findall(r"^# branch\.(oid|head) (.*)$", status, flags=re.MULTILINE))
    if head.get("oid", "(initial)") == "(initial)":
        return CodeState()
    files = [line for line in status.splitlines() if not line.startswith("#")]
    untracked = tuple(line.removeprefix("? ") for line in files if line.startswith("? "))
    changed = len(files) > len(untracked)
    diff = ("diff", "--binary", "--no-color", "--no-ext-diff", "HEAD")
    changes = _git(root, *diff) if changed else b""
    origin = _git(root, "config", "--get", "remote.origin.url").decode(errors="replace").strip()
    repository = _WITHOUT_CREDENTIALS.sub(r"\1", origin) or None
    return CodeState(head["oid"], head["head"], changes, untracked, repository)


def path_in_sources(script: Path, root: Path) -> Path:
    """Return where a script is in the `sources/` of a run: by its path in the project at `root`."""
    # A `..` in it would lead out of the folder.
    path = script if ".." not in script.parts else script.resolve()
    return path.relative_to(root if path.is_relative_to(root) else path.anchor)


def untracked_files(root: Path, code: CodeState) -> list[str]:
    """Return the files below `root` that git does not know; those of runs and caches are none."""
    if not code.untracked:
        return []
    found = os.fsdecode(_git(root, "ls-files", "--others", "--exclude-standard", "-z"))
    return [name for name in found.split("\0") if name and not is_made_here(name)]


def is_made_here(name: str) -> bool:
    """Return whether a path in a project is that of a run, or of what was downloaded for one."""
    return name.startswith((f"{artifacts_folder(Path()).as_posix()}/", "data/cache/"))


def _git(root: Path, *arguments: str) -> bytes:
    """Return what git prints; nothing where there is no git, no checkout or no answer in time."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def installed_packages() -> dict[str, str]:
    """Return the installed distributions by their folders' names: to open each takes 0.1 s."""
    found: dict[str, str] = {}
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder or "."):
                name, _, version = entry.name.removesuffix(".dist-info").rpartition("-")
                if entry.name.endswith(".dist-info"):
                    found.setdefault(name.replace("_", "-").lower(), version)
    return dict(sorted(found.items()))


@dataclass
class RunRecord:
    """What `run.json` holds."""

    id: str
    name: str
    version: int
    experiment: str
    script: str
    """Path of the hparams script."""
    hparams: dict[str, Any]
    """The resolved hparams, with their types, without secrets; see `encoded` and `masked`."""
    seed: int
    state: str = "running"
    """One of running, completed, failed, stopped."""
    reason: str | None = None
    """Why it failed or stopped."""
    started: str = field(default_factory=_now)
    ended: str | None = None
    argv: list[str] = field(default_factory=lambda: masked_arguments(sys.argv))
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    process_started: float | None = field(default_factory=process_started)
    """When the process was started: its `pid` is given to others later."""
    resumed: list[dict[str, Any]] = field(default_factory=list)
    """Each time that the run was gone on with: when, where, by which command, from which step."""
    python: str = field(default_factory=lambda: sys.version.split()[0])
    packages: dict[str, str] = field(default_factory=installed_packages)
    commit: str | None = None
    branch: str | None = None
    repository: str | None = None
    """Where the code is from: the remote that git calls origin."""
    changed: bool = False
    """Whether the code differed from the commit; `sources/changes.diff` says in what."""
    parent: dict[str, Any] | None = None
    """The run and checkpoint that this run went on from."""
    clearml_task_id: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """What `--set` and `--unset` said; it holds again when the run is resumed."""
    provenance: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """What has set each of the hparams: files by their paths in `sources/`, the newest last."""
    datasets: list[dict[str, Any]] = field(default_factory=list)
    """The ClearML datasets that were read: id, name, project and version of each."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of every metric."""


@dataclass
class Run:
    """One execution of an experiment: its folder, and the record in it."""

    folder: Path
    record: RunRecord = field(repr=False)
    _lock: FolderLock | None = field(default=None, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None}

    @classmethod
    def plan(cls, artifacts: Path, base_name: str, **record: Any) -> Run:
        """Return a run that is not on disk yet, and so has no version.

        Args:
            artifacts: The folder of the project's runs.
            base_name: The run's name without its version.
            record: Fields of `RunRecord`. Secrets in its hparams are not kept.
        """
        hparams = masked(record.pop("hparams"))
        planned = RunRecord(uuid.uuid4().hex, base_name, 0, hparams=hparams, **record)
        return cls(artifacts / base_name, planned)

    def reserve(self, above: int = 0) -> None:
        """Take the next version of the run's name, and create its folder with the record in it.

        Creating the folder is what reserves the version: of two launches in the same instant one
        fails to, and takes the next. It is locked until the run is closed or its process ends.

        Args:
            above: A version that is taken elsewhere, as are those below it.

        Raises:
            UserError: The folder cannot be created.
        """
        artifacts, base_name = self.folder.parent, self.record.name
        try:
            artifacts.mkdir(parents=True, exist_ok=True)
            self._reserve(artifacts, base_name, above)
        except OSError as error:
            raise UserError(
                f"cannot create a run in {shown(artifacts)}: {error.strerror}",
                "the environment variable TORCH_LAB_ROOT moves it",
            ) from None
        self.write()

    def reserve_another(self, above: int) -> None:
        """Give up the folder, in which there is nothing yet, for one with a version above `above`.

        Raises:
            UserError: The folder cannot be created.
        """
        assert not self.record.resumed, "there is something in it"
        self.discard()
        base_name = unversioned(self.record.name)
        self.folder, self.record.name = self.folder.with_name(base_name), base_name
        self.reserve(above)

    def _reserve(self, artifacts: Path, base_name: str, above: int) -> None:
        version = max([above, *_versions(artifacts, base_name)]) + 1
        while True:
            folder = artifacts / f"{base_name}-v{version}"
            try:
                folder.mkdir()
                break
            except FileExistsError:
                version += 1
        self.folder, self.record.name, self.record.version = folder, folder.name, version
        self.lock(wait_s=0.0)
        self._keep_spare()

    def lock(self, wait_s: float = _LOCK_WAIT_S) -> None:
        """Keep other processes from training this run, until it is closed or this process ends.

        Args:
            wait_s: How long to wait for a process that has it.

        Raises:
            UserError: Another process has it.
            OSError: Nothing can be written in the folder.
        """
        lock = FolderLock(self.folder)
        if not lock.take():
            log.info("%s is in use by %s; waiting for its end", self.name, self._owner())
            if not lock.take(wait_s):
                raise UserError(f"run {self.name} is being trained by {self._owner()}")
        self._lock = lock

    def join(self) -> None:
        """Hold the lock in a process that the run's own one started, and that writes to the run."""
        self._lock = FolderLock(self.folder)
        self._lock.join()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _owner(self) -> str:
        return _process_of(Run.read(self.folder).record)

    def reopen(self, from_step: int | None = None, changed: Sequence[str] = ()) -> None:
        """Go on with a run that has ended: lock it, and record that this process trains it.

        Args:
            from_step: The step that training goes on from, if that is known.
            changed: What differs from the hparams that it began with.

        Raises:
            UserError: Another process has it, or had it since it was looked at.
        """
        try:
            self.lock()
            self._reopen(from_step, changed)
            self._keep_spare()
        except OSError as error:
            raise UserError(f"cannot go on with {self.name}: {error.strerror}") from None

    def _reopen(self, from_step: int | None, changed: Sequence[str]) -> None:
        # What it was when it was looked at may have changed while waiting for the lock.
        before = Run.read(self.folder).record
        if before.state == "completed":
            self._unlock()
            raise UserError(f"run {self.name} is completed")
        if len(before.resumed) != len(self.record.resumed):
            self._unlock()
            raise UserError(
                f"run {self.name} went on in {_process_of(before)} meanwhile",
                "give the command again: it will start from the checkpoint of now",
            )
        host, pid = socket.gethostname(), os.getpid()
        resumed = {
            "when": _now(),
            "ended_before": before.ended or self._last_written(),
            "host": host,
            "pid": pid,
            "argv": masked_arguments(sys.argv),
            "from_step": from_step,
            "changed": list(changed),
        }
        self.record = replace(
            before,
            state="running",
            reason=None,
            ended=None,
            host=host,
            pid=pid,
            process_started=process_started(),
            resumed=[*before.resumed, resumed],
        )
        self.write()

    def _last_written(self) -> str:
        """Return when a file of the run was written last: of a lost run no other end is known."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.name != ".lock")
        at = max(path.stat().st_mtime for path in files)
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Return the run in `folder`.

        Raises:
            CheckpointError: There is no run in it.
        """
        try:
            found = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            known = {item.name for item in fields(RunRecord)}
            found["metrics"] = decoded(found.get("metrics", {}))
            return cls(folder, RunRecord(**{key: found[key] for key in found if key in known}))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder} holds no run: {_RECORD}: {error}") from None

    @property
    def name(self) -> str:
        """Its name, with the version."""
        return self.record.name

    @property
    def metrics_folder(self) -> Path:
        """Where the event files are."""
        return self.folder / "metrics"

    @property
    def checkpoints_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    @property
    def plots_folder(self) -> Path:
        """Where the figures are."""
        return self.folder / "plots"

    @property
    def console_log(self) -> Path:
        """What the terminal showed."""
        return self.folder / "console.log"

    @property
    def state(self) -> str:
        """One of running, completed, failed, stopped; lost if its process ended without a word.

        Of a process on another host nothing is known: there a run stays running.
        """
        record = self.record
        here = record.state == "running" and record.host == socket.gethostname()
        lost = here and not is_alive(record.pid, record.process_started)
        return "lost" if lost else record.state

    @property
    def hparams(self) -> dict[str, Any]:
        """The resolved hparams that the run had, in their own types."""
        result: dict[str, Any] = decoded(self.record.hparams)
        return result

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of every metric."""
        return self.record.metrics

    @property
    def best(self) -> dict[str, Any] | None:
        """What the sidecar of the best checkpoint says (score, step, …), if there is one."""
        return self.sidecar("best")

    @property
    def best_score(self) -> float | None:
        """The monitored metric's value at the best checkpoint, if there is one."""
        return self.best["score"] if self.best else None

    def checkpoint(self, name: str) -> Path:
        """Return the path of the checkpoint `name`, with or without `.ckpt`; it may be missing."""
        return _checkpoint(self.folder, name)

    def checkpoint_names(self) -> set[str]:
        """Return the names of the checkpoints that there are."""
        return {path.stem for path in self.checkpoints_folder.glob("[!.]*.ckpt")}

    def sidecar(self, name: str) -> dict[str, Any] | None:
        """Return what the sidecar of the checkpoint `name` says, if there is one to be read."""
        try:
            text = self.checkpoint(name).with_suffix(".json").read_text(encoding="utf-8")
            found: dict[str, Any] = json.loads(text)
        except (OSError, ValueError):
            return None
        return found

    def write(self) -> None:
        """Write the record."""
        record = {**asdict(self.record), "metrics": encoded(self.record.metrics)}
        with written_whole(self.folder / _RECORD) as file:
            text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
            file.write_text(text + "\n", encoding="utf-8")

    def write_sources(self, root: Path, scripts: Iterable[Path], changes: bytes) -> None:
        """Copy `scripts` by their paths below `root`, and write the uncommitted `changes`.

        What looks like a secret in them is masked. Of a run that goes on, what has changed since it
        began goes to a folder of its own.
        """
        for script in scripts:
            self._keep_source(path_in_sources(script, root), masked_script(script.read_bytes()))
        if changes:
            self._keep_source(Path("changes.diff"), masked_diff(changes))

    def _keep_source(self, below: Path, content: bytes) -> None:
        target = self.folder / "sources" / below
        if self.record.resumed:
            if target.is_file() and target.read_bytes() == content:
                return
            target = self.folder / "sources" / f"resumed-{len(self.record.resumed)}" / below
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def close(self, state: str, metrics: Mapping[str, float], reason: str | None = None) -> None:
        """Record how the run ended."""
        self.record.state = state
        self.record.metrics = dict(metrics)
        self.record.reason = reason and masked_message(reason)
        self.record.ended = _now()
        try:
            (self.folder / _SPARE).unlink(missing_ok=True)
            self.write()
        finally:
            self._unlock()

    def _keep_spare(self) -> None:
        """Take some room on the disk, so that how the run ends can be written on a full one."""
        with contextlib.suppress(OSError):
            # No zeros: some file systems keep those without taking room for them.
            (self.folder / _SPARE).write_bytes(os.urandom(_SPARE_BYTES))

    def discard(self) -> None:
        """Remove the run from disk, for mistakes that are found after its folder was made."""
        assert self.record.version, "what was not reserved is not ours to remove"
        self._unlock()
        shutil.rmtree(self.folder, ignore_errors=True)


def _process_of(record: RunRecord) -> str:
    return f"process {record.pid} on host {record.host}"


def plain_name(name: str, kind: str) -> str:
    """Return `name`, which is to become a part of a path, if it leads nowhere else.

    Args:
        name: What a user or a file gave as a name.
        kind: What it names, for the error: "a checkpoint's name".

    Raises:
        CheckpointError: It is a path.
    """
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise CheckpointError(f"{name!r}: expected {kind}, not a path")
    return name


def _checkpoint(folder: Path, name: str) -> Path:
    plain_name(name, "a checkpoint's name")
    return folder / "checkpoints" / f"{name.removesuffix('.ckpt')}.ckpt"


def _versions(artifacts: Path, base_name: str) -> Iterator[int]:
    for entry in os.scandir(artifacts):
        match = VERSION.search(entry.name)
        if match and entry.name[: match.start()] == base_name:
            yield int(match[1])


def newest_first(artifacts: Path, base_name: str) -> Iterator[Run]:
    """Yield the runs of a name without version, and read only those that are asked for.

    What holds no run is left out.
    """
    plain_name(base_name, "a run's name")
    versions = sorted(_versions(artifacts, base_name), reverse=True) if artifacts.is_dir() else []
    for version in versions:
        with contextlib.suppress(CheckpointError):
            yield Run.read(artifacts / f"{base_name}-v{version}")


def runs_of(artifacts: Path, base_name: str) -> list[Run]:
    """Return the runs of a name without version, newest first; what holds no run is left out."""
    return list(newest_first(artifacts, base_name))


def latest_unfinished(artifacts: Path, base_name: str) -> Run | None:
    """Return the newest run of a name without version that failed, was stopped or is lost."""
    unfinished = ("failed", "stopped", "lost")
    return next(
        (run for run in newest_first(artifacts, base_name) if run.state in unfinished), None
    )


def find_run(artifacts: Path, wanted: str, having: str | None = None) -> Run:
    """Return the run that `wanted` means.

    Args:
        artifacts: The folder of the project's runs.
        wanted: A run's name; a name without its version, for the newest such run that has the
            checkpoint; a run's id; or the id of its ClearML task.
        having: The name of a checkpoint that the newest run must have, if it must have one.

    Raises:
        CheckpointError: There is no such run.
    """
    plain_name(wanted, "a run's name")
    if (artifacts / wanted / _RECORD).is_file():
        return Run.read(artifacts / wanted)
    versions = sorted(_versions(artifacts, wanted), reverse=True) if artifacts.is_dir() else []
    if versions:
        candidates = [artifacts / f"{wanted}-v{version}" for version in versions]
        # What takes the place of a damaged `last` counts as well.
        serving = [having, "previous"] if having == "last" else [having]
        complete = (
            folder
            for folder in candidates
            if having is None or any(_checkpoint(folder, str(n)).is_file() for n in serving)
        )
        return Run.read(next(complete, candidates[0]))
    # Only for this is there a look into the folders of all other runs.
    folders = [record.parent for record in artifacts.glob(f"*/{_RECORD}")]
    if re.fullmatch(r"[0-9a-f]{32}", wanted):
        return _run_with_id(folders, wanted, artifacts)
    names = {folder.name for folder in folders}
    base_names = {unversioned(name) for name in names}
    raise CheckpointError(
        f"there is no run {wanted!r} in {shown(artifacts)}"
        f"{did_you_mean(wanted, base_names | names)}",
        f"runs there: {listed(sorted(names), 8) or 'none'}",
    )


def _run_with_id(folders: Iterable[Path], wanted: str, artifacts: Path) -> Run:
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            run = Run.read(folder)
            if wanted in (run.record.id, run.record.clearml_task_id):
                return run
    raise CheckpointError(f"no run in {artifacts} has the id or the ClearML task id {wanted}")


def encoded(value: Any) -> Any:
    """Return `value` in what JSON can hold, so that `decoded` gives it back in its own types.

    Tuples, sets, paths, bytes, non-finite floats and dictionaries with other keys than strings
    become `{"__type__": …, "value": …}`; of anything else its `repr` is kept.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else _tagged("float", repr(value))
    if type(value) is list:
        return [encoded(item) for item in value]
    if type(value) is dict:
        if all(isinstance(key, str) and key != "__type__" for key in value):
            return {key: encoded(item) for key, item in value.items()}
        return _tagged("dict", [[encoded(key), encoded(item)] for key, item in value.items()])
    if type(value) in (tuple, set, frozenset):
        return _tagged(type(value).__name__, [encoded(item) for item in value])
    if isinstance(value, Path):
        return _tagged("path", str(value))
    return _tagged("repr", repr(value))


def _tagged(kind: str, value: Any) -> dict[str, Any]:
    return {"__type__": kind, "value": value}


def decoded(value: Any) -> Any:
    """Return what `encoded` was given; of what only its `repr` was kept, that string."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__type__" not in value:
        return {key: decoded(item) for key, item in value.items()}
    inner = value["value"]
    match value["__type__"]:
        case "float":
            return float(inner)
        case "path":
            return Path(inner)
        case "dict":
            return {decoded(key): decoded(item) for key, item in inner}
        case "tuple" | "set" | "frozenset" as kind:
            collection = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
            return collection(decoded(item) for item in inner)
    return inner
