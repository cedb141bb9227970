"""Loaders fitted for a run: they go on where it ended, and name the sample that fails."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from torch_lab.datasets import ArrayDataset, BaseDataset
from torch_lab.errors import LoaderError
from torch_lab.loaders import Loaders
from torch_lab.samplers import Position
from torch_lab.workers import UNALIKE, explained


def prepared(loader: Any, epoch: int = 0, batch: int = 0, **options: Any) -> Any:
    """Return `loader` as a new process would have it that goes on from there."""
    return Loaders(Position(1, epoch, batch), **options).prepare(loader, "train")


class Numbers(Dataset[int]):
    """Ten numbers, of which the seventh cannot be had."""

    name = "numbers"

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index == 6:
            raise OSError("gone")
        return index


class Rows(BaseDataset):
    """The same, made of our own."""

    def __len__(self) -> int:
        return 10

    def get_raw_data(self, i: int) -> int:
        return Numbers()[i]


class Batches(Numbers):
    """The same, a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


def picky(x: torch.Tensor) -> torch.Tensor:
    """Refuse some data."""
    if (x == 6).any():
        raise OSError("gone")
    return x


class Moody(Batches):
    """Fails for batches alone."""

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        raise OSError("gone")


DATASETS: list[Dataset[Any]] = [
    Numbers(),
    Rows(),
    Batches(),
    ArrayDataset(torch.arange(10), transform=picky),
]


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: type(dataset).__name__)
def test_a_failing_sample_is_named_once(dataset: Dataset[Any]) -> None:
    """The exception keeps its type, and says which sample of which dataset it was."""
    loader = DataLoader(dataset, batch_size=5)
    prepared(loader)
    prepared(loader)
    with pytest.raises(OSError, match="gone") as error:
        list(loader)
    name = type(dataset).__name__
    notes = [note for note in error.value.__notes__ if note.endswith(f"sample 6 of {name}")]
    assert len(notes) == 1


def test_a_batch_whose_samples_are_good_names_none() -> None:
    """What fails only together is not blamed on one."""
    loader = DataLoader(Moody(), batch_size=5)
    prepared(loader)
    with pytest.raises(OSError, match="gone") as error:
        list(loader)
    assert not hasattr(error.value, "__notes__")


def test_the_dataset_is_what_it_was() -> None:
    """Length, attributes and items are those of the user's dataset, also after pickling."""
    loader = DataLoader(Numbers(), batch_size=5)
    prepared(loader)
    for dataset in (loader.dataset, pickle.loads(pickle.dumps(loader.dataset))):
        assert len(dataset) == 10
        assert dataset.name == "numbers"
        assert dataset[3] == 3
        assert isinstance(dataset, Numbers)
        dataset.name = "renamed"
        assert dataset.dataset.name == "renamed"
        with pytest.raises(AttributeError):
            dataset.other  # noqa: B018


class Stream(IterableDataset[int]):
    """Data without indices."""

    def __iter__(self) -> Any:
        return iter(range(4))


def test_loaders_are_found_in_containers() -> None:
    """Lists, dictionaries and CombinedLoader; each is the object that it was."""
    loaders = [DataLoader(Numbers(), num_workers=2) for _ in range(4)]
    given = [
        loaders[0],
        {"a": loaders[1], "b": (loaders[2], DataLoader(Stream()))},
        CombinedLoader([loaders[3]]),
        None,
    ]
    assert prepared(given, debug=True) is given
    for loader in loaders:
        assert isinstance(loader.dataset, Numbers) and type(loader.dataset) is not Numbers
        assert loader.num_workers == 0
    assert [int(x) for x in given[1]["b"][1]] == [0, 1, 2, 3]


class Data(pl.LightningDataModule):
    """Makes its loaders when they are asked for."""

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Numbers(), num_workers=2)


def test_loaders_of_a_datamodule_are_prepared_when_it_makes_them() -> None:
    """It can still be pickled, and overrides what it overrode."""
    datamodule = Data()
    loaders = Loaders(Position(1), debug=True)
    loaders.prepare_datamodule(datamodule)
    for each in (datamodule, pickle.loads(pickle.dumps(datamodule))):
        loader = each.train_dataloader()
        assert loader.num_workers == 0
        assert type(loader.dataset) is not Numbers
    assert is_overridden("train_dataloader", datamodule, pl.LightningDataModule)
    assert not is_overridden("val_dataloader", datamodule, pl.LightningDataModule)


def test_loaders_without_workers_still_work() -> None:
    """Whatever they were given for their workers."""
    loader = DataLoader(
        range(4),  # type: ignore[arg-type]
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=4,
        timeout=5,
    )
    prepared(loader, debug=True)
    assert [int(x) for x in loader] == [0, 1, 2, 3]


# Going on from the middle.


class Noise(Dataset[Any]):
    """Draws from all three generators for each sample."""

    def __init__(self, length: int = 23) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return index, random.random(), np.random.rand(), torch.rand(2)


class NoiseInBatches(Noise):
    """The same, a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, ...]]:
        return [self[index] for index in indices]


def mixed(samples: list[Any]) -> Any:
    """Draw while samples are put together."""
    return torch.tensor([sample[0] for sample in samples]), torch.rand(2), random.random()


def noisy(x: Any) -> Any:
    return x + np.random.rand(*x.shape)


def arrays() -> ArrayDataset:
    return ArrayDataset(np.zeros((23, 2)), augmentation=noisy)


NOISE: dict[str, Callable[[], Any]] = {
    "samples": lambda: DataLoader(Noise(), 4, shuffle=True),
    "single": lambda: DataLoader(Noise(), None, shuffle=True),
    "batches": lambda: DataLoader(NoiseInBatches(), 4, shuffle=True),
    "arrays": lambda: DataLoader(arrays(), 4, shuffle=True),
    "subset": lambda: DataLoader(Subset(Noise(), range(3, 20)), 4, shuffle=True),
    "collate": lambda: DataLoader(TensorDataset(torch.arange(9)), 4, collate_fn=mixed),
}
WORKERS: dict[str, Callable[[], Any]] = {
    "samples": lambda: DataLoader(Noise(), 4, shuffle=True, num_workers=2),
    "staying": lambda: DataLoader(
        Noise(), 4, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True
    ),
    "collate": lambda: DataLoader(
        TensorDataset(torch.arange(9)), 4, collate_fn=mixed, num_workers=1
    ),
}


def values(batch: Any) -> Any:
    return tree_map(lambda x: x.tolist() if hasattr(x, "tolist") else x, batch)


def rest(make: Callable[[], Any], epoch: int, batch: int) -> list[Any]:
    return [values(given) for given in prepared(make(), epoch, batch)]


@pytest.mark.parametrize("make", NOISE.values(), ids=NOISE)
def test_samples_are_the_same_after_a_resume(make: Callable[[], Any]) -> None:
    """From any batch on: which they are, and what was drawn for them."""
    full = rest(make, 2, 0)
    assert full[0] != rest(make, 3, 0)[0]
    assert values(full[0]) != values(full[1])
    for batch in range(len(full) + 1):
        random.seed(batch)
        torch.manual_seed(batch)
        assert rest(make, 2, batch) == full[batch:]


def test_the_generators_are_seeded_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """To seed them for every sample takes longer than to make many a sample."""
    seeded, seed = [], random.seed
    loader = iter(prepared(DataLoader(Noise(64), 16)))
    monkeypatch.setattr(random, "seed", lambda value: (seeded.append(value), seed(value)))
    assert len(list(loader)) == 4
    assert len(set(seeded)) == len(seeded) == 4


@pytest.mark.parametrize("name", WORKERS)
def test_samples_do_not_depend_on_the_workers(name: str) -> None:
    """Nor on whether they stay; after a resume, too, and in the next epoch."""
    if name == "staying":
        here: Any = lambda: DataLoader(Noise(), 4, shuffle=True, drop_last=True)  # noqa: E731
    else:
        here = NOISE[name]
    position = Position(1, 2, 1)
    loader = Loaders(position).prepare(WORKERS[name](), "train")
    assert [values(batch) for batch in loader] == rest(here, 2, 1)
    position.epoch, position.batch = 3, 0
    assert [values(batch) for batch in loader] == rest(here, 3, 0)


def test_samples_of_a_batch_draw_different_numbers() -> None:
    """And so do those of another loader, and of another process."""
    given = prepared([DataLoader(Noise(64), 64), DataLoader(Noise(64), 64)])
    for place in (1, 2):
        drawn = [next(iter(loader))[place].tolist() for loader in given]
        assert len(set(drawn[0] + drawn[1])) == 128


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_several_loaders_go_on_together(mode: Any) -> None:
    """A short one that is gone through again has another order each time, and its place in it."""

    def make(batch: int) -> CombinedLoader:
        loaders = {
            "short": DataLoader(Noise(7), 3, shuffle=True),
            "long": DataLoader(Noise(23), 3, shuffle=True),
        }
        combined: CombinedLoader = prepared(CombinedLoader(loaders, mode), 1, batch)
        return combined

    full = [values(batch) for batch, _, _ in make(0)]
    for done in range(len(full)):
        combined = iter(make(done))
        going_on = [values(next(combined)[0]) for _ in range(len(full) - done)]
        assert going_on == full[done:]
    if mode == "max_size_cycle":
        assert full[0]["short"] != full[3]["short"]


def test_an_iterator_that_is_not_used_changes_nothing() -> None:
    """Lightning makes one more at the start of a resumed epoch, and workers begin at once."""
    make = WORKERS["samples"]
    loader = prepared(make(), 1, 2)
    iter(loader)
    assert [values(batch) for batch in loader] == rest(make, 1, 2)


def test_batches_in_a_sequence_go_on() -> None:
    """What is no DataLoader, but can be counted; what cannot is named."""
    batches = range(5)
    assert list(prepared({"a": batches}, 0, 3)["a"]) == [3, 4]
    loaders = Loaders(Position(1, 0, 3))
    generator = (x for x in range(5))
    assert loaders.prepare(generator, "train") is generator
    assert "a generator cannot begin in the middle" in loaders.reasons[0]
    assert loaders.prepare(batches, "validate") is batches


def test_validation_draws_the_same_every_time() -> None:
    """Whatever training has drawn in between."""
    loader = Loaders(Position(1, 2, 3)).prepare(DataLoader(Noise(), 4), "validate")
    assert [values(batch) for batch in loader] == [values(batch) for batch in loader]


def test_predictions_draw_the_same_every_time() -> None:
    """Their samplers are left to Lightning."""
    loader = DataLoader(Noise(), 4)
    batch_sampler = loader.batch_sampler
    Loaders(Position(1)).prepare(loader, "predict")
    assert loader.batch_sampler is batch_sampler
    assert [values(batch) for batch in loader] == [values(batch) for batch in loader]


def test_a_loader_for_two_purposes_is_two_loaders() -> None:
    """Training goes on where it was, validation begins at its start."""
    loader = DataLoader(Noise(), 4, shuffle=True)
    loaders = Loaders(Position(1, 0, 2))
    train, again = loaders.prepare([loader, loader], "train")
    validate = loaders.prepare(loader, "validate")
    assert train is loader
    assert len({id(train), id(again), id(validate)}) == 3
    assert [len(list(each)) for each in (train, again, validate)] == [4, 4, 6]
    assert type(validate.dataset.dataset) is Noise


def test_plain_data_does_not_touch_the_generators() -> None:
    """Datasets that draw nothing pay nothing."""
    states = random.getstate(), torch.get_rng_state()
    plain = [TensorDataset(torch.arange(9)), Subset(ArrayDataset(np.arange(9)), range(3)), range(4)]
    for dataset in plain:
        list(prepared(DataLoader(dataset, 4, shuffle=True)))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_facts_are_those_of_the_training_data() -> None:
    """By loader; None where nobody knows."""
    loaders = Loaders(Position(1))
    given = {"a": DataLoader(Noise(), 4), "b": DataLoader(Stream())}
    loaders.prepare(given, "train")
    loaders.prepare(DataLoader(Noise(3)), "validate")
    assert loaders.facts() == {
        "train_dataloaders['a']": {"samples": 23, "batch_size": 4},
        "train_dataloaders['b']": {"samples": None, "batch_size": 1},
    }


def test_loaders_can_be_sent_to_another_process() -> None:
    """They keep the position that they share with the run."""
    loader = DataLoader(Noise(), 4, shuffle=True)
    loaders = Loaders(Position(1))
    loaders.prepare(loader, "train")
    loader, loaders = pickle.loads(pickle.dumps((loader, loaders)))
    loaders.position.batch = 2
    assert loaders.prepare(loader, "train") is loader
    assert [values(batch) for batch in loader] == rest(NOISE["samples"], 0, 2)


class Ragged(Dataset[Any]):
    """Samples of which one is larger."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return {"x": (torch.zeros(3, 9 if index == 4 else 8), 1.0)}


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_do_not_go_together_are_named(workers: int) -> None:
    """Which, where in them, and their shapes; from a worker, too."""
    loader = prepared(DataLoader(Ragged(), 6, num_workers=workers))
    with pytest.raises(LoaderError) as caught:
        list(loader)
    told = explained(caught.value, []) or caught.value
    expected = "sample 4 has shape (3, 9) at ['x'][0], sample 0 has shape (3, 8) at ['x'][0]"
    assert told.message == f"samples make no batch: {expected}"
    assert told.hint == UNALIKE


@pytest.mark.parametrize("workers", [0, 1])
def test_what_an_own_collate_function_raises_stays_what_it_is(workers: int) -> None:
    """With a note on the samples."""
    loader = prepared(DataLoader(Ragged(), 6, collate_fn=stacked, num_workers=workers))
    with pytest.raises(ZeroDivisionError) as caught:
        list(loader)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "sample 4 has shape (3, 9)" in told


def stacked(samples: Any) -> Any:
    """Fail."""
    return 1 / 0


class OwnIterations(DataLoader[Any]):
    """Iterates in a way of its own."""

    def __iter__(self) -> Any:
        return super().__iter__()


def test_what_may_not_be_exact_is_named() -> None:
    """Loaders that have a way of their own."""
    loaders = Loaders(Position(1))
    given = [
        OwnIterations(range(4)),
        DataLoader(range(4), num_workers=2, in_order=False),
        DataLoader(range(4), num_workers=2, shuffle=True),
        DataLoader(Stream(), num_workers=1),
    ]
    loaders.prepare(given, "train")
    assert [reason.partition(":")[0] for reason in loaders.reasons] == [
        "train_dataloaders[0]",
        "train_dataloaders[1]",
        "train_dataloaders[3]",
    ]


class Kept(Stream):
    """An iterable dataset that can say where it stands."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(("mode", "reasons"), [("max_size_cycle", 1), ("min_size", 0)])
def test_an_iterable_beside_others_may_not_be_exact(mode: Any, reasons: int) -> None:
    """Where it is gone through again and again, which time it was is lost."""
    loaders = Loaders(Position(1))
    given = CombinedLoader([DataLoader(Kept()), DataLoader(range(4))], mode)
    loaders.prepare(given, "train")
    assert len(loaders.reasons) == reasons
    assert all("which pass over it" in reason for reason in loaders.reasons)
