"""Predictions to CSV by a plain loop, as a script of its own: batch size, path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from inference_data import images, network

__all__ = ["predict"]


def predict(model: torch.nn.Module, x: torch.Tensor, size: int, path: Path) -> None:
    """Write what `model` says of `x`, and wait until it is on the disk."""
    model.eval()
    with path.open("w", encoding="utf-8", newline="") as file, torch.inference_mode():
        file.write(",".join(["idx", *(f"out_{place}" for place in range(10))]) + "\n")
        for start in range(0, len(x), size):
            rows = model(x[start : start + size]).numpy().astype(str).tolist()
            file.writelines(f"{idx},{','.join(row)}\n" for idx, row in enumerate(rows, start))
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    predict(network(), torch.from_numpy(images()), int(sys.argv[1]), Path(sys.argv[2]))
