"""Batches that are gathered before metrics are updated: values are those of each batch alone."""

from __future__ import annotations

import io
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassAveragePrecision,
    MulticlassCalibrationError,
    MulticlassCohenKappa,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassHingeLoss,
    MulticlassMatthewsCorrCoef,
    MulticlassPrecisionRecallCurve,
    MulticlassSpecificity,
    MultilabelExactMatch,
    MultilabelRankingLoss,
)

from conftest import Lab
from torch_lab.exact import ExactResume
from torch_lab.metrics import EpochValues
from torch_lab.modules import TrainLabModule
from torch_lab.profiling import NoProfiler
from torch_lab.saving import Point

CLASSES = 5
MULTICLASS = [
    MulticlassAccuracy(CLASSES),
    MulticlassAccuracy(CLASSES, average=None, top_k=2),
    MulticlassF1Score(CLASSES, average="weighted"),
    MulticlassSpecificity(CLASSES, ignore_index=1),
    MulticlassConfusionMatrix(CLASSES, normalize="true"),
    MulticlassCohenKappa(CLASSES),
    MulticlassMatthewsCorrCoef(CLASSES),
    MulticlassAUROC(CLASSES),
    MulticlassAUROC(CLASSES, thresholds=20),
    MulticlassAveragePrecision(CLASSES),
    MulticlassPrecisionRecallCurve(CLASSES, thresholds=7),
    MulticlassCalibrationError(CLASSES),
    MulticlassHingeLoss(CLASSES),
]


def batches(count: int, kind: str = "multiclass") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of logits and labels, the last one smaller."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        size = 3 if number == count - 1 else 8
        if kind == "multilabel":
            y = torch.randint(2, (size, CLASSES), generator=generator)
        else:
            y = torch.randint(CLASSES if kind == "multiclass" else 2, (size,), generator=generator)
        shape = (size,) if kind == "binary" else (size, CLASSES)
        found.append((torch.randn(shape, generator=generator) * 3, y))
    return found


def losses_of(y_pred: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": y_pred.abs().mean(), "other": y.float().mean()}


def gathered(metrics: MetricCollection, given: Any) -> EpochValues:
    values = EpochValues(metrics)
    for y_pred, y in given:
        values.add(losses_of(y_pred, y), len(y), y_pred, y)
    return values


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.filterwarnings("ignore")  # Of classes that are in no batch.
@pytest.mark.parametrize("count", [1, 2, 32, 33, 75])
@pytest.mark.parametrize("metric", MULTICLASS, ids=lambda metric: type(metric).__name__)
def test_values_are_those_of_an_update_with_each_batch(metric: Any, count: int) -> None:
    """To 1e-6, for as many batches as fill what is gathered, and for others."""
    given = batches(count)
    own = gathered(MetricCollection({"metric": metric.clone()}), given).metrics.compute()["metric"]
    for y_pred, y in given:
        metric.update(y_pred, y)
    same(own, metric.compute())
    metric.reset()


@pytest.mark.parametrize(
    ("metric", "kind"),
    [
        (BinaryAUROC(), "binary"),
        (MultilabelExactMatch(CLASSES), "multilabel"),
        (MultilabelRankingLoss(CLASSES), "multilabel"),
    ],
)
def test_other_tasks_too(metric: Any, kind: str) -> None:
    given = batches(40, kind)
    own = gathered(MetricCollection({"metric": metric.clone()}), given).metrics.compute()["metric"]
    for y_pred, y in given:
        metric.update(y_pred, y)
    same(own, metric.compute())


def test_logits_that_look_like_probabilities() -> None:
    """What an update takes a batch for alone, it is taken for among others."""
    probable = (torch.tensor([0.1, 0.3, 0.2]), torch.tensor([1, 1, 0]))
    given = [probable, (torch.tensor([-2.0, 3.0, 1.0]), torch.tensor([1, 1, 0])), probable] * 5
    metric = BinaryAccuracy()
    own = gathered(MetricCollection({"metric": metric.clone()}), given).metrics.compute()["metric"]
    for y_pred, y in given:
        metric.update(y_pred, y)
    same(own, metric.compute())


def test_what_waits_stays_as_it_was() -> None:
    """Also where a buffer is used again."""
    y_pred, y = torch.zeros(4, CLASSES), torch.zeros(4, dtype=torch.long)
    values = EpochValues(MetricCollection({"metric": MulticlassAccuracy(CLASSES, average="micro")}))
    for number in range(6):
        y_pred.zero_()[:, number % 2] = 1
        loss = y_pred.sum() * number
        values.add({"loss": loss}, 4, y_pred, y)
        loss.zero_()
    assert values.metrics.compute()["metric"] == 0.5
    assert values.means()["loss"] == 4 * 2.5


def test_losses_are_means_over_all_samples() -> None:
    given = batches(70)
    values = gathered(MetricCollection({}), given)
    assert values.samples == sum(len(y) for _, y in given)
    total = sum(y_pred.abs().mean(dim=1).sum() for y_pred, _ in given)
    same(values.means()["loss"], total / values.samples)
    same(values.means()["other"], torch.cat([y for _, y in given]).float().mean())


class Counting(MulticlassAccuracy):
    """Counts its updates, and is none of torchmetrics' own."""

    updates = 0

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.updates += 1
        super().update(*args, **kwargs)


def counted(metric: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many samples each of its updates has had."""
    sizes: list[int] = []
    update = metric.update

    def noted(y_pred: Any, y: Any) -> None:
        sizes.append(len(y))
        update(y_pred, y)

    monkeypatch.setattr(metric, "update", noted)
    return sizes


def test_a_metric_is_updated_with_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is counted at once, as it shows what is wrong; then 32 at a time."""
    metric = MulticlassAccuracy(CLASSES)
    sizes = counted(metric, monkeypatch)
    values = EpochValues(MetricCollection({"metric": metric}))
    values._metrics["metric"] = metric
    for y_pred, y in batches(66)[:65]:
        values.add(losses_of(y_pred, y), len(y), y_pred, y)
    assert sizes == [8, 256, 256]


@pytest.mark.parametrize("metric", [Counting(CLASSES), MeanSquaredError()])
def test_others_are_updated_with_each_batch(metric: Any) -> None:
    """Nobody knows whether they look at a batch as a whole."""
    given = [(torch.randn(4, CLASSES), torch.randint(CLASSES, (4,))) for _ in range(5)]
    if isinstance(metric, MeanSquaredError):
        given = [(y_pred, y_pred + 1) for y_pred, _ in given]
    values = gathered(MetricCollection({"metric": metric}), given)
    assert all(batch.y is None for batch in values._waiting)
    assert not isinstance(metric, Counting) or values._metrics["metric"].updates == 5


def test_memory_is_bounded() -> None:
    """Large batches are not gathered for long."""
    values = EpochValues(MetricCollection({"metric": MulticlassAccuracy(1000)}))
    for size in (400, 400, 400, 2000, 400, 400, 400):
        y_pred, y = torch.randn(size, 1000), torch.randint(1000, (size,))
        values.add({"loss": torch.tensor(0.0)}, size, y_pred, y)
        assert values._elements <= 2**20
        assert size == 400 or all(batch.y is None for batch in values._waiting)
    assert values.samples == 4400


def test_what_waits_goes_through_a_checkpoint() -> None:
    """And is counted at the same places as without one, so that sums are the same to the bit."""
    given = batches(75)
    whole = gathered(MetricCollection({"a": MulticlassAUROC(CLASSES)}), given)
    begun = gathered(MetricCollection({"a": MulticlassAUROC(CLASSES)}), given[:50])
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    resumed = EpochValues(begun._metrics)
    resumed.load_state_dict(torch.load(file, weights_only=True), torch.device("cpu"))
    for y_pred, y in given[50:]:
        resumed.add(losses_of(y_pred, y), len(y), y_pred, y)
    assert torch.equal(resumed.metrics.compute()["a"], whole.metrics.compute()["a"])
    for name, mean in whole.means().items():
        assert torch.equal(resumed.means()[name], mean)


class Interrupting(pl.Callback):
    """Reads the metrics in a validation, and then what a checkpoint of that moment would hold."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        counted = pl_module.metrics["train"]["accuracy"]
        assert counted.update_called
        exact = next(each for each in trainer.callbacks if isinstance(each, ExactResume))
        (state,) = exact._state_of_ranks(trainer, pl_module, Point.VALIDATION)
        saved = state["metrics"]["train_metrics.accuracy"]["state"]
        in_states = int(saved["tp"] + saved["fn"])
        waiting = sum(len(batch["y"]) for batch in state["sums"]["waiting"])
        self.seen.append((in_states, waiting))


@pytest.mark.filterwarnings("ignore")  # Of samples that are in both.
def test_what_a_validation_counts_is_not_lost_when_it_is_broken_off(lab: Lab) -> None:
    """The states and what waits are those of one moment, whoever asks for the metrics."""
    import torch_lab

    text = CONFIG.replace("MulticlassAccuracy(3)", 'MulticlassAccuracy(3, average="micro")')
    loader = '"train_dataloaders": DataLoader(TensorDataset(x, y), 16)'
    text = text.replace(
        loader, f'{loader}, "val_dataloaders": DataLoader(TensorDataset(x, y), 100)'
    )
    lab.write("__main__.py", text)
    init = {"max_epochs": 1, "accelerator": "cpu", "val_check_interval": 5}
    lab.hparams("hparams", {"trainer": {"init": init}})
    trainer, module, data = torch_lab.load(lab.path).build(tracking="offline")
    callback = Interrupting()
    trainer.callbacks.append(callback)
    trainer.fit(module, data)
    assert callback.seen == [(16, 64), (16, 64), (80, 80), (80, 80)]


# Against Lightning itself.


class Plain(pl.LightningModule):
    """A module as Lightning's documentation has it."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


CONFIG = """
    import functools

    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from torchmetrics.classification import MulticlassAccuracy

    from torch_lab.modules import TrainLabModule


    class Noting(TrainLabModule):
        losses = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.item())
            return loss


    def train_config(hparams):
        Noting.losses.clear()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(200, 4, generator=generator)
        y = torch.randint(3, (200,), generator=generator)
        torch.manual_seed(5)
        module = Noting(
            torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)),
            torch.nn.CrossEntropyLoss(),
            functools.partial(torch.optim.AdamW, lr=1e-2),
            metrics={"accuracy": MulticlassAccuracy(3)},
        )
        train_config.module = module
        return {"module": module, "train_dataloaders": DataLoader(TensorDataset(x, y), 16)}
    """


@pytest.mark.filterwarnings("ignore")  # Of loaders that there are none of.
def test_losses_are_those_of_plain_lightning(lab: Lab) -> None:
    """To the bit, for the same weights and the same order of batches."""
    import torch_lab

    lab.write("__main__.py", CONFIG)
    init = {"max_epochs": 3, "accelerator": "cpu"}
    lab.hparams("hparams", {"trainer": {"init": init}, "config": {"monitor": "loss/train"}})
    experiment = torch_lab.load(lab.path)
    trainer, module, data = experiment.build(tracking="offline")
    trainer.fit(module, data)
    own = list(type(module).losses)  # type: ignore[attr-defined]

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 4, generator=generator)
    y = torch.randint(3, (200,), generator=generator)
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    plain = Plain(net)
    pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(plain, DataLoader(TensorDataset(x, y), 16))
    assert own == plain.losses and len(own) == 39


def test_a_profiler_of_the_users_is_used(lab: Lab) -> None:
    """Ours notes nothing, and is there only where nobody asked for one."""
    import torch_lab

    lab.hparams("hparams", {"trainer": {"init": {"profiler": "simple"}}})
    trainer, *_ = torch_lab.load(lab.path).build(tracking="offline")
    assert type(trainer.profiler).__name__ == "SimpleProfiler"
    lab.hparams("plain", {})
    trainer, *_ = torch_lab.load(lab.folder / "plain.py").build(tracking="offline")
    assert type(trainer.profiler) is NoProfiler


def test_a_metric_that_fails_says_so() -> None:
    """And a stage is counted when it is asked for itself."""
    module = TrainLabModule(
        torch.nn.Linear(2, 2),
        torch.nn.CrossEntropyLoss(),
        torch.optim.AdamW,
        metrics={"accuracy": MulticlassAccuracy(2)},
    )
    y_pred, y = torch.randn(3, 2), torch.tensor([0, 1, 1])
    for _ in range(3):
        module._epochs["train"].add({"loss": y_pred.sum()}, 3, y_pred, y)
    assert not module.metrics["validate"]["accuracy"].update_called
    assert len(module._epochs["train"]._waiting) == 2
    module._epochs["train"].add({"loss": y_pred.sum()}, 3, y_pred, y + 7)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        module.metrics["train"]


def test_which_hook_is_called_is_noted_as_ever() -> None:
    """`self.log` asks for it; other attributes are torch's business."""
    module = TrainLabModule(
        torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(), torch.optim.AdamW, metrics=None
    )
    module._current_fx_name = "training_step"
    assert module._current_fx_name == "training_step"
    module.extra = torch.nn.Linear(2, 2)
    assert "extra.weight" in dict(module.named_parameters())
