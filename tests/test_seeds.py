"""Seeds derived from positions."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch

from torch_lab.seeds import Stream, derived, generators_from, seed_generators


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds_stay_what_they_are() -> None:
    """A run that was begun with an older version goes on with the same numbers."""
    assert derived(7) == 7
    assert derived(7, Stream.DATA, 3) == 9716232063330790915
    assert [int(stream) for stream in Stream] == list(range(9))


def test_seeds_of_neighbours_have_nothing_in_common() -> None:
    """Positions near each other, and the same numbers in another order, give other bits."""
    positions = itertools.product(range(-1, 12), repeat=3)
    seeds = [derived(1, *position) for position in positions]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)
    assert len({seed >> 32 for seed in seeds}) == len(seeds)
    ones = [seed.bit_count() for seed in seeds]
    assert abs(float(np.mean(ones)) - 32) < 1


def test_all_generators_are_seeded() -> None:
    """The same value gives the same numbers, another one others; no two generators agree."""
    seed_generators(derived(1, 2))
    first = draws()
    assert len(set(first)) == 3
    draws()
    seed_generators(derived(1, 2))
    assert draws() == first
    seed_generators(derived(1, 3))
    assert not set(draws()) & set(first)


def test_generators_of_numpy_and_torch_differ() -> None:
    """Both make the same numbers of the same 32 bits."""
    seed_generators(derived(5, 1))
    from_numpy = np.random.randint(0, 2**32, size=8, dtype=np.uint32)
    from_torch = torch.randint(0, 2**32, (8,)).numpy()
    assert not set(from_numpy.tolist()) & set(from_torch.tolist())


def test_generators_are_set_back() -> None:
    """What is drawn aside does not change what is drawn after."""
    seed_generators(1)
    expected = draws()
    seed_generators(1)
    with generators_from(2):
        aside = draws()
    assert draws() == expected
    assert aside != expected
