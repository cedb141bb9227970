"""What is not finite, and where: in the tensors of a batch, the parameters, or the predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from torch_lab.errors import listed

__all__ = [
    "MEND_LOSS",
    "MEND_STEPS",
    "as_list",
    "bad_parameters",
    "cause_of",
    "ids_in",
    "is_finite",
    "listing",
    "named_samples",
]

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
        return f"{self.name} ({count}, in {named_samples(ids, self.samples)})"


def named_samples(ids: Sequence[Any] | None, positions: Sequence[int]) -> str:
    """Name the samples at `positions` of a batch, by their `ids` if they have some."""
    word = "batch position" if ids is None else "sample"
    named = listed((i if ids is None else ids[i] for i in positions), MOST_NAMED)
    return f"{word}{'s' * (len(positions) > 1)} {named}"


def is_finite(loss: Tensor) -> bool:
    """Return whether all numbers in `loss` are."""
    if loss.numel() == 1:
        return math.isfinite(loss.item())
    return bool(loss.isfinite().all())


def cause_of(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batch: Any,
    indices: Sequence[Any] | None,
    made_by: str,
) -> tuple[str, str]:
    """Return where a loss got its value from, as far as can be found, and what to do about it.

    Args:
        trainer: The trainer.
        module: Has the parameters.
        batch: What the loss is of.
        indices: Of its samples, if they are known; the metadata may name them better.
        made_by: Which step made the parameters what they are, to end a sentence with.
    """
    parts = _parts(batch)
    tensors = dict(found for name, part in parts.items() for found in _tensors(part, name))
    size = next((len(tensor) for tensor in tensors.values() if tensor.ndim), 0)
    ids = _sample_ids(parts.values(), size)
    if ids is None and indices is not None and len(indices) == size:
        ids = indices
    if bad := _bad(tensors, size):
        return f"not finite in the batch: {listing(bad, ids)}", MEND_INPUTS
    if bad := bad_parameters(module):
        return f"not finite among the parameters: {listing(bad)}{made_by}", MEND_STEPS
    named = f" ({named_samples(ids, range(size))})" if ids else ""
    try:
        predictions = dict(_tensors(_predictions(trainer, module, batch), "the prediction"))
    except Exception:
        # The user's forward need not be made for a call with x alone.
        return f"the batch{named} and the parameters are finite", f"{MEND_STEPS} {MEND_LOSS}"
    if bad := _bad(predictions, size):
        return f"not finite: {listing(bad, ids)}, though batch and parameters are", MEND_STEPS
    return f"the batch{named}, the parameters and the prediction are finite", MEND_LOSS


def listing(findings: Sequence[_Finding], ids: Sequence[Any] | None = None) -> str:
    """Name what was found, and the samples by their `ids` if they have some."""
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


def bad_parameters(module: pl.LightningModule) -> list[_Finding]:
    """Return the trainable parameters that are not finite."""
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
        ids = as_list(part.get("idx") if isinstance(part, Mapping) else None)
        if ids and len(ids) == size:
            return ids
    return None


def ids_in(batch: Any) -> Any:
    """Return the `idx` in a batch or its metadata: nothing else of it is kept in memory."""
    md = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else batch
    return md.get("idx") if isinstance(md, Mapping) else None


def as_list(ids: Any) -> list[Any]:
    """Return what names samples as a list; an empty one of what does not."""
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
