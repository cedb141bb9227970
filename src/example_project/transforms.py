"""What happens to images on their way into the network, a whole batch at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from torch_lab.transforms import BaseDataTransform

__all__ = ["PredictedDigit", "RandomAffine", "Standardise"]


class RandomAffine(BaseDataTransform):
    """Turns, scales and shifts each image of a batch by a random amount of its own.

    Takes `(batch, height, width)` of any number type; gives float32 in the same units.

    Args:
        degrees: The furthest an image is turned, either way.
        scale: The furthest its size changes: 0.1 is from 90 % to 110 %.
        pixels: The furthest it is shifted, in each direction.
    """

    def __init__(self, degrees: float = 15.0, scale: float = 0.15, pixels: float = 2.0) -> None:
        self.degrees = degrees
        self.scale = scale
        self.pixels = pixels

    def compute(self, x: Tensor) -> Tensor:
        """Return the batch with each image moved; what moves in from outside is 0."""
        batch, height, width = x.shape
        images = torch.as_tensor(x, dtype=torch.float32).unsqueeze(1)
        grid = functional.affine_grid(
            self._matrices(batch, height, width), [batch, 1, height, width], align_corners=False
        )
        return functional.grid_sample(images, grid, align_corners=False).squeeze(1)

    def _matrices(self, batch: int, height: int, width: int) -> Tensor:
        """Return a random matrix `(batch, 2, 3)` for each image, in `affine_grid`'s units."""
        angle, scale, *shifts = torch.empty(4, batch).uniform_(-1, 1)
        angle = angle * math.radians(self.degrees)
        scale = 1 + scale * self.scale
        cos, sin = scale * angle.cos(), scale * angle.sin()
        # The image's width and height are 2 units, whatever they are in pixels.
        right, down = (
            shift * 2 * self.pixels / size
            for shift, size in zip(shifts, (width, height), strict=True)
        )
        rows = [torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)]
        return torch.stack(rows, dim=1)


class Standardise(BaseDataTransform):
    """Brings bytes to the small numbers around 0 that networks like, with a channel dimension.

    Takes `(batch, height, width)`, 0 to 255; gives float32 `(batch, 1, height, width)`.

    Args:
        mean: Mean of all pixels of the training images, of 1.
        std: Their standard deviation, of 1.
    """

    def __init__(self, mean: float = 0.16, std: float = 0.3) -> None:
        self.mean = mean
        self.std = std

    def compute(self, x: Tensor) -> Tensor:
        """Return the batch in the network's units."""
        images = torch.as_tensor(x, dtype=torch.float32).unsqueeze(1)
        return (images / 255 - self.mean) / self.std


class PredictedDigit(BaseDataTransform):
    """Turns scores `(batch, 10)` into the digits `(batch,)` with the highest score."""

    def compute(self, x: Tensor) -> Tensor:
        """Return the digit that each row of scores speaks for."""
        return x.argmax(dim=1)
