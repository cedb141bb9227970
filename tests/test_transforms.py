"""Transforms: composing, applying to containers, adapting callables, and saying what failed."""

from __future__ import annotations

import functools
import operator
import pickle
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torch_lab.transforms import (
    BaseDataTransform,
    BaseMetadataTransform,
    BaseTransform,
    Metadata,
    TransformCompose,
    TransformIterable,
    as_transform,
)

Pair = namedtuple("Pair", ["left", "right"])


class Double(BaseDataTransform):
    """Twice the data."""

    def compute(self, x: Any) -> Any:
        return 2 * x


class CountCalls(BaseMetadataTransform):
    """Counts how often it was called."""

    def compute(self, md: Metadata) -> Metadata:
        return {**md, "calls": md.get("calls", 0) + 1}


class SubtractLabel(BaseTransform):
    """Data less its label."""

    def compute(self, x: Any, md: Metadata) -> tuple[Any, Metadata]:
        return x - md["y"], {**md, "subtracted": True}


class Failing(BaseDataTransform):
    """Raises."""

    def compute(self, x: Any) -> Any:
        raise ZeroDivisionError("the user's own words")


class Forgetful(BaseTransform):
    """Returns the data alone."""

    def compute(self, x: Any, md: Metadata) -> Any:
        return x


class ForgetfulOfData(BaseDataTransform):
    """Returns nothing."""

    def compute(self, x: Any) -> Any:
        x + 1


class ForgetfulOfMetadata(BaseMetadataTransform):
    """Changes the metadata, and returns nothing."""

    def compute(self, md: Metadata) -> Any:
        md["seen"] = True


def half(x: Any) -> Any:
    return x / 2


def scaled(x: Any, factor: float = 3) -> Any:
    return x * factor


def plus_label(x: Any, md: Metadata) -> Any:
    return x + md["y"]


def plus_label_noted(x: Any, md: Metadata) -> tuple[Any, Metadata]:
    return x + md["y"], {**md, "noted": True}


def between(x: Any, low: float, step: float, high: float) -> Any:
    return x


def notes(error: pytest.ExceptionInfo[BaseException]) -> list[str]:
    return getattr(error.value, "__notes__", [])


def test_each_kind_of_transform_changes_what_it_sees_and_passes_on_the_rest() -> None:
    """Data, metadata, or both go through `compute`; the other comes back as it was."""
    assert Double()(3, {"y": 1}) == (6, {"y": 1})
    assert CountCalls()(3, {"y": 1}) == (3, {"y": 1, "calls": 1})
    assert SubtractLabel()(3, {"y": 1}) == (2, {"y": 1, "subtracted": True})


def test_compose_applies_transforms_and_callables_in_order() -> None:
    """The output of a step is the input of the next, for data and metadata."""
    compose = TransformCompose(Double(), plus_label, CountCalls(), half)
    assert compose(3, {"y": 4}) == (5, {"y": 4, "calls": 1})


def test_an_empty_compose_changes_nothing() -> None:
    """No steps are the identity."""
    assert TransformCompose()(3, {"y": 1}) == (3, {"y": 1})


def test_compose_is_a_sequence_of_what_was_given() -> None:
    """It has a length, an order, items, and slices of its own type."""
    double = Double()
    compose = TransformCompose(double, half, plus_label)
    assert len(compose) == 3
    assert list(compose) == [double, half, plus_label]
    assert compose[0] is double
    assert compose[-1] is plus_label
    assert compose[1:] == TransformCompose(half, plus_label)
    assert isinstance(compose[:0], TransformCompose)


def test_composes_of_equal_transforms_are_equal_and_hash_alike() -> None:
    """Equality is that of the transforms, in their order."""
    double = Double()
    same = TransformCompose(double, half)
    assert TransformCompose(double, half) == same
    assert hash(TransformCompose(double, half)) == hash(same)
    assert TransformCompose(half, double) != same
    assert TransformCompose(double, half) != [double, half]


def test_addition_lengthens_a_compose_on_either_side() -> None:
    """Composes and single transforms are joined flat; nothing else can be added."""
    double = Double()
    compose = TransformCompose(double)
    assert compose + TransformCompose(half) == TransformCompose(double, half)
    assert compose + half == TransformCompose(double, half)
    assert half + compose == TransformCompose(half, double)
    assert len(compose) == 1
    with pytest.raises(TypeError):
        compose + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        1 + compose  # type: ignore[operator]


def test_a_failing_step_is_named_with_its_position() -> None:
    """The user's exception keeps its type, and its notes lead from the step to the outermost."""
    inner = TransformCompose(half, Failing())
    with pytest.raises(ZeroDivisionError, match="the user's own words") as error:
        TransformCompose(Double(), inner)(1, {})
    assert notes(error) == [
        "in transform Failing",
        "at position 1 of TransformCompose(half, Failing)",
        "at position 1 of TransformCompose(Double, TransformCompose(half, Failing))",
    ]


def test_a_forgotten_return_is_found_and_named() -> None:
    """What `compute` returns is checked in every kind of transform, and in plain callables."""
    with pytest.raises(TypeError, match=r"must return \(x, md\), it returned a int") as error:
        Forgetful()(1, {})
    assert notes(error) == ["in transform Forgetful"]
    with pytest.raises(TypeError, match="it returned None; is a `return` missing"):
        ForgetfulOfData()(1, {})
    with pytest.raises(TypeError, match="must return the metadata, a dict; it returned None"):
        ForgetfulOfMetadata()(1, {})
    with pytest.raises(TypeError, match="is a `return` missing") as error:
        as_transform([].append)(1, {})
    assert notes(error) == ["in transform list.append"]
    with pytest.raises(TypeError, match="is a `return` missing"):
        as_transform(lambda x, md: md.update(x=x))(1, {})


@pytest.mark.parametrize(
    ("x", "apply_to", "expected"),
    [
        ({"a": 1, "b": 2}, None, {"a": 2, "b": 4}),
        ({"a": 1, "b": 2}, ["b"], {"a": 1, "b": 4}),
        ({"a": 1, "b": 2}, "b", {"a": 1, "b": 4}),
        ({0: 1, "b": 2}, 0, {0: 2, "b": 2}),
        ([1, 2, 3], None, [2, 4, 6]),
        ([1, 2, 3], [0, -1], [2, 2, 6]),
        ((1, 2, 3), (1,), (1, 4, 3)),
        (Pair(1, 2), None, Pair(2, 4)),
        (OrderedDict(a=1), None, OrderedDict(a=2)),
        ([], None, []),
    ],
)
def test_iterable_transforms_the_chosen_elements_and_keeps_the_type(
    x: Any, apply_to: Any, expected: Any
) -> None:
    """Dicts, lists, tuples and their subclasses come back as what they were, changed in places."""
    before = pickle.dumps(x)
    result, _ = TransformIterable(Double(), apply_to)(x, {})
    assert result == expected
    assert type(result) is type(x)
    assert pickle.dumps(x) == before


def test_iterable_hands_metadata_from_element_to_element() -> None:
    """A transform of metadata has seen all elements at the end."""
    assert TransformIterable(CountCalls())([1, 2, 3], {})[1] == {"calls": 3}


def test_iterable_names_a_missing_key_and_those_there_are() -> None:
    """A wrong key or index is a clear error, never one that iteration could mistake for its end."""
    with pytest.raises(ValueError, match=r"no key 'egg'; did you mean eeg\? It has: 'eeg', 'ecg'"):
        TransformIterable(half, ["egg"])({"eeg": 1, "ecg": 2}, {})
    with pytest.raises(ValueError, match=r"no key 7\. It has: nothing\."):
        TransformIterable(half, [7])({}, {})
    with pytest.raises(ValueError, match=r"\(half, apply_to=\[3\]\): x has no index 3\. It has: 0"):
        TransformIterable(half, [3])([1], {})
    with pytest.raises(ValueError, match="no index -2"):
        TransformIterable(half, [-2])([1], {})


def test_iterable_names_the_element_that_failed() -> None:
    """The key stands in a note of the user's own exception."""
    with pytest.raises(ZeroDivisionError) as error:
        TransformIterable(Failing())({"eeg": 1}, {})
    assert notes(error) == ["in transform Failing", "at 'eeg' of TransformIterable(Failing)"]


def test_iterable_refuses_what_has_no_elements() -> None:
    """A tensor could be iterated over too, and is not meant."""
    with pytest.raises(TypeError, match="must be a dict, a list or a tuple, it is a Tensor"):
        TransformIterable(half)(torch.zeros(2), {})


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (half, 2),
        (scaled, 12),
        (functools.partial(scaled, factor=5), 20),
        (functools.partial(operator.add, 1), 5),
        (lambda *xs: xs[0] - 1, 3),
        (plus_label, 5),
        (float, 4.0),
        (np.sqrt, 2),
    ],
)
def test_a_callable_gets_what_it_asks_for(function: Any, expected: float) -> None:
    """One required argument gets `x`, two get `(x, md)`; optional ones are left alone."""
    assert as_transform(function)(4, {"y": 1}) == (expected, {"y": 1})


def test_a_callable_may_return_metadata_too() -> None:
    """A pair whose second item is a dict is `(x, md)`; any other pair is data."""
    assert as_transform(plus_label_noted)(4, {"y": 1}) == (5, {"y": 1, "noted": True})
    assert as_transform(lambda x, md: (x, x))(4, {"y": 1}) == ((4, 4), {"y": 1})


def test_modules_and_builtins_without_a_signature_get_x() -> None:
    """What a module asks for stands in its `forward`; a builtin that does not tell gets `x`."""
    x = torch.tensor([-1.0, 2.0])
    assert as_transform(nn.ReLU())(x, {})[0].tolist() == [0, 2]
    assert as_transform(torch.abs)(x, {})[0].tolist() == [1, 2]


def test_a_transform_is_its_own_adaptation() -> None:
    """`as_transform` leaves transforms as they are."""
    double = Double()
    assert as_transform(double) is double


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (3, "must be callable, this is a int: 3"),
        (None, "must be callable, this is None"),
        (Double, r"Double is a class; give an instance of it, such as Double\(\)"),
        (lambda x, md, z: x, r"requires \(x, md, z\)"),
        (lambda x, *, rate: x, r"requires \(x, rate\); bind the others with functools.partial"),
        (functools.partial(between, high=1), r"but between requires \(x, low, step\)"),
    ],
)
def test_what_cannot_be_a_transform_is_refused_at_once(wrong: Any, message: str) -> None:
    """The mistake is found where the transform is given, not at the first sample."""
    with pytest.raises(TypeError, match=message):
        TransformCompose(Double(), wrong)


def test_transforms_survive_pickling() -> None:
    """Spawned worker processes get them by pickle."""
    compose = TransformCompose(TransformIterable(half, ["a"]), CountCalls(), np.copy)[:2]
    copy = pickle.loads(pickle.dumps(compose))
    assert copy({"a": 4}, {}) == compose({"a": 4}, {}) == ({"a": 2}, {"calls": 1})
