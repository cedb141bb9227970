"""The callbacks in two processes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from warm import Warm

SCRIPT = """
import sys
from pathlib import Path
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryConfusionMatrix
from torch_lab.callbacks import *

folder = Path(sys.argv[1])

class Samples:
    def __init__(self, size, backwards=False):
        self.size, self.backwards = size, backwards

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        i = self.size - 1 - i if self.backwards else i
        return {"out": torch.tensor([i / 10, i + 0.5]), "md": {"idx": i, "name": f'"{i}",\\n'}}

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.metrics = {"validate": MetricCollection({"confusion": BinaryConfusionMatrix()})}

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        self.metrics["validate"].update(batch[0][:, 0] > 2, batch[0][:, 0] > 3)

    def on_validation_epoch_end(self):
        values = self.metrics["validate"].compute()
        if self.trainer.is_global_zero:
            print("confusion", values["confusion"].tolist(), flush=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch

class Uneven(Module):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch["out"][:, : 1 + self.global_rank]

def run(*callbacks):
    return pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[EpochProgress(), *callbacks],
    )

def predict(writer, *datasets, module=None):
    loaders = [DataLoader(data, batch_size=2) for data in datasets]
    run(writer).predict(module or Module(), loaders, return_predictions=False)

numbers = DataLoader(TensorDataset(torch.arange(8.0)[:, None]), batch_size=2)
run(NanMonitor(), MetricPlots(folder / "plots")).fit(Module(), numbers, numbers)
for writer in (CsvWriter, JsonLinesWriter, NpzWriter):
    predict(writer(folder / f"one.{writer.__name__}"), Samples(7))
    predict(writer(folder / f"two.{writer.__name__}"), Samples(6), Samples(5, backwards=True))
predict(CsvWriter(folder / "bare.csv"), range(5))
try:
    predict(CsvWriter(folder / "uneven"), Samples(4), module=Uneven())
except Exception as error:
    print(error, flush=True)
"""

EVERY_ROW = [(0, i) for i in range(6)] + [(1, i) for i in range(5)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> tuple[Path, str, str]:
    """Return folder, standard output and standard error of two processes' work."""
    folder = tmp_path_factory.mktemp("ddp")
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    process = subprocess.run(
        [warm.python, str(script), str(folder / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return folder / "out", process.stdout, process.stderr


def test_one_process_tells_the_progress(done: tuple[Path, str, str]) -> None:
    """Each line stands there once, though two processes came to it."""
    _, _, err = done
    lines = [line for line in err.splitlines() if re.match("epoch|predict", line)]
    assert re.match(r"epoch 1/1  step 2  [\d.]+ s  loss/train -?\d", lines[0])
    assert [line.split("  ")[:2] for line in lines[1:3]] == [
        ["predict", "2 batches"],
        ["predict", "4 batches"],
    ]
    assert sum(line.startswith("epoch") for line in lines) == 1


def test_plots_are_of_all_processes(done: tuple[Path, str, str]) -> None:
    """One figure is saved, and the metric still has the samples of both."""
    folder, out, _ = done
    assert [p.name for p in (folder / "plots").iterdir()] == ["confusion-validate-epoch_1.png"]
    assert "confusion [[3, 1], [0, 4]]" in out


def test_text_is_merged_in_sample_order(done: tuple[Path, str, str]) -> None:
    """Two processes leave the one file that a single one would, whatever their order."""
    folder, _, _ = done
    with (folder / "one.CsvWriter").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["idx", "name", "out_0", "out_1"]
    assert table[1:] == [[f"{i}", f'"{i}",\n', f"{i / 10}", f"{i + 0.5}"] for i in range(7)]
    with (folder / "two.CsvWriter").open(encoding="utf-8", newline="") as file:
        assert [(int(a), int(b)) for a, b, *_ in list(csv.reader(file))[1:]] == EVERY_ROW
    lines = (folder / "two.JsonLinesWriter").read_text(encoding="utf-8").splitlines()
    assert [(row["dataloader"], row["idx"]) for row in map(json.loads, lines)] == EVERY_ROW
    assert (folder / "bare.csv").read_text(encoding="utf-8") == (
        "idx,out\n" + "".join(f"{i},{i}\n" for i in range(5))
    )


def test_arrays_are_merged_in_sample_order(done: tuple[Path, str, str]) -> None:
    """The rows of an archive are those of both processes, ordered."""
    folder, _, _ = done
    with np.load(folder / "one.NpzWriter") as arrays:
        assert arrays["out"][:, 1].tolist() == [i + 0.5 for i in range(7)]
    with np.load(folder / "two.NpzWriter") as arrays:
        assert list(zip(arrays["dataloader"], arrays["idx"], strict=True)) == EVERY_ROW


def test_processes_that_disagree_leave_nothing(done: tuple[Path, str, str]) -> None:
    """Ranks with different columns are an error, and no part of any file stays behind."""
    folder, out, _ = done
    assert "ranks predicted different columns" in out
    writers = ("CsvWriter", "JsonLinesWriter", "NpzWriter")
    names = {f"{name}.{writer}" for name in ("one", "two") for writer in writers}
    assert {path.name for path in folder.iterdir()} == {*names, "bare.csv", "plots"}
