"""Two experiments side by side: hparams, code, packages and results, as far as they differ.

```
hparams               00_toy-hparams-v1    00_toy/high.py
config.learning_rate  0.1  (hparams.py:4)  0.5  (high.py:5)

code                  change               line in a  line in b
__main__.py
  train_config        changed              14         15
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch_lab.code_changes import MODULE_LEVEL, WHOLE_FILE, CodeChange, code_changes, holds_hparams
from torch_lab.errors import listed
from torch_lab.provenance import Key, spelt
from torch_lab.runs import decoded, encoded
from torch_lab.sides import Side

__all__ = ["Comparison", "Difference", "FileDifference", "compared"]

_PASSING: Final = re.compile(
    r"torch_lab\.scripts\.[^.]*\.(?=[^.])|(?<=\w)#\d+(?=\.)| at 0x[0-9a-f]+"
)
"""What the `repr` of an object tells of its process: the folder of its script, its address."""
_LONGEST: Final = 48
"""How many letters of a value a table shows."""
_BEFORE: Final = 16
"""How many of them stand before what differs in a longer one."""

Value: TypeAlias = Mapping[str, Any]
"""A `value` in what JSON can hold, with the `file` and `line` that set it, or another `source`."""


@dataclass(frozen=True)
class Difference:
    """A value that differs."""

    name: str
    one: Value | None
    """None if there is nothing, and no line that removed it."""
    other: Value | None

    def record(self) -> dict[str, Any]:
        """Return it in what JSON can hold."""
        return {"name": self.name, "a": self.one, "b": self.other}


@dataclass(frozen=True)
class FileDifference:
    """A script that differs."""

    name: str
    changes: Sequence[CodeChange]

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield its changes in what JSON can hold."""
        for change in self.changes:
            yield {
                "file": self.name,
                "name": change.name,
                "change": str(change.kind),
                "line_a": change.line_before,
                "line_b": change.line_after,
            }

    def rows(self) -> Iterator[Sequence[str]]:
        """Yield the rows of a table."""
        yield self.name, "", "", ""
        for change in self.changes:
            lines = (change.line_before, change.line_after)
            yield (
                f"  {change.name}",
                str(change.kind),
                *("" if line is None else str(line) for line in lines),
            )


@dataclass(frozen=True)
class Comparison:
    """Two sides, and in what they differ."""

    one: Side
    other: Side
    hparams: Sequence[Difference]
    code: Sequence[FileDifference]
    packages: Sequence[Difference]
    results: Sequence[Difference]
    unknown: Sequence[str]
    """Scripts that could not be compared, as a run has not kept them."""

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs of what could be compared."""
        return not (self.hparams or self.code or self.packages or self.results)

    @property
    def notes(self) -> list[str]:
        """What else to know of it."""
        return list(dict.fromkeys(side.note for side in (self.one, self.other) if side.note))

    def record(self) -> dict[str, Any]:
        """Return it in what JSON can hold."""
        return {
            "a": self.one.name,
            "b": self.other.name,
            "equal": self.is_equal,
            "hparams": [each.record() for each in self.hparams],
            "code": [record for file in self.code for record in file.records()],
            "packages": [each.record() for each in self.packages],
            "results": [each.record() for each in self.results],
            "not_compared": list(self.unknown),
            "notes": self.notes,
        }

    def header(self) -> Iterator[tuple[str, str]]:
        """Yield what the two sides are."""
        yield "a", self.one.words
        yield "b", self.other.words

    def tables(self) -> Iterator[tuple[Sequence[str], list[Sequence[str]]]]:
        """Yield the titles and the rows of a table for each section that differs."""
        names = self.one.name, self.other.name
        if names[0] == names[1]:
            names = "a", "b"
        if self.hparams:
            yield ("hparams", *names), [self._hparams_row(each) for each in self.hparams]
        if self.code:
            titles = ("code", "change", "line in a", "line in b")
            yield titles, [row for file in self.code for row in file.rows()]
        if self.packages:
            yield ("packages", *names), list(_package_rows(self.packages))
        if self.results:
            yield ("results", *names, "change"), [_result_row(each) for each in self.results]

    def details(self) -> Iterator[str]:
        """Yield the lines that differ in each part of the code."""
        for file in self.code:
            for change in file.changes:
                if change.lines:
                    yield f"{file.name}: {change.name}"
                    yield from (f"  {line}".rstrip() for line in change.lines)
                    yield ""

    def footer(self) -> Iterator[tuple[str, str]]:
        """Yield what there is to say of the comparison itself."""
        if self.is_equal:
            yield "equal", "no differences" + " in what was compared" * bool(self.unknown)
        if self.unknown:
            yield "not compared", f"{listed(self.unknown, 8)}: a run has not kept them"
        for note in self.notes:
            yield "note", note

    def _hparams_row(self, difference: Difference) -> Sequence[str]:
        one, other = _shortened(_text(difference.one), _text(difference.other))
        places = _place(self.one, difference.one), _place(self.other, difference.other)
        return difference.name, f"{one}{places[0]}", f"{other}{places[1]}"


def compared(one: str, other: str) -> Comparison:
    """Return in what two experiments differ.

    Args:
        one: An hparams script, a run, or a run at a checkpoint; see `Side.of`.
        other: The same; what it has more counts as added.

    Raises:
        UserError: One of them is not there, or is wrong.
    """
    before, after = Side.of(one), Side.of(other)
    names = sorted({*before.code, *after.code})
    unknown = {name for name in names if before.is_in_doubt(name) or after.is_in_doubt(name)}
    known = [name for name in names if name not in unknown]
    files = [FileDifference(name, _changes(name, before, after)) for name in known]
    return Comparison(
        before,
        after,
        list(_hparams_differences(before, after)),
        [file for file in files if file.changes],
        list(_differences(before.packages, after.packages)),
        list(_differences(*_results(before, after))),
        sorted({*unknown, *before.unknown, *after.unknown}),
    )


# Code.


def _changes(name: str, before: Side, after: Side) -> list[CodeChange]:
    sources = before.source(name), after.source(name)
    found = code_changes(*sources)
    if not any(source is not None and holds_hparams(source) for source in sources):
        return found
    # What an hparams script sets is compared by its values.
    return [change for change in found if change.name not in (MODULE_LEVEL, WHOLE_FILE)]


# Hparams.


@dataclass(frozen=True)
class _Leaf:
    """A value in nested dictionaries, and in lists of them."""

    value: Any
    place: Key
    """Its key; of what is in a list, that of the list, which scripts set as a whole."""


def _leaves(value: Any, key: Key = (), place: Key | None = None) -> Iterator[tuple[Key, _Leaf]]:
    if _is_container(value):
        for part, inner in _items(value):
            is_list = isinstance(value, list)
            yield from _leaves(inner, (*key, part), (place or key) if is_list else place)
    else:
        yield key, _Leaf(value, place or key)


def _is_container(value: Any) -> bool:
    """Return whether the parts of a value that `encoded` returned are compared one by one."""
    if isinstance(value, list):
        return any(_is_container(part) for part in value)
    return isinstance(value, dict) and bool(value) and value.get("__type__", "dict") == "dict"


def _items(value: Any) -> Iterator[tuple[Hashable, Any]]:
    if isinstance(value, list):
        yield from enumerate(value)
    elif "__type__" in value:
        yield from ((decoded(key), inner) for key, inner in value["value"])
    else:
        yield from value.items()


def _hparams_differences(before: Side, after: Side) -> Iterator[Difference]:
    one, other = dict(_leaves(before.hparams)), dict(_leaves(after.hparams))
    keys = dict.fromkeys([*one, *other])
    sections = {key[:end] for key in keys for end in range(len(key))}
    for key in keys:
        leaves = one.get(key), other.get(key)
        if _differ(*leaves) and not (key in sections and _is_filled(*leaves)):
            place = next(leaf.place for leaf in leaves if leaf is not None)
            values = _setting(before, key, place, leaves[0]), _setting(after, key, place, leaves[1])
            yield Difference(spelt(key), *values)


def _differ(one: _Leaf | None, other: _Leaf | None) -> bool:
    if one is None or other is None:
        return True
    return _fingerprint(one.value) != _fingerprint(other.value)


def _is_filled(one: _Leaf | None, other: _Leaf | None) -> bool:
    """Return whether a section is an empty dictionary, in which the other side has values."""
    is_empty = any(leaf is not None and leaf.value == {} for leaf in (one, other))
    return is_empty and (one is None or other is None)


def _fingerprint(value: Any) -> str:
    """Return a text that is the same for values of the same type that are equal."""
    return json.dumps(_lasting(value), sort_keys=True)


def _lasting(value: Any) -> Any:
    """Return an encoded value with its sets in an order, and what objects tell of themselves."""
    match value:
        case list():
            return [_lasting(part) for part in value]
        case {"__type__": "set" | "frozenset", "value": list(parts)}:
            return {**value, "value": sorted(map(_fingerprint, parts))}
        case {"__type__": "repr", "value": str(described)}:
            return {**value, "value": _PASSING.sub("", described)}
        case dict():
            return {key: _lasting(part) for key, part in value.items()}
    return value


def _setting(side: Side, key: Key, place: Key, leaf: _Leaf | None) -> Value | None:
    line = side.lines.get(spelt(key)) or side.lines.get(spelt(place)) or {}
    return ({} if leaf is None else {"value": leaf.value}) | dict(line) or None


def _text(value: Value | None) -> str:
    if value is None or "value" not in value:
        return "nothing"
    match value["value"]:
        case {"__type__": "repr", "value": str(described)}:
            return _PASSING.sub("", described)
        case {"__type__": "path", "value": str(path)}:
            return f"Path({path!r})"
        case inner:
            return repr(decoded(inner))


def _place(side: Side, value: Value | None) -> str:
    if value is None or not value.keys() & {"file", "source"}:
        return ""
    if "source" in value:
        return f"  ({value['source']})"
    file = Path(value["file"])
    below = file.relative_to(side.experiment) if file.is_relative_to(side.experiment) else file
    return f"  ({below}:{value['line']})"


def _shortened(one: str, other: str) -> tuple[str, str]:
    """Return two texts, cut to the part where they begin to differ."""
    pairs = enumerate(zip(one, other, strict=False))
    same = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
    start = max(0, same - _BEFORE) if max(len(one), len(other)) > _LONGEST else 0
    return _cut(one, start), _cut(other, start)


def _cut(text: str, start: int) -> str:
    end = start + _LONGEST
    return "…" * (start > 0) + text[start:end] + "…" * (len(text) > end)


# Packages and results.


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys([*one, *other]):
        values = [{"value": encoded(side[name])} if name in side else None for side in (one, other)]
        if values[0] != values[1]:
            yield Difference(name, values[0], values[1])


def _results(before: Side, after: Side) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what came out of both; nothing, if one of them is a script."""
    if before.numbers is None or after.numbers is None:
        return {}, {}
    if before.outcome is None or after.outcome is None:
        return dict(before.numbers), dict(after.numbers)
    return {**before.outcome, **before.numbers}, {**after.outcome, **after.numbers}


def _package_rows(differences: Sequence[Difference]) -> Iterator[Sequence[str]]:
    both = [each for each in differences if each.one is not None and each.other is not None]
    for each in both:
        yield each.name, _plain(each.one), _plain(each.other)
    only_one = [f"{each.name} {_plain(each.one)}" for each in differences if each.other is None]
    only_other = [f"{each.name} {_plain(each.other)}" for each in differences if each.one is None]
    if only_one or only_other:
        yield "others", listed(only_one), listed(only_other)


def _plain(value: Value | None) -> str:
    """Return a text or a number as it is read."""
    if value is None:
        return "nothing"
    inner = decoded(value["value"])
    return inner if isinstance(inner, str) else repr(inner)


def _result_row(difference: Difference) -> Sequence[str]:
    one, other = _number(difference.one), _number(difference.other)
    if one is None or other is None:
        return difference.name, _plain(difference.one), _plain(difference.other), ""
    texts = f"{one:.4g}", f"{other:.4g}"
    if texts[0] == texts[1]:
        texts = repr(one), repr(other)
    return difference.name, *texts, f"{other - one:+.4g}"


def _number(value: Value | None) -> float | None:
    inner = None if value is None else decoded(value["value"])
    return inner if isinstance(inner, (int, float)) else None
