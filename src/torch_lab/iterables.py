"""Iterable datasets: their random numbers seeded, and their state kept beside each batch.

Where such a dataset stands, nobody but itself knows, and with workers it is in other processes,
some batches ahead. So every batch comes with the state that its dataset had right after it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from torch_lab.errors import CheckpointError
from torch_lab.samplers import Order, Pass, Position
from torch_lab.seeds import derived, seed_cpu_generators

__all__ = ["Envelope", "Enveloping", "Feed", "Report", "SeededIterable", "SourceOrder", "has_state"]

_KEPT_BATCHES: Final = 8
"""Lightning fetches one batch more than it has trained, where a loader has no length."""
_FILLER: Final = object()


def has_state(dataset: object) -> bool:
    """Return whether a dataset can say where it stands, and go on from there."""
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


class Report(NamedTuple):
    """Where a worker's dataset stood after a batch."""

    worker: int
    samples: int
    """How many it had given in this pass."""
    ended: bool
    state: Any


class Envelope(NamedTuple):
    """A batch with its report; without a batch, it only takes a worker's turn."""

    batch: Any
    report: Report | None


class Feed(NamedTuple):
    """What the workers begin a pass with."""

    epoch: int = 0
    number: int = 0
    reports: Mapping[int, Report] = {}
    """By worker, of those that have given a batch of this pass."""
    turns: int = 0
    """How many workers have had their turn in the round that was interrupted."""


class SeededIterable(IterableDataset[Any]):
    """An iterable dataset whose draws are seeded, sample by sample; else it is `dataset`.

    Args:
        dataset: The dataset of the user.
        bits: What the seeds are derived from, besides the pass, the worker and the sample.
        batch_size: How many samples make a batch.
        keeps_workers: Whether workers outlive a pass; then they read its number from shared memory.
    """

    def __init__(
        self, dataset: IterableDataset[Any], bits: int, batch_size: int, keeps_workers: bool
    ) -> None:
        # Not by assignment, which sets attributes of the dataset.
        vars(self).update(dataset=dataset, bits=bits, batch_size=batch_size, feed=Feed())
        clock = torch.zeros(3, dtype=torch.int64)
        if keeps_workers:
            clock.share_memory_()  # type: ignore[no-untyped-call]
        vars(self).update(clock=clock, samples=0, ended=False)

    def begin(self, feed: Feed, rank: int) -> None:
        """Let the next iteration, in whichever process, be the pass of `feed`."""
        vars(self).update(feed=feed)
        self.clock[:] = torch.tensor([feed.epoch, feed.number, rank])

    def __iter__(self) -> Iterator[Any]:
        # Read at once: shared memory may be written again before the first sample.
        epoch, number, rank = self.clock.tolist()
        feed = self.feed if (epoch, number) == self.feed[:2] else Feed()
        worker = _worker()
        return self._samples(derived(self.bits, epoch, number, rank, worker), feed, worker)

    def _samples(self, bits: int, feed: Feed, worker: int) -> Iterator[Any]:
        report = feed.reports.get(worker)
        if worker < feed.turns:
            for _ in range(self.batch_size):
                yield _FILLER
        vars(self).update(samples=report.samples if report else 0, ended=False)
        if report:
            self.dataset.load_state_dict(copy.deepcopy(report.state))
        if report and report.ended:
            return
        # With the same numbers after a resume: an order may be drawn from them.
        seed_cpu_generators(derived(bits, -1))
        iterator = iter(self.dataset)
        for sample in _seeded(iterator, bits, self.samples):
            vars(self)["samples"] += 1
            yield sample
        vars(self)["ended"] = True

    def report(self) -> Report:
        """Return where this process's copy stands."""
        # A copy: it is pickled later, by a thread, when the next batch is made already.
        state = copy.deepcopy(self.dataset.state_dict())
        return Report(_worker(), self.samples, self.ended, state)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["dataset"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.dataset)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (vars(self),)


def _seeded(iterator: Iterator[Any], bits: int, number: int) -> Iterator[Any]:
    """Yield what `iterator` does, having seeded the generators for each."""
    while True:
        seed_cpu_generators(derived(bits, number))
        try:
            sample = next(iterator)
        except StopIteration:
            return
        yield sample
        number += 1


def _worker() -> int:
    return info.id if (info := get_worker_info()) else 0


def _unpickled(state: dict[str, Any]) -> SeededIterable:
    source = object.__new__(SeededIterable)
    source.__dict__.update(state)
    return source


class Enveloping:
    """A collate function that adds to each batch where the dataset stands after it."""

    def __init__(self, collate: Callable[[Any], Any], source: SeededIterable) -> None:
        self.collate = collate
        self.source = source

    def __call__(self, samples: Any) -> Envelope:
        first = samples[0] if isinstance(samples, list) else samples
        if first is _FILLER:
            return Envelope(None, None)
        return Envelope(self.collate(samples), self.source.report())


class SourceOrder(Order):
    """The order of a loader with a `SeededIterable`: tells it which pass begins, and from where.

    Args:
        feeds: The `SeededIterable`, the dataset of the loader.
        name: Of the loader.
        workers: How many processes make batches; 1 if it is this one.
        restored: The states of all loaders from a checkpoint, by name; may be filled later.
    """

    def __init__(
        self,
        given: Any,
        position: Position | None,
        bits: int,
        *,
        feeds: SeededIterable,
        name: str,
        workers: int,
        restored: Mapping[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(given, position, bits, **options)
        self.feeds = feeds
        self.name = name
        self.workers = workers
        self.restored = restored
        self.given_batches = 0
        """How many the loader has given in this epoch, in all passes."""
        self.recent: deque[tuple[int, Feed]] = deque(maxlen=_KEPT_BATCHES)

    def __iter__(self) -> Iterator[Any]:
        rank, _ = self._rank_and_size()
        self.feeds.begin(self._next_feed(), rank)
        return super().__iter__()

    def next_pass(self) -> Pass:
        """Return the pass that begins now; what of it is trained, the workers leave out."""
        feed = self._next_feed()
        return Pass(feed.epoch, feed.number)

    def _next_feed(self) -> Feed:
        if self.position is None:
            return Feed()
        epoch = self.position.epoch
        if self.latest is not None and self.latest.epoch == epoch:
            return Feed(epoch, self.latest.number + 1)
        state = self.restored.get(self.name)
        return self._feed_from(state) if state and state["epoch"] == epoch else Feed(epoch)

    def _feed_from(self, state: Mapping[str, Any]) -> Feed:
        if state["workers"] != self.workers:
            raise CheckpointError(
                f"{self.name} had {state['workers']} processes that make batches when the"
                f" checkpoint was written, and has {self.workers} now: its iterable dataset cannot"
                " go on",
                "set num_workers to what it was",
            )
        reports = {int(worker): Report(*report) for worker, report in state["reports"].items()}
        return Feed(state["epoch"], state["number"], reports, state["turns"])

    def _stamped(self, current: Pass) -> Iterator[Any]:
        feed = self.feeds.feed
        if self.latest is None and self.position is not None:
            self.given_batches = self.position.batch
        elif self.latest is not None and self.latest.epoch != current.epoch:
            self.given_batches = 0
        self.recent.append((self.given_batches, feed))
        yield from super()._stamped(current)

    def received(self, data: Any) -> Any:
        """Return the batch in `data`, and keep the report that came with it."""
        super().received(data)
        if not isinstance(data, Envelope):
            return data
        report = data.report
        assert report is not None
        _, feed = self.recent[-1]
        reports = {**feed.reports, report.worker: report}
        turns = (report.worker + 1) % self.workers
        self.given_batches += 1
        self.recent.append((self.given_batches, feed._replace(reports=reports, turns=turns)))
        return data.batch

    def state(self, batches: int) -> dict[str, Any] | None:
        """Return where the dataset stood when `batches` had been trained in this epoch.

        In plain values, as far as the dataset's own state is; None if that is at its start.
        """
        known = [feed for given, feed in self.recent if given <= batches]
        feed = known[-1] if known else Feed()
        if not feed.reports and not feed.number:
            return None
        reports = {worker: tuple(report) for worker, report in feed.reports.items()}
        return {
            "epoch": feed.epoch,
            "number": feed.number,
            "turns": feed.turns,
            "workers": self.workers,
            "reports": reports,
        }
