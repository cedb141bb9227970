"""What predictions to a file cost, against a loop of plain PyTorch that writes the same bytes.

    python benchmarks/inference.py [ROUNDS]

10,000 images through an MLP to CSV. The loop has its data in one tensor and its numbers as text by
way of numpy, for what Python makes of 32-bit numbers has twice as many digits. What is measured of
`infer` is the call of Lightning's `predict`, in one process with its peer and in turn with it; and,
without a goal, whole processes.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from harness import (
    PEERS,
    ROUNDS,
    Figure,
    asked_rounds,
    in_turn,
    python,
    ratios,
    show,
    timed,
    toy_project,
    wall,
)

sys.path.insert(0, str(PEERS))

from inference_data import SAMPLES, images, network
from inference_raw import predict

from torch_lab import runner
from torch_lab.experiment import Experiment

GOALS = {64: 2.0, 2_048: 1.4}
WHOLE_ROUNDS = 7
CONFIG = """
from inference_data import images, network
from torch.utils.data import DataLoader

from torch_lab.callbacks import CsvWriter
from torch_lab.datasets import ArrayDataset
from torch_lab.modules import LabModule


def infer_config(hparams, size, path):
    return {
        "module": LabModule(network()),
        "predict_dataloaders": DataLoader(ArrayDataset(images()), batch_size=int(size)),
        "callbacks": [CsvWriter(path)],
    }
"""


class Inference:
    """An experiment that predicts, in this process."""

    def __init__(self, root: Path) -> None:
        self.script = toy_project(root, CONFIG, {})

    def seconds(self, size: int, path: Path) -> float:
        """Return how long the trainer predicts."""
        own, took = pl.Trainer.predict, []

        def measured(*arguments: Any, **options: Any) -> None:
            took.append(timed(lambda: own(*arguments, **options)))

        with (
            mock.patch.object(pl.Trainer, "predict", measured),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            experiment = Experiment.load(self.script)
            runner.infer(experiment, str(size), str(path), tracking="offline")
        return took[0]


def of_size(root: Path, inference: Inference, size: int, rounds: int) -> list[Figure]:
    """Return the figures of a batch size."""
    own, other = root / f"own-{size}.csv", root / f"raw-{size}.csv"
    model, x = network(), torch.from_numpy(images())
    predicted = {
        "infer": lambda: inference.seconds(size, own),
        "raw": lambda: timed(lambda: predict(model, x, size, other)),
    }
    in_turn(predicted, 2)  # What is imported and allocated once.
    if own.read_bytes() != other.read_bytes():
        raise RuntimeError("the two files differ")
    found = in_turn(predicted, rounds)
    infer = [sys.executable, "-m", "torch_lab", "infer", inference.script, str(size), own]
    processes = {
        "infer": lambda: wall(infer, cwd=root),
        "raw": lambda: wall(python("inference_raw.py", size, str(other)), cwd=root),
    }
    whole = in_turn(processes, min(rounds, WHOLE_ROUNDS))
    name = f"{SAMPLES:,} images to CSV, batch {size:,}"
    return [
        Figure("10", name, "raw loop", ratios(found, "infer", "raw"), at_most=GOALS[size]),
        Figure("", f"{name}, whole process", "raw loop", ratios(whole, "infer", "raw")),
    ]


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Measure."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inference = Inference(root)
        return [each for size in GOALS for each in of_size(root, inference, size, rounds)]


if __name__ == "__main__":
    show(figures(asked_rounds(__doc__)))
