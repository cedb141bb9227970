"""Checkpoints: where weights come from, and where they go.

A checkpoint `last.ckpt` has a sidecar `last.json` that says what it is: its sha256 and size, the
run, step and epoch it was written at, and the metrics then. A checkpoint is never half written
under its own name, and never read without a look at its sha256.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn

from torch_lab.errors import CheckpointError, did_you_mean
from torch_lab.hparams import Hparams
from torch_lab.runs import Run, artifacts_folder, find_run, project_root
from torch_lab.utils import shown

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointWriter",
    "Source",
    "load_source",
    "load_weights",
    "loaded_from",
    "source_of",
]

_OURS = "torch_lab"
"""The key under which a checkpoint holds what its sidecar will say."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place, then moves it there, and its sidecar after it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`, which always holds the old one or the new one, whole."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, sidecar = _temporary(target), _sidecar(target)
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        # The new sidecar is complete on disk before the checkpoint moves: whatever is killed
        # between the two moves leaves a checkpoint that one of two sidecars describes.
        described = json.dumps(_description(checkpoint, temporary), indent=2)
        with _temporary(sidecar).open("w", encoding="utf-8") as text:
            text.write(described + "\n")
            text.flush()
            os.fsync(text.fileno())
        temporary.replace(target)
        _temporary(sidecar).replace(sidecar)
        _sync_folder(target.parent)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint at `path` and its sidecar."""
        super().remove_checkpoint(path)
        _sidecar(Path(path)).unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Return a name beside `path`, always the same, so that killed writers pile up nothing."""
    return path.with_name(f".{path.name}.tmp")


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _description(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return {
        "sha256": _sha256(path),
        "size": path.stat().st_size,
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        **checkpoint.get(_OURS, {}),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointWriter(Checkpoint):
    """Writes `last` at the end of every epoch and of training, and `best` whenever it is the best.

    `last` is always the latest state, unlike that of Lightning's `ModelCheckpoint`, which leaves
    it behind while the monitored metric does not improve. A NaN is never the best.
    """

    def __init__(self, run: Run, monitor: str, mode: str) -> None:
        self.run = run
        self.monitor = monitor
        self.mode = mode
        self.best_score: float | None = None
        self._last_step = -1
        self._logged_by: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the other ranks which folder rank zero reserved."""
        self.run.folder = Path(trainer.strategy.broadcast(str(self.run.folder)))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `best`, if this validation says so."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._consider(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `best`, if a training metric is monitored and says so, and `last`."""
        self._consider(trainer, "training")
        self._save(trainer, "last")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `last`, if training ended within an epoch."""
        if trainer.global_step != self._last_step:
            self._save(trainer, "last")

    def _consider(self, trainer: pl.Trainer, stage: str) -> None:
        """Write `best` if the monitored value, fresh in `stage`, is the best so far."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            return
        # Elsewhere the value is an old one, of weights that have changed since.
        self._logged_by = self._logged_by or stage
        score = float(value)
        if self._logged_by == stage and self._is_better(score):
            self.best_score = score
            self._save(trainer, "best")

    def _is_better(self, score: float) -> bool:
        if math.isnan(score):
            return False
        if self.best_score is None:
            return True
        return score < self.best_score if self.mode == "min" else score > self.best_score

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        if name == "last":
            self._last_step = trainer.global_step
        trainer.save_checkpoint(self.run.checkpoint(name))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the sidecar will say."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint[_OURS] = {
            "run": self.run.name,
            "run_id": self.run.record.id,
            "monitor": self.monitor,
            "score": metrics.get(self.monitor),
            "metrics": metrics,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {"best_score": self.best_score, "logged_by": self._logged_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; a new run has no `best` file yet, so its scores start anew."""
        self._logged_by = state_dict["logged_by"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, verified, to take weights from or to go on from."""

    path: Path
    run: Run | None
    """The run that wrote it; None for a file that lies elsewhere."""

    def __str__(self) -> str:
        return f"{self.path.stem} of {self.run.name}" if self.run else shown(self.path)

    def parent(self) -> dict[str, Any]:
        """Return what a run that goes on from here records as its parent."""
        run = self.run.record if self.run else None
        return {
            "run": run.name if run else None,
            "id": run.id if run else None,
            "checkpoint": self.path.stem,
            "path": str(self.path),
            "sha256": _sha256(self.path),
        }

    def load(self) -> dict[str, Any]:
        """Return what the checkpoint holds, on the CPU.

        Raises:
            CheckpointError: It cannot be read with `weights_only=True`.
        """
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{shown(self.path)} holds more than tensors and plain values",
                f"torch says: {str(error).strip().splitlines()[0]}",
            ) from error
        except (OSError, EOFError, RuntimeError) as error:
            raise CheckpointError(f"{shown(self.path)} is damaged: {_first_line(error)}") from error
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{shown(self.path)} holds a {type(found).__name__}, no checkpoint"
            )
        return found

    def check_resumable(self, hparams_init: Mapping[str, Any]) -> None:
        """Check that training can go on from here.

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
        done = found["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        planned = hparams_init.get("max_epochs")
        if planned is not None and 0 <= planned <= done:
            raise CheckpointError(
                f"{self} has trained {done} epochs, and trainer.init.max_epochs is {planned}",
                "raise max_epochs: it counts from the start of the run that is gone on from",
            )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def source_of(hparams: Hparams) -> Source | None:
    """Return the checkpoint that `hparams` ask for, verified; None when they ask for none.

    Raises:
        CheckpointError: There is no such run or checkpoint, or it is damaged.
    """
    if hparams.checkpoint.checkpoint_task_id is None:
        return None
    try:
        return _found(
            hparams.checkpoint.checkpoint_task_id, hparams.checkpoint.checkpoint_name, hparams.path
        )
    except CheckpointError as error:
        where = f"{shown(hparams.path)}: checkpoint"
        raise CheckpointError(f"{where}: {error.message}", error.hint) from None


def _found(wanted: str, name: str, start: Path) -> Source:
    """Return the checkpoint `name` of the run `wanted` in the project of `start`, or the file."""
    file = Path(wanted).expanduser()
    if file.is_file():
        return _verified(Source(file.resolve(), _run_of(file.resolve())))
    if file.suffix == ".ckpt" or len(file.parts) > 1:
        raise CheckpointError(f"{wanted}: no such file")
    run = find_run(artifacts_folder(project_root(start)), wanted, having=name)
    path = run.checkpoint(name)
    if not path.is_file():
        names = sorted(item.stem for item in run.checkpoints_folder.glob("[!.]*.ckpt"))
        raise CheckpointError(
            f"run {run.name} has no checkpoint {name!r}{did_you_mean(name, names)}",
            f"it has: {', '.join(names) or 'none'}",
        )
    return _verified(Source(path, run))


def _run_of(file: Path) -> Run | None:
    folder = file.parent.parent
    return Run.read(folder) if (folder / "run.json").is_file() else None


def _verified(source: Source) -> Source:
    sidecars = [_sidecar(source.path), _temporary(_sidecar(source.path))]
    recorded = {json.loads(text)["sha256"] for text in map(_text_of, sidecars) if text}
    if recorded and _sha256(source.path) not in recorded:
        raise CheckpointError(
            f"{shown(source.path)} is damaged: its sha256 is not the one in its sidecar"
        )
    return source


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def load_weights(
    module: torch.nn.Module, run: str | Path, name: str = "last", root: str | Path | None = None
) -> torch.nn.Module:
    """Load weights into `module` from a run's checkpoint, and return it.

    Args:
        module: A `LightningModule`, or the bare model; whichever has the checkpoint's names.
        run: A run's name, with its version or without for the newest; a ClearML task id; or the
            path of a checkpoint file.
        name: The checkpoint's name, with or without `.ckpt`; not used for a path.
        root: A path in the project whose runs are meant; the working directory if not given.

    Raises:
        CheckpointError: There is no such run or checkpoint, it is damaged, or it does not fit.
    """
    start = Path(root or Path.cwd()).resolve()
    load_source(module, _found(str(run), name.removesuffix(".ckpt"), start))
    return module


def load_source(module: torch.nn.Module, source: Source) -> None:
    """Load the weights at `source` into `module` or its model, whichever has their names.

    Raises:
        CheckpointError: It is damaged, or does not fit.
    """
    found = source.load()
    state = found.get("state_dict", found)
    target = _target(module, state)
    own = target.state_dict()
    _check_names(source, set(own), set(state))
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"{source} does not fit: {name} has the shape {shapes}")
    target.load_state_dict(state)
    # Told by `loaded_from`; an attribute, as a model has nowhere else to keep it.
    vars(target)["_weights_from"] = str(source)


def _target(module: torch.nn.Module, state: Mapping[str, Any]) -> torch.nn.Module:
    """Return `module`, or its `model`: the one whose names are more like those in `state`."""
    inner = getattr(module, "model", None)
    if not isinstance(inner, torch.nn.Module):
        return module
    common = [len(set(candidate.state_dict()) & set(state)) for candidate in (module, inner)]
    return module if common[0] >= common[1] else inner


def _check_names(source: Source, own: set[str], given: set[str]) -> None:
    if own == given:
        return
    missing, foreign = sorted(own - given), sorted(given - own)
    parts = []
    if missing:
        parts.append(f"it lacks {', '.join(missing[:3])}{_more(missing)}")
    if foreign:
        parts.append(f"it has {', '.join(foreign[:3])}{_more(foreign)}, which the model has not")
    raise CheckpointError(f"{source} does not fit the model: {'; '.join(parts)}")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def loaded_from(module: torch.nn.Module) -> str | None:
    """Return where the weights of `module`, or of a part of it, were loaded from, if they were."""
    found = (vars(part).get("_weights_from") for part in module.modules())
    return next((str(place) for place in found if place), None)
