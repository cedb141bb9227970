"""Structures: what fits passes, and of what does not each place is named in a line."""

from __future__ import annotations

import argparse
import collections
import copy
import enum
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NewType,
    NotRequired,
    Optional,
    Protocol,
    Required,
    TypedDict,
    TypeVar,
    Union,
)

import pydantic
import pytest
import typing_extensions

from conftest import CONFIG, Lab
from torch_lab.errors import HparamsError
from torch_lab.structures import Structure, optional, validate_structure


class Mode(enum.Enum):
    """A metric is at its best when it is low, or high."""

    MIN = "min"
    MAX = "max"


class Optimizer(TypedDict, total=False):
    """Holds itself."""

    name: Required[Literal["adam", "sgd"]]
    rate: float
    inner: Optimizer


class Sized(TypedDict):
    """One key must be there."""

    width: int
    depth: NotRequired[int]


@dataclass
class Schedule:
    """Holds itself, and has a field that is not given."""

    name: str
    steps: list[int] = field(default_factory=list)
    then: Schedule | None = None
    seen: int = field(default=0, init=False)


class Runnable(Protocol):
    """Not to be told by `isinstance`."""

    def run(self) -> None: ...


class Model(pydantic.BaseModel):
    """Checks more than types."""

    width: int = pydantic.Field(ge=8)
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"

    @pydantic.field_validator("width")
    @classmethod
    def is_even(cls, width: int) -> int:
        if width % 2:
            raise ValueError("width is odd")
        return width


class Cat(pydantic.BaseModel):
    """One of two."""

    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel):
    """The other one."""

    kind: Literal["dog"]
    tricks: list[str]


class Pets(pydantic.BaseModel):
    """Holds models, alone and among other types."""

    first: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")] | None = None
    others: list[Cat] = []
    any: int | list[str] | Cat = 1
    counts: dict[str, int] = {}
    home: pathlib.Path | None = None
    short: int = pydantic.Field(1, alias="s")


class Open(pydantic.BaseModel):
    """Takes keys that it does not know."""

    model_config = pydantic.ConfigDict(extra="allow")
    width: int


class HoldsOpen(pydantic.BaseModel):
    """Does not say what it does with such keys."""

    inner: Open


class Popping(pydantic.BaseModel):
    """Changes what it is given."""

    width: int

    @pydantic.model_validator(mode="before")
    @classmethod
    def pops(cls, given: dict[str, Any]) -> dict[str, Any]:
        given.pop("old", None)
        given["sizes"].clear()
        del given["sizes"]
        return given


class Extended(typing_extensions.TypedDict):
    """That of the package, which pydantic demands on older versions of Python."""

    width: typing_extensions.Required[int]
    depth: typing_extensions.NotRequired[typing_extensions.ReadOnly[int]]


Rate = NewType("Rate", float)
Rates = typing_extensions.TypeAliasType("Rates", list[Rate])

Wrong = list[tuple[Any, list[str]]]

FORMS: dict[str, tuple[Any, list[Any], Wrong]] = {
    "int": (
        int,
        [3, -1, 0],
        [
            (True, ["config: expected int, got True (bool)"]),
            (3.0, ["config: expected int, got 3.0 (float)"]),
            ("3", ["config: expected int, got '3' (str)"]),
            (None, ["config: expected int, got None"]),
        ],
    ),
    "float": (
        float,
        [0.1, 3, float("nan")],
        [
            (True, ["config: expected float, got True (bool)"]),
            ("0.1", ["config: expected float, got '0.1' (str)"]),
            (1j, ["config: expected float, got 1j (complex)"]),
        ],
    ),
    "complex": (complex, [1j, 1.0, 1], [(False, ["config: expected complex, got False (bool)"])]),
    "bool": (bool, [True, False], [(1, ["config: expected bool, got 1 (int)"])]),
    "str": (
        str,
        ["", "a"],
        [(b"a", ["config: expected str, got b'a' (bytes)"])],
    ),
    "None": (
        None,
        [None],
        [
            (0, ["config: expected None, got 0 (int)"]),
            ({}, ["config: expected None, got {} (dict)"]),
        ],
    ),
    "type(None)": (type(None), [None], [(False, ["config: expected None, got False (bool)"])]),
    "Any": (Any, [None, 3, {"a": [1]}], []),
    "Namespace": (argparse.Namespace, [None, 3, {"a": [1]}, argparse.Namespace()], []),
    "object": (object, [None, True, []], []),
    "dict": (
        dict,
        [{}, {"a": 1}, {3: None}, collections.OrderedDict(a=1)],
        [([], ["config: expected dict, got [] (list)"])],
    ),
    "list": (
        list,
        [[], [1, "a"]],
        [((), ["config: expected list, got () (tuple)"])],
    ),
    "[]": ([], [[], [1, "a"]], [({}, ["config: expected list, got {} (dict)"])]),
    "{}": ({}, [{}], [({"a": 1}, ["config/a: unknown key"])]),
    "a class": (
        pathlib.Path,
        [pathlib.Path("a")],
        [
            ("a", ["config: expected Path, got 'a' (str)"]),
            (pathlib.Path, ["config: expected Path, got <class 'pathlib.Path'> (type)"]),
        ],
    ),
    "an enumeration": (Mode, [Mode.MIN], [("min", ["config: expected Mode, got 'min' (str)"])]),
    "an abstract class": (
        Mapping,
        [{}],
        [([1], ["config: expected Mapping, got [1] (list)"])],
    ),
    "[int]": (
        [int],
        [[], [1], [1, 2, 3]],
        [
            (3, ["config: expected list[int], got 3 (int)"]),
            ("ab", ["config: expected list[int], got 'ab' (str)"]),
            ((1,), ["config: expected list[int], got (1,) (tuple)"]),
            (
                [1, "a", 2, True],
                [
                    "config[1]: expected int, got 'a' (str)",
                    "config[3]: expected int, got True (bool)",
                ],
            ),
        ],
    ),
    "[[float]]": (
        [[float]],
        [[], [[]], [[1, 2.0], []]],
        [
            ([[1], 2], ["config[1]: expected list[float], got 2 (int)"]),
            ([[1], [2, None]], ["config[1][1]: expected float, got None"]),
        ],
    ),
    "(int, str)": (
        (int, str),
        [1, "a"],
        [
            (3.5, ["config: expected int or str, got 3.5 (float)"]),
            (True, ["config: expected int or str, got True (bool)"]),
        ],
    ),
    "(int,)": ((int,), [1], [("a", ["config: expected int, got 'a' (str)"])]),
    "(None, (int, [str]))": (
        (None, (int, [str])),
        [None, 1, ["a"]],
        [
            (3.5, ["config: expected None, int or list[str], got 3.5 (float)"]),
            # What is told is what is wrong with the one that it resembles.
            (["a", 1], ["config[1]: expected str, got 1 (int)"]),
        ],
    ),
    "[(int, str)]": (
        [(int, str)],
        [[], [1, "a"]],
        [
            ([None], ["config[0]: expected int or str, got None"]),
            (3, ["config: expected list[int | str], got 3 (int)"]),
        ],
    ),
    "a dictionary": (
        {"rate": float, "name": str},
        [{"rate": 1, "name": "a"}],
        [
            (None, ["config: expected dict, got None"]),
            ([], ["config: expected dict, got [] (list)"]),
            ({"rate": 1}, ["config/name: missing; expected str"]),
            (
                {"rte": 1, "name": 3},
                [
                    "config/rate: missing; expected float",
                    "config/name: expected str, got 3 (int)",
                    "config/rte: unknown key; did you mean rate?",
                ],
            ),
            (
                {"rate": 1, "zzz": 2},
                [
                    "config/name: missing; expected str",
                    "config/zzz: unknown key; it may have: name",
                ],
            ),
            # What is there already cannot have been meant.
            ({"rate": 1, "name": "a", "rates": 2}, ["config/rates: unknown key"]),
        ],
    ),
    "dictionaries in dictionaries": (
        {"a": {"b": {"c": int}}},
        [{"a": {"b": {"c": 1}}}],
        [
            ({"a": {"b": {"c": "1"}}}, ["config/a/b/c: expected int, got '1' (str)"]),
            ({"a": {"b": 3}}, ["config/a/b: expected dict, got 3 (int)"]),
            ({"a": {}}, ["config/a/b: missing; expected dict"]),
        ],
    ),
    "a list of dictionaries": (
        {"optimizers": [{"links": [str]}]},
        [{"optimizers": []}, {"optimizers": [{"links": ["a"]}, {"links": []}]}],
        [
            (
                {"optimizers": [{"links": []}, {"links": [3]}]},
                ["config/optimizers[1]/links[0]: expected str, got 3 (int)"],
            ),
            ({"optimizers": {}}, ["config/optimizers: expected list[dict], got {} (dict)"]),
        ],
    ),
    "other keys": (
        {"loss/validate": int, 3: int, "a b": int, "weight-decay": int, ("a", 1): int},
        [{"loss/validate": 1, 3: 1, "a b": 1, "weight-decay": 1, ("a", 1): 1}],
        [
            (
                {"loss/validate": "x", 3: "x", "a b": "x", "weight-decay": "x", ("a", 1): "x"},
                [
                    "config['loss/validate']: expected int, got 'x' (str)",
                    "config[3]: expected int, got 'x' (str)",
                    "config['a b']: expected int, got 'x' (str)",
                    "config/weight-decay: expected int, got 'x' (str)",
                    "config[('a', 1)]: expected int, got 'x' (str)",
                ],
            ),
        ],
    ),
    "optional": (
        {"rate": optional(float), "inner": optional({"a": int})},
        [{}, {"rate": 1}, {"inner": {"a": 1}}],
        [
            ({"rate": None}, ["config/rate: expected float, got None"]),
            ({"inner": {}}, ["config/inner/a: missing; expected int"]),
            ({"rat": 1}, ["config/rat: unknown key; did you mean rate?"]),
        ],
    ),
    "choice of dictionaries": (
        ({"kind": Literal["a"], "x": int}, {"kind": Literal["b"], "y": int, "z": int, "w": int}),
        [{"kind": "a", "x": 1}, {"kind": "b", "y": 1, "z": 2, "w": 3}],
        [
            (
                {"kind": "b", "x": 1},
                [
                    "config/y: missing; expected int (nearest of 2 choices)",
                    "config/z: missing; expected int (nearest of 2 choices)",
                    "config/w: missing; expected int (nearest of 2 choices)",
                    "config/x: unknown key; it may have: y, z, w (nearest of 2 choices)",
                ],
            ),
            (3, ["config: expected dict, got 3 (int)"]),
        ],
    ),
    "int | str": (
        int | str,
        [1, "a"],
        [(3.5, ["config: expected int or str, got 3.5 (float)"])],
    ),
    "Union": (
        Union[int, str, None],  # noqa: UP007
        [1, "a", None],
        [(3.5, ["config: expected int, str or None, got 3.5 (float)"])],
    ),
    "Optional": (
        Optional[float],  # noqa: UP045
        [1, 1.0, None],
        [("1", ["config: expected float or None, got '1' (str)"])],
    ),
    "list[int]": (
        list[int],
        [[], [1]],
        [
            ((1,), ["config: expected list[int], got (1,) (tuple)"]),
            (["a"], ["config[0]: expected int, got 'a' (str)"]),
        ],
    ),
    "dict[str, float]": (
        dict[str, float],
        [{}, {"a": 1}, {"b": 0.5}],
        [
            ([], ["config: expected dict[str, float], got [] (list)"]),
            (
                {1: 2.0, "a": "b"},
                [
                    "config[1]: expected str as its key, got 1 (int)",
                    "config/a: expected float, got 'b' (str)",
                ],
            ),
        ],
    ),
    "dict[str, list[int | None]]": (
        dict[str, list[int | None]],
        [{"a": [1, None]}],
        [
            ({"a": [1, "x"]}, ["config/a[1]: expected int or None, got 'x' (str)"]),
            (1, ["config: expected dict[str, list[int | None]], got 1 (int)"]),
        ],
    ),
    "tuple[int, ...]": (
        tuple[int, ...],
        [(), (1, 2, 3)],
        [
            ([1], ["config: expected tuple[int, ...], got [1] (list)"]),
            ((1, "a"), ["config[1]: expected int, got 'a' (str)"]),
        ],
    ),
    "tuple[int, str]": (
        tuple[int, str],
        [(1, "a")],
        [
            ((1,), ["config: expected tuple[int, str], got (1,) (tuple)"]),
            (
                ("a", 1),
                [
                    "config[0]: expected int, got 'a' (str)",
                    "config[1]: expected str, got 1 (int)",
                ],
            ),
        ],
    ),
    "tuple[()]": (tuple[()], [()], [((1,), ["config: expected tuple[()], got (1,) (tuple)"])]),
    "set[str]": (
        set[str],
        [set(), {"a"}],
        [
            ({"a", 1}, ["config: expected str in it, got 1 (int)"]),
            (["a"], ["config: expected set[str], got ['a'] (list)"]),
        ],
    ),
    "Sequence[float]": (
        Sequence[float],
        [[1, 2.0], (1,), ()],
        [
            ("12", ["config: expected Sequence[float], got '12' (str)"]),
            ((1, "a"), ["config[1]: expected float, got 'a' (str)"]),
        ],
    ),
    "Literal": (
        Literal["adam", "sgd", 1, None],
        ["adam", "sgd", 1, None],
        [
            (
                "sdg",
                ["config: expected 'adam', 'sgd', 1 or None, got 'sdg' (str); did you mean sgd?"],
            ),
            (True, ["config: expected 'adam', 'sgd', 1 or None, got True (bool)"]),
            (1.0, ["config: expected 'adam', 'sgd', 1 or None, got 1.0 (float)"]),
        ],
    ),
    "Literal within": (
        [(None, Literal["a", "b"])],
        [[None, "a"]],
        [
            (["c"], ["config[0]: expected None, 'a' or 'b', got 'c' (str)"]),
            (3, ["config: expected list[None | Literal['a', 'b']], got 3 (int)"]),
        ],
    ),
    "Annotated": (
        Annotated[int, "of layers"],
        [1],
        [("a", ["config: expected int, got 'a' (str)"])],
    ),
    "type alias": (Rates, [[0.1]], [(["a"], ["config[0]: expected float, got 'a' (str)"])]),
    "NewType": (Rate, [0.1], [("a", ["config: expected float, got 'a' (str)"])]),
    "Callable": (
        Callable[[int], int],
        [len, int, lambda: 0],
        [(3, ["config: expected Callable, got 3 (int)"])],
    ),
    "type[int]": (
        type[int],
        [int, bool],
        [
            (str, ["config: expected type[int], got <class 'str'> (type)"]),
            (3, ["config: expected type[int], got 3 (int)"]),
        ],
    ),
    "TypedDict": (
        Sized,
        [{"width": 1}, {"width": 1, "depth": 2}],
        [
            (3, ["config: expected Sized, got 3 (int)"]),
            (
                {"depth": "a", "widht": 2},
                [
                    "config/width: missing; expected int",
                    "config/depth: expected int, got 'a' (str)",
                    "config/widht: unknown key; did you mean width?",
                ],
            ),
        ],
    ),
    "TypedDict of typing_extensions": (
        Extended,
        [{"width": 1}, {"width": 1, "depth": 2}],
        [
            (
                {"depth": "a"},
                [
                    "config/width: missing; expected int",
                    "config/depth: expected int, got 'a' (str)",
                ],
            ),
        ],
    ),
    "TypedDict in itself": (
        {"optimizer": Optimizer},
        [{"optimizer": {"name": "sgd", "inner": {"name": "adam", "rate": 1}}}],
        [
            (
                {"optimizer": {"inner": {"name": None, "rate": "x"}}},
                [
                    "config/optimizer/name: missing; expected 'adam' or 'sgd'",
                    "config/optimizer/inner/name: expected 'adam' or 'sgd', got None",
                    "config/optimizer/inner/rate: expected float, got 'x' (str)",
                ],
            ),
        ],
    ),
    "dataclass": (
        [Schedule],
        [[{"name": "a"}, {"name": "a", "then": {"name": "b"}}, Schedule("a")]],
        [
            ([3], ["config[0]: expected Schedule, got 3 (int)"]),
            (
                [{"steps": [1.5], "seen": 1, "then": {"name": 3}}],
                [
                    "config[0]/name: missing; expected str",
                    "config[0]/steps[0]: expected int, got 1.5 (float)",
                    "config[0]/then/name: expected str, got 3 (int)",
                    "config[0]/seen: unknown key; it may have: name",
                ],
            ),
        ],
    ),
    "pydantic model": (
        Model,
        [{"width": 8}, {"width": 8, "rate": 1, "kind": "b"}, Model(width=8)],
        [
            (3, ["config: expected Model, got 3 (int)"]),
            ({}, ["config/width: missing"]),
            ({"width": True}, ["config/width: expected int, got True (bool)"]),
            ({"width": "8"}, ["config/width: expected int, got '8' (str)"]),
            ({"width": 9}, ["config/width: width is odd, got 9 (int)"]),
            (
                {"width": 4, "kind": "c", "rat": 1},
                [
                    "config/width: should be greater than or equal to 8, got 4 (int)",
                    "config/kind: expected 'a' or 'b', got 'c' (str)",
                    "config/rat: unknown key; did you mean rate?",
                ],
            ),
        ],
    ),
    "pydantic models in models": (
        {"pets": (None, Pets)},
        [
            {"pets": None},
            {"pets": {"first": {"kind": "cat", "lives": 9}, "any": ["a"], "s": 3}},
            {"pets": {"home": pathlib.Path("a")}},
        ],
        [
            ({"pets": 3}, ["config/pets: expected None or Pets, got 3 (int)"]),
            (
                {
                    "pets": {
                        "first": {"kind": "cat", "lives": "9"},
                        "others": [{"kind": "cat"}],
                        "any": 3.5,
                        "counts": {1: 1, "a": "b"},
                        "home": "a",
                    }
                },
                [
                    "config/pets/first/lives: expected int, got '9' (str)",
                    "config/pets/others[0]/lives: missing",
                    "config/pets/any: expected int or list or Cat, got 3.5 (float)",
                    "config/pets/counts[1]: expected str as its key, got 1 (int)",
                    "config/pets/counts/a: expected int, got 'b' (str)",
                    "config/pets/home: expected Path, got 'a' (str)",
                ],
            ),
            # Only the type that it resembles is told of.
            ({"pets": {"any": [3]}}, ["config/pets/any[0]: expected str, got 3 (int)"]),
            (
                {"pets": {"others": [{"kind": "cat", "lives": 9, "lifes": 9}]}},
                ["config/pets/others[0]/lifes: unknown key; did you mean lives?"],
            ),
        ],
    ),
    "pydantic model that allows more": (
        HoldsOpen,
        [{"inner": {"width": 1, "more": 2}}],
        [({"inner": {"more": 2}}, ["config/inner/width: missing"])],
    ),
}


def lines_of(error: HparamsError) -> list[str]:
    """Return the mismatches that an error tells, a line for each."""
    first, *others = error.message.split("\n  ")
    assert not others or first == f"config does not fit its structure in {len(others)} places"
    return others or [first]


@pytest.mark.parametrize("name", FORMS)
def test_what_fits_passes(name: str) -> None:
    """Each form takes what it should."""
    structure, right, _ = FORMS[name]
    for value in right:
        validate_structure(value, structure)


@pytest.mark.parametrize("name", FORMS)
def test_what_does_not_fit_is_named(name: str) -> None:
    """Each form refuses what it should: all mismatches at once, each with its place and words."""
    structure, _, wrong = FORMS[name]
    for value, lines in wrong:
        with pytest.raises(HparamsError) as caught:
            validate_structure(value, structure)
        assert lines_of(caught.value) == lines
        assert caught.value.hint is None


@pytest.mark.parametrize("name", FORMS)
def test_forms_nest(name: str) -> None:
    """Within lists, dictionaries and choices each form tells the same, at the place where it is."""
    structure, right, wrong = FORMS[name]
    nested = {"deep": [(None, {"x": structure})]}
    for value in right:
        validate_structure({"deep": [None, {"x": value}]}, nested)
    for value, lines in wrong:
        with pytest.raises(HparamsError) as caught:
            validate_structure({"deep": [None, {"x": value}]}, nested)
        place = "config/deep[1]/x"
        assert lines_of(caught.value) == [place + line.removeprefix("config") for line in lines]


def test_there_are_enough_cases() -> None:
    """At least 40 forms, each with what is right and, unless it takes anything, what is wrong."""
    assert len(FORMS) >= 40
    assert all(right for _, right, _ in FORMS.values())
    assert {name for name, (_, _, wrong) in FORMS.items() if not wrong} == {
        "Any",
        "Namespace",
        "object",
    }


CHAIN = {
    "chain": [{"path": str, "config": argparse.Namespace}],
    "optimizers": [
        {
            "links": [str],
            "kwargs": dict,
            "scheduler": (None, {"schedulers": [{"name": str, "kwargs": Any}], "out": dict}),
        }
    ],
    "training": {"batch_size": int, "max_epochs": int, "check_every": (None, int)},
}


def chain() -> dict[str, Any]:
    scheduler = {"schedulers": [{"name": "step", "kwargs": None}], "out": {}}
    return {
        "chain": [{"path": "a.py", "config": {"any": "thing"}}],
        "optimizers": [
            {"links": ["a", "b"], "kwargs": {"lr": 0.1}, "scheduler": None},
            {"links": ["c"], "kwargs": {}, "scheduler": scheduler},
        ],
        "training": {"batch_size": 8, "max_epochs": 3, "check_every": 1},
    }


def test_a_large_structure_tells_everything_at_once() -> None:
    """The first line counts, each other one names a place, what was expected and what came."""
    value = chain()
    validate_structure(value, CHAIN)
    value["chain"] = {"path": "a.py"}
    value["optimizers"][1]["links"][0] = 3
    value["optimizers"][1]["scheduler"]["schedulers"][0] = {"nme": "step", "kwargs": 1}
    value["training"] = {"batch_size": True, "max_epoch": 3, "check_every": "2"}
    with pytest.raises(HparamsError) as caught:
        validate_structure(value, CHAIN, "hparams['model']")
    assert caught.value.message.replace("hparams['model']", "model") == (
        "model does not fit its structure in 8 places\n"
        "  model/chain: expected list[dict], got {…} (dict)\n"
        "  model/optimizers[1]/links[0]: expected str, got 3 (int)\n"
        "  model/optimizers[1]/scheduler/schedulers[0]/name: missing; expected str\n"
        "  model/optimizers[1]/scheduler/schedulers[0]/nme: unknown key; did you mean name?\n"
        "  model/training/batch_size: expected int, got True (bool)\n"
        "  model/training/max_epochs: missing; expected int\n"
        "  model/training/check_every: expected None or int, got '2' (str)\n"
        "  model/training/max_epoch: unknown key; did you mean max_epochs?"
    )


def test_the_line_that_set_a_value_is_named() -> None:
    """Whoever knows the lines is asked for those of what is wrong, by key."""
    lines = {("a", 1, "b"): "hparams.py:3", ("c",): "high.py:5", ("d",): "high.py:7"}
    asked = []

    def line_of(key: tuple[Any, ...]) -> str | None:
        asked.append(key)
        return lines.get(key)

    structure = {"a": [{"b": int}], "c": int, "e": int}
    with pytest.raises(HparamsError) as caught:
        validate_structure(
            {"a": [{"b": 1}, {"b": "x"}], "d": 1, "e": "x"}, structure, line_of=line_of
        )
    assert lines_of(caught.value) == [
        "config/a[1]/b: expected int, got 'x' (str) at hparams.py:3",
        "config/c: missing at high.py:5; expected int",
        "config/e: expected int, got 'x' (str)",
        "config/d: unknown key at high.py:7; it may have: c",
    ]
    assert asked == [("a", 1, "b"), ("c",), ("e",), ("d",)]


def test_scripts_are_named() -> None:
    """That of the value where the value is wrong, that of the structure where that is."""
    with pytest.raises(
        HparamsError, match=r"^hparams.py: config/a: expected int, got 'x' \(str\)$"
    ):
        Structure.read({"a": int}, script="__main__.py").check({"a": "x"}, "hparams.py")
    with pytest.raises(
        HparamsError, match=r"^__main__.py: the structure of config/a: 3 \(int\) is"
    ):
        Structure.read({"a": 3}, script="__main__.py")


NO_STRUCTURES: dict[str, tuple[Any, str, str]] = {
    "a number": (
        {"a": 3},
        "/a: 3 (int) is a value, and no structure",
        "write int for any, or Literal[3] for this",
    ),
    "a text": (
        {"a": [{"b": "adam"}]},
        "/a[0]/b: 'adam' (str) is a value, and no structure",
        "write str for any, or Literal['adam'] for this",
    ),
    "a secret": (
        {"api_key": "hunter2"},
        "/api_key: *** (str) is a value, and no structure",
        "write str for any, or Literal[***] for this",
    ),
    "a float": (
        [0.5],
        "[0]: 0.5 (float) is a value, and no structure",
        "a structure is a dictionary of structures, [S], (S1, S2), a type, None or Any",
    ),
    "dots": (..., ": Ellipsis (ellipsis) is a value, and no structure", "a structure is"),
    "a qualifier": ({"a": Final[int]}, "/a: typing.Final[int] (_GenericAlias) is a value", ""),
    "a type variable": (TypeVar("T"), ": ~T (TypeVar) is a value, and no structure", ""),
    "a string in brackets": (list["int"], ": 'int' (str) is a value, and no structure", ""),
    "a list of two": (
        {"a": (None, [int, str])},
        "/a[1]: [int, str] has 2 structures, and a list has one for all its items",
        "write [(int, str)] if each item may be any of them, or tuple[int, str] for a tuple",
    ),
    "no choice": ({"a": ()}, "/a: () allows no value at all", "write tuple for any tuple"),
    "a type as key": (
        {"a": {str: int}},
        "/a: its key str is a type, and no key of a value",
        "write dict[str, float] where the keys may be any",
    ),
    "optional elsewhere": (
        {"a": [optional(int)]},
        "/a[0]: optional(…) is for the key of a dictionary",
        "write (None, S) for a value that may be None",
    ),
    "optional twice": (
        {"a": optional(optional(int))},
        "/a: optional(…) is for the key of a dictionary",
        "write (None, S)",
    ),
    "a protocol": ({"a": Runnable}, "/a: Runnable cannot tell its instances: ", ""),
    "a name that is not there": (
        TypedDict("Lost", {"a": "Nowhere"}),  # type: ignore[name-defined] # noqa: F821
        ": the annotations of Lost: name 'Nowhere' is not defined",
        "",
    ),
}


@pytest.mark.parametrize("name", NO_STRUCTURES)
def test_a_wrong_structure_is_an_error_of_its_own(name: str) -> None:
    """It says where in the structure, whatever the value is, and what to write instead."""
    structure, problem, hint = NO_STRUCTURES[name]
    with pytest.raises(HparamsError) as caught:
        validate_structure(None, structure)
    assert caught.value.message.startswith(f"the structure of config{problem}")
    assert (caught.value.hint or "").startswith(hint)


def test_circles_are_named() -> None:
    """Neither a structure nor a value may contain itself."""
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(HparamsError, match=r"^the structure of config contains itself$"):
        validate_structure([], circle)
    value: Any = {"name": "sgd"}
    value["inner"] = value
    with pytest.raises(HparamsError, match=r"^config contains itself"):
        validate_structure(value, Optimizer)
    validate_structure(circle, list)


def test_secrets_are_not_shown() -> None:
    """What stands under a secret name, in a dictionary or as the password of a URL is masked."""
    value = {"api_key": b"hunter2", "url": "https://me:hunter2@host", "a": [{"token": "hunter2"}]}
    with pytest.raises(HparamsError) as caught:
        validate_structure(value, {"api_key": str, "url": int, "a": int})
    assert "hunter2" not in str(caught.value)
    assert lines_of(caught.value)[0] == "config/api_key: expected str, got *** (bytes)"


def test_a_long_list_is_cut_short() -> None:
    """Beyond a hundred wrong items of a list the rest is counted."""
    with pytest.raises(HparamsError) as caught:
        validate_structure({"a": ["x", *range(1000)]}, {"a": [str]})
    first, *lines = caught.value.message.split("\n  ")
    assert first == "config does not fit its structure in 1000 places"
    assert lines[0] == "config/a[1]: expected str, got 0 (int)"
    assert lines[99:] == [
        "config/a[100]: expected str, got 99 (int)",
        "config/a: 900 more of its items do not fit",
    ]


def test_each_mismatch_is_one_line() -> None:
    """Whatever the value looks like."""
    import numpy as np

    for value in (
        np.zeros((2, 2)),
        np.zeros((30, 30)),
        "a\nb" * 100,
        collections.defaultdict(int, a=1),
    ):
        with pytest.raises(HparamsError) as caught:
            validate_structure(value, int)
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 120


def test_numpys_numbers_are_told_apart() -> None:
    """Its float64 is a float of Python, all others are not."""
    import numpy as np

    validate_structure(np.float64(1), float)
    with pytest.raises(HparamsError, match=r"expected int, got .*64"):
        validate_structure(np.int64(1), int)


def test_the_value_stays_as_it_is() -> None:
    """Nothing is changed, converted, filled in or used up, not even by a validator of a model."""
    value = {"old": 1, "width": 2, "sizes": [1, 2]}
    before = copy.deepcopy(value)
    validate_structure(value, Popping)
    assert value == before
    items = iter([1, 2])
    validate_structure({"a": items}, {"a": Iterable[str]})
    assert list(items) == [1, 2]
    given = {"width": 8}
    validate_structure(given, Model)
    assert given == {"width": 8}


def test_an_old_pydantic_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.12 it cannot be asked to refuse unknown keys."""
    monkeypatch.setattr(pydantic, "VERSION", "2.9.2")
    with pytest.raises(HparamsError, match=r"/a: Model needs pydantic 2.12 or later"):
        validate_structure({}, {"a": Model})


def test_nothing_heavy_is_imported() -> None:
    """Neither pydantic nor torch, for structures that name neither."""
    code = (
        "import sys; from torch_lab.structures import *; validate_structure({'a': 1}, {'a': int});"
        "print({'pydantic', 'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Generated values.

LEAVES = (0, -3, 0.5, 1e-3, "adam", "", True, False, None, pathlib.Path("a"), Mode.MIN, b"x")


class Foreign:
    """What no structure expects."""


def generated(rng: random.Random, depth: int = 0) -> Any:
    """Return a nested value; what is in a list is alike, or leaves."""
    kind = rng.choice(["leaf", "dict", "dict", "list"]) if depth < 3 else "leaf"
    count = rng.randint(0, 4)
    if kind == "dict":
        names = rng.sample(["alpha", "beta/x", "gamma", 4, "delta", ("e", 1)], count)
        return {name: generated(rng, depth + 1) for name in names}
    if kind == "list":
        item = generated(rng, depth + 1)
        nested = isinstance(item, (dict, list))
        return [copy.deepcopy(item) if nested else rng.choice(LEAVES) for _ in range(count)]
    return rng.choice(LEAVES)


def inferred(value: Any, rng: random.Random, wrap: Callable[[Any], Any]) -> Any:
    """Return a structure of `value`, of forms by chance; `wrap` is put around those of keys."""
    if isinstance(value, dict):
        return {name: wrap(inferred(inner, rng, wrap)) for name, inner in value.items()}
    if isinstance(value, list):
        choices = [inferred(item, rng, wrap) for item in value]
        nested = any(isinstance(item, (dict, list)) for item in value)
        return [choices[0] if nested else tuple(choices)] if choices else rng.choice([[], list])
    if value is None:
        return rng.choice([None, type(None), int | None])
    kind = type(value)
    forms = [kind, (None, kind), kind | None, Annotated[kind, "x"], Literal[value]]
    return rng.choice([*forms, float] if kind is int else forms)


def places(value: Any, key: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the keys of all that is in `value`."""
    inner = enumerate(value) if isinstance(value, list) else value.items()
    found = []
    for part, item in inner:
        own = (*key, part)
        found += [own, *(places(item, own) if isinstance(item, (dict, list)) else [])]
    return found


def container(value: Any, key: tuple[Any, ...]) -> Any:
    for part in key[:-1]:
        value = value[part]
    return value


@pytest.mark.parametrize("seed", range(5))
def test_generated_values_fit_their_own_structure(seed: int) -> None:
    """What is then replaced, removed or added at any place is found there, and nothing else is."""
    rng = random.Random(seed)
    for _ in range(60):
        value = {"all": generated(rng)}
        must_be_there = rng.random() < 0.5
        given = inferred(value, rng, (lambda form: form) if must_be_there else optional)
        structure = Structure.read(given)
        assert structure.mismatches(value) == []
        for key in places(value):
            changed = copy.deepcopy(value)
            container(changed, key)[key[-1]] = Foreign()
            assert [each.key for each in structure.mismatches(changed)] == [key]
            if isinstance(container(value, key), dict):
                changed = copy.deepcopy(value)
                del container(changed, key)[key[-1]]
                missing = [each.key for each in structure.mismatches(changed)]
                assert missing == ([key] if must_be_there else [])
                container(changed, key)["new"] = 1
                found = [each.key for each in structure.mismatches(changed)]
                assert found == [*missing, (*key[:-1], "new")]


# In experiments.

STRUCTURE = """
from torch_lab.structures import optional

config_structure = {"lr": float, "layers": [{"width": int}], "monitor": optional(str)}
"""


def with_structure(lab: Lab, structure: str, config: object) -> None:
    lab.write("__main__.py", CONFIG + structure)
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1}}, "config": config})


@pytest.mark.parametrize("command", ["train", "infer"])
def test_config_is_checked_before_anything_starts(lab: Lab, command: str) -> None:
    """All that does not fit `config_structure` is told at once, and nothing is created."""
    with_structure(lab, STRUCTURE, {"lr": "0.1", "layers": [{"width": 8}, {"widht": 3}]})
    result = getattr(lab, command)(lab.path)
    assert result.code == 2
    assert result.err.endswith(
        "error: toys/experiments/00_toy/hparams.py: config does not fit its structure in 3 places\n"
        "  config/lr: expected float, got '0.1' (str) at toys/experiments/00_toy/hparams.py:1\n"
        "  config/layers[1]/width: missing at toys/experiments/00_toy/hparams.py:1; expected int\n"
        "  config/layers[1]/widht: unknown key at toys/experiments/00_toy/hparams.py:1; "
        "did you mean width?\n"
    )
    assert not lab.runs


def test_what_fits_is_trained(lab: Lab) -> None:
    """Also in a dev run, which adds `num_workers` to `config`."""
    with_structure(lab, STRUCTURE, {"lr": 0.1, "layers": [{"width": 8}]})
    result = lab.train(lab.path, "--dev-run", "1")
    assert result.code == 0, result.err


def test_a_typed_dict_in_the_config_script(lab: Lab) -> None:
    """Its annotations may be strings, as `from __future__ import annotations` makes them."""
    structure = (
        "import typing\n\n\nclass Config(typing.TypedDict):\n    lr: 'Rate'\n"
        "    warm: 'typing.NotRequired[int]'\n\n\nRate = float\nconfig_structure = Config\n"
    )
    with_structure(lab, structure, {"lr": "fast"})
    result = lab.train(lab.path)
    assert result.code == 2
    assert "hparams.py: config/lr: expected float, got 'fast' (str)" in result.err
    assert "warm" not in result.err


def test_a_wrong_structure_names_the_config_script(lab: Lab) -> None:
    """It is that script that has to be mended."""
    with_structure(lab, 'config_structure = {"lr": [int, float]}\n', {"lr": 0.1})
    result = lab.train(lab.path)
    assert result.code == 2
    assert "__main__.py: the structure of config/lr: [int, float] has 2 structures" in result.err
