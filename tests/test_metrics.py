"""Metrics: wrapped ones, and means of functions."""

from __future__ import annotations

import pickle
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score

from torch_lab.metrics import MetricWrapper, PooledMean, batch_size


def absolute_error(y_pred: Tensor, y: Tensor) -> Tensor:
    return (y_pred - y).abs()


def mean_absolute_error(y_pred: Tensor, y: Tensor) -> float:
    return (y_pred - y).abs().mean().item()


def squared_error(y_pred: Tensor, y: Tensor) -> Tensor:
    return (y_pred - y) ** 2


def halves(y_pred: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y_pred / 2, y / 2


def first_column(y_pred: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y_pred[:, 0], y


Y_PRED = torch.tensor([0.9, 0.2, 0.8, 0.4, 0.6])
Y = torch.tensor([1, 0, 0, 1, 1])


def test_a_wrapper_is_its_metric_of_preprocessed_batches() -> None:
    """The value over several batches is the wrapped metric's of what the preprocessor made."""
    wrapper = MetricWrapper(first_column, BinaryAccuracy())
    for part in (slice(3), slice(3, None)):
        wrapper.update(torch.stack([Y_PRED, -Y_PRED], dim=1)[part], Y[part])
    assert wrapper.compute() == BinaryAccuracy()(Y_PRED, Y)


def test_a_wrapper_called_gives_the_value_of_that_batch_and_still_pools() -> None:
    """Calling a metric is adding a batch and asking for its own value."""
    wrapper = MetricWrapper(first_column, BinaryAccuracy())
    assert wrapper(Y_PRED[:2, None], Y[:2]) == 1
    assert wrapper(Y_PRED[2:4, None], Y[2:4]) == 0
    assert wrapper.compute() == 0.5


def test_reset_forgets_all_batches() -> None:
    """After a reset only what came later counts."""
    wrapper = MetricWrapper(first_column, BinaryAccuracy())
    wrapper.update(Y_PRED[2:4, None], Y[2:4])
    wrapper.reset()
    wrapper.update(Y_PRED[:2, None], Y[:2])
    assert wrapper.compute() == 1


def test_a_wrapped_collection_gives_all_its_values_by_name() -> None:
    """Several metrics can share a preprocessor, also inside another collection."""
    inner = MetricCollection({"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()})
    metrics = MetricCollection({"first": MetricWrapper(first_column, inner)})
    metrics.update(Y_PRED[:, None], Y)
    expected = {"accuracy": BinaryAccuracy()(Y_PRED, Y), "f1": BinaryF1Score()(Y_PRED, Y)}
    assert metrics.compute() == expected


def test_a_preprocessor_must_return_a_pair() -> None:
    """A tensor of two rows would unpack too, and be wrong in silence."""
    wrapper = MetricWrapper(lambda y_pred, y: torch.stack([y_pred, y]), MeanSquaredError())
    with pytest.raises(TypeError, match=r"must return \(y_pred, y\), it returned a Tensor"):
        wrapper.update(Y_PRED, Y)


@pytest.mark.parametrize("function", [absolute_error, mean_absolute_error])
def test_a_pooled_mean_counts_every_sample_once(function: Any) -> None:
    """The mean over batches of 3 and 2 is that over 5, from values per sample and per batch."""
    metric = PooledMean(function)
    metric.update(Y_PRED[:3], Y[:3])
    metric.update(Y_PRED[3:], Y[3:])
    torch.testing.assert_close(metric.compute(), (Y_PRED - Y).abs().mean())


def test_a_pooled_mean_of_several_values_per_sample_is_over_all_values() -> None:
    """Values of shape `(batch, ...)` are pooled over everything."""
    metric = PooledMean(absolute_error)
    metric.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2))
    metric.update(torch.tensor([[5.0, 9.0]]), torch.zeros(1, 2))
    assert metric.compute() == 4


def test_a_pooled_function_must_give_one_value_per_sample() -> None:
    """A mean per class instead of per sample is refused."""
    with pytest.raises(ValueError, match="3 values for 5 samples"):
        PooledMean(lambda y_pred, y: torch.zeros(3)).update(Y_PRED, Y)


def test_pooled_means_that_agree_at_first_are_not_taken_for_one() -> None:
    """A collection goes on updating both, though their first values were equal."""
    metrics = MetricCollection(
        {"absolute": PooledMean(absolute_error), "squared": PooledMean(squared_error)}
    )
    metrics.update(torch.ones(2), torch.zeros(2))
    metrics.update(3 * torch.ones(2), torch.zeros(2))
    assert metrics.compute() == {"absolute": 2, "squared": 5}


def test_a_pooled_mean_keeps_no_graph() -> None:
    """Its value has no history, whatever the function does."""
    metric = PooledMean(squared_error)
    metric.update(Y_PRED.clone().requires_grad_(), Y)
    assert not metric.compute().requires_grad


@pytest.mark.parametrize(
    "metric",
    [PooledMean(absolute_error), MetricWrapper(halves, MeanSquaredError())],
)
def test_copies_hold_the_same_state_and_go_their_own_way(metric: Any) -> None:
    """Clones and pickled copies start from the original's state, and do not share it."""
    metric.reset()
    metric.update(Y_PRED, Y)
    value = metric.compute()
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert copy.compute() == value
        copy.reset()
        copy.update(Y, Y)
        assert copy.compute() == 0
        assert metric.compute() == value


def test_persistent_state_goes_through_state_dict() -> None:
    """State is in `state_dict` when asked for, and only then."""
    metric = PooledMean(absolute_error)
    metric.update(Y_PRED, Y)
    assert metric.state_dict() == {}
    metric.persistent(True)
    copy = PooledMean(absolute_error)
    copy.persistent(True)
    copy.load_state_dict(metric.state_dict())
    copy.update(Y_PRED, Y)
    torch.testing.assert_close(copy.compute(), metric.compute())


def test_a_preprocessor_that_is_a_module_moves_with_the_metric() -> None:
    """Its buffers are found by `.to`, as the wrapped metric's state is."""
    metric = PooledMean(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)))
    assert metric.to("meta").preprocessor.function.pos_weight.is_meta


def test_plots_are_those_of_the_metric() -> None:
    """A wrapper's plot is a figure and axes, as any metric's."""
    mpl.use("Agg")
    wrapper = MetricWrapper(first_column, MeanSquaredError())
    wrapper.update(Y_PRED[:, None], Y)
    pooled = PooledMean(absolute_error)
    pooled.update(Y_PRED, Y)
    for metric in (wrapper, pooled):
        figure, axes = metric.plot()
        assert axes.get_figure() is figure


def test_batch_size_is_the_first_dimension_of_the_first_tensor() -> None:
    """Scalars and other values are passed over; without any tensor there is none."""
    assert batch_size("a", torch.tensor(1), {"a": [1, (torch.zeros(7, 2),)]}) == 7
    with pytest.raises(ValueError, match="no tensor"):
        batch_size(["a"], torch.tensor(1))
