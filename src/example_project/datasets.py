"""Where the images come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from example_project.preprocess.idx import read_split
from torch_lab.datasets import ArrayDataset

__all__ = ["digit_images"]


def digit_images(
    folder: Path,
    split: str,
    transform: Callable[..., Any] | None = None,
    augmentation: Callable[..., Any] | None = None,
) -> ArrayDataset:
    """Return images of digits, read from MNIST's IDX files into memory, with the digits as labels.

    An `ArrayDataset` fetches, augments and transforms a batch at a time: transforms see images
    `(batch, height, width)`, 0 to 255. For data that does not fit into memory, or samples that
    differ in shape, derive a class from `torch_lab.datasets.BaseDataset`: one sample at a time.

    Args:
        folder: Where the files are, as a preprocess script leaves them.
        split: `"train"` or `"held_out"`.
        transform: What the network needs done to images, always.
        augmentation: Random changes that are done before it; for training.

    Raises:
        UserError: A file is missing or damaged.
    """
    images, labels = read_split(folder, split)
    return ArrayDataset(
        images, labels.astype(np.int64), transform=transform, augmentation=augmentation
    )
