"""A pydantic model as a form: it checks itself, and its errors are told as all others are.

pydantic is no dependency: who gives a model has it, and has imported it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from torch_lab.errors import did_you_mean
from torch_lab.forms import Mismatch, described
from torch_lab.provenance import Key, copied

__all__ = ["Model", "is_model", "is_too_old"]

_EXPECTED: Final = re.compile(r"Input should be (?!greater|less)(.*)")
_PREFIX: Final = re.compile(r"^(Value error, |Assertion failed, |Input )")
_WORDS: Final = {
    "bool_type": "bool",
    "bytes_type": "bytes",
    "dict_type": "dict",
    "float_type": "float",
    "frozen_set_type": "frozenset",
    "int_type": "int",
    "list_type": "list",
    "none_required": "None",
    "set_type": "set",
    "string_type": "str",
    "tuple_type": "tuple",
}
"""What pydantic expected when it reports an error of a type."""


def is_model(kind: type) -> bool:
    """Return whether a class is a pydantic model."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and issubclass(kind, pydantic.BaseModel)


def is_too_old() -> bool:
    """Return whether pydantic is older than 2.12, which is the first to refuse unknown keys."""
    return tuple(map(int, sys.modules["pydantic"].VERSION.split(".")[:2])) < (2, 12)


@dataclass(frozen=True)
class Model:
    """What a pydantic model asks of a dictionary, in strict mode.

    Keys that it does not know are refused, unless it, or a model in it, allows or ignores them
    in its `model_config`: then each does as it says.

    Args:
        kind: The model's class.
    """

    kind: Any

    @property
    def words(self) -> str:
        return str(self.kind.__name__)

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        pydantic: Any = sys.modules["pydantic"]
        models = list(_models_in(self.kind, []))
        decides = any(model.model_config.get("extra", "forbid") != "forbid" for model in models)
        extra = {} if decides else {"extra": "forbid"}
        known = {name for model in models for name in _names_of(model)}
        try:
            # A validator of the model may change what it gets.
            self.kind.model_validate(copied(value), strict=True, **extra)
        except pydantic.ValidationError as error:
            errors = [_Error.of(each, value) for each in error.errors(include_url=False)]
            for place, same in _by_place(errors).items():
                yield _mismatch((*key, *place), same, known)


def _models_in(annotation: Any, seen: list[Any]) -> Iterator[Any]:
    """Yield the models that a type names, and those that their fields name."""
    if isinstance(annotation, type) and is_model(annotation) and annotation not in seen:
        seen.append(annotation)
        yield annotation
        for each in annotation.model_fields.values():  # type: ignore[attr-defined]
            yield from _models_in(each.annotation, seen)
    for part in get_args(annotation):
        yield from _models_in(part, seen)


def _names_of(model: Any) -> Iterator[str]:
    for name, each in model.model_fields.items():
        yield each.validation_alias if isinstance(each.validation_alias, str) else name


@dataclass(frozen=True)
class _Error:
    """An error of pydantic, with its place in the value."""

    kind: str
    place: Key
    choice_at: Key | None
    """Where there may be several types, of which the error concerns one."""
    expected: str
    """What was expected; empty where the problem is another one."""
    problem: str
    given: Any

    @classmethod
    def of(cls, error: Mapping[str, Any], value: Any) -> _Error:
        kind, context = error["type"], error.get("ctx", {})
        place, choice_at = _place_of(error["loc"], value)
        if kind == "missing":
            place = (*place, error["loc"][-1])
        known = context.get("class") if kind == "is_instance_of" else context.get("class_name")
        known = _WORDS.get(kind) or known
        expected = known or (_EXPECTED.match(error["msg"]) or [""] * 2)[1]
        if error["loc"][-1:] == ("[key]",):
            expected += " as its key"
        problem = _PREFIX.sub("", error["msg"])
        return cls(kind, place, choice_at, expected, problem, error["input"])


def _place_of(location: Iterable[Any], value: Any) -> tuple[Key, Key | None]:
    """Return the place that a location means, and where a choice among types was made, if at all.

    Between keys and indices pydantic puts the names of the types that it tries.
    """
    place: Key = ()
    choice_at = None
    for part in location:
        is_index = isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value)
        if is_index or (isinstance(value, dict) and part in value):
            place, value = (*place, part), value[part]
        elif isinstance(part, str) and choice_at is None:
            choice_at = place
    return place, choice_at


def _by_place(errors: Iterable[_Error]) -> dict[Key, list[_Error]]:
    """Return the errors of each place, without those of types that the value hardly resembles."""
    entered = {each.choice_at for each in errors if each.choice_at != each.place}
    found: dict[Key, list[_Error]] = {}
    for each in errors:
        if each.choice_at != each.place or each.place not in entered:
            found.setdefault(each.place, []).append(each)
    return found


def _mismatch(key: Key, errors: Sequence[_Error], known: Collection[str]) -> Mismatch:
    first = errors[0]
    if first.kind == "missing":
        return Mismatch(key, "missing")
    if first.kind == "extra_forbidden":
        return Mismatch(key, "unknown key", did_you_mean(str(key[-1]), known))
    expected = " or ".join(dict.fromkeys(each.expected for each in errors if each.expected))
    problems = [f"expected {expected}"] if expected else []
    problems += [each.problem for each in errors if not each.expected]
    told = f"{'; '.join(problems)}, got {described(first.given, key)}"
    return Mismatch(key, told, is_whole=first.kind in {*_WORDS, "model_type"})
