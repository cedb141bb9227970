"""How much memory trainings take, against plain Lightning's; and predictions of many more rows.

    python benchmarks/memory.py [ROUNDS]

A training has 60,000 images of 28 x 28 32-bit numbers, an MLP, batches of 64, in one process or
made by two workers. Ours logs accuracy and F1 as well, and has all on that is on by default;
Lightning logs the loss to TensorBoard, and writes its checkpoints. Predictions are those of `infer`
to CSV, of rows of eight numbers that take no memory themselves. What is measured is the peak of the
whole tree of processes, sampled ten times a second, so that what several of them share counts once;
and files that they map, as libraries are, in full, whoever else has them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from harness import (
    ENVIRONMENT,
    ROUNDS,
    Figure,
    asked_rounds,
    in_turn,
    python,
    ratios,
    show,
    toy_project,
)

MOST = 1.05
STEPS = 200
MOST_ROUNDS = 7
"""Peaks vary by less than a hundredth from round to round."""
MANY, FEW = 1_000_000, 100_000
SECONDS_BETWEEN_SAMPLES = 0.1
PREDICTING = """
import torch
from torch.utils.data import DataLoader

from torch_lab.callbacks import CsvWriter
from torch_lab.datasets import ArrayDataset
from torch_lab.modules import LabModule


def infer_config(hparams, rows, path):
    data = ArrayDataset(torch.ones(8).expand(int(rows), 8))
    return {
        "module": LabModule(torch.nn.Linear(8, 2)),
        "predict_dataloaders": DataLoader(data, batch_size=2048),
        "callbacks": [CsvWriter(path)],
    }
"""


def held(process: psutil.Process) -> int:
    """Return the bytes that a process and those below it hold in memory now."""
    try:
        pids = [each.pid for each in [process, *process.children(recursive=True)]]
        own = sum(_read(pid, "smaps_rollup", "Pss_Anon", "Pss_Shmem") for pid in pids)
        return own + max(_read(pid, "status", "RssFile") for pid in pids)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return 0  # One of them has ended meanwhile: the next sample tells.


def _read(pid: int, file: str, *names: str) -> int:
    # `psutil.Process.memory_full_info` reads a hundred times as much.
    lines = Path(f"/proc/{pid}/{file}").read_text(encoding="ascii", errors="replace").splitlines()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * sum(int(told[name].split()[0]) for name in names if name in told)


def peak(command: Sequence[str | Path], folder: Path) -> float:
    """Return the most bytes that a command and its children held at once."""
    found, words = 0, [str(word) for word in command]
    environment = {**ENVIRONMENT, "FOLDER": str(folder)}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, cwd=folder, env=environment, **silent) as process:
        observed = psutil.Process(process.pid)
        while process.poll() is None:
            found = max(found, held(observed))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return float(found)


def training(workers: int, root: Path, rounds: int) -> Figure:
    """Return the figure of a training with so many workers."""
    ours = python("our_steps.py", workers=workers, steps=STEPS)
    theirs = python("lightning_steps.py", data="tensors", workers=workers, steps=STEPS)
    found = in_turn(
        {"ours": lambda: peak(ours, root), "theirs": lambda: peak(theirs, root)}, rounds
    )
    name = f"peak of all processes, 60,000 images, {workers} workers"
    return Figure("9", name, "plain Lightning", ratios(found, "ours", "theirs"), at_most=MOST)


def predicting(root: Path, rounds: int) -> Figure:
    """Return by how much the peak grows with the rows that are predicted."""
    script = toy_project(root / "predicting", PREDICTING, {})

    def of(rows: int) -> float:
        path = root / "rows.csv"
        infer = [sys.executable, "-m", "torch_lab", "infer", "--offline"]
        taken = peak([*infer, script, str(rows), path], root)
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
        if lines != rows + 1:
            raise RuntimeError(f"{lines:,} lines of {rows:,} rows")
        return taken

    found = in_turn({"many": lambda: of(MANY), "few": lambda: of(FEW)}, rounds)
    name = f"peak of all processes, {MANY:,} rows to CSV"
    return Figure("10", name, f"{FEW:,} rows", ratios(found, "many", "few"), at_most=MOST)


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Measure."""
    rounds = min(rounds, MOST_ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        trainings = [training(workers, root, rounds) for workers in (0, 2)]
        return [*trainings, predicting(root, rounds)]


if __name__ == "__main__":
    show(figures(asked_rounds(__doc__)))
