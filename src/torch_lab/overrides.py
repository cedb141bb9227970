"""What becomes of hparams when all scripts have run: values are set and removed, refs resolved.

`--set` and `--unset` come after the layers, and what follows another value or the environment comes
after them. Each step takes and returns the hparams together with what has set each value.
"""

from __future__ import annotations

import ast
import contextlib
import math
import numbers
import os
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from torch_lab.errors import HparamsError, UserError, listed
from torch_lab.hparams import known_names
from torch_lab.layering import (
    DELETE,
    MISSING,
    OWN_KEYS,
    SWITCHES,
    Env,
    Later,
    Merge,
    Piece,
    Ref,
    cleared,
    did_you_mean_key,
    holds,
    keys_in,
    new,
    parsed_key,
    place_of,
    with_items,
)
from torch_lab.provenance import Change, Histories, Key, New, copied, is_same, leaves, spelt
from torch_lab.redaction import MASK, masked_at, secrets_around
from torch_lab.utils import shown

__all__ = ["Effective", "Overrides", "effective", "overridden", "parsed_words", "resolved"]

_ADD: Final = "+="
_WORD: Final = re.compile(
    r"""(?P<key>(?:\['[^']*'\]|\["[^"]*"\]|\[(?!['"])|[^\[=])*)=(?P<value>.*)""", re.DOTALL
)
_NEW: Final = re.compile(r"new\((.*)\)", re.DOTALL)
_WORD_OF_SCRIPTS: Final = re.compile(r"DELETE|(ref|env)\(.*\)")
_MISFIT: Final = object()


@dataclass(frozen=True)
class Effective:
    """Hparams as they are, and what has set each value of them."""

    hparams: dict[str, Any]
    histories: Histories = field(repr=False)

    def with_edits(self, before: Any, after: Any, source: str) -> Effective:
        """Return them with the values in `after` that are others `before`, which `source` set."""
        own, histories = dict(leaves(before)), dict(self.histories)
        for key, value in leaves(after):
            if not is_same(own.get(key, MISSING), value):
                change = Change(None, 0, value, source=source)
                histories[key] = (*histories.get(key, ()), change)
        return Effective(self.hparams, histories)


def effective(
    given: Effective,
    overrides: Overrides,
    *,
    script: Path,
    defaults: Mapping[str, Any],
) -> Effective:
    """Return the hparams of a script with the overrides in them, and every ref resolved.

    Args:
        given: What the script holds, and what has set it.
        overrides: What comes in place of it.
        script: The script; errors name it.
        defaults: What holds where the script says nothing.

    Raises:
        HparamsError: An override or a ref does not go with the hparams.
    """
    return resolved(
        overridden(given, overrides, script=script, defaults=defaults), defaults=defaults
    )


# The words of the command line.


def parsed_words(words: Sequence[str]) -> dict[str, Any]:
    """Return what the words of `--set` say: values by their keys.

    A value is a Python literal, or else a string; `new(…)` around it marks its key as new. What is
    added to a list stands under its key with `+=` behind.

    Args:
        words: Such as `config.learning_rate=3e-3` or `config.milestones+=[9]`.

    Raises:
        UserError: A word is no such thing.
    """
    found: dict[str, Any] = {}
    for word in words:
        match = _WORD.fullmatch(word)
        text = match["key"] if match else ""
        is_added = text.endswith("+")
        key = parsed_key(text.removesuffix("+").strip())
        if match is not None and key is None:
            raise UserError(
                f"--set {word}: {text.removesuffix('+') or 'nothing'} is no key",
                "a key is like config.learning_rate or config.layers[0]",
            )
        if match is None or key is None:
            raise UserError(
                f"--set {word}: expected KEY=VALUE",
                "like config.learning_rate=3e-3, config.layers[0]=64 or config.milestones+=[9]",
            )
        name, value = spelt(key), _value(match["value"].strip())
        added = found.pop(f"{name}{_ADD}", [])
        if is_added:
            both = isinstance(added, (list, tuple)) and isinstance(value, (list, tuple))
            found[f"{name}{_ADD}"] = [*added, *value] if both else value
        else:
            found.pop(name, None)
            found[name] = value
    return found


def _value(text: str) -> Any:
    if _WORD_OF_SCRIPTS.fullmatch(text):
        raise UserError(
            f"--set …={text}: a script can say {text.partition('(')[0]}, a command line cannot",
            f"""--unset removes a key; in quotes it is a string: "'{text}'\"""",
        )
    if match := _NEW.fullmatch(text):
        return new(_value(match[1].strip()))
    return _literal(text)


def _literal(text: str) -> Any:
    """Return what `text` means as a Python literal, or else the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of what only looks like one, such as 5in.
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text


@dataclass(frozen=True)
class Overrides:
    """What a command line, or a caller, sets in place of what the scripts say."""

    set: Mapping[str, Any] = field(default_factory=dict)
    """Values by their keys, such as `config.learning_rate`; behind `+=` what is added to a list."""
    unset: Sequence[str] = ()
    """Keys that are removed."""

    def __post_init__(self) -> None:
        given: object = self.set
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            hint = 'like {"config.learning_rate": 3e-3}'
            raise UserError(f"set must be a dictionary with strings as keys: {self.set!r}", hint)
        if isinstance(self.unset, str) or not all(isinstance(key, str) for key in self.unset):
            hint = 'like ["config.warmup"]'
            raise UserError(f"unset must be a list of strings: {self.unset!r}", hint)

    def __bool__(self) -> bool:
        return bool(self.set or self.unset)

    def record(self) -> dict[str, Any]:
        """Return them as a run's record keeps them: in the words of the command line."""
        kept = [key for key in self.set if _is_kept(key, self.set[key])]
        return {
            "set": [_word(key, self.set[key]) for key in kept],
            "unset": list(self.unset),
            "not_kept": [key for key in self.set if key not in kept],
        }

    def lines(self) -> list[str]:
        """Return them in words to read, without secrets."""
        told = [f"{key} removed" for key in self.unset]
        for key, value in self.set.items():
            name = key.removesuffix(_ADD)
            shown_value = masked_at(_parts(name), cleared(value), secrets_around())
            told.append(f"{name} {_ADD if name != key else '='} {shown_value!r}")
        return told

    def secrets(self) -> list[str]:
        """Return the keys whose values look like secrets."""
        return [key for key, value in self.set.items() if _is_secret(key, cleared(value))]

    def over(self, record: Mapping[str, Any], run: str) -> Overrides:
        """Return these, with those of a run's record that they say nothing of.

        Args:
            record: What `record` returned when the run was started.
            run: The run's name.

        Raises:
            UserError: One of them cannot be kept in a record, and is not given here.
        """
        mine = [_parts(key) for key in (*self.set, *self.unset)]

        def is_kept(key: str) -> bool:
            parts = _parts(key)
            return not any(parts[: len(each)] == each for each in mine)

        missing = list(filter(is_kept, record.get("not_kept", ())))
        if missing:
            raise UserError(
                f"run {run} was started with --set {listed(missing)}, whose value its record does "
                "not keep",
                "give it again: secrets and objects are not kept",
            )
        theirs = parsed_words(record.get("set", ()))
        kept = {key: value for key, value in theirs.items() if is_kept(key)}
        unset = list(filter(is_kept, record.get("unset", ())))
        return Overrides({**kept, **self.set}, (*unset, *self.unset)) if kept or unset else self


def _parts(name: str) -> Key:
    """Return the key that a name means, without the sign of an addition."""
    bare = name.removesuffix(_ADD)
    return parsed_key(bare) or (bare,)


def _word(key: str, value: Any) -> str:
    sign = "" if key.endswith(_ADD) else "="
    return f"{key}{sign}{_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, New):
        return f"new({_text(value.value)})"
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return repr(str(value) if isinstance(value, Path) else value)


def _is_secret(key: str, value: Any) -> bool:
    shown_value = masked_at(_parts(key), value, secrets_around())
    return MASK in repr(shown_value) and MASK not in repr(value)


def _is_kept(key: str, value: Any) -> bool:
    """Return whether a record can hold a value, so that it is the same when it is read back."""
    bare = cleared(value)
    if _is_secret(key, bare):
        return False
    back = next(iter(parsed_words([_word(key, value)]).values()))
    same = str(bare) if isinstance(bare, Path) else bare
    return type(cleared(back)) is type(same) and bool(cleared(back) == same)


# Setting and removing.


def overridden(
    given: Effective, overrides: Overrides, *, script: Path, defaults: Mapping[str, Any]
) -> Effective:
    """Return hparams with the overrides in them: what is to be removed first, then what is set.

    Args:
        given: The hparams, and what has set them.
        overrides: What comes in place of them.
        script: What they are of; errors name it.
        defaults: What holds where it says nothing.

    Raises:
        HparamsError: A key is nowhere in them, or a value of another type than the one before.
    """
    overriding = _Overriding(given, script, defaults)
    overriding.remove(overrides.unset)
    for name, value in overrides.set.items():
        overriding.put(name, value)
    return Effective(overriding.values, overriding.histories)


class _Overriding:
    """Sets and removes values, and keeps what has set them."""

    def __init__(self, given: Effective, script: Path, defaults: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = cleared(given.hparams)
        self.histories = dict(given.histories)
        self._original = self.values
        self._script, self._defaults = shown(script), defaults
        self._merge = Merge(self._is_known, self._unknown, self._fitted)

    def remove(self, names: Sequence[str]) -> None:
        """Remove keys, all at once: an index counts what the script holds."""
        if not names:
            return
        marked: Any = self.values
        keys = [_key_of(name, "--unset") for name in names]
        for key in keys:
            if _at(self.values, key) is MISSING:
                raise self._unknown(key, "--unset")
            marked = self._with(marked, key, 0, lambda before: DELETE)
        after = _swept(marked)
        for key in keys:
            self._note(after, key, f"--unset {spelt(key)}")
        self.values = after

    def put(self, name: str, value: Any) -> None:
        """Set a key, or add to the list that it holds."""
        is_added = name.endswith(_ADD)
        key = _key_of(name.removesuffix(_ADD), "--set")
        self._check(key, value)

        def change(before: Any) -> Any:
            if is_added:
                return self._longer(before, value, key)
            return self._merge.over(self._known(before, value, key), value, key)

        after = self._with(self.values, key, 0, change)
        given = [below for below, _ in leaves(cleared(value), key)]
        self._note(after, key, f"--set {spelt(key)}{_ADD * is_added}", given, value)
        self.values = after

    def _check(self, key: Key, value: Any) -> None:
        """Refuse a key that is nowhere, unless the value for it is marked as new."""
        is_marked = isinstance(value, New)
        for end, part in enumerate(key):
            here = _at(self.values, key[:end])
            if isinstance(here, Later):
                raise HparamsError(
                    f"--set {spelt(key)}: {spelt(key[:end])} is {here!r} in "
                    f"{place_of(key[:end], self.histories) or self._script}",
                    "set what it follows, or all of it",
                )
            if holds(here, part):
                continue
            if type(here) in (list, tuple):
                raise HparamsError(
                    f"--set {spelt(key)}: {spelt(key[:end])} has {len(here)} items",
                    "indices count from 0; += adds items",
                )
            if here is not MISSING and not isinstance(here, dict):
                what = f"{spelt(key[:end])} is {_described(here, key)}, which has no keys"
                raise HparamsError(f"--set {spelt(key)}: {what}")
            if not is_marked and not self._is_known(key[: end + 1]):
                raise self._unknown(key, value=value)

    def _with(self, value: Any, key: Key, depth: int, change: Callable[[Any], Any]) -> Any:
        """Return `value`, which is at `key[:depth]`, with what is at `key` changed."""
        if depth == len(key):
            return change(value)
        if value is DELETE:
            return value
        part = key[depth]
        if type(value) in (list, tuple):
            items = list(value)
            items[part] = self._with(items[part], key, depth + 1, change)
            return type(value)(items)
        held = {} if value is MISSING else value
        changed = self._with(held.get(part, MISSING), key, depth + 1, change)
        return with_items(held, {**held, part: changed})

    def _note(
        self, after: Any, key: Key, source: str, given: Sequence[Key] = (), value: Any = None
    ) -> None:
        """Note what has become of a key."""
        top = _leaf_key(self.values, key)
        before = [leaf for leaf, _ in _leaves_at(self.values, top)]
        now = dict(_leaves_at(after, top))
        changed = [top] if top != key else given
        for leaf, held in now.items():
            if leaf in changed or leaf not in before:
                is_new = isinstance(value, New) and leaf not in self.histories
                self._add(leaf, Change(None, 0, held, is_new, source))
        for leaf in before:
            if leaf not in now and _at(self.values, leaf) != {}:
                self._add(leaf, Change(None, 0, DELETE, source=source))
        if not now and len(top) > 1 and _at(after, top[:-1]) == {}:
            self._add(top[:-1], Change(None, 0, {}, source=source))

    def _add(self, leaf: Key, change: Change) -> None:
        before = self.histories.get(leaf, ())
        # Two keys may remove the same, or all that a dictionary has.
        is_gone = change.value is DELETE or change.value == {}
        if not (before and is_gone and before[-1].value == change.value):
            self.histories[leaf] = (*before, change)

    def _known(self, before: Any, value: Any, key: Key) -> Any:
        """Return what a value has to fit: what is there, or else the default, or what follows."""
        found = before
        if isinstance(before, Later):
            # Where that cannot be known, anything fits.
            with contextlib.suppress(HparamsError):
                found = _Resolution(self.values, self._defaults).resolved(before, key)
        elif before is MISSING and not isinstance(value, New):
            found = _at(self._defaults, key)
        # What is not there itself, nothing is merged into.
        is_merged = isinstance(found, dict) and isinstance(value, dict)
        return before if found is None or is_merged else found

    def _longer(self, before: Any, value: Any, key: Key) -> Any:
        """Return a list with items added to it."""
        if type(before) not in (list, tuple):
            held = "nothing" if before is MISSING else _described(before, key)
            raise HparamsError(f"--set {spelt(key)}{_ADD}: it adds to lists, and there is {held}")
        if type(value) not in (list, tuple):
            raise HparamsError(
                f"--set {spelt(key)}{_ADD}: it adds lists, not {_described(value, key)}",
                f"put it into brackets: {spelt(key)}{_ADD}[{masked_at(key, value)!r}]",
            )
        return type(before)([*before, *self._fitted(before, value, key)])

    def _is_known(self, key: Key) -> bool:
        for end in range(1, len(key)):
            if _at(self._original, key[:end]) is None:
                return True  # It gives way to anything.
        return _at(self._original, key) is not MISSING or key[-1] in known_names(key[:-1])

    def _unknown(self, key: Key, option: str = "--set", value: Any = None) -> HparamsError:
        known = keys_in(self._original)
        if option == "--set":
            known += keys_in(self._defaults)
            for end in range(len(key)):
                known += [(*key[:end], name) for name in known_names(key[:end])]
        near = did_you_mean_key(key, known, self.histories)
        told = reprlib.repr(masked_at(key, value))
        mark = f'new(…) adds a key: --set "{spelt(key)}=new({told})"' if option == "--set" else None
        return HparamsError(
            f"{option} {spelt(key)}: {self._script} has no such key{near}",
            mark if key[0] == "config" else None if near else OWN_KEYS,
        )

    def _fitted(self, before: Any, value: Any, key: Key) -> Any:
        if key in SWITCHES and {type(before), type(value)} <= {bool, dict}:
            return value
        found = _fitted(before, value)
        if found is not _MISFIT:
            return found
        place = place_of(key, self.histories)
        is_default = _at(self._original, key) is MISSING
        where = f" in {place}" if place else ", the default" * is_default
        raise HparamsError(
            f"--set {spelt(key)}: {_described(value, key)} cannot take the place of "
            f"{_described(before, key)}{where}",
            _mend(before, value, key, place),
        )


def _key_of(name: str, option: str) -> Key:
    key = parsed_key(name)
    if key is None:
        raise UserError(f"{option} {name}: expected a key, like config.learning_rate")
    return key


def _at(values: Any, key: Key) -> Any:
    for part in key:
        if not holds(values, part):
            return MISSING
        values = values[part]
    return values


def _leaf_key(values: Any, key: Key) -> Key:
    """Return `key`, or that of the list that it leads into: lists are values."""
    for end in range(len(key)):
        if type(_at(values, key[:end])) in (list, tuple):
            return key[:end]
    return key


def _leaves_at(values: Any, key: Key) -> Iterator[tuple[Key, Any]]:
    value = _at(values, key)
    if value is not MISSING:
        yield from leaves(value, key)


def _swept(value: Any) -> Any:
    """Return a value without what is `DELETE` in its dictionaries and lists."""
    if isinstance(value, dict):
        left = {key: _swept(item) for key, item in value.items() if item is not DELETE}
        return with_items(value, left)
    if type(value) in (list, tuple):
        return type(value)(_swept(item) for item in value if item is not DELETE)
    return value


# Types.


def _fitted(before: Any, value: Any) -> Any:
    """Return `value` as it takes the place of `before`, or `_MISFIT` if it cannot.

    None gives way to anything, and anything to None: nobody writes that by mistake.
    """
    if before is None or value is None or isinstance(value, Later) or isinstance(before, Later):
        return value
    if isinstance(before, bool) or isinstance(value, bool):
        return value if type(before) is type(value) else _MISFIT
    if isinstance(before, numbers.Number):
        return _fitted_number(before, value)
    if isinstance(before, Path) and isinstance(value, (str, Path)):
        return Path(value)
    if isinstance(before, (list, tuple)):
        return _fitted_items(before, value)
    if isinstance(value, type(before)) or (callable(before) and callable(value)):
        return value
    return _MISFIT


def _fitted_number(before: Any, value: Any) -> Any:
    # Python has no literals of these.
    is_word = isinstance(value, str) and value in ("inf", "-inf", "nan")
    if type(before) is float and (is_word or type(value) is int):
        with contextlib.suppress(OverflowError):
            return float(value)
        return _MISFIT
    kinds: tuple[type, ...] = (numbers.Integral, numbers.Real, numbers.Complex, type(before))
    kind = next(kind for kind in kinds if isinstance(before, kind))
    return value if isinstance(value, kind) else _MISFIT


def _fitted_items(before: Any, value: Any) -> Any:
    """Return a list whose items fit where those before are all of one type."""
    if not isinstance(value, (list, tuple)):
        return _MISFIT
    items = list(value)
    if len({type(item) for item in before}) == 1:
        items = [_fitted(before[0], item) for item in items]
    if any(item is _MISFIT for item in items):
        return _MISFIT
    if type(before) in (list, tuple):
        return type(before)(items)
    return value if type(value) is type(before) else _MISFIT


def _described(value: Any, key: Key) -> str:
    return f"{reprlib.repr(masked_at(key, value, secrets_around()))} ({type(value).__name__})"


def _mend(before: Any, value: Any, key: Key, place: str) -> str | None:
    """Return what to write instead, where it can be guessed."""
    name = spelt(key)
    if isinstance(before, bool):
        return "True or False"
    if isinstance(before, str) and not isinstance(value, (dict, list, tuple)):
        told = masked_at(key, str(value))
        return f"""in quotes it is a string: --set "{name}='{told}'\""""
    if isinstance(before, int) and isinstance(value, float) and place:
        return f"with {before}.0 in {place} it may be both"
    return None


# Following.


def resolved(given: Effective, *, defaults: Mapping[str, Any]) -> Effective:
    """Return hparams with the values of what they follow, and of the environment, in them.

    Args:
        given: The hparams, and what has set them.
        defaults: What holds where they say nothing.

    Raises:
        HparamsError: A key that is followed is not there, or they follow each other in a circle; a
            variable of the environment is missing, or of another type than its default.
    """
    values = cleared(given.hparams)
    resolution = _Resolution(values, defaults, given.histories)
    found: dict[str, Any] = resolution.resolved(values, ())
    histories = dict(given.histories)
    for key, sources in _by_leaf(values, resolution.sources).items():
        *earlier, last = histories.pop(key, (Change(None, 0, None),))
        told = ", ".join(dict.fromkeys([*filter(None, [last.source]), *sources]))
        for leaf, value in _leaves_at(found, key):
            before = histories.get(leaf, tuple(earlier))
            histories[leaf] = (*before, replace(last, value=value, source=told))
    in_order = {leaf: histories[leaf] for leaf, _ in leaves(found) if leaf in histories}
    return Effective(found, in_order | histories)


def _by_leaf(values: Any, sources: Mapping[Key, str]) -> dict[Key, list[str]]:
    """Return what gave values by the keys that have histories: lists are values."""
    found: dict[Key, list[str]] = {}
    for key, source in sources.items():
        found.setdefault(_leaf_key(values, key), []).append(source)
    return found


class _Resolution:
    """Puts values in the place of what stands for them."""

    def __init__(
        self, values: Any, defaults: Mapping[str, Any], histories: Histories | None = None
    ) -> None:
        self.sources: dict[Key, str] = {}
        """What gave the values that were put in, by their keys."""
        self._values, self._defaults, self._histories = values, defaults, histories or {}
        self._open: list[tuple[Key, Key]] = []
        """What is being resolved: the key of each ref, and the one that it follows."""

    def resolved(self, value: Any, key: Key) -> Any:
        """Return a copy of `value`, which is at `key`, as it is when all are known."""
        if isinstance(value, dict):
            items = {part: self.resolved(item, (*key, part)) for part, item in value.items()}
            return with_items(value, items)
        if type(value) in (list, tuple):
            items_of = enumerate(value)
            return type(value)([self.resolved(item, (*key, at)) for at, item in items_of])
        if type(value) in (set, frozenset):
            return type(value)([self.resolved(item, key) for item in value])
        if isinstance(value, New):
            return self.resolved(value.value, key)
        if not isinstance(value, Later):
            return value
        return self._read(value, key) if isinstance(value, Env) else self._follow(value, key)

    def _follow(self, ref: Any, key: Key) -> Any:
        """Return the value of a ref: that of what it follows, or a string."""
        assert isinstance(ref, Ref)
        self.sources[key] = f"follows {', '.join(map(spelt, ref.keys))}"
        if ref.key is not None:
            return self._followed(ref, key, ref.key)
        return "".join(piece.text + self._filled(ref, key, piece) for piece in ref.pieces)

    def _filled(self, ref: Ref, key: Key, piece: Piece) -> str:
        """Return what stands behind the text of a piece."""
        if piece.key is None:
            return ""
        value = self._followed(ref, key, piece.key)
        try:
            return format(_CONVERSIONS[piece.conversion](value), piece.spec)
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(
                ref, key, f"{spelt(piece.key)} is {_described(value, piece.key)}: {error}"
            ) from None

    def _followed(self, ref: Ref, key: Key, target: Key) -> Any:
        """Return what is at `target`, which the ref at `key` follows."""
        if any(key == each for each, _ in self._open):
            raise HparamsError(
                f"{ref.place}: refs follow each other in a circle: {self._circle(key)}",
                "give one of them a value",
            )
        self._open.append((key, target))
        try:
            return self._at(ref, key, target)
        finally:
            self._open.pop()

    def _circle(self, key: Key) -> str:
        """Return the keys that are passed on the way from `key` to itself."""
        start = [each for each, _ in self._open].index(key)
        passed = [each for pair in self._open[start:] for each in pair]
        return " -> ".join(dict.fromkeys(map(spelt, passed))) + f" -> {spelt(key)}"

    def _at(self, ref: Ref, key: Key, target: Key) -> Any:
        value: Any = self._values
        path: Key = ()
        for part in target:
            value = self.resolved(value, path) if isinstance(value, Later) else value
            if not holds(value, part):
                return self._default(ref, key, target)
            value, path = value[part], (*path, part)
        return self.resolved(value, path)

    def _default(self, ref: Ref, key: Key, target: Key) -> Any:
        default = _at(self._defaults, target)
        if default is MISSING:
            known = [*keys_in(self._values), *keys_in(self._defaults)]
            near = did_you_mean_key(target, known, self._histories)
            raise self._error(ref, key, f"unknown key {spelt(target)}{near}")
        return copied(default)

    def _read(self, env: Env, key: Key) -> Any:
        """Return the value of an environment variable, or its default."""
        text, default = os.environ.get(env.name), self.resolved(env.default, key)
        if text is None and not env.has_default:
            message = f"the environment has no {env.name}"
            raise self._error(
                env, key, message, f"set it, or give a default: env({env.name!r}, default=…)"
            )
        self.sources[key] = f"env {env.name}" + (", not set: its default" if text is None else "")
        if text is None or default is None or isinstance(default, str):
            return default if text is None else text
        value = _fitted(default, _read_as(default, text))
        if value is _MISFIT:
            told = masked_at((env.name, *key), text, secrets_around())
            message = f"the environment has {env.name}={told}, the default is "
            hint = "1, 0, true or false" if isinstance(default, bool) else None
            raise self._error(env, key, message + _described(default, key), hint)
        return value

    def _error(self, later: Later, key: Key, message: str, hint: str | None = None) -> HparamsError:
        shown_later = masked_at(key, later)
        return HparamsError(f"{later.place}: {spelt(key)} = {shown_later!r}: {message}", hint)


def _read_as(default: Any, text: str) -> Any:
    """Return what the text of a variable means where `default` would stand."""
    if isinstance(default, Path):
        return text
    if isinstance(default, bool):
        return _SWITCHES.get(text.strip().lower(), text)
    return _literal(text)


_SWITCHES: Final = {"1": True, "true": True, "0": False, "false": False}
"""How environments spell them."""


_CONVERSIONS: Final[dict[str | None, Callable[[Any], Any]]] = {
    None: lambda value: value,
    "r": repr,
    "s": str,
    "a": ascii,
}
