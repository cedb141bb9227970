"""When checkpoints are written, and under which names: `last`, `previous`, `best`."""

from __future__ import annotations

import enum
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn

from torch_lab.checkpoints import DESCRIPTION, AtomicCheckpointIO
from torch_lab.errors import NotWrittenError
from torch_lab.hparams import CheckpointSection
from torch_lab.recording import MetricsLogger
from torch_lab.runs import Run
from torch_lab.utils import shown

__all__ = ["CheckpointWriter", "Point"]

log = logging.getLogger(__name__)


class Point(enum.StrEnum):
    """A point of a training that a checkpoint can be exact at."""

    BATCH = "batch"
    """Before a batch: all of the one before it is done, validation and log lines included."""
    EPOCH = "epoch"
    """Before an epoch."""
    END = "end"
    """After the last epoch."""
    VALIDATION = "validation"
    """Before a validation, which goes on from its start."""


@dataclass(frozen=True)
class _Kept:
    """One of the best checkpoints."""

    name: str
    score: float
    step: int


class CheckpointWriter(Checkpoint):
    """Writes `last`, and those that are the best, at the points that `torch_lab.exact` finds.

    `last` is always the latest state, unlike that of Lightning's `ModelCheckpoint`, which leaves
    it behind while the monitored metric does not improve. A NaN is never the best.

    A checkpoint that cannot be written does not end the training: an error is logged, and the next
    point tries again, until `give_up_after` have failed in a row.

    Raises:
        NotWrittenError: So many have failed.
    """

    def __init__(
        self, run: Run, section: CheckpointSection, monitor: str, mode: str, logger: MetricsLogger
    ) -> None:
        self.run = run
        self.section = section
        self.monitor = monitor
        self.mode = mode
        self.logger = logger
        self.point: Point | None = None
        """Where training stands, while a checkpoint of ours is written."""
        self.marks: dict[str, int] = {}
        """How long the event files were at that point."""
        self._steps_at_write = 0
        self._written_at = time.monotonic()
        self._kept: list[_Kept] = []
        self._kept_on_disk: list[_Kept] = []
        self._due: _Kept | None = None
        self._old: dict[str, Any] = {}
        self._logged_by: str | None = None
        self._failures = 0
        self._failing_since: str | None = None
        self._failure = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count the minutes and steps to the first checkpoint."""
        self._rest(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the metrics of earlier epochs, which live on in the trainer."""
        self._old = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See whether this validation found the best."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._consider(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See whether this epoch was the best, if a training metric is monitored."""
        self._consider(trainer, "training")
        # Validations that are counted in batches may come after any epoch.
        epochs_to_first = trainer.check_val_every_n_epoch or math.inf
        if self._logged_by is None and trainer.current_epoch + 1 == epochs_to_first:
            log.warning("nothing has logged %s so far: there is no best", self.monitor)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `last`, after what the other callbacks have done at the end."""
        self.write(trainer, Point.END)
        if self._failures:
            # Nothing comes after it that could try again.
            raise self._not_written()

    @property
    def has_found_the_best(self) -> bool:
        """Whether the weights of now are among the best, and not written yet."""
        return self._due is not None

    def is_due_by_steps(self, trainer: pl.Trainer) -> bool:
        """Return whether the best was found, or enough steps were made; the same on all ranks."""
        if self.has_found_the_best:
            return True
        every = self.section.every_n_steps
        return every is not None and trainer.global_step - self._steps_at_write >= every

    def is_due_by_clock(self) -> bool:
        """Return whether as many minutes went by as may lie between two checkpoints."""
        every = self.section.every_minutes
        return every is not None and time.monotonic() - self._written_at >= 60 * every

    def write(self, trainer: pl.Trainer, point: Point) -> None:
        """Write a checkpoint of this `point`; all processes of the run call it."""
        failure = self._write(trainer, point)
        self._rest(trainer)
        if failure is None:
            self._has_written()
        else:
            self._has_failed(failure)

    def _write(self, trainer: pl.Trainer, point: Point) -> str | None:
        """Return why the checkpoint was not written, the same on all processes."""
        marks = self.logger.mark() if trainer.is_global_zero else {}
        if trainer.strategy.broadcast(marks is None):
            return "the metrics of the run cannot be written"
        self.marks = marks or {}
        self.point = point
        try:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        finally:
            self.point = None
        failure: str | None = None
        try:
            self._store(trainer, checkpoint)
        except OSError as error:
            failure = error.strerror or str(error)
        told: str | None = trainer.strategy.broadcast(failure)
        return told

    def _store(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Write the file; one of the best first, so that `last` never knows of one that is not."""
        last = self.run.checkpoint("last")
        files = trainer.strategy.checkpoint_io
        if self._due is None or not isinstance(files, AtomicCheckpointIO):
            trainer.strategy.save_checkpoint(checkpoint, last)
        if self._due is None:
            return
        target = self.run.checkpoint(self._due.name)
        trainer.strategy.save_checkpoint(checkpoint, target)
        if trainer.is_global_zero and isinstance(files, AtomicCheckpointIO):
            is_the_best = self._kept[0] == self._due
            if is_the_best and self._due.name != "best":
                files.link(target, self.run.checkpoint("best"))
            files.link(target, last)
            self._remove_others(files)

    def _remove_others(self, files: AtomicCheckpointIO) -> None:
        names = {kept.name for kept in self._kept}
        for path in self.run.checkpoints_folder.glob("best-*.ckpt"):
            if path.stem not in names:
                files.remove_checkpoint(path)

    def _rest(self, trainer: pl.Trainer) -> None:
        self._steps_at_write = trainer.global_step
        self._written_at = time.monotonic()

    def _has_written(self) -> None:
        if self._failures:
            log.info("checkpoints are written again")
        self._failures, self._failing_since, self._due = 0, None, None
        self._kept_on_disk = self._kept

    def _has_failed(self, failure: str) -> None:
        self._failures += 1
        self._failing_since = self._failing_since or datetime.now().strftime("%H:%M:%S")
        self._failure = failure
        what = (
            "checkpoint last was"
            if self._due is None
            else f"checkpoints last and {self._due.name} were"
        )
        # The next one will hold other weights than those that were the best.
        self._kept, self._due = self._kept_on_disk, None
        limit = self.section.give_up_after
        if self._failures >= limit:
            raise self._not_written()
        log.error(
            "%s not written: %s; none was since %s (%d of %d before the run stops)",
            *(what, failure, self._failing_since, self._failures, limit),
        )

    def _not_written(self) -> NotWrittenError:
        several = f"{self._failures} checkpoints in a row" if self._failures > 1 else "a checkpoint"
        return NotWrittenError(
            f"{several} could not be written since {self._failing_since}: {self._failure}",
            f"make room in {shown(self.run.folder)} or let it be written to, or raise "
            "checkpoint.give_up_after; the last good checkpoint stands",
        )

    def _consider(self, trainer: pl.Trainer, stage: str) -> None:
        """Keep the monitored value, fresh in `stage`, if it is among the best."""
        logged = trainer.callback_metrics.get(self.monitor)
        # Ranks whose values differ would disagree on whether to save, and wait for each other.
        score: float | None = trainer.strategy.broadcast(None if logged is None else float(logged))
        if score is None:
            return
        # Elsewhere the value is an old one, of weights that have changed since.
        self._logged_by = self._logged_by or stage
        if self._logged_by == stage and math.isfinite(score):
            self._rank(score, trainer.global_step)

    def _rank(self, score: float, step: int) -> None:
        """Add a checkpoint to the best ones, if it is one; of equal ones the earlier is better."""
        name = "best" if self.section.keep == 1 else f"best-{step}"
        new = _Kept(name, score, step)
        sign = 1 if self.mode == "min" else -1
        others = [kept for kept in self._kept if kept.name != name or name == "best"]
        ranked = sorted([*others, new], key=lambda kept: sign * kept.score)
        self._kept = ranked[: self.section.keep]
        if new in self._kept:
            self._due = new

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what the sidecar will say."""
        fresh = self._fresh(trainer.callback_metrics)
        metrics = {name: _finite(value) for name, value in fresh.items()}
        checkpoint[DESCRIPTION] = {
            "run": self.run.name,
            "run_id": self.run.record.id,
            "monitor": self.monitor,
            "score": metrics.get(self.monitor),
            "metrics": metrics,
        }

    def _fresh(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in metrics.items() if self._old.get(name) is not value}

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {
            "run_id": self.run.record.id,
            "kept": [asdict(kept) for kept in self._kept],
            "logged_by": self._logged_by,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; another run has no `best` file yet, so its scores start anew."""
        self._logged_by = state_dict["logged_by"]
        if state_dict.get("run_id") == self.run.record.id:
            self._kept = self._kept_on_disk = [_Kept(**kept) for kept in state_dict["kept"]]

    def forget_old_metrics(self, restored: Mapping[str, Any], fresh: list[str]) -> None:
        """Take all but the `fresh` ones of the `restored` metrics for those of earlier epochs."""
        self._old = {name: value for name, value in restored.items() if name not in fresh}

    def fresh_names(self, trainer: pl.Trainer) -> list[str]:
        """Return the names of the metrics that this epoch has logged."""
        return list(self._fresh(trainer.callback_metrics))


def _finite(value: Any) -> float | None:
    """Return `value` as a number, or None where JSON has no word for it."""
    number = float(value)
    return number if math.isfinite(number) else None
