"""What `NanMonitor` stops, and what it says."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torch_lab.callbacks import NanMonitor
from torch_lab.errors import ExitCode, NonFiniteError

Batch = Any


class Model(pl.LightningModule):
    """A line through the origin, with a loss to choose."""

    def __init__(self, loss: Callable[[Tensor], Tensor] = torch.mean, mode: str = "auto") -> None:
        super().__init__()
        self.net = nn.Linear(2, 1, bias=False)
        nn.init.ones_(self.net.weight)
        self.loss = loss
        self.mode = mode
        self.automatic_optimization = mode == "auto"

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        x = batch["image"] if isinstance(batch, dict) else batch
        x = x[0] if isinstance(x, (list, tuple)) else x
        loss = self.loss(self(x))
        if self.mode == "auto":
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss) if self.mode == "manual" else loss.backward()
        optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(model: pl.LightningModule, batches: list[Batch], **kwargs: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [NanMonitor()],
        }
        | kwargs
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return trainer


def failure(model: pl.LightningModule, batches: list[Batch], **kwargs: Any) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        fit(model, batches, **kwargs)
    assert "\n" not in caught.value.message
    return caught.value


def batch(*bad: int, value: float = math.nan, size: int = 8) -> Tensor:
    x = torch.ones(size, 2)
    x[list(bad)] = value
    return x


def test_finite_losses_pass() -> None:
    """Training on good data is left alone."""
    assert fit(Model(), [batch(), batch()]).global_step == 4


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (
            lambda x: (x, {"idx": torch.arange(10, 18), "y": torch.zeros(8)}),
            "x (4 values, in samples 12, 15)",
        ),
        (lambda x: (x, {"idx": [f"s{i}" for i in range(8)]}), "x (4 values, in samples s2, s5)"),
        (lambda x: (x, torch.zeros(8)), "x (4 values, in batch positions 2, 5)"),
        (lambda x: x, "x (4 values, in batch positions 2, 5)"),
        (
            lambda x: {"image": x, "idx": torch.arange(8) * 2},
            "batch['image'] (4 values, in samples 4, 10)",
        ),
        (
            lambda x: (x, {"z": [0, x[:, 0]], "idx": [0]}),
            "x (4 values, in batch positions 2, 5), md['z'][1] (2 values, in batch positions 2, 5)",
        ),
        (
            lambda x: (x, x[0], torch.tensor(math.nan), "text"),
            "batch[0] (4 values, in batch positions 2, 5), batch[2] (1 value)",
        ),
    ],
    ids=["md", "named idx", "x and y", "bare", "dict", "nested", "triple"],
)
def test_bad_inputs_are_named(data: Callable[[Tensor], Batch], named: str) -> None:
    """The tensors that are not finite are named by their path, their samples by `idx`."""
    error = failure(Model(), [data(batch()), data(batch(2, 5))])
    assert error.message == (
        f"the training loss is NaN in step 2, epoch 1: not finite in the batch: {named}"
    )
    assert error.hint is not None and "samples" in error.hint
    assert error.exit_code == ExitCode.NON_FINITE


def test_many_samples_and_tensors_are_counted() -> None:
    """A long list is cut, and says by how much."""
    bad = {f"t{i}": batch(*range(8)) for i in range(7)}
    message = failure(Model(), [{"image": batch(*range(8)), **bad}]).message
    assert "(16 values, in batch positions 0, 1, 2, 3, 4 and 3 more)" in message
    assert message.endswith(" and 3 more tensors")


def test_infinity_is_said() -> None:
    """An infinite loss stops as well, under its own name."""
    error = failure(Model(), [(batch(1, value=math.inf), torch.zeros(8))])
    assert "the training loss is infinite in step 1, epoch 1" in error.message


@pytest.mark.parametrize(
    "kwargs",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"plugins": [MixedPrecision("16-mixed", "cpu")]},
        {"precision": "bf16-true"},
    ],
    ids=["accumulation", "bf16-mixed", "16-mixed", "bf16-true"],
)
def test_it_stops_before_the_weights_are_touched(kwargs: dict[str, Any]) -> None:
    """The weights are those of before the step, whatever the precision and accumulation."""
    model = Model()
    failure(model, [batch(3)], **kwargs)
    assert model.net.weight.tolist() == [[1.0, 1.0]]


def test_manual_backward_is_stopped_too() -> None:
    """With manual optimisation through Lightning the weights stay good."""
    model = Model(mode="manual")
    assert "x (2 values, in batch position 3)" in failure(model, [batch(3)]).message
    assert model.net.weight.isfinite().all()


def test_a_backward_pass_behind_lightning_is_seen_after_it() -> None:
    """A module that calls `loss.backward()` itself is stopped at the end of the step."""
    assert fit(Model(mode="plain"), [batch()]).global_step == 2
    assert "x (2 values, in batch position 3)" in failure(Model(mode="plain"), [batch(3)]).message


def test_bad_parameters_are_named() -> None:
    """When the batch is good the parameters that are not are named."""
    model = Model()
    model.net.weight.data[0, 1] = math.inf
    error = failure(model, [batch()])
    assert error.message.endswith("not finite among the parameters: net.weight (1 value)")
    assert error.hint is not None and "learning rate" in error.hint


def test_bad_predictions_are_named() -> None:
    """When batch and parameters are good the samples whose prediction is not are named."""
    x = batch()
    x[[1, 6]] = 3e38
    error = failure(Model(), [(x, {"idx": torch.arange(8) + 100})])
    assert error.message.endswith(
        ": not finite: the prediction (2 values, in samples 101, 106), "
        "though batch and parameters are"
    )


def test_the_loss_is_blamed_when_all_else_is_good() -> None:
    """When nothing else is wrong the hint points to the loss function."""
    error = failure(Model(lambda y: (y - 2).mean() / 0), [batch()])
    assert error.message.endswith("the batch, the parameters and the prediction are finite")
    assert error.hint is not None and "loss function" in error.hint


def test_a_forward_that_fails_is_no_matter() -> None:
    """The message says what is known when the module cannot be called on x alone."""

    class Odd(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.net(batch).mean() * math.nan

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    assert failure(Odd(), [batch()]).message.endswith("the batch and the parameters are finite")


def test_the_bad_parts_of_a_loss_are_named() -> None:
    """Of what the module logged in the step, the values that are not finite are named."""

    class Parts(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            nll, kl = self(batch).mean(), self(batch).mean() * math.nan
            self.log_dict({"loss/train": nll + kl, "nll/train": nll, "kl/train": kl})
            return nll + kl

    assert "the training loss is NaN (of it: kl/train) in" in failure(Parts(), [batch()]).message


def test_the_diagnosis_leaves_the_module_in_training() -> None:
    """Looking at predictions changes neither running statistics nor the mode of any part."""

    class Normed(Model):
        def __init__(self) -> None:
            super().__init__(lambda y: y.mean() * math.nan)
            self.net = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1), nn.Dropout(0.5).eval())

    model = Normed()
    with pytest.warns(UserWarning, match="eval mode"):
        failure(model, [batch()])
    assert [part.training for part in model.net] == [True, True, False]
    assert model.net[1].num_batches_tracked == 1


def test_no_checkpoint_holds_bad_weights(tmp_path: Path) -> None:
    """A finite loss with infinite gradients: the weights it leaves are never saved."""

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    model = Model(lambda y: torch.where(y > 1e30, y, y.sqrt() * 1e30).mean() * 1e-30)
    good, steep = batch(), torch.zeros(8, 2)
    error = failure(model, [good, steep], callbacks=[NanMonitor(), Saving()])
    assert error.message == (
        "the weights are not finite after step 2, so no checkpoint is written of them: "
        "net.weight (2 values), made so by the gradients of step 2"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["1.ckpt"]


def test_it_pickles_without_the_batch() -> None:
    """A spawned process gets a copy without data."""
    monitor = NanMonitor()
    failure(Model(), [batch(0, size=10_000)], callbacks=[monitor])
    assert len(pickle.dumps(monitor)) < 200


def test_losses_of_any_shape_are_checked() -> None:
    """A manual backward pass with a gradient of its own may have many losses."""

    class Many(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            losses = self(batch).flatten()
            self.manual_backward(losses, gradient=torch.ones_like(losses))

    assert fit(Many(mode="manual"), [batch()]).current_epoch == 2
    assert "NaN" in failure(Many(mode="manual"), [batch(1)]).message
