"""Steps of ours, through the command `train`: metrics, checkpoints, NaN guard and exact resume on.

python our_steps.py mlp|conv BATCH_SIZE arrays|samples [auroc] [ddp] [KEY...]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from torch_lab.cli import main as run
from torch_lab.cli import train

CONFIG = """
import functools

import torch
from gate import Gate
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score
from toys import CLASSES, arrays, flipped, flipped_one, network

from torch_lab.datasets import ArrayDataset, BaseDataset
from torch_lab.modules import TrainLabModule


class Samples(BaseDataset):
    def __init__(self):
        super().__init__(augmentation=flipped_one)
        self.x, self.y = arrays()

    def __len__(self):
        return len(self.x)

    def get_raw_data(self, i):
        return self.x[i]

    def get_raw_label(self, i):
        return int(self.y[i])


def train_config(hparams):
    config = hparams["config"]
    metrics = {"accuracy": MulticlassAccuracy(CLASSES), "f1": MulticlassF1Score(CLASSES)}
    if config["auroc"]:
        metrics["auroc"] = MulticlassAUROC(CLASSES)
    is_array = config["data"] == "arrays"
    data = ArrayDataset(*arrays(), augmentation=flipped) if is_array else Samples()
    return {
        "module": TrainLabModule(
            network(config["net"]),
            torch.nn.CrossEntropyLoss(),
            functools.partial(torch.optim.AdamW, lr=1e-3),
            metrics=metrics,
        ),
        "train_dataloaders": DataLoader(data, batch_size=config["batch_size"], shuffle=True),
        "callbacks": [Gate()],
    }
"""


KEYS = {
    "fused": {"optimizer": {"fused": True}},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
}
"""What each further word adds to the hparams."""


def main(kind: str, size: int, data: str, *words: str) -> None:
    """Train until nobody asks for more."""
    # The processes that are started to train together run this script too.
    root = Path(os.environ.setdefault("TOYS", tempfile.mkdtemp()))
    folder = root / "toys" / "experiments" / "00_toy"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "pyproject.toml").touch()
    (folder / "__main__.py").write_text(CONFIG, encoding="utf-8")
    config = {"net": kind, "batch_size": size, "data": data, "auroc": "auroc" in words}
    several = {"strategy": "ddp", "devices": 2} if "ddp" in words else {}
    init = {"max_epochs": -1, "accelerator": "cpu", "log_every_n_steps": 50, **several}
    hparams = {
        "trainer": {"init": init},
        "config": {**config, "monitor": "loss/train"},
    }
    for word in KEYS.keys() & set(words):
        hparams |= KEYS[word]
    script = folder / "hparams.py"
    script.write_text(f"hparams = {hparams!r}\n", encoding="utf-8")
    run(train, "train", [str(script), "--offline"])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
