"""Hparams that were edited on a server, where all are strings: typed again, and checked."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch_lab.errors import HparamsError, did_you_mean
from torch_lab.redaction import MASK, masked
from torch_lab.runs import decoded, encoded
from torch_lab.task_record import HPARAMS, value_of
from torch_lab.utils import flattened

__all__ = ["edited"]

_MISSING: Final = object()
_NO_LITERAL: Final = object()
_EXPECTED: Final = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    list: "a list, like [1, 2]",
    tuple: "a tuple, like (1, 2)",
    dict: "a dictionary, like {'a': 1}",
    set: "a set, like {1, 2}",
}


def edited(
    given: Mapping[str, Any], original: Mapping[str, Any], shown: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the hparams that a task shows, in their types, and what the script has else, in lines.

    What is as it was keeps its value: that of the script where a record cannot hold it, as a
    secret or an object.

    Args:
        given: The hparams of the script.
        original: Those that the task was made with.
        shown: What it shows now: strings by the paths of the keys.

    Raises:
        HparamsError: A value has another type than before, or a key was added or removed.
    """
    left, result = dict(shown), _copied(given)
    for keys, before in _leaves(original):
        name = "/".join(map(str, keys))
        text = left.pop(name, None)
        if text is None:
            raise HparamsError(
                f"{HPARAMS}/{name} was removed from the task",
                "give it a value; a task cannot do without one of its hparams",
            )
        if text == value_of(before):
            _keep(result, keys, before)
        else:
            if _is_object(keys, _at(given, keys)):
                raise _no_literal(name, before)
            _put(result, keys, _typed(text, before, name))
    if left:
        name = next(iter(left))
        known = ["/".join(map(str, keys)) for keys, _ in _leaves(original)]
        raise HparamsError(
            f"{HPARAMS}/{name} was added to the task, but there is no such key"
            f"{did_you_mean(name, known)}",
            "add keys in the hparams script, and queue it again",
        )
    return result, _differences(given, result)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    own, other = (flattened(decoded(masked(encoded(each)))) for each in (dict(before), dict(now)))
    return [
        f"{key} {own.get(key, 'nothing')!r} -> {other[key]!r}"
        for key in other
        if key not in own or own[key] != other[key]
    ]


def _copied(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a copy of nested dictionaries; what is in them is not copied."""
    return {
        key: _copied(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }


def _leaves(
    values: Mapping[Any, Any], above: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    # An empty dictionary is shown as a value, as `task_record.parameters` does.
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _keep(result: dict[Any, Any], keys: tuple[Any, ...], before: Any) -> None:
    now = _at(result, keys)
    if now is _MISSING or not _cannot_be_recorded(keys, now):
        _put(result, keys, before)


def _cannot_be_recorded(keys: tuple[Any, ...], value: Any) -> bool:
    """Return whether only the script has the value: it is a secret, an object, or full of such."""
    return MASK in _record_of(keys, value) or _is_object(keys, value)


def _is_object(keys: tuple[Any, ...], value: Any) -> bool:
    return value is not _MISSING and '"__type__": "repr"' in _record_of(keys, value)


def _record_of(keys: tuple[Any, ...], value: Any) -> str:
    """Return the value as a record has it; what it stands under says whether it is a secret."""
    for key in reversed(keys):
        value = {key: value}
    return json.dumps(masked(encoded(value)))


def _at(values: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return _MISSING
        values = values[key]
    return values


def _put(values: dict[Any, Any], keys: tuple[Any, ...], value: Any) -> None:
    for key in keys[:-1]:
        below = values.get(key)
        values[key] = values = below if isinstance(below, dict) else {}
    values[keys[-1]] = value


def _no_literal(name: str, before: Any) -> HparamsError:
    return HparamsError(
        f"{HPARAMS}/{name} is an object of the script, which cannot be edited in the task",
        f"leave it as it was: {value_of(before)}",
    )


def _typed(text: str, before: Any, name: str) -> Any:
    """Return what `text` says in the type of `before`.

    Raises:
        HparamsError: It is of another type.
    """
    if isinstance(before, (str, Path)):
        return type(before)(text)
    value = _literal(text)
    if before is None:
        return text if value is _NO_LITERAL else value
    kind = type(before)
    if kind not in _EXPECTED:
        raise _no_literal(name, before)
    found = _as(kind, value)
    if found is _MISSING or not _has_items_of(before, found):
        raise HparamsError(
            f"{HPARAMS}/{name} is {text!r}: expected {_EXPECTED[kind]}",
            f"it was {value_of(before)}",
        )
    return found


def _literal(text: str) -> Any:
    stripped = text.strip()
    words: dict[str, Any] = {"": None, "true": True, "false": False, "none": None}
    if stripped.lower() in words:
        return words[stripped.lower()]
    try:
        return ast.literal_eval(stripped)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        return float(stripped)  # Of what Python has no literals: inf and nan.
    except ValueError:
        return _NO_LITERAL


def _as(kind: type, value: Any) -> Any:
    """Return `value` as one of `kind`, if it is one; an int is a float as well, a list a tuple."""
    if type(value) is kind:
        return value
    serves: dict[type, tuple[type, Callable[[Any], Any]]] = {
        float: (int, float),
        list: (tuple, list),
        tuple: (list, tuple),
    }
    other, convert = serves.get(kind, (kind, kind))
    return convert(value) if type(value) is other else _MISSING


def _has_items_of(before: Any, now: Any) -> bool:
    """Return whether the items of a list are of the one type that they were of before."""
    if not isinstance(before, (list, tuple, set)) or not before:
        return True
    kinds = {type(item) for item in before}
    if len(kinds) > 1:
        return True
    kinds |= {int} if float in kinds else set()
    return kinds.isdisjoint({*_EXPECTED, str}) or all(type(item) in kinds for item in now)
