"""Metrics that adapt others, one that makes a metric of a function, and those of an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

__all__ = ["EpochValues", "MetricWrapper", "PooledMean", "batch_size"]


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


@dataclass(frozen=True)
class _Batch:
    """What a batch adds to an epoch."""

    sums: dict[str, Tensor]
    """Of each loss, over the samples."""
    y_pred: Any
    y: Any


class EpochValues:
    """The losses and metrics of an epoch, with a value of the whole epoch only.

    To update metrics takes as long for one batch as for many. So batches are gathered, and counted
    when there are enough, or when somebody asks; the values are those of an update with each batch.
    That holds for the classification metrics of torchmetrics, whose states are counts or all
    samples; others are updated at once. What a metric does not like about a batch it says when that
    is counted: of the first at once, of others up to 31 batches later.

    Args:
        metrics: Those of the epoch.
    """

    def __init__(self, metrics: MetricCollection) -> None:
        self._metrics = metrics
        self._may_wait = all(map(_counts_samples, metrics.values()))
        self._totals: dict[str, Tensor] = {}
        self._waiting: list[_Batch] = []
        self._elements = 0
        self.samples = 0
        """How many the epoch has had so far."""

    @property
    def metrics(self) -> MetricCollection:
        """The metrics, with all batches so far."""
        self.count()
        return self._metrics

    def add(self, losses: Mapping[str, Tensor], size: int, y_pred: Any, y: Any) -> None:
        """Add a batch: its losses, each the mean of `size` samples, its predictions and labels."""
        # A tensor of sizes, later, would be copied to the device, and wait for it.
        sums = {n: value.detach().reshape(()).float() * size for n, value in losses.items()}
        if not self._metrics:
            y_pred = y = None
        elif self._may_wait and isinstance(y_pred, Tensor) and isinstance(y, Tensor):
            elements = y_pred.numel() + y.numel()
            if self._elements + elements > _MOST_ELEMENTS:
                self.count()
            if elements > _MOST_ELEMENTS:
                self._metrics.update(_detached(y_pred), y)
                y_pred = y = None
            else:
                y_pred, y = _kept(y_pred), _kept(y)
                self._elements += elements
        else:
            self._metrics.update(_detached(y_pred), y)
            y_pred = y = None
        self._waiting.append(_Batch(sums, y_pred, y))
        is_first, self.samples = self.samples == 0, self.samples + size
        # What is wrong with the first is told at once.
        if is_first or len(self._waiting) == _MOST_BATCHES:
            self.count()

    def count(self) -> None:
        """Count the batches that wait."""
        waiting, self._waiting, self._elements = self._waiting, [], 0
        for name in dict.fromkeys(name for batch in waiting for name in batch.sums):
            sums = [batch.sums[name] for batch in waiting if name in batch.sums]
            self._totals[name] = self._totals.get(name, 0) + torch.stack(sums).sum()
        for y_pred, y in _alike([batch for batch in waiting if batch.y is not None]):
            self._metrics.update(y_pred, y)

    def means(self) -> dict[str, Tensor]:
        """Return the mean of each loss over all samples so far."""
        self.count()
        return {name: total / self.samples for name, total in self._totals.items()}

    def reset(self) -> None:
        """Begin another epoch."""
        self._totals, self._waiting, self._elements, self.samples = {}, [], 0, 0
        self._metrics.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return what is not in the states of the metrics: sums, and the batches that wait.

        These are not counted for it: a training that is not saved counts them together.
        """
        waiting = [vars(batch) for batch in self._waiting]
        return {"totals": dict(self._totals), "samples": self.samples, "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` returned."""
        moved = move_data_to_device(dict(state), device)
        self._totals, self.samples = moved["totals"], moved["samples"]
        self._waiting = [_Batch(**batch) for batch in moved["waiting"]]
        kept = (each for batch in self._waiting for each in (batch.y_pred, batch.y))
        self._elements = sum(each.numel() for each in kept if each is not None)


_MOST_BATCHES: Final = 32
_MOST_ELEMENTS: Final = 2**20


def _counts_samples(metric: Any) -> bool:
    """Return whether an update with two batches in one is the same as one with each of them."""
    is_theirs = type(metric).__module__.startswith("torchmetrics.classification.")
    # What is left out decides on whether the rest are logits.
    return is_theirs and getattr(metric, "ignore_index", None) is None


def _kept(tensor: Tensor) -> Tensor:
    """Return a tensor that stays as it is, whoever writes into this one, and holds no other."""
    return tensor.detach().clone()


def _alike(batches: Sequence[_Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the predictions and labels of neighbours that can be put together.

    Torchmetrics takes all predictions of an update for logits if one is no probability: so batches
    that it would take for logits and those that it would not stay apart.
    """
    kinds = [_kind(batch) for batch in batches]
    if batches and batches[0].y_pred.is_floating_point():
        are_logits = [((each.y_pred < 0) | (each.y_pred > 1)).any() for each in batches]
        flags = torch.stack(are_logits).tolist()  # One transfer from the device, for all.
        kinds = [(*kind, flag) for kind, flag in zip(kinds, flags, strict=True)]
    pairs = zip(kinds, batches, strict=True)
    for (dimensions, *_), group in itertools.groupby(pairs, lambda pair: pair[0]):
        those = [(batch.y_pred, batch.y) for _, batch in group]
        if dimensions and len(those) > 1:
            predictions, labels = zip(*those, strict=True)
            yield torch.cat(predictions), torch.cat(labels)
        else:
            yield from those


def _kind(batch: _Batch) -> tuple[Any, ...]:
    parts = (batch.y_pred, batch.y)
    return min(part.ndim for part in parts), *((part.shape[1:], part.dtype) for part in parts)


def _detached(value: Any) -> Any:
    """Return `value` without its graph, which metrics that keep predictions would keep alive."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_detached(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


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
