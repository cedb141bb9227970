"""The 1,797 handwritten digits that scikit-learn carries, brought to the form of MNIST.

    python -m example_project.preprocess.digits

Result: `data/processed/digits/`, 1,438 images to train with and 359 held out, in three seconds and
without a network. `train_config` of the demo runs it when the files are missing.

With `--upload` they go to ClearML as well, as a version of the dataset `digits`; its id is printed,
and `config["dataset_id"]` makes training fetch it. What is there already is not uploaded again.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI repository.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from example_project.preprocess import processed_folder, run_as_script
from example_project.preprocess.idx import is_complete, write_split
from torch_lab.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["is_held_out", "like_mnist", "prepare"]

HELD_OUT = 0.2
"""The fraction of each digit's images that is held out."""


def prepare(folder: Path | None = None) -> Path:
    """Return the folder of the digits, made first where it is missing or not complete.

    Args:
        folder: By default `data/processed/digits` of the project.

    Raises:
        UserError: scikit-learn is not installed.
    """
    folder = folder or processed_folder("digits")
    if is_complete(folder):
        return folder
    small, labels = _load()
    images = like_mnist(small)
    held_out = is_held_out(labels)
    folder.mkdir(parents=True, exist_ok=True)
    # Written beside and moved in whole: an interruption leaves a file missing, never half of one.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        write_split(Path(beside), "train", images[~held_out], labels[~held_out])
        write_split(Path(beside), "held_out", images[held_out], labels[held_out])
        for path in Path(beside).iterdir():
            path.replace(folder / path.name)
    return folder


def like_mnist(small: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return images of shape `(n, 28, 28)`, 0 to 255, from ones of `(n, 8, 8)`, 0 to 16.

    As in MNIST, a digit fills a box of 20x20 pixels, and its centre of mass is the image's centre.
    """
    import torch
    from torch.nn import functional

    grown = functional.interpolate(
        torch.from_numpy(small)[:, None] * (255 / 16), size=(20, 20), mode="bicubic"
    )
    padded = functional.pad(grown, (4, 4, 4, 4)).squeeze(1)
    bytes_ = padded.round().clamp(0, 255).to(torch.uint8)  # Bicubic curves overshoot at edges.
    return _centred(bytes_).numpy()


def is_held_out(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return, for each image, whether it is among the last fifth of the images of its digit.

    The images stand in the order in which people wrote them, so that most of the held-out ones are
    by writers that the network has never seen.
    """
    held_out = np.zeros(len(labels), dtype=np.bool_)
    for digit in np.unique(labels):
        (where,) = np.nonzero(labels == digit)
        held_out[where[round(len(where) * (1 - HELD_OUT)) :]] = True
    return held_out


def _load() -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits come with scikit-learn, which is not installed",
            'run: pip install "torch-lab[example]"',
        ) from error
    digits = load_digits()
    return digits.images, digits.target.astype(np.uint8)


def _centred(images: Tensor) -> Tensor:
    """Shift each image by whole pixels, within its margin of 4, to centre its mass."""
    import torch

    mass = images.double()
    centre = (images.shape[-1] - 1) / 2
    place = torch.arange(images.shape[-1], dtype=mass.dtype) - centre
    total = mass.sum(dim=(1, 2))
    rows = -((mass.sum(dim=2) @ place) / total).round().clamp(-4, 4)
    columns = -((mass.sum(dim=1) @ place) / total).round().clamp(-4, 4)
    shifts = torch.stack([rows, columns], dim=1).int().tolist()
    moved = [image.roll(shift, dims=(0, 1)) for image, shift in zip(images, shifts, strict=True)]
    return torch.stack(moved)


if __name__ == "__main__":
    sys.exit(run_as_script(prepare, sys.argv[1:]))
