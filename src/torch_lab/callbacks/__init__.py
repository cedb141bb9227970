"""Callbacks for the trainer: progress, a NaN watch, files of predictions, figures of metrics."""

from __future__ import annotations

from torch_lab.callbacks.nan_monitor import NanMonitor
from torch_lab.callbacks.plots import MetricPlots
from torch_lab.callbacks.progress import EpochProgress
from torch_lab.callbacks.writers import CsvWriter, JsonLinesWriter, NpzWriter, PredictionWriter

__all__ = [
    "CsvWriter",
    "EpochProgress",
    "JsonLinesWriter",
    "MetricPlots",
    "NanMonitor",
    "NpzWriter",
    "PredictionWriter",
]
