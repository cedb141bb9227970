"""MNIST's IDX format: a header that says the shape, then the bytes of one array.

Source: Yann LeCun's "The MNIST database of handwritten digits", section "File formats".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torch_lab.errors import UserError

__all__ = ["SPLITS", "is_complete", "read_idx", "read_split", "write_idx", "write_split"]

SPLITS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "held_out": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""The files of images and of labels, by what they are for. Each may be gzipped (`.gz`)."""

UINT8 = 0x08  # The one element type that MNIST uses, of the six that the format knows.


def is_complete(folder: Path) -> bool:
    """Return whether `folder` has all four files."""
    return all(_find(folder, name) is not None for names in SPLITS.values() for name in names)


def read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the images `(n, height, width)` and labels `(n,)` of `split`, a key of `SPLITS`.

    Raises:
        UserError: A file is missing or damaged, or there is not one label for each image.
    """
    images, labels = (_read_named(folder, name) for name in SPLITS[split])
    if len(images) != len(labels):
        raise UserError(f"{folder} has {len(images)} {split} images, but {len(labels)} labels")
    return images, labels


def write_split(
    folder: Path, split: str, images: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> None:
    """Write the images and labels of `split`, a key of `SPLITS`, into `folder`."""
    for name, array in zip(SPLITS[split], (images, labels), strict=True):
        write_idx(folder / name, array)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array in the IDX file `path`, unpacked first if its name ends in `.gz`.

    Raises:
        UserError: The file is damaged, or its elements are not unsigned bytes.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        element, n_dims = struct.unpack_from(">xxBB", content)
        shape = struct.unpack_from(f">{n_dims}I", content, 4)
    except (gzip.BadGzipFile, EOFError, zlib.error, struct.error) as error:
        raise _damaged(path, str(error)) from error
    data = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * n_dims)
    if element != UINT8 or any(content[:2]):
        raise _damaged(path, "it does not begin like an IDX file of unsigned bytes")
    if len(data) != math.prod(shape):
        raise _damaged(path, f"{len(data)} bytes for an array of shape {shape}")
    return data.reshape(shape).copy()  # A view of `content` would be read-only.


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Write `array` as the IDX file `path`."""
    header = struct.pack(f">xxBB{array.ndim}I", UINT8, array.ndim, *array.shape)
    path.write_bytes(header + np.ascontiguousarray(array, dtype=np.uint8).tobytes())


def _read_named(folder: Path, name: str) -> NDArray[np.uint8]:
    if (path := _find(folder, name)) is None:
        raise UserError(f"{folder} has no {name}", "run the preprocess script of the data set")
    return read_idx(path)


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged: {why}", "delete it, and it is made or fetched anew")
