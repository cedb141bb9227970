"""When checkpoints are written, and under which names: `last`, `previous`, `best`."""

from __future__ import annotations

import enum
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only

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


@dataclass(frozen=True)
class _Order:
    """What a checkpoint is to be: `last` in any case."""

    due: _Kept | None
    """One of the best as well, if it is one."""
    kept: list[_Kept]
    """The best ones that are to stay."""

    @property
    def told(self) -> str:
        if self.due is None:
            return "checkpoint last was"
        return f"checkpoints last and {self.due.name} were"


class _Begun:
    """A checkpoint that a thread writes.

    The thread outlives all but a kill: the interpreter waits for it at its end.
    """

    def __init__(self, order: _Order, write: Callable[[], None] | None = None) -> None:
        self.order = order
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if write is not None:  # On one process of several.
            self._thread = threading.Thread(target=self._run, args=[write], name="checkpoint")
            self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def outcome(self) -> BaseException | None:
        """Return what went wrong, once it is over."""
        if self._thread is not None:
            self._thread.join()
        return self._error


class CheckpointWriter(Checkpoint):
    """Writes `last`, and those that are the best, at the points that `torch_lab.exact` finds.

    `last` is always the latest state, unlike that of Lightning's `ModelCheckpoint`, which leaves
    it behind while the monitored metric does not improve. A NaN is never the best.

    A checkpoint that cannot be written does not end the training: an error is logged, and the next
    point tries again, until `give_up_after` have failed in a row.

    With `async` in the hparams it is copied at its point, and written by a thread while training
    goes on. There is one at a time: the next waits until it is on the disk. To drop one of the two
    would lose a best one, and to keep both would take the memory of a third state of the training.
    What became of it is known, and told, at the next point that writes.

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
        self._latest: _Kept | None = None
        self._old: dict[str, Any] = {}
        self._logged_by: str | None = None
        self._failures = 0
        self._failing_since: str | None = None
        self._failure = ""
        self._begun: _Begun | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count the minutes and steps to the first checkpoint."""
        self._rest(trainer)
        if self.section.in_background and (why := _why_it_waits(trainer)):
            log.warning("checkpoint.async: training waits for checkpoints all the same: %s", why)

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
        self.write(trainer, Point.END, is_last=True)
        if self._failures:
            # Nothing comes after it that could try again.
            raise self._not_written()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Wait for what is being written: there is no next point that would tell of it."""
        self.wait()

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

    def write(self, trainer: pl.Trainer, point: Point, *, is_last: bool = False) -> None:
        """Write a checkpoint of this `point`; all processes of the run call it.

        Args:
            trainer: What trains.
            point: Where it stands.
            is_last: Whether the run ends here, so that the file must be there at the return.
        """
        self._settle(trainer)
        order = _Order(self._due, self._kept)
        waits = is_last or not self.section.in_background or bool(_why_it_waits(trainer))
        failure = self._write(trainer, point, order, waits=waits)
        self._due = None
        self._rest(trainer)
        if failure is not None:
            self._has_failed(failure, order)
        elif waits:
            self._has_written(order)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written meanwhile, if one is, and tell of it."""
        begun, self._begun = self._begun, None
        if begun is not None and (error := begun.outcome()) is not None:
            log.error("%s not written: %s", begun.order.told, _reason(error))

    def _settle(self, trainer: pl.Trainer) -> None:
        """Wait for the checkpoint that is being written meanwhile, and see what became of it."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        error = begun.outcome()
        if error is not None and not isinstance(error, OSError):
            raise error
        failure = trainer.strategy.broadcast(None if error is None else _reason(error))
        if failure is None:
            self._has_written(begun.order)
            return
        self._has_failed(failure, begun.order)
        # A score that was no match for what could not be written may be one for what is there.
        due = begun.order.due
        if self._latest and self._latest.step == trainer.global_step and due != self._latest:
            self._rank(self._latest.score, self._latest.step)

    def _write(
        self, trainer: pl.Trainer, point: Point, order: _Order, *, waits: bool
    ) -> str | None:
        """Return why the checkpoint was not written, or begun, the same on all processes."""
        marks = self.logger.mark() if trainer.is_global_zero else {}
        if trainer.strategy.broadcast(marks is None):
            return "the metrics of the run cannot be written"
        self.marks = marks or {}
        self.point = point
        try:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        finally:
            self.point = None
        if not waits:
            self._begin(trainer, checkpoint, order)
            return None
        failure: str | None = None
        try:
            save = functools.partial(trainer.strategy.save_checkpoint, checkpoint)
            self._store(trainer, save, order)
        except OSError as error:
            failure = _reason(error)
        told: str | None = trainer.strategy.broadcast(failure)
        return told

    def _begin(self, trainer: pl.Trainer, checkpoint: dict[str, Any], order: _Order) -> None:
        """Copy a checkpoint, and have a thread write it on the process of rank zero."""
        write = None
        if trainer.is_global_zero and (files := _own_files(trainer)):
            save = functools.partial(files.save_plain, files.snapshot(checkpoint))
            write = functools.partial(self._store, trainer, save, order)
        self._begun = _Begun(order, write)

    def _store(self, trainer: pl.Trainer, save: Callable[[Path], None], order: _Order) -> None:
        """Write the file; one of the best first, so that `last` never knows of one that is not."""
        last = self.run.checkpoint("last")
        files = _own_files(trainer)
        if order.due is None or files is None:
            save(last)
        if order.due is None:
            return
        target = self.run.checkpoint(order.due.name)
        save(target)
        if trainer.is_global_zero and files is not None:
            is_the_best = order.kept[0] == order.due
            if is_the_best and order.due.name != "best":
                files.link(target, self.run.checkpoint("best"))
            files.link(target, last)
            self._remove_others(files, order)

    def _remove_others(self, files: AtomicCheckpointIO, order: _Order) -> None:
        names = {kept.name for kept in order.kept}
        for path in self.run.checkpoints_folder.glob("best-*.ckpt"):
            if path.stem not in names:
                files.remove_checkpoint(path)

    def _rest(self, trainer: pl.Trainer) -> None:
        self._steps_at_write = trainer.global_step
        self._written_at = time.monotonic()

    def _has_written(self, order: _Order) -> None:
        if self._failures:
            log.info("checkpoints are written again")
        self._failures, self._failing_since = 0, None
        self._kept_on_disk = order.kept

    def _has_failed(self, failure: str, order: _Order) -> None:
        self._failures += 1
        self._failing_since = self._failing_since or datetime.now().strftime("%H:%M:%S")
        self._failure = failure
        # The next one will hold other weights than those that were the best.
        self._kept = self._kept_on_disk
        self._due = None
        limit = self.section.give_up_after
        if self._failures >= limit:
            raise self._not_written()
        # All processes know it, and errors are shown of all.
        rank_zero_only(log.error)(
            "%s not written: %s; none was since %s (%d of %d before the run stops)",
            *(order.told, failure, self._failing_since, self._failures, limit),
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
        new = self._latest = _Kept(name, score, step)
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


def _own_files(trainer: pl.Trainer) -> AtomicCheckpointIO | None:
    """Return what writes checkpoints, unless it is somebody else's."""
    files = trainer.strategy.checkpoint_io
    return files if isinstance(files, AtomicCheckpointIO) else None


def _why_it_waits(trainer: pl.Trainer) -> str:
    """Return why a training cannot go on while a checkpoint is written; empty if it can."""
    strategy = trainer.strategy
    if _own_files(trainer) is None:
        return f"{type(strategy.checkpoint_io).__name__} writes them"
    if type(strategy).save_checkpoint is not Strategy.save_checkpoint:
        return f"with {type(strategy).__name__} all processes write them together"
    return ""


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _finite(value: Any) -> float | None:
    """Return `value` as a number, or None where JSON has no word for it."""
    number = float(value)
    return number if math.isfinite(number) else None
