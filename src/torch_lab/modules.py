"""Lightning modules around a plain network: `LabModule` predicts, `TrainLabModule` trains too.

A batch is `(x, md)`, with labels in `md["y"]`, or plainly `(x, y)`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, TypeAlias

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric, MetricCollection

from torch_lab.errors import ComponentsError, did_you_mean
from torch_lab.metrics import EpochValues, batch_size
from torch_lab.transforms import Metadata, as_transform

__all__ = ["LabModule", "TrainLabModule"]

Stage: TypeAlias = Literal["train", "validate", "test"]

_STAGES: Final[tuple[Stage, ...]] = ("train", "validate", "test")
_OPTIMIZER_CONFIG: Final = (
    "optimizer",
    "optimizer_kwargs",
    "scheduler",
    "scheduler_kwargs",
    "monitor",
)
_REST: Final = "torch_lab_state_dict"
_MODEL: Final = "model."
_COMPILED: Final = "_orig_mod."
_IMAGE_DIMENSIONS: Final = 4
"""Of a batch of images: samples, channels, height and width."""


class LabModule(pl.LightningModule):
    """A network that predicts.

    `predict_step` gives `{"y_pred", "out", "md"}`: what the network said, what the transform made
    of it, and the metadata. Batches may also be `x` alone.

    `state_dict` of its checkpoints holds the network's weights under the network's own names, so
    that `model.load_state_dict(torch.load(path)["state_dict"])` works, also for a network that was
    compiled or trained in several processes. The state of everything else (losses, metrics) lies
    beside them.

    Args:
        model: The network, called with `x`.
        transform: Makes `out` of a batch of predictions when predicting, and only then: a
            transform, or a callable `y_pred -> out` or `(y_pred, md) -> out`
            (`torch_lab.transforms.as_transform`). It must leave `y_pred` itself as it is. Without
            it, `out` is `y_pred`.
    """

    _compiled_with: Mapping[str, Any] | None = None
    _memory_format: torch.memory_format | None = None

    def __init__(self, model: nn.Module, transform: Callable[..., Any] | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ComponentsError(f"model must be a torch.nn.Module, it is a {_kind(model)}")
        self.model = model
        # Kept as given too: a transform that is a module moves between devices with this one.
        self.transform = transform
        self._transform = None if transform is None else as_transform(transform)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # What was compiled is lost on the way to another process.
        if self._compiled_with is not None:
            self.compile_network(**self._compiled_with)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes here which hook it calls, some thirty times a step. It is no module and no
        # tensor, for which torch would look at it.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Any) -> Any:
        """Return what the network makes of `x`."""
        given = x if self._memory_format is None else _laid_out(x, self._memory_format)
        return self.model(given)

    def compile_network(self, **options: Any) -> None:
        """Have the network compiled when it is called next; its weights keep their names.

        Args:
            options: Arguments of `torch.compile`.

        Raises:
            RuntimeError: Torch refuses them.
        """
        # As `nn.Module.compile` does it. That compiles nothing of a network whose class is torch's
        # own, such as Sequential: Dynamo skips frames of torch's files, unless they are inlined.
        # A copy, as torch takes some of the options out.
        given = copy.deepcopy(options)
        compiled = torch.compile(_inlined(self.model._call_impl), **given)
        vars(self.model)["_compiled_call_impl"] = compiled
        self._compiled_with = options

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Put 4-d weights of the network, and 4-d inputs on their way to it, in such an order."""
        values: Iterable[Any] = [*self.model.parameters(), *self.model.buffers()]
        for weight in values:
            if not is_lazy(weight) and weight.dim() == _IMAGE_DIMENSIONS:
                weight.data = weight.data.to(memory_format=memory_format)
        self._memory_format = memory_format

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Metadata:
        """Return `{"y_pred", "out", "md"}` of a batch."""
        x, md = _split(batch)
        y_pred = out = self(x)
        if self._transform is not None:
            out, md = self._transform(y_pred, md)
        return {"y_pred": y_pred, "out": out, "md": md}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the network's weights alone in `state_dict`, and put the rest beside them."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            _bare(key): value for key, value in state.items() if key.startswith(_MODEL)
        }
        # A loss may hold buffers (pos_weight), a metric a network: they are no part of the model.
        checkpoint[_REST] = {k: value for k, value in state.items() if not k.startswith(_MODEL)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the network's weights and the rest together again.

        State of parts that this module does not have, such as the loss when only predicting, is
        left out. Checkpoints in Lightning's own form stay as they are.
        """
        if _REST not in checkpoint:
            return
        own_names = {_bare(_MODEL + key): _MODEL + key for key in self.model.state_dict()}
        weights = {own_names.get(k, _MODEL + k): v for k, v in checkpoint["state_dict"].items()}
        rest = {k: v for k, v in checkpoint.pop(_REST).items() if self._has_part(k)}
        checkpoint["state_dict"] = weights | rest

    def _has_part(self, key: str) -> bool:
        return getattr(self, key.partition(".")[0], None) is not None


class TrainLabModule(LabModule):
    """A network that trains: with a loss, an optimizer, and metrics.

    Logged are `loss/train_step`, of single batches, at the steps that the trainer logs; and at the
    end of every epoch, for the stages train, validate and test, `loss/<stage>`, and
    `<metric>/<stage>` of each metric with a scalar value. Other values are for callbacks to plot,
    in `metrics`, until the module's own `on_<stage>_epoch_end`. Values of an epoch are exact over
    samples of all batches, loaders and processes, whatever the batches' sizes.

    Args:
        model: The network, called with `x`.
        loss_function: `(y_pred, y) ->` a scalar, or a dictionary of scalars: each is logged as
            `<key>/<stage>`, and their mean is the loss. A loss that is a module is moved with the
            network, and trained if it has parameters.
        optimizer_factory: `parameters -> optimizer`; gets the list of the trainable ones.
        scheduler_factory: `optimizer ->` a scheduler, stepped every epoch, or Lightning's scheduler
            dictionary (`{"scheduler": ..., "interval": "step"}`). A `ReduceLROnPlateau` without a
            `monitor` watches `loss/validate`.
        metrics: torchmetrics by name, or a `MetricCollection`; every stage has a copy. They get the
            network's raw output, detached, and the labels: `transform` is for predictions alone.
            `torch_lab.metrics.MetricWrapper` preprocesses.
        transform: As in `LabModule`.
        optimizer_config: Instead of the factories: `{"optimizer": class}`, and optional
            `"optimizer_kwargs"`, `"scheduler"` (a class), `"scheduler_kwargs"`, and `"monitor"`.

    Raises:
        ComponentsError: An argument is missing, of the wrong type, or contradicts another; while
            training: a batch without labels, a loss that is no scalar, a name logged twice.
    """

    metrics: Mapping[Stage, MetricCollection]
    """The metrics of every stage: the epoch so far, until its values have been logged."""

    def __init__(
        self,
        model: nn.Module,
        loss_function: Callable[[Any, Any], Tensor | Mapping[str, Tensor]],
        optimizer_factory: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        scheduler_factory: Callable[[Optimizer], Any] | None = None,
        metrics: Mapping[str, Metric | MetricCollection] | MetricCollection | None = None,
        transform: Callable[..., Any] | None = None,
        *,
        optimizer_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, transform)
        self.loss_function = _called("loss_function", loss_function)
        self._monitor: str | None = None
        if optimizer_config is not None:
            if optimizer_factory is not None or scheduler_factory is not None:
                raise ComponentsError("give optimizer_config or factories, not both")
            optimizer_factory, scheduler_factory = _factories(optimizer_config)
            self._monitor = optimizer_config.get("monitor")
        if optimizer_factory is None:
            raise ComponentsError(
                "no optimizer: give optimizer_factory, such as "
                "lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), or optimizer_config"
            )
        self.optimizer_factory = _called("optimizer_factory", optimizer_factory)
        self.scheduler_factory = (
            None if scheduler_factory is None else _called("scheduler_factory", scheduler_factory)
        )
        collection = _collection(metrics)
        self._epochs: dict[Stage, EpochValues] = {}
        for stage in _STAGES:
            clone = collection.clone()
            # Modules in a plain dict are not found by Lightning; a ModuleDict refuses "train".
            self.add_module(f"{stage}_metrics", clone)
            self._epochs[stage] = EpochValues(clone)
        self.metrics = _Metrics(self._epochs)
        self._names = set(collection.keys())

    def setup(self, stage: str) -> None:
        """Forget what an earlier, interrupted epoch has left."""
        for epoch in self._epochs.values():
            epoch.reset()

    def epoch_state_dict(self) -> dict[str, Any]:
        """Return what this process has gathered of the training epoch so far, for a checkpoint.

        A module of your own that keeps such sums may have this method and the next: plain values
        and tensors, of each process its own. States of metrics are saved without it.
        """
        epoch = self._epochs["train"]
        return epoch.state_dict() if epoch.samples else {}

    def load_epoch_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `epoch_state_dict` returned."""
        if state:
            self._epochs["train"].load_state_dict(state, self.device)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and, if there is one, the scheduler, in Lightning's form."""
        parameters = [
            p
            for name, p in self.named_parameters()
            if p.requires_grad and name.startswith((_MODEL, "loss_function."))
        ]
        if not parameters:
            raise ComponentsError("nothing to train: no parameter of the model requires a gradient")
        optimizer = self.optimizer_factory(parameters)
        if not isinstance(optimizer, Optimizer):
            raise ComponentsError(
                f"optimizer_factory must return an optimizer, it returned a {_kind(optimizer)}"
            )
        if self.scheduler_factory is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step("train", batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the loss of a batch."""
        return self._step("validate", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the loss of a batch."""
        return self._step("test", batch)

    def on_train_epoch_end(self) -> None:
        """Log the losses and metrics of the epoch."""
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        """Log the losses and metrics of the epoch."""
        self._log_epoch("validate")

    def on_test_epoch_end(self) -> None:
        """Log the losses and metrics of the epoch."""
        self._log_epoch("test")

    def _scheduler(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.scheduler_factory is not None
        made = self.scheduler_factory(optimizer)
        config = dict(made) if isinstance(made, Mapping) else {"scheduler": made}
        if self._monitor is None and isinstance(config.get("scheduler"), ReduceLROnPlateau):
            return {"monitor": "loss/validate", **config}
        return {"monitor": self._monitor, **config}

    def _step(self, stage: Stage, batch: Any) -> Tensor:
        x, y = _labelled(batch)
        y_pred = self(x)
        losses = self._losses(y_pred, y)
        size = batch_size(y, x)
        if stage == "train":
            self._log_step(losses, size)
        self._epochs[stage].add(losses, size, y_pred, y)
        return losses["loss"]

    def _losses(self, y_pred: Any, y: Any) -> dict[str, Tensor]:
        """Return the loss as `"loss"`, beside the parts it is the mean of."""
        result = self.loss_function(y_pred, y)
        if not isinstance(result, Mapping):
            return {"loss": _scalar(result, "it")}
        if not result:
            raise ComponentsError("the loss function returned an empty dictionary")
        taken = {"loss", *self._names} & result.keys()
        if taken:
            raise ComponentsError(
                f"the loss function returned the key {min(map(str, taken))!r}, the name of "
                f"{'the mean of all keys' if 'loss' in taken else 'a metric'}; rename it"
            )
        parts = {name: _scalar(value, f"its {name!r}") for name, value in result.items()}
        return {"loss": torch.stack([part.reshape(()) for part in parts.values()]).mean(), **parts}

    def _log_step(self, losses: dict[str, Tensor], size: int) -> None:
        """Log the training losses of a batch, if the trainer logs this step."""
        trainer = self._trainer
        if trainer is None or not trainer.training:  # A step that is tried out by hand.
            return
        # Not every step: `self.log` takes as long as a small network's forward pass.
        if trainer._logger_connector.should_update_logs:
            values = {f"{name}/train_step": value for name, value in losses.items()}
            self.log_dict(values, on_step=True, on_epoch=False, batch_size=size)

    def _log_epoch(self, stage: Stage) -> None:
        """Log the losses of the epoch and the scalars among the metrics' values, and start anew."""
        epoch = self._epochs[stage]
        if epoch.samples:
            means = {f"{name}/{stage}": value for name, value in epoch.means().items()}
            self.log_dict(means, sync_dist=True, batch_size=epoch.samples)
        if metrics := epoch.metrics:
            scalars = {
                f"{name}/{stage}": v for name, v in metrics.compute().items() if _is_scalar(v)
            }
            # All processes have the same values; sync_dist only says that we know.
            self.log_dict(scalars, sync_dist=True, batch_size=1)
        epoch.reset()


class _Metrics(Mapping[Stage, MetricCollection]):
    """The metrics of each stage, with all batches so far of the stage that is asked for."""

    def __init__(self, epochs: Mapping[Stage, EpochValues]) -> None:
        self._epochs = epochs

    def __getitem__(self, stage: Stage) -> MetricCollection:
        return self._epochs[stage].metrics

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._epochs)

    def __len__(self) -> int:
        return len(self._epochs)


def _inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with a frame of ours around it."""

    def called(*given: Any, **named: Any) -> Any:
        return function(*given, **named)

    # Torch keeps what it compiled with the code, of which it then has one for each network.
    called.__code__ = called.__code__.replace()
    return called


def _laid_out(value: Any, memory_format: torch.memory_format) -> Any:
    """Return inputs of a network with their images in `memory_format`."""

    def laid_out(tensor: Tensor) -> Tensor:
        is_image = tensor.dim() == _IMAGE_DIMENSIONS
        return tensor.to(memory_format=memory_format) if is_image else tensor

    return tree_map_only(Tensor, laid_out, value)


def _split(batch: Any) -> tuple[Any, Metadata]:
    """Return `(x, md)` of `(x, md)`, `(x, y)`, `(x,)` or `x`."""
    if not isinstance(batch, list | tuple) or len(batch) > 2:
        return batch, {}
    x, md = (*batch, {})[:2]
    return x, md if isinstance(md, dict) else {"y": md}


def _labelled(batch: Any) -> tuple[Any, Any]:
    """Return `(x, y)` of `(x, md)` or `(x, y)`."""
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
        raise ComponentsError(
            'a batch must be (x, md), with labels in md["y"], or (x, y); '
            f"it is a {_kind(batch)}{size}"
        )
    x, md = batch
    if not isinstance(md, dict):
        return x, md
    if "y" not in md:
        raise ComponentsError(
            'a batch has no labels: md["y"] is missing; '
            f"md has {', '.join(map(repr, md)) or 'nothing'}",
            hint="every sample needs a label: from get_raw_label, or as y of an ArrayDataset",
        )
    return x, md["y"]


def _scalar(loss: Any, name: str) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {_kind(loss)}"
    raise ComponentsError(
        f"the loss function must return a scalar tensor or a dictionary of them; {name} is {found}"
    )


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)


def _collection(
    metrics: Mapping[str, Metric | MetricCollection] | MetricCollection | None,
) -> MetricCollection:
    if not isinstance(metrics, MetricCollection):
        metrics = MetricCollection(_checked_metrics({} if metrics is None else metrics))
    if "loss" in metrics.keys():  # noqa: SIM118  # `in` looks at names without their prefix
        raise ComponentsError('a metric may not be named "loss": that is the loss; rename it')
    return metrics


def _checked_metrics(metrics: Any) -> dict[str, Metric | MetricCollection]:
    if not isinstance(metrics, Mapping):
        raise ComponentsError(
            f"metrics must be a dictionary or a MetricCollection, it is a {_kind(metrics)}"
        )
    for name, metric in metrics.items():
        if not isinstance(metric, Metric | MetricCollection):
            raise ComponentsError(
                f"metrics[{name!r}] must be a metric of torchmetrics, it is a {_kind(metric)}"
            )
    return dict(metrics)


def _factories(
    config: Mapping[str, Any],
) -> tuple[Callable[[list[nn.Parameter]], Optimizer], Callable[[Optimizer], Any] | None]:
    """Return the factories of the optimizer and the scheduler that `config` describes."""
    for key in config:
        if key not in _OPTIMIZER_CONFIG:
            raise ComponentsError(
                f"unknown key optimizer_config[{key!r}]{did_you_mean(key, _OPTIMIZER_CONFIG)}",
                hint=f"it may have: {', '.join(_OPTIMIZER_CONFIG)}",
            )
    if config.get("optimizer") is None:
        raise ComponentsError(
            'optimizer_config needs "optimizer", a class such as torch.optim.AdamW'
        )
    scheduler = config.get("scheduler")
    return (
        _bound("optimizer", config["optimizer"], config.get("optimizer_kwargs")),
        scheduler and _bound("scheduler", scheduler, config.get("scheduler_kwargs")),
    )


def _bound(name: str, made: Any, kwargs: Mapping[str, Any] | None) -> Callable[..., Any]:
    return functools.partial(_called(f"optimizer_config[{name!r}]", made), **(kwargs or {}))


def _called(name: str, value: Any) -> Any:
    """Return `value`; raise if it is not callable."""
    if not callable(value):
        raise ComponentsError(f"{name} must be callable, it is a {_kind(value)}")
    return value


def _bare(key: str) -> str:
    """Return the bare network's own name of a key of the module, compiled or not."""
    return key.removeprefix(_MODEL).replace(_COMPILED, "")


def _kind(value: Any) -> str:
    return type(value).__name__
