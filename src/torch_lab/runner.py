"""The story of a run: `train` and `infer`, from a path to its results."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import BasePredictionWriter

from torch_lab.callbacks import PredictionWriter
from torch_lab.checkpoints import load_source, loaded_from, source_of
from torch_lab.console import Console, raised_in_lightning, rendered
from torch_lab.errors import ComponentsError, Interrupted, UserError
from torch_lab.experiment import Experiment
from torch_lab.hparams import DevRun, Hparams
from torch_lab.loaders import prepare_loaders
from torch_lab.report import closing_record, closing_rows, header_rows
from torch_lab.runs import Run
from torch_lab.signals import signals_as_exceptions
from torch_lab.training import (
    Training,
    build_trainer,
    failure_elsewhere,
    given_callbacks,
    leave_process_group,
    prepared,
)
from torch_lab.utils import process_rank, shown

__all__ = ["Inference", "infer", "train"]

log = logging.getLogger(__name__)


def train(
    path: str | Path | Experiment,
    *,
    dev_run: DevRun | int | float | str | None = None,
    debug: bool = False,
    validate: bool = True,
    as_json: bool = False,
) -> Run:
    """Train the experiment of the hparams script at `path`, and return its run.

    The header and the progress go to stderr, the closing table to stdout, both to the run folder.

    Args:
        path: The hparams script, or the experiment that was loaded from it.
        dev_run: Overfit on so many batches (int, -1 for one), or such a fraction of them (float).
        debug: Detect anomalies, log debug records, and load data without worker processes.
        validate: Whether to validate once before fitting.
        as_json: Print the closing record as one line of JSON instead of a table.

    Raises:
        UserError: A script, the hparams or the components are wrong; nothing was created.
        NonFiniteError: The loss became NaN or infinite.
        Interrupted: A signal asked the run to end.
    """
    dev = DevRun.parse(dev_run) if isinstance(dev_run, (str, int, float)) else dev_run
    follows = process_rank() > 0
    with Console(quiet=follows, debug=debug, as_json=as_json) as console, signals_as_exceptions():
        training = prepared(_loaded(path), dev, debug=debug, validate=validate)
        with contextlib.nullcontext() if follows else _recorded(training, console):
            console.header(header_rows(training, dev))
            training.validate_before()
            training.fit()
            training.test_after()
            leave_process_group()
        if as_json:
            console.result(closing_record(training.run))
        else:
            console.closing(closing_rows(training.run))
    return training.run


def _loaded(path: str | Path | Experiment) -> Experiment:
    return path if isinstance(path, Experiment) else Experiment.load(path)


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
) -> Inference:
    """Predict with the experiment of the hparams script at `path`.

    Args:
        path: The hparams script, or the experiment that was loaded from it.
        arguments: What `infer_config` gets after the hparams.
        debug: Log debug records, and load data without worker processes.
        return_predictions: Whether to keep all predictions in memory and return them.
        as_json: Print what was written as one line of JSON instead of a table.

    Raises:
        UserError: A script, the hparams, the arguments or the components are wrong.
        Interrupted: A signal asked it to end.
    """
    follows = process_rank() > 0
    with Console(quiet=follows, debug=debug, as_json=as_json) as console, signals_as_exceptions():
        experiment = _loaded(path)
        words = [str(word) for word in arguments]
        hparams = experiment.hparams.for_debug() if debug else experiment.hparams
        pl.seed_everything(hparams.seed, workers=True, verbose=False)
        components = experiment.infer_components(words)
        prepare_loaders(components.predict_dataloaders, debug=debug)
        weights = _weights_for(components.module, hparams)
        console.header([("infer", shown(experiment.script)), ("weights", weights)])
        callbacks = [*components.callbacks, *given_callbacks(hparams)]
        writers = [each for each in callbacks if isinstance(each, BasePredictionWriter)]
        trainer = build_trainer(hparams, callbacks, experiment.root)
        how = {"return_predictions": return_predictions, **hparams.trainer.predict}
        if not how["return_predictions"] and not writers:
            log.warning("no prediction writer is among the callbacks: predictions will be lost")
        with _lightning_complaints_as_ours(experiment):
            predictions = trainer.predict(components.module, components.predict_dataloaders, **how)
            leave_process_group()
        files = tuple(each.path for each in writers if isinstance(each, PredictionWriter))
        if as_json:
            console.result(json.dumps({"files": [str(file) for file in files]}))
        else:
            console.closing([("wrote", shown(file)) for file in files])
    return Inference(files, predictions if how["return_predictions"] else None)


def _weights_for(module: pl.LightningModule, hparams: Hparams) -> str:
    """Load the weights that the hparams ask for, and say where they are from."""
    source = source_of(hparams)
    if source is not None:
        load_source(module, source)
        return str(source)
    if loaded := loaded_from(module):
        return loaded
    log.warning(
        "the weights are untrained: hparams name no checkpoint, and infer_config "
        "loaded none with torch_lab.load_weights"
    )
    return "untrained"


@contextlib.contextmanager
def _recorded(training: Training, console: Console) -> Iterator[None]:
    """Keep the run's record on disk, from its reservation to how it ended.

    A user's mistake that shows only now, before anything was trained, leaves no run behind.
    """
    run, experiment = training.run, training.experiment
    try:
        run.reserve()
        console.attach(run.console_log)
        with _lightning_complaints_as_ours(experiment):
            run.write_sources(experiment.root, experiment.scripts, training.code.changes)
            yield
    except BaseException as raised:
        if not run.record.version:  # Nothing is on disk yet.
            raise
        error = failure_elsewhere(run, raised) or raised
        if isinstance(error, UserError) and not training.has_trained:
            run.discard()
            raise error from None
        console.keep(rendered(error))
        with contextlib.suppress(RuntimeError):  # After an error of the device it may not answer.
            training.keep_metrics()
        state = "stopped" if isinstance(error, Interrupted) else "failed"
        run.close(state, training.metrics, reason=_reason(error))
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


def _reason(error: BaseException) -> str:
    """Return what went wrong in a line; the message of a worker's error is a whole traceback."""
    lines = str(error).strip().splitlines()
    first_and_last = dict.fromkeys([*lines[:1], *lines[-1:]])
    return f"{type(error).__name__}: {' … '.join(line.strip() for line in first_and_last)}"


@contextlib.contextmanager
def _lightning_complaints_as_ours(experiment: Experiment) -> Iterator[None]:
    """Raise what Lightning says of settings that do not go together as a user's mistake."""
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        if not raised_in_lightning(error):
            raise
        raise ComponentsError(f"{shown(experiment.script)}: {error}") from error
