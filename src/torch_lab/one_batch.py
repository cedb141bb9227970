"""One batch of a training on the CPU, and what it shows of the others.

It goes through Lightning's own loops, forward, backward and through the optimizer, and one batch of
each validation and test comes after it. The user's callbacks are not called, and what the module
logs goes to the folder of the run, wherever that is.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_lab.callbacks import NanMonitor
from torch_lab.components import each_loader
from torch_lab.errors import HparamsError
from torch_lab.exact import ExactResume
from torch_lab.modules import TrainLabModule
from torch_lab.overlap import NotComparableError, Overlap, overlap
from torch_lab.runner import known_failures_as_ours
from torch_lab.training import Training, build_trainer, for_any_machine
from torch_lab.utils import shown

__all__ = ["Seen", "Sizes", "pass_one"]

_LEFT_OUT: Final = (
    "barebones",
    "callbacks",
    "fast_dev_run",
    "max_time",
    "min_epochs",
    "min_steps",
    "profiler",
)
"""Arguments of the `Trainer` that say nothing of a batch, or write something somewhere."""
_ON_A_CPU: Final = {
    "16-true": "bf16-true",
    "transformer-engine": "bf16-mixed",
    "transformer-engine-float16": "bf16-mixed",
}
"""Precisions that other devices have, and what takes as much memory on a CPU."""
_NOT_MEASURABLE: Final = "support saved tensor hooks"


@dataclass
class Sizes:
    """Bytes that a training takes, as measured in one batch."""

    parameters: int = 0
    """With the buffers."""
    gradients: int = 0
    optimizer: int = 0
    batch: int = 0
    activations: int = 0
    """What the forward pass keeps for the backward pass."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclass
class Seen:
    """What was seen of a batch."""

    is_measured: bool = True
    """Whether the activations were: some parts of torch do not let them be."""
    has_passed: bool = False
    seconds: float = 0.0
    loss: float | None = None
    """None if the module tells none."""
    parameters: int = 0
    trained: int = 0
    """How many of them are."""
    without_gradient: list[str] | None = None
    """Which trained ones no backward pass has reached; None before a backward pass."""
    classes: int | None = None
    """Among how many the network chooses, if its loss says that it does."""
    sizes: Sizes = field(default_factory=Sizes)
    checkpoint: int = 0
    """Bytes of the tensors in a checkpoint."""
    logged: dict[str, float] | None = None
    """What the validation logged; None without one."""
    overlap: Overlap | str | None = None
    """Of the samples, or why there is none; None without validation data."""
    reasons: list[str] = field(default_factory=list)
    """Why the run may not be exact."""


def pass_one(training: Training) -> Seen:
    """Pass a batch of `training` through its module, and return what was seen.

    Raises:
        UserError: The hparams and the components do not go together, or no batch is trained.
        NonFiniteError: The loss is NaN or infinite.
        Exception: What the user's code raises.
    """
    try:
        return _passed(training, Seen())
    except RuntimeError as error:
        if _NOT_MEASURABLE not in str(error):
            raise
    return _passed(training, Seen(is_measured=False))


def _passed(training: Training, seen: Seen) -> Seen:
    components, experiment = training.components, training.experiment
    module, datamodule = components.module, components.datamodule
    trains, validates = components.train_dataloaders, components.val_dataloaders
    with known_failures_as_ours(experiment, training.loaders):
        trainer = _trainer(training, seen)
        with _counting_classes(module, seen):
            trainer.fit(module, trains, validates, datamodule=datamodule)
        if not seen.has_passed:
            raise HparamsError(
                f"{shown(experiment.script)}: the training makes no step",
                "look at max_epochs, max_steps and limit_train_batches in trainer.init",
            )
        if "test_dataloader" in components.hooks:
            tests = components.test_dataloaders
            trainer.test(module, tests, datamodule=datamodule, verbose=False)
    return seen


def _trainer(training: Training, seen: Seen) -> pl.Trainer:
    """Return a trainer that stops after a batch; its plan is that of the run."""
    hparams = training.hparams
    given, precision = hparams.trainer.init, hparams.trainer.init.get("precision")
    init = {
        **for_any_machine(hparams).trainer.init,
        "precision": _ON_A_CPU.get(str(precision), precision),
        "limit_val_batches": int(given.get("limit_val_batches") != 0),
        "limit_test_batches": int(given.get("limit_test_batches") != 0),
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if init.get("check_val_every_n_epoch") is not None:
        init["check_val_every_n_epoch"] = 1
    init = {key: value for key, value in init.items() if key not in _LEFT_OUT}
    return build_trainer(
        replace(hparams, trainer=replace(hparams.trainer, init=init)),
        [_OneBatch(training, seen), NanMonitor()],
        training.run.folder.parent,
        lightning_shards=False,
        logger=training.logger,
    )


class _OneBatch(pl.Callback):
    """Ends the training after a batch, and notes in `seen` what there is to see of it."""

    def __init__(self, training: Training, seen: Seen) -> None:
        self.training = training
        self.seen = seen
        self._activations = _Activations()
        self._started = 0.0
        self._before: set[str] = set()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the optimizers step as those of the run will."""
        _exactness(self.training).tuning.choose_kernels(trainer.optimizers, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the optimizer make its step after this batch, whatever it accumulates."""
        trainer.accumulate_grad_batches = 1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure."""
        self.seen.sizes.batch = _bytes(batch)
        self._started = time.perf_counter()
        if self.seen.is_measured:
            known = [*pl_module.parameters(), *pl_module.buffers(), *_tensors(batch)]
            self._activations.begin(known)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Note the most that any forward pass has kept: a module may have several."""
        sizes = self.seen.sizes
        sizes.activations = max(sizes.activations, self._activations.taken())

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the gradients."""
        seen = self.seen
        trained = [each for each in pl_module.named_parameters() if each[1].requires_grad]
        gradients = _bytes([each.grad for _, each in trained])
        seen.sizes.gradients = max(seen.sizes.gradients, gradients)
        without = [name for name, each in trained if each.grad is None]
        earlier = without if seen.without_gradient is None else seen.without_gradient
        seen.without_gradient = [name for name in without if name in earlier]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note what the step has left, and end the training."""
        seen, sizes = self.seen, self.seen.sizes
        sizes.activations = max(sizes.activations, self._activations.taken())
        self._activations.end()
        seen.seconds = time.perf_counter() - self._started
        seen.has_passed = True
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        seen.loss = float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else None
        parameters = list(pl_module.parameters())
        seen.parameters = sum(each.numel() for each in parameters)
        seen.trained = sum(each.numel() for each in parameters if each.requires_grad)
        sizes.parameters = _bytes([*parameters, *pl_module.buffers()])
        sizes.optimizer = _bytes([dict(each.state) for each in trainer.optimizers])
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        seen.checkpoint = _bytes(checkpoint)
        trainer.should_stop = True

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Measure no longer."""
        self._activations.end()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep apart what training has logged."""
        self._before = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what the validation has logged."""
        logged = trainer.callback_metrics
        names = [name for name in logged if name not in self._before]
        self.seen.logged = {name: float(logged[name]) for name in names}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the data, as long as a datamodule has it."""
        training, validation = (
            [leaf for leaf in each_loader(name, given) if leaf[1] is not None]
            for name, given in (
                ("train_dataloaders", trainer.train_dataloader),
                ("val_dataloaders", trainer.val_dataloaders),
            )
        )
        if validation:
            try:
                self.seen.overlap = overlap(training, validation)
            except NotComparableError as error:
                self.seen.overlap = str(error)
        self.seen.reasons = list(_exactness(self.training).reasons(pl_module))


def _exactness(training: Training) -> ExactResume:
    callbacks: Iterable[pl.Callback] = training.trainer.callbacks  # type: ignore[attr-defined]
    return next(each for each in callbacks if isinstance(each, ExactResume))


# Memory.


class _Activations:
    """Counts what autograd keeps for the backward pass, each storage once."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._open = contextlib.ExitStack()

    def begin(self, known: Iterable[Tensor]) -> None:
        """Begin to count all but `known` tensors."""
        self._known = {storage for storage, _ in map(_storage, known)}
        hooks = torch.autograd.graph.saved_tensors_hooks(self._kept, _given_back)
        self._open.enter_context(hooks)

    def _kept(self, tensor: Tensor) -> tuple[Tensor, int]:
        storage, size = _storage(tensor)
        if storage not in self._known:
            self._sizes[storage] = size
        # An output that kept itself would live for ever.
        return tensor.detach(), tensor._version

    def taken(self) -> int:
        """Return how many bytes were counted since this was asked."""
        taken = sum(self._sizes.values())
        self._sizes.clear()
        return taken

    def end(self) -> None:
        """Count no more."""
        self._open.close()


def _given_back(kept: tuple[Tensor, int]) -> Tensor:
    """Return what was kept; for tensors that are kept by hooks, torch does not look itself.

    Raises:
        RuntimeError: It was changed in place meanwhile.
    """
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a tensor of type {tensor.dtype} and shape {tuple(tensor.shape)}"
        )
    return tensor


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Return what tells the memory of a tensor from others, and how many bytes it has."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr() or id(tensor), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # Of sparse tensors, say.
        return id(tensor), tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _bytes(value: Any) -> int:
    """Return how much memory the tensors in nested containers take."""
    return sum(dict(_storage(tensor) for tensor in _tensors(value)).values())


# Classes.


@contextlib.contextmanager
def _counting_classes(module: pl.LightningModule, seen: Seen) -> Iterator[None]:
    """Note among how many classes the network chooses, if the loss says that it does."""
    own = getattr(module, "_orig_mod", module)
    if not isinstance(own, TrainLabModule) or not _is_cross_entropy(own.loss_function):
        yield
        return
    handle = own.model.register_forward_hook(functools.partial(_note_classes, seen))
    try:
        yield
    finally:
        handle.remove()


def _is_cross_entropy(loss: Any) -> bool:
    plain = type(loss) is nn.CrossEntropyLoss and loss.reduction == "mean"
    return plain or loss is functional.cross_entropy


def _note_classes(seen: Seen, network: nn.Module, arguments: Any, output: Any) -> None:
    if seen.classes is None and isinstance(output, Tensor) and output.ndim > 1:
        seen.classes = output.shape[1]
