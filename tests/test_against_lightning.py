"""The same losses and weights as plain Lightning: what torch-lab adds changes no numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conftest import Lab
from torch_lab.errors import ExitCode

EPOCHS = 3
SEED = 5

CONFIG = '''
"""A network, its data in a shuffled order, and a callback that keeps what was trained."""

import functools

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from test_against_lightning import network
from torch_lab.datasets import ArrayDataset
from torch_lab.modules import TrainLabModule


class Kept(pl.Callback):
    def __init__(self):
        self.batches, self.losses = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        x, md = batch
        self.batches.append((x.clone(), md["y"].clone()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach().clone())

    def on_train_end(self, trainer, pl_module):
        weights = pl_module.model.state_dict()
        kept = {"batches": self.batches, "losses": self.losses, "weights": weights}
        torch.save(kept, "kept.pt")


def train_config(hparams):
    made = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 6, generator=made), torch.randint(3, (50,), generator=made)
    loader = functools.partial(DataLoader, ArrayDataset(x, y), batch_size=8)
    return {
        "module": TrainLabModule(
            network(),
            torch.nn.CrossEntropyLoss(),
            functools.partial(torch.optim.AdamW, lr=0.01),
            functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
            metrics={"accuracy": MulticlassAccuracy(3)},
        ),
        "train_dataloaders": loader(shuffle=True),
        "val_dataloaders": loader(),
        "callbacks": [Kept()],
    }
'''


def network() -> nn.Module:
    """Return a small network; its weights are those that the seed decides on."""
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


class Plain(pl.LightningModule):
    """The same training, as Lightning's documentation would have it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach().clone())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


class Epochs:
    """The batches of all epochs, those of one at a time."""

    def __init__(self, batches: list[Any], module: pl.LightningModule) -> None:
        self.batches = batches
        self.length = len(batches) // EPOCHS
        self.module = module

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        first = self.module.current_epoch * self.length
        yield from self.batches[first : first + self.length]


@pytest.mark.parametrize(
    "init",
    [
        {},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed", "val_check_interval": 3},
    ],
    ids=["plain", "accumulation and clipping", "bf16 and validations"],
)
def test_losses_are_those_of_plain_lightning(lab: Lab, tmp_path: Path, init: Any) -> None:
    """To the bit, for the same seed and order: of every step, and the weights at the end."""
    lab.write("__main__.py", CONFIG)
    settings = {"max_epochs": EPOCHS, "accelerator": "cpu", **init}
    lab.hparams("hparams", {"seed": SEED, "trainer": {"init": settings}})
    done = lab.train(lab.path)
    assert done.code == ExitCode.DONE, done.err
    kept = torch.load("kept.pt", weights_only=True)

    pl.seed_everything(SEED, workers=True, verbose=False)
    module = Plain()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{name: value for name, value in settings.items() if name != "val_check_interval"},
    )
    trainer.fit(module, Epochs(kept["batches"], module))

    assert len(module.losses) == len(kept["losses"]) == EPOCHS * 7
    assert torch.equal(torch.stack(module.losses), torch.stack(kept["losses"]))
    for name, weights in module.model.state_dict().items():
        assert torch.equal(weights, kept["weights"][name]), name
