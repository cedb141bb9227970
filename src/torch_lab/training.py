"""A training: everything it needs, checked before anything is created, and its three acts."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing.util
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Checkpoint, ModelSummary, ProgressBar
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO
from torch.multiprocessing.spawn import ProcessRaisedException

from torch_lab import errors
from torch_lab.callbacks import EpochProgress, MetricPlots, NanMonitor
from torch_lab.checkpoints import (
    AtomicCheckpointIO,
    CheckpointWriter,
    Source,
    check_fits,
    load_source,
    source_of,
)
from torch_lab.components import TrainComponents
from torch_lab.console import Console, is_open
from torch_lab.errors import HparamsError, TorchLabError, UserError, did_you_mean
from torch_lab.experiment import Experiment
from torch_lab.files import written_whole
from torch_lab.hparams import DevRun, Hparams
from torch_lab.loaders import prepare_datamodule, prepare_loaders
from torch_lab.modules import TrainLabModule
from torch_lab.recording import MetricsLogger
from torch_lab.runs import CodeState, Run, artifacts_folder, code_state, encoded
from torch_lab.utils import process_rank, shown

__all__ = [
    "Training",
    "build_trainer",
    "failure_elsewhere",
    "given_callbacks",
    "leave_process_group",
    "prepared",
]

log = logging.getLogger(__name__)

_FAILURE = ".failure.json"
"""Where a process tells the one that started it what went wrong."""


@dataclass
class Training:
    """Everything that a training needs, checked; nothing of it is on disk yet."""

    experiment: Experiment
    components: TrainComponents
    source: Source | None
    code: CodeState
    run: Run
    logger: MetricsLogger
    trainer: pl.Trainer
    validates: bool
    first_step: int = 0
    """The step that training goes on from; 0 if it starts anew."""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def hparams(self) -> Hparams:
        """The hparams, as a dev run or debugging has changed them."""
        return self.experiment.hparams

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint that training goes on from in full."""
        if self.source is None or self.hparams.checkpoint.weights_only:
            return None
        return self.source.path

    def validate_before(self) -> None:
        """Validate once, for the baseline point of the curves, if wanted and if there is data."""
        components = self.components
        if not self.validates or "val_dataloader" not in components.hooks:
            return
        data = {"datamodule": components.datamodule, "dataloaders": components.val_dataloaders}
        arguments = {"verbose": False, **self.hparams.trainer.validate}
        self.logger.first_step = self.first_step
        self._seed()
        self.trainer.validate(
            components.module,
            **data,
            **_weights(self.resumed_from),
            **arguments,
        )
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
        self.keep_metrics()

    def test_after(self) -> None:
        """Test the best weights, or the last where there is no best, if there is data."""
        components = self.components
        if "test_dataloader" not in components.hooks:
            return
        data = {"datamodule": components.datamodule, "dataloaders": components.test_dataloaders}
        best = self.run.checkpoint("best")
        weights = _weights(best if best.is_file() else None)
        arguments = {"verbose": False, **self.hparams.trainer.test}
        self.trainer.test(components.module, **data, **weights, **arguments)
        self.keep_metrics()

    @property
    def has_trained(self) -> bool:
        """Whether a step was made."""
        return self.trainer.global_step not in (0, self.first_step)

    def keep_metrics(self) -> None:
        """Keep the last value of everything that was logged."""
        self.metrics |= _numbers(self.trainer.callback_metrics)

    def _seed(self) -> None:
        pl.seed_everything(self.hparams.seed, workers=True, verbose=False)

    def _check_monitors(self, logged: Mapping[str, float]) -> None:
        """Check what is monitored against what the baseline validation logged."""
        if "monitor" in self.hparams.config:
            self._check_monitor("config.monitor", self.hparams.monitor, logged)
        elif self.hparams.monitor not in logged and self.trainer.checkpoint_callbacks:
            log.warning(
                "nothing logs loss/validate, so there will be no best checkpoint; "
                "set config.monitor to one of: %s",
                ", ".join(logged) or "what validation logs, which is nothing now",
            )
        for callback in self.trainer.early_stopping_callbacks:
            if callback.strict:
                name = f"{type(callback).__name__}.monitor"
                self._check_monitor(name, callback.monitor, logged)

    def _check_monitor(self, key: str, name: str, logged: Mapping[str, float]) -> None:
        near = did_you_mean(name, logged)
        # Of what training logs nothing is known yet. The names of our own module say the stage.
        ours = isinstance(self.components.module, TrainLabModule)
        may_be_trained = name.endswith("/train") if ours else not near
        if name not in logged and not may_be_trained:
            raise HparamsError(
                f"{shown(self.experiment.script)}: {key} is {name!r}, which nothing logs in "
                f"validation{near}",
                f"validation logs: {', '.join(logged) or 'nothing'}",
            )


def _weights(checkpoint: Path | None) -> dict[str, Any]:
    """Return the arguments with which a call of the `Trainer` reads `checkpoint`."""
    return {"ckpt_path": checkpoint, "weights_only": True} if checkpoint else {}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as numbers, without the `x_step` of an `x`: it is that of a single batch."""
    names = [name for name in metrics if name.removesuffix("_step") not in metrics.keys() - {name}]
    return {name: float(metrics[name]) for name in names}


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
    _prepare_data(components, debug=debug)
    source = source_of(hparams)
    first_step = _start(components.module, source, hparams)
    code = code_state(experiment.root)
    run = _planned(experiment, code, source, "dev_" if dev else "")
    logger = MetricsLogger(run)
    callbacks = _train_callbacks(hparams, run, components)
    # The baseline validation does what Lightning's sanity check is for.
    defaults = {"logger": logger} | ({"num_sanity_val_steps": 0} if validate else {})
    trainer = build_trainer(hparams, callbacks, run.folder.parent, **defaults)
    _check_rank(trainer, hparams)
    return Training(
        experiment, components, source, code, run, logger, trainer, validate, first_step
    )


def _check_rank(trainer: pl.Trainer, hparams: Hparams) -> None:
    if process_rank() > 0 and trainer.world_size == 1:
        raise UserError(
            f"{shown(hparams.path)}: this is process {process_rank()} of several that were started "
            "together, but trainer.init asks for one",
            "set its devices and strategy, or start a single process",
        )


def _start(module: pl.LightningModule, source: Source | None, hparams: Hparams) -> int:
    """Return the step to start from; weights are loaded already if only they are wanted."""
    if source is None:
        return 0
    if hparams.checkpoint.weights_only:
        load_source(module, source)
        return 0
    check_fits(module, source)
    return source.resumable_step(hparams.trainer.init)


def _prepare_data(components: TrainComponents, *, debug: bool) -> None:
    if components.datamodule is not None:
        prepare_datamodule(components.datamodule, debug=debug)
    loaders = (components.train_dataloaders, components.val_dataloaders)
    prepare_loaders([*loaders, components.test_dataloaders], debug=debug)


def _planned(experiment: Experiment, code: CodeState, source: Source | None, prefix: str) -> Run:
    return Run.plan(
        artifacts_folder(experiment.root),
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
    return [
        _Process(run),
        NanMonitor(),
        # No lambda: callbacks are pickled on their way to spawned processes.
        MetricPlots(functools.partial(getattr, run, "plots_folder")),
        *components.callbacks,
        *given_callbacks(hparams),
        # The last one, as what the others do belongs into a checkpoint.
        CheckpointWriter(run, hparams.monitor, hparams.monitor_mode),
    ]


class _Process(pl.Callback):
    """Gives every process of a run what it needs to know, and spawned ones what they lack."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.launcher = os.getpid()
        self.console: Console | None = None
        self.on_term: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "on_term": None}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the other ranks which folder rank zero reserved; open a console for this one."""
        self.run.folder = Path(trainer.strategy.broadcast(str(self.run.folder)))
        # Where Lightning writes what has no other place; when it was made, there was no folder.
        trainer._default_root_dir = str(self.run.folder)  # type: ignore[attr-defined]
        self.on_term = signal.getsignal(signal.SIGTERM)
        if os.getpid() != self.launcher:
            self._open_console(quiet=not trainer.is_global_zero)
            multiprocessing.util.Finalize(None, leave_process_group, exitpriority=0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM back from Lightning, whose handler waits in it for all other processes."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.on_term)

    on_validation_start = on_test_start = on_train_start

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tell the process that started this one, which will only see that it is gone."""
        was_started = trainer.global_rank > 0 or os.getpid() != self.launcher
        if was_started and isinstance(exception, TorchLabError):
            told = {"type": type(exception).__name__, "arguments": exception.__reduce__()[1]}
            with written_whole(self.run.folder / _FAILURE) as file:
                file.write_text(json.dumps(told), encoding="utf-8")

    def _open_console(self, *, quiet: bool) -> None:
        """Open one for as long as the process lives, unless a fork gave it that of rank zero."""
        if quiet or not is_open():
            self.console = Console(quiet=quiet)
            self.console.__enter__()
            self.console.attach(self.run.console_log)


def failure_elsewhere(run: Run, seen_here: BaseException) -> TorchLabError | None:
    """Return the error of ours that ended another process of `run`, if one did.

    Args:
        run: The run that failed.
        seen_here: What this process saw of it. Of spawned processes it holds the traceback.
    """
    file = run.folder / _FAILURE
    if file.is_file():
        told = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        error: TorchLabError = getattr(errors, told["type"])(*told["arguments"])
        return error
    if isinstance(seen_here, ProcessRaisedException):
        last = re.search(r"^torch_lab\.errors\.(\w+): (.+)$", str(seen_here), re.MULTILINE)
        return getattr(errors, last[1])(last[2]) if last else None
    return None


def leave_process_group() -> None:
    """Leave the group of processes that trained together, if there is one.

    Without it a process aborts at its end now and then: the threads of a gloo group, which
    Lightning leaves to itself, must not outlive the interpreter.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def given_callbacks(hparams: Hparams) -> list[pl.Callback]:
    """Return the callbacks in `trainer.init`.

    Raises:
        HparamsError: Something else is among them.
    """
    given = _as_list(hparams.trainer.init.get("callbacks"))
    for callback in given:
        if not isinstance(callback, pl.Callback):
            kind = type(callback).__name__
            raise HparamsError(f"{shown(hparams.path)}: trainer.init.callbacks has a {kind}")
    return given


def build_trainer(
    hparams: Hparams, callbacks: Sequence[pl.Callback], root: Path, **defaults: Any
) -> pl.Trainer:
    """Return the `Trainer` that the hparams ask for, with `callbacks` and what torch_lab adds.

    Args:
        hparams: Their `trainer.init` overrides `defaults`; its callbacks are not looked at.
        callbacks: All callbacks of this run.
        root: Where Lightning may leave what it has no other place for.
        defaults: Further keyword arguments of the `Trainer`.

    Raises:
        HparamsError: Lightning refuses a value.
    """
    init = {"logger": False, **defaults, **hparams.trainer.init}
    if init.get("enable_checkpointing") is False or init.get("fast_dev_run"):
        callbacks = [each for each in callbacks if not isinstance(each, Checkpoint)]
    init["enable_checkpointing"] = _has(callbacks, Checkpoint)
    init["callbacks"] = [*callbacks, *_default_callbacks(callbacks, init)]
    init["plugins"] = _plugins(init)
    try:
        return pl.Trainer(default_root_dir=root, **init)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise HparamsError(f"{shown(hparams.path)}: trainer.init: {error}") from error


def _default_callbacks(
    callbacks: Sequence[pl.Callback], init: Mapping[str, Any]
) -> list[pl.Callback]:
    """Return what shows the progress and describes the model, unless others do or none shall."""
    defaults: list[pl.Callback] = []
    if not _has(callbacks, ProgressBar) and init.get("enable_progress_bar", True):
        defaults.append(EpochProgress())
    if not _has(callbacks, ModelSummary) and init.get("enable_model_summary", True):
        # Lightning's default prints to stdout, where results belong; this one goes to the log.
        defaults.append(ModelSummary())
    return defaults


def _plugins(init: Mapping[str, Any]) -> list[Any]:
    """Return the plugins, with one that writes checkpoints whole, if there is room for it."""
    plugins = _as_list(init.get("plugins"))
    for plugin in plugins:
        if isinstance(plugin, _WrappingCheckpointIO) and plugin.checkpoint_io is None:
            plugin.checkpoint_io = AtomicCheckpointIO()
    taken = _has(plugins, CheckpointIO) or getattr(init.get("strategy"), "_checkpoint_io", None)
    return plugins if taken else [*plugins, AtomicCheckpointIO()]


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _has(objects: Sequence[object], kind: type) -> bool:
    return any(isinstance(each, kind) for each in objects)
