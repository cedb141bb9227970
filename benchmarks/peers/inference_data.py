"""Images and a network, the same for all who predict."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["SAMPLES", "images", "network"]

SAMPLES = 10_000


def images() -> Any:
    """Return the images, `(samples, 784)`."""
    return np.random.default_rng(0).random((SAMPLES, 784), dtype=np.float32)


def network() -> nn.Module:
    """Return a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
