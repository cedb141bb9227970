"""Breaks a training off at many points, resumes it, and compares the end with an unbroken one's.

`python tests/sweep.py FOLDER POINTS [CONFIGURATION...]` prints a line of JSON for each point of
each configuration, or of all. With `--by SIGTERM SIGINT` (SIGHUP, SIGUSR1) the training is asked
to stop instead of being killed. The exit code is 1 if anything was not as it must be:

* all that `Outcome` holds is the same to the bit;
* exit codes are those of the signal, and a stop takes less than `SECONDS_TO_STOP`;
* no process of a training is left `SECONDS_TO_END` after it.

Processes are forked from this one, which has imported everything: a start takes milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from torch_lab import cli
from torch_lab.experiment import Experiment
from torch_lab.runner import train_with
from torch_lab.runs import Run, latest_unfinished, runs_of
from torch_lab.training import Options

SECONDS_TO_STOP = 10.0
SECONDS_TO_END = 15.0
SECONDS_TO_HANG = 180.0
NAME = "00_toy-hparams"

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
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from torch_lab.datasets import ArrayDataset
from torch_lab.modules import TrainLabModule


class Samples(Dataset):
    """Samples that are augmented from `random`, NumPy and torch."""

    def __init__(self, count, augments, shape=(6,)):
        self.x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
        self.augments = augments

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index].clone()
        y = (x.sum() > 0).long()
        if self.augments:
            x += random.random() + float(np.random.normal()) + torch.randn(x.shape)
        return x, {"y": y, "idx": index}


class Stream(IterableDataset):
    """The same, as a stream that is dealt out to the workers and knows where it stands."""

    def __init__(self, samples):
        self.samples = samples
        self.next = None

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.next is None:
            self.next = worker
        while self.next < len(self.samples):
            index, self.next = self.next, self.next + workers
            yield self.samples[index]
        self.next = None

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Data(pl.LightningDataModule):
    """A datamodule that makes its loaders anew when it is asked for them."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def train_dataloader(self):
        return DataLoader(Samples(self.count, True), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Samples(16, True), batch_size=8)


def network(images=False):
    if images:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Dropout(0.3), torch.nn.Linear(32, 2),
        )
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(),
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
            network(config.get("images")), torch.nn.CrossEntropyLoss(),
            functools.partial(torch.optim.AdamW, lr=0.05), scheduler(config.get("scheduler")),
            metrics={"accuracy": accuracy, "auroc": auroc},
        )
    if "compiled" in config:
        module.model = torch.compile(module.model, **config["compiled"])
    workers = config.get("workers", 0)
    kwargs = {"num_workers": workers, "persistent_workers": config.get("persistent", False)}
    count, shape = config.get("count", 40), (3, 4, 4) if config.get("images") else (6,)
    if config.get("arrays"):
        x = np.random.RandomState(0).randn(count, 6).astype("float32")
        y = (x.sum(axis=1) > 0).astype("int64")
        data = ArrayDataset(x, y, augmentation=lambda x, md: (
            (x + np.random.normal(size=x.shape).astype("float32") + random.random()), md))
    else:
        data = Samples(count, True, shape)
    if config.get("stream"):
        data = Stream(data)
    train = DataLoader(data, batch_size=8, shuffle=not config.get("stream"), **kwargs)
    if config.get("combined"):
        train = {"a": train, "b": DataLoader(Samples(20, True), batch_size=8, shuffle=True)}
    callbacks = []
    if config.get("stops"):
        callbacks.append(EarlyStopping("loss/validate", patience=config["stops"]))
    components = {"module": module, "callbacks": callbacks}
    if config.get("datamodule"):
        return {**components, "datamodule": Data(count)}
    validate = DataLoader(Samples(16, True, shape), batch_size=8)
    return {**components, "train_dataloaders": train, "val_dataloaders": validate}
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
    "stream": configuration({"stream": True, "count": 43}, {"every_n_steps": 3}),
    "stream_workers": configuration(
        {"stream": True, "count": 43, "workers": 2, "foreign": True}, {"every_n_steps": 3}
    ),
    "datamodule": configuration({"datamodule": True, "count": 43}),
    "bf16": configuration({}, precision="bf16-mixed"),
    "max_steps": configuration({"scheduler": "plateau"}, max_epochs=None, max_steps=17),
    "every_other": configuration(
        {"scheduler": "plateau_step", "foreign": True}, check_val_every_n_epoch=2
    ),
    "ddp": configuration({}, accelerator="cpu", devices=2, strategy="ddp"),
    "ddp_foreign": configuration(
        {"foreign": True, "count": 43}, accelerator="cpu", devices=2, strategy="ddp"
    ),
    "channels_last": configuration({"images": True}) | {"channels_last": True},
    "fused": configuration({"scheduler": "step"}, accumulate_grad_batches=2)
    | {"optimizer": {"fused": True}},
    "tuned": configuration({"images": True, "count": 43}, precision="bf16-mixed")
    | {"channels_last": True, "optimizer": {"fused": True}, "pin_memory": True},
    "compiled": configuration({"compiled": {}}),
    # As torch compiles by default, a smaller batch has kernels made for any size, which a fresh
    # process does not have: then the end differs in the last bits.
    "compiled_dynamic": configuration({"compiled": {"dynamic": True}, "count": 43}),
    "compiled_static": configuration({"compiled": {"dynamic": False}, "count": 43}),
    "compiled_by_key": configuration({"images": True, "count": 43})
    | {"compile": True, "channels_last": True, "optimizer": {"fused": True}},
    "compiled_ddp": configuration({}, accelerator="cpu", devices=2, strategy="ddp")
    | {"compile": True},
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


@dataclass(frozen=True)
class Strike:
    """A signal to a training: in the n-th call of a hook, or so many seconds after its start."""

    signum: signal.Signals
    hook: str = ""
    count: int = 0
    seconds: float = 0.0
    twice: bool = False
    """Whether a second one follows after 50 ms."""

    def __str__(self) -> str:
        where = f"{self.hook} {self.count}" if self.hook else f"after {self.seconds:.2f} s"
        return f"{where}, twice" if self.twice else where

    @property
    def codes(self) -> tuple[int, ...]:
        """How a process may end by it; before anything has begun, as any other program does."""
        if self.signum == signal.SIGKILL:
            return (-signal.SIGKILL,)
        return 128 + self.signum, -self.signum

    def at(self, process: int, note: Path) -> None:
        """Strike, and note the time."""
        note.write_text(str(time.monotonic()))
        if self.twice:
            threading.Timer(0.05, send, [process, self.signum]).start()
        send(process, self.signum)


def send(process: int, signum: int) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signum)


class Striker(pl.Callback):
    """Strikes its own process in a hook."""

    def __init__(self, strike: Strike, note: Path) -> None:
        self.chosen = strike
        self.left = strike.count
        self.note = note
        setattr(self, strike.hook, self.count)

    def count(self, *arguments: object, **kwargs: object) -> None:
        self.left -= 1
        if self.left == 0:
            self.chosen.at(os.getpid(), self.note)


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
    scalars = scalars_of(run.metrics_folder)
    content["validations"] = len(scalars["loss/validate"])
    best = torch.load(run.checkpoint("best"), weights_only=True)
    return Outcome(
        [trace_of(path) for path in sorted(trace.parent.glob(f"{trace.name}.*"))],
        scalars,
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


@dataclass(frozen=True)
class End:
    """How a training ended."""

    code: int
    """Of its process, of the first of several."""
    seconds: float = 0.0
    """From the strike on."""
    left: int = 0
    """How many processes it has left behind."""

    def faults(self, strike: Strike) -> list[str]:
        """Return what is wrong with it, if `strike` should have ended it."""
        found = []
        if self.code not in strike.codes:
            found.append(f"exit code {self.code} after {strike}")
        if self.seconds > SECONDS_TO_STOP:
            found.append(f"it took {self.seconds:.1f} s to stop after {strike}")
        if self.left:
            found.append(f"{self.left} processes are left after {strike}")
        return found


class Lab:
    """A project whose experiment is trained in forked processes."""

    def __init__(self, root: Path, name: str) -> None:
        hparams = CONFIGURATIONS[name]
        folder = root / "experiments" / "00_toy"
        folder.mkdir(parents=True, exist_ok=True)
        (root / "pyproject.toml").touch()
        (folder / "__main__.py").write_text(CONFIG)
        self.script = folder / "hparams.py"
        self.script.write_text(f"hparams = {hparams!r}\n")
        self.ranks = hparams["trainer"]["init"].get("devices", 1)

    def run(self, folder: Path, strike: Strike | None) -> End:
        """Train in processes of its own; go on with the newest run if there is one."""
        note = folder / "struck"
        note.unlink(missing_ok=True)
        children = self._start(folder, strike)
        timers = [threading.Timer(SECONDS_TO_HANG, send, [children[0], signal.SIGABRT])]
        if strike and not strike.hook:
            timers.append(threading.Timer(strike.seconds, strike.at, [children[0], note]))
        for timer in timers:
            timer.start()
        code = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
        seconds = time.monotonic() - float(note.read_text()) if note.is_file() else 0.0
        for timer in timers:
            timer.cancel()
        for follower in children[1:]:
            if code:
                send(follower, signal.SIGKILL)  # It would wait for the one that is gone.
            follower_code = os.waitstatus_to_exitcode(os.waitpid(follower, 0)[1])
            code = code or follower_code
        return End(code, seconds, sum(left_of(child) for child in children))

    def _start(self, folder: Path, strike: Strike | None) -> list[int]:
        """Fork a process for each rank; return their numbers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        artifacts = folder / "artifacts"
        resume = latest_unfinished(artifacts, NAME) if artifacts.exists() else None
        children = []
        for rank in range(self.ranks):
            child = os.fork()
            if not child:
                code = 1
                try:
                    callbacks = [Striker(strike, folder / "struck")] if strike else []
                    callbacks = callbacks if strike and strike.hook and rank == 0 else []
                    code = self._child(
                        folder,
                        Options(resume=resume, callbacks=callbacks, artifacts=artifacts),
                        rank,
                        port,
                    )
                finally:
                    os._exit(code)
            children.append(child)
        return children

    def _child(self, folder: Path, options: Options, rank: int, port: int) -> int:
        os.setsid()
        warnings.simplefilter("ignore")
        out = os.open(folder / f"output.{rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        faulthandler.enable()
        os.environ["TRACE"] = str(folder / "trace")
        if self.ranks > 1:
            os.environ |= {
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        try:
            with cli._failures(debug=True):
                train_with(Experiment.load(self.script), options)
        except click.exceptions.Exit as end:
            return end.exit_code
        except KeyboardInterrupt:  # Before our handlers were there.
            return 128 + signal.SIGINT
        return 0


def left_of(session: int) -> int:
    """Return how many processes of a session are there after a while."""
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := _processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _processes_of(session: int) -> int:
    found = 0
    for process in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            found += os.getsid(process) == session
    return found


def newest_run(folder: Path) -> Run:
    return runs_of(folder / "artifacts", NAME)[0]


def unbroken(lab: Lab, folder: Path) -> Outcome:
    folder.mkdir()
    if lab.run(folder, None).code:
        raise SystemExit((folder / "output.0").read_text())
    return outcome_of(newest_run(folder), folder / "trace")


def broken(lab: Lab, folder: Path, strikes: list[Strike], expected: Outcome) -> list[str] | None:
    """Train, broken off by each of `strikes` in turn, then to the end.

    Returns:
        What is wrong with it. None if the training was over before it was struck.
    """
    faults = []
    for strike in strikes:
        end = lab.run(folder, strike)
        if end.code == 0 or ((folder / "artifacts").exists() and is_completed(folder)):
            return None
        faults += end.faults(strike)
    end = lab.run(folder, None)
    if end.code:
        return [*faults, f"exit code {end.code}: {(folder / 'output.0').read_text()[-2000:]}"]
    return faults + differences(expected, outcome_of(newest_run(folder), folder / "trace"))


def is_completed(folder: Path) -> bool:
    """Return whether the newest run in a folder is."""
    runs = runs_of(folder / "artifacts", NAME)
    return bool(runs) and runs[0].state == "completed"


def random_strike(chance: random.Random, signum: signal.Signals) -> Strike:
    is_stop = signum != signal.SIGKILL
    twice = is_stop and chance.random() < 0.2
    if chance.random() < (0.5 if is_stop else 0.25):
        return Strike(signum, seconds=chance.uniform(0.0 if is_stop else 0.05, 1.2), twice=twice)
    hook, count = chance.choice(HOOKS), chance.randint(1, 12)
    if "epoch" in hook or "validation" in hook or "save" in hook:
        count = chance.randint(1, 4)
    return Strike(signum, hook, count, twice=twice)


def sweep(root: Path, name: str, points: int, signum: signal.Signals, seed: int) -> int:
    """Sweep one configuration; return at how many points something was wrong."""
    root = root / f"{name}-{signum.name}"
    lab = Lab(root / "project", name)
    chance = random.Random(f"{name} {signum} {seed}")
    expected = unbroken(lab, root / "unbroken")
    failed = point = 0
    while point < points:
        strikes = [random_strike(chance, signum) for _ in range(3 if point % 4 == 3 else 1)]
        began = time.monotonic()
        folder = root / str(point)
        folder.mkdir()
        wrong = broken(lab, folder, strikes, expected)
        if not wrong:
            shutil.rmtree(folder)
        if wrong is None:
            continue
        line = {
            "configuration": name,
            "by": signum.name,
            "struck": [str(strike) for strike in strikes],
            "wrong": wrong[:6],
            "seconds": round(time.monotonic() - began, 2),
        }
        print(json.dumps(line), flush=True)
        failed += bool(wrong)
        point += 1
    return failed


def known(name: str) -> str:
    """Return the name of a configuration; another one is an error."""
    if name not in CONFIGURATIONS:
        raise argparse.ArgumentTypeError(f"there is no {name!r}")
    return name


def main() -> int:
    """Sweep what the arguments name; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new one, for all that is written")
    parser.add_argument("points", type=int, help="how many, of each configuration and signal")
    names = [*CONFIGURATIONS]
    # With `choices`, an empty list would have to be one of them.
    told = f"some of {', '.join(names)}; all if none is named"
    parser.add_argument("configurations", nargs="*", type=known, metavar="NAME", help=told)
    parser.add_argument("--by", nargs="+", default=["SIGKILL"], help="signals, by their names")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = [
        sweep(given.folder, name, given.points, signal.Signals[signum], given.seed)
        for name in given.configurations or names
        for signum in given.by
    ]
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
