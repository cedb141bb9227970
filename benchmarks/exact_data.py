"""What exact resume costs: loaders fitted for a run, against the same loaders as torch has them.

    python benchmarks/exact_data.py [ROUNDS]

Each round trains an epoch with either, in turn, on one thread. What is measured is the time of the
processor, so that it matters little what else the machine does. The tables show medians, and the
quartiles of the ratio within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import asked_rounds
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torch_lab.datasets import ArrayDataset
from torch_lab.loaders import Loaders
from torch_lab.samplers import Position
from torch_lab.seeds import Stream, derived, seed_generators

SAMPLES = 6_400
BATCH = 64


class Cheap(Dataset[int]):
    """Samples that cost next to nothing, and draw a number."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> float:
        return random.random()


def shifted(x: Any) -> Any:
    """Augment images: add noise, as large as drawn for each."""
    return x + np.random.rand(len(x), 1).astype(np.float32) * 0.1


def arrays(augmentation: Callable[[Any], Any] | None) -> ArrayDataset:
    x = np.random.default_rng(1).random((SAMPLES, 784), dtype=np.float32)
    return ArrayDataset(x, np.arange(SAMPLES) % 10, augmentation=augmentation)


class Training:
    """Steps of a small network, with or without what makes them exact.

    Both use the same network, which learns nothing: so they compute the same.
    """

    def __init__(self, net: nn.Module, dataset: Dataset[Any], *, exact: bool) -> None:
        self.position = Position(1)
        self.exact = exact
        self.loader = DataLoader(dataset, BATCH, shuffle=True)
        if exact:
            Loaders(self.position).prepare(self.loader, "train")
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), lr=0.0)

    def seconds(self) -> float:
        """Return how long an epoch takes."""
        self.position.epoch += 1
        started = time.process_time()
        for number, (x, md) in enumerate(self.loader):
            if self.exact:
                # As the run does at the start of each batch.
                seed_generators(derived(1, Stream.TRAIN, self.position.epoch, number, 0))
            loss = nn.functional.cross_entropy(self.net(x), md["y"])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return time.process_time() - started


class Loading:
    """Samples alone."""

    def __init__(self, *, exact: bool) -> None:
        self.loader = DataLoader(Cheap(), BATCH)
        if exact:
            Loaders(Position(1)).prepare(self.loader, "train")

    def seconds(self) -> float:
        """Return how long an epoch takes."""
        started = time.process_time()
        for _ in self.loader:
            pass
        return time.process_time() - started


def compared(plain: Any, exact: Any, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds that either takes, round by round; which one is first alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    for each in (plain, exact):
        each.seconds()
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        for which in order:
            times[which].append((plain, exact)[which].seconds())
    return times


def main(rounds: int) -> None:
    """Measure, and print two tables."""
    torch.set_num_threads(1)
    print(f"{'steps of 64 samples':<30} {'plain, us':>9} {'exact, us':>9}  {'ratio':>6}  quartiles")
    for name, augmentation in (("arrays, augmented", shifted), ("arrays, nothing drawn", None)):
        data = arrays(augmentation)
        net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        times = compared(Training(net, data, exact=False), Training(net, data, exact=True), rounds)
        ratios = [exact / plain for plain, exact in zip(*times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        plain, exact = (statistics.median(each) / (SAMPLES / BATCH) * 1e6 for each in times)
        print(f"{name:<30} {plain:>9.1f} {exact:>9.1f}  {middle:>6.3f}  {low:.3f} to {high:.3f}")
    times = compared(Loading(exact=False), Loading(exact=True), rounds)
    added = [(exact - plain) / SAMPLES * 1e6 for plain, exact in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(added, n=4)
    print(f"{'sample by sample, added':<30} {middle:>9.2f} us a sample  {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main(asked_rounds(__doc__, 31))
