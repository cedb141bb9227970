"""Structures: what a value should look like, in plain Python, and every place where it does not.

```python
config_structure = {
    "learning_rate": float,
    "milestones": [int],
    "schedule": (None, {"name": str, "warmup": optional(int)}),
}
```

A structure is read once, into a tree of forms. One engine serves all that can be written, also
`list[int]`, `TypedDict` and dataclasses. It is not pydantic's, which was tried first: on Python
3.11 that refuses the standard library's `TypedDict`, it takes `True` for `Literal[1]` even when it
is strict, keys of its dictionaries are strings alone, and what fits no type of a union is told once
for each of them. To mend that takes more code than to do without, and whoever checks a structure
would wait for its import. A pydantic model is welcome all the same: it checks itself.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args, get_origin

from torch_lab.errors import HparamsError
from torch_lab.forms import (
    Anything,
    Entries,
    Form,
    Instance,
    Items,
    Keys,
    Mismatch,
    Named,
    Nothing,
    OneOf,
    OneValue,
    Row,
    Subclass,
    described,
    place_in,
)
from torch_lab.provenance import Key
from torch_lab.pydantic_models import Model, is_model, is_too_old

__all__ = ["LineOf", "Structure", "optional", "validate_structure"]

LineOf: TypeAlias = Callable[[Key], str | None]
"""Returns the `file:line` that set the value at a key, if that is known."""

_FORMS: Final = "a structure is a dictionary of structures, [S], (S1, S2), a type, None or Any"
_QUALIFIERS: Final = ("Required", "NotRequired", "ReadOnly")


def validate_structure(
    value: object, structure: object, name: str = "config", *, line_of: LineOf | None = None
) -> None:
    """Check that a value has a structure; the value stays as it is.

    Args:
        value: What to check.
        structure: What it should look like: a dictionary of structures, `[S]`, `(S1, S2)` for any
            of them, a type, `None`, `Any`, or a `TypedDict`, a dataclass or a pydantic model.
        name: What errors call the value.
        line_of: Tells which line set the value at a key, such as `("optimizers", 1, "lr")`.

    Raises:
        HparamsError: The value does not fit, with each place where it does not; or the structure
            itself is wrong.
    """
    Structure.read(structure, name).check(value, line_of=line_of)


def optional(structure: object) -> Any:
    """Return `structure` for a key that may be missing."""
    return _MayBeMissing(structure)


@dataclass(frozen=True)
class Structure:
    """What a value should look like."""

    name: str
    """What errors call the value."""
    form: Form = field(repr=False)

    @classmethod
    def read(cls, given: object, name: str = "config", script: str | None = None) -> Structure:
        """Return the structure that is written as `given`.

        Args:
            given: A structure, as `validate_structure` takes it.
            name: What errors call the value.
            script: The script that holds `given`, for errors to name.

        Raises:
            HparamsError: It is no structure.
        """
        reader = _Reader(f"{_in_front(script)}the structure of {name}")
        try:
            return cls(name, reader.form(given, ()))
        except RecursionError:
            raise HparamsError(
                f"{reader.name} contains itself", "a TypedDict and a dataclass may name themselves"
            ) from None

    def mismatches(self, value: object) -> list[Mismatch]:
        """Return every place where `value` does not fit.

        Raises:
            HparamsError: The value contains itself.
        """
        try:
            return list(self.form.mismatches(value, ()))
        except RecursionError:
            raise HparamsError(f"{self.name} contains itself, or is nested too deeply") from None

    def check(
        self, value: object, script: str | None = None, line_of: LineOf | None = None
    ) -> None:
        """Check that `value` fits.

        Args:
            value: What to check.
            script: The script that holds the value, for errors to name.
            line_of: Tells which line set the value at a key.

        Raises:
            HparamsError: It does not fit, with each place where it does not.
        """
        found = self.mismatches(value)
        lines = [each.told(self.name, line_of(each.key) if line_of else None) for each in found]
        if len(lines) > 1:
            count = sum(each.count for each in found)
            first = f"{self.name} does not fit its structure in {count} places"
            raise HparamsError(_in_front(script) + "\n  ".join([first, *lines]))
        if lines:
            raise HparamsError(_in_front(script) + lines[0])


@dataclass(frozen=True)
class _MayBeMissing:
    structure: object


def _in_front(script: str | None) -> str:
    return f"{script}: " if script else ""


class _Reader:
    """Reads structures.

    Args:
        name: What errors call the structure.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._named: dict[object, Named] = {}

    def error(self, key: Key, problem: str, advice: str | None = None) -> HparamsError:
        return HparamsError(f"{place_in(self.name, key)}: {problem}", advice)

    def form(self, given: Any, key: Key) -> Form:
        """Return what is asked by the structure `given`, which is at `key`."""
        match given:
            case dict():
                return self._keys(given, key)
            case list():
                return self._list(given, key)
            case tuple():
                return self._any_of(given, key)
            case None | types.NoneType:
                return Nothing()
        if given is Any or _is_namespace(given):
            return Anything()
        if (origin := get_origin(given)) is not None:
            return self._generic(given, origin, key)
        if isinstance(given, type):
            return self._class(given, key)
        return self._alias(given, key)

    # Plain Python.

    def _keys(self, given: dict[Any, Any], key: Key) -> Form:
        for name in given:
            if isinstance(name, type) or name is Any:
                raise self.error(
                    key,
                    f"its key {getattr(name, '__name__', name)} is a type, and no key of a value",
                    "write dict[str, float] where the keys may be any",
                )
        return Keys({name: self._entry(inner, (*key, name)) for name, inner in given.items()})

    def _entry(self, given: Any, key: Key) -> tuple[Form, bool]:
        if isinstance(given, _MayBeMissing):
            return self.form(given.structure, key), False
        return self.form(given, key), True

    def _list(self, given: list[Any], key: Key) -> Form:
        forms = [self.form(item, (*key, index)) for index, item in enumerate(given)]
        if len(forms) > 1:
            words = ", ".join(form.words for form in forms)
            raise self.error(
                key,
                f"[{words}] has {len(forms)} structures, and a list has one for all its items",
                f"write [({words})] if each item may be any of them, or tuple[{words}] for a tuple",
            )
        return Items(list, forms[0]) if forms else Instance(list)

    def _any_of(self, given: Iterable[Any], key: Key) -> Form:
        forms = [self.form(choice, (*key, index)) for index, choice in enumerate(given)]
        if not forms:
            raise self.error(key, "() allows no value at all", "write tuple for any tuple")
        choices: list[Form] = []
        for form in forms:
            choices += form.choices if isinstance(form, OneOf) else [form]
        return OneOf(tuple(choices)) if len(choices) > 1 else choices[0]

    # Types.

    def _generic(self, given: Any, origin: Any, key: Key) -> Form:
        arguments = get_args(given)
        if origin is Annotated:  # Who does not know what is annotated shall pass it over.
            return self.form(arguments[0], key)
        if origin in (typing.Union, types.UnionType):
            return self._any_of(arguments, key)
        if origin is Literal:
            return OneValue(arguments)
        if not isinstance(origin, type):
            raise self._no_structure(given, key)
        if origin is tuple and (arguments or given == tuple[()]):
            return self._tuple(arguments, key)
        if origin is type and arguments and isinstance(arguments[0], type):
            return Subclass(arguments[0])
        is_known = origin.__module__ in ("builtins", "collections", "collections.abc")
        if is_known and issubclass(origin, Mapping) and len(arguments) == 2:
            names, items = (self.form(each, key) for each in arguments)
            return Entries(origin, names, items)
        if is_known and issubclass(origin, Iterable) and len(arguments) == 1:
            return Items(origin, self.form(arguments[0], key))
        return self._class(origin, key)

    def _tuple(self, arguments: tuple[Any, ...], key: Key) -> Form:
        if len(arguments) == 2 and arguments[1] is ...:
            return Items(tuple, self.form(arguments[0], key))
        return Row(tuple(self.form(each, key) for each in arguments))

    def _class(self, given: type, key: Key) -> Form:
        if given in self._named:
            return self._named[given]
        if is_model(given):
            if is_too_old():
                raise self.error(key, f"{given.__name__} needs pydantic 2.12 or later")
            return Model(given)
        if hasattr(given, "__required_keys__") and issubclass(given, dict):
            return self._typed_dict(given, key)
        if dataclasses.is_dataclass(given):
            return self._dataclass(given, key)
        try:
            isinstance(None, given)
        except TypeError as error:
            raise self.error(key, f"{given.__name__} cannot tell its instances: {error}") from None
        return Instance(given)

    def _typed_dict(self, given: Any, key: Key) -> Form:
        named = self._named[given] = Named(given.__name__)
        keys = {}
        for name, hint in self._hints(given, key).items():
            inner, is_required = _unqualified(hint, name in given.__required_keys__)
            keys[name] = self.form(inner, (*key, name)), is_required
        named.form = Keys(keys, given.__name__)
        return named

    def _dataclass(self, given: Any, key: Key) -> Form:
        named = self._named[given] = Named(given.__name__)
        hints = self._hints(given, key)
        keys = {}
        for each in dataclasses.fields(given):
            is_required = each.default is each.default_factory is dataclasses.MISSING
            if each.init:
                keys[each.name] = self.form(hints[each.name], (*key, each.name)), is_required
        named.form = Keys(keys, given.__name__, given)
        return named

    def _hints(self, given: type, key: Key) -> dict[str, Any]:
        try:
            return typing.get_type_hints(given, include_extras=True)
        except (NameError, TypeError, SyntaxError) as error:
            raise self.error(key, f"the annotations of {given.__name__}: {error}") from None

    def _alias(self, given: Any, key: Key) -> Form:
        """Return the form of what stands for a type: `type Rate = float`, or a `NewType`."""
        for attribute in ("__value__", "__supertype__"):
            if hasattr(given, attribute):
                return self.form(getattr(given, attribute), key)
        raise self._no_structure(given, key)

    def _no_structure(self, given: object, key: Key) -> HparamsError:
        if isinstance(given, _MayBeMissing):
            return self.error(
                key,
                "optional(…) is for the key of a dictionary",
                "write (None, S) for a value that may be None",
            )
        advice, words = _FORMS, described(given, key)
        if type(given) in (str, bytes, int, bool):
            kind = type(given).__name__
            advice = (
                f"write {kind} for any, or Literal[{words.removesuffix(f' ({kind})')}] for this"
            )
        return self.error(key, f"{words} is a value, and no structure", advice)


def _unqualified(hint: Any, is_required: bool) -> tuple[Any, bool]:
    """Return the type of a key without `Required` and the like, and whether it is required.

    Args:
        hint: The type.
        is_required: What its class takes it for; it does not read annotations that are strings.
    """
    while (qualifier := getattr(get_origin(hint), "_name", None)) in _QUALIFIERS:
        is_required = {"Required": True, "NotRequired": False}.get(qualifier, is_required)
        hint = get_args(hint)[0]
    return hint, is_required


def _is_namespace(given: object) -> bool:
    import argparse

    return given is argparse.Namespace
