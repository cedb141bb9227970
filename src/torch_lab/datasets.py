"""Datasets whose items are `(x, md)`: data, and a dictionary of what is known about it.

`md["idx"]` is the position in the dataset, `md["y"]` the label if there is one. `BaseDataset` makes
samples one by one, from anything. `ArrayDataset` makes whole batches at once from data in arrays,
several times as fast.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from torch_lab.errors import listed
from torch_lab.transforms import BaseTransform, Metadata, as_transform

__all__ = ["ArrayDataset", "BaseDataset"]

Item: TypeAlias = tuple[Any, Metadata]
Indices: TypeAlias = npt.NDArray[np.int64]

_NAMED_SAMPLES: Final = 8


class BaseDataset(ABC, Dataset[Item]):
    """Samples made one by one; subclasses write `__len__` and `get_raw_data`.

    An exception while a sample is made gets a note that names the sample.

    Args:
        transform: What every sample goes through, a transform or a plain callable
            (`torch_lab.transforms.as_transform`).
        augmentation: What a sample goes through before the transform; for training data.
    """

    def __init__(
        self,
        transform: Callable[..., Any] | None = None,
        augmentation: Callable[..., Any] | None = None,
    ) -> None:
        self.transform = _optional_transform(transform)
        self.augmentation = _optional_transform(augmentation)

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def get_raw_data(self, i: int) -> Any:
        """Return the data of sample `i`, from 0 to the length less one."""

    def get_raw_label(self, i: int) -> Any:
        """Return the label of sample `i`; None, the default, when it has none."""
        return None

    def get_additional_metadata(self, i: int) -> Metadata:
        """Return what else goes into the metadata of sample `i`; `idx` and `y` are set after it."""
        return {}

    def __getitem__(self, i: int) -> Item:
        i = _position(i, len(self))
        try:
            return self._transformed(self.get_raw_data(i), self._metadata(i))
        except Exception as error:
            error.add_note(f"in sample {i} of {type(self).__name__}")
            raise

    def __iter__(self) -> Iterator[Item]:
        # Without it, iteration would take any IndexError of a subclass for the end of the data.
        return (self[i] for i in range(len(self)))

    def _metadata(self, i: int) -> Metadata:
        md = {**self.get_additional_metadata(i), "idx": i}
        y = self.get_raw_label(i)
        return md if y is None else {**md, "y": y}

    def _transformed(self, x: Any, md: Metadata) -> Item:
        if self.augmentation is not None:
            x, md = self.augmentation(x, md)
        if self.transform is not None:
            x, md = self.transform(x, md)
        return x, md


@final
class ArrayDataset(Dataset[Item]):
    """Data in arrays, fetched, augmented, transformed and collated a whole batch at a time.

    A plain `DataLoader(dataset, batch_size=64, shuffle=True)` is the fast path; leave out
    `collate_fn`. `dataset[i]` is a sample, `dataset[indices]` and `dataset[start:stop]` are the
    batch `(x, md)` that a loader would give.

    Transforms and augmentations see whole batches: `x` is `(batch, ...)`, and so is every value of
    `md`; arrays stay NumPy arrays, and tensors tensors, until the batch is collated. They get
    copies, and may work in place. A sample is made as a batch of one. For data in memory, a loader
    without worker processes is the fastest.

    Args:
        x: An array, a tensor or a memory map, `(samples, ...)`, or a dict or tuple of them. Memory
            maps stay on disk, but are copied into spawned (not forked) workers.
        y: Labels, `(samples, ...)`, in the same forms or as a list; None when there are none.
        metadata: More values for `md` by name, each `(samples, ...)`.
        transform: What every batch goes through, a transform or a plain callable
            (`torch_lab.transforms.as_transform`).
        augmentation: What a batch goes through before the transform; for training data.

    Raises:
        ValueError: The lengths differ, or the metadata holds `idx` or `y`.
        TypeError: Something is no array and cannot be made one.
    """

    def __init_subclass__(cls) -> None:
        raise TypeError(
            f"{cls.__name__} cannot be an ArrayDataset: loaders take whole batches of it, and "
            "would never ask it for a sample; give a transform, or subclass BaseDataset"
        )

    def __init__(
        self,
        x: Any,
        y: Any = None,
        metadata: Mapping[str, Any] | None = None,
        transform: Callable[..., Any] | None = None,
        augmentation: Callable[..., Any] | None = None,
    ) -> None:
        given = {"x": x, "metadata": dict(metadata or {})} | ({} if y is None else {"y": y})
        if reserved := {"idx", "y"} & given["metadata"].keys():
            raise ValueError(f"metadata must not hold {min(reserved)!r}: the dataset sets it")
        columns = {name: _columns(value, name) for name, value in given.items()}
        self._length = _common_length(columns)
        self._x = columns.pop("x")
        self._metadata = columns.pop("metadata") | columns
        self.transform = _optional_transform(transform)
        self.augmentation = _optional_transform(augmentation)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Indices | Tensor) -> Item:
        if isinstance(index, slice):
            return self._batch(np.arange(self._length)[index])
        if np.ndim(index) == 0:
            return self._sample(_position(index, self._length))
        return self._batch(self._positions(index))

    def __getitems__(self, indices: Sequence[int]) -> list[_Collated]:
        """Return the batch in a list of one, for `default_collate`: what a `DataLoader` calls."""
        # Registered here, not at import: it must also have happened in spawned workers.
        default_collate_fn_map.setdefault(_Collated, _Collated.unwrap)
        return [_Collated(*self._batch(self._positions(indices)))]

    def _sample(self, i: int) -> Item:
        x, md = self._made(np.array([i]))
        return _first(x), {name: _first(value) for name, value in md.items()}

    def _batch(self, indices: Indices) -> Item:
        x, md = self._made(indices)
        return _collated(x), {name: _collated(value) for name, value in md.items()}

    def _made(self, indices: Indices) -> Item:
        """Return the batch as its transforms leave it."""
        try:
            x = _taken(self._x, indices)
            md = {name: _taken(column, indices) for name, column in self._metadata.items()}
            md["idx"] = indices
            if self.augmentation is not None:
                x, md = self.augmentation(x, md)
            if self.transform is not None:
                x, md = self.transform(x, md)
            _check_batch(x, md, len(indices))
        except Exception as error:
            error.add_note(f"in {_named(indices)} of {type(self).__name__}")
            raise
        return x, md

    def _positions(self, indices: Any) -> Indices:
        positions = np.asarray(indices)
        if positions.dtype.kind not in "iu":
            raise TypeError(f"indices must be integers, these are {positions.dtype}")
        lowest, highest = positions.min(initial=0), positions.max(initial=-1)
        if lowest < -self._length or highest >= self._length:
            worst = lowest if lowest < -self._length else highest
            raise IndexError(f"no sample {worst}: there are {self._length}")
        # A copy: transforms may change what they get, the caller's indices are the caller's.
        return np.where(positions < 0, positions + self._length, positions).astype(np.int64)


class _Collated:
    """A batch that needs no collating."""

    def __init__(self, x: Any, md: Metadata) -> None:
        self.item: Final = [x, md]

    def __iter__(self) -> NoReturn:
        raise TypeError("ArrayDataset collates its batches itself: leave out collate_fn")

    @staticmethod
    def unwrap(batches: list[_Collated], *, collate_fn_map: object = None) -> list[Any]:
        """Return the batch as `default_collate` would have made it of samples: a list of two."""
        return batches[0].item


def _optional_transform(transform: Callable[..., Any] | None) -> BaseTransform | None:
    return None if transform is None else as_transform(transform)


def _position(i: Any, length: int) -> int:
    """Return the index `i`, negative ones counted from the end, as one from 0 to `length - 1`."""
    position: int = operator.index(i)
    if not -length <= position < length:
        raise IndexError(f"no sample {position}: there are {length}")
    return position + length if position < 0 else position


def _mapped(function: Callable[..., Any], value: Any, *args: Any) -> Any:
    """Return the dict or tuple `value` with `function` applied to what it holds."""
    if isinstance(value, dict):
        return {key: function(item, *args) for key, item in value.items()}
    items = [function(item, *args) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _columns(value: Any, name: str) -> Any:
    """Return `value` as an array or a tensor, or as a dict or tuple of them."""
    if isinstance(value, dict):
        return {key: _columns(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_columns(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)  # Also makes a plain view of a memory map: no data is read.
    except ValueError as error:
        raise TypeError(f"{name} is no array: {error}") from error
    if array.dtype == object:
        array = _strings(array, name)
    return array


def _strings(array: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    stranger = next((item for item in array.flat if not isinstance(item, str)), None)
    if stranger is not None or array.ndim == 0:
        kind = type(array.item() if array.ndim == 0 else stranger).__name__
        raise TypeError(f"{name} must hold numbers or strings, it holds a {kind}")
    return array.astype(np.str_)


def _common_length(columns: dict[str, Any]) -> int:
    lengths = dict(_lengths(columns))
    (first, length), *others = lengths.items()
    for name, other in others:
        if other != length:
            raise ValueError(f"lengths differ: {first} has {length} samples, {name} has {other}")
    return length


def _lengths(columns: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in columns.items():
        if isinstance(value, dict):
            yield from _lengths({f"{name}[{key!r}]": item for key, item in value.items()})
        elif isinstance(value, tuple):
            yield from _lengths({f"{name}[{i}]": item for i, item in enumerate(value)})
        elif value.ndim == 0:
            raise ValueError(f"{name} needs a first dimension, one entry per sample")
        else:
            yield name, len(value)


def _taken(column: Any, indices: Indices) -> Any:
    if isinstance(column, np.ndarray):
        # Faster than `column[indices]`, but of what does not lie in one piece it copies all first.
        return column.take(indices, axis=0) if column.flags.c_contiguous else column[indices]
    if isinstance(column, Tensor):
        return column.index_select(0, torch.from_numpy(indices))
    return _mapped(_taken, column, indices)


def _check_batch(x: Any, md: Metadata, size: int) -> None:
    """Raise if a transform has left anything that is not one entry per sample."""
    for name, value in {"x": x, **{f"md[{key!r}]": item for key, item in md.items()}}.items():
        if isinstance(value, dict | tuple):
            continue
        try:
            length = len(value)
        except TypeError:
            length = None
        if length != size:
            found = "no length" if length is None else f"length {length}"
            raise ValueError(
                f"{name} has {found} after the transforms, the batch has {size} samples; "
                "transforms of an ArrayDataset see whole batches"
            )


def _collated(value: Any) -> Any:
    """Return `value`, one entry per sample, as `default_collate` would make it of the samples."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "US":
            return value.tolist()
        # Tensors share memory, and cannot share what runs backwards or is read-only.
        return torch.from_numpy(value if value.flags.carray else value.copy())
    if isinstance(value, dict | tuple):
        mapped = _mapped(_collated, value)
        return list(mapped) if type(mapped) is tuple else mapped
    return default_collate(value)


def _first(value: Any) -> Any:
    if isinstance(value, dict | tuple):
        return _mapped(_first, value)
    first = value[0]
    return first.item() if isinstance(first, np.str_ | np.bytes_) else first


def _named(indices: Indices) -> str:
    if len(indices) == 1:
        return f"sample {indices[0]}"
    return f"samples {listed(indices, _NAMED_SAMPLES)}"
