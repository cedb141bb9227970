"""The config script of the demo: from hparams to what is trained, and to what predicts.

An hparams script beside this one says the values; the functions here say what is made of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn, optim
from torch.utils.data import DataLoader
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

import torch_lab
from example_project.callbacks import PrintAccuracy
from example_project.datasets import digit_images
from example_project.models import MLP, ConvNet
from example_project.preprocess import digits, mnist
from example_project.transforms import PredictedDigit, RandomAffine, Standardise
from torch_lab.callbacks import CsvWriter
from torch_lab.errors import HparamsError
from torch_lab.modules import LabModule, TrainLabModule
from torch_lab.remote_data import dataset_folder

DATASETS = {"digits": digits.prepare, "mnist": mnist.prepare}
MODELS = {"conv": ConvNet, "mlp": MLP}


def train_config(hparams: dict[str, Any]) -> dict[str, Any]:
    """Return what is trained, and on what. `hparams` is the whole dictionary, defaults included."""
    config = hparams["config"]
    folder = data_folder(config)  # made, downloaded or fetched first, if need be

    # The fast path is the easy one: a plain DataLoader that fetches whole batches.
    loader = functools.partial(
        DataLoader, batch_size=config["batch_size"], num_workers=config["num_workers"]
    )
    train = digit_images(folder, "train", transform=Standardise(), augmentation=RandomAffine())
    train_loader = loader(train, shuffle=True)
    val_loader = loader(digit_images(folder, "held_out", transform=Standardise()))

    module = TrainLabModule(
        model=chosen(config, "model", MODELS)(),
        loss_function=nn.CrossEntropyLoss(),
        # Partials of functions that have names, rather than lambdas: they reach worker processes.
        optimizer_factory=functools.partial(
            optim.AdamW, lr=config["learning_rate"], weight_decay=config["weight_decay"]
        ),
        scheduler_factory=functools.partial(
            warm_cosine, n_steps=hparams["trainer"]["init"]["max_epochs"] * len(train_loader)
        ),
        # Each is logged as `<name>/<stage>`; the confusion matrix, which is no number, is plotted.
        metrics={
            "accuracy": MulticlassAccuracy(num_classes=10, average="micro"),
            "f1": MulticlassF1Score(num_classes=10),
            "confusion": MulticlassConfusionMatrix(num_classes=10),
        },
    )
    return {"module": module, "train_dataloaders": train_loader, "val_dataloaders": val_loader}


def infer_config(hparams: dict[str, Any], run: str, output: str) -> dict[str, Any]:
    """Return what predicts the held-out images.

    Args:
        hparams: The whole dictionary, as in training.
        run: Whose best weights to take: a run's name (without its version: the newest), a task id,
            or a path. It and `output` are what follows the script's path on the command line.
        output: The CSV file to write.
    """
    config = hparams["config"]
    folder = data_folder(config)
    model = torch_lab.load_weights(chosen(config, "model", MODELS)(), run, name="best")
    held_out = digit_images(folder, "held_out", transform=Standardise())
    return {
        "module": LabModule(model, transform=PredictedDigit()),
        "predict_dataloaders": DataLoader(held_out, batch_size=config["batch_size"]),
        "callbacks": [CsvWriter(Path(output)), PrintAccuracy()],
    }


def data_folder(config: dict[str, Any]) -> Path:
    """Return where the data is: a ClearML dataset if `dataset_id` names one, else `dataset`."""
    if config.get("dataset_id"):
        return dataset_folder(config["dataset_id"])
    prepare: Callable[[], Path] = chosen(config, "dataset", DATASETS)
    return prepare()


def warm_cosine(optimizer: optim.Optimizer, n_steps: int) -> dict[str, Any]:
    """Return a schedule of the learning rate: up over the first tenth, then down along a cosine.

    It is a function of the step alone, so that a run that goes on to more epochs finds its place
    in the longer schedule; torch's `OneCycleLR` would end with an error.
    """
    factor = functools.partial(warm_cosine_factor, n_steps=n_steps)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"scheduler": schedule, "interval": "step"}  # the default interval is an epoch


def warm_cosine_factor(step: int, n_steps: int) -> float:
    """Return what the learning rate is multiplied with at `step`, counted from 0."""
    n_warm = max(1, n_steps // 10)
    cooled = min(1.0, max(0, step - n_warm) / max(1, n_steps - n_warm))
    return min((step + 1) / n_warm, (1 + math.cos(math.pi * cooled)) / 2)


def chosen(config: dict[str, Any], key: str, choices: dict[str, Any]) -> Any:
    """Return the one of `choices` that `config[key]` names.

    Raises:
        HparamsError: It names none of them.
    """
    if config[key] not in list(choices):
        names = " or ".join(repr(name) for name in choices)
        raise HparamsError(f"config.{key} is {config[key]!r}; it must be {names}")
    return choices[config[key]]
