"""The words before and after a run: what it is, and what came out of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from datetime import timedelta
from math import isfinite
from pathlib import Path
from typing import Any

from torch_lab.experiment import Experiment
from torch_lab.listing import seconds_trained
from torch_lab.runs import Run
from torch_lab.training import Training, changed_hparams
from torch_lab.utils import shown

__all__ = ["closing_record", "closing_rows", "duration", "header_rows", "last_words"]


def header_rows(training: Training) -> Iterator[tuple[str, str]]:
    """Yield what is worth knowing before a run starts."""
    experiment, dev_run = training.experiment, training.options.dev_run
    yield "run", f"{training.run.name}, {_where(training)}"
    if dev_run is not None:
        yield "dev run", f"overfits on {dev_run}, writes no checkpoints"
    if len(experiment.layers) > 1:
        yield "layers", " > ".join(_named(layer.path, experiment) for layer in experiment.layers)
        differences = [str(difference) for difference in experiment.differences()]
        yield "differs", "\n".join(differences) or "in nothing from the base layer"
    if experiment.overrides:
        yield "set", "\n".join(experiment.overrides.lines())
    if training.options.edited:
        yield "edited", "\n".join(training.options.edited)
    yield from _start_rows(training)
    yield "code", str(training.code)
    yield "device", _device(training)
    yield "stops", _stops(training)
    yield "folder", shown(training.run.folder)


def _named(script: Path, experiment: Experiment) -> str:
    """Return the name of a script, with its folder if that is not the experiment's."""
    is_own = script.parent == experiment.folder
    return script.name if is_own else f"{script.parent.name}/{script.name}"


def _where(training: Training) -> str:
    """Say where the run is to be seen, or why not and how it can be sent later."""
    if training.tracking is not None:
        return f"on ClearML: {training.tracking.page}"
    if not training.why_offline:
        return "offline"
    return f"offline: {training.why_offline}; torch-lab sync {training.run.name} sends it later"


def _start_rows(training: Training) -> Iterator[tuple[str, str]]:
    """Yield what the run starts from, unless it starts from nothing."""
    start, resume = training.start, training.options.resume
    if resume is not None:
        yield "resumes", f"{_beginning(training)}, after it was {start.was}"
        if changed := changed_hparams(resume, training.hparams):
            kept = ["the optimizers and schedulers go on with their settings in the checkpoint"]
            yield "changed", "\n".join([*changed, *(kept if training.goes_on else [])])
    if training.source is not None and not training.goes_on:
        how = "goes on from" if start.source else "starts from the weights in"
        yield "from", f"{how} {training.source}"
    if start.changes:
        yield "not exact", "\n".join(start.changes)


def _beginning(training: Training) -> str:
    """Say which checkpoint of its own a run goes on from, and where that is."""
    source = training.source
    if source is None or source.run is None or not training.goes_on:
        return "begins again"
    epoch = (source.run.sidecar(source.path.stem) or {}).get("epoch")
    at = "" if epoch is None else f", epoch {epoch + 1}"
    return f"{source.path.name}{at}: goes on at step {training.start.step}"


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
    if run.state in ("failed", "stopped") and (command := _going_on(run)):
        yield "go on", command
    if run.best is not None:
        yield "use", f'torch_lab.load_weights(model, "{run.name}", name="best")'


def last_words(run: Run) -> str:
    """Return what a process leaves that ends at once: the checkpoint, and the command to go on."""
    sidecar = run.sidecar("last")
    stands = "no checkpoint was written" if sidecar is None else f"last.ckpt stands: {_at(sidecar)}"
    command = _going_on(run)
    return "; ".join(["ended at once", stands, *([f"go on: {command}"] if command else [])])


def _going_on(run: Run) -> str | None:
    """Return the command that goes on with a run; for a dev run there is none."""
    is_dev_run = not run.name.startswith(run.record.experiment)
    return None if is_dev_run else f"train {_quoted(Path(run.record.script))} --resume {run.name}"


def _described(sidecar: Mapping[str, Any]) -> str:
    score = (
        f"{sidecar['monitor']} {sidecar['score']:.4g}, " if sidecar.get("score") is not None else ""
    )
    return score + _at(sidecar)


def _at(sidecar: Mapping[str, Any]) -> str:
    return f"epoch {sidecar['epoch'] + 1}, step {sidecar['step']}"


def _listed(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))


def _quoted(path: Path) -> str:
    return shlex.quote(shown(path))


def duration(run: Run) -> str:
    """Return how long a closed run was trained, in words."""
    seconds = seconds_trained(run)
    if seconds is None:
        return "an unknown time"
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def closing_record(run: Run) -> str:
    """Return what is worth knowing after a run, as one line of JSON."""
    record = {
        "run": run.name,
        "state": run.state,
        "folder": str(run.folder),
        "duration_s": seconds_trained(run) or 0.0,
        "best": run.sidecar("best"),
        "last": run.sidecar("last"),
        "metrics": {
            name: value if isfinite(value) else None for name, value in run.metrics.items()
        },
    }
    return json.dumps(record, allow_nan=False)
