"""The user's DataLoaders, fitted for a run: a sample that fails is named."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Dataset, IterableDataset

from torch_lab.components import each_loader

__all__ = ["prepare_datamodule", "prepare_loaders"]


def prepare_loaders(given: Any, *, debug: bool) -> Any:
    """Make the datasets in `given` name a sample that cannot be fetched, and return it.

    Args:
        given: A DataLoader, or several in lists, dictionaries or a CombinedLoader; changed in
            place. Iterable datasets are left as they are: their samples have no index.
        debug: Whether to load in this process, where a debugger reaches.
    """
    for loader in _data_loaders(given):
        if not isinstance(loader.dataset, (IterableDataset, _Named)):
            # DataLoader refuses to have its dataset set; a new one would lose a subclass's state.
            vars(loader)["dataset"] = _with_names(loader.dataset)
        if debug:
            # It refuses some of these too, and others alone do not go together.
            vars(loader).update(
                num_workers=0, timeout=0, prefetch_factor=None, persistent_workers=False
            )
    return given


def prepare_datamodule(datamodule: pl.LightningDataModule, *, debug: bool) -> None:
    """Do the same to whatever loaders `datamodule` will return."""
    for hook in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if is_overridden(hook, datamodule, pl.LightningDataModule):
            # Of the class, not bound: a bound method cannot be pickled from its own instance.
            function = getattr(type(datamodule), hook)
            setattr(datamodule, hook, functools.partial(_prepared, function, datamodule, debug))


def _prepared(function: Callable[[Any], Any], datamodule: Any, debug: bool) -> Any:
    return prepare_loaders(function(datamodule), debug=debug)


def _data_loaders(given: Any) -> Iterator[DataLoader[Any]]:
    for _, loader in each_loader("", given):
        if isinstance(loader, DataLoader):
            yield loader


def _with_names(dataset: Dataset[Any]) -> _Named:
    return (_NamedBatches if hasattr(dataset, "__getitems__") else _Named)(dataset)


class _Named(Dataset[Any]):
    """A dataset that adds the sample's index to an exception of `dataset`; else it is `dataset`."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.__dict__["dataset"] = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            self._add_note(error, f"sample {index}")
            raise

    def _add_note(self, error: Exception, samples: str) -> None:
        note = f"{samples} of {type(self.dataset).__name__}"
        # Datasets of our own have said it already.
        if not any(note in given for given in getattr(error, "__notes__", ())):
            error.add_note(f"in {note}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["dataset"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A worker_init_fn opens files for the dataset of `get_worker_info()`, which is this one.
        setattr(self.dataset, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.dataset)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dataset,)


class _NamedBatches(_Named):
    """The same for a dataset that fetches a whole batch at once."""

    def __getitems__(self, indices: list[Any]) -> Any:
        try:
            return self.dataset.__getitems__(indices)
        except Exception as error:
            failing = [index for index in indices if not self._can_fetch(index)]
            if failing:
                self._add_note(error, f"sample {failing[0]}")
            raise

    def _can_fetch(self, index: Any) -> bool:
        try:
            self.dataset[index]
        except Exception:
            return False
        return True
