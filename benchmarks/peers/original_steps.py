"""Steps of the design that this library comes from: samples one by one, metrics of each batch.

Its modules computed every metric for each batch, logged it, and looked for NaN in every tensor.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from lightning_steps import Samples, train
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from toys import metrics, network


class WithMetadata(Samples):
    """Samples with a dictionary of what is known of them."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x, {"y": y, "idx": index}


class Module(pl.LightningModule):
    """A network whose metrics are those of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network("mlp")
        self.loss_function = torch.nn.CrossEntropyLoss()
        self.metrics = MetricCollection(metrics("Accuracy,F1Score"))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        x, md = batch
        y_pred = self.net(x)
        loss = self.loss_function(y_pred, md["y"])
        self.log("loss/train", loss)
        for name, metric in self.metrics.items():
            metric(y_pred, md["y"])
            self.log(f"{name}/train", metric)
        return {"loss": loss, "y_pred": y_pred}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for tensor in (outputs["loss"], outputs["y_pred"], batch[0], *self.net.parameters()):
            if torch.isnan(tensor).any():
                raise ValueError("NaN")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    train(Module(), DataLoader(WithMetadata(), 64, shuffle=True))
