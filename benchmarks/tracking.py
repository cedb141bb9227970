"""What tracking costs: steps while a mirror sends what they log, and while it does not.

    python benchmarks/tracking.py [ROUNDS]

One training, with a scalar logged every step, and the tests' server in another process. The mirror
is held back in every other stretch of two seconds, and has to send twice as much in the one after
it: what such a pair of stretches takes is what the mirror costs. And the whole process of a short
training, with a task and without, in turn. The table shows medians with quartiles, and of the ratio
the interval in which its median lies with 95 % certainty, from the ranks of what was measured.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import asked_rounds, toy_project

TESTS = Path(__file__).parents[1] / "tests"
CONFIG = '''
import functools
import os
import time

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from torch_lab.datasets import ArrayDataset
from torch_lab.mirror import Mirror
from torch_lab.modules import TrainLabModule

SENDS = Mirror.send_logged


class Stretches(pl.Callback):
    """Prints the microseconds of a step, of stretches with and without the mirror in turn."""

    def on_train_start(self, trainer, module):
        self.sends = True
        self.begin(trainer)

    def begin(self, trainer):
        self.sends = not self.sends
        Mirror.send_logged = SENDS if self.sends else (lambda mirror: False)
        self.began, self.step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer, *args):
        took = time.perf_counter() - self.began
        if took > 2.0:
            kind = "on" if self.sends else "off"
            print("us:", kind, took / (trainer.global_step - self.step) * 1e6, flush=True)
            self.begin(trainer)


def train_config(hparams):
    net = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    loss = torch.nn.CrossEntropyLoss()
    module = TrainLabModule(net, loss, functools.partial(torch.optim.Adam, lr=1e-3))
    x = np.random.default_rng(1).random((64 * 500, 784), dtype=np.float32)
    data = ArrayDataset(x, np.arange(len(x)) % 10)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    callbacks = [Stretches()] if hparams["config"]["stretches"] else []
    return {"module": module, "train_dataloaders": loader, "callbacks": callbacks}
'''


def script(root: Path, name: str, *, stretches: bool, **limits: object) -> Path:
    """Write an hparams script, and return its path."""
    init = {"log_every_n_steps": 1, "enable_progress_bar": False, **limits}
    hparams = {
        "trainer": {"init": init},
        "config": {"monitor": "loss/train", "stretches": stretches},
    }
    return toy_project(root, CONFIG, hparams, name)


def trained(path: Path, environment: dict[str, str], *words: str) -> tuple[str, float]:
    """Return what a training printed, and how many seconds it took."""
    command = [sys.executable, "-m", "torch_lab", "train", str(path), *words]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, time.perf_counter() - began


def shown(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f}  {low:.3f} to {high:.3f}"


def interval(values: list[float]) -> str:
    """Return between what the median lies: of so many values that many are on each side of it."""
    ranked, half = sorted(values), len(values) / 2
    off = 0.98 * len(values) ** 0.5
    low, high = max(0, math.floor(half - off)), min(len(values) - 1, math.ceil(half + off) - 1)
    return f"{ranked[low]:.3f} to {ranked[high]:.3f}"


def main(pairs: int) -> None:
    """Measure, and print a table."""
    sys.path.insert(0, str(TESTS))
    from clearml_server import ClearMLServer

    with tempfile.TemporaryDirectory() as folder, ClearMLServer() as server:
        root = Path(folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **server.environment(root)}
        limits = {"max_time": {"seconds": 4 * pairs + 5}, "max_epochs": -1}
        out, _ = trained(script(root, "long", stretches=True, **limits), environment)
        told = [line.split()[1:] for line in out.splitlines() if line.startswith("us:")]
        times = {kind: [float(us) for each, us in told if each == kind] for kind in ("off", "on")}
        ratios = [(1 + on / off) / 2 for on, off in zip(times["on"], times["off"], strict=False)]
        short = script(root, "short", stretches=False, max_steps=20)
        added = []
        for number in range(7):
            order = [(), ("--offline",)] if number % 2 else [("--offline",), ()]
            took = {words: trained(short, environment, *words)[1] for words in order}
            added.append(took[()] - took["--offline",])
    print(f"a step without the mirror   {statistics.median(times['off']):.0f} us")
    print(f"a step with it, ratio       {shown(ratios)}")
    print(f"  its median, 95 % sure            {interval(ratios)}")
    print(f"whole process, added s      {shown(added)}")


if __name__ == "__main__":
    main(asked_rounds(__doc__, 11))
