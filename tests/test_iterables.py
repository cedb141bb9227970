"""Iterable datasets: those with a state go on from it, the others are named."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from torch_lab.errors import CheckpointError
from torch_lab.loaders import Loaders
from torch_lab.samplers import Position

Sample = tuple[int, float, float, torch.Tensor]


class Stream(IterableDataset[Sample]):
    """Numbers, dealt out to the workers; the first has twice as many as the others."""

    def __init__(self) -> None:
        self.next: int | None = None

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.next is None:
            self.next = worker
        while self.next < (23 if worker == 0 else 12):
            number, self.next = self.next, self.next + workers
            yield number, random.random(), np.random.rand(), torch.rand(())
        self.next = None

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Forgetful(IterableDataset[Sample]):
    """The same numbers, and no state."""

    def __iter__(self) -> Iterator[Sample]:
        for number in random.sample(range(9), 9):
            yield number, random.random(), np.random.rand(), torch.rand(())


def values(batch: list[Any]) -> list[Any]:
    return [torch.as_tensor(part).tolist() for part in batch]


LOADERS: dict[str, dict[str, Any]] = {
    "here": {"batch_size": 4},
    "single": {"batch_size": None},
    "two workers": {"batch_size": 3, "num_workers": 2},
    "staying workers": {"batch_size": 2, "num_workers": 2, "persistent_workers": True},
    "drop_last": {"batch_size": 4, "num_workers": 2, "drop_last": True},
}


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
def test_a_stream_with_a_state_goes_on(options: dict[str, Any]) -> None:
    """From any batch: the samples and what is drawn for them, also when some workers have ended."""
    position = Position(1, 2)
    loaders = Loaders(position)
    loader = loaders.prepare(DataLoader(Stream(), **options), "train")
    epoch_before = [values(batch) for batch in loader]
    position.epoch = 3
    full, states = [], [loaders.state_dict(0)]
    for batch in loader:
        full.append(values(batch))
        # Lightning asks when it has fetched one more.
        states.append(copy.deepcopy(loaders.state_dict(len(full) - 1)))
    states.append(loaders.state_dict(len(full)))
    assert [batch[0] for batch in full] == [batch[0] for batch in epoch_before]
    assert full != epoch_before
    batches = range(len(full) + 1)
    for done in batches if not options.get("num_workers") else [1, 2, len(full) - 1, len(full)]:
        resumed = Loaders(Position(1, 3, done))
        resumed.load_state_dict(states[done + 1])
        loader = resumed.prepare(DataLoader(Stream(), **options), "train")
        assert [values(batch) for batch in loader] == full[done:]
    assert loaders.reasons == []


def test_a_resumed_stream_can_be_saved_again() -> None:
    """A chain of interruptions, each some batches on, is as good as none."""
    options = LOADERS["two workers"]
    full = [
        values(batch)
        for batch in Loaders(Position(1)).prepare(DataLoader(Stream(), **options), "train")
    ]
    state: dict[str, Any] = {}
    seen: list[Any] = []
    for _ in range(3):
        loaders = Loaders(Position(1, 0, len(seen)))
        loaders.load_state_dict(state)
        iterator = iter(loaders.prepare(DataLoader(Stream(), **options), "train"))
        seen += [values(next(iterator)) for _ in range(2)]
        state = loaders.state_dict(len(seen))
    assert seen == full[: len(seen)]


def test_a_stream_with_a_state_needs_as_many_workers_as_before() -> None:
    """Another number would deal the samples out in another way."""
    loaders = Loaders(Position(1))
    next(iter(loaders.prepare(DataLoader(Stream(), 4), "train")))
    resumed = Loaders(Position(1, 0, 1))
    resumed.load_state_dict(loaders.state_dict(1))
    with pytest.raises(CheckpointError, match="had 1 processes that make batches"):
        iter(resumed.prepare(DataLoader(Stream(), 4, num_workers=2), "train"))


def test_a_stream_without_a_state_is_named_and_the_same_every_time() -> None:
    """Until it is interrupted, that is; the epochs differ."""
    runs = []
    for _ in range(2):
        position = Position(1)
        loaders = Loaders(position)
        loader = loaders.prepare(DataLoader(Forgetful(), 4), "train")
        runs.append([])
        for position.epoch in range(2):
            runs[-1].append([values(batch) for batch in loader])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]
    assert loaders.state_dict(1) == {}
    (reason,) = loaders.reasons
    assert reason.startswith(
        "train_dataloaders: Forgetful is an IterableDataset without state_dict"
    )


def test_a_stream_of_validation_is_the_same_every_time() -> None:
    """It has no state to keep, and is seeded too."""
    loaders = Loaders(Position(1))
    loader = loaders.prepare(DataLoader(Forgetful(), 4, num_workers=1), "validate")
    assert [values(batch) for batch in loader] == [values(batch) for batch in loader]
    assert loaders.reasons == []
    assert type(loader.dataset.dataset) is Forgetful
