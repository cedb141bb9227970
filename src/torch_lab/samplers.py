"""The order of the samples, as a function of the seed and of where training stands.

A sampler of torch draws its order from a generator, and an interruption loses where it was. Here an
order is made anew for each pass over the data, from the seed, the epoch and the number of the pass;
what is trained already is skipped. Each batch of indices carries a stamp that says which one it is,
so whoever makes the samples, in whichever process, can seed itself by it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from torch_lab.seeds import Stream, derived, generators_from
from torch_lab.utils import length_of

__all__ = ["Order", "Pass", "Position", "Stamp", "StampedBatch", "StampedIndex", "why_not_exact"]

_DRAWING: Final = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_STATELESS: Final = (SequentialSampler, list, tuple, range, np.ndarray, Tensor)


@dataclass
class Position:
    """Where training stands, for the loaders of the training data."""

    seed: int
    epoch: int = 0
    batch: int = 0
    """How many batches of this epoch are trained already."""


class Stamp(NamedTuple):
    """Which batch it is."""

    epoch: int
    number: int
    """Of the pass over the data in this epoch; a short loader beside a long one makes several."""
    batch: int
    rank: int = 0


class StampedBatch(list[Any]):
    """A batch of indices, and which one it is."""

    def __init__(self, given: Iterable[Any], stamp: Stamp) -> None:
        super().__init__(given)
        self.given = given
        """What the batch sampler yielded; not always a list."""
        self.stamp = stamp

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.given, self.stamp)


class StampedIndex(NamedTuple):
    """What a sampler without batches yields, and which one it is."""

    index: Any
    stamp: Stamp


class Pass(NamedTuple):
    """One pass over the data of a loader."""

    epoch: int
    number: int
    skipped: int = 0
    """How many batches of it are left out at its start."""


class Order:
    """Takes the place of a loader's sampler or batch sampler; else it is that.

    Args:
        given: The sampler or batch sampler of the user.
        position: Where training stands; None for data that is gone through in the same way every
            time.
        bits: What the order is drawn from, besides epoch and pass.
        generator: The loader's own, which seeds its workers.
        cycles: Whether the loader is gone through again within an epoch, as often as needed.
        yields_batches: Whether `given` yields batches.
        shard: Whether each process of a distributed run gets a part.
        stamps: Whether the batches carry a stamp.
        keeps_workers: Whether the loader's workers outlive a pass.
        ahead: How many batches the workers may be ahead by.
    """

    def __init__(
        self,
        given: Any,
        position: Position | None,
        bits: int,
        *,
        generator: torch.Generator,
        cycles: bool = False,
        yields_batches: bool = True,
        shard: bool = True,
        stamps: bool = True,
        keeps_workers: bool = False,
        ahead: int = 0,
    ) -> None:
        # A plain batch sampler is taken apart: what is skipped, and shared out, is indices.
        is_plain = yields_batches and type(given) is BatchSampler
        self.given = given
        self.source = given.sampler if is_plain else given
        self.batch_size = given.batch_size if is_plain else None
        self.position = position
        self.bits = bits
        self.generator = generator
        self.cycles = cycles
        self.stamp_with = StampedBatch if yields_batches else StampedIndex
        self.stamps = stamps
        self.shard = shard and not isinstance(_innermost(given), DistributedSampler)
        self.keeps_workers = keeps_workers
        self.current = Pass(0, 0)
        self.latest: Pass | None = None
        """The pass of the last batch that arrived; workers begin one that may never be used."""
        self.arrived = 0
        """How many batches of the current pass have."""
        self.handed_out: deque[tuple[int, Any]] = deque(maxlen=ahead + 1)
        """The last batches of indices, with the number that each has in its pass."""

    def __iter__(self) -> Iterator[Any]:
        current = self.next_pass()
        # Workers that stay are seeded once, when the loader is first used, be it after a resume.
        parts = () if self.keeps_workers else (current.epoch, current.number)
        # The loader draws the seed of its workers from it, right after this.
        self.generator.manual_seed(derived(self.bits, Stream.WORKERS, *parts))
        return self._stamped(current)

    @property
    def has_partial_batch(self) -> bool:
        """Whether the last batch is smaller than the others."""
        if self.batch_size is None or self.given.drop_last:
            return False
        return bool((length_of(self.source) or 0) % self.batch_size)

    def next_pass(self) -> Pass:
        """Return the pass that begins now."""
        if self.position is None:
            return Pass(0, 0)
        epoch, batch = self.position.epoch, self.position.batch
        if self.latest is not None and self.latest.epoch == epoch:
            return Pass(epoch, self.latest.number + 1)
        length = length_of(self)
        if self.cycles and length:
            return Pass(epoch, *divmod(batch, length))
        return Pass(epoch, 0, batch if length is None else min(batch, length))

    @property
    def latest_indices(self) -> Any:
        """The indices of the batch that arrived last; None before there was one."""
        latest = self.current.skipped + self.arrived - 1
        return next((given for number, given in self.handed_out if number == latest), None)

    def received(self, data: Any) -> Any:
        """Return the batch in what a worker has made of the next batch of indices."""
        self.latest = self.current
        self.arrived += 1
        return data

    def _stamped(self, current: Pass) -> Iterator[Any]:
        # A generator, so begun with the first batch: loaders with workers ask for two iterators,
        # and use the second.
        self.current = current
        self.arrived = 0
        self.handed_out.clear()
        rank, _ = self._rank_and_size()
        for number, given in enumerate(self._batches(current), current.skipped):
            self.handed_out.append((number, given))
            if not self.stamps:
                yield given
                continue
            yield self.stamp_with(given, Stamp(current.epoch, current.number, number, rank))

    def _batches(self, current: Pass) -> Iterator[Any]:
        """Yield what the sampler would have, from the first that is not skipped."""
        items = self._sharded(self._items(current))
        if self.batch_size is None:
            return _from(items, current.skipped)
        rest = _from(items, current.skipped * self.batch_size)
        return iter(BatchSampler(rest, self.batch_size, self.given.drop_last))

    def _items(self, current: Pass) -> Iterable[Any]:
        bits = derived(self.bits, Stream.ORDER, current.epoch, current.number)
        source = _reseeded(self.source, bits)
        if isinstance(source, range):
            return source
        self._tell_epoch(current.epoch)
        length = length_of(source)
        if length is None:
            return source  # type: ignore[no-any-return]
        if source is not self.source:
            return list(source)
        # All of it at once, so that one that draws from the global generators meets no other draws.
        with generators_from(bits):
            # There are some whose length is that of an epoch, and that never end.
            return list(itertools.islice(iter(source), length))

    def _tell_epoch(self, epoch: int) -> None:
        # The epoch is for those of training data; Lightning tells it to others.
        if self.position is None:
            return
        for sampler in (self.given, self.source, getattr(self.source, "sampler", None)):
            if set_epoch := getattr(sampler, "set_epoch", None):
                set_epoch(epoch)

    def _sharded(self, items: Iterable[Any]) -> Iterable[Any]:
        """Return the part of this process, as DistributedSampler does: padded, then every n-th."""
        rank, size = self._rank_and_size()
        if size == 1:
            return items
        if not isinstance(items, Sequence):
            return itertools.islice(items, rank, None, size)
        total = math.ceil(len(items) / size) * size
        return [items[i % len(items)] for i in range(rank, total, size)]

    def _rank_and_size(self) -> tuple[int, int]:
        """Return which of how many parts is ours."""
        distributed = torch.distributed
        if self.shard and distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        _, size = self._rank_and_size()
        length = math.ceil(len(self.source) / size)
        if self.batch_size is None:
            return length
        return len(BatchSampler(range(length), self.batch_size, self.given.drop_last))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["given"], name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.given)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), vars(self))


def why_not_exact(sampler: Any) -> str | None:
    """Return why the order of `sampler` may not be the same after a resume; None if it is."""
    inner = _innermost(sampler)
    if type(inner) in (*_DRAWING, *_STATELESS) or hasattr(inner, "set_epoch"):
        return None
    name = type(inner).__name__
    return (
        f"its sampler, {name}, may have a state that is lost; one that is a function of the seed"
        " and the epoch has a method set_epoch(epoch)"
    )


def _innermost(sampler: Any) -> Any:
    """Return what plain batch samplers are around."""
    return _innermost(sampler.sampler) if type(sampler) is BatchSampler else sampler


def _reseeded(sampler: Any, bits: int) -> Any:
    """Return what yields the indices of `sampler`, with a generator that was seeded with `bits`."""
    if type(sampler) is SequentialSampler:
        return range(len(sampler))
    if type(sampler) is BatchSampler:
        inner = _reseeded(sampler.sampler, bits)
        return BatchSampler(inner, sampler.batch_size, sampler.drop_last)
    if type(sampler) in _DRAWING:
        own = copy.copy(sampler)
        own.generator = torch.Generator().manual_seed(bits)
        return own
    return sampler


def _from(items: Iterable[Any], start: int) -> Iterator[Any]:
    if isinstance(items, Sequence):
        return iter(items[start:])
    return itertools.islice(items, start, None)


def _unpickled(kind: type[Order], state: dict[str, Any]) -> Order:
    order = object.__new__(kind)
    order.__dict__.update(state)
    return order
