"""Datasets: samples one by one, and whole batches from arrays."""

from __future__ import annotations

import operator
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, default_collate

from torch_lab.datasets import ArrayDataset, BaseDataset
from torch_lab.transforms import BaseDataTransform, Metadata

Pair = namedtuple("Pair", ["left", "right"])

X = np.arange(20, dtype=np.float32).reshape(10, 2)
Y = np.arange(10) % 3


class Rows(BaseDataset):
    """The rows of X, with everything a sample can have."""

    def __len__(self) -> int:
        return len(X)

    def get_raw_data(self, i: int) -> Any:
        return X[i]

    def get_raw_label(self, i: int) -> Any:
        return Y[i]

    def get_additional_metadata(self, i: int) -> Metadata:
        return {"name": f"row {i}", "weight": i / 2}


class Bare(BaseDataset):
    """Numbers, with nothing that is not required; number 3 is broken."""

    def __len__(self) -> int:
        return 5

    def get_raw_data(self, i: int) -> int:
        return [0, 10, 20][i]


class Halve(BaseDataTransform):
    """Half the data."""

    def compute(self, x: Any) -> Any:
        return x / 2


class FailOnFour(BaseDataTransform):
    """Raises for sample 4."""

    def compute(self, x: Any) -> Any:
        if (x == X[4]).all(axis=-1).any():
            raise ZeroDivisionError("the user's own words")
        return x


def arrays(**kwargs: Any) -> ArrayDataset:
    """Return the same samples as Rows, as arrays."""
    metadata = {"name": [f"row {i}" for i in range(10)], "weight": np.arange(10) / 2}
    return ArrayDataset(X, Y, metadata, **kwargs)


def assert_same(actual: Any, expected: Any) -> None:
    """Assert that values agree in types, dtypes and contents."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same(actual[key], expected[key])
    elif isinstance(actual, list | tuple):
        for left, right in zip(actual, expected, strict=True):
            assert_same(left, right)
    elif isinstance(actual, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    else:
        assert actual == expected


def test_a_sample_is_data_and_what_is_known_about_it() -> None:
    """An item is `(x, md)`; md holds the position, the label and the additional metadata."""
    x, md = Rows()[4]
    assert x.tolist() == [8, 9]
    assert md == {"name": "row 4", "weight": 2.0, "idx": 4, "y": 1}


def test_without_a_label_there_is_no_y() -> None:
    """A label of None is no label."""
    assert Bare()[1] == (10, {"idx": 1})


@pytest.mark.parametrize("dataset", [Rows(), arrays()])
def test_negative_indices_count_from_the_end(dataset: Any) -> None:
    """`dataset[-1]` is the last sample, and its position says so."""
    x, md = dataset[-1]
    assert x.tolist() == [18, 19]
    assert md["idx"] == 9
    assert dataset[np.int64(-10)][1]["idx"] == dataset[torch.tensor(0)][1]["idx"] == 0


@pytest.mark.parametrize("dataset", [Rows(), arrays()])
@pytest.mark.parametrize("index", [10, -11])
def test_an_index_out_of_range_is_an_index_error(dataset: Any, index: int) -> None:
    """No sample is invented beyond either end."""
    with pytest.raises(IndexError, match=f"no sample {index}: there are 10"):
        dataset[index]


@pytest.mark.parametrize("dataset", [Rows(), arrays()])
def test_iteration_gives_every_sample_once(dataset: Any) -> None:
    """A dataset can be looped over."""
    assert [md["idx"] for _, md in dataset] == list(range(10))


def test_iteration_does_not_take_a_users_index_error_for_the_end() -> None:
    """A bug in `get_raw_data` is raised, with the sample named, not swallowed."""
    with pytest.raises(IndexError) as error:
        list(Bare())
    assert error.value.__notes__ == ["in sample 3 of Bare"]


@pytest.mark.parametrize("make", [Rows, arrays])
def test_augmentation_comes_before_the_transform(make: Any) -> None:
    """Augmented first, transformed then."""
    dataset = make(transform=Halve(), augmentation=lambda x: x + 1)
    assert dataset[0][0].tolist() == [0.5, 1]


@pytest.mark.parametrize("make", [Rows, arrays])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_transform_names_the_sample_through_the_loader(make: Any, workers: int) -> None:
    """The exception keeps its type, and says which transform and which samples, in workers too."""
    loader = DataLoader(make(transform=FailOnFour()), batch_size=2, num_workers=workers)
    with pytest.raises(ZeroDivisionError, match="the user's own words") as error:
        list(loader)
    said = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert "in transform FailOnFour" in said
    assert ("in sample 4 of Rows" if make is Rows else "in samples 4, 5 of ArrayDataset") in said


@pytest.mark.parametrize("index", range(-10, 10))
def test_array_samples_equal_those_made_one_by_one(index: int) -> None:
    """Plain indexing gives the same sample as the dataset that makes samples one by one."""
    assert_same(default_collate([arrays()[index]]), default_collate([Rows()[index]]))


@pytest.mark.parametrize("steps", [{}, {"transform": Halve(), "augmentation": np.copy}])
@pytest.mark.parametrize("workers", [0, 1])
def test_array_batches_equal_those_made_one_by_one(steps: Any, workers: int) -> None:
    """A plain loader gives the same batches, types and all, in the same order."""

    def batches(dataset: Any) -> list[Any]:
        shuffled = torch.Generator().manual_seed(1)
        loader = DataLoader(
            dataset, batch_size=4, shuffle=True, generator=shuffled, num_workers=workers
        )
        return list(loader)

    assert_same(batches(arrays(**steps)), batches(Rows(**steps)))


def test_array_batches_arrive_from_spawned_workers() -> None:
    """A worker that inherits nothing knows how to hand over whole batches."""
    loader = DataLoader(
        arrays(transform=Halve()), batch_size=5, num_workers=1, multiprocessing_context="spawn"
    )
    assert torch.cat([x for x, _ in loader]).tolist() == (X / 2).tolist()


def test_array_batches_go_through_subsets() -> None:
    """`random_split` and `Subset` keep the fast path, and positions of the whole dataset."""
    ((x, md),) = DataLoader(Subset(arrays(), [7, 2]), batch_size=2)
    assert x.tolist() == X[[7, 2]].tolist()
    assert md["idx"].tolist() == [7, 2]


@pytest.mark.parametrize(
    ("index", "positions"),
    [
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, -4), [9, 5, 1]),
        ([3, -1], [3, 9]),
        (np.array([3, -1]), [3, 9]),
        (torch.tensor([1]), [1]),
        (slice(0), []),
        (np.array([], dtype=np.int64), []),
    ],
)
def test_several_indices_give_a_batch(index: Any, positions: list[int]) -> None:
    """Slices and index arrays give what a loader would give."""
    x, md = arrays()[index]
    assert x.tolist() == X[positions].tolist()
    assert md["idx"].tolist() == positions
    assert md["name"] == [f"row {i}" for i in positions]


def test_indices_must_be_integers_in_range() -> None:
    """A mask is no list of positions, and no position is beyond the ends."""
    with pytest.raises(TypeError, match="must be integers, these are bool"):
        arrays()[X[:, 0] > 3]
    with pytest.raises(IndexError, match="no sample 12"):
        arrays()[[1, 12]]
    with pytest.raises(IndexError, match="no sample -11"):
        arrays()[[1, -11]]


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_transforms_may_work_in_place(convert: Any) -> None:
    """They get copies: neither the data nor the caller's indices change."""

    def spoil(x: Any, md: Metadata) -> Any:
        x *= 0
        md["idx"] += 1
        return x

    x, indices = X.copy(), np.array([1, 2])
    dataset = ArrayDataset(convert(x), transform=spoil)
    assert dataset[indices][1]["idx"].tolist() == [2, 3]
    assert indices.tolist() == [1, 2]
    assert (x == X).all()


def test_memory_maps_are_read_from_disk(tmp_path: Path) -> None:
    """Batches come from the file, and see what is written there later."""
    stored = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", X.dtype, X.shape)
    dataset = ArrayDataset(np.load(tmp_path / "x.npy", mmap_mode="r"))
    stored[:] = X
    stored.flush()
    x, _ = dataset[[4, 2]]
    assert type(x) is torch.Tensor
    assert x.tolist() == X[[4, 2]].tolist()


def test_of_arrays_in_several_pieces_the_batch_alone_is_copied() -> None:
    """Such as columns, every other row, or one row many times: here there is no room for all."""
    many = np.broadcast_to(np.float32([3, 4]), (10**12, 2))
    assert ArrayDataset(many)[[7, 5]][0].tolist() == [[3, 4], [3, 4]]
    for array in (X[::2], X[:, ::-1], np.asfortranarray(X)):
        assert ArrayDataset(array)[[1, 0]][0].tolist() == array[[1, 0]].tolist()


def test_what_runs_backwards_or_is_read_only_is_collated_too() -> None:
    """Flips and broadcasts need no copy in the user's transform."""
    flipped, _ = ArrayDataset(X, transform=np.fliplr)[[1]]
    assert flipped.tolist() == [[3, 2]]
    constant, _ = ArrayDataset(X, transform=lambda x: np.broadcast_to(x.dtype.type(7), x.shape))[:2]
    assert constant.tolist() == [[7, 7], [7, 7]]


@pytest.mark.parametrize("kind", [dict, Pair, tuple])
def test_x_may_be_several_arrays(kind: Any) -> None:
    """Dicts, tuples and named tuples of arrays are fetched and collated as such."""

    def several(rows: Any) -> Any:
        parts = {"left": rows, "right": rows.sum(-1)}
        return parts if kind is dict else Pair(**parts) if kind is Pair else (rows, rows.sum(-1))

    dataset = ArrayDataset(several(X), Y, transform=lambda x: x)
    samples = [(several(X[i]), {"y": Y[i], "idx": i}) for i in range(10)]
    assert_same(next(iter(DataLoader(dataset, batch_size=10))), default_collate(samples))
    assert_same(default_collate([dataset[3]]), default_collate([samples[3]]))


def test_transforms_may_add_values_to_the_metadata() -> None:
    """Lists, one value per sample, are collated as those of samples would be."""
    dataset = ArrayDataset(X, transform=lambda x, md: (x, {**md, "sum": list(x.sum(axis=1))}))
    assert dataset[[1, 2]][1]["sum"].tolist() == [5, 9]
    assert dataset[1][1]["sum"] == 5


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda x: x[:1], "x has length 1 after the transforms, the batch has 3 samples"),
        (lambda x: x.sum(), "x has no length after the transforms"),
        (lambda x, md: (x, {"mean": 0.5}), r"md\['mean'\] has no length"),
    ],
)
def test_a_transform_that_loses_samples_is_refused(transform: Any, message: str) -> None:
    """A transform written for samples is told that it sees batches."""
    with pytest.raises(ValueError, match=message) as error:
        ArrayDataset(X, transform=transform)[:3]
    assert error.value.__notes__ == ["in samples 0, 1, 2 of ArrayDataset"]


def test_an_error_names_the_samples_of_a_batch_briefly() -> None:
    """One sample, a few, or the first few and how many more."""
    dataset = ArrayDataset(np.zeros((300, 1)), transform=operator.methodcaller("missing"))
    for index, named in ((7, "sample 7"), (slice(10), "samples 0, 1, 2, 3, 4, 5, 6, 7 and 2 more")):
        with pytest.raises(AttributeError) as error:
            dataset[index]
        assert error.value.__notes__[-1] == f"in {named} of ArrayDataset"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X, "y": Y[:9]}, "lengths differ: x has 10 samples, y has 9"),
        ({"x": X, "metadata": {"a": Y[:8]}}, r"metadata\['a'\] has 8"),
        ({"x": {"a": X, "b": X[:2]}}, r"x\['a'\] has 10 samples, x\['b'\] has 2"),
        ({"x": (X, X[:2])}, r"x\[0\] has 10 samples, x\[1\] has 2"),
        ({"x": np.float32(1)}, "x needs a first dimension"),
        ({"x": X, "metadata": {"idx": Y}}, "must not hold 'idx': the dataset sets it"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(arguments: Any, message: str) -> None:
    """The constructor says which array it is, and what is wrong with it."""
    with pytest.raises(ValueError, match=message):
        ArrayDataset(**arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1, 2], [3]], "x is no array: "),
        (np.array([1, None]), "x must hold numbers or strings, it holds a int"),
        (object(), "x must hold numbers or strings, it holds a object"),
    ],
)
def test_what_is_no_array_is_refused(x: Any, message: str) -> None:
    """Ragged lists and arrays of objects cannot be batched."""
    with pytest.raises(TypeError, match=message):
        ArrayDataset(x)


def test_arrays_of_string_objects_are_strings() -> None:
    """As they come from a table."""
    dataset = ArrayDataset(X, metadata={"name": np.array(list("abcdefghij"), dtype=object)})
    assert dataset[1:3][1]["name"] == ["b", "c"]


def test_a_collate_function_of_ones_own_is_refused_in_words() -> None:
    """Batches arrive collated; a function that expects samples is told so."""
    loader = DataLoader(arrays(), batch_size=2, collate_fn=lambda batch: [x for x, _ in batch[0]])
    with pytest.raises(TypeError, match="leave out collate_fn"):
        next(iter(loader))


def test_an_array_dataset_cannot_be_subclassed() -> None:
    """A loader would never ask for a sample, and an override would do nothing."""
    with pytest.raises(TypeError, match="Flip cannot be an ArrayDataset"):
        type("Flip", (ArrayDataset,), {})
