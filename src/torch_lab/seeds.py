"""Random numbers without a history: every draw is a function of the seed and of a position.

A generator is seeded where it is needed, from the run's seed and from where the run stands: epoch,
batch, sample. So nothing random has to be saved, and it does not matter which process draws.
"""

from __future__ import annotations

import enum
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = [
    "SeededGenerator",
    "Stream",
    "derived",
    "generators_from",
    "seed_cpu_generators",
    "seed_generators",
]

_BITS = (1 << 64) - 1


class Stream(enum.IntEnum):
    """What numbers are drawn for: the first part of a position. Values must stay what they are."""

    TRAIN = 0
    """A step of training."""
    EPOCH = 1
    """What is done before the first batch of an epoch."""
    VALIDATION = 2
    AFTER_VALIDATION = 3
    """What is done between a validation and the next step."""
    TEST = 4
    PREDICT = 5
    DATA = 6
    """Samples."""
    ORDER = 7
    """The order of samples."""
    WORKERS = 8
    """The seeds that a DataLoader gives its workers."""


class SeededGenerator(torch.Generator):
    """A generator that is pickled as its seed.

    One of torch's is pickled with a tensor that is gone before a process is spawned, and then the
    spawning fails.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).seeded, (self.initial_seed(),)

    @classmethod
    def seeded(cls, value: int) -> SeededGenerator:
        """Return one that was seeded with `value`."""
        made = cls()
        made.manual_seed(value)
        return made


def derived(seed: int, *parts: int) -> int:
    """Return 64 bits that look random, and are the same for the same numbers.

    Args:
        seed: The seed, or bits derived from it: `derived(derived(s, a), b)` is as good as
            `derived(s, a, b)`, and another number.
        parts: Numbers that say what for.
    """
    bits = seed & _BITS
    for part in parts:
        # One round of SplitMix64 (Steele et al. 2014) for each part: its bits spread over all 64.
        bits = ((bits ^ (part & _BITS)) + 0x9E3779B97F4A7C15) & _BITS
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _BITS
        bits ^= bits >> 31
    return bits


def seed_generators(value: int) -> None:
    """Seed the generators of `random`, NumPy and torch, on the devices that are in use.

    Args:
        value: 64 bits, as `derived` returns them.
    """
    seed_cpu_generators(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(value)
    if _has_mps():
        torch.mps.manual_seed(value)


def seed_cpu_generators(value: int) -> None:
    """Seed those that samples are made with: it takes some 8 µs."""
    random.seed(value)
    # NumPy and torch make the same numbers of the same 32 bits, so each gets a half.
    np.random.seed(value >> 32)
    # `torch.manual_seed` takes a hundred times as long.
    torch.default_generator.manual_seed(value)


@contextmanager
def generators_from(value: int) -> Iterator[None]:
    """Seed the generators of the CPU for a while, and set them back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_cpu_generators(value)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@functools.cache
def _has_mps() -> bool:
    return torch.backends.mps.is_available()
