"""A training: everything it needs, checked before anything is created, and its three acts."""

from __future__ import annotations

import functools
import logging
import multiprocessing.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Checkpoint, ModelSummary, ProgressBar
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.utilities.model_helpers import is_overridden

from torch_lab import loaders
from torch_lab.callbacks import EpochProgress, MetricPlots, NanMonitor
from torch_lab.checkpoints import (
    AtomicCheckpointIO,
    CheckpointWriter,
    Source,
    load_source,
    source_of,
)
from torch_lab.components import TrainComponents
from torch_lab.console import Console
from torch_lab.errors import HparamsError, did_you_mean
from torch_lab.experiment import Experiment
from torch_lab.hparams import DevRun, Hparams
from torch_lab.recording import MetricsLogger
from torch_lab.runs import CodeState, Run, artifacts_folder, code_state, encoded, project_root
from torch_lab.utils import shown

__all__ = ["Training", "build_trainer", "fit_loaders", "leave_process_group", "prepared"]

log = logging.getLogger(__name__)


@dataclass
class Training:
    """Everything that a training needs, checked; nothing of it is on disk yet."""

    experiment: Experiment
    hparams: Hparams
    components: TrainComponents
    source: Source | None
    root: Path
    code: CodeState
    run: Run
    logger: MetricsLogger
    trainer: pl.Trainer
    validates: bool
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def resumed_from(self) -> Source | None:
        """The checkpoint that training goes on from in full."""
        return None if self.hparams.checkpoint.weights_only else self.source

    def validate_before(self) -> None:
        """Validate once, for the baseline point of the curves, if wanted and if there is data."""
        components = self.components
        if not self.validates or not _has_data(components, "val_dataloader"):
            return
        data = {"datamodule": components.datamodule, "dataloaders": components.val_dataloaders}
        arguments = {"verbose": False, **self.hparams.trainer.validate}
        if self.resumed_from is not None:
            self.logger.first_step = int(self.resumed_from.load()["global_step"])
        self._seed()
        self.trainer.validate(components.module, **data, **_weights(self.resumed_from), **arguments)
        self.logger.first_step = 0
        self._check_monitors(_numbers(self.trainer.callback_metrics))

    def fit(self) -> None:
        """Train."""
        components = self.components
        data = {
            "datamodule": components.datamodule,
            "train_dataloaders": components.train_dataloaders,
            "val_dataloaders": components.val_dataloaders,
        }
        # Again, so that the baseline validation changes nothing in what follows.
        self._seed()
        self.trainer.fit(components.module, **data, **_weights(self.resumed_from))
        self.metrics |= _numbers(self.trainer.callback_metrics)

    def test_after(self) -> None:
        """Test the best weights, or the last where there is no best, if there is data."""
        components = self.components
        if not _has_data(components, "test_dataloader"):
            return
        data = {"datamodule": components.datamodule, "dataloaders": components.test_dataloaders}
        best = self.run.checkpoint("best")
        weights = _weights(Source(best, self.run) if best.is_file() else None)
        arguments = {"verbose": False, **self.hparams.trainer.test}
        self.trainer.test(components.module, **data, **weights, **arguments)
        self.metrics |= _numbers(self.trainer.callback_metrics)

    def _seed(self) -> None:
        pl.seed_everything(self.hparams.seed, workers=True, verbose=False)

    def _check_monitors(self, logged: Mapping[str, float]) -> None:
        """Check that what is monitored is logged; names of training metrics are not known yet."""
        names = [
            (f"{type(callback).__name__}.monitor", callback.monitor)
            for callback in self.trainer.early_stopping_callbacks
            if callback.strict
        ]
        if "monitor" in self.hparams.config:
            names.append(("config.monitor", self.hparams.monitor))
        elif self.hparams.monitor not in logged and self.trainer.checkpoint_callbacks:
            log.warning(
                "nothing logs loss/validate, so there will be no best checkpoint; "
                "set config.monitor to one of: %s",
                ", ".join(logged) or "nothing is logged",
            )
        for key, name in names:
            if name not in logged and "train" not in name:
                raise HparamsError(
                    f"{shown(self.experiment.script)}: {key} is {name!r}, which nothing logs in "
                    f"validation{did_you_mean(name, logged)}",
                    f"validation logs: {', '.join(logged) or 'nothing'}",
                )


def _has_data(components: TrainComponents, hook: str) -> bool:
    """Return whether there is data for a stage: in loaders, or by `hook` of a datamodule."""
    if components.datamodule is not None:
        return is_overridden(hook, components.datamodule, pl.LightningDataModule)
    return getattr(components, f"{hook}s") is not None


def _weights(source: Source | None) -> dict[str, Any]:
    """Return the arguments with which a call of the `Trainer` takes its weights from `source`."""
    return {"ckpt_path": source.path, "weights_only": True} if source else {}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def prepared(
    experiment: Experiment, dev: DevRun | None, *, debug: bool, validate: bool
) -> Training:
    """Return the training that `experiment` asks for, after every check that creates nothing.

    Args:
        experiment: The loaded experiment.
        dev: How much to overfit on, if this is a development run.
        debug: Whether to detect anomalies, and load data in this process.
        validate: Whether to validate once before fitting.

    Raises:
        UserError: A script, the hparams, the components or the checkpoint are wrong.
    """
    hparams = experiment.hparams
    hparams = hparams.for_dev_run(dev) if dev else hparams
    hparams = hparams.for_debug() if debug else hparams
    experiment = replace(experiment, hparams=hparams)
    # Before the components are built: it decides on the weights that they start with.
    pl.seed_everything(hparams.seed, workers=True, verbose=False)
    components = experiment.train_components()
    fit_loaders(
        [components.train_dataloaders, components.val_dataloaders, components.test_dataloaders],
        debug=debug,
    )
    source = _checked_source(components.module, hparams)
    root = project_root(experiment.script)
    code = code_state(root)
    run = _planned(experiment, root, code, source, "dev_" if dev else "")
    logger = MetricsLogger(run)
    callbacks = _train_callbacks(hparams, run, components)
    # The baseline validation does what Lightning's sanity check is for.
    defaults = {"logger": logger} | ({"num_sanity_val_steps": 0} if validate else {})
    trainer = build_trainer(hparams, callbacks, run.folder.parent, **defaults)
    return Training(
        experiment, hparams, components, source, root, code, run, logger, trainer, validate
    )


def _checked_source(module: pl.LightningModule, hparams: Hparams) -> Source | None:
    """Return the checkpoint to start from; weights are loaded already if only they are wanted."""
    source = source_of(hparams)
    if source is not None and hparams.checkpoint.weights_only:
        load_source(module, source)
    elif source is not None:
        source.check_resumable(hparams.trainer.init)
    return source


def fit_loaders(given: Any, *, debug: bool) -> None:
    """Make the loaders in `given` name failing samples, and work in this process if `debug`."""
    loaders.name_failing_samples(given)
    if debug:
        loaders.without_workers(given)


def _planned(
    experiment: Experiment, root: Path, code: CodeState, source: Source | None, prefix: str
) -> Run:
    return Run.plan(
        artifacts_folder(root),
        prefix + experiment.base_name,
        experiment=experiment.name,
        script=str(experiment.script),
        hparams=encoded(experiment.hparams.as_dict()),
        seed=experiment.hparams.seed,
        commit=code.commit,
        branch=code.branch,
        changed=bool(code.changes),
        parent=source.parent() if source else None,
    )


def _train_callbacks(hparams: Hparams, run: Run, components: TrainComponents) -> list[pl.Callback]:
    init = hparams.trainer.init
    callbacks: list[pl.Callback] = [
        _SpawnedProcess(run),
        NanMonitor(),
        MetricPlots(functools.partial(getattr, run, "plots_folder")),
        *components.callbacks,
    ]
    if init.get("enable_checkpointing", True) and not init.get("fast_dev_run"):
        callbacks.append(CheckpointWriter(run, hparams.monitor, hparams.monitor_mode))
    return callbacks


class _SpawnedProcess(pl.Callback):
    """Gives processes that Lightning spawned what they lack: a console, and an orderly end."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.launcher = os.getpid()
        self.console: Console | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the console, for as long as the process lives."""
        if os.getpid() == self.launcher:
            return
        self.console = Console(quiet=not trainer.is_global_zero)
        self.console.__enter__()
        self.console.attach(self.run.console_log)
        multiprocessing.util.Finalize(None, leave_process_group, exitpriority=0)


def leave_process_group() -> None:
    """Leave the group of processes that trained together, if there is one.

    Without it a process aborts at its end now and then: the threads of a gloo group, which
    Lightning leaves to itself, must not outlive the interpreter.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def build_trainer(
    hparams: Hparams, callbacks: Sequence[pl.Callback], root: Path, **defaults: Any
) -> pl.Trainer:
    """Return the `Trainer` that the hparams ask for, with `callbacks` and what torch_lab adds.

    Args:
        hparams: Their `trainer.init` overrides `defaults`.
        callbacks: Those of this run.
        root: Where Lightning may leave what it has no other place for.
        defaults: Further keyword arguments of the `Trainer`.

    Raises:
        HparamsError: Lightning refuses a value.
    """
    init = {"logger": False, "enable_checkpointing": False, **defaults, **hparams.trainer.init}
    callbacks = [*callbacks, *_as_list(init.pop("callbacks", None))]
    if not _has(callbacks, ProgressBar) and init.get("enable_progress_bar", True):
        callbacks.append(EpochProgress())
    if not _has(callbacks, ModelSummary) and init.get("enable_model_summary", True):
        # Lightning's default prints to stdout, where results belong; this one goes to the log.
        callbacks.append(ModelSummary())
    plugins = _as_list(init.pop("plugins", None))
    if not _has(plugins, CheckpointIO):
        plugins.append(AtomicCheckpointIO())
    init["enable_checkpointing"] = _has(callbacks, Checkpoint)
    try:
        return pl.Trainer(default_root_dir=root, callbacks=callbacks, plugins=plugins, **init)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise HparamsError(f"{shown(hparams.path)}: trainer.init: {error}") from error


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _has(objects: Sequence[object], kind: type) -> bool:
    return any(isinstance(each, kind) for each in objects)
