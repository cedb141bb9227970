"""What a step costs, in what does not depend on the machine: calls, memory, bytes."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from conftest import Lab
from torch_lab.errors import ExitCode

CONFIG = '''
"""As many steps as are asked for, with a callback that counts what is done in some of them."""

import functools

import torch
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from test_step_costs import Counting
from torch_lab.datasets import ArrayDataset
from torch_lab.modules import TrainLabModule


def train_config(hparams):
    steps = hparams["config"]["steps"]
    x, y = torch.randn(4 * steps, 6), torch.randint(3, (4 * steps,))
    return {
        "module": TrainLabModule(
            torch.nn.Linear(6, 3),
            torch.nn.CrossEntropyLoss(),
            functools.partial(torch.optim.SGD, lr=0.01),
            metrics={"accuracy": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)},
        ),
        "train_dataloaders": DataLoader(ArrayDataset(x, y), batch_size=4, shuffle=True),
        "callbacks": [Counting("ours.json")],
    }
'''

FIRST, LAST = 36, 46
"""Steps between two at which metrics are updated and scalars are logged."""
SETTINGS = {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 50}


class Counting(pl.Callback):
    """Counts calls in a few steps, and the blocks of memory that are in use now and then."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.calls = self.own = 0
        self.blocks: list[int] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == FIRST:
            sys.setprofile(self._count)
        elif batch_idx == LAST:
            sys.setprofile(None)
        elif batch_idx % 160 == 20:  # At the same distance from what is done every 32 or 50 steps.
            gc.collect()
            self.blocks.append(sys.getallocatedblocks())

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.calls += 1
            self.own += event == "call" and "/torch_lab/" in frame.f_code.co_filename

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        steps = LAST - FIRST
        counts = {"calls": self.calls / steps, "own": self.own / steps, "blocks": self.blocks}
        Path(self.file).write_text(json.dumps(counts))


class Plain(pl.LightningModule):
    """The same training as Lightning's documentation would have it, without metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def counts(lab: Lab, steps: int) -> dict[str, Any]:
    """Return what was counted in a training through the command."""
    lab.write("__main__.py", CONFIG)
    config = {"steps": steps, "monitor": "loss/train"}
    lab.hparams("hparams", {"config": config, "trainer": {"init": SETTINGS}})
    done = lab.train(lab.path)
    assert done.code == ExitCode.DONE, done.err
    found: dict[str, Any] = json.loads(Path("ours.json").read_text())
    return found


def test_a_step_makes_half_the_calls_of_plain_lightning(lab: Lab, tmp_path: Path) -> None:
    """With metrics, exact resume and the watch for NaN, and Lightning that logs the loss alone."""
    ours = counts(lab, 60)
    batches = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(60)]
    trainer = pl.Trainer(
        **SETTINGS,
        default_root_dir=tmp_path,
        logger=TensorBoardLogger(tmp_path),
        callbacks=[Counting("theirs.json")],
        enable_progress_bar=False,
    )
    trainer.fit(Plain(), torch.utils.data.DataLoader(batches, batch_size=None))
    theirs = json.loads(Path("theirs.json").read_text())
    assert theirs["calls"] > 500
    assert ours["calls"] < theirs["calls"] / 2, (ours, theirs)
    assert 50 < ours["own"] < 180, ours


def test_a_run_needs_no_more_memory_the_longer_it_is(lab: Lab) -> None:
    """Neither for what it has logged, nor for what it has shown."""
    blocks = counts(lab, 520)["blocks"]
    growths = [after - before for before, after in itertools.pairwise(blocks[1:])]
    assert len(growths) == 2
    assert min(growths) < 100, blocks


def test_a_run_writes_little_beside_its_weights(lab: Lab) -> None:
    """Fewer than a hundred bytes for a scalar; beside a checkpoint a sidecar alone."""
    sizes = []
    for steps in (300, 800):
        counts(lab, steps)
        run = lab.runs[-1]
        sizes.append(sum(file.stat().st_size for file in run.metrics_folder.iterdir()))
    scalars = (800 - 300) / 50
    assert (sizes[1] - sizes[0]) / scalars < 100
    last = run.checkpoint("last")
    torch.save(torch.load(last, weights_only=True), "plain.ckpt")
    assert last.stat().st_size <= Path("plain.ckpt").stat().st_size + 1024
    assert last.with_suffix(".json").stat().st_size < 2048
