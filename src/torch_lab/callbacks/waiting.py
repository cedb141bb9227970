"""Losses that stay on their device until somebody looks at all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Kept", "Look", "Losses", "alone", "waits_for"]


def waits_for(device: torch.device) -> bool:
    """Return whether to read a number from `device` takes until it has done all it was given."""
    return device.type != "cpu"


@dataclass(frozen=True)
class Kept:
    """The loss of a batch, and what an error would say of it."""

    loss: Tensor
    """One number."""
    stage: str
    step: int
    """The step that the batch is of, in a training; the steps that were made, in a validation."""
    epoch: int
    ids: Any
    """What names the samples; None if nothing does."""
    may_be_infinite: bool = False

    def is_bad(self, value: float) -> bool:
        """Return whether `value`, which the loss turned out to be, ends the training."""
        return math.isnan(value) if self.may_be_infinite else not math.isfinite(value)


class Losses:
    """Those that nobody has looked at yet, in their order."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, kept: Kept) -> None:
        """Keep one more."""
        self._kept.append(kept)

    def first_bad(self) -> Kept | None:
        """Return the first that is not finite; in any case forget all."""
        kept, self._kept = self._kept, []
        if not kept:
            return None
        device = kept[0].loss.device
        values = torch.stack([each.loss.to(device) for each in kept]).tolist()
        pairs = zip(kept, values, strict=True)
        return next((each for each, value in pairs if each.is_bad(value)), None)


def alone(loss: Tensor) -> Tensor:
    """Return one number that is finite if all of `loss` is; who writes into that changes it not."""
    own = loss.detach()
    return own.clone().reshape(()) if own.numel() == 1 else own.abs().amax()


class Look:
    """Has somebody look at the losses before the weights of a module are taken.

    It is a hook of the module's `state_dict`. That of a copy of the module does nothing.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def __call__(self, *_: Any) -> None:
        self._look()

    def __reduce__(self) -> tuple[Any, ...]:
        return Look, (_nothing,)


def _nothing() -> None:
    """Look at nothing."""
