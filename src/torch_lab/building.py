"""The parts of a training, put together to look at and to try out: no run comes of them."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger

from torch_lab.callbacks import NanMonitor
from torch_lab.checkpoints import source_of
from torch_lab.components import TrainComponents
from torch_lab.exact import ExactResume
from torch_lab.experiment import Experiment
from torch_lab.hparams import Hparams
from torch_lab.remote import asking
from torch_lab.samplers import Position
from torch_lab.signals import StopRequest
from torch_lab.training import (
    build_trainer,
    given_callbacks,
    pin_if_of_use,
    seeded_components,
    with_loaders,
)
from torch_lab.tuning import Tuning
from torch_lab.utils import shown
from torch_lab.weights import load_source

__all__ = ["built"]

log = logging.getLogger(__name__)


def built(
    experiment: Experiment, *, tracking: str, trust: bool
) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
    """Return the trainer, the module and the data of `experiment`, for `trainer.fit(module, data)`.

    They train as a run does, to the same bits; but nothing is written, logged or tracked.

    Args:
        experiment: The experiment.
        tracking: `auto` to ask ClearML, if it is there, for what is not here; `offline` not to.
        trust: Read a checkpoint that holds code.

    Raises:
        UserError: The config script, the components or the checkpoint are wrong.
    """
    hparams = experiment.hparams
    with asking(tracking):
        components = seeded_components(experiment)
        _load_weights(components.module, hparams, trust=trust)
    tuning = Tuning.of(experiment)
    position = Position(hparams.seed)
    components, loaders = with_loaders(components, hparams, position, debug=False)
    callbacks = [
        ExactResume(hparams.seed, position, loaders, StopRequest(), tuning=tuning),
        NanMonitor(),
        *components.callbacks,
        *given_callbacks(hparams),
    ]
    # A callback such as LearningRateMonitor refuses to be without a logger.
    defaults = {"logger": DummyLogger(), "num_sanity_val_steps": 0}
    trainer = build_trainer(hparams, callbacks, experiment.root, lightning_shards=False, **defaults)
    pin_if_of_use(loaders, trainer, hparams)
    return trainer, components.module, _data(components)


def _load_weights(module: pl.LightningModule, hparams: Hparams, *, trust: bool) -> None:
    """Load the weights of the checkpoint that the hparams name, if they name one."""
    source = source_of(hparams, trust=trust, in_full=not hparams.checkpoint.weights_only)
    if source is None:
        return
    load_source(module, source, hparams.checkpoint, script=hparams.path)
    if not hparams.checkpoint.weights_only:
        log.warning(
            "%s goes on from %s in full; here are its weights alone", shown(hparams.path), source
        )


def _data(components: TrainComponents) -> pl.LightningDataModule:
    """Return the data as a datamodule, which any call of the `Trainer` takes."""
    if components.datamodule is not None:
        return components.datamodule
    data = pl.LightningDataModule()
    for hook in components.hooks:
        setattr(data, hook, functools.partial(_given, getattr(components, f"{hook}s")))
    return data


def _given(loaders: Any) -> Any:
    return loaders
