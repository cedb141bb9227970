"""What all that train one batch have in common: images, a network, and when the first step ended.

A training has a folder for its files, `FOLDER`, and says in the file `first_step` of it how many
seconds after `BEGAN` (of `time.time()`) its first step had ended.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

__all__ = ["BATCH", "FOLDER", "conv_net", "digits", "first_step_ended", "set_up"]

FOLDER = Path(os.environ.get("FOLDER", "."))
BATCH = 64
IMAGES = 1_797
HELD_OUT = 359


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images, as many and as large as those of the demo, with labels: 1,438 and 359."""
    generator = np.random.default_rng(1)
    x = torch.from_numpy(generator.random((IMAGES, 1, 28, 28), dtype=np.float32))
    y = torch.from_numpy(generator.integers(0, 10, IMAGES))
    return (x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT])


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Return `digits` as torch's own datasets."""
    train, held_out = digits()
    return TensorDataset(*train), TensorDataset(*held_out)


def conv_net() -> nn.Sequential:
    """Return the network of the demo."""
    blocks: list[nn.Module] = []
    for n_in, n_out in ((1, 16), (16, 32)):
        conv = nn.Conv2d(n_in, n_out, kernel_size=3, padding=1, bias=False)
        blocks += [conv, nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 7 * 7, 10))


def first_step_ended() -> None:
    """Write down when the first step ended."""
    took = time.time() - float(os.environ["BEGAN"])
    (FOLDER / "first_step").write_text(str(took), encoding="utf-8")


def set_up() -> None:
    """Write down for how long the processor has worked until the trainer was set up."""
    (FOLDER / "set_up").write_text(str(time.process_time()), encoding="utf-8")
