"""The user's DataLoaders, fitted for a run: a sample that fails is named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

__all__ = ["name_failing_samples", "without_workers"]


def name_failing_samples(loaders: Any) -> None:
    """Make the datasets in `loaders` name the sample when one cannot be fetched.

    Args:
        loaders: A DataLoader, or lists and dictionaries of them; changed in place. Iterable
            datasets are left as they are: their samples have no index.
    """
    for loader in _each(loaders):
        dataset = loader.dataset
        if isinstance(dataset, (IterableDataset, _Named)):
            continue
        # DataLoader refuses to have its dataset set; a new loader would lose a subclass's state.
        vars(loader)["dataset"] = _with_names(dataset)


def without_workers(loaders: Any) -> None:
    """Make `loaders` fetch in this process, where a debugger reaches."""
    for loader in _each(loaders):
        # DataLoader refuses to have some of these set, and others alone do not go together.
        vars(loader).update(
            num_workers=0, timeout=0, prefetch_factor=None, persistent_workers=False
        )


def _each(loaders: Any) -> Iterator[DataLoader[Any]]:
    if isinstance(loaders, DataLoader):
        yield loaders
    elif isinstance(loaders, Mapping):
        for loader in loaders.values():
            yield from _each(loader)
    elif isinstance(loaders, (list, tuple)):
        for loader in loaders:
            yield from _each(loader)
    elif isinstance(inner := getattr(loaders, "iterables", None), Iterable):
        yield from _each(inner)  # Lightning's CombinedLoader.


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
