"""The words before and after a run: what it is, and what came out of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from math import isfinite
from pathlib import Path
from typing import Any

from torch_lab.runs import Run
from torch_lab.training import Training, changed_hparams
from torch_lab.utils import shown

__all__ = ["closing_record", "closing_rows", "duration", "header_rows"]


def header_rows(training: Training) -> Iterator[tuple[str, str]]:
    """Yield what is worth knowing before a run starts."""
    experiment, dev_run = training.experiment, training.options.dev_run
    yield "run", f"{training.run.name}, offline"
    if dev_run is not None:
        yield "dev run", f"overfits on {dev_run}, writes no checkpoints"
    if len(experiment.layers) > 1:
        yield "layers", " > ".join(layer.path.name for layer in experiment.layers)
        differences = [str(difference) for difference in experiment.differences()]
        yield "differs", "\n".join(differences) or "in nothing from the base layer"
    yield from _start_rows(training)
    yield "code", str(training.code)
    yield "device", _device(training)
    yield "stops", _stops(training)
    yield "folder", shown(training.run.folder)


def _start_rows(training: Training) -> Iterator[tuple[str, str]]:
    """Yield what the run starts from, unless it starts from nothing."""
    start, resume = training.start, training.options.resume
    if resume is not None:
        at = f"goes on at step {start.step}" if training.goes_on else "begins again"
        yield "resumes", f"{at}, after it was {start.was}"
        if changed := changed_hparams(resume, training.hparams):
            yield "changed", "\n".join(changed)
    elif training.source is not None:
        how = "goes on from" if start.source else "starts from the weights in"
        yield "from", f"{how} {training.source}"
    if start.changes:
        yield "not exact", "\n".join(start.changes)


def _device(training: Training) -> str:
    trainer = training.trainer
    name = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    seed = training.hparams.seed
    return f"{name} x {trainer.world_size}, precision {trainer.precision}, seed {seed}"


def _stops(training: Training) -> str:
    """Say what will stop the run."""
    trainer, max_time = training.trainer, training.hparams.trainer.init.get("max_time")
    reasons = []
    if trainer.max_epochs is None and trainer.max_steps == -1 and max_time is None:
        reasons.append("after 1,000 epochs (Lightning's default: nothing was given)")
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        reasons.append(f"after {trainer.max_epochs:,} epoch{'s' * (trainer.max_epochs != 1)}")
    if trainer.max_steps >= 0:
        reasons.append(f"after {trainer.max_steps:,} steps")
    if max_time is not None:
        reasons.append(f"after {max_time}")
    reasons += [
        f"when {callback.monitor} stops improving" for callback in trainer.early_stopping_callbacks
    ]
    return " or ".join(reasons) or "only when you stop it"


def closing_rows(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what is worth knowing after a run."""
    yield (
        "run",
        f"{run.name} {run.state} {'in' if run.state == 'completed' else 'after'} {duration(run)}",
    )
    for name in ("best", "last"):
        if (sidecar := run.sidecar(name)) is not None:
            yield name, f"{_described(sidecar)}  {shown(run.checkpoint(name))}"
    if run.metrics:
        yield "metrics", _listed(run.metrics)
    if run.plots_folder.is_dir():
        yield "plots", shown(run.plots_folder)
    yield "folder", shown(run.folder)
    yield "look", f"tensorboard --logdir {_quoted(run.metrics_folder)}"
    if run.state in ("failed", "stopped"):
        yield "go on", f"train {_quoted(Path(run.record.script))} --resume {run.name}"
    if run.best is not None:
        yield "use", f'torch_lab.load_weights(model, "{run.name}", name="best")'


def _described(sidecar: Mapping[str, Any]) -> str:
    score = (
        f"{sidecar['monitor']} {sidecar['score']:.4g}, " if sidecar.get("score") is not None else ""
    )
    return f"{score}epoch {sidecar['epoch'] + 1}, step {sidecar['step']}"


def _listed(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))


def _quoted(path: Path) -> str:
    return shlex.quote(shown(path))


def duration(run: Run) -> str:
    """Return how long a closed run took, in words."""
    record = run.record
    if record.ended is None:
        return "an unknown time"
    seconds = _seconds(run)
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _seconds(run: Run) -> float:
    started, ended = run.record.started, run.record.ended
    if ended is None:
        return 0.0
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()


def closing_record(run: Run) -> str:
    """Return what is worth knowing after a run, as one line of JSON."""
    record = {
        "run": run.name,
        "state": run.state,
        "folder": str(run.folder),
        "duration_s": _seconds(run),
        "best": run.sidecar("best"),
        "last": run.sidecar("last"),
        "metrics": {
            name: value if isfinite(value) else None for name, value in run.metrics.items()
        },
    }
    return json.dumps(record, allow_nan=False)
