"""Steps of ours, through the command `train`: checkpoints, NaN guard and exact resume on.

Its settings, with their defaults, are those of `ASKED`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness import toy_project
from settings import settings

from torch_lab.cli import main as run
from torch_lab.cli import train

CONFIG = """
import functools

import torch
from gate import Gate
from torch.utils.data import DataLoader
from toys import Loss, arrays, flipped, flipped_one, metrics, network

from torch_lab.datasets import ArrayDataset, BaseDataset
from torch_lab.modules import TrainLabModule


class Samples(BaseDataset):
    def __init__(self, count):
        super().__init__(augmentation=flipped_one)
        self.x, self.y = arrays(count)

    def __len__(self):
        return len(self.x)

    def get_raw_data(self, i):
        return self.x[i]

    def get_raw_label(self, i):
        return int(self.y[i])


def train_config(hparams):
    asked = hparams["config"]
    count, size, scalars = asked["images"], asked["batch_size"], asked["scalars"]
    by_samples = asked["data"] == "samples"
    data = Samples(count) if by_samples else ArrayDataset(*arrays(count), augmentation=flipped)
    made = {
        "module": TrainLabModule(
            network(asked["net"]),
            torch.nn.CrossEntropyLoss() if scalars == 1 else Loss(scalars),
            functools.partial(torch.optim.AdamW, lr=1e-3),
            metrics=metrics(asked["metrics"]) if asked["metrics"] else None,
        ),
        "train_dataloaders": DataLoader(
            data, batch_size=size, shuffle=True, num_workers=asked["workers"]
        ),
        "callbacks": [Gate()],
    }
    if asked["held_out"]:
        made["val_dataloaders"] = DataLoader(ArrayDataset(*arrays(asked["held_out"])), size)
    return made
"""
ASKED = settings(
    net="mlp",
    batch_size=64,
    data="arrays",
    images=60_000,
    held_out=0,
    workers=0,
    metrics="Accuracy,F1Score",
    scalars=1,
    steps=-1,
    processes=1,
    keys="",
)
KEYS: dict[str, dict[str, Any]] = {
    "fused": {"optimizer": {"fused": True}},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
}
"""What each of `keys` adds to the hparams."""


def main() -> None:
    """Train so many steps, or until nobody asks for more."""
    several = {"strategy": "ddp", "devices": ASKED.processes} if ASKED.processes > 1 else {}
    init = {
        "max_epochs": -1,
        "max_steps": ASKED.steps,
        "accelerator": "cpu",
        "log_every_n_steps": 50,
        "enable_progress_bar": False,
        **several,
    }
    config = {**vars(ASKED), "monitor": "loss/train"}
    # The processes that are started to train together run this script too.
    folder = Path(os.environ["FOLDER"])
    hparams = {"trainer": {"init": init}, "config": config}
    for key in filter(None, ASKED.keys.split(",")):
        hparams |= KEYS[key]
    script = toy_project(folder, CONFIG, hparams)
    run(train, "train", [str(script), "--offline"])


if __name__ == "__main__":
    main()
