"""One batch as Lightning has it: for a plain script, LightningCLI and a Hydra application."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from one_batch import BATCH, conv_net, datasets, first_step_ended
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["Digits", "FirstStep", "Images"]


class Digits(pl.LightningModule):
    """A network that reads digits, with its accuracy.

    Args:
        learning_rate: That of AdamW.
    """

    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = conv_net()
        self.loss = nn.CrossEntropyLoss()
        self.accuracy = nn.ModuleDict(
            {name: MulticlassAccuracy(num_classes=10, average="micro") for name in ("fit", "val")}
        )

    def _step(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        x, y = batch
        scores = self.net(x)
        loss = self.loss(scores, y)
        accuracy = self.accuracy[name]
        accuracy(scores, y)
        self.log(f"loss/{name}", loss, on_step=name == "fit", on_epoch=True)
        self.log(f"accuracy/{name}", accuracy, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self._step(batch, "fit")

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self._step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Images(pl.LightningDataModule):
    """Digits to train on, and others to validate with."""

    def __init__(self) -> None:
        super().__init__()
        self.train, self.held_out = datasets()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, BATCH)


class FirstStep(pl.Callback):
    """Writes down when the first step ended."""

    def on_train_batch_end(self, *args: Any) -> None:
        first_step_ended()
