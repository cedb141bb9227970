"""Forms: what is asked of a value, and every place in it that does not fit.

A tree of forms is what a structure is once it has been read; see `torch_lab.structures`.
"""

from __future__ import annotations

import numbers
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from torch_lab.errors import did_you_mean, listed
from torch_lab.provenance import Key
from torch_lab.redaction import MASK, is_secret, masked_text

__all__ = [
    "Anything",
    "Entries",
    "Form",
    "Instance",
    "Items",
    "Keys",
    "Mismatch",
    "Named",
    "Nothing",
    "OneOf",
    "OneValue",
    "Row",
    "Subclass",
    "described",
    "place_in",
]

_MOST_ITEMS: Final = 100
"""How many wrong items of one list are told one by one."""
_NUMBERS: Final = {int, float, complex, *(getattr(numbers, name) for name in numbers.__all__)}
"""Kinds that a bool is not, whatever `isinstance` says."""
_SERVING: Final[Mapping[type, tuple[type, ...]]] = {float: (int,), complex: (int, float)}
"""What serves as a number of another kind."""
_PLAIN_KEY: Final = re.compile(r"[^\W\d][\w.-]*")


@dataclass(frozen=True)
class Mismatch:
    """A place where a value does not fit its structure."""

    key: Key
    """The place, from the checked value on."""
    problem: str
    """What was expected there and what came; or that it is missing, or unknown."""
    advice: str = ""
    is_whole: bool = field(default=False, repr=False)
    """Whether something else altogether is there, so that nothing in it was looked at."""
    is_other_value: bool = field(default=False, repr=False)
    """Whether one of several values was expected, and it is none of them."""
    count: int = 1
    """For how many places it stands."""

    def told(self, name: str, line: str | None = None) -> str:
        """Return the mismatch in one line.

        Args:
            name: What the checked value is called.
            line: The `file:line` that set what is there, or that left out what is missing.
        """
        at = f" at {line}" if line else ""
        return f"{place_in(name, self.key)}: {self.problem}{at}{self.advice}"


def place_in(name: str, key: Key) -> str:
    """Return a place as errors show it: `config/optimizers[1]/links[0]`."""
    return name + "".join(
        f"/{part}" if isinstance(part, str) and _PLAIN_KEY.fullmatch(part) else f"[{part!r}]"
        for part in key
    )


# What came.


class _Short(reprlib.Repr):
    """Shows values in a few words, and never what is in a dictionary: there may be secrets."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 50

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        return "{…}" if x else "{}"


def described(value: object, key: Key = ()) -> str:
    """Return a value with its type, in a few words; a secret is masked.

    Args:
        value: The value.
        key: Where it is: that says what is a secret.
    """
    if value is None:
        return "None"
    is_hidden = any(isinstance(part, str) and is_secret(part) for part in key)
    words = MASK if is_hidden else masked_text(_Short().repr(value))
    return f"{' '.join(words.split())} ({type(value).__name__})"


def _unknown(
    part: object, key: Key, known: Iterable[object], given: Collection[object]
) -> Mismatch:
    """Return that the dictionary at `key` has the unknown key `part` among those `given`."""
    choices = [name for name in known if name not in given]
    words = [name for name in choices if isinstance(name, str)]
    advice = did_you_mean(part, words) if isinstance(part, str) else ""
    if not advice and choices:
        advice = f"; it may have: {listed(choices, most=8)}"
    return Mismatch((*key, part), "unknown key", advice)


def _other(value: object, key: Key, expected: str, **more: Any) -> Mismatch:
    """Return that something else is at `key`."""
    problem = f"expected {expected}, got {described(value, key)}"
    return Mismatch(key, problem, is_whole=True, **more)


# What is asked.


class Form(Protocol):
    """What is asked of a value."""

    @property
    def words(self) -> str:
        """What errors say was expected, as one would write it in Python."""

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        """Yield where `value`, which is at `key`, does not fit."""


@dataclass(frozen=True)
class Anything:
    """Whatever there is."""

    words: str = "anything"

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        return iter(())


@dataclass(frozen=True)
class Nothing:
    """None."""

    words: str = "None"

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        if value is not None:
            yield _other(value, key, self.words)


@dataclass(frozen=True)
class Instance:
    """A value of a class: a bool is no int, an int serves as a float."""

    kind: type

    @property
    def words(self) -> str:
        return self.kind.__name__

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        is_bool = isinstance(value, bool) and self.kind in _NUMBERS
        if is_bool or not isinstance(value, (self.kind, *_SERVING.get(self.kind, ()))):
            yield _other(value, key, self.words)


@dataclass(frozen=True)
class Subclass:
    """A class itself."""

    base: type

    @property
    def words(self) -> str:
        return f"type[{self.base.__name__}]"

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        if not (isinstance(value, type) and issubclass(value, self.base)):
            yield _other(value, key, self.words)


@dataclass(frozen=True)
class OneValue:
    """One of several values."""

    values: tuple[Any, ...]

    @property
    def words(self) -> str:
        return _joined([self])

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        # True == 1, but a bool is no int.
        if not any(type(value) is type(known) and value == known for known in self.values):
            words = [known for known in self.values if isinstance(known, str)]
            near = did_you_mean(value, words) if isinstance(value, str) else ""
            yield _other(value, key, self.words, advice=near, is_other_value=True)


@dataclass(frozen=True)
class Items:
    """Any number of items, all of one form."""

    kind: type
    item: Form

    @property
    def words(self) -> str:
        more = ", ..." if self.kind is tuple else ""
        return f"{self.kind.__name__}[{_within(self.item)}{more}]"

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        if not isinstance(value, self.kind) or isinstance(value, (str, bytes)):
            yield _other(value, key, self.words)
        elif isinstance(value, Sequence):
            yield from self._in_sequence(value, key)
        elif isinstance(value, Collection):  # To look at an iterator would use it up.
            for item in value:
                if [*self.item.mismatches(item, key)]:
                    what = described(item, key)
                    yield Mismatch(key, f"expected {self.item.words} in it, got {what}")

    def _in_sequence(self, value: Sequence[Any], key: Key) -> Iterator[Mismatch]:
        wrong = 0
        for index, item in enumerate(value):
            found = [*self.item.mismatches(item, (*key, index))]
            wrong += bool(found)
            if wrong <= _MOST_ITEMS:
                yield from found
        if wrong > _MOST_ITEMS:
            more = wrong - _MOST_ITEMS
            yield Mismatch(key, f"{more} more of its items do not fit", count=more)


@dataclass(frozen=True)
class Row:
    """A tuple, with a form for each of its items."""

    items: tuple[Form, ...]

    @property
    def words(self) -> str:
        return f"tuple[{', '.join(map(_within, self.items)) or '()'}]"

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        if not isinstance(value, tuple) or len(value) != len(self.items):
            yield _other(value, key, self.words)
            return
        for index, (form, item) in enumerate(zip(self.items, value, strict=True)):
            yield from form.mismatches(item, (*key, index))


@dataclass(frozen=True)
class Entries:
    """A dictionary with any keys of one form, and values of another one."""

    kind: type[Mapping[Any, Any]]
    name: Form
    item: Form

    @property
    def words(self) -> str:
        return f"{self.kind.__name__}[{_within(self.name)}, {_within(self.item)}]"

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        if not isinstance(value, self.kind):
            yield _other(value, key, self.words)
            return
        for name, item in value.items():
            if [*self.name.mismatches(name, key)]:
                problem = f"expected {self.name.words} as its key, got {described(name)}"
                yield Mismatch((*key, name), problem)
            yield from self.item.mismatches(item, (*key, name))


@dataclass(frozen=True)
class Keys:
    """A dictionary with certain keys: each has a form, and may have to be there."""

    keys: Mapping[Any, tuple[Form, bool]]
    """The form at each key, and whether it is required."""
    words: str = "dict"
    kind: type | None = None
    """A class whose instances fit as well."""

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        if self.kind and isinstance(value, self.kind):
            return
        if not isinstance(value, dict):
            yield _other(value, key, self.words)
            return
        for name, (form, is_required) in self.keys.items():
            if name in value:
                yield from form.mismatches(value[name], (*key, name))
            elif is_required:
                yield Mismatch((*key, name), "missing", f"; expected {form.words}")
        for name in value:
            if name not in self.keys:
                yield _unknown(name, key, self.keys, value)


@dataclass(frozen=True)
class OneOf:
    """Any of several forms."""

    choices: tuple[Form, ...]

    @property
    def words(self) -> str:
        return _joined(self.choices)

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        tried = [[*choice.mismatches(value, key)] for choice in self.choices]
        if not all(tried):
            return
        near = [found for found in tried if not (found[0].is_whole and found[0].key == key)]
        if not near:
            advice = next((found[0].advice for found in tried if found[0].advice), "")
            yield _other(value, key, self.words, advice=advice)
            return
        # A value such as a name tells which of several dictionaries is meant.
        nearest = min(near, key=lambda found: (sum(e.is_other_value for e in found), len(found)))
        of = f" (nearest of {len(near)} choices)" if len(near) > 1 else ""
        yield from (replace(each, advice=each.advice + of) for each in nearest)


@dataclass
class Named:
    """A form that goes by a name, as it may hold itself."""

    words: str
    form: Form = field(default_factory=Anything)

    def mismatches(self, value: Any, key: Key) -> Iterator[Mismatch]:
        return self.form.mismatches(value, key)


def _joined(choices: Iterable[Form]) -> str:
    """Return the words of all that a value may be."""
    words: list[str] = []
    for form in choices:
        words += map(repr, form.values) if isinstance(form, OneValue) else [form.words]
    words = list(dict.fromkeys(words))
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _within(form: Form) -> str:
    """Return the words of a form that stands in brackets."""
    if isinstance(form, OneOf):
        return " | ".join(map(_within, form.choices))
    if isinstance(form, OneValue):
        return f"Literal[{', '.join(map(repr, form.values))}]"
    return form.words
