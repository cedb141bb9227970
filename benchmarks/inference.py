"""What predictions to a file cost, against a loop of plain PyTorch that writes the same bytes.

    python benchmarks/inference.py [ROUNDS]

10,000 images through an MLP to CSV. The loop has its data in one tensor and its numbers as text by
way of numpy, for what Python makes of 32-bit numbers has twice as many digits. What is measured of
`infer` is the call of Lightning's `predict`, in one process with its peer and in turn with it; and,
without a goal, whole processes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from harness import PEERS, ROUNDS, Figure, in_turn, python, ratios, show, wall

sys.path.insert(0, str(PEERS))

from inference_data import SAMPLES, images, network

from torch_lab import runner
from torch_lab.experiment import Experiment

GOALS = {64: 2.0, 2_048: 1.4}
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


def raw(model: torch.nn.Module, x: torch.Tensor, size: int, path: Path) -> float:
    """Predict as a plain loop does, and return the seconds that it took."""
    began = time.perf_counter()
    model.eval()
    with path.open("w", encoding="utf-8", newline="") as file, torch.inference_mode():
        file.write(",".join(["idx", *(f"out_{place}" for place in range(10))]) + "\n")
        for start in range(0, len(x), size):
            rows = model(x[start : start + size]).numpy().astype(str).tolist()
            lines = (f"{idx},{','.join(row)}\n" for idx, row in enumerate(rows, start))
            file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


class Inference:
    """An experiment that predicts, in this process."""

    def __init__(self, root: Path) -> None:
        folder = root / "toys" / "experiments" / "00_toy"
        folder.mkdir(parents=True)
        (root / "pyproject.toml").touch()
        (folder / "__main__.py").write_text(CONFIG, encoding="utf-8")
        self.script = folder / "hparams.py"
        self.script.write_text("hparams = {}\n", encoding="utf-8")

    def seconds(self, size: int, path: Path) -> float:
        """Return how long the trainer predicts."""
        predict, took = pl.Trainer.predict, []

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return predict(*arguments, **options)
            finally:
                took.append(time.perf_counter() - began)

        pl.Trainer.predict = timed  # type: ignore[method-assign]
        try:
            with (
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                experiment = Experiment.load(self.script)
                runner.infer(experiment, str(size), str(path), tracking="offline")
        finally:
            pl.Trainer.predict = predict  # type: ignore[method-assign]
        return took[0]


def of_size(root: Path, inference: Inference, size: int, rounds: int) -> list[Figure]:
    """Return the figures of a batch size."""
    own, other = root / f"own-{size}.csv", root / f"raw-{size}.csv"
    model, x = network(), torch.from_numpy(images())
    predicted = {
        "infer": lambda: inference.seconds(size, own),
        "raw": lambda: raw(model, x, size, other),
    }
    in_turn(predicted, 2)  # What is imported and allocated once.
    if own.read_bytes() != other.read_bytes():
        raise RuntimeError("the two files differ")
    found = in_turn(predicted, rounds)
    infer = [sys.executable, "-m", "torch_lab", "infer", inference.script, str(size), own]
    processes = {
        "infer": lambda: wall([*infer], cwd=root),
        "raw": lambda: wall(python("inference_raw.py", size, str(other)), cwd=root),
    }
    whole = in_turn(processes, max(3, rounds // 3))
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS)
    show(figures(parser.parse_args().rounds))
