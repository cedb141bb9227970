"""What hparams scripts are layered with: `layer`, `new`, `DELETE`, `ref` and `env`.

All of it can be done in plain Python too. `layer` is stricter than assignments: a key that the base
has not is an error. `ref` and `env` stand for values that are known when all layers are.
"""

from __future__ import annotations

import ast
import copy
import itertools
import re
import string
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from torch_lab.errors import HparamsError
from torch_lab.imports import parsed
from torch_lab.provenance import (
    DELETED,
    HOOK,
    NAME,
    Change,
    Histories,
    Key,
    New,
    Recorder,
    key_lines,
    leaves,
    spelt,
)
from torch_lab.scripts import import_script_as_module, layers_of, shown
from torch_lab.suggestions import nearest_key

__all__ = [
    "DELETE",
    "MISSING",
    "OWN_KEYS",
    "SECTIONS",
    "SWITCHES",
    "Env",
    "Later",
    "Merge",
    "Piece",
    "Ref",
    "cleared",
    "did_you_mean_key",
    "env",
    "holds",
    "keys_in",
    "layer",
    "new",
    "parsed_key",
    "place_of",
    "ref",
    "shown_change",
    "with_items",
]

SECTIONS: Final = (
    *("task", "checkpoint", "trainer", "config", "seed", "loader_timeout", "strict"),
    *("compile", "channels_last", "optimizer", "pin_memory"),
)
"""What hparams may hold."""
SWITCHES: Final[frozenset[Key]] = frozenset({("compile",)})
"""Keys that hold True or False, or a dictionary: each may take the place of the other."""
OWN_KEYS: Final = "keys of your own are below config"


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""What is at a key that is not there."""
DELETE: Final = DELETED
"""As the value of a key it removes the key: `layer("hparams.py", config={"warmup": DELETE})`."""

_PART: Final = re.compile(
    r"""\.?(?P<name>[^\s.\[\]{}=]+)|\[(?P<literal>-?\d+|'[^']*'|"[^"]*")\]""", re.ASCII
)


# Keys.


def parsed_key(text: str) -> Key | None:
    """Return the key that `text` spells, like `config.optimizers[0].lr`; None if it spells none."""
    parts: list[Any] = []
    at = 0
    while at < len(text):
        match = _PART.match(text, at)
        # A dot stands between two names, and nowhere else.
        if match is None or (match["name"] is not None and (text[at] == ".") != bool(parts)):
            return None
        parts.append(match["name"] or ast.literal_eval(match["literal"]))
        at = match.end()
    return tuple(parts) or None


def holds(value: Any, part: Any) -> bool:
    """Return whether a dictionary has the key `part`, or a list that index."""
    if isinstance(value, dict):
        return part in value
    is_index = isinstance(part, int) and type(value) in (list, tuple)
    return is_index and -len(value) <= part < len(value)


def keys_in(values: Any, above: Key = ()) -> list[Key]:
    """Return all keys in nested dictionaries, also in those that are in lists."""
    if isinstance(values, dict):
        parts = {(*above, part): value for part, value in values.items()}
        return [each for key, value in parts.items() for each in (key, *keys_in(value, key))]
    if type(values) in (list, tuple):
        return [each for at, value in enumerate(values) for each in keys_in(value, (*above, at))]
    return []


def did_you_mean_key(key: Key, known: Iterable[Key], histories: Histories | None = None) -> str:
    """Return `"; did you mean config.lr (hparams.py:4)?"` for the nearest key, or `""`.

    Args:
        key: The one that is not there.
        known: Those that are.
        histories: What has set them, which tells where.
    """
    by_name = {spelt(each): each for each in known}
    name = nearest_key(spelt(key), by_name)
    if name is None:
        return ""
    place = place_of(by_name[name], histories or {})
    return f"; did you mean {name}{f' ({place})' if place else ''}?"


def place_of(key: Key, histories: Histories) -> str:
    """Return the last file and line that set `key`, or what it is in; `""` if no script did."""
    for end in range(len(key), 0, -1):
        for change in reversed(histories.get(key[:end], ())):
            if change.file is not None:
                return f"{shown(change.file)}:{change.line}"
    return ""


def shown_change(change: Change) -> str:
    """Return what set a value: `hparams.py:4, follows config.epochs`, or `--set config.lr`."""
    line = [] if change.file is None else [f"{shown(change.file)}:{change.line}"]
    return ", ".join([*line, *filter(None, [change.source])])


# Marks.


def new(value: Any) -> Any:
    """Mark `value` as one whose key no base has.

    Args:
        value: What the key is to hold; a dictionary may hold other new keys. In a dictionary that
            the base has, they are added to what that holds.
    """
    return value if isinstance(value, New) else New(value)


def cleared(value: Any) -> Any:
    """Return a copy of `value` without marks: what is `new` is there, what is `DELETE` is not."""
    if isinstance(value, New):
        return cleared(value.value)
    if type(value) is dict:
        return {key: cleared(item) for key, item in value.items() if item is not DELETE}
    if type(value) is list:
        return [cleared(item) for item in value]
    return value


def with_items(value: dict[Any, Any], items: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a dictionary of the type of `value` with other items."""
    if type(value) is dict:
        return dict(items)
    found = copy.copy(value)
    found.clear()
    for key, item in items.items():
        found[key] = item  # The `update` of a Counter adds.
    return found


# Merging.


@dataclass(frozen=True)
class Merge:
    """How values are merged into those of nested dictionaries.

    Args:
        is_known: Whether a key that is not there may come, without being marked as new.
        unknown: Returns the error for one that may not.
        fitted: Returns a value as it takes the place of another, or raises what forbids it; it gets
            the value before, that now, and the key.
    """

    is_known: Callable[[Key], bool]
    unknown: Callable[[Key], HparamsError]
    fitted: Callable[[Any, Any, Key], Any]

    def into(self, before: dict[Any, Any], given: Mapping[Any, Any], key: Key = ()) -> Any:
        """Return the dictionary `before` at `key` with `given` merged into it, as a new one.

        Raises:
            HparamsError: A key in it is unknown, or a value does not fit.
        """
        result = dict(before)
        for part, value in given.items():
            below, held = (*key, part), before.get(part, MISSING)
            may_come = isinstance(value, New) or (value is not DELETE and self.is_known(below))
            if held is MISSING and not may_come:
                raise self.unknown(below)
            if value is DELETE:
                result.pop(part, None)
            else:
                result[part] = self.over(held, value, below)
        return with_items(before, result)

    def over(self, before: Any, value: Any, key: Key) -> Any:
        """Return what `key` holds when `value` comes to what it holds, be it `MISSING`."""
        if isinstance(value, New):
            return Merge(_any_key, self.unknown, _any_value).over(before, value.value, key)
        base = {} if before is MISSING else before
        if isinstance(value, dict) and isinstance(base, dict):
            return self.into(base, value, key)
        return cleared(value if before is MISSING else self.fitted(before, value, key))


def _any_key(key: Key) -> bool:
    return True


def _any_value(before: Any, value: Any, key: Key) -> Any:
    return value


def layer(path: str | Path, /, **changes: Any) -> dict[str, Any]:
    """Return the hparams of another script with `changes` merged into them.

    Dictionaries are merged key by key, at any depth; lists and all other values are replaced.

    Args:
        path: The other script, which is run afresh: absolute, or with `~`, or relative to the
            script that is calling.
        changes: Sections with what differs. A key that the other script has not is an error, unless
            its value is `new(…)`; `DELETE` removes a key. In other sections than `config` the names
            that these may have anyway need no mark.

    Raises:
        ScriptError: The other script is missing, or does not compile.
        HparamsError: It holds no hparams, or they have no such key.
    """
    call = _Call.by(sys._getframe(1))
    module = import_script_as_module(path)
    base = getattr(module, NAME, None)
    if not isinstance(base, dict):
        kind = "no dictionary" if hasattr(module, NAME) else "no"
        raise HparamsError(f"{call.place()}: {path} defines {kind} {NAME}")
    histories = layers_of(module)[-1].recorder.histories
    base = cleared(base)

    def unknown(key: Key) -> HparamsError:
        near = did_you_mean_key(key, keys_in(base), histories)
        mark = "new(…) around its value marks a key that the base has not"
        hint = mark if key[0] == "config" else None if near else OWN_KEYS
        return HparamsError(f"{call.place(key)}: unknown key {spelt(key)}{near}", hint)

    def fitted(before: Any, value: Any, key: Key) -> Any:
        gives_way = any(each is None or isinstance(each, Later) for each in (before, value))
        if gives_way or key in SWITCHES or isinstance(before, dict) is isinstance(value, dict):
            return value
        kinds = ("a dictionary", "no dictionary")
        was, now = kinds if isinstance(before, dict) else kinds[::-1]
        there = place_of(key, histories) or path
        raise HparamsError(
            f"{call.place(key)}: {spelt(key)} is {was} in {there}, and {now} here",
            "new(…) around the value puts it in the place of the other",
        )

    merged: dict[str, Any] = Merge(_may_come, unknown, fitted).into(base, changes)
    if call.recorder is not None:
        added = dict(leaves(merged)).keys() - dict(leaves(base)).keys()
        call.recorder.marked |= added
    return merged


def _may_come(key: Key) -> bool:
    """Return whether a key needs no mark: those of torch_lab and Lightning are checked later."""
    return key[0] in SECTIONS and (len(key) == 1 or key[0] != "config")


@dataclass(frozen=True)
class _Call:
    """A call in a script, and where its keys stand."""

    file: str
    line: int
    position: tuple[int | None, ...]
    """Where it begins and ends: lines, then columns."""
    recorder: Recorder | None
    """Who follows the script; None outside of scripts."""

    @classmethod
    def by(cls, frame: FrameType) -> _Call:
        """Return the call that `frame` is making."""
        positions = itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None)
        recorder = frame.f_globals.get(HOOK)
        return cls(frame.f_code.co_filename, frame.f_lineno, next(positions), recorder)

    def place(self, key: Key = ()) -> str:
        """Return the file and line of a key, or else of the call."""
        lines = self._lines() if key else {}
        found = (lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in lines)
        return _shown_line(self.file, next(found, self.line))

    def _lines(self) -> dict[Key, int]:
        """Return the lines of the keys that the call spells out, if its file can be read."""
        try:
            tree = parsed(Path(self.file).read_bytes())
        except (OSError, SyntaxError):
            return {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and self.position == (
                *(node.lineno, node.end_lineno, node.col_offset, node.end_col_offset),
            ):
                return key_lines(node)
        return {}


def _shown_line(file: str, line: int) -> str:
    return f"{shown(Path(file))}:{line}"


# Values that are known later.


@dataclass(frozen=True)
class Later:
    """What stands for a value until all layers and overrides are known."""

    file: str = field(default="", compare=False, kw_only=True)
    line: int = field(default=0, compare=False, kw_only=True)

    @property
    def place(self) -> str:
        """The file and line that it is from."""
        return _shown_line(self.file, self.line)

    def __bool__(self) -> bool:
        raise self._has_no_value("whether it is true")

    def __format__(self, spec: str) -> str:
        raise self._has_no_value("what it is in a string")

    def _computed(self, *others: Any) -> Any:
        raise self._has_no_value("what comes of it")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _computed
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _computed
    __pow__ = __rpow__ = __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _computed
    __int__ = __float__ = __index__ = __len__ = __iter__ = __getitem__ = __contains__ = _computed

    def _has_no_value(self, question: str) -> HparamsError:
        return HparamsError(
            f"{self.place}: no script can know {question}: {self!r} has its value when all layers "
            "and overrides are known",
            'a string with values in it is ref("runs/{config.name}")',
        )


@dataclass(frozen=True)
class Piece:
    """A part of a string: text as it is, then the value of a key, if there is one."""

    text: str
    key: Key | None
    conversion: str | None
    spec: str


@dataclass(frozen=True, repr=False)
class Ref(Later):
    """A value that follows another, or a string in which values are put."""

    text: str
    key: Key | None
    """What it follows as a whole; None if it is a string with pieces."""
    pieces: tuple[Piece, ...] = ()

    @property
    def keys(self) -> list[Key]:
        """All that it follows."""
        every = [self.key, *(piece.key for piece in self.pieces)]
        return [key for key in every if key is not None]

    def __repr__(self) -> str:
        return f"ref({self.text!r})"


def ref(text: str) -> Any:
    """Return what stands for the value of another key, whatever sets that, also after this script.

    Args:
        text: The key, such as `config.epochs` or `config.layers[0]`: the value keeps its type. Or a
            string with keys in braces, such as `runs/{config.name}`, which becomes a string; `{{`
            and `}}` are braces, and a format may follow a colon: `{config.learning_rate:.0e}`.

    Raises:
        HparamsError: It is neither.
    """
    frame = sys._getframe(1)
    text = str(text)
    pieces = _pieces(text) if {"{", "}"} & set(text) else ()
    key = None if pieces else parsed_key(text)
    found = Ref(text, key, pieces, file=frame.f_code.co_filename, line=frame.f_lineno)
    if key is None and not pieces:
        raise HparamsError(
            f"{found.place}: {found!r}: expected a key, or a string with keys in braces",
            'like ref("config.epochs") or ref("runs/{config.name}")',
        )
    return found


def _pieces(text: str) -> tuple[Piece, ...]:
    """Return what a string with keys in braces is made of; nothing if it is no such string."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError:
        return ()
    pieces = tuple(
        Piece(literal, None if name is None else parsed_key(name), conversion, spec or "")
        for literal, name, spec, conversion in parsed
    )
    are_whole = all(
        (name is None) is (piece.key is None) and "{" not in piece.spec
        for (_, name, _, _), piece in zip(parsed, pieces, strict=True)
    )
    follows = any(piece.key is not None for piece in pieces)
    return pieces if are_whole and follows else ()


@dataclass(frozen=True, repr=False)
class Env(Later):
    """A value that the environment has."""

    name: str
    default: Any = None
    has_default: bool = False

    def __repr__(self) -> str:
        default = f", default={self.default!r}" if self.has_default else ""
        return f"env({self.name!r}{default})"


def env(name: str, default: Any = MISSING) -> Any:
    """Return what stands for the value of an environment variable when the hparams are loaded.

    Args:
        name: That of the variable.
        default: What is taken where it is not set: else that is an error. The text of the variable
            is read in the type of the default: with `default=4` it must be a whole number.
    """
    frame = sys._getframe(1)
    file, line = frame.f_code.co_filename, frame.f_lineno
    if default is MISSING:
        return Env(name, file=file, line=line)
    return Env(name, default, True, file=file, line=line)
