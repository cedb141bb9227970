"""Loaders fitted for a run: they give what they gave, and name the sample that fails."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Dataset, IterableDataset

from torch_lab.datasets import ArrayDataset, BaseDataset
from torch_lab.loaders import prepare_datamodule, prepare_loaders


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
    prepare_loaders(loader, debug=False)
    prepare_loaders(loader, debug=False)
    with pytest.raises(OSError, match="gone") as error:
        list(loader)
    name = type(dataset).__name__
    notes = [note for note in error.value.__notes__ if note.endswith(f"sample 6 of {name}")]
    assert len(notes) == 1


def test_a_batch_whose_samples_are_good_names_none() -> None:
    """What fails only together is not blamed on one."""
    loader = DataLoader(Moody(), batch_size=5)
    prepare_loaders(loader, debug=False)
    with pytest.raises(OSError, match="gone") as error:
        list(loader)
    assert not hasattr(error.value, "__notes__")


def test_the_dataset_is_what_it_was() -> None:
    """Length, attributes and items are those of the user's dataset, also after pickling."""
    loader = DataLoader(Numbers(), batch_size=5)
    prepare_loaders(loader, debug=False)
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


def test_loaders_are_found_in_containers_and_streams_left_alone() -> None:
    """Lists, dictionaries, CombinedLoader; iterable data and foreign iterables stay as they are."""
    loaders = [DataLoader(Numbers(), num_workers=2) for _ in range(4)]
    stream = DataLoader(Stream())
    given = [
        loaders[0],
        {"a": loaders[1], "b": (loaders[2], stream, range(3))},
        CombinedLoader([loaders[3]]),
        None,
    ]
    assert prepare_loaders(given, debug=True) is given
    for loader in loaders:
        assert isinstance(loader.dataset, Numbers) and type(loader.dataset) is not Numbers
        assert loader.num_workers == 0
    assert type(stream.dataset) is Stream
    assert [int(x) for x in stream] == [0, 1, 2, 3]


class Data(pl.LightningDataModule):
    """Makes its loaders when they are asked for."""

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Numbers(), num_workers=2)


def test_loaders_of_a_datamodule_are_prepared_when_it_makes_them() -> None:
    """It can still be pickled, and overrides what it overrode."""
    datamodule = Data()
    prepare_datamodule(datamodule, debug=True)
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
    prepare_loaders(loader, debug=True)
    assert [int(x) for x in loader] == [0, 1, 2, 3]
