"""A watch on the loss: training ends at the first one that is NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from torch_lab.errors import NonFiniteError, listed

__all__ = ["NanMonitor"]

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


class NanMonitor(pl.Callback):
    """Stops the training at the first loss that is NaN or infinite, before its backward pass.

    In a validation, what `validation_step` returns is looked at, if it is a tensor or has a `loss`.

    The parameters are then still those of the last good step. The error names the tensors of the
    batch, or else the parameters or predictions, that are not finite, their samples (`idx` of the
    metadata, or else positions in the batch), and how many values it is.

    A finite loss can have infinite gradients, so a full checkpoint is refused too when trainable
    parameters in it are not finite; named are then the samples of the step that made them so.

    Raises:
        NonFiniteError: From the training step or the checkpoint that meets such a value.
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._ids_before: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_batch": None, "_ids_before": None}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        if not _is_finite(loss):
            raise _explained(trainer, pl_module, self._batch, loss, self._step_before())

    def _step_before(self) -> str:
        """Name the samples of the step before, if they have names."""
        ids = _as_list(self._ids_before)
        return f", made so by the step before with {_samples(ids, range(len(ids)))}" if ids else ""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._batch = None
        self._ids_before = _ids(batch)
        # A module that optimises by itself may run the backward pass without Lightning.
        if not pl_module.automatic_optimization and isinstance(outputs, Mapping):
            loss = outputs.get("loss")
            if isinstance(loss, Tensor) and not _is_finite(loss):
                raise _explained(trainer, pl_module, batch, loss, "")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.is_floating_point() and not _is_finite(loss):
            raise _explained(trainer, pl_module, batch, loss, "", "validation")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if bad := _bad_parameters(pl_module):
            raise NonFiniteError(
                f"the weights are not finite after step {trainer.global_step}, so no checkpoint "
                f"is written of them: {_listing(bad)}{self._step_before()}",
                MEND_STEPS,
            )


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


def _explained(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batch: Any,
    loss: Tensor,
    step_before: str,
    stage: str = "training",
) -> NonFiniteError:
    """Return the error that says where the loss got its value from, as far as can be found."""
    cause, hint = _cause(trainer, module, batch, step_before)
    value = "NaN" if loss.isnan().any() else "infinite"
    parts = ", ".join(_bad_parts(trainer))
    return NonFiniteError(
        f"the {stage} loss is {value}{f' (of it: {parts})' if parts else ''} at step "
        f"{trainer.global_step}, epoch {trainer.current_epoch + 1}: {cause}",
        hint,
    )


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
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, step_before: str
) -> tuple[str, str]:
    parts = _parts(batch)
    tensors = dict(found for name, part in parts.items() for found in _tensors(part, name))
    size = next((len(tensor) for tensor in tensors.values() if tensor.ndim), 0)
    ids = _sample_ids(parts.values(), size)
    if bad := _bad(tensors, size):
        return f"not finite in the batch: {_listing(bad, ids)}", MEND_INPUTS
    if bad := _bad_parameters(module):
        return f"not finite among the parameters: {_listing(bad)}{step_before}", MEND_STEPS
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
    """Return the `idx` in the metadata of a batch: nothing else of it is kept in memory."""
    md = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
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
