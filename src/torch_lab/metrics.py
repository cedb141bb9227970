"""Metrics that adapt others, and one that makes a metric of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

__all__ = ["MetricWrapper", "PooledMean", "batch_size"]


class MetricWrapper(WrapperMetric):
    """A metric that sees what a preprocessor makes of predictions and labels.

    State, synchronisation between processes and plots are those of the wrapped metric. Wrap a
    `MetricCollection` when several metrics share a preprocessor: it then runs once a batch.

    Args:
        preprocessor: `(y_pred, y) -> (y_pred, y)`; a module moves between devices with the metric.
        metric: What gets the preprocessor's results.
    """

    def __init__(
        self,
        preprocessor: Callable[[Any, Any], tuple[Any, Any]],
        metric: Metric | MetricCollection,
    ) -> None:
        super().__init__()
        self.preprocessor = preprocessor
        self.metric = metric

    def update(self, y_pred: Any, y: Any) -> None:
        """Add a batch."""
        self.metric.update(*self._preprocessed(y_pred, y))

    def compute(self) -> Any:
        """Return the wrapped metric's value over all batches and processes."""
        return self.metric.compute()

    def forward(self, y_pred: Any, y: Any) -> Any:
        """Add a batch, and return the wrapped metric's value of this batch alone."""
        return self.metric(*self._preprocessed(y_pred, y))

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self.metric.reset()

    def persistent(self, mode: bool = False) -> None:
        """Choose whether the wrapped metric's state is part of `state_dict`."""
        self.metric.persistent(mode)

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped metric's plot; the arguments are its own."""
        return self.metric.plot(*args, **kwargs)

    def _preprocessed(self, y_pred: Any, y: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            result: Any = self.preprocessor(y_pred, y)
        # A tensor of two rows would unpack as well, and be wrong.
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"a preprocessor must return (y_pred, y), it returned a {type(result).__name__}"
            )
        return result


@final
class PooledMean(MetricWrapper):
    """The mean of a function over all samples and processes, also when the last batch is smaller.

    Args:
        function: `(y_pred, y) ->` a value per sample, `(batch, ...)`, or a scalar for the whole
            batch, which then counts as many times as the batch has samples.
    """

    # Wrapped, as metrics without state of their own are never taken for equal: torchmetrics would
    # update only one of two means that happen to agree on the first batch.

    def __init__(self, function: Callable[[Any, Any], Tensor | float]) -> None:
        super().__init__(_WithWeight(function), _WeightedMean())


@final
class _WithWeight(nn.Module):
    """The values of a function, and how many samples each of them stands for."""

    def __init__(self, function: Callable[[Any, Any], Tensor | float]) -> None:
        super().__init__()
        self.function: Final = function

    def forward(self, y_pred: Any, y: Any) -> tuple[Tensor, int]:
        values = torch.as_tensor(self.function(y_pred, y))
        size = batch_size(y, y_pred)
        if values.ndim == 0:
            return values, size
        if len(values) != size:
            raise ValueError(
                f"a pooled function must return a scalar or one value per sample: "
                f"{len(values)} values for {size} samples"
            )
        return values, 1


@final
class _WeightedMean(Metric):
    # torchmetrics' MeanMetric forgets the weights unless it looks for NaN, which waits for the
    # device.

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weight: int) -> None:
        self.total += values.to(self.total.dtype).sum() * weight
        self.count += values.numel() * weight

    def compute(self) -> Tensor:
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        return self._plot(val, ax)


def batch_size(*values: Any) -> int:
    """Return the first dimension of the first tensor in `values`.

    Dicts, lists and tuples are searched too.

    Raises:
        ValueError: There is none.
    """
    size = _first_size(values)
    if size is None:
        raise ValueError("no batch size: there is no tensor with a dimension in the batch")
    return size


def _first_size(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else None
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return None
    return next((size for size in map(_first_size, value) if size is not None), None)
