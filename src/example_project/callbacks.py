"""What happens beside training and prediction."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

__all__ = ["PrintAccuracy"]


class PrintAccuracy(pl.Callback):
    """Prints to stdout how many predictions were right, for batches that have labels.

    It compares `out`, what the module's transform made of the scores, with `md["y"]`.
    """

    def __init__(self) -> None:
        self.n_right = 0
        self.n_seen = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from nothing."""
        self.n_right = self.n_seen = 0

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        right = outputs["out"] == outputs["md"]["y"]
        self.n_right += int(right.sum())
        self.n_seen += right.numel()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the counts of all processes."""
        counts = torch.tensor([self.n_right, self.n_seen], device=pl_module.device)
        n_right, n_seen = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if trainer.is_global_zero:
            print(f"accuracy {n_right / n_seen:.4f} ({n_right} of {n_seen})")
