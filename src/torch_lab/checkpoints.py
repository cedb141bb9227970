"""Checkpoints on disk: written whole, verified when read, with one to fall back to.

A checkpoint `last.ckpt` has a sidecar `last.json` that says what it is: its sha256 and size, the
run, step and epoch it was written at, and the metrics then. A checkpoint is never half written
under its own name, and never read without a look at its sha256. The `last` of before stays as
`previous`, for the day that a disk damages `last`.

What is written are tensors and plain values alone, so that nothing of ours needs to be trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch.serialization import get_unsafe_globals_in_checkpoint

from torch_lab.errors import CheckpointError, DamagedError, did_you_mean
from torch_lab.files import beside, link, move, publish, sha256_of, sync
from torch_lab.hparams import Hparams
from torch_lab.mirror import Progress
from torch_lab.plain import plain_values
from torch_lab.remote import Remote, access, fetched, find_remote, is_id
from torch_lab.runs import Run, artifacts_folder, find_run, project_root
from torch_lab.server import Server
from torch_lab.snapshots import Snapshots
from torch_lab.utils import shown

__all__ = [
    "DESCRIPTION",
    "AtomicCheckpointIO",
    "Source",
    "find_source",
    "note_child",
    "resumable",
    "source_of",
    "whole_checkpoint",
]

log = logging.getLogger(__name__)

DESCRIPTION = "torch_lab"
"""The key under which a checkpoint holds what its sidecar will say."""

_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9"
"""How a file begins that torch wrote before 1.6."""
_PIECE_BYTES = 1 << 22
_SECONDS_TO_NEXT_PIECE = 0.001
_ANY_TEMPORARY = ".*.ckpt.new.tmp"
_LAST = "last"
_PREVIOUS = "previous"
_CHILDREN = "derived_models.log"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place, then moves it there, and its sidecar after it.

    A run's `last` that is replaced becomes `previous`. At every moment both are whole; what a kill
    may leave is one temporary file, which the next checkpoint takes the place of.
    """

    def __init__(self) -> None:
        self._whole: set[Path] = set()
        self._swept: set[Path] = set()
        self._told: set[str] = set()
        self._snapshots = Snapshots()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`, which always holds the old one or the new one, whole.

        What `torch.load(weights_only=True)` would refuse is written as a plain value.

        Raises:
            OSError: It cannot be written; nothing has changed. `strerror` says why.
        """
        self.save_plain(self._plain(checkpoint), Path(path))

    def save_plain(self, values: dict[str, Any], path: Path) -> None:
        """Write plain values, such as a snapshot, to `path` as `save_checkpoint` does."""
        with self._replacing(path) as target:
            digest = _write(values, _temporary(target))
            description = _description(values, digest, _temporary(target))
            text = json.dumps(description, indent=2, allow_nan=False)
            _temporary(_sidecar(target)).write_text(text + "\n", encoding="utf-8")
            sync(_temporary(_sidecar(target)))

    def snapshot(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of what `save_checkpoint` would write now; the one before is no more.

        It lies in memory of its own, which is kept for the next.
        """
        return self._snapshots.taken(self._plain(checkpoint))

    def _plain(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        values, lost = plain_values(checkpoint)
        self._tell(lost)
        return values

    def link(self, existing: Path, path: Path) -> None:
        """Make `path` the same checkpoint as `existing`, which takes no room on most disks.

        Raises:
            OSError: It cannot be done; nothing has changed.
        """
        with self._replacing(path) as target:
            link(existing, _temporary(target))
            link(_sidecar(existing), _temporary(_sidecar(target)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint at `path` and its sidecar."""
        super().remove_checkpoint(path)
        sidecar = _sidecar(Path(path))
        sidecar.unlink(missing_ok=True)
        _temporary(sidecar).unlink(missing_ok=True)

    def _tell(self, lost: Mapping[str, str]) -> None:
        new = [f"{place} is {what}" for place, what in lost.items() if place not in self._told]
        self._told.update(lost)
        if new:
            more = f"; and {len(new) - 5} more" if len(new) > 5 else ""
            log.warning("checkpoint: %s%s", "; ".join(new[:5]), more)

    @contextlib.contextmanager
    def _replacing(self, target: Path) -> Iterator[Path]:
        """Yield `target`; what is written to its temporary names meanwhile takes its place.

        All that needs room must be on the disk at the end: only names change then.
        """
        with _all_or_nothing(target):
            self._prepare(target)
            yield target
            if target.stem == _LAST and _is_of_run(target) and self._is_whole(target):
                self.link(target, target.with_stem(_PREVIOUS))
            _move(target)
        self._whole.add(target)

    def _prepare(self, target: Path) -> None:
        """Make the folder of `target`, or clear away what a killed process left in it."""
        folder, temporary = target.parent, _temporary(target)
        if not folder.exists():
            _make_folder(folder, temporary.name)
        elif folder not in self._swept and _is_of_run(target):
            # Without any file it would be a folder that has lost its checkpoints.
            temporary.touch()
            for leftover in {*folder.glob(_ANY_TEMPORARY)} - {temporary}:
                leftover.unlink()
            for known in folder.glob("[!.]*.ckpt"):
                _settle(known)
        self._swept.add(folder)
        # It may be a link to a checkpoint that stands: never write into it.
        if temporary.exists() and temporary.stat().st_nlink > 1:
            temporary.unlink()
        _settle(target)

    def _is_whole(self, path: Path) -> bool:
        """Return whether the checkpoint at `path`, with its sidecar, is worth to be kept."""
        if not (path.is_file() and _sidecar(path).is_file()):
            return False
        return path in self._whole or sha256_of(path) in _recorded_sha256s(path)


def _is_of_run(checkpoint: Path) -> bool:
    """Return whether it lies in the folder of a run, where no other process writes."""
    return (checkpoint.absolute().parent.parent / "run.json").is_file()


def _make_folder(folder: Path, name: str) -> None:
    """Make a folder that is never seen empty: such a one is a folder that lost its checkpoints."""
    new = beside(folder, "new")
    try:
        new.mkdir(parents=True, exist_ok=True)
        (new / name).touch()
        new.rename(folder)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        # Another process made it at the same time; of anything else this tells, too.
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _all_or_nothing(target: Path) -> Iterator[None]:
    """Remove what was written for `target` after any error; tell of a disk's as an OSError."""
    has_folder = target.parent.exists()
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            _temporary(target).unlink(missing_ok=True)
            _settle(target)
            if not has_folder:
                target.parent.rmdir()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
        raise


def _move(target: Path) -> None:
    """Move a new checkpoint and its sidecar to `target`.

    The new sidecar is safe on disk before the checkpoint moves: whatever is killed between the two
    moves leaves a checkpoint that one of two sidecars describes.
    """
    sidecar = _sidecar(target)
    with _freed_later(target):
        move(_temporary(target), target)
        move(_temporary(sidecar), sidecar)
        sync(target.parent)


@contextlib.contextmanager
def _freed_later(path: Path) -> Iterator[None]:
    """Let a thread wait until the disk has freed what takes its leave here: 0.2 s for a GB."""
    try:
        replaced = path.open("rb", buffering=0)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        # While it is open, nothing is freed.
        threading.Thread(target=replaced.close, name="freeing").start()


def _settle(target: Path) -> None:
    """Give `target` its sidecar, or remove that, if a process was killed before it was moved."""
    sidecar = _sidecar(target)
    waiting = _temporary(sidecar)
    if not waiting.exists():
        return
    if target.is_file() and _recorded(waiting).get("sha256") == sha256_of(target):
        publish(waiting, sidecar)
    else:
        waiting.unlink()


def _temporary(path: Path) -> Path:
    """Return a name beside `path`, always the same, so that killed writers pile up nothing."""
    return beside(path, "new")  # As in `_ANY_TEMPORARY`.


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _write(values: Mapping[str, Any], path: Path) -> str:
    """Write a checkpoint to `path`, safe on the disk, and return its sha256.

    By way of a file of Python, which tells of errors, and lets other threads run after each part.
    """
    with path.open("wb") as file, _Hashing(path) as hashing:
        told = _TellingFile(file)
        try:
            torch.save(values, told)  # type: ignore[arg-type]
        except RuntimeError:
            # Torch hides what happened behind "unexpected pos".
            if told.failure is None:
                raise
            raise told.failure from None
        file.flush()
        hashing.has_all = True
        sync(path)
    return hashing.sha256.hexdigest()


class _Hashing:
    """Finds the sha256 of a file in a thread, while another writes it from its start to its end.

    It is read again for that, from memory: to hash each part before the next one is written takes
    as long as the disk and the hash together.
    """

    def __init__(self, path: Path) -> None:
        self.sha256 = hashlib.sha256()
        self.has_all = False
        self._path = path
        self._is_over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, name="sha256")

    def __enter__(self) -> _Hashing:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._is_over.set()
        self._thread.join()
        if self.has_all and self._failure is not None:
            raise self._failure

    def _follow(self) -> None:
        try:
            piece = memoryview(bytearray(_PIECE_BYTES))
            with self._path.open("rb", buffering=0) as file:
                while not self._is_over.is_set() or self.has_all:
                    has_all = self.has_all
                    if size := file.readinto(piece):
                        self.sha256.update(piece[:size])
                    elif has_all:
                        break
                    else:
                        self._is_over.wait(_SECONDS_TO_NEXT_PIECE)
        except BaseException as error:
            self._failure = error


class _TellingFile:
    """A file that torch writes to, which remembers what went wrong."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failure: BaseException | None = None

    def write(self, content: bytes) -> int:
        try:
            return self.file.write(content)
        except BaseException as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _description(checkpoint: Mapping[str, Any], digest: str, written: Path) -> dict[str, Any]:
    return {
        "sha256": digest,
        "size": written.stat().st_size,
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        **checkpoint.get(DESCRIPTION, {}),
    }


def _recorded(sidecar: Path) -> dict[str, Any]:
    """Return what `sidecar` says; nothing if there is none, or none that can be read."""
    try:
        found = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.debug("%s cannot be read: %s", shown(sidecar), error)
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, verified, to take weights from or to go on from."""

    path: Path
    run: Run | None
    """The run that wrote it; None for a file that lies elsewhere, or whose run is not here."""
    sha256: str
    trusted: bool = False
    """Whether it may run code when it is read."""
    remote: Remote | None = None
    """What ClearML tells of it, where that was asked."""

    def __str__(self) -> str:
        if self.run is None and self.remote is None:
            return shown(self.path)
        return str(self.remote) if self.run is None else f"{self.name} of {self.run.name}"

    @property
    def name(self) -> str:
        """The checkpoint's name in its run."""
        is_cached = self.remote is not None and not _is_of_run(self.path)
        return self.remote.name if self.remote and is_cached else self.path.stem

    def parent(self) -> dict[str, Any]:
        """Return what a run that goes on from here records as its parent."""
        run, remote = self.run.record if self.run else None, self.remote
        return {
            "run": run.name if run else remote and remote.run,
            "id": run.id if run else remote and remote.run_id,
            "checkpoint": self.name,
            "path": str(self.path),
            "sha256": self.sha256,
            "task": remote.task if remote else run and run.clearml_task_id,
            "model": remote.model if remote else self._known_model(),
        }

    def _known_model(self) -> str | None:
        """Return the id of the model on ClearML, as the run's folder notes it, if it is there."""
        models = Progress.of(self.run.folder).models if self.run else {}
        found = models.get(self.name, {})
        return found.get("id") if found.get("sha256") == self.sha256 else None

    def load(self) -> dict[str, Any]:
        """Return what the checkpoint holds, on the CPU.

        Raises:
            CheckpointError: It cannot be read with `weights_only=True`, and is not trusted.
            DamagedError: It cannot be read at all.
        """
        return _read(self.path, trusted=self.trusted)

    def resumable_step(self, hparams_init: Mapping[str, Any]) -> int:
        """Return the step that training goes on from, after a look that it can.

        Args:
            hparams_init: The keyword arguments of the `Trainer`.

        Raises:
            CheckpointError: It holds weights alone, or there is nothing left to train.
        """
        found = self.load()
        if "loops" not in found or "optimizer_states" not in found:
            raise CheckpointError(
                f"{shown(self.path)} holds weights alone: training cannot go on from it",
                'set hparams["checkpoint"]["weights_only"] = True to start from its weights',
            )
        loops = found["loops"]["fit_loop"]
        # What was written at the end of an epoch, but before its last hooks, trained all of it.
        whole = loops["epoch_loop.batch_progress"]["is_last_batch"]
        epochs = loops["epoch_progress"]["current"]["ready" if whole else "processed"]
        step = int(found["global_step"])
        for unit, done, key in (("epochs", epochs, "max_epochs"), ("steps", step, "max_steps")):
            planned = hparams_init.get(key)
            if planned is not None and 0 <= planned <= done:
                raise CheckpointError(
                    f"{self} has trained {done} {unit}, and trainer.init.{key} is {planned}",
                    f"raise {key}: it counts from the start of the run that is gone on from",
                )
        return step


def _read(path: Path, *, trusted: bool) -> dict[str, Any]:
    """Return the dictionary in the checkpoint at `path`; errors are as in `Source.load`."""
    try:
        # What torch wrote before 1.6 is no archive, and cannot be mapped into memory.
        found = torch.load(
            path, map_location="cpu", weights_only=not trusted, mmap=is_zipfile(path)
        )
    except Exception as error:
        # Bytes of any kind may lie there, and raise errors of any kind.
        raise _unreadable(path, error, trusted) from error
    if not isinstance(found, dict):
        raise DamagedError(f"{shown(path)} holds a {type(found).__name__}, no checkpoint")
    return found


def _unreadable(path: Path, error: Exception, trusted: bool) -> CheckpointError:
    code = "" if trusted else _code_in(path, error)
    if code:
        return CheckpointError(
            f"{shown(path)} holds more than tensors and plain values: it holds code: {code}",
            "--trust-checkpoint reads it all the same: it runs that code, so use it only for files "
            "of people whom you trust",
        )
    if isinstance(error, (ImportError, AttributeError)):
        return CheckpointError(f"{shown(path)} cannot be read: {_first_line(error)}")
    if not is_zipfile(path) and not path.read_bytes().startswith(_OLD_FORMAT):
        return DamagedError(f"{shown(path)} is no checkpoint, or no more than a part of one")
    return DamagedError(f"{shown(path)} is damaged ({_first_line(error)})")


def _code_in(path: Path, error: Exception) -> str:
    """Return the names of what a file would import, if that is why it was not read."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    with contextlib.suppress(Exception):
        return ", ".join(sorted(get_unsafe_globals_in_checkpoint(path)))
    # What torch wrote before 1.6 it cannot look into, but it told the first name.
    _, _, name = str(error).partition("Unsupported global: GLOBAL ")
    return name.split(" ")[0]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def source_of(hparams: Hparams, *, trust: bool = False, in_full: bool = False) -> Source | None:
    """Return the checkpoint that `hparams` ask for, verified; None when they ask for none.

    Args:
        hparams: Those of the experiment.
        trust: Whether the checkpoint may run code when it is read.
        in_full: Whether training goes on from it, which only one of the same experiment allows.

    Raises:
        CheckpointError: There is no such run or checkpoint, or it is of another experiment.
        DamagedError: It is damaged, and so is what there is to fall back to.
    """
    section = hparams.checkpoint
    if section.checkpoint_task_id is None:
        return None
    try:
        return find_source(
            section.checkpoint_task_id,
            section.checkpoint_name,
            project_root(hparams.path),
            trust=trust,
            experiment=hparams.path.parent.name if in_full else None,
        )
    except CheckpointError as error:
        where = f"{shown(hparams.path)}: checkpoint"
        raise type(error)(f"{where}: {error.message}", error.hint) from None


def find_source(
    wanted: str, name: str, root: Path, *, trust: bool = False, experiment: str | None = None
) -> Source:
    """Return a checkpoint, verified. For a damaged `last` of a run, `previous` is returned.

    A name means a run of the project, if it has one of that name, else one on ClearML. An id means
    a task: its run in the project serves as far as it has what the task has.

    Args:
        wanted: The name of a run, the id of a ClearML task or of a run, or the path of a file.
        name: The checkpoint's name, or the id of a ClearML model; not used for a path.
        root: The project.
        trust: Whether it may run code when it is read.
        experiment: The experiment that the run must be of; None for any.

    Raises:
        CheckpointError: There is no such run or checkpoint, it is of another experiment, or
            ClearML, which may have it, cannot be asked.
        DamagedError: It is damaged, and so is what there is to fall back to.
    """
    file = Path(wanted).expanduser()
    if file.is_file():
        return _verified(file.resolve(), _run_of(file.resolve()), trust)
    if file.suffix == ".ckpt" or len(file.parts) > 1:
        what = "a folder, and no checkpoint" if file.is_dir() else "no such file"
        raise CheckpointError(f"{wanted}: {what}")
    return _Search(wanted, name, root, trust, experiment).found()


@dataclass(frozen=True)
class _Search:
    """The search for a checkpoint of a run, here and on ClearML; see `find_source`."""

    wanted: str
    name: str
    root: Path
    trust: bool
    experiment: str | None

    def found(self) -> Source:
        """Return the checkpoint; errors are as in `find_source`."""
        try:
            run = find_run(artifacts_folder(self.root), self.wanted, having=self.name)
        except CheckpointError as missing:
            return self._elsewhere(missing)
        self._check_experiment(run.name, run.record.experiment)
        if is_id(self.wanted) or is_id(self.name):
            return self._of_task(run)
        return self._of_run(run)

    def _check_experiment(self, run: str, experiment: str | None) -> None:
        if self.experiment is not None and experiment not in (None, self.experiment):
            raise CheckpointError(
                f"run {run} is of the experiment {experiment}, and this is {self.experiment}",
                "set weights_only to True to start from its weights",
            )

    def _of_run(self, run: Run) -> Source:
        """Return the checkpoint in the folder of `run`."""
        name = self._name_in(run)
        candidates = [_LAST, _PREVIOUS] if name == _LAST else [name]
        if not any(run.checkpoint(candidate).is_file() for candidate in candidates):
            names = sorted(run.checkpoint_names())
            raise CheckpointError(
                f"run {run.name} has no checkpoint {name!r}{did_you_mean(name, names)}",
                f"it has: {', '.join(names) or 'none'}",
            )
        return _first_whole(run, candidates, self.trust)

    def _name_in(self, run: Run) -> str:
        """Return the checkpoint's name, which may be given by the id of its model."""
        models = Progress.of(run.folder).models
        return next((own for own, model in models.items() if model["id"] == self.name), self.name)

    def _elsewhere(self, missing: CheckpointError) -> Source:
        """Return the checkpoint of a run that the project has not; `missing` says so."""
        server, why = access().server()
        if server is None:
            raise CheckpointError(f"{missing.message} ({why})", missing.hint)
        return self._downloaded(server, find_remote(server, self.wanted, self.name))

    def _downloaded(self, server: Server, remote: Remote, run: Run | None = None) -> Source:
        self._check_experiment(remote.run, remote.experiment)
        path, digest = fetched(server, remote, self.root)
        return Source(path, run, digest, self.trust, remote)

    def _of_task(self, run: Run) -> Source:
        """Return the checkpoint of the task of `run`: the copy here, if it is the same."""
        task = run.record.clearml_task_id
        server, _ = access().server() if task else (None, "")
        if server is None or task is None:
            return self._of_run(run)
        try:
            remote = find_remote(server, task, self.name)
            return self._same_here(run, remote) or self._downloaded(server, remote, run)
        except CheckpointError as error:
            with contextlib.suppress(CheckpointError):
                found = self._of_run(run)
                log.info("%s; the copy here is taken", error.message)
                return found
            raise

    def _same_here(self, run: Run, remote: Remote) -> Source | None:
        """Return the copy in the run's folder that is what the server has, or is newer."""
        # `best` and `last` may be the same file.
        for name in sorted(run.checkpoint_names(), key=lambda name: (name != remote.name, name)):
            sidecar = run.sidecar(name) or {}
            if remote.sha256 is not None and sidecar.get("sha256") == remote.sha256:
                with contextlib.suppress(DamagedError):
                    found = _verified(run.checkpoint(name), run, self.trust)
                    return replace(found, remote=remote)
            step = sidecar.get("step")
            is_newer = isinstance(step, int) and remote.step is not None and step > remote.step
            if name == remote.name and is_newer:
                log.info("%s is newer here, at step %d, than on ClearML", remote, step)
                return self._of_run(run)
        return None


def note_child(source: Source, child: Run) -> None:
    """Add a line to `derived_models.log` in the folder of the run that `child` goes on from.

    It has, between tabs, the child's name, its folder, the time and the commit. Of a run that is
    not here there is no folder; one that cannot be written to costs a warning.
    """
    if source.run is None:
        return
    log_file = source.run.folder / _CHILDREN
    words = [child.name, str(child.folder), child.record.started, child.record.commit or "none"]
    line = "\t".join(words) + "\n"
    try:
        if not log_file.is_file() or line not in log_file.read_text(encoding="utf-8"):
            with log_file.open("a", encoding="utf-8") as file:
                file.write(line)
    except OSError as error:
        log.warning("%s cannot be written: %s", shown(log_file), error.strerror)


def whole_checkpoint(run: Run, name: str) -> Source:
    """Return the checkpoint `name` of `run`, verified.

    Raises:
        DamagedError: It is damaged or missing.
    """
    return _first_whole(run, [name], trust=False)


def resumable(run: Run, *, trust: bool = False) -> Source | None:
    """Return the checkpoint that `run` itself goes on from; None if it never wrote one.

    Raises:
        CheckpointError: It holds code, and is not trusted.
        DamagedError: The run has checkpoints, or had, and none is whole.
    """
    folder = run.checkpoints_folder
    candidates = [_LAST, _PREVIOUS]
    if any(run.checkpoint(name).is_file() for name in candidates):
        return _first_whole(run, candidates, trust)
    # A kill within the first write of all leaves its temporary file, or `best`, written before.
    if run.checkpoint("best").is_file():
        return _first_whole(run, [*candidates, "best"], trust)
    if not folder.exists() or any(folder.glob(_ANY_TEMPORARY)):
        return None
    raise DamagedError(
        f"run {run.name} has lost its checkpoints: neither last nor previous is in {shown(folder)}"
    )


def _first_whole(run: Run, names: list[str], trust: bool) -> Source:
    """Return the first checkpoint of `run` that is whole; a warning names those before it."""
    faults: list[str] = []
    for name in names:
        try:
            source = _verified(run.checkpoint(name), run, trust)
        except DamagedError as error:
            faults.append(error.message)
            continue
        if faults:
            step = (run.sidecar(name) or {}).get("step")
            at = "" if step is None else f", step {step}"
            log.warning("%s: %s is taken instead%s", "; ".join(faults), name, at)
        return source
    raise DamagedError("; ".join(faults))


def _run_of(file: Path) -> Run | None:
    return Run.read(file.parents[1]) if _is_of_run(file) else None


def _verified(path: Path, run: Run | None, trust: bool) -> Source:
    """Return the checkpoint at `path`, all of which is read once.

    Raises:
        CheckpointError: It has no sidecar, and holds code.
        DamagedError: It is damaged or missing.
    """
    where = f"{path.stem} of run {run.name}" if run else shown(path)
    if not path.is_file():
        raise DamagedError(f"{where} is missing")
    try:
        digest = sha256_of(path)
        fault = _fault(path, digest)
    except OSError as error:
        raise DamagedError(f"{where} cannot be read ({error.strerror})") from error
    if fault:
        raise DamagedError(f"{where} is damaged ({fault})")
    if digest not in _recorded_sha256s(path):
        _read(path, trusted=trust)
    return Source(path, run, digest, trust)


def _fault(path: Path, digest: str) -> str | None:
    """Return what is wrong with the bytes at `path`, whose sha256 is `digest`, if anything is."""
    recorded = _recorded_sha256s(path)
    if digest in recorded:
        return None
    if path.stat().st_size == 0:
        return "it is empty"
    if recorded and all(recorded):
        size, planned = path.stat().st_size, _recorded(_sidecar(path)).get("size")
        is_of_size = size == planned or not isinstance(planned, int)
        of = "sha256 is not that" if is_of_size else f"size is {size:,} bytes, not the {planned:,}"
        return f"its {of} in its sidecar"
    if _is_of_run(path):
        log.warning(
            "no sidecar tells the sha256 of %s: its own checksums are looked at", shown(path)
        )
    return _archive_fault(path) if is_zipfile(path) else None


def _recorded_sha256s(path: Path) -> list[str | None]:
    """Return what the sidecars of `path` say; None for one that is damaged itself.

    There are two, if a process was killed between the moves of a checkpoint and its sidecar.
    """
    sidecars = [_sidecar(path), _temporary(_sidecar(path))]
    return [_recorded(sidecar).get("sha256") for sidecar in sidecars if sidecar.is_file()]


def _archive_fault(path: Path) -> str | None:
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
    except (BadZipFile, OSError, EOFError, RuntimeError, zlib.error) as error:
        return _first_line(error)
    return f"the checksum of {damaged} in it is wrong" if damaged else None
