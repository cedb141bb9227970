"""Steps of plain Lightning, which logs the loss with TensorBoard and writes checkpoints.

python lightning_steps.py mlp|conv BATCH_SIZE memory|samples [ddp]
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import pytorch_lightning as pl
import torch
from gate import Gate
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset
from toys import arrays, flipped_one, network


class Module(pl.LightningModule):
    """A network with a loss, as Lightning's documentation has them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = network(kind)
        self.loss_function = torch.nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss: torch.Tensor = self.loss_function(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Batches:
    """Batches that are in memory."""

    def __init__(self, size: int) -> None:
        x, y = map(torch.from_numpy, arrays())
        self.batches = list(zip(x.split(size), y.split(size), strict=True))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


class Samples(Dataset[Any]):
    """Images that are turned around, or not, one by one."""

    def __init__(self) -> None:
        self.x, self.y = arrays()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(flipped_one(self.x[index])), int(self.y[index])


def train(module: pl.LightningModule, loader: Any, **several: Any) -> None:
    """Train until nobody asks for more."""
    folder = tempfile.mkdtemp()
    trainer = pl.Trainer(
        **several,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[Gate()],
        logger=TensorBoardLogger(folder),
        default_root_dir=folder,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)


def main(kind: str, size: int, data: str, *, ddp: bool) -> None:
    """Train what the command line asks for."""
    loader = Batches(size) if data == "memory" else DataLoader(Samples(), size, shuffle=True)
    train(Module(kind), loader, **({"strategy": "ddp", "devices": 2} if ddp else {}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], ddp="ddp" in sys.argv)
