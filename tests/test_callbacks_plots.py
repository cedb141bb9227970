"""Which metrics `MetricPlots` draws, and where to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryConfusionMatrix,
    BinaryPrecisionRecallCurve,
    BinaryROC,
    MulticlassRecall,
)
from torchmetrics.wrappers import ClasswiseWrapper

from torch_lab.callbacks import MetricPlots
from torch_lab.metrics import MetricWrapper, PooledMean

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    # torchmetrics hands tensors to matplotlib.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

STAGES = ("train", "validate", "test")


@pytest.fixture(autouse=True)
def _no_figures() -> None:
    """Begin without the figures that tests of other files have left open."""
    plt.close("all")


class Classifier(pl.LightningModule):
    """Says class 1 for positive numbers, with metrics for every stage."""

    def __init__(self, metrics: dict[str, Metric | MetricCollection] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.metrics: Any = {stage: MetricCollection(metrics or {}).clone() for stage in STAGES}
        self.values: dict[str, Any] = {}

    def step(self, stage: str, batch: list[Tensor]) -> Tensor:
        x, y = batch
        self.metrics[stage].update(torch.sigmoid(x.detach()), y)
        return (self.weight * x).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.step("train", batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.step("validate", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.step("test", batch)

    def on_validation_epoch_start(self) -> None:
        self.metrics["validate"].reset()

    def on_validation_epoch_end(self) -> None:
        self.values = self.metrics["validate"].compute()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class OwnPlot(BinaryAccuracy):
    """A scalar with a figure of its own."""

    figure: Any = None

    def plot(self) -> Any:
        return self.figure or plt.figure()


class Plotly:
    """What is used of a plotly figure."""

    def __init__(self, can_draw: bool) -> None:
        self.can_draw = can_draw

    def write_image(self, file: Path, format: str) -> None:
        if not self.can_draw:
            raise ValueError("needs kaleido")
        file.write_text("image", encoding="utf-8")

    def write_html(self, file: Path, include_plotlyjs: str) -> None:
        file.write_text(f"page, script in the {include_plotlyjs}", encoding="utf-8")


def loader() -> DataLoader[Any]:
    x = torch.tensor([-2.0, 1.0, 2.0, -1.0])
    return DataLoader(TensorDataset(x, (x > 1).long()), batch_size=2)


def trainer(folder: Any, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [MetricPlots(folder)],
        }
        | kwargs
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_metrics_that_are_more_than_a_number_are_drawn(tmp_path: Path) -> None:
    """Each epoch of each stage leaves a PNG per matrix or curve, and none of a scalar."""
    model = Classifier(
        {
            "accuracy": BinaryAccuracy(),
            "confusion": BinaryConfusionMatrix(),
            "roc": BinaryROC(thresholds=3),
            "pr curve/2": BinaryPrecisionRecallCurve(thresholds=3),
        }
    )
    run = trainer(tmp_path / "plots")
    run.validate(model, loader(), verbose=False)
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    epochs = ["train-epoch_1", "train-epoch_2", "test-epoch_2"]
    epochs += [f"validate-epoch_{n}" for n in (0, 1, 2)]
    assert files(tmp_path / "plots") == {
        f"{metric}-{epoch}.png" for metric in ("confusion", "roc", "pr_curve_2") for epoch in epochs
    }
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "plots").iterdir())


def test_the_module_still_gets_its_values(tmp_path: Path) -> None:
    """Drawing changes no metric: the module computes them afterwards."""
    model = Classifier({"accuracy": BinaryAccuracy(), "confusion": BinaryConfusionMatrix()})
    trainer(tmp_path, num_sanity_val_steps=0).fit(model, loader(), loader())
    assert model.values["accuracy"] == 0.75
    assert model.values["confusion"].tolist() == [[2, 1], [0, 1]]


def test_a_plot_of_ones_own_is_always_drawn(tmp_path: Path) -> None:
    """A metric whose author gave it a plot is drawn even if its value is a scalar."""
    trainer(tmp_path).validate(Classifier({"own": OwnPlot()}), loader(), verbose=False)
    assert files(tmp_path) == {"own-validate-epoch_0.png"}


def test_wrapped_metrics_are_drawn_as_what_they_hold(tmp_path: Path) -> None:
    """A wrapper is drawn if the wrapped metric would be, a collection member by member."""

    def same(y_pred: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return y_pred, y

    class Titled(MetricWrapper):
        def plot(self, *args: Any, **kwargs: Any) -> Any:
            return plt.figure()

    inner = MetricCollection({"matrix": BinaryConfusionMatrix(), "f": BinaryAccuracy()})
    metrics: dict[str, Any] = {
        "mean": PooledMean(lambda y_pred, y: y_pred - y),
        "plain": MetricWrapper(same, BinaryAccuracy()),
        "wrapped": MetricWrapper(same, BinaryConfusionMatrix()),
        "several": MetricWrapper(same, inner),
        "titled": Titled(same, BinaryAccuracy()),
        "classes": MetricWrapper(
            lambda y_pred, y: ((y_pred > 0.5).int(), y),
            ClasswiseWrapper(MulticlassRecall(2, average=None)),
        ),
    }
    trainer(tmp_path).validate(Classifier(metrics), loader(), verbose=False)
    assert files(tmp_path) == {
        f"{name}-validate-epoch_0.png" for name in ("wrapped", "matrix", "titled", "classes")
    }


@pytest.mark.parametrize(("can_draw", "file"), [(True, "png"), (False, "html")])
def test_plotly_figures_are_images_or_pages(tmp_path: Path, can_draw: bool, file: str) -> None:
    """A plotly figure is a PNG where plotly can make one, and else a page."""
    model = Classifier({"own": OwnPlot()})
    for stage in STAGES:
        model.metrics[stage]["own"].figure = Plotly(can_draw)
    trainer(tmp_path).validate(model, loader(), verbose=False)
    text = (tmp_path / f"own-validate-epoch_0.{file}").read_text(encoding="utf-8")
    assert text == ("image" if can_draw else "page, script in the directory")
    assert len(files(tmp_path)) == 1


def test_a_failing_plot_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It names the metric, leaves nothing behind, and the other plots are drawn."""

    class Broken(BinaryAccuracy):
        def plot(self) -> Any:
            plt.figure()
            raise RuntimeError("no axes")

    class Odd(BinaryAccuracy):
        def plot(self) -> Any:
            return None

    metrics = {"bad": Broken(), "odd": Odd(), "matrix": BinaryConfusionMatrix()}
    with caplog.at_level(logging.WARNING, "torch_lab"):
        run = trainer(tmp_path, max_epochs=1)
        run.fit(Classifier(metrics), loader())
    assert run.global_step == 2
    assert caplog.messages[0] == "no plot of metric 'bad' (train): RuntimeError: no axes"
    assert caplog.messages[1].startswith("no plot of metric 'odd' (train): ")
    assert files(tmp_path) == {"matrix-train-epoch_1.png"}
    assert plt.get_fignums() == []


def test_figures_and_backend_of_the_user_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing needs no display, closes its own figures alone, and puts the backend back."""
    monkeypatch.delenv("DISPLAY", raising=False)
    before = matplotlib.get_backend()
    plt.switch_backend("svg")
    mine = plt.figure()
    try:
        model = Classifier({"confusion": BinaryConfusionMatrix()})
        trainer(tmp_path).validate(model, loader(), verbose=False)
        assert matplotlib.get_backend() == "svg"
        assert plt.get_fignums() == [mine.number]
    finally:
        plt.close(mine)
        plt.switch_backend(before)


def test_the_folder_may_be_known_late(tmp_path: Path) -> None:
    """A function as folder is called when there is something to save, and only then."""
    calls: list[Path] = []

    def folder() -> Path:
        calls.append(tmp_path)
        return tmp_path

    trainer(folder).validate(Classifier({"a": BinaryAccuracy()}), loader(), verbose=False)
    assert calls == []
    model = Classifier({"confusion": BinaryConfusionMatrix()})
    trainer(folder).validate(model, loader(), verbose=False)
    assert files(tmp_path) == {"confusion-validate-epoch_0.png"}


@pytest.mark.parametrize("metrics", [None, {}, {"validate": BinaryConfusionMatrix()}, 5])
def test_other_modules_are_left_alone(tmp_path: Path, metrics: Any) -> None:
    """A module whose `metrics` are missing or something else trains as without the callback."""
    model = Classifier()
    model.step = lambda stage, batch: (model.weight * batch[0]).mean()  # type: ignore[method-assign]
    model.on_validation_epoch_start = lambda: None  # type: ignore[method-assign]
    model.on_validation_epoch_end = lambda: None  # type: ignore[method-assign]
    model.metrics = metrics
    trainer(tmp_path).fit(model, loader(), loader())
    assert files(tmp_path) == set()


def test_metrics_without_data_are_not_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A metric that the stage never updated is passed over without a word."""
    model = Classifier({"confusion": BinaryConfusionMatrix()})
    model.step = lambda stage, batch: (model.weight * batch[0]).mean()  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=1).fit(model, loader())
    assert files(tmp_path) == set()
    assert "no plot" not in caplog.text
