"""What all trainings of the step benchmark have in common: images, networks and what they draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["CLASSES", "Loss", "arrays", "flipped", "flipped_one", "metrics", "network"]

CLASSES = 10


def arrays(count: int = 60_000) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return images `(count, 1, 28, 28)` and labels, as many as MNIST has."""
    generator = np.random.default_rng(0)
    return generator.random((count, 1, 28, 28), dtype=np.float32), generator.integers(
        0, CLASSES, count
    )


def network(kind: str) -> nn.Module:
    """Return the perceptron `mlp`, the convolutional network `conv`, or one `linear` layer."""
    torch.set_num_threads(1)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, CLASSES))
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1600, CLASSES)),
    )


class Loss(nn.Module):
    """The cross-entropy, as a dictionary of so many scalars that are logged.

    The first one is trained on; the others stand for what else one likes to see.

    Args:
        scalars: How many.
    """

    def __init__(self, scalars: int) -> None:
        super().__init__()
        self.scalars = scalars

    def forward(self, y_pred: Tensor, y: Tensor) -> dict[str, Tensor]:
        loss = cross_entropy(y_pred, y)
        others = (loss.detach() / number for number in range(2, self.scalars + 1))
        return {f"part_{number}": part for number, part in enumerate([loss, *others])}


def metrics(names: str) -> dict[str, Any]:
    """Return the metrics of these names, which stand between commas."""
    import torchmetrics.classification as known

    return {name.lower(): getattr(known, f"Multiclass{name}")(CLASSES) for name in names.split(",")}


def flipped(x: Any) -> Any:
    """Turn half of the images of a batch around."""
    turned = np.random.rand(len(x)) < 0.5
    x[turned] = x[turned][..., ::-1]
    return x


def flipped_one(x: Any) -> Any:
    """Turn an image around, or not."""
    return x[..., ::-1].copy() if np.random.rand() < 0.5 else x
