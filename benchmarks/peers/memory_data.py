"""Images as large as those of MNIST, and a network, the same for all who train."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

__all__ = ["images", "labels", "network"]

SAMPLES = 60_000


def images() -> Any:
    """Return images of 28 x 28 32-bit numbers, `(samples, 784)`: 188 MB."""
    return np.random.default_rng(0).random((SAMPLES, 784), dtype=np.float32)


def labels() -> Any:
    """Return their labels."""
    return np.arange(SAMPLES) % 10


def network() -> nn.Module:
    """Return a small network."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
