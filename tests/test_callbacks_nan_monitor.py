"""What `NanMonitor` stops, and what it says."""

from __future__ import annotations

import copy
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

from torch_lab.callbacks import NanMonitor, nan_monitor
from torch_lab.callbacks.waiting import Look, Losses
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
    assert len(pickle.dumps(monitor)) < 400


def test_losses_of_any_shape_are_checked() -> None:
    """A manual backward pass with a gradient of its own may have many losses."""

    class Many(Model):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            losses = self(batch).flatten()
            self.manual_backward(losses, gradient=torch.ones_like(losses))

    assert fit(Many(mode="manual"), [batch()]).current_epoch == 2
    assert "NaN" in failure(Many(mode="manual"), [batch(1)]).message


# Where to read a number would wait for the device.


@pytest.fixture
def device_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU treated as a device that is waited for."""
    monkeypatch.setattr(nan_monitor, "waits_for", lambda device: True)


LATER = pytest.mark.usefixtures("device_waits")


def numbered(*bad: int, count: int = 60) -> list[Batch]:
    """Return batches of two samples, of which those in the `bad` ones, from 1, are NaN."""
    return [
        (
            batch(*([0, 1] if number in bad else []), size=2),
            {"idx": torch.tensor([10 * number, 10 * number + 1])},
        )
        for number in range(1, count + 1)
    ]


class Shallow(Model):
    """One that many steps leave finite."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


TOLD = "the training loss is NaN in step 37, epoch 1 (samples 370, 371): "
GONE = "so the weights may no longer be those of before it"


@LATER
@pytest.mark.parametrize(
    ("kwargs", "step"),
    [
        ({}, 49),
        ({"precision": "bf16-mixed"}, 49),
        ({"precision": "bf16-true"}, 49),
        ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, 49),
        ({"log_every_n_steps": 40}, 39),
        ({"log_every_n_steps": 1000}, 49),
        ({"log_every_n_steps": 0}, 49),
        ({"max_steps": 37}, 37),
        ({"limit_train_batches": 38}, 38),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_step_is_named_later(kwargs: dict[str, Any], step: int) -> None:
    """With its samples, and after which step it was noticed: one that is logged, or the last."""
    error = failure(Shallow(), numbered(37, 39, 45), **kwargs)
    assert error.message == f"{TOLD}noticed after step {step}, {GONE}"
    assert error.hint is not None and "detect_anomaly" in error.hint


@LATER
@pytest.mark.parametrize("mode", ["manual", "plain"])
def test_a_module_that_optimises_by_itself_is_looked_at_later(mode: str) -> None:
    """Whether its backward pass is Lightning's or its own."""
    model = Shallow(mode=mode)
    assert failure(model, numbered(37)).message.startswith(f"{TOLD}noticed after step ")
    assert fit(Shallow(mode=mode), numbered()).global_step == 120


@LATER
@pytest.mark.parametrize("kwargs", [{"log_every_n_steps": 1}, {"detect_anomaly": True}])
def test_what_is_looked_at_at_once_is_told_in_full(kwargs: dict[str, Any]) -> None:
    """The step that is logged, and any under `detect_anomaly`: the weights are not touched."""
    model = Model()
    error = failure(model, numbered(1), **kwargs)
    assert error.message.endswith("not finite in the batch: x (4 values, in samples 10, 11)")
    assert model.net.weight.tolist() == [[1.0, 1.0]]


@LATER
def test_within_an_accumulation_it_may_be_in_time() -> None:
    """The batch is gone, the weights are still those of before its step."""
    model, every = Shallow(), {"accumulate_grad_batches": 4, "log_every_n_steps": 1}
    error = failure(model, numbered(38), **every)
    assert error.message == (
        "the training loss is NaN in step 10, epoch 1 (samples 380, 381): noticed before that "
        "step was made, so the weights are those of before it"
    )
    assert model.net.weight.isfinite().all()
    told = failure(Shallow(), numbered(38), accumulate_grad_batches=4).message
    assert "in step 10, epoch 1 (samples 380, 381): noticed after step 12, " in told


@LATER
@pytest.mark.parametrize("how", ["full", "weights_only", "state_dict"])
def test_nobody_takes_the_weights_after_a_nan(tmp_path: Path, how: str) -> None:
    """Neither a checkpoint of any kind, nor what a callback writes by itself."""

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step in (36, 37):
                path = tmp_path / f"{trainer.global_step}.ckpt"
                if how == "state_dict":
                    torch.save(module.state_dict(), path)
                else:
                    trainer.save_checkpoint(path, weights_only=how == "weights_only")

    model = Shallow()
    error = failure(model, numbered(37), callbacks=[NanMonitor(), Saving()])
    assert error.message == f"{TOLD}noticed after step 37, {GONE}"
    assert [path.name for path in tmp_path.iterdir()] == ["36.ckpt"]
    model.state_dict()
    assert not model._state_dict_pre_hooks


@LATER
def test_losses_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the trainer logs, at the ends of epochs, and after 50 at most."""
    looked: list[int] = []
    first_bad = Losses.first_bad

    def noted(self: Losses) -> Any:
        looked.extend([len(self)] * (len(self) > 0))
        return first_bad(self)

    monkeypatch.setattr(Losses, "first_bad", noted)
    fit(Shallow(), numbered(count=70), log_every_n_steps=30)
    assert looked == [30, 30, 10, 20, 30, 20]
    looked.clear()
    fit(Shallow(), numbered(count=70), log_every_n_steps=1000, max_epochs=1)
    assert looked == [50, 20]


class Validated(Shallow):
    """It returns the loss of a validation, or logs it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = self(batch[0]).mean()
        if self.how == "infinite":
            loss = loss + math.inf
        if self.how != "returned":
            self.log("loss/own", loss)
        return loss if self.how == "returned" else None


@LATER
@pytest.mark.parametrize("how", ["returned", "logged"])
def test_a_validation_is_looked_at_at_its_end(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all of its batches; the samples of the first are named."""
    looked: list[int] = []
    first_bad = Losses.first_bad
    monkeypatch.setattr(
        Losses, "first_bad", lambda self: (looked.append(len(self)), first_bad(self))[1]
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[NanMonitor()])
    with pytest.raises(NonFiniteError) as caught:
        trainer.validate(Validated(how), DataLoader(numbered(3, count=9), batch_size=None))
    assert caught.value.message == (
        "the validation loss is NaN before the first step: in a batch (samples 30, 31); "
        "the parameters are finite"
    )
    assert [count for count in looked if count] == [9]


@LATER
def test_an_infinite_sum_of_a_validation_ends_nothing() -> None:
    """As on a CPU."""
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[NanMonitor()]
    )
    trainer.validate(Validated("infinite"), DataLoader(numbered(count=2), batch_size=None))


@LATER
def test_bad_parameters_are_named_after_a_validation() -> None:
    """They are still those that it was made with."""
    model = Validated("returned")
    model.net.weight.data[0, 1] = math.inf
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[NanMonitor()])
    with pytest.raises(
        NonFiniteError, match=r"is infinite .*, not finite among the parameters: net"
    ):
        trainer.validate(model, DataLoader(numbered(count=2), batch_size=None))


@LATER
def test_another_error_does_not_hide_it(caplog: pytest.LogCaptureFixture) -> None:
    """An error of somebody else may follow from it: both are told."""

    class Failing(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 38:
                raise ArithmeticError("enough")

    with pytest.raises(ArithmeticError, match="enough"):
        fit(Shallow(), numbered(37), callbacks=[NanMonitor(), Failing()])
    assert f"{TOLD}noticed after step 38, {GONE}" in caplog.text


@LATER
def test_losses_of_any_kind_are_kept() -> None:
    """Many at once, none, and such that are changed in place later."""

    class Odd(Shallow):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            losses = self(batch[0]).flatten()
            self.manual_backward(losses, gradient=torch.ones_like(losses))
            none = torch.empty(0, requires_grad=True)
            self.manual_backward(none, gradient=torch.empty(0))
            losses.detach().zero_()

    assert fit(Odd(mode="manual"), numbered()).current_epoch == 2
    message = failure(Odd(mode="manual"), numbered(37)).message
    assert "the training loss is NaN in step 1, epoch 1 (samples 370, 371)" in message


def test_a_copy_of_a_module_does_not_look() -> None:
    """What an average of weights is made of has no training of its own."""
    module = nn.Linear(2, 2)
    look = Look(lambda: pytest.fail("looked"))
    module.register_state_dict_pre_hook(look)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        copied.state_dict()
    with pytest.raises(pytest.fail.Exception):
        module.state_dict()
