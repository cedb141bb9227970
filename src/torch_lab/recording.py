"""Metrics of a run, written to its folder as TensorBoard event files.

A checkpoint records how long these files are (`MetricsLogger.mark`); who goes on from it cuts them
back to that first (`cut_back`), so that every step is in them once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from torch_lab.errors import CheckpointError
from torch_lab.event_reader import event_files
from torch_lab.files import sync
from torch_lab.runs import Run
from torch_lab.utils import shown

if TYPE_CHECKING:
    from torch_lab.event_files import EventWriter

__all__ = ["MetricsLogger", "cut_back"]


class MetricsLogger(Logger):
    """Writes what is logged to `metrics/` in the run folder; on other ranks than zero, nothing."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.first_step = 0
        """Step of the baseline validation; Lightning takes it for 0 when a run goes on."""
        self._writer: EventWriter | None = None
        self._owner = 0

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
    def experiment(self) -> EventWriter:
        """A `SummaryWriter` of TensorBoard, for figures, images and text of your own."""
        # A process that was forked from the one with the writer begins a file of its own.
        if self._writer is None or self._owner != os.getpid():
            # Importing it costs 0.2 s, which a run that ends in an early error need not pay.
            from torch_lab.event_files import EventWriter

            self._writer, self._owner = EventWriter(self.run.metrics_folder), os.getpid()
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars at `step`."""
        values = {name: float(value) for name, value in metrics.items()}
        if values:
            self.experiment.add_values(values, self.first_step + (step or 0))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the hparams are in `run.json`, with their types."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.flush()

    def mark(self) -> dict[str, int] | None:
        """Return how long each event file is, once all that was logged is safe on the disk.

        Returns:
            Bytes by paths below `metrics/`; nothing on other ranks than zero. None if what was
            logged cannot be written now: a checkpoint would claim what is not there.
        """
        if getattr(rank_zero_only, "rank", 0):
            return {}
        if self._writer is not None and not self._writer.save():
            return None
        try:
            files = event_files(self.run.metrics_folder)
            return {name: path.stat().st_size for name, path in files}
        except OSError:
            return None

    def close(self) -> None:
        """Write what is still in memory, unless the run was removed."""
        if self._writer is not None and self.run.folder.is_dir():
            self._writer.close()
        self._writer = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_writer": None}


def cut_back(folder: Path, marks: Mapping[str, int]) -> None:
    """Make the event files in `folder` what they were when a checkpoint was written.

    Args:
        folder: The metrics folder of a run that nobody writes to.
        marks: What `MetricsLogger.mark` returned; without any, all event files are removed.

    Raises:
        CheckpointError: A file is not there, or shorter than it was; then nothing is changed.
    """
    there = dict(event_files(folder))
    for name, size in marks.items():
        if name not in there or there[name].stat().st_size < size:
            problem = "is shorter than" if name in there else "is not there any more, as"
            raise CheckpointError(f"{shown(folder / name)} {problem} the checkpoint recorded it")
    for name, path in there.items():
        if name in marks:
            os.truncate(path, marks[name])
            sync(path)
        else:
            path.unlink()
