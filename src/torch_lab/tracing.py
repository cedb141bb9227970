"""A training that writes down what it sees and makes, and that kills itself: for `verify`.

Beside each trace, which has a line of JSON for each batch, a rank and its training have a file: the
trace at `path` of rank 0 is `path.0`, and what came out of the training is `path.outcome`.
"""

from __future__ import annotations

import json
import os
import signal
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from torch_lab.checkpoints import DESCRIPTION, source_of
from torch_lab.contents import contents
from torch_lab.exact import STATE
from torch_lab.experiment import Experiment
from torch_lab.hparams import Hparams
from torch_lab.runner import train_with
from torch_lab.runs import Run
from torch_lab.training import Options
from torch_lab.utils import process_rank
from torch_lab.verify import Hook, KillPoint

__all__ = ["Trace", "TracedRun", "digests"]

_WEIGHTS_BYTES_PER_STEP = 2**24
"""So much is hashed in some 8 ms; larger models are looked at every few steps."""
_DEPTH = 3
_MOST_PARTS = 16
_NOT_COMPARED = ("loops", STATE, DESCRIPTION)
"""Counters of Lightning's, and what is of the file and the run that it belongs to."""


@dataclass(frozen=True)
class TracedRun:
    """A training of an experiment, whose scripts and artifacts stay as they are.

    Args:
        path: The hparams script.
        artifacts: Where the run's folder is made.
        trace: Where the traces go.
        steps: After how many steps it ends at the latest.
        every: After how many steps a checkpoint is written; None for the end of epochs alone.
        trust: Whether checkpoints may hold code.
    """

    path: Path
    artifacts: Path
    trace: Path
    steps: int
    every: int | None = None
    trust: bool = False

    def train(self, kill: KillPoint | None = None, resume: str | None = None) -> None:
        """Train.

        Args:
            kill: Where this process is killed.
            resume: Name of the run to go on with, instead of a new one.
        """
        experiment = Experiment.load(self.path)
        experiment = replace(experiment, hparams=self._limited(experiment.hparams))
        options = Options(
            callbacks=(Trace(self.trace, kill),),
            artifacts=self.artifacts,
            resume=Run.read(self.artifacts / resume) if resume else None,
            trust=self.trust,
        )
        run = train_with(experiment, options)
        if process_rank() == 0:
            self._write_outcome(run)

    def _limited(self, hparams: Hparams) -> Hparams:
        """Return `hparams` for a training of at most `steps` steps that no clock rules."""
        init = {key: value for key, value in hparams.trainer.init.items() if key != "max_time"}
        source = None if hparams.checkpoint.weights_only else source_of(hparams, trust=self.trust)
        last = self.steps + (source.resumable_step(init) if source else 0)
        if init.get("max_steps", -1) not in (-1, None):
            last = min(last, init["max_steps"])
        return replace(
            hparams,
            trainer=replace(hparams.trainer, init={**init, "max_steps": last}),
            checkpoint=replace(hparams.checkpoint, every_minutes=None, every_n_steps=self.every),
        )

    def _write_outcome(self, run: Run) -> None:
        last = run.checkpoint("last")
        state: dict[str, Any] = {}
        if last.is_file():
            checkpoint = torch.load(last, map_location="cpu", weights_only=not self.trust)
            kept = {key: checkpoint[key] for key in checkpoint if key not in _NOT_COMPARED}
            state = dict(self._leaves(kept, ""))
        outcome = {"scalars": _scalars(run.metrics_folder), "state": state}
        Path(f"{self.trace}.outcome").write_text(json.dumps(outcome), encoding="utf-8")

    def _leaves(self, value: Any, path: str) -> Iterator[tuple[str, Any]]:
        """Yield what a checkpoint holds, by dotted paths; where and of which run it is left out."""
        if isinstance(value, (Mapping, list, tuple)):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                if key != "run_id":
                    name = self._moved(key)
                    yield from self._leaves(item, f"{path}.{name}" if path else name)
        else:
            yield path, _plain(self._moved(value) if isinstance(value, str) else value)

    def _moved(self, name: Any) -> str:
        return str(name).replace(str(self.artifacts), "")


class Trace(pl.Callback):
    """Writes a line for every batch that was trained, and one for every hook that can be killed in.

    Args:
        path: Each rank adds its own to it.
        kill: Where to kill the process of rank 0.
    """

    def __init__(self, path: Path, kill: KillPoint | None = None) -> None:
        self.path = path
        self.kill = kill
        self._step = 0
        self._inputs: dict[str, Any] = {}
        self._weights_every = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch, before anybody changes it."""
        self._step = trainer.global_step + 1
        self._reach(trainer, Hook.BATCH_START, self._step)
        self._inputs = dict(digests(batch))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Be killed, maybe."""
        self._reach(trainer, Hook.OPTIMIZER, self._step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write what was seen and made."""
        groups = (group for each in trainer.optimizers for group in each.param_groups)
        loss = outputs["loss"] if isinstance(outputs, Mapping) and "loss" in outputs else outputs
        line = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "step": self._step,
            "inputs": self._inputs,
            "loss": dict(digests(loss)),
            "rates": {str(index): float(group["lr"]) for index, group in enumerate(groups)},
            "weights": self._weights(pl_module),
        }
        self._write(trainer, line)
        self._reach(trainer, Hook.BATCH_END, self._step)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Be killed, maybe; not in the validation before training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._reach(trainer, Hook.VALIDATION, trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be killed, maybe."""
        self._reach(trainer, Hook.EPOCH_END, trainer.global_step)

    def _reach(self, trainer: pl.Trainer, hook: Hook, step: int) -> None:
        kill = self.kill
        if kill is None or not trainer.is_global_zero:
            self._write(trainer, {"hook": hook, "step": step})
        elif hook == kill.hook and step >= kill.step:
            self._write(trainer, {"killed": hook, "step": step})
            os.kill(os.getpid(), signal.SIGKILL)

    def _weights(self, module: pl.LightningModule) -> dict[str, str]:
        state = module.state_dict()
        if not self._weights_every:
            size = sum(each.nbytes for each in state.values() if isinstance(each, Tensor))
            self._weights_every = 1 + size // _WEIGHTS_BYTES_PER_STEP
        return {"": _digest(state)} if self._step % self._weights_every == 0 else {}

    def _write(self, trainer: pl.Trainer, line: Mapping[str, Any]) -> None:
        # Opened each time: a callback may be pickled on its way to another process.
        path = f"{self.path}.{trainer.global_rank}"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(line) + "\n").encode())
        finally:
            os.close(file)


def digests(value: Any, name: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a batch by their names, `[1]['y']`: numbers as they are, digests else."""
    if depth and isinstance(value, Mapping) and len(value) <= _MOST_PARTS:
        for key, part in value.items():
            yield from digests(part, f"{name}[{key!r}]", depth - 1)
    elif depth and isinstance(value, (list, tuple)) and len(value) <= _MOST_PARTS:
        for index, part in enumerate(value):
            yield from digests(part, f"{name}[{index}]", depth - 1)
    else:
        yield name, _plain(value)


def _plain(value: Any) -> Any:
    """Return a number, a word or None as it is, and a digest of anything else."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        return value.item()
    is_plain = value is None or isinstance(value, (bool, int, float, str))
    return value if is_plain else _digest(value)


def _digest(value: Any) -> str:
    """Return eight letters that stand for the bits, types and shapes of all that is in `value`."""
    # Not for secrets, and fast: 2 GB/s.
    crc = 0
    for title, data in contents(value):
        crc = zlib.crc32(data or b"", zlib.crc32(title.encode(), crc))
    return f"{crc:08x}"


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all numbers that were logged, with their steps, in the order in which they were."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("*.tfevents.*")):
        below = file.parent.relative_to(folder).as_posix()
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    tag = value.tag if below == "." else f"{below}/{value.tag}"
                    found.setdefault(tag, []).append((event.step, value.tensor.float_val[0]))
    return found
