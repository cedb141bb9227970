"""Whether a very long run stays as it began: its metrics on disk, its memory, the time of a step.

    python benchmarks/scale.py [ROUNDS]

A training of 2,000 steps for each round, every one of which is logged, its loss and fifty values
more: in 11 rounds more than a million scalars. The model is a single weight, so that what is
measured is what is around it. The process tells of each hundredth of the run what it took of the
processor, and what it holds; the metrics folder is looked at as well, and is read with
TensorBoard's own reader in the end. The last tenth is compared with the second: the first one warms
up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from harness import ENVIRONMENT, ROUNDS, Figure, show
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

STEPS_OF_ROUND = 2_000
VALUES = 50
TENTHS = 10
PIECES = 10
"""Of each tenth, so that a ratio has a spread."""
MOST_GROWTH = 1.05
CONFIG = '''
import functools
import json
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from torch_lab.datasets import ArrayDataset
from torch_lab.modules import TrainLabModule


class Meter(pl.Callback):
    """Tells how long each piece of the run took, how large its metrics are, and what it holds."""

    def __init__(self, hparams):
        self.pieces = hparams["config"]["pieces"]

    def on_train_start(self, trainer, module):
        self.every = trainer.max_steps // self.pieces
        self.began = time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % self.every:
            return
        took = time.process_time() - self.began
        folder = Path(trainer.default_root_dir) / "metrics"
        told = {
            "seconds": took / self.every,
            "bytes": sum(path.stat().st_size for path in folder.glob("*tfevents*")),
            "held": held(),
        }
        print("piece:", json.dumps(told), flush=True, file=sys.__stdout__)
        self.began = time.process_time()


def held():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))


class Net(TrainLabModule):
    def on_train_batch_end(self, *arguments):
        values = {f"own_{number}/train_step": 1 / number for number in range(1, VALUES + 1)}
        self.logger.log_metrics(values, self.global_step - 1)


def train_config(hparams):
    global VALUES
    VALUES = hparams["config"]["values"]
    module = Net(
        torch.nn.Linear(1, 1, bias=False),
        torch.nn.MSELoss(),
        functools.partial(torch.optim.SGD, lr=1e-3),
    )
    x = torch.ones(hparams["config"]["samples"], 1)
    loader = DataLoader(ArrayDataset(x, x * 2), batch_size=1)
    return {"module": module, "train_dataloaders": loader, "callbacks": [Meter(hparams)]}
'''


@dataclass(frozen=True)
class Piece:
    """A hundredth of the run."""

    seconds: float
    """Of a step."""
    bytes: int
    """Of the metrics folder, at its end."""
    held: int
    """Bytes in memory, at its end."""


def script(root: Path, steps: int) -> Path:
    """Write an hparams script of a run with epochs of a twentieth, and return its path."""
    folder = root / "toys" / "experiments" / "00_toy"
    folder.mkdir(parents=True)
    (root / "pyproject.toml").touch()
    (folder / "__main__.py").write_text(CONFIG, encoding="utf-8")
    init = {
        "max_steps": steps,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
    }
    config = {
        "samples": steps // 20,
        "pieces": TENTHS * PIECES,
        "values": VALUES,
        "monitor": "loss/train",
    }
    path = folder / "hparams.py"
    path.write_text(f"hparams = { ({'trainer': {'init': init}, 'config': config})!r}\n")
    return path


def trained(path: Path, root: Path) -> list[Piece]:
    """Train, and return what the process told."""
    command = [sys.executable, "-m", "torch_lab", "train", str(path), "--offline"]
    done = subprocess.run(
        command,
        cwd=root,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    lines = (line.partition("piece: ")[2] for line in done.stdout.splitlines())
    return [Piece(**json.loads(line)) for line in lines if line]


def read(root: Path) -> tuple[int, float]:
    """Return how many scalars of steps TensorBoard reads in the metrics folder, in how long."""
    began, count = time.perf_counter(), 0
    for path in sorted(root.glob("data/artifacts/*/metrics/*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            count += sum(value.tag.endswith("/train_step") for value in event.summary.value)
    return count, time.perf_counter() - began


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Measure; other than those of the other benchmarks, the peer is the run's own beginning."""
    steps = rounds * STEPS_OF_ROUND
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pieces = trained(script(root, steps), root)
        count, seconds = read(root)
    if count != (1 + VALUES) * steps:
        raise RuntimeError(f"TensorBoard has read {count:,} scalars of {(1 + VALUES) * steps:,}")
    print(f"{count:,} scalars of {steps:,} steps, read by TensorBoard in {seconds:.1f} s;")
    print(f"{pieces[-1].bytes / steps:.1f} bytes of metrics a step,", end=" ")
    print(f"{statistics.median(p.seconds for p in pieces) * 1e6:.0f} us of the processor a step")
    early, late = pieces[PIECES : 2 * PIECES], pieces[-PIECES:]
    before = [pieces[PIECES - 1].bytes, pieces[-PIECES - 1].bytes]
    grown = [part[-1].bytes - size for part, size in zip((early, late), before, strict=True)]
    pairs = list(zip(late, early, strict=True))
    name, peer = f"a run of {steps:,} steps, its last tenth", "its second tenth"
    return [
        Figure(
            "12", f"{name}: a step", peer, [a.seconds / b.seconds for a, b in pairs], MOST_GROWTH
        ),
        Figure("12", f"{name}: memory", peer, [a.held / b.held for a, b in pairs], MOST_GROWTH),
        Figure("12", f"{name}: bytes of metrics", peer, [grown[1] / grown[0]] * 2, MOST_GROWTH),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS)
    show(figures(parser.parse_args().rounds))
