"""A plain Lightning training of 60,000 images: number of workers, steps, folder."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
import torch
from memory_data import images, labels, network
from pytorch_lightning.loggers import TensorBoardLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

workers, steps, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


class Net(pl.LightningModule):
    """A small network that logs its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = cross_entropy(self.model(x), y)
        self.log("loss/train_step", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    data = TensorDataset(torch.from_numpy(images()), torch.from_numpy(labels()))
    trainer = pl.Trainer(
        max_steps=steps,
        logger=TensorBoardLogger(folder),
        accelerator="cpu",
        enable_progress_bar=False,
    )
    loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=workers)
    trainer.fit(Net(), loader)
