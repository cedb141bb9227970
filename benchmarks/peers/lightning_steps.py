"""Steps of plain Lightning, which logs the loss with TensorBoard and writes checkpoints.

Its settings, with their defaults, are in `main`. Batches are in memory, or made of samples
one by one, or of tensors by torch's own dataset.
"""

from __future__ import annotations

import os
from typing import Any

import pytorch_lightning as pl
import torch
from gate import Gate
from pytorch_lightning.loggers import TensorBoardLogger
from settings import settings
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MetricCollection
from toys import Loss, arrays, flipped_one, metrics, network


class Module(pl.LightningModule):
    """A network with a loss, as Lightning's documentation has them.

    Args:
        kind: Of `toys.network`.
        names: Of its metrics.
        scalars: How many of them are logged.
    """

    def __init__(self, kind: str, names: str = "", scalars: int = 1) -> None:
        super().__init__()
        self.scalars = scalars
        self.net = network(kind)
        self.loss_function = torch.nn.CrossEntropyLoss() if scalars < 2 else Loss(scalars)
        # Of those that share their sums, a collection updates one.
        self.metrics = MetricCollection(metrics(names)) if names else None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        y_pred = self.net(x)
        loss: Any = self.loss_function(y_pred, y)
        if isinstance(loss, dict):
            self.log_dict(loss)
            loss = loss["part_0"]
        elif self.scalars:
            self.log("loss", loss)
        if self.metrics is not None:
            self.metrics.update(y_pred, y)
        return loss

    def on_train_epoch_end(self) -> None:
        if self.metrics is not None:
            self.log_dict(self.metrics.compute())
            self.metrics.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Batches:
    """Batches that are in memory."""

    def __init__(self, count: int, size: int) -> None:
        x, y = map(torch.from_numpy, arrays(count))
        self.batches = list(zip(x.split(size), y.split(size), strict=True))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


class Samples(Dataset[Any]):
    """Images that are turned around, or not, one by one."""

    def __init__(self, count: int = 60_000) -> None:
        self.x, self.y = arrays(count)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(flipped_one(self.x[index])), int(self.y[index])


def train(module: Module, loader: Any, **limits: Any) -> None:
    """Train so many steps, or until nobody asks for more; without scalars there is nothing else."""
    folder = os.environ["FOLDER"]
    trainer = pl.Trainer(
        **limits,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[Gate()],
        logger=TensorBoardLogger(folder) if module.scalars else False,
        enable_checkpointing=bool(module.scalars),
        default_root_dir=folder,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)


def loader(data: str, count: int, size: int, workers: int) -> Any:
    """Return what gives the batches."""
    if data == "memory":
        return Batches(count, size)
    tensors = map(torch.from_numpy, arrays(count))
    samples = TensorDataset(*tensors) if data == "tensors" else Samples(count)
    return DataLoader(samples, size, shuffle=True, num_workers=workers)


def main() -> None:
    """Train what the command line asks for."""
    asked = settings(
        net="mlp",
        batch_size=64,
        data="memory",
        images=60_000,
        workers=0,
        metrics="",
        scalars=1,
        steps=-1,
        processes=1,
    )
    several = {"strategy": "ddp", "devices": asked.processes} if asked.processes > 1 else {}
    train(
        Module(asked.net, asked.metrics, asked.scalars),
        loader(asked.data, asked.images, asked.batch_size, asked.workers),
        max_steps=asked.steps,
        **several,
    )


if __name__ == "__main__":
    main()
