"""A watch on the loss: training ends at the first one that is NaN or infinite."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from torch_lab.callbacks.waiting import Kept, Look, Losses, alone, waits_for
from torch_lab.errors import NonFiniteError, listed

__all__ = ["NanMonitor"]

log = logging.getLogger(__name__)

MOST_NAMED = 5
MEND_LOSS = (
    "Look in the loss function for the logarithm or the root of 0, a division by 0, "
    "and targets out of range."
)
MEND_INPUTS = "Look at these samples; leave them out, or mend such values in a transform."
MEND_STEPS = (
    "Lower the learning rate, clip the gradients (trainer.init: gradient_clip_val), "
    "or train in a precision of wider range."
)
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
        if not waits_for(loss.device) and _is_finite(loss):  # Most are, and each step asks.
            return
        if self._is_bad(trainer, pl_module, "training", loss, self._batch):
            made_by = self._made_by(trainer.global_step)
            raise self._error(trainer, pl_module, "training", loss, self._batch, made_by=made_by)

    def _is_bad(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stage: str,
        loss: Tensor,
        batch: Any,
        loader: int = 0,
        *,
        is_sum: bool = False,
    ) -> bool:
        """Return whether this loss ends the training, as far as that can be known by now.

        Raises:
            NonFiniteError: It was time to look at those before, and one of them does.
        """
        if not waits_for(loss.device) or torch.is_anomaly_enabled():
            return _is_nan(loss) if is_sum else not _is_finite(loss)
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
        if bad := _bad_parameters(module):
            raise NonFiniteError(
                f"the weights are not finite after step {trainer.global_step}, so no checkpoint "
                f"is written of them: {_listing(bad)}{self._made_by(trainer.global_step)}",
                MEND_STEPS,
            )

    def _known_ids(self, stage: str, loader: int, batch: Any) -> Any:
        """Return what names the samples of a batch, if it is known; nothing else of it is kept."""
        ids = _ids(batch)
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
        ids = _as_list(self._ids_before)
        samples = f" with {_samples(ids, range(len(ids)))}" if ids else ""
        return f", made so by the gradients of step {step}{samples}" if step else ""

    def _error(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stage: str,
        loss: Tensor,
        batch: Any,
        loader: int = 0,
        made_by: str = "",
    ) -> NonFiniteError:
        """Return the error that says where a loss got its value from, as far as can be found."""
        indices = self._indices("train" if stage == "training" else "validate", loader)
        cause, hint = _cause(trainer, module, batch, indices, made_by)
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
        ids = _ids(batch)
        self._ids_before = self._indices("train", 0) if ids is None else ids
        # A module that optimises by itself may run the backward pass without Lightning.
        if not pl_module.automatic_optimization and isinstance(outputs, Mapping):
            loss = outputs.get("loss")
            if isinstance(loss, Tensor) and self._is_bad(
                trainer, pl_module, "training", loss, batch
            ):
                raise self._error(trainer, pl_module, "training", loss, batch)

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
        if (
            isinstance(loss, Tensor)
            and loss.is_floating_point()
            and self._is_bad(trainer, pl_module, "validation", loss, *where)
        ):
            raise self._error(trainer, pl_module, "validation", loss, *where)
        for logged in _logged_losses(trainer):
            if self._is_bad(trainer, pl_module, "validation", logged, *where, is_sum=True):
                raise self._error(trainer, pl_module, "validation", logged, *where)

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
        if score is not None and not _is_finite(score) and not self._told:
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


@dataclass(frozen=True)
class _Finding:
    """A tensor with values that are NaN or infinite."""

    name: str
    values: int
    samples: Sequence[int] = ()
    """Positions in the batch."""

    def described(self, ids: Sequence[Any] | None) -> str:
        count = f"{self.values} value{'s' * (self.values > 1)}"
        if not self.samples:
            return f"{self.name} ({count})"
        return f"{self.name} ({count}, in {_samples(ids, self.samples)})"


def _samples(ids: Sequence[Any] | None, positions: Sequence[int]) -> str:
    """Name the samples at `positions` of a batch, by their `ids` if they have some."""
    word = "batch position" if ids is None else "sample"
    named = listed((i if ids is None else ids[i] for i in positions), MOST_NAMED)
    return f"{word}{'s' * (len(positions) > 1)} {named}"


def _is_finite(loss: Tensor) -> bool:
    if loss.numel() == 1:
        return math.isfinite(loss.item())
    return bool(loss.isfinite().all())


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
    ids, made = _as_list(bad.ids), trainer.global_step
    samples = f" ({_samples(ids, range(len(ids)))})" if ids else ""
    if bad.stage == "validation":
        when = f"after step {bad.step}, epoch {bad.epoch}" if bad.step else "before the first step"
        message = f"the validation loss is {_word(bad.loss)} {when}: in a batch{samples}"
        if found := _bad_parameters(module):
            return NonFiniteError(
                f"{message}, not finite among the parameters: {_listing(found)}", MEND_STEPS
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
        if not name.startswith("loss/train") and not _is_finite(value)
    ]


def _cause(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batch: Any,
    indices: Sequence[Any] | None,
    made_by: str,
) -> tuple[str, str]:
    parts = _parts(batch)
    tensors = dict(found for name, part in parts.items() for found in _tensors(part, name))
    size = next((len(tensor) for tensor in tensors.values() if tensor.ndim), 0)
    ids = _sample_ids(parts.values(), size)
    if ids is None and indices is not None and len(indices) == size:
        ids = indices
    if bad := _bad(tensors, size):
        return f"not finite in the batch: {_listing(bad, ids)}", MEND_INPUTS
    if bad := _bad_parameters(module):
        return f"not finite among the parameters: {_listing(bad)}{made_by}", MEND_STEPS
    named = f" ({_samples(ids, range(size))})" if ids else ""
    try:
        predictions = dict(_tensors(_predictions(trainer, module, batch), "the prediction"))
    except Exception:
        # The user's forward need not be made for a call with x alone.
        return f"the batch{named} and the parameters are finite", f"{MEND_STEPS} {MEND_LOSS}"
    if bad := _bad(predictions, size):
        return f"not finite: {_listing(bad, ids)}, though batch and parameters are", MEND_STEPS
    return f"the batch{named}, the parameters and the prediction are finite", MEND_LOSS


def _listing(findings: Sequence[_Finding], ids: Sequence[Any] | None = None) -> str:
    shown = [finding.described(ids) for finding in findings[:MOST_NAMED]]
    more = len(findings) - len(shown)
    return ", ".join(shown) + (f" and {more} more tensors" if more else "")


def _bad(tensors: Mapping[str, Tensor], size: int) -> list[_Finding]:
    return [
        _finding(name, tensor, size)
        for name, tensor in tensors.items()
        if not tensor.isfinite().all()
    ]


def _finding(name: str, tensor: Tensor, size: int) -> _Finding:
    bad = ~tensor.isfinite()
    if tensor.ndim == 0 or len(tensor) != size:
        return _Finding(name, int(bad.sum()))
    samples = bad.reshape(size, -1).any(dim=1).nonzero().flatten()
    return _Finding(name, int(bad.sum()), samples.tolist())


def _bad_parameters(module: pl.LightningModule) -> list[_Finding]:
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    # No parameter has a dimension of samples.
    return _bad(parameters, size=-1)


def _parts(batch: Any) -> dict[str, Any]:
    """Return the parts of a batch under the names that people know them by."""
    if isinstance(batch, Tensor):
        return {"x": batch}
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return {"x": batch[0], "md" if isinstance(batch[1], Mapping) else "y": batch[1]}
    return {"batch": batch}


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested mappings and sequences with its path: `md['y']`, `x[0]`."""
    if isinstance(value, Tensor):
        yield path, value.detach()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _tensors(part, f"{path}[{index}]")


def _sample_ids(parts: Iterable[Any], size: int) -> Sequence[Any] | None:
    """Return the samples' `idx` out of the metadata, if there is one for each."""
    for part in parts:
        ids = _as_list(part.get("idx") if isinstance(part, Mapping) else None)
        if ids and len(ids) == size:
            return ids
    return None


def _ids(batch: Any) -> Any:
    """Return the `idx` in a batch or its metadata: nothing else of it is kept in memory."""
    md = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else batch
    return md.get("idx") if isinstance(md, Mapping) else None


def _as_list(ids: Any) -> list[Any]:
    listed = ids.tolist() if isinstance(ids, Tensor) else ids
    return list(listed) if isinstance(listed, (list, tuple)) else []


def _predictions(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    x = batch[0] if isinstance(batch, (list, tuple)) else batch
    with torch.no_grad(), trainer.precision_plugin.forward_context(), _evaluating(module):
        return module(x)


@contextmanager
def _evaluating(module: pl.LightningModule) -> Iterator[None]:
    """Keep samples apart (batch norm) and running statistics as they are, for a while."""
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True
