"""One batch, with `train`."""

from __future__ import annotations

import functools
from typing import Any

import pytorch_lightning as pl
from one_batch import BATCH, conv_net, digits, first_step_ended, set_up
from torch import nn, optim
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from torch_lab.datasets import ArrayDataset
from torch_lab.modules import TrainLabModule


class Times(pl.Callback):
    """Writes down when the trainer was set up, and when the first step ended."""

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "validate":  # It comes before the training.
            set_up()

    def on_train_batch_end(self, *args: Any) -> None:
        first_step_ended()


def train_config(hparams: dict[str, Any]) -> dict[str, Any]:
    """Return what is trained, and on what."""
    config = hparams["config"]
    train, held_out = (ArrayDataset(*arrays) for arrays in digits())
    module = TrainLabModule(
        conv_net(),
        nn.CrossEntropyLoss(),
        functools.partial(optim.AdamW, lr=config["learning_rate"]),
        metrics={"accuracy": MulticlassAccuracy(num_classes=10, average="micro")},
    )
    return {
        "module": module,
        "train_dataloaders": DataLoader(train, BATCH, shuffle=True),
        "val_dataloaders": DataLoader(held_out, BATCH),
        "callbacks": [Times()],
    }
