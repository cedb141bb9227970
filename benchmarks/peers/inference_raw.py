"""Predictions to CSV by a plain loop, as a script of its own: batch size, path."""

from __future__ import annotations

import os
import sys

import torch
from inference_data import images, network

size, path = int(sys.argv[1]), sys.argv[2]
model, x = network().eval(), torch.from_numpy(images())
with open(path, "w", encoding="utf-8", newline="") as file, torch.inference_mode():  # noqa: PTH123
    file.write(",".join(["idx", *(f"out_{place}" for place in range(10))]) + "\n")
    for start in range(0, len(x), size):
        rows = model(x[start : start + size]).numpy().astype(str).tolist()
        file.writelines(f"{idx},{','.join(row)}\n" for idx, row in enumerate(rows, start))
    file.flush()
    os.fsync(file.fileno())
