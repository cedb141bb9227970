"""A watch on the loss: training ends at the first one that is NaN or infinite."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from torch_lab.callbacks.not_finite import (
    MEND_LOSS,
    MEND_STEPS,
    as_list,
    bad_parameters,
    cause_of,
    ids_in,
    is_finite,
    listing,
    named_samples,
)
from torch_lab.callbacks.waiting import Kept, Look, Losses, alone, waits_for
from torch_lab.errors import NonFiniteError

__all__ = ["NanMonitor"]

log = logging.getLogger(__name__)

MEND_LATE = (
    "Losses on this device are looked at when the trainer logs, so that no step waits for it. "
    "Checkpoints are of before that step: --resume --set trainer.init.detect_anomaly=True goes on "
    "from the last one, looks at each loss before its backward pass, and names the cause."
)
_MOST_WAITING: Final = 50


def _unknown(stage: str, loader: int) -> None:
    """Know nothing of the samples in a batch."""


class NanMonitor(pl.Callback):
    """Stops the training at the first loss that is NaN or infinite, before its backward pass.

    In a validation, what `validation_step` returns is looked at, if it is a tensor or has a `loss`;
    of what is logged under a name with `loss` in it, NaN ends the training, and infinity does not.

    The parameters are then still those of the last good step. The error names the tensors of the
    batch, or else the parameters or predictions, that are not finite, their samples, and how many
    values it is. Steps count from 1.

    To read a number from a GPU takes until it has done all it was given. So losses stay there, and
    are looked at together: at the steps that the trainer logs, after 50 at most, before anybody
    takes the weights (for a checkpoint, say), before a validation, and at the end of an epoch and
    of the training; those of a validation likewise, and at its end. The error then names the first
    step whose loss was not finite and its samples, but no tensors; the parameters may be those of a
    later step. Under `detect_anomaly` each loss is looked at before its backward pass, as on a CPU.

    A finite loss can have infinite gradients, so a full checkpoint is refused too when trainable
    parameters in it are not finite; named are then the samples of the step that made them so.

    Args:
        monitor: The metric that says which checkpoint is the best: it is told once when that is not
            finite.
        indices: Returns the indices of the samples in the batch that a loader has made last: given
            are the stage (`train` or `validate`) and the number of the loader; None if they are not
            known. Without it, samples are named by `idx` of their metadata, or else by their
            positions in the batch.

    Raises:
        NonFiniteError: From the step, the validation or the checkpoint that meets such a value.
    """

    def __init__(
        self,
        monitor: str | None = None,
        indices: Callable[[str, int], Sequence[Any] | None] = _unknown,
    ) -> None:
        self.monitor = monitor
        self._indices = indices
        self._batch: Any = None
        self._ids_before: Any = None
        self._told = False
        self._step = 0
        self._waiting = Losses()
        self._hook: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Lightning leaves methods of the module in a callback.
        own = {key: vars(self)[key] for key in ("monitor", "_indices", "_told")}
        unsaved = {"_batch": None, "_ids_before": None, "_step": 0, "_hook": None}
        return {**own, **unsaved, "_waiting": Losses()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._waiting = Losses()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch
        if not pl_module.automatic_optimization:  # It makes its step whenever it likes.
            self._step = trainer.global_step + 1

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        self._watch(trainer, pl_module, "training", loss, self._batch)

    def _watch(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stage: str,
        loss: Tensor,
        batch: Any,
        loader: int = 0,
        *,
        is_sum: bool = False,
    ) -> None:
        """Look at a loss, or keep it until to look at it is due.

        Raises:
            NonFiniteError: It ends the training, or one that was kept before does.
        """
        if not waits_for(loss.device) or torch.is_anomaly_enabled():
            is_bad = _is_nan(loss) if is_sum else not is_finite(loss)
        else:
            is_bad = self._keep(trainer, module, stage, loss, batch, loader, is_sum=is_sum)
        if is_bad:
            raise self._error(trainer, module, stage, loss, batch, loader)

    def _keep(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stage: str,
        loss: Tensor,
        batch: Any,
        loader: int,
        *,
        is_sum: bool,
    ) -> bool:
        """Keep a loss on its device, and return whether it is bad, if to look at it is due.

        Raises:
            NonFiniteError: One that was kept before is.
        """
        if not loss.numel():
            return False
        is_training, made = stage == "training", trainer.global_step
        step_of_training = made + 1 if module.automatic_optimization else self._step
        kept = Kept(
            # Lightning adds to a sum by making another one.
            loss.detach() if is_sum else alone(loss),
            stage,
            step_of_training if is_training else made,
            trainer.current_epoch + 1,
            self._known_ids("train" if is_training else "validate", loader, batch),
            may_be_infinite=is_sum,
        )
        self._waiting.add(kept)
        if self._hook is None:
            look = Look(lambda: self._look_before_saving(trainer, module))
            self._hook = module.register_state_dict_pre_hook(look)  # type: ignore[no-untyped-call]
        if len(self._waiting) < _MOST_WAITING and not (is_training and _logs(trainer, module)):
            return False
        bad = self._waiting.first_bad()
        if bad is None or bad is kept:
            return bad is not None
        raise _late_error(trainer, module, bad)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look at all losses that wait.

        Raises:
            NonFiniteError: One of them is not finite.
        """
        if bad := self._waiting.first_bad():
            raise _late_error(trainer, module, bad)

    def _look_before_saving(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look at all losses that wait, and at what those of other processes may have left."""
        self._look(trainer, module)
        if trainer.world_size > 1:
            self._check_parameters(trainer, module)

    def _check_parameters(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if bad := bad_parameters(module):
            raise NonFiniteError(
                f"the weights are not finite after step {trainer.global_step}, so no checkpoint "
                f"is written of them: {listing(bad)}{self._made_by(trainer.global_step)}",
                MEND_STEPS,
            )

    def _known_ids(self, stage: str, loader: int, batch: Any) -> Any:
        """Return what names the samples of a batch, if it is known; nothing else of it is kept."""
        ids = ids_in(batch)
        return self._indices(stage, loader) if ids is None else ids

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._unhook()
        # The device may be what failed, and may wait for that of a process that is gone.
        if trainer.world_size == 1 and not isinstance(exception, NonFiniteError):
            with contextlib.suppress(RuntimeError):
                if bad := self._waiting.first_bad():
                    log.error("%s", _late_error(trainer, pl_module, bad).message)

    def _made_by(self, step: int) -> str:
        """Name the step whose gradients made the weights what they are, and its samples."""
        ids = as_list(self._ids_before)
        samples = f" with {named_samples(ids, range(len(ids)))}" if ids else ""
        return f", made so by the gradients of step {step}{samples}" if step else ""

    def _error(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stage: str,
        loss: Tensor,
        batch: Any,
        loader: int,
    ) -> NonFiniteError:
        """Return the error that says where a loss got its value from, as far as can be found."""
        is_training = stage == "training"
        indices = self._indices("train" if is_training else "validate", loader)
        # A module that optimises by itself may have made the step already.
        is_before_step = is_training and module.automatic_optimization
        made_by = self._made_by(trainer.global_step) if is_before_step else ""
        cause, hint = cause_of(trainer, module, batch, indices, made_by)
        parts = ", ".join(_bad_parts(trainer))
        return NonFiniteError(
            f"the {stage} loss is {_word(loss)}{f' (of it: {parts})' if parts else ''} "
            f"{_when(trainer, stage)}: {cause}",
            hint,
        )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._batch = None
        ids = ids_in(batch)
        self._ids_before = self._indices("train", 0) if ids is None else ids
        # A module that optimises by itself may run the backward pass without Lightning.
        if not pl_module.automatic_optimization and isinstance(outputs, Mapping):
            loss = outputs.get("loss")
            if isinstance(loss, Tensor):
                self._watch(trainer, pl_module, "training", loss, batch)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        where = (batch, dataloader_idx)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.is_floating_point():
            self._watch(trainer, pl_module, "validation", loss, *where)
        for logged in _logged_losses(trainer):
            self._watch(trainer, pl_module, "validation", logged, *where, is_sum=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # With several loaders, the number of each is behind the name.
        logged = tuple(each.meta.name for each in _results(trainer))
        found = trainer.callback_metrics
        for name, value in found.items():
            if "loss" in name and name.startswith(logged) and _is_nan(value):
                raise NonFiniteError(
                    f"{name} is NaN {_when(trainer, 'validation')}: all losses of its "
                    "batches were finite",
                    MEND_LOSS,
                )
        score = found.get(self.monitor or "")
        if score is not None and not is_finite(score) and not self._told:
            self._told = True
            log.warning(
                "%s is %s %s: such a checkpoint is never the best",
                *(self.monitor, _word(score), _when(trainer, "validation")),
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer, pl_module)
        self._check_parameters(trainer, pl_module)


def _is_nan(value: Tensor) -> bool:
    return bool(value.isnan().any())


def _word(value: Tensor) -> str:
    return "NaN" if value.isnan().any() else "infinite"


def _when(trainer: pl.Trainer, stage: str) -> str:
    """Say in which step something was met, or after which."""
    if stage == "training":
        return f"in step {trainer.global_step + 1}, epoch {trainer.current_epoch + 1}"
    if not trainer.global_step:
        return "before the first step"
    return f"after step {trainer.global_step}, epoch {trainer.current_epoch + 1}"


def _logs(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Return whether the trainer logs the step of this batch, when it is over."""
    accumulates = module.automatic_optimization and trainer.fit_loop._should_accumulate()
    return not accumulates and trainer._logger_connector.should_update_logs


def _late_error(trainer: pl.Trainer, module: pl.LightningModule, bad: Kept) -> NonFiniteError:
    """Return the error that says all that is known of a loss whose batch is gone."""
    ids, made = as_list(bad.ids), trainer.global_step
    samples = f" ({named_samples(ids, range(len(ids)))})" if ids else ""
    if bad.stage == "validation":
        when = f"after step {bad.step}, epoch {bad.epoch}" if bad.step else "before the first step"
        message = f"the validation loss is {_word(bad.loss)} {when}: in a batch{samples}"
        if found := bad_parameters(module):
            return NonFiniteError(
                f"{message}, not finite among the parameters: {listing(found)}", MEND_STEPS
            )
        return NonFiniteError(f"{message}; the parameters are finite", MEND_LATE)
    weights = (
        f"noticed after step {made}, so the weights may no longer be those of before it"
        if made >= bad.step
        else "noticed before that step was made, so the weights are those of before it"
    )
    if trainer.world_size > 1:
        rank = trainer.global_rank
        weights += f" (in process {rank}; in another one the first may have been another)"
    return NonFiniteError(
        f"the training loss is {_word(bad.loss)} in step {bad.step}, epoch {bad.epoch}{samples}: "
        f"{weights}",
        MEND_LATE,
    )


def _results(trainer: pl.Trainer) -> list[Any]:
    """Return what the loop that is running has collected of all that was logged in it."""
    return [] if trainer._results is None else list(trainer._results.values())


def _logged_losses(trainer: pl.Trainer) -> list[Tensor]:
    """Return the sums of what this validation has logged so far under the names of losses."""
    return [each.value for each in _results(trainer) if each.is_tensor and "loss" in each.meta.name]


def _bad_parts(trainer: pl.Trainer) -> list[str]:
    """Return which other values, logged in this very step, are not finite."""
    # The public `callback_metrics` would mix them with those of earlier epochs.
    results = trainer._results
    logged = {} if results is None else results.metrics(on_step=True)["callback"]
    return [
        name.removesuffix("_step")
        for name, value in logged.items()
        if not name.startswith("loss/train") and not is_finite(value)
    ]
