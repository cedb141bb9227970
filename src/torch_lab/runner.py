"""The story of a run: `train` and `infer`, from a path to its results."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import BasePredictionWriter

from torch_lab.callbacks import PredictionWriter
from torch_lab.checkpoints import source_of
from torch_lab.components import InferComponents
from torch_lab.console import Console, place_of, raised_in_lightning, rendered
from torch_lab.errors import (
    ComponentsError,
    DeviceMemoryError,
    HparamsError,
    Interrupted,
    LoaderError,
    TorchLabError,
    TrackingError,
    UserError,
    listed,
)
from torch_lab.experiment import Experiment
from torch_lab.hparams import DevRun, Hparams, check_goes_with_dev_run
from torch_lab.loaders import Loaders
from torch_lab.queued import AgentTask
from torch_lab.remote import asking
from torch_lab.report import closing_record, closing_rows, header_rows, last_words
from torch_lab.runs import (
    Run,
    artifacts_folder,
    find_run,
    latest_unfinished,
    newest_first,
    plain_name,
    untracked_files,
)
from torch_lab.samplers import Position
from torch_lab.signals import StopRequest, stopping_on_signals
from torch_lab.training import (
    Options,
    Training,
    build_trainer,
    failure_elsewhere,
    given_callbacks,
    leave_process_group,
    pin_if_of_use,
    prepared,
)
from torch_lab.tuning import Tuning
from torch_lab.untracked import keep_untracked
from torch_lab.utils import process_rank, shown
from torch_lab.weights import load_source, loaded_from
from torch_lab.workers import explained

__all__ = ["Inference", "infer", "known_failures_as_ours", "train", "train_with"]

log = logging.getLogger(__name__)

_CPP_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
"""What torch's libraries warn of; this process has read it already."""
_RESUMED = "TORCH_LAB_RESUMED"
"""Tells the processes that are launched to train together which run goes on."""


def train(
    path: str | Path | Experiment,
    *,
    dev_run: DevRun | int | float | str | None = None,
    debug: bool = False,
    validate: bool = True,
    as_json: bool = False,
    resume: str | bool = False,
    must_be_exact: bool = True,
    trust_checkpoint: bool = False,
    tracking: str = "auto",
    upload_limit_s: float = 10.0,
    set: Mapping[str, Any] | None = None,
    unset: Sequence[str] = (),
) -> Run:
    """Train the experiment of the hparams script at `path`, and return its run.

    The header and the progress go to stderr, the closing table to stdout, both to the run folder.

    Args:
        path: The hparams script, or the experiment that was loaded from it.
        dev_run: Overfit on so many batches (int, -1 for one), or such a fraction of them (float).
        debug: Detect anomalies, log debug records, and load data without worker processes.
        validate: Whether to validate once before fitting.
        as_json: Print the closing record as one line of JSON instead of a table.
        resume: Go on with an interrupted run: its name, or True for the newest of this script.
        must_be_exact: Refuse to go on where the end would not be the same to the bit.
        trust_checkpoint: Read checkpoints that hold code, which can do anything that you can.
        tracking: `auto` for a task on ClearML if it is there, `online` to insist, or `offline`.
        upload_limit_s: How long the end may wait for what is still to be sent, in seconds.
        set: Values for keys of the script's hparams, as `Experiment.load` takes them.
        unset: Keys of them to remove.

    Raises:
        UserError: A script, the hparams or the components are wrong; nothing was created.
        TrackingError: ClearML is insisted on, and not to be had; nothing was created.
        DamagedError: There is no whole checkpoint to go on from.
        NotWrittenError: Several checkpoints in a row could not be written.
        NonFiniteError: The loss became NaN or infinite.
        Interrupted: A signal asked the run to end.
    """
    if dev_run is not None:
        check_goes_with_dev_run(resumes=resume is not False, online=tracking == "online")
    task = AgentTask.of_process() if tracking != "offline" and dev_run is None else None
    with task.told_of_failures() if task else contextlib.nullcontext():
        experiment, edited, run = _begun(task, _loaded(path, set, unset), resume)
        dev_run = dev_run if isinstance(dev_run, DevRun | None) else DevRun.parse(dev_run)
        given = (dev_run, debug, validate, run, must_be_exact, trust_checkpoint)
        options = Options(*given, tracking=tracking, upload_limit_s=upload_limit_s, edited=edited)
        return train_with(experiment, options, as_json=as_json)


def _begun(
    task: AgentTask | None, experiment: Experiment, resume: str | bool
) -> tuple[Experiment, list[str], Run | None]:
    """Return the experiment as its task or its run has it, what was edited, and the run."""
    if task is None:
        run = _to_resume(experiment, resume)
        return _as_begun(experiment, run) if run else experiment, [], run
    experiment, edited = task.edited(experiment)
    resume = resume or task.run_to_resume(experiment) or _RESUMED in os.environ
    return experiment, edited, _to_resume(experiment, resume)


def train_with(experiment: Experiment, options: Options, *, as_json: bool = False) -> Run:
    """Train `experiment` with `options`, and return its run; `train` says the rest."""
    follows = process_rank() > 0
    with (
        Console(quiet=follows, debug=options.debug, as_json=as_json) as console,
        stopping_on_signals(quiet=follows) as stop,
        _told_to_followers(options.resume),
    ):
        if options.resume is not None and options.resume.state == "completed":
            log.warning(
                "run %s is completed: there is nothing to resume; to train on, set "
                "checkpoint.checkpoint_task_id to it, and a larger max_epochs, for a new run",
                options.resume.name,
            )
            _show_end(console, options.resume, as_json=as_json)
            return options.resume
        training = prepared(experiment, options, stop)
        with _sent(training, console):
            with contextlib.nullcontext() if follows else _recorded(training, console, stop):
                stop.last_words = functools.partial(last_words, training.run)
                console.header(header_rows(training))
                training.validate_before()
                training.fit()
                training.test_after()
                leave_process_group()
            _show_end(console, training.run, as_json=as_json)
    return training.run


@contextlib.contextmanager
def _sent(training: Training, console: Console) -> Iterator[None]:
    """Send what the run logged and wrote to its task, for as long as that may take at the end."""
    try:
        yield
    finally:
        tracking, run = training.tracking, training.run
        if tracking is not None and training.is_untouched and not run.folder.is_dir():
            tracking.discard()
        elif tracking is not None:
            complete = False
            # Whoever interrupts this does not want to wait.
            with contextlib.suppress(Interrupted):
                complete = tracking.end(training.options.upload_limit_s, console.progress)
            console.no_progress()
            if not complete:
                log.warning("ClearML has not got all: torch-lab sync %s sends the rest", run.name)


@contextlib.contextmanager
def _told_to_followers(run: Run | None) -> Iterator[None]:
    """Tell the processes that are launched meanwhile which run goes on, and to be quiet."""
    told = {_CPP_LOG_LEVEL: os.environ.get(_CPP_LOG_LEVEL, "ERROR")}
    if run is not None and process_rank() == 0:
        told[_RESUMED] = run.name
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _show_end(console: Console, run: Run, *, as_json: bool) -> None:
    if as_json:
        console.result(closing_record(run))
    else:
        console.closing(closing_rows(run))


def _to_resume(experiment: Experiment, wanted: str | bool) -> Run | None:
    """Return the run that is to go on, if one is."""
    if wanted is False:
        return None
    artifacts = artifacts_folder(experiment.root)
    # The process that launched this one has found it, and has made it a running one.
    wanted = os.environ.get(_RESUMED, wanted)
    run = _newest(artifacts, experiment) if wanted in (True, "") else _named(artifacts, str(wanted))
    own = f"{experiment.base_name}-v{run.record.version}"
    if run.name != own:
        raise UserError(
            f"run {run.name} is not one of {shown(experiment.script)}",
            f"its runs are named {experiment.base_name}-vN; give the script that the run was of",
        )
    # Of a process on another host nothing can be known: who names the run says that it is gone.
    is_elsewhere = run.record.host != socket.gethostname()
    is_named = wanted not in (True, "")
    if run.state == "running" and process_rank() == 0 and not (is_elsewhere and is_named):
        hint = f"if that host is gone, name the run: --resume {run.name}"
        raise UserError(
            f"run {run.name} is being trained by process {run.record.pid} on host "
            f"{run.record.host}",
            hint if is_elsewhere else "stop it first",
        )
    return run


def _named(artifacts: Path, wanted: str) -> Run:
    if (artifacts / plain_name(wanted, "a run's name") / "run.json").is_file():
        return find_run(artifacts, wanted, having="last")
    return latest_unfinished(artifacts, wanted) or find_run(artifacts, wanted, having="last")


def _newest(artifacts: Path, experiment: Experiment) -> Run:
    """Return the newest run that is unfinished, or else the newest, if it is completed."""
    name = experiment.base_name
    if process_rank() > 0:
        # The process of rank zero may have made it a running one already.
        unfinished = (r for r in newest_first(artifacts, name) if r.record.state != "completed")
        run = next(unfinished, None)
    else:
        run = latest_unfinished(artifacts, name)
    run = run or next(newest_first(artifacts, name), None)
    if run is None:
        why = "it has none yet: leave out --resume"
        raise UserError(f"{shown(experiment.script)} has no run to resume", why)
    return run


def _as_begun(experiment: Experiment, run: Run) -> Experiment:
    """Return the experiment with what was set when `run` was started, unless it is set anew.

    Raises:
        UserError: Something of it is not known any more, or does not go with the script of now.
    """
    overrides = experiment.overrides.over(run.record.overrides, run.name)
    if overrides == experiment.overrides:
        return experiment
    try:
        return Experiment.load(experiment.script, overrides.set, overrides.unset)
    except HparamsError as error:
        told = "; ".join(overrides.lines())
        raise HparamsError(
            f"run {run.name} was started with other hparams ({told}): {error.message}", error.hint
        ) from error


def _loaded(
    path: str | Path | Experiment,
    set: Mapping[str, Any] | None = None,
    unset: Sequence[str] = (),
) -> Experiment:
    if isinstance(path, Experiment) and (set or unset):
        raise UserError("a loaded experiment has its hparams: give set and unset to its load")
    experiment = path if isinstance(path, Experiment) else Experiment.load(path, set, unset)
    experiment.check_added_keys()
    return experiment


@dataclass(frozen=True)
class Inference:
    """What came out of an inference."""

    files: tuple[Path, ...]
    """What the prediction writers among the callbacks wrote."""
    predictions: list[Any] | None
    """What `predict_step` returned for every batch; None unless asked for."""


def infer(
    path: str | Path | Experiment,
    *arguments: str,
    debug: bool = False,
    return_predictions: bool = False,
    as_json: bool = False,
    trust_checkpoint: bool = False,
    tracking: str = "auto",
    set: Mapping[str, Any] | None = None,
    unset: Sequence[str] = (),
) -> Inference:
    """Predict with the experiment of the hparams script at `path`.

    Args:
        path: The hparams script, or the experiment that was loaded from it.
        arguments: What `infer_config` gets after the hparams.
        debug: Log debug records, and load data without worker processes.
        return_predictions: Whether to keep all predictions in memory and return them.
        as_json: Print what was written as one line of JSON instead of a table.
        trust_checkpoint: Read a checkpoint that holds code, which can do anything that you can.
        tracking: `auto` to ask ClearML, if it is there, for what is not here; `offline` not to.
        set: Values for keys of the script's hparams, as `Experiment.load` takes them.
        unset: Keys of them to remove.

    Raises:
        UserError: A script, the hparams, the arguments or the components are wrong.
        Interrupted: A signal asked it to end.
    """
    with (
        Console(quiet=process_rank() > 0, debug=debug, as_json=as_json) as console,
        stopping_on_signals(quiet=process_rank() > 0),
        asking(tracking),
    ):
        experiment = _loaded(path, set, unset)
        hparams = experiment.hparams.as_used(debug=debug)
        components = _seeded_components(experiment, hparams, arguments)
        loaders = Loaders(Position(hparams.seed), debug=debug, timeout=hparams.loader_timeout)
        predicted = loaders.prepare(components.predict_dataloaders, "predict")
        weights = _weights_for(components.module, hparams, trust=trust_checkpoint)
        console.header([("infer", shown(experiment.script)), ("weights", weights)])
        how = {"return_predictions": return_predictions, **hparams.trainer.predict}
        callbacks = [*components.callbacks, *given_callbacks(hparams)]
        trainer = build_trainer(hparams, callbacks, experiment.root)
        pin_if_of_use(loaders, trainer, hparams)
        _warn_if_nothing_is_kept(callbacks, how)
        with known_failures_as_ours(experiment, loaders):
            predictions = trainer.predict(components.module, predicted, **how)
            leave_process_group()
        files = _written_by(callbacks, console, as_json=as_json)
    return Inference(files, predictions if how["return_predictions"] else None)


def _seeded_components(
    experiment: Experiment, hparams: Hparams, arguments: Sequence[object]
) -> InferComponents:
    pl.seed_everything(hparams.seed, workers=True, verbose=False)
    components = experiment.infer_components([str(word) for word in arguments])
    Tuning.of(replace(experiment, hparams=hparams)).tune(components.module)
    return components


def _warn_if_nothing_is_kept(callbacks: Sequence[pl.Callback], how: Mapping[str, Any]) -> None:
    is_written = any(isinstance(each, BasePredictionWriter) for each in callbacks)
    if not how["return_predictions"] and not is_written:
        log.warning("no prediction writer is among the callbacks: predictions will be lost")


def _written_by(
    callbacks: Sequence[pl.Callback], console: Console, *, as_json: bool
) -> tuple[Path, ...]:
    """Return the files that `callbacks` have written, and show them."""
    files = tuple(each.path for each in callbacks if isinstance(each, PredictionWriter))
    if as_json:
        console.result(json.dumps({"files": [str(file) for file in files]}))
    else:
        console.closing([("wrote", shown(file)) for file in files])
    return files


def _weights_for(module: pl.LightningModule, hparams: Hparams, *, trust: bool) -> str:
    """Load the weights that the hparams ask for, and say where they are from."""
    source = source_of(hparams, trust=trust)
    if source is not None:
        load_source(module, source, hparams.checkpoint, script=hparams.path)
        return str(source)
    if loaded := loaded_from(module):
        return loaded
    log.warning(
        "the weights are untrained: hparams name no checkpoint, and infer_config "
        "loaded none with torch_lab.load_weights"
    )
    return "untrained"


@contextlib.contextmanager
def _recorded(training: Training, console: Console, stop: StopRequest) -> Iterator[None]:
    """Keep the run's record on disk, from its reservation to how it ended.

    A user's mistake that shows only now, before anything was trained, leaves no run behind.
    """
    run, experiment = training.run, training.experiment
    try:
        training.reserve()
        console.attach(run.console_log)
        with known_failures_as_ours(experiment, training.loaders):
            run.write_sources(experiment.root, experiment.scripts, training.code.changes)
            _keep_untracked(training)
            yield
    except BaseException as raised:
        if not training.has_folder:
            raise
        error = failure_elsewhere(run, raised) or _interruption(raised, stop) or raised
        if isinstance(error, Interrupted):
            error.why = training.abort
        if isinstance(error, (UserError, TrackingError)) and training.is_untouched:
            run.discard()
            raise error from None
        console.keep(rendered(error))
        with contextlib.suppress(RuntimeError):  # After an error of the device it may not answer.
            training.keep_metrics()
        state = "stopped" if isinstance(error, Interrupted) else "failed"
        try:
            run.close(state, training.metrics, reason=_reason(error))
        except OSError as failure:  # Such as the full disk that ended the run.
            log.error("%s cannot be written: %s", shown(run.folder), failure.strerror)
        console.header(closing_rows(run))
        if isinstance(error, Interrupted) and (launcher := training.trainer.strategy.launcher):
            launcher.kill(error.signum)
        if error is raised:
            raise
        raise error from raised
    else:
        run.close("completed", training.metrics)
    finally:
        training.logger.close()


def _keep_untracked(training: Training) -> None:
    """Keep the project's files that no commit and no patch has."""
    root = training.experiment.root
    target = training.run.folder / "untracked.zip"
    left_out = keep_untracked(root, untracked_files(root, training.code), target)
    if left_out:
        log.warning(
            "not kept with the run, as they are not in git and large, or secret: %s",
            listed(left_out, 5),
        )


def _interruption(error: BaseException, stop: StopRequest) -> Interrupted | None:
    """Return the interruption that `error` came after: Lightning may fail while it clears up."""
    if isinstance(error, LoaderError) and stop.signum is not None:
        # Ctrl-C ends a worker that was only just started.
        return Interrupted(stop.signum)
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, Interrupted):
        seen = seen.__context__
    return seen


def _reason(error: BaseException) -> str:
    """Return what went wrong in a line; the message of a worker's error is a whole traceback."""
    if isinstance(error, Interrupted) and error.why:
        return error.why
    lines = str(error).strip().splitlines()
    first_and_last = dict.fromkeys([*lines[:1], *lines[-1:]])
    told = f"{type(error).__name__}: {' … '.join(line.strip() for line in first_and_last)}"
    place = None if isinstance(error, (TorchLabError, Interrupted)) else place_of(error)
    return f"{told} ({place})" if place else told


@contextlib.contextmanager
def known_failures_as_ours(experiment: Experiment, loaders: Loaders) -> Iterator[None]:
    """Raise errors of ours for what others say in words that help nobody.

    These are settings that do not go together, workers that died, and memory that is too small.
    """
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        if not raised_in_lightning(error):
            raise
        raise ComponentsError(f"{shown(experiment.script)}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error, loaders) from error
    except (RuntimeError, LoaderError) as error:
        explanation = explained(error, loaders.watches)
        if explanation is None:
            raise
        raise explanation from error


def _out_of_memory(error: torch.OutOfMemoryError, loaders: Loaders) -> DeviceMemoryError:
    """Return an error that says how large the batches are, and what to try."""
    sizes = [size for facts in loaders.facts().values() if (size := facts["batch_size"])]
    told = f" with batches of {max(sizes)}" if sizes else ""
    half = f"batches of {max(1, max(sizes) // 2)}" if sizes else "smaller batches"
    return DeviceMemoryError(
        f"the device has too little memory{told}: {str(error).splitlines()[0]}",
        f"try {half} with trainer.init.accumulate_grad_batches twice as large,\n"
        'trainer.init.precision "bf16-mixed", or a smaller model; the run can be resumed',
    )
