"""Tuning: how the network and the optimizers of an experiment compute, and not what.

The keys `compile`, `channels_last` and `optimizer` of the hparams say it. None of them overrides
what the config function has chosen itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_lab.errors import HparamsError
from torch_lab.experiment import Experiment
from torch_lab.layering import place_of
from torch_lab.modules import LabModule
from torch_lab.utils import shown

__all__ = ["Tuning", "laid_out_as", "lay_out_states"]

_KEYS: Final = ("compile", "channels_last", "optimizer")
_NOT_CHOSEN: Final[Mapping[str, Any]] = {"fused": None, "foreach": None, "differentiable": False}
"""Ways to step weights, and what an optimizer holds that was asked for none of them."""
_EXACT: Final[Mapping[str, Any]] = {"dynamic": False}
"""Kernels for one size each: those for any size are others, and come with the second size."""
_MENDS: Final = {
    "compile": "compile its network in the config script: "
    "module.net = torch.compile(module.net, dynamic=False)",
    "channels_last": "have it convert its network itself, and the images in its steps: "
    "self.net.to(memory_format=torch.channels_last)",
}


@dataclass(frozen=True)
class Tuning:
    """What the hparams say of how is to be computed."""

    compile: Mapping[str, Any] | None = None
    """Arguments of `torch.compile`; None for not."""
    channels_last: bool = False
    optimizer: Mapping[str, bool] = field(default_factory=dict)
    """What holds for the optimizers where nothing was chosen."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where each key is set, to name it in errors."""

    @classmethod
    def of(cls, experiment: Experiment) -> Tuning:
        """Return what the hparams of `experiment` say."""
        hparams = experiment.hparams
        given = hparams.compile
        options = {**_EXACT, **(given if isinstance(given, dict) else {})}
        return cls(
            None if given is False else options,
            hparams.channels_last,
            hparams.optimizer,
            {key: _place(experiment, key) for key in _KEYS},
        )

    def conditions(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on exactly, in plain values.

        Of the optimizers nothing: they go on with what the checkpoint holds.
        """
        compiled: Any = self.compile is not None
        if self.compile not in (None, _EXACT):
            compiled = _plain(self.compile)
        return {"compile": compiled, "channels_last": self.channels_last}

    def tune(self, module: pl.LightningModule) -> None:
        """Let the network of `module` be compiled and lie in memory as is wanted, in place.

        Raises:
            HparamsError: It is no `LabModule`, so that its network is not known; or `torch.compile`
                refuses the arguments, or would not get them.
        """
        own: Any = getattr(module, "_orig_mod", module)
        wanted = {"compile": self.compile is not None, "channels_last": self.channels_last}
        for key in filter(wanted.get, wanted):
            if not isinstance(own, LabModule):
                kind = type(own).__name__
                told = f"{key} is for the network of a LabModule, and the module is a {kind}"
                raise HparamsError(f"{self.places[key]}: {told}", _MENDS[key])
        if self.channels_last:
            own.lay_out(torch.channels_last)
        if self.compile is not None:
            self._compile(own, is_compiled=own is not module or _is_compiled(own.model))

    def _compile(self, module: LabModule, *, is_compiled: bool) -> None:
        if is_compiled:
            if self.compile != _EXACT:
                raise HparamsError(
                    f"{self.places['compile']}: compile has arguments for a network that the "
                    "config script has compiled itself",
                    "give them to torch.compile there, or have it leave that to this key",
                )
            return
        try:
            module.compile_network(**(self.compile or {}))
        except (RuntimeError, TypeError, ValueError) as error:
            told = str(error).partition(", known options are")[0].partition("\n")[0]
            raise HparamsError(f"{self.places['compile']}: compile: {told}") from error

    def choose_kernels(self, optimizers: Iterable[Optimizer], module: nn.Module) -> None:
        """Set what was not chosen in the groups of `optimizers`, before they make a step.

        Args:
            optimizers: Those that are to step the weights.
            module: Has the weights; errors name them.

        Raises:
            HparamsError: One of them does not know a key, or cannot do for a weight what it asks.
        """
        for optimizer in optimizers if self.optimizer else ():
            for key in self.optimizer:
                if key not in getattr(optimizer, "defaults", {}):
                    kind = type(optimizer).__name__
                    raise HparamsError(
                        f"{self.places['optimizer']}: optimizer.{key}: {kind} has no such argument",
                        "leave it out, and give it in the config script to optimizers that have it",
                    )
            for group in optimizer.param_groups:
                if _leaves_open(group):
                    self._check_fused(group["params"], module)
                    group.update(self.optimizer)
            if _leaves_open(optimizer.defaults):  # Which groups that are added later begin with.
                optimizer.defaults.update(self.optimizer)

    def _check_fused(self, parameters: Iterable[Tensor], module: nn.Module) -> None:
        if not self.optimizer.get("fused"):
            return
        names = {id(each): name for name, each in module.named_parameters()}
        sparse = {id(each) for each in _with_sparse_gradients(module)}
        for each in parameters:
            told = "has sparse gradients" if id(each) in sparse else f"is of {each.dtype}"
            if id(each) in sparse or not each.is_floating_point():
                name = names.get(id(each), "a weight")
                raise HparamsError(
                    f"{self.places['optimizer']}: optimizer.fused: {name} {told}, for which there "
                    "are no fused kernels",
                    "leave it out, or give fused=False to the optimizer in the config script",
                )


def laid_out_as(value: Tensor, parameter: Tensor) -> Tensor:
    """Return `value` in the order in memory that `parameter` has, itself if it is."""
    is_strided = value.layout == parameter.layout == torch.strided
    if not is_strided or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    made = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
    return made.copy_(value.detach())


def lay_out_states(optimizers: Iterable[Optimizer]) -> None:
    """Give what optimizers remember of weights the order in memory that these have.

    Fused kernels go through both side by side, without a look at how they lie; and a checkpoint may
    be of a run whose weights lay otherwise.
    """
    for optimizer in optimizers:
        states: Mapping[Any, Any] = optimizer.state
        # Some keep there what belongs to no weight.
        for parameter in [each for each in states if isinstance(each, Tensor)]:
            state = states[parameter]
            tensors = {name: each for name, each in state.items() if isinstance(each, Tensor)}
            state.update({name: laid_out_as(each, parameter) for name, each in tensors.items()})


def _leaves_open(options: Mapping[str, Any]) -> bool:
    """Return whether none of the ways to step was chosen."""
    return all(options.get(key, default) == default for key, default in _NOT_CHOSEN.items())


def _with_sparse_gradients(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            yield part.weight


def _is_compiled(network: Any) -> bool:
    return hasattr(network, "_orig_mod") or vars(network).get("_compiled_call_impl") is not None


def _plain(value: Any) -> Any:
    """Return arguments of `torch.compile` as what is the same in another process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def _place(experiment: Experiment, key: str) -> str:
    """Return the file and line that set a key, or something in it; else the script."""
    histories = experiment.histories
    keys = [(key,), *(each for each in histories if each[:1] == (key,))]
    places = (place_of(each, histories) for each in keys)
    return next(filter(None, places), shown(experiment.script))
