"""Kills a training at many points, resumes it, and compares the end with that of an unbroken one.

`python tests/sweep.py FOLDER CONFIGURATION POINTS [SEED]` prints a line of JSON for each point.
Processes are forked from this one, which has imported everything: a start takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from torch_lab import cli
from torch_lab.experiment import Experiment
from torch_lab.runner import train_with
from torch_lab.runs import Run, latest_unfinished
from torch_lab.training import Options

CONFIG = '''
"""A network with dropout and batch norm, and data that draws from every generator."""

import functools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.callbacks import EarlyStopping
from torch.utils.data import DataLoader, Dataset

from torch_lab.datasets import ArrayDataset
from torch_lab.modules import TrainLabModule


class Samples(Dataset):
    """Samples that are augmented from `random`, NumPy and torch."""

    def __init__(self, count, augments):
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
        self.augments = augments

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index].clone()
        y = (x.sum() > 0).long()
        if self.augments:
            x += random.random() + float(np.random.normal()) + torch.randn(6)
        return x, {"y": y, "idx": index}


def network(size=6):
    return torch.nn.Sequential(
        torch.nn.Linear(size, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(),
        torch.nn.Dropout(0.3), torch.nn.Linear(8, 2),
    )


def traced(step):
    """Append what a training step sees and makes to the trace."""

    @functools.wraps(step)
    def training_step(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        parts = batch if isinstance(batch, dict) else {"": batch}
        seen = {k: [v[1]["idx"].tolist(), v[0].double().sum().item()] for k, v in parts.items()}
        rate = self.optimizers().param_groups[0]["lr"]
        line = [self.current_epoch, batch_idx, seen, loss.item(), rate, random.random()]
        if path := os.environ.get("TRACE"):
            file = os.open(f"{path}.{self.global_rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, (json.dumps(line) + "\\n").encode())
            os.close(file)
        return loss

    return training_step


class Ours(TrainLabModule):
    training_step = traced(TrainLabModule.training_step)


class Foreign(pl.LightningModule):
    """A module that knows nothing of torch_lab, and logs in every way."""

    def __init__(self, scheduler):
        super().__init__()
        self.net = network()
        self.scheduler = scheduler
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(2)
        self.val_accuracy = torchmetrics.classification.MulticlassAccuracy(2)

    @traced
    def training_step(self, batch, batch_idx):
        batches = list(batch.values()) if isinstance(batch, dict) else [batch]
        losses = []
        for x, md in batches:
            out = self.net(x)
            losses.append(torch.nn.functional.cross_entropy(out, md["y"]))
            self.accuracy(out, md["y"])
        loss = torch.stack(losses).mean()
        self.log("loss/train", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("accuracy/train", self.accuracy, on_step=True, on_epoch=True)
        if batch_idx % 3 == 0:
            self.log("sometimes", loss * random.random(), on_step=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, md = batch
        out = self.net(x) + 0.01 * torch.randn(1)
        self.val_accuracy(out, md["y"])
        self.log("accuracy/validate", self.val_accuracy, on_step=True, on_epoch=True)
        self.log("loss/validate", torch.nn.functional.cross_entropy(out, md["y"]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


def scheduler(name):
    if name == "plateau":
        return lambda optimizer: {
            "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
            "monitor": "loss/validate",
        }
    if name == "plateau_step":
        return lambda optimizer: {
            "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
            "monitor": "loss/train", "interval": "step", "frequency": 2,
        }
    if name == "step":
        return lambda optimizer: {
            "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95), "interval": "step"
        }
    return None


def train_config(hparams):
    config = hparams["config"]
    if config.get("foreign"):
        module = Foreign(scheduler(config.get("scheduler")))
    else:
        accuracy = torchmetrics.classification.MulticlassAccuracy(2)
        auroc = torchmetrics.classification.MulticlassAUROC(2)
        module = Ours(
            network(), torch.nn.CrossEntropyLoss(),
            functools.partial(torch.optim.AdamW, lr=0.05), scheduler(config.get("scheduler")),
            metrics={"accuracy": accuracy, "auroc": auroc},
        )
    if config.get("compiled"):
        module.model = torch.compile(module.model)
    workers = config.get("workers", 0)
    kwargs = {"num_workers": workers, "persistent_workers": config.get("persistent", False)}
    count = config.get("count", 40)
    if config.get("arrays"):
        x = np.random.RandomState(0).randn(count, 6).astype("float32")
        y = (x.sum(axis=1) > 0).astype("int64")
        data = ArrayDataset(x, y, augmentation=lambda x, md: (
            (x + np.random.normal(size=x.shape).astype("float32") + random.random()), md))
    else:
        data = Samples(count, True)
    train = DataLoader(data, batch_size=8, shuffle=True, **kwargs)
    if config.get("combined"):
        train = {"a": train, "b": DataLoader(Samples(20, True), batch_size=8, shuffle=True)}
    callbacks = []
    if config.get("stops"):
        callbacks.append(EarlyStopping("loss/validate", patience=config["stops"]))
    return {
        "module": module,
        "train_dataloaders": train,
        "val_dataloaders": DataLoader(Samples(16, True), batch_size=8),
        "callbacks": callbacks,
    }
'''


def configuration(config: dict[str, Any], checkpoint: Any = None, **init: Any) -> dict[str, Any]:
    """Return the hparams of a configuration; most of them log every second step."""
    base = {
        "max_epochs": 4,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return {
        "config": config,
        "checkpoint": checkpoint or {"every_n_steps": 2},
        "trainer": {"init": {**base, **init}},
    }


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": configuration({}),
    "foreign": configuration({"foreign": True, "scheduler": "step"}),
    "arrays": configuration({"arrays": True}, {"every_n_steps": 3, "keep": 2}),
    "workers": configuration({"workers": 2}, {"every_n_steps": 3}),
    "persistent": configuration(
        {"workers": 2, "persistent": True, "foreign": True}, {"every_n_steps": 3}
    ),
    "plateau": configuration({"scheduler": "plateau"}),
    "plateau_step": configuration({"scheduler": "plateau_step", "foreign": True}),
    "epochs_only": configuration({"scheduler": "plateau"}, {"every_minutes": None}),
    "val_check_interval": configuration({"scheduler": "plateau"}, val_check_interval=2),
    "val_check_foreign": configuration({"foreign": True}, val_check_interval=0.5),
    "accumulation": configuration({"scheduler": "step"}, accumulate_grad_batches=3),
    "partial": configuration({"count": 43, "foreign": True}, accumulate_grad_batches=2),
    "combined": configuration({"combined": True, "foreign": True}),
    "stops": configuration({"stops": 1}, min_epochs=3, max_epochs=8),
    "bf16": configuration({}, precision="bf16-mixed"),
    "max_steps": configuration({"scheduler": "plateau"}, max_epochs=None, max_steps=17),
    "every_other": configuration(
        {"scheduler": "plateau_step", "foreign": True}, check_val_every_n_epoch=2
    ),
    "ddp": configuration({}, accelerator="cpu", devices=2, strategy="ddp"),
    "ddp_foreign": configuration(
        {"foreign": True, "count": 43}, accelerator="cpu", devices=2, strategy="ddp"
    ),
    "compiled": configuration({"compiled": True, "count": 43}),
}

HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_save_checkpoint",
)


class Killer(pl.Callback):
    """Sends a signal to its own process in the n-th call of a hook."""

    def __init__(self, hook: str, count: int, signum: int = signal.SIGKILL) -> None:
        self.left = count
        self.signum = signum
        if hook in HOOKS:
            setattr(self, hook, self.strike)

    def strike(self, *arguments: object, **kwargs: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)


@dataclass
class Outcome:
    """All of a finished run that must be the same."""

    trace: list[dict[Any, Any]] = field(default_factory=list)
    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    best: Any = None


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all that was logged, in the order in which it was."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                number = value.tensor.float_val[0]
                found.setdefault(value.tag, []).append((event.step, number))
    return found


def outcome_of(run: Run, trace: Path) -> Outcome:
    """Return what came out of `run`."""
    checkpoint = torch.load(run.checkpoint("last"), weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    content = {key: checkpoint[key] for key in kept}
    content["callbacks"] = {
        name: {key: value for key, value in state.items() if key != "run_id"}
        for name, state in checkpoint["callbacks"].items()
    }
    best = torch.load(run.checkpoint("best"), weights_only=True)
    return Outcome(
        [trace_of(path) for path in sorted(trace.parent.glob(f"{trace.name}.*"))],
        scalars_of(run.metrics_folder),
        content,
        run.metrics,
        {"score": run.best_score, "weights": best["state_dict"], "step": best["global_step"]},
    )


def trace_of(path: Path) -> dict[Any, Any]:
    """Return what each step saw; a step that was made twice must have seen the same twice."""
    steps: dict[Any, Any] = {}
    for line in path.read_text().splitlines():
        epoch, batch, *seen = json.loads(line)
        before = steps.setdefault((epoch, batch), seen)
        if before != seen:
            steps[epoch, batch, "again"] = seen
    return steps


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Return the names of what is not the same to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
        return [] if same else [name]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            found
            for key in keys
            for found in (
                differences(one[key], other[key], f"{name}/{key}")
                if key in one and key in other
                else [f"{name}/{key} ({'lost' if key in one else 'new'})"]
            )
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{name} ({len(one)} and {len(other)} entries)"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{name}[{i}]")]
    if hasattr(one, "__dataclass_fields__"):
        return differences(vars(one), vars(other), name)
    return [] if one == other else [f"{name}: {one!r} and {other!r}"]


class Lab:
    """A project whose experiment is trained in forked processes."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.hparams = CONFIGURATIONS[name]
        folder = root / "experiments" / "00_toy"
        folder.mkdir(parents=True, exist_ok=True)
        (root / "pyproject.toml").touch()
        (folder / "__main__.py").write_text(CONFIG)
        self.script = folder / "hparams.py"
        self.script.write_text(f"hparams = {self.hparams!r}\n")
        self.ranks = self.hparams["trainer"]["init"].get("devices", 1)

    def run(
        self, artifacts: Path, killer: Killer | None, *, after: float | None = None
    ) -> list[int]:
        """Train in processes of its own, the newest run if there is one; return how they ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        resume = latest_unfinished(artifacts, "00_toy-hparams") if artifacts.exists() else None
        children = []
        for rank in range(self.ranks):
            child = os.fork()
            if not child:
                os._exit(self._child(artifacts, resume, killer if rank == 0 else None, rank, port))
            children.append(child)
        if after is not None:
            threading.Timer(after, kill, [children[0]]).start()
        codes = []
        for child in children:
            if codes and codes[0]:
                kill(child)  # A follower would wait for the one that was killed.
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return codes

    def _child(
        self, artifacts: Path, resume: Run | None, killer: Killer | None, rank: int, port: int
    ) -> int:
        warnings.simplefilter("ignore")
        out = os.open(artifacts.parent / f"output.{rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ["TRACE"] = str(artifacts.parent / "trace")
        if self.ranks > 1:
            os.environ |= {
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        with cli._failures(debug=True), contextlib.suppress(SystemExit):
            callbacks = [killer] if killer else []
            options = Options(resume=resume, callbacks=callbacks, artifacts=artifacts)
            train_with(Experiment.load(self.script), options)
            return 0
        return 1


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def only_run(artifacts: Path) -> Run:
    (folder,) = artifacts.iterdir()
    return Run.read(folder)


def unbroken(lab: Lab, folder: Path) -> Outcome:
    folder.mkdir()
    codes = lab.run(folder / "artifacts", None)
    if any(codes):
        raise SystemExit((folder / "output.0").read_text())
    return outcome_of(only_run(folder / "artifacts"), folder / "trace")


def broken(
    lab: Lab, folder: Path, strikes: list[Callable[[Path], list[int]]]
) -> Outcome | str | None:
    """Train, broken off by each of `strikes` in turn, then to the end; None if one missed."""
    folder.mkdir()
    for strike in strikes:
        if strike(folder / "artifacts")[0] != -signal.SIGKILL:
            return None
    codes = lab.run(folder / "artifacts", None)
    if any(codes):
        return f"exit codes {codes}: " + (folder / "output.0").read_text()[-2000:]
    return outcome_of(only_run(folder / "artifacts"), folder / "trace")


def strike_of(lab: Lab, chance: random.Random) -> tuple[str, Callable[[Path], list[int]]]:
    """Return a way to break a training off, and its name."""
    if chance.random() < 0.25:
        seconds = chance.uniform(0.05, 1.2)
        return f"after {seconds:.2f} s", lambda path: lab.run(path, None, after=seconds)
    hook, count = chance.choice(HOOKS), chance.randint(1, 12)
    if "epoch" in hook or "validation" in hook or "save" in hook:
        count = chance.randint(1, 4)
    return f"{hook} {count}", lambda path: lab.run(path, Killer(hook, count))


def main(root: Path, name: str, points: int, seed: int = 0) -> None:
    torch.set_num_threads(1)
    lab = Lab(root / "project", name)
    chance = random.Random(f"{name} {seed}")
    expected = unbroken(lab, root / "unbroken")
    point = 0
    while point < points:
        chosen = [strike_of(lab, chance) for _ in range(3 if point % 4 == 3 else 1)]
        began = time.monotonic()
        folder = root / str(point)
        shutil.rmtree(folder, ignore_errors=True)
        found = broken(lab, folder, [strike for _, strike in chosen])
        if found is None:
            continue  # The training was over before it was struck.
        wrong = [found] if isinstance(found, str) else differences(expected, found)
        line = {
            "configuration": name,
            "killed": [described for described, _ in chosen],
            "differences": wrong[:6],
            "seconds": round(time.monotonic() - began, 2),
        }
        print(json.dumps(line), flush=True)
        point += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *map(int, sys.argv[4:5]))
