"""Progress of a run: one live line while it goes, one kept line for what is done."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import pytorch_lightning as pl
import torch
from torch import Tensor

from torch_lab.callbacks.cell import COLUMNS, CellLine
from torch_lab.callbacks.waiting import waits_for

__all__ = ["BAR_CELLS", "EpochProgress", "bar"]

REDRAW_SECONDS = 0.1
MEMORY_SECONDS = 3.0
BAR_CELLS = 30
NARROWEST_BAR = 8
ERASE_LINE = "\r\x1b[2K"


class EpochProgress(pl.callbacks.ProgressBar):
    """One live line while a loop runs, and one kept line per epoch, on the standard error.

    ```
    baseline  loss/validate 2.3100  accuracy/validate 0.1020
    epoch  1/10  step 94  1.2 s  loss/train 0.5310  loss/validate 0.2120  accuracy/validate 0.9410
    epoch  2/10  ━━━━━━━━━━━━━━━━────────────  53/94  81.2 steps/s  0:01 left  loss 0.198
    ```

    The live line is drawn on a terminal, and in a notebook above the kept ones; elsewhere there are
    plain lines and no control characters. `loss/train` is the mean over the epoch's steps, of rank
    zero alone, and costs no synchronisation with the device per step: of a loss on a GPU, the live
    line shows the mean as of the last step that the trainer has logged. The other values are what
    the module logged in the epoch. Only rank zero writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._is_rank_zero = True
        self._line = _LiveLine()
        self._train_pace = _Pace()
        self._eval_pace = _Pace()
        self._loss = _RunningMean()
        self._shown_loss: float | None = None
        self._seen: Mapping[str, Tensor] = {}
        self._finished: _Epoch | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The trainer sets itself again; with it every pickle would hold the model and the data.
        return {**vars(self), "_trainer": None, "_seen": {}}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer
        self._is_rank_zero = trainer.is_global_zero

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._line.clear()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._line.clear()
        # Reading metrics may wait for other ranks, which after an exception may never come.
        if trainer.world_size == 1:
            self._keep_finished_epoch(trainer)

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False
        self._line.clear()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print like the built-in, above the live line."""
        self._line.clear()
        print(*args, **kwargs)

    @property
    def is_enabled(self) -> bool:
        """Whether this process shows its progress."""
        return self._enabled and self._is_rank_zero

    # Training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that resumes inside an epoch starts no epoch.
        self._start_epoch(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_finished_epoch(trainer)
        self._start_epoch(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self.is_enabled:
            return
        self._loss.add(outputs)
        self._train_pace.done = batch_idx + 1
        self._take_loss(trainer)
        if self._line.is_due():
            loss = self._shown_loss if self._loss.takes_waiting else self._train_loss(trainer)
            self._line.draw(
                [_epoch_name(trainer)],
                self._train_pace,
                _steps_in_epoch(trainer, self._train_pace.done),
                "steps",
                [] if loss is None else [f"loss {_number(loss)}"],
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line.clear()
        # The module logs its epoch's metrics after this hook, so the line is written later.
        self._finished = self._epoch_so_far(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_finished_epoch(trainer)

    def _start_epoch(self, trainer: pl.Trainer) -> None:
        self._train_pace = _Pace()
        self._loss = _RunningMean()
        self._shown_loss = None
        self._seen = dict(trainer.callback_metrics)

    def _epoch_so_far(self, trainer: pl.Trainer) -> _Epoch:
        return _Epoch(
            _epoch_name(trainer),
            trainer.global_step,
            time.monotonic() - self._train_pace.started,
            self._train_loss(trainer),
        )

    def _take_loss(self, trainer: pl.Trainer) -> None:
        """Take a loss from its device to be shown, where others wait for that anyway."""
        is_waited_for = self._loss.takes_waiting and trainer._logger_connector.should_update_logs
        if is_waited_for and self._line.is_possible:
            self._shown_loss = self._train_loss(trainer)

    def _train_loss(self, trainer: pl.Trainer) -> float | None:
        mean = self._loss.value()
        module = trainer.lightning_module
        if mean is None or not module.automatic_optimization:
            return mean
        # Lightning hands out the loss divided by the number of batches that it accumulates.
        return mean * trainer.accumulate_grad_batches

    def _keep_finished_epoch(self, trainer: pl.Trainer) -> None:
        if self._finished is not None:
            self._keep_epoch(trainer, self._finished)
            self._finished = None

    def _keep_epoch(self, trainer: pl.Trainer, epoch: _Epoch) -> None:
        if not self.is_enabled:
            return
        # Metrics live on in the trainer: only those of this epoch belong on its line.
        logged = trainer.callback_metrics.items()
        values = _scalars({k: v for k, v in logged if self._seen.get(k) is not v})
        if epoch.loss is not None:
            values.pop("loss/train", None)
            values = {"loss/train": epoch.loss, **values}
        heading = [epoch.name, f"step {epoch.step}", _duration(epoch.seconds)]
        self._line.keep(heading + _phrases(values))

    # Validation, test and prediction

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._eval_pace = _Pace()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        batches = (
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        )
        self._advance(_validation_name(trainer), batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line.clear()
        self._train_pace.resume()
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "validate":
            self._keep_evaluation(trainer, _validation_name(trainer))
        elif not (trainer.is_last_batch or trainer.should_stop):
            self._keep_epoch(trainer, self._epoch_so_far(trainer))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._eval_pace = _Pace()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance(["test"], trainer.num_test_batches)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_evaluation(trainer, ["test"])

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._eval_pace = _Pace()

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance(["predict"], trainer.num_predict_batches)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_enabled:
            seconds = time.monotonic() - self._eval_pace.started
            self._line.keep(["predict", f"{self._eval_pace.done} batches", _duration(seconds)])

    def _advance(self, name: Sequence[str], batches: Sequence[int | float]) -> None:
        self._eval_pace.done += 1
        if self.is_enabled and self._line.is_due():
            self._line.draw(name, self._eval_pace, sum(batches), "batches")

    def _keep_evaluation(self, trainer: pl.Trainer, name: Sequence[str]) -> None:
        if self.is_enabled:
            values = _scalars(trainer.callback_metrics)
            # A baseline may be that of a run that goes on: Lightning does not know its step yet.
            step = [f"step {trainer.global_step}"] if trainer.global_step else []
            self._line.keep([*name, *step, *_phrases(values)])


@dataclass(frozen=True)
class _Epoch:
    """What the line of an epoch begins with."""

    name: str
    step: int
    seconds: float
    loss: float | None


class _RunningMean:
    """The mean of the losses so far, summed where they lie, so that adding waits for no device."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_sum": None, "_count": 0}

    def add(self, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not isinstance(loss, Tensor):
            return
        if self._sum is None:
            self._sum = torch.zeros((), device=loss.device)
        self._sum += loss.detach() if loss.ndim == 0 else loss.detach().mean()
        self._count += 1

    @property
    def takes_waiting(self) -> bool:
        """Whether to ask for the value waits for the device that it is on."""
        return self._sum is not None and waits_for(self._sum.device)

    def value(self) -> float | None:
        return None if self._sum is None else self._sum.item() / self._count


class _Pace:
    """How many batches are done, and how fast they passed in the last seconds."""

    def __init__(self) -> None:
        self.done = 0
        self.started = time.monotonic()
        self._rate = 0.0
        self._mark = (0, self.started)

    def resume(self) -> None:
        """Leave the time since the last batch out of the rate."""
        self._mark = (self.done, time.monotonic())

    def rate(self) -> float:
        """Return batches per second, smoothed over some seconds."""
        done, then = self._mark
        now = time.monotonic()
        if self.done > done and now > then:
            latest = (self.done - done) / (now - then)
            weight = 1 - math.exp((then - now) / MEMORY_SECONDS) if self._rate else 1.0
            self._rate += weight * (latest - self._rate)
            self._mark = (self.done, now)
        return self._rate


class _LiveLine:
    """The last line of the terminal, drawn over and over, with kept lines above it.

    In a notebook it stands where it was drawn first, with kept lines below it.
    """

    def __init__(self) -> None:
        self._drawn_at = -math.inf
        self._is_drawn = False
        self._cell = CellLine()

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._drawn_at < REDRAW_SECONDS:
            return False
        self._drawn_at = now
        return self.is_possible

    @property
    def is_possible(self) -> bool:
        """Whether there is a place for it: a terminal, or a notebook."""
        return _is_terminal(sys.stderr) or self._cell.is_possible

    def draw(
        self,
        name: Sequence[str],
        pace: _Pace,
        total: float,
        unit: str,
        values: Sequence[str] = (),
    ) -> None:
        """Draw name, bar, count, rate, time left and values, as far as the terminal is wide."""
        stream = sys.stderr
        rate = pace.rate()
        words = [_count(pace.done, total)]
        if rate:
            words.append(f"{_number(rate)} {unit}/s")
            words += [f"{_clock((total - pace.done) / rate)} left"] if total < math.inf else []
        words += values
        room = COLUMNS if self._cell.is_possible else _columns(stream) - 1
        text = "  ".join([*name, *words])
        cells = min(BAR_CELLS, room - len(text) - 2)
        if total < math.inf and cells >= NARROWEST_BAR:
            text = "  ".join([*name, bar(pace.done / total, cells, stream), *words])
        else:
            text = text[:room]
        self._is_drawn = True
        if self._cell.is_possible:
            self._cell.draw(text)
        else:
            _write(stream, ERASE_LINE + text)

    def keep(self, words: Sequence[str]) -> None:
        stream = sys.stderr
        start = ERASE_LINE if _is_terminal(stream) else ""
        self._is_drawn = False
        self._cell.clear()
        _write(stream, start + "  ".join(words) + "\n")

    def clear(self) -> None:
        if self._is_drawn:
            self._is_drawn = False
            if self._cell.is_possible:
                self._cell.clear()
            else:
                _write(sys.stderr, ERASE_LINE)


def _is_terminal(stream: TextIO | None) -> bool:
    # The stream is None where there is no console at all, and may have been closed.
    with contextlib.suppress(ValueError):
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def _write(stream: TextIO | None, text: str) -> None:
    # A terminal that went away must not end the training.
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def bar(fraction: float, cells: int, stream: TextIO) -> str:
    """Return a bar for a terminal.

    Args:
        fraction: How much of it is full, from 0 to 1.
        cells: How long it is.
        stream: Where it goes.
    """
    full, empty = "━─" if "utf" in (stream.encoding or "").lower() else "#-"
    filled = min(cells, int(fraction * cells))
    done, rest = full * filled, empty * (cells - filled)
    return done + rest if os.environ.get("NO_COLOR") else f"\x1b[36m{done}\x1b[0;2m{rest}\x1b[0m"


def _epoch_name(trainer: pl.Trainer) -> str:
    last = trainer.max_epochs
    # Epochs without an end are -1, or None before Lightning has settled them.
    end = f"/{last}" if last is not None and last > 0 else ""
    return f"epoch {trainer.current_epoch + 1:{max(len(end) - 1, 1)}}{end}"


def _validation_name(trainer: pl.Trainer) -> list[str]:
    if trainer.sanity_checking:
        return ["sanity check"]
    if trainer.state.fn == "fit":
        return [_epoch_name(trainer), "validate"]
    return ["validate" if trainer.global_step else "baseline"]


def _steps_in_epoch(trainer: pl.Trainer, done: int) -> float:
    """Return how many batches this epoch has; infinite if that is unknown."""
    if trainer.max_steps < 0:
        return trainer.num_training_batches
    accumulated = trainer.accumulate_grad_batches
    left = (trainer.max_steps - trainer.global_step) * accumulated - done % accumulated
    return min(trainer.num_training_batches, done + max(0, left))


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars, losses first, without `x_step` of a batch and `x_epoch` of an `x`."""
    forks = {f"{name}_epoch" for name in metrics}
    names = [name for name in metrics if name not in forks and not name.endswith("_step")]
    names.sort(key=lambda name: (name.split("/")[0] != "loss", "loss" not in name))
    return {name: float(metrics[name]) for name in names if torch.numel(metrics[name]) == 1}


def _phrases(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {_exact(value)}" for name, value in values.items()]


def _exact(value: float) -> str:
    """Return five digits, so that lines stand in columns: `0.1200`, `2.3100`, `1797.0`."""
    return f"{value:.4f}" if 1e-4 <= abs(value) < 10 else f"{value:#.5g}"


def _number(value: float) -> str:
    """Return about three digits: `0.120`, `2.31`, `1797`."""
    return f"{value:.0f}" if 99.95 <= abs(value) < 1e6 else f"{value:#.3g}"


def _count(done: int, total: float) -> str:
    if total == math.inf:
        return str(done)
    return f"{done:{len(str(int(total)))}}/{total:.0f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else _clock(seconds)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
