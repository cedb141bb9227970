"""Checkpoints: where weights come from, and where they go.

A checkpoint `last.ckpt` has a sidecar `last.json` that says what it is: its sha256 and size, the
run, step and epoch it was written at, and the metrics then. A checkpoint is never half written
under its own name, and never read without a look at its sha256.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn

from torch_lab.errors import CheckpointError, did_you_mean
from torch_lab.files import beside, publish, sync
from torch_lab.hparams import Hparams
from torch_lab.runs import Run, artifacts_folder, find_run, project_root
from torch_lab.utils import shown

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointWriter",
    "Source",
    "check_fits",
    "load_source",
    "load_weights",
    "loaded_from",
    "source_of",
]

log = logging.getLogger(__name__)

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
        torch.save(checkpoint, temporary)
        description = json.dumps(_description(checkpoint, temporary), indent=2, allow_nan=False)
        _temporary(sidecar).write_text(description + "\n", encoding="utf-8")
        # The new sidecar is safe on disk before the checkpoint moves: whatever is killed between
        # the two moves leaves a checkpoint that one of two sidecars describes.
        sync(_temporary(sidecar))
        publish(temporary, target)
        publish(_temporary(sidecar), sidecar)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint at `path` and its sidecar."""
        super().remove_checkpoint(path)
        _sidecar(Path(path)).unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Return a name beside `path`, always the same, so that killed writers pile up nothing."""
    return beside(path, "new")


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


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
        self._old: dict[str, Any] = {}
        self._logged_by: str | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the metrics of earlier epochs, which live on in the trainer."""
        self._old = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `best`, if this validation says so."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._consider(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `best`, if a training metric is monitored and says so, and `last`."""
        self._consider(trainer, "training")
        if self._logged_by is None and trainer.current_epoch == 0:
            log.warning("nothing logged %s in the first epoch: there is no best", self.monitor)
        self._save(trainer, "last")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `last`, if training ended within an epoch."""
        if trainer.global_step != self._last_step:
            self._save(trainer, "last")

    def _consider(self, trainer: pl.Trainer, stage: str) -> None:
        """Write `best` if the monitored value, fresh in `stage`, is the best so far."""
        logged = trainer.callback_metrics.get(self.monitor)
        # Ranks whose values differ would disagree on whether to save, and wait for each other.
        score: float | None = trainer.strategy.broadcast(None if logged is None else float(logged))
        if score is None:
            return
        # Elsewhere the value is an old one, of weights that have changed since.
        self._logged_by = self._logged_by or stage
        if self._logged_by == stage and self._is_better(score):
            self.best_score = score
            self._save(trainer, "best")

    def _is_better(self, score: float) -> bool:
        if not math.isfinite(score):
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
        logged = trainer.callback_metrics.items()
        fresh = {name: value for name, value in logged if self._old.get(name) is not value}
        metrics = {name: _finite(value) for name, value in fresh.items()}
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


def _finite(value: Any) -> float | None:
    """Return `value` as a number, or None where JSON has no word for it."""
    number = float(value)
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, verified, to take weights from or to go on from."""

    path: Path
    run: Run | None
    """The run that wrote it; None for a file that lies elsewhere."""
    sha256: str

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
            "sha256": self.sha256,
        }

    def load(self) -> dict[str, Any]:
        """Return what the checkpoint holds, on the CPU.

        Raises:
            CheckpointError: It cannot be read with `weights_only=True`.
        """
        try:
            # What torch wrote before 1.6 is no archive, and cannot be mapped into memory.
            found = torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=is_zipfile(self.path)
            )
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
            hparams.checkpoint.checkpoint_task_id,
            hparams.checkpoint.checkpoint_name,
            project_root(hparams.path),
        )
    except CheckpointError as error:
        where = f"{shown(hparams.path)}: checkpoint"
        raise CheckpointError(f"{where}: {error.message}", error.hint) from None


def _found(wanted: str, name: str, root: Path) -> Source:
    """Return the checkpoint `name` of the run `wanted` in the project at `root`, or the file."""
    file = Path(wanted).expanduser()
    if file.is_file():
        return _verified(file.resolve(), _run_of(file.resolve()))
    if file.suffix == ".ckpt" or len(file.parts) > 1:
        raise CheckpointError(f"{wanted}: no such file")
    run = find_run(artifacts_folder(root), wanted, having=name)
    path = run.checkpoint(name)
    if not path.is_file():
        names = sorted(item.stem for item in run.checkpoints_folder.glob("[!.]*.ckpt"))
        raise CheckpointError(
            f"run {run.name} has no checkpoint {name!r}{did_you_mean(name, names)}",
            f"it has: {', '.join(names) or 'none'}",
        )
    return _verified(path, run)


def _run_of(file: Path) -> Run | None:
    folder = file.parent.parent
    return Run.read(folder) if (folder / "run.json").is_file() else None


def _verified(path: Path, run: Run | None) -> Source:
    sidecars = [_sidecar(path), _temporary(_sidecar(path))]
    recorded = {json.loads(text)["sha256"] for text in map(_text_of, sidecars) if text}
    found = _sha256(path)
    if recorded and found not in recorded:
        raise CheckpointError(f"{shown(path)} is damaged: its sha256 is not that in its sidecar")
    return Source(path, run, found)


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
        root: The project whose runs are meant; if not given, that of the script that is running
            (in `infer_config`, say), or else of the working directory.

    Raises:
        CheckpointError: There is no such run or checkpoint, it is damaged, or it does not fit.
    """
    project = project_root() if root is None else Path(root).expanduser().resolve()
    load_source(module, _found(str(run), name.removesuffix(".ckpt"), project))
    return module


def load_source(module: torch.nn.Module, source: Source) -> None:
    """Load the weights at `source` into `module` or its model, whichever has their names.

    Raises:
        CheckpointError: It is damaged, or does not fit.
    """
    target, state = _fitting(module, source)
    target.load_state_dict(state)
    # Told by `loaded_from`; an attribute, as a model has nowhere else to keep it.
    vars(target)["_weights_from"] = str(source)


def check_fits(module: torch.nn.Module, source: Source) -> None:
    """Check that the weights at `source` are those of `module` or its model.

    Raises:
        CheckpointError: It is damaged, or does not fit.
    """
    _fitting(module, source)


def _fitting(module: torch.nn.Module, source: Source) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return the part of `module` that the weights at `source` belong to, and the weights."""
    found = source.load()
    state = found.get("state_dict", found)
    target = _target(module, state)
    own = target.state_dict()
    _check_names(source, set(own), set(state))
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"{source} does not fit: {name} has the shape {shapes}")
    return target, state


def _target(module: torch.nn.Module, state: Mapping[str, Any]) -> torch.nn.Module:
    """Return `module`, or its `model`: the one whose names are more like those in `state`."""
    module, inner = _uncompiled(module), _uncompiled(getattr(module, "model", None))
    if not isinstance(inner, torch.nn.Module):
        return module
    common = [len(set(candidate.state_dict()) & set(state)) for candidate in (module, inner)]
    return module if common[0] >= common[1] else inner


def _uncompiled(module: Any) -> Any:
    """Return what `torch.compile` was given, whose names have no prefix."""
    return getattr(module, "_orig_mod", module)


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
