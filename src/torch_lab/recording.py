"""Metrics of a run, written to its folder as TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from torch_lab.runs import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MetricsLogger"]


class MetricsLogger(Logger):
    """Writes what is logged to `metrics/` in the run folder; on other ranks than zero, nothing."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.first_step = 0
        """Step of the baseline validation; Lightning takes it for 0 when a run goes on."""
        self._writer: SummaryWriter | None = None

    @property
    def name(self) -> str:
        """A folder of the run for what callbacks of Lightning write by themselves."""
        return "lightning"

    @property
    def version(self) -> str:
        """Empty: the run has its version already."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.run.folder)

    @property
    def log_dir(self) -> str:
        """The folder of the event files."""
        return str(self.run.metrics_folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The TensorBoard writer, for figures, images and text of your own."""
        if self._writer is None:
            # Importing it costs 0.2 s, which a run that ends in an early error need not pay.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.run.metrics_folder)
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars at `step`."""
        writer = self.experiment
        for name, value in metrics.items():
            number = value.item() if isinstance(value, torch.Tensor) else value
            writer.add_scalar(name, number, self.first_step + (step or 0))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the hparams are in `run.json`, with their types."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_writer": None}
