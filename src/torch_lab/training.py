"""A training: everything it needs, checked before anything is created, and its three acts."""

from __future__ import annotations

import contextlib
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
from pytorch_lightning.accelerators import CPUAccelerator, MPSAccelerator
from pytorch_lightning.callbacks import Checkpoint, ModelSummary, ProgressBar
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.multiprocessing.spawn import ProcessRaisedException

from torch_lab import errors
from torch_lab.callbacks import EpochProgress, MetricPlots, NanMonitor
from torch_lab.checkpoints import (
    AtomicCheckpointIO,
    Source,
    note_child,
    resumable,
    source_of,
    whole_checkpoint,
)
from torch_lab.components import TrainComponents
from torch_lab.console import Console, is_open
from torch_lab.errors import (
    CheckpointError,
    HparamsError,
    ServerError,
    TorchLabError,
    TrackingError,
    UserError,
    did_you_mean,
)
from torch_lab.exact import STATE, ExactResume, changed_conditions
from torch_lab.experiment import Experiment, differences
from torch_lab.explaining import chains
from torch_lab.files import written_whole
from torch_lab.hparams import DevRun, Hparams
from torch_lab.loaders import Loaders
from torch_lab.modules import TrainLabModule
from torch_lab.profiling import NoProfiler
from torch_lab.recording import MetricsLogger, cut_back
from torch_lab.redaction import masked
from torch_lab.remote import Access, asking
from torch_lab.runs import CodeState, Run, artifacts_folder, code_state, encoded
from torch_lab.samplers import Position
from torch_lab.saving import CheckpointWriter
from torch_lab.server import Server
from torch_lab.signals import StopRequest
from torch_lab.tracking import Tracking, opened, versions_taken
from torch_lab.tuning import Tuning
from torch_lab.utils import process_rank, shown
from torch_lab.weights import check_fits, load_source

__all__ = [
    "Options",
    "Start",
    "Training",
    "build_trainer",
    "changed_hparams",
    "failure_elsewhere",
    "for_any_machine",
    "given_callbacks",
    "leave_process_group",
    "pin_if_of_use",
    "prepared",
    "seeded_components",
    "with_loaders",
]

log = logging.getLogger(__name__)

_FAILURE = ".failure.json"
_MOST_TOLD = 8
"""Where a process tells the one that started it what went wrong."""
_WITHOUT_PINNING = (CPUAccelerator, MPSAccelerator)
"""Devices to which Lightning waits for each copy."""
_ANY_MACHINE = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "precision": None,
    "strategy": "auto",
    "sync_batchnorm": False,
}
"""What replaces the settings that are for the machine that trains, for a look at all others."""


@dataclass(frozen=True)
class Options:
    """What the command line, or a caller, adds to the hparams of a training."""

    dev_run: DevRun | None = None
    debug: bool = False
    validate: bool = True
    """Whether to validate once before fitting."""
    resume: Run | None = None
    """The run to go on with, instead of a new one."""
    must_be_exact: bool = True
    """Whether a run may only be gone on with where it ends with the same bits."""
    trust: bool = False
    """Whether checkpoints may hold code."""
    callbacks: Sequence[pl.Callback] = ()
    """More of them, such as those that record a run to compare it with another."""
    artifacts: Path | None = None
    """Where the run's folder is made; the project's artifacts folder if not given."""
    tracking: str = "offline"
    """`auto` for a task on ClearML if there is a server, `online` to insist on it, `offline`."""
    upload_limit_s: float = 10.0
    """How long the end may wait for what is still to be sent, in seconds."""
    edited: Sequence[str] = ()
    """What was edited of the hparams on the server, before an agent got the run."""
    only_checks: bool = False
    """Whether nothing is trained with it: the trainer is one that any machine has, loaders start no
    worker processes, and there is no task."""


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
    loaders: Loaders
    options: Options
    start: Start
    server: Server | None = None
    """Where the run is tracked; None for nowhere."""
    why_offline: str = ""
    """Why it is not, if it was to be."""
    tracking: Tracking | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    _is_reopened: bool = False

    @property
    def hparams(self) -> Hparams:
        """The hparams, as a dev run or debugging has changed them."""
        return self.experiment.hparams

    @property
    def goes_on(self) -> bool:
        """Whether an interrupted run goes on that has trained already."""
        return self.start.marks is not None

    def reserve(self) -> None:
        """Take the run's folder: a new one, or that of the run that goes on."""
        if self.options.resume is None:
            self.run.reserve(self._highest_elsewhere())
        else:
            self._reopen()
        if self.server is not None:
            self._open_task(self.server)

    def _highest_elsewhere(self) -> int:
        """Return the highest version that the server knows of the run's name."""
        if self.server is None:
            return 0
        try:
            return versions_taken(self.server, self.run)
        except ServerError as error:
            self._go_offline(error.message)
            return 0

    def _open_task(self, server: Server) -> None:
        try:
            self.tracking = opened(server, self.run)
        except TrackingError as error:
            self._go_offline(error.message)
        else:
            self.tracking.begin()

    def _go_offline(self, why: str) -> None:
        if self.options.tracking == "online":
            raise TrackingError(why)
        self.server, self.why_offline = None, why

    def _reopen(self) -> None:
        changed = changed_hparams(self.run, self.hparams)
        self.run.reopen(self.start.step if self.goes_on else None, changed)
        self._is_reopened = True
        (self.run.folder / _FAILURE).unlink(missing_ok=True)
        cut_back(self.run.metrics_folder, self.start.marks or {})

    @property
    def has_folder(self) -> bool:
        """Whether the run's folder is taken, so that how it ends is to be recorded there."""
        return self._is_reopened if self.options.resume else bool(self.run.record.version)

    def validate_before(self) -> None:
        """Validate once, for the baseline point of the curves, if wanted and if there is data."""
        components = self.components
        has_data = "val_dataloader" in components.hooks
        if self.goes_on or not self.options.validate or not has_data:
            return
        data = {"datamodule": components.datamodule, "dataloaders": components.val_dataloaders}
        arguments = {"verbose": False, **self.hparams.trainer.validate}
        self.logger.first_step = self.start.step
        self._seed()
        self.trainer.validate(components.module, **data, **self.start.arguments, **arguments)
        self.logger.first_step = 0
        self.check_monitors(_numbers(self.trainer.callback_metrics))

    def fit(self) -> None:
        """Train."""
        components = self.components
        data = {
            "datamodule": components.datamodule,
            "train_dataloaders": components.train_dataloaders,
            "val_dataloaders": components.val_dataloaders,
        }
        self._tell_parent()
        # Again, so that the baseline validation changes nothing in what follows.
        self._seed()
        try:
            self.trainer.fit(components.module, **data, **self.start.arguments)
        finally:
            # A callback that raises where an exception is told keeps it from those behind it.
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, CheckpointWriter):
                    callback.wait()
        self.keep_metrics()

    def _tell_parent(self) -> None:
        """Note the run in the folder of the one that it goes on from."""
        is_child = self.source is not None and not _is_own(self.source, self.options.resume)
        if self.source and is_child and process_rank() == 0 and not self.options.dev_run:
            note_child(self.source, self.run)

    def test_after(self) -> None:
        """Test the best weights, or the last where there is no best, if there is data."""
        components = self.components
        if "test_dataloader" not in components.hooks:
            return
        data = {"datamodule": components.datamodule, "dataloaders": components.test_dataloaders}
        arguments = {"verbose": False, **self.hparams.trainer.test}
        if self.run.checkpoint("best").is_file():
            best = whole_checkpoint(self.run, "best")
            arguments |= {"ckpt_path": best.path, "weights_only": True}
        self.trainer.test(components.module, **data, **arguments)
        self.keep_metrics()

    @property
    def has_trained(self) -> bool:
        """Whether a step was made."""
        return self.trainer.global_step not in (0, self.start.step)

    @property
    def abort(self) -> str:
        """How the run was stopped on the ClearML server, if it was."""
        return self.tracking.abort if self.tracking else ""

    @property
    def is_untouched(self) -> bool:
        """Whether there is nothing in the run yet that anybody would miss."""
        return self.options.resume is None and not self.has_trained

    def keep_metrics(self) -> None:
        """Keep the last value of everything that was logged."""
        self.metrics = _numbers({**self.metrics, **self.trainer.callback_metrics})

    def _seed(self) -> None:
        pl.seed_everything(self.hparams.seed, workers=True, verbose=False)

    def check_monitors(self, logged: Mapping[str, float]) -> None:
        """Check what is monitored against what a validation has logged.

        Raises:
            HparamsError: Something is monitored that nothing logs.
        """
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


@dataclass(frozen=True)
class Start:
    """What a training starts from; nothing, unless a checkpoint is given."""

    step: int = 0
    source: Source | None = None
    """The checkpoint that it goes on from in full."""
    marks: Mapping[str, int] | None = None
    """Where the event files ended at the checkpoint of a run that goes on."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last values that such a run had logged."""
    was: str = ""
    """The state of a run that goes on, before it did."""
    changes: tuple[str, ...] = ()
    """Why the run does not end as it would have without the interruption."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments with which a call of the `Trainer` reads the checkpoint."""
        if self.source is None:
            return {}
        return {"ckpt_path": self.source.path, "weights_only": not self.source.trusted}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as numbers, without the `x_step` of an `x`: it is that of a single batch."""
    names = [name for name in metrics if name.removesuffix("_step") not in metrics.keys() - {name}]
    return {name: float(metrics[name]) for name in names}


def prepared(experiment: Experiment, options: Options, stop: StopRequest) -> Training:
    """Return the training that `experiment` asks for, after every check that creates nothing.

    Args:
        experiment: The loaded experiment.
        options: What is wanted beside its hparams.
        stop: The wish to end the run, answered where it can be gone on with exactly.

    Raises:
        UserError: A script, the hparams, the components or the checkpoint are wrong.
    """
    hparams = experiment.hparams.as_used(options.dev_run, debug=options.debug)
    experiment = replace(experiment, hparams=hparams)
    if not options.only_checks:  # A check says so itself.
        _look_at_added_keys(experiment)
    with asking(options.tracking) as access:
        components = seeded_components(experiment)
        source = _source(hparams, options)
    position = Position(hparams.seed)
    in_process = options.debug or options.only_checks
    components, loaders = with_loaders(components, hparams, position, debug=in_process)
    code = code_state(experiment.root)
    run = options.resume or _planned(experiment, code, source, options, access)
    logger = MetricsLogger(run)
    continues = _is_own(source, options.resume)
    refuses = continues and options.must_be_exact
    exact = _Process(
        *(run, hparams.seed, position, loaders, stop),
        continues=continues,
        refuses_changes=refuses,
        tuning=Tuning.of(experiment),
    )
    callbacks = _train_callbacks(hparams, run, components, logger, exact, options)
    # The baseline validation does what Lightning's sanity check is for.
    defaults = {"logger": logger} | ({"num_sanity_val_steps": 0} if options.validate else {})
    machine = for_any_machine(hparams) if options.only_checks else hparams
    trainer = build_trainer(
        machine, callbacks, run.folder.parent, lightning_shards=False, **defaults
    )
    pin_if_of_use(loaders, trainer, hparams)
    _check_rank(trainer, hparams)
    start = _start(components.module, source, hparams, options, exact.conditions(trainer))
    training = Training(
        *(experiment, components, source, code, run, logger, trainer, loaders, options, start),
        metrics=dict(start.metrics),
    )
    is_tracked = not (options.dev_run or options.only_checks or options.tracking == "offline")
    if process_rank() == 0 and is_tracked:
        training.server, training.why_offline = access.server()
    return training


def for_any_machine(hparams: Hparams) -> Hparams:
    """Return the hparams that train in one process on a CPU, whatever they were made for."""
    init = {**hparams.trainer.init, **_ANY_MACHINE}
    return replace(hparams, trainer=replace(hparams.trainer, init=init))


def _source(hparams: Hparams, options: Options) -> Source | None:
    """Return the checkpoint to start from: of the run that goes on, or what the hparams name."""
    if options.resume is not None:
        if found := resumable(options.resume, trust=options.trust):
            return found
        log.warning(
            "run %s has written no checkpoint yet: it begins again from its start",
            options.resume.name,
        )
    return source_of(hparams, trust=options.trust, in_full=not hparams.checkpoint.weights_only)


def _check_rank(trainer: pl.Trainer, hparams: Hparams) -> None:
    if process_rank() > 0 and trainer.world_size == 1:
        raise UserError(
            f"{shown(hparams.path)}: this is process {process_rank()} of several that were started "
            "together, but trainer.init asks for one",
            "set its devices and strategy, or start a single process",
        )


def _start(
    module: pl.LightningModule,
    source: Source | None,
    hparams: Hparams,
    options: Options,
    conditions: Mapping[str, Any],
) -> Start:
    """Return what to start from; weights are loaded already if only they are wanted."""
    resumed = options.resume
    was = resumed.state if resumed else ""
    if source is None:
        return Start(was=was)
    is_own = _is_own(source, resumed)
    if hparams.checkpoint.weights_only and not is_own:
        load_source(module, source, hparams.checkpoint, script=hparams.path)
        return Start(was=was)
    if _has_all_layers(module):
        check_fits(module, source)
    found = source.load()
    state = found.get(STATE, {})
    changes = tuple(changed_conditions(state.get("conditions", {}), conditions))
    if not is_own:
        try:
            step = source.resumable_step(hparams.trainer.init)
        except CheckpointError as error:
            where = f"{shown(hparams.path)}: checkpoint"
            raise type(error)(f"{where}: {error.message}", error.hint) from None
        return Start(step, source, was=was, changes=changes)
    if changes and options.must_be_exact:
        raise CheckpointError(
            f"{source} cannot go on exactly: {'; '.join(changes)}",
            "undo the change, or give --not-exact to go on all the same",
        )
    if not state:
        raise CheckpointError(
            f"{source} was not written at a point that a run can be resumed from",
            "let a new run go on from it: checkpoint.checkpoint_task_id in the hparams",
        )
    metrics = _numbers(state["logged"]["callback"])
    step = int(found["global_step"])
    return Start(step, source, state["marks"], metrics, was, changes)


def _has_all_layers(module: pl.LightningModule) -> bool:
    """Return whether the layers are known, and must all be in a checkpoint, before it is read."""
    base = TrainLabModule if isinstance(module, TrainLabModule) else pl.LightningModule
    made_later = any(is_overridden(hook, module, base) for hook in ("setup", "configure_model"))
    return module.strict_loading and not made_later


def _is_own(source: Source | None, resumed: Run | None) -> bool:
    """Return whether a run goes on from a checkpoint of its own."""
    if source is None or source.run is None or resumed is None:
        return False
    return source.run.record.id == resumed.record.id


def _look_at_added_keys(experiment: Experiment) -> None:
    """Refuse the keys that layers add, or warn of them."""
    experiment.check_added_keys()
    added = experiment.added_keys
    for told in added[:_MOST_TOLD]:
        log.warning("%s", told)
    if added:
        rest = f", and {len(added) - _MOST_TOLD} more" if len(added) > _MOST_TOLD else ""
        log.warning("new(…) around its value says that a key is meant to be new%s", rest)


def seeded_components(experiment: Experiment) -> TrainComponents:
    """Return what `train_config` makes, with the weights that the seed decides on; tuned."""
    pl.seed_everything(experiment.hparams.seed, workers=True, verbose=False)
    components = experiment.train_components()
    Tuning.of(experiment).tune(components.module)
    return components


def with_loaders(
    components: TrainComponents, hparams: Hparams, position: Position, *, debug: bool
) -> tuple[TrainComponents, Loaders]:
    """Return the components with their loaders fitted for a run, and what does so."""
    shard = bool(hparams.trainer.init.get("use_distributed_sampler", True))
    overfit = bool(hparams.trainer.init.get("overfit_batches"))
    loaders = Loaders(
        position, debug=debug, timeout=hparams.loader_timeout, shard=shard, overfit=overfit
    )
    if components.datamodule is not None:
        loaders.prepare_datamodule(components.datamodule)
    return (
        replace(
            components,
            train_dataloaders=loaders.prepare(components.train_dataloaders, "train"),
            val_dataloaders=loaders.prepare(components.val_dataloaders, "validate"),
            test_dataloaders=loaders.prepare(components.test_dataloaders, "test"),
        ),
        loaders,
    )


def pin_if_of_use(loaders: Loaders, trainer: pl.Trainer, hparams: Hparams) -> None:
    """Have `loaders` pin their batches, if that is wanted and of use to the device."""
    if hparams.pin_memory and not isinstance(trainer.accelerator, _WITHOUT_PINNING):
        loaders.pin_batches()


def _planned(
    experiment: Experiment,
    code: CodeState,
    source: Source | None,
    options: Options,
    access: Access,
) -> Run:
    return Run.plan(
        options.artifacts or artifacts_folder(experiment.root),
        ("dev_" if options.dev_run else "") + experiment.base_name,
        experiment=experiment.name,
        script=str(experiment.script),
        hparams=encoded(experiment.hparams.as_dict()),
        overrides=experiment.overrides.record() if experiment.overrides else {},
        provenance=chains(experiment),
        seed=experiment.hparams.seed,
        commit=code.commit,
        branch=code.branch,
        changed=bool(code.changes),
        repository=code.repository,
        parent=source.parent() if source else None,
        datasets=access.datasets,
    )


def changed_hparams(run: Run, hparams: Hparams) -> list[str]:
    """Return what differs from the hparams that `run` was started with, one line each."""
    return [str(each) for each in differences(run.record.hparams, _recorded(hparams))]


def _recorded(hparams: Hparams) -> dict[str, Any]:
    """Return `hparams` as a run's record has them."""
    found: dict[str, Any] = masked(encoded(hparams.as_dict()))
    return found


def _train_callbacks(
    hparams: Hparams,
    run: Run,
    components: TrainComponents,
    logger: MetricsLogger,
    exact: ExactResume,
    options: Options,
) -> list[pl.Callback]:
    return [
        exact,
        NanMonitor(hparams.monitor, exact.loaders.latest_indices),
        # No lambda: callbacks are pickled on their way to spawned processes.
        MetricPlots(functools.partial(getattr, run, "plots_folder")),
        *components.callbacks,
        *given_callbacks(hparams),
        *options.callbacks,
        # The last one, as what the others do belongs into a checkpoint.
        CheckpointWriter(run, hparams.checkpoint, hparams.monitor, hparams.monitor_mode, logger),
    ]


class _Process(ExactResume):
    """Gives every process of a run what it needs to know, and spawned ones what they lack.

    It is one callback with that of exact resume, as each costs every step the calls of its hooks.
    """

    def __init__(self, run: Run, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.run = run
        self.launcher = os.getpid()
        self.console: Console | None = None
        self.on_term: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "on_term": None}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the other ranks which folder rank zero reserved; open a console for this one."""
        self._take_folder(Path(trainer.strategy.broadcast(str(self.run.folder))))
        # Where Lightning writes what has no other place; when it was made, there was no folder.
        trainer._default_root_dir = str(self.run.folder)  # type: ignore[attr-defined]
        self.on_term = signal.getsignal(signal.SIGTERM)
        if os.getpid() != self.launcher:
            if trainer.is_global_zero:
                self.run.join()
            self._open_console(quiet=not trainer.is_global_zero)
            multiprocessing.util.Finalize(None, leave_process_group, exitpriority=0)

    def _take_folder(self, folder: Path) -> None:
        own, self.run.folder = self.run.folder, folder
        if self.continues and own != folder:
            raise CheckpointError(
                f"the processes would go on with {folder.name} and {own.name}",
                f"name the run for all of them: --resume {folder.name}",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM back; go on from where the checkpoint left off."""
        self._take_sigterm_back()
        super().on_train_start(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM back; prepare for an interruption."""
        self._take_sigterm_back()
        super().on_validation_start(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM back; seed the test."""
        self._take_sigterm_back()
        super().on_test_start(trainer, pl_module)

    def _take_sigterm_back(self) -> None:
        """Take it from Lightning, whose handler waits in it for all other processes."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.on_term)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tell the process that started this one, which will only see that it is gone."""
        super().on_exception(trainer, pl_module, exception)
        was_started = trainer.global_rank > 0 or os.getpid() != self.launcher
        if was_started and isinstance(exception, TorchLabError):
            told = {"type": _own_kind(exception), "arguments": [exception.message, exception.hint]}
            # On a full disk, say; the error itself is what matters.
            with (
                contextlib.suppress(OSError),
                written_whole(self.run.folder / _FAILURE) as file,
            ):
                file.write_text(json.dumps(told), encoding="utf-8")

    def _open_console(self, *, quiet: bool) -> None:
        """Open one for as long as the process lives, unless a fork gave it that of rank zero."""
        if quiet or not is_open():
            self.console = Console(quiet=quiet)
            self.console.__enter__()
            self.console.attach(self.run.console_log)


def _own_kind(error: TorchLabError) -> str:
    """Return the name of the error's class, or of the nearest one above it that is ours."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)


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
    hparams: Hparams,
    callbacks: Sequence[pl.Callback],
    root: Path,
    *,
    lightning_shards: bool = True,
    **defaults: Any,
) -> pl.Trainer:
    """Return the `Trainer` that the hparams ask for, with `callbacks` and what torch_lab adds.

    Args:
        hparams: Their `trainer.init` overrides `defaults`; its callbacks are not looked at.
        callbacks: All callbacks of this run.
        root: Where Lightning may leave what it has no other place for.
        lightning_shards: Whether Lightning may deal samples out among processes.
        defaults: Further keyword arguments of the `Trainer`.

    Raises:
        HparamsError: Lightning refuses a value.
    """
    init = {"logger": False, "profiler": NoProfiler(), **defaults, **hparams.trainer.init}
    if not lightning_shards:
        init["use_distributed_sampler"] = False
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
