"""How much memory a training takes, against plain Lightning on the same data.

    python benchmarks/memory.py [ROUNDS]

60,000 images of 28 x 28 32-bit numbers, an MLP, batches of 64, in this process or made by two
workers. What is measured is the peak of the whole tree of processes, sampled 20 times a second: the
proportional set size, so that what several of them share counts once. Ours logs accuracy and F1 as
well, and has all on that is on by default; Lightning logs the loss to TensorBoard, and writes its
checkpoints.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from harness import ENVIRONMENT, ROUNDS, Figure, in_turn, python, ratios, show

GOAL = 1.05
STEPS = 400
SECONDS_BETWEEN_SAMPLES = 0.05
CONFIG = """
import functools

import torch
from memory_data import images, labels, network
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from torch_lab.datasets import ArrayDataset
from torch_lab.modules import TrainLabModule


def train_config(hparams):
    module = TrainLabModule(
        network(),
        torch.nn.CrossEntropyLoss(),
        functools.partial(torch.optim.AdamW, lr=1e-3),
        metrics={"accuracy": MulticlassAccuracy(10), "f1": MulticlassF1Score(10)},
    )
    data = ArrayDataset(images(), labels())
    workers = hparams["config"]["num_workers"]
    loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=workers)
    return {"module": module, "train_dataloaders": loader}
"""


def script(root: Path, workers: int) -> Path:
    """Write an hparams script, and return its path."""
    folder = root / "toys" / "experiments" / "00_toy"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "pyproject.toml").touch()
    (folder / "__main__.py").write_text(CONFIG, encoding="utf-8")
    init = {"max_steps": STEPS, "accelerator": "cpu", "enable_progress_bar": False}
    config = {"num_workers": workers, "monitor": "loss/train"}
    hparams = {"trainer": {"init": init}, "config": config}
    path = folder / f"workers_{workers}.py"
    path.write_text(f"hparams = {hparams!r}\n", encoding="utf-8")
    return path


def held(process: psutil.Process) -> int:
    """Return the bytes that a process and those below it hold in memory now."""
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            total += _proportional(each.pid)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return 0  # One of them has ended meanwhile: the next sample tells.
    return total


def _proportional(pid: int) -> int:
    # As `psutil.Process.memory_full_info` has it, which reads a hundred times as much.
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))


def peak(command: Sequence[str | Path], folder: Path) -> float:
    """Return the most bytes that a command and its children held at once."""
    found = 0
    words = [str(word) for word in command]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, **silent) as process:
        observed = psutil.Process(process.pid)
        while process.poll() is None:
            found = max(found, held(observed))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return float(found)


def with_workers(workers: int, root: Path, rounds: int) -> Figure:
    """Return the figure for so many workers."""
    train = [sys.executable, "-m", "torch_lab", "train", script(root, workers), "--offline"]
    other = python("memory_lightning.py", workers, STEPS, str(root / "lightning"))
    measures: dict[str, Callable[[], float]] = {
        "ours": lambda: peak(train, root),
        "lightning": lambda: peak(other, root),
    }
    found = in_turn(measures, rounds)
    name = f"peak of all processes, 60,000 images, {workers} workers"
    return Figure("9", name, "plain Lightning", ratios(found, "ours", "lightning"), at_most=GOAL)


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Measure."""
    with tempfile.TemporaryDirectory() as folder:
        return [with_workers(workers, Path(folder), rounds) for workers in (0, 2)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS)
    show(figures(parser.parse_args().rounds))
