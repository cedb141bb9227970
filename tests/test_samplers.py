"""Orders of samples: from any batch of any epoch on, they are what they would have been."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from torch_lab.loaders import Loaders
from torch_lab.samplers import Position

DATA = list(range(23))


class Dice(Sampler[int]):
    """Draws from a global generator, in its own time."""

    def __iter__(self) -> Iterator[int]:
        return (random.randrange(23) for _ in range(14))

    def __len__(self) -> int:
        return 14


class Endless(Dice):
    """Says how long an epoch is, and never ends."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield random.randrange(23)


class Counting(Dice):
    """A state that nobody sees."""

    def __init__(self) -> None:
        self.first = 0

    def __iter__(self) -> Iterator[int]:
        self.first += 1
        return iter(range(self.first, self.first + 5))


class ByEpoch(Sampler[int]):
    """A function of the epoch."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(23, generator=generator).tolist())

    def __len__(self) -> int:
        return 23


class Pairs(Sampler[list[int]]):
    """Batches of a kind of its own."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(6):
            yield random.sample(DATA, random.choice([1, 2, 3]))

    def __len__(self) -> int:
        return 6


class PairsByEpoch(Pairs):
    """The same, told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Take note."""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffle": lambda: DataLoader(DATA, 4, shuffle=True),
    "drop_last": lambda: DataLoader(DATA, 4, shuffle=True, drop_last=True),
    "single": lambda: DataLoader(DATA, None, shuffle=True),
    "generator": lambda: DataLoader(DATA, 4, shuffle=True, generator=seeded()),
    "replacement": lambda: DataLoader(
        DATA, 4, sampler=RandomSampler(DATA, replacement=True, num_samples=70)
    ),
    "more samples": lambda: DataLoader(DATA, 4, sampler=RandomSampler(DATA, num_samples=50)),
    "subset": lambda: DataLoader(DATA, 2, sampler=SubsetRandomSampler(range(3, 14))),
    "weighted": lambda: DataLoader(DATA, 4, sampler=WeightedRandomSampler(range(1, 24), 15)),
    "batch sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, drop_last=False)
    ),
    "dice": lambda: DataLoader(DATA, 4, sampler=Dice()),
    "endless": lambda: DataLoader(DATA, 4, sampler=Endless()),
    "by epoch": lambda: DataLoader(DATA, 4, sampler=ByEpoch()),
    "pairs": lambda: DataLoader(DATA, batch_sampler=Pairs()),
    "pairs by epoch": lambda: DataLoader(DATA, batch_sampler=PairsByEpoch()),
}


def order(make: Callable[[], DataLoader[Any]], epoch: int, batch: int = 0) -> list[list[int]]:
    """Return the batches that a new process would see."""
    loader = Loaders(Position(1, epoch, batch)).prepare(make(), "train")
    return [
        given.tolist() if given.ndim else [given.item()] for given in map(torch.as_tensor, loader)
    ]


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_an_order_goes_on_from_any_batch(make: Callable[[], DataLoader[Any]]) -> None:
    """The rest of an epoch is the same after a resume; the length is that of all of it."""
    full = order(make, epoch=3)
    assert full != order(make, epoch=4)
    loader = Loaders(Position(1, 3, 2)).prepare(make(), "train")
    assert len(loader) == len(full)
    for batch in range(len(full) + 1):
        assert order(make, 3, batch) == full[batch:]


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_an_order_goes_on_with_the_next_epoch(make: Callable[[], DataLoader[Any]]) -> None:
    """A loader that lives through several epochs gives what a new one would."""
    position = Position(1, 3, 2)
    loader = Loaders(position).prepare(make(), "train")
    list(loader)
    position.epoch, position.batch = 4, 0
    assert [torch.as_tensor(given).flatten().tolist() for given in loader] == order(make, 4)


def test_a_shuffled_order_is_a_permutation_that_the_seed_decides() -> None:
    """Every sample once; another seed, another order; the ambient generator has no say."""
    make = LOADERS["shuffle"]
    torch.manual_seed(0)
    first = order(make, 0)
    torch.manual_seed(1)
    assert order(make, 0) == first
    assert sorted(sample for batch in first for sample in batch) == DATA
    other = Loaders(Position(2)).prepare(make(), "train")
    assert [batch.tolist() for batch in other] != first


def test_an_iteration_draws_nothing_from_the_generator_of_the_training() -> None:
    """Neither the order nor the seeds of the workers."""
    state = torch.get_rng_state()
    for name in ("shuffle", "dice", "weighted"):
        order(LOADERS[name], 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_samplers_that_may_have_a_state_are_reported() -> None:
    """By the loader's name and the sampler's."""
    reasons = {}
    for name, make in LOADERS.items():
        loaders = Loaders(Position(1))
        loaders.prepare({"a": make()}, "train")
        reasons[name] = loaders.reasons
    assert {name for name in reasons if reasons[name]} == {"dice", "endless", "pairs"}
    (reason,) = reasons["pairs"]
    assert reason.startswith("train_dataloaders['a']: its sampler, Pairs, may have a state")


def test_a_sampler_with_a_state_is_left_its_state() -> None:
    """It yields what it would have without a run."""
    position = Position(1)
    loader = Loaders(position).prepare(DataLoader(DATA, 5, sampler=Counting()), "train")
    firsts = []
    for position.epoch in range(3):
        firsts.append(int(next(iter(loader))[0]))
    assert firsts == [1, 2, 3]


def test_a_replaced_sampler_is_what_it_was() -> None:
    """For those who look at it."""
    loader = Loaders(Position(1)).prepare(DataLoader(DATA, 4), "train")
    assert isinstance(loader.batch_sampler, BatchSampler)
    assert loader.batch_sampler.batch_size == 4
    assert isinstance(loader.batch_sampler.sampler, SequentialSampler)
    assert [list(batch) for batch in loader.batch_sampler][-1] == [20, 21, 22]


def test_validation_takes_the_same_order_every_time() -> None:
    """Whatever the epoch and the batch of the training are."""
    position = Position(1)
    loader = Loaders(position).prepare(DataLoader(DATA, 4, shuffle=True), "validate")
    first = torch.cat(list(loader)).tolist()
    position.epoch, position.batch = 3, 2
    assert torch.cat(list(loader)).tolist() == first
    assert first != DATA


def test_overfitting_takes_the_data_in_its_order() -> None:
    """As Lightning would, which then leaves the loader alone."""
    loader = Loaders(Position(1, 0, 2), overfit=True).prepare(LOADERS["shuffle"](), "train")
    assert torch.cat(list(loader)).tolist() == DATA[8:]
    assert type(loader.sampler) is SequentialSampler


@pytest.fixture
def as_rank() -> Iterator[Callable[[int], None]]:
    """Let this process be one of three."""

    def become(rank: int) -> None:
        leave()
        store = FakeStore()  # type: ignore[no-untyped-call]
        torch.distributed.init_process_group("fake", rank=rank, world_size=3, store=store)

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    yield become
    leave()


@pytest.mark.parametrize("name", ["shuffle", "drop_last", "single", "dice", "pairs", "generator"])
def test_processes_share_the_samples_out(name: str, as_rank: Callable[[int], None]) -> None:
    """Equally many for each, every one for somebody; also from the middle of an epoch."""
    whole = order(LOADERS[name], 3)
    parts = []
    for rank in range(3):
        as_rank(rank)
        part = order(LOADERS[name], 3)
        assert order(LOADERS[name], 3, 1) == part[1:]
        assert len(Loaders(Position(1)).prepare(LOADERS[name](), "train")) == len(part)
        parts.append(part)
    assert len({len(part) for part in parts}) == 1
    seen = {sample for part in parts for batch in part for sample in batch}
    assert seen <= {sample for batch in whole for sample in batch} or name == "drop_last"
    if name != "drop_last":
        assert seen == {sample for batch in whole for sample in batch}


def test_shares_are_those_of_a_distributed_sampler(as_rank: Callable[[int], None]) -> None:
    """Padded from the start, every third."""
    for rank in range(3):
        as_rank(rank)
        expected = list(DistributedSampler(DATA, shuffle=False))  # type: ignore[arg-type]
        loaders = Loaders(Position(1))
        assert (
            torch.cat(list(loaders.prepare(DataLoader(DATA, 4), "validate"))).tolist() == expected
        )


def test_what_is_shared_out_already_or_must_not_be_is_left_alone(
    as_rank: Callable[[int], None],
) -> None:
    """The user's own DistributedSampler, and `shard=False`."""
    as_rank(1)
    own = DistributedSampler(DATA)  # type: ignore[arg-type]
    loader = Loaders(Position(1, 5)).prepare(DataLoader(DATA, 4, sampler=own), "train")
    own.set_epoch(5)
    assert torch.cat(list(loader)).tolist() == list(own)
    whole = Loaders(Position(1), shard=False).prepare(DataLoader(DATA, 4), "train")
    assert torch.cat(list(whole)).tolist() == DATA
