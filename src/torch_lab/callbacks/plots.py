"""Figures of the metrics that are more than a number, one file each per epoch."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torchmetrics import Metric, MetricCollection

from torch_lab.files import beside, publish
from torch_lab.metrics import MetricWrapper

__all__ = ["MetricPlots"]

log = logging.getLogger("torch_lab")


class MetricPlots(pl.Callback):
    """Saves `metric.plot()` at the end of each epoch, of the metrics that are more than a number.

    These are the metrics in `pl_module.metrics[stage]`, a `MetricCollection`, whose value is not a
    scalar (a confusion matrix, a ROC curve), and those whose class has a `plot` of its own. Other
    modules are left alone. A matplotlib figure is saved as
    `<folder>/<metric>-<stage>-epoch_<n>.png`, and so is a plotly figure, or as `.html` where plotly
    cannot make images. `n` counts the epochs trained: 0 is a validation before the first. No window
    is opened. All ranks compute, rank zero saves.

    A plot that fails is a warning in the log of `torch_lab`, and never ends the training.

    Args:
        folder: Where the files go, or a function that returns it, called when there is a figure.
    """

    def __init__(self, folder: str | Path | Callable[[], str | Path]) -> None:
        self._folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._plot(trainer, pl_module, "train")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._plot(trainer, pl_module, "validate")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._plot(trainer, pl_module, "test")

    def _plot(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        epoch = trainer.current_epoch + (trainer.state.fn == "fit")
        for name, metric in _collected(module, stage):
            try:
                if _is_plotted(metric) and trainer.is_global_zero:
                    stem = re.sub(r"[^\w.-]+", "_", f"{name}-{stage}-epoch_{epoch}")
                    self._save(metric, stem)
            except Exception as error:
                log.warning(
                    "no plot of metric %r (%s): %s: %s", name, stage, type(error).__name__, error
                )

    def _save(self, metric: Metric, stem: str) -> None:
        folder = Path(self._folder() if callable(self._folder) else self._folder)
        with _without_window():
            figure = _figure(metric.plot())
            folder.mkdir(parents=True, exist_ok=True)
            _save_figure(figure, folder / f"{stem}.png")


def _collected(module: pl.LightningModule, stage: str) -> list[tuple[str, Metric]]:
    """Return the metrics of `stage` that have seen data."""
    stages: Any = getattr(module, "metrics", None)
    try:
        collection = stages[stage]
    except (KeyError, TypeError, IndexError):
        return []
    if not isinstance(collection, MetricCollection):
        return []
    return [(name, metric) for name, metric in _members(collection) if _has_data(metric)]


def _members(collection: MetricCollection) -> Iterator[tuple[str, Metric]]:
    for name, metric in collection.items(keep_base=True, copy_state=False):
        yield from _unwrapped(name, metric)


def _unwrapped(name: str, metric: Metric) -> Iterator[tuple[str, Metric]]:
    """Yield what a wrapper holds, as it plots as that does; of a collection each member."""
    inner = metric.metric if isinstance(metric, MetricWrapper) else None
    if inner is None or _has_own_plot(metric):
        yield name, metric
    elif isinstance(inner, MetricCollection):
        yield from _members(inner)
    else:
        yield from _unwrapped(name, inner)


def _has_data(metric: Metric) -> bool:
    # A wrapper does not count its own updates.
    return any(part.update_called for part in metric.modules() if isinstance(part, Metric))


def _is_plotted(metric: Metric) -> bool:
    # Computed on all ranks, and kept in the metric for the module's own call.
    value = metric.compute()
    return _has_own_plot(metric) or not _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (
        isinstance(value, torch.Tensor) and value.numel() == 1
    )


def _has_own_plot(metric: Metric) -> bool:
    """Tell whether the metric was given a `plot` by its author."""
    return type(metric).plot.__module__.split(".")[0] not in ("torchmetrics", "torch_lab")


def _figure(plotted: Any) -> Any:
    """Return the figure of what `plot` gave: one, or (figure, axes)."""
    return plotted[0] if isinstance(plotted, tuple) else plotted


def _save_figure(figure: Any, path: Path) -> None:
    written = beside(path, "new")
    try:
        if hasattr(figure, "savefig"):
            figure.savefig(written, format="png", bbox_inches="tight")
        else:
            path = _save_plotly(figure, written, path)
        publish(written, path)
    finally:
        written.unlink(missing_ok=True)


def _save_plotly(figure: Any, written: Path, path: Path) -> Path:
    """Save a plotly figure and return its final path, of an image if plotly can make one."""
    try:
        figure.write_image(written, format="png")
    except Exception:
        # Images need kaleido and a browser. One plotly.min.js serves all pages of a folder.
        figure.write_html(written, include_plotlyjs="directory")
        return path.with_suffix(".html")
    return path


@contextmanager
def _without_window() -> Iterator[None]:
    """Draw without a display, and close the figures that were opened."""
    import matplotlib
    import matplotlib.pyplot as plt

    backend, before = matplotlib.get_backend(), set(plt.get_fignums())
    plt.switch_backend("agg")
    try:
        yield
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)
        plt.switch_backend(backend)
