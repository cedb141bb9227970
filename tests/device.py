"""A device that holds no numbers: it counts who would wait for them, and makes some up.

It is torch's `meta` device. What makes a process wait for a GPU is then a question that has no
answer: a number that is read, a tensor that is copied to the CPU, one whose size follows from its
numbers. So is a tensor that is made from Python's numbers: its copy to a GPU is waited for.

A trainer needs `inference_mode=False`: in that mode torch does not say which operations it makes.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
OURS = "torch_lab"
PEOPLE = (OURS, "pytorch_lightning", "lightning_fabric", "torchmetrics")
NO_INDICES = torch.empty(0, dtype=torch.long, device=DEVICE)
ANSWERS: dict[str, Any] = {
    "aten::equal": lambda *_: True,
    "aten::allclose": lambda *_: True,
    # Whether all numbers are something: yes; whether any is something: no.
    "aten::_local_scalar_dense": lambda given: (
        not hasattr(given, "is_any") and torch.ones((), dtype=given.dtype).item()
    ),
    "aten::bincount": lambda given, weights, size: NO_INDICES.new_empty(size),
    "aten::nonzero": lambda given: NO_INDICES.new_empty(0, given.ndim),
    "aten::_unique2": lambda given, *_: (given.flatten()[:1], NO_INDICES, NO_INDICES),
}


class Anything(CPUAccelerator):
    """Takes any device."""

    def setup_device(self, device: torch.device) -> None:
        """Refuse none."""
        assert device == DEVICE


def strategy() -> SingleDeviceStrategy:
    """Return what has Lightning train there."""
    return SingleDeviceStrategy(DEVICE, accelerator=Anything())


class Waits(TorchDispatchMode):
    """Counts them while it is entered, by `now` and by whose code is the reason."""

    current: Waits | None = None
    """The one that was entered last."""

    def __init__(self) -> None:
        super().__init__()
        self.now: Any = None
        """What the training is at."""
        self.found: Counter[tuple[Any, str, str]] = Counter()
        self._made = _Made(self)

    def __enter__(self) -> Waits:
        Waits.current = self
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._made.__exit__(*raised)

    def at(self, stage: str, number: int, who: str = "") -> list[str]:
        """Return what is waited for in a step or batch, by `who` or by anybody, and in which code.

        Args:
            stage: `train` or `validate`.
            number: That of the step or batch, from 1.
            who: A package; empty for any.
        """
        return [
            f"{whose}: {what}"
            for (now, whose, what), count in self.found.items()
            for _ in range(count)
            if now == (stage, number) and whose.startswith(who)
        ]

    def note(self, what: str) -> None:
        """Note that somebody waits."""
        self.found[self.now, *_who(sys._getframe(2), what)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.name(), kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if any(each.device == DEVICE for each in given) and name in ANSWERS:
            self.note(name)
            return ANSWERS[name](*args, **kwargs)
        if name == "aten::_to_copy":
            target = torch.device(kwargs.get("device") or given[0].device)
            self._note_copy(name, given[0], target, kwargs)
            if given[0].device == DEVICE != target:
                return torch.ones(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        if name == "aten::copy_":
            self._note_copy(name, args[1], args[0].device, kwargs)
            if args[1].device == DEVICE != args[0].device:
                return args[0].fill_(1)
        result = func(*args, **kwargs)
        if name.startswith("aten::any"):
            result.is_any = True
        return result

    def _note_copy(
        self, name: str, source: torch.Tensor, target: torch.device, kwargs: Any
    ) -> None:
        if source.device != target and not kwargs.get("non_blocking"):
            self.note(name)


class Noting(pl.Callback):
    """Tells what training is at."""

    def __init__(self) -> None:
        assert Waits.current is not None
        self.waits = Waits.current

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.waits.now = ("train", trainer.global_step + 1)

    def on_train_epoch_end(self, *args: Any) -> None:
        self.waits.now = None

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.waits.now = ("validate", index + 1)

    def on_validation_epoch_end(self, *args: Any) -> None:
        self.waits.now = None


class _Made(TorchFunctionMode):
    """Sees tensors that are made there from Python's numbers."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            is_copied = not isinstance(args[0], torch.Tensor)
            if is_copied and torch.device(kwargs["device"]) == DEVICE:
                self._waits.note(func.__name__)
        return func(*args, **kwargs)


def _who(frame: FrameType | None, what: str) -> tuple[str, str]:
    """Return whose code waits, and in which function."""
    while frame is not None:
        name, _, rest = str(frame.f_globals.get("__name__")).partition(".")
        if name in PEOPLE:
            return name, f"{what} in {rest}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "others", what
