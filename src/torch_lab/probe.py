"""A look at a training before it is made: its components, and one batch of it.

Whatever is written meanwhile goes to a temporary folder.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.strategies import StrategyRegistry

from torch_lab.errors import CheckpointError, DamagedError, HparamsError, did_you_mean, listed
from torch_lab.experiment import Experiment
from torch_lab.findings import Findings, Verdict
from torch_lab.hparams import CheckpointSection, Hparams
from torch_lab.one_batch import Seen, pass_one
from torch_lab.runs import artifacts_folder
from torch_lab.signals import StopRequest
from torch_lab.training import Options, Training, prepared
from torch_lab.utils import shown

__all__ = ["probe"]

_START: Final = ("checkpoint_task_id", "weights_only", "strict", "include", "exclude")
"""The keys of the section `checkpoint` that say what a run starts from."""
_OTHER_CHECKPOINTS: Final = 3
"""Beside `checkpoint.keep` of them: `last`, `previous`, and one that is being written."""
_SHARED_BY_MISTAKE: Final = 0.05
"""Such a share of the validation samples is not in the training data by chance."""
_FAR_ABOVE_A_GUESS: Final = 1.5
_ROOM: Final = 0.5
"""The loss of a few samples is not that of all: it is let lie so much higher."""


def probe(
    experiment: Experiment,
    findings: Findings,
    tracking: str = "auto",
    *,
    trust_checkpoint: bool = False,
) -> None:
    """Note what there is to find of a training of `experiment`, short of training it.

    Args:
        experiment: The loaded experiment.
        findings: Where it is noted.
        tracking: `auto` to ask a ClearML server, if there is one, for checkpoints and datasets that
            are not here; `offline` to touch nothing of ClearML.
        trust_checkpoint: Read a checkpoint that holds code, which can do anything that you can.
    """
    with tempfile.TemporaryDirectory(prefix="torch-lab-check-") as folder, _torch_as_it_is():
        options = Options(
            artifacts=Path(folder), tracking=tracking, trust=trust_checkpoint, only_checks=True
        )
        training = _training(experiment, findings, options)
        training.run.folder.mkdir()  # For what the module logs.
        with contextlib.closing(training.logger):
            with findings.step("batch"):
                seen = pass_one(training)
            _note_batch(training, seen, findings)
            _note_loss(training, seen, findings)
            _note_parameters(seen, findings)
            _note_checkpoints(training, seen, findings)
            _note_samples(seen, findings)
            _note_exactness(seen, findings)
            _note_memory(seen, findings)
            _note_monitor(training, seen, findings)


@contextlib.contextmanager
def _torch_as_it_is() -> Iterator[None]:
    """Compile nothing; leave torch's settings as they are, which trainers and scripts change."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    dtype = torch.get_default_dtype()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_default_dtype(dtype)


# The components.


def _training(experiment: Experiment, findings: Findings, options: Options) -> Training:
    with findings.step("components", start=CheckpointError):
        _check_machine(experiment.hparams)
        training = _prepared(experiment, findings, options)
        components = training.components
        module = getattr(components.module, "_orig_mod", components.module)
        data = [f"{name}: {_data(facts)}" for name, facts in training.loaders.facts().items()]
        data = data or [f"data from {type(components.datamodule).__name__}"]
    findings.ok("components", "; ".join([type(module).__name__, *data]))
    if training.source is not None:
        how = "goes on from" if training.start.source else "starts from the weights in"
        findings.ok("start", f"{how} {training.source}")
    return training


def _data(facts: Mapping[str, int | None]) -> str:
    samples, size = facts["samples"], facts["batch_size"]
    count = "samples" if samples is None else f"{samples:,} samples"
    return f"{count} in batches of {size}" if size else count


def _check_machine(hparams: Hparams) -> None:
    """Look at the names of what this machine may not have.

    Raises:
        HparamsError: Lightning knows none of that name.
    """
    known = {
        "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
        "strategy": ["auto", *StrategyRegistry.available_strategies()],
    }
    for key, names in known.items():
        given = hparams.trainer.init.get(key)
        if isinstance(given, str) and given not in names:
            raise HparamsError(
                f"{shown(hparams.path)}: trainer.init.{key} is {given!r}"
                f"{did_you_mean(given, names)}",
                f"it may be: {', '.join(names)}",
            )


def _prepared(experiment: Experiment, findings: Findings, options: Options) -> Training:
    """Return the training; without its checkpoint, if that is one of the runs that are not here."""
    try:
        return prepared(experiment, options, StopRequest())
    except CheckpointError as error:
        # Where there are no runs at all, as in CI, it says nothing of the script.
        if isinstance(error, DamagedError) or _has_runs(experiment):
            raise
        findings.warn("start", f"{error.message}; no run of this project is here")
    hparams = experiment.hparams
    if hparams.checkpoint.checkpoint_task_id is None:  # It is train_config that takes weights.
        findings.end()
    defaults = vars(CheckpointSection())
    anew = replace(hparams.checkpoint, **{key: defaults[key] for key in _START})
    experiment = replace(experiment, hparams=replace(hparams, checkpoint=anew))
    return prepared(experiment, options, StopRequest())


def _has_runs(experiment: Experiment) -> bool:
    return any(artifacts_folder(experiment.root).glob("*/run.json"))


# What is said of a batch.


def _note_batch(training: Training, seen: Seen, findings: Findings) -> None:
    stages = {"val_dataloader": "validation", "test_dataloader": "test"}
    others = [stage for hook, stage in stages.items() if hook in training.components.hooks]
    also = f"; one of {' and '.join(others)} too" if others else ""
    told = f"forward, backward and a step in {seen.seconds:.2g} s{also}"
    findings.ok("batch", told, seconds=seen.seconds)
    if without := seen.without_gradient:
        count = f"{len(without)} parameter{'s' * (len(without) > 1)}"
        findings.warn("batch", f"no gradient comes to {count}: {listed(without)}")


def _note_loss(training: Training, seen: Seen, findings: Findings) -> None:
    if seen.loss is None:
        findings.add("loss", Verdict.NOT_CHECKED, "training_step returned None")
        return
    told, values = f"{seen.loss:.4g} at the start", {"loss": seen.loss}
    if training.start.source is not None:
        told = f"{seen.loss:.4g} with new weights"
    if training.source is not None or (seen.classes or 0) < 2:
        findings.ok("loss", told, **values)
        return
    assert seen.classes is not None
    guess = math.log(seen.classes)
    told = f"{told}; a guess among {seen.classes:,} classes has {guess:.4g}"
    if seen.loss > _FAR_ABOVE_A_GUESS * guess + _ROOM:
        why = "are the inputs scaled, and the weights of the last layer small?"
        findings.warn("loss", f"{told}: {why}", **values, guess=guess)
    else:
        findings.ok("loss", told, **values, guess=guess)


def _note_parameters(seen: Seen, findings: Findings) -> None:
    total, trained = seen.parameters, seen.trained
    how_many = "all of them trainable" if trained == total else f"{trained:,} of them trainable"
    findings.ok("parameters", f"{total:,}, {how_many}", parameters=total, trained=trained)


def _note_checkpoints(training: Training, seen: Seen, findings: Findings) -> None:
    if training.hparams.trainer.init.get("enable_checkpointing") is False:
        findings.ok("checkpoints", "none are written: trainer.init.enable_checkpointing is False")
        return
    count = training.hparams.checkpoint.keep + _OTHER_CHECKPOINTS
    folder = artifacts_folder(training.experiment.root)
    disk = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(disk).free
    verdict = Verdict.OK if count * seen.checkpoint <= free else Verdict.NOT_OK
    told = f"{_size(seen.checkpoint)} each, {count} at most; {_size(free)} free in {shown(disk)}"
    values = {"bytes": seen.checkpoint, "files": count, "free": free}
    findings.add("checkpoints", verdict, told, **values)


def _note_samples(seen: Seen, findings: Findings) -> None:
    found = seen.overlap
    if found is None:
        findings.add("samples", Verdict.NOT_CHECKED, "there is no validation data")
    elif isinstance(found, str):
        findings.add("samples", Verdict.NOT_CHECKED, found)
    else:
        is_mistake = found.credible_share >= _SHARED_BY_MISTAKE
        few = Verdict.WARNING if found.count else Verdict.OK
        values = {name: value for name, value in vars(found).items() if name != "example"}
        findings.add("samples", Verdict.NOT_OK if is_mistake else few, str(found), **values)


def _note_exactness(seen: Seen, findings: Findings) -> None:
    if seen.reasons:
        findings.warn("exact", f"not after an interruption: {'; '.join(seen.reasons)}")
    else:
        findings.ok("exact", "interrupted and resumed, it ends with the same bits")


def _note_memory(seen: Seen, findings: Findings) -> None:
    sizes = seen.sizes
    parts = ", ".join(f"{name} {_size(size)}" for name, size in vars(sizes).items() if size)
    rest = "" if seen.is_measured else "; with torch.func, activations cannot be measured"
    told = f"about {_size(sizes.total)}: {parts}{rest}"
    findings.ok("memory", told, bytes=sizes.total, **vars(sizes))


def _note_monitor(training: Training, seen: Seen, findings: Findings) -> None:
    with findings.step("monitor"):
        if seen.logged is not None:
            training.check_monitors(seen.logged)
            if training.hparams.monitor in seen.logged:
                findings.ok("monitor", training.hparams.monitor)


def _size(count: int) -> str:
    """Return a number of bytes in words."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.3g} {units[0]}"
