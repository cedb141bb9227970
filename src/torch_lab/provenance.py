"""Which line set which value of the hparams, in scripts that are ordinary Python.

An hparams script runs with a call behind each of its statements, which looks at what has become of
its dictionary `hparams`: the dictionaries themselves are ordinary. Keys that a statement spells out
are found at their own lines in it, all others at the line where it begins. What a script takes over
from a layer keeps the history that it has there.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch_lab.errors import HparamsError

__all__ = [
    "DELETED",
    "HOOK",
    "NAME",
    "Change",
    "Histories",
    "Key",
    "New",
    "Recorder",
    "binds_hparams",
    "copied",
    "instrumented",
    "is_same",
    "key_lines",
    "leaves",
    "spelt",
]

Key: TypeAlias = tuple[Any, ...]
"""Where a value is: the keys of dictionaries and the indices of lists on the way to it."""
NAME: Final = "hparams"
HOOK: Final = "__recorded__"
"""The name that the calls behind the statements go by."""


class _Deleted:
    def __repr__(self) -> str:
        return "deleted"

    def __reduce__(self) -> str:
        return "DELETED"  # A copy is the same object.


_LOAD: Final = ast.Load()
_POSITION: Final = ("lineno", "col_offset", "end_lineno", "end_col_offset")
_SIMPLE: Final = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Delete)
"""Statements that have no others in them."""
DELETED: Final = _Deleted()
"""What a key holds after it was removed."""


@dataclass(frozen=True)
class New:
    """A value that a script marks as one that no base has."""

    value: Any

    def __repr__(self) -> str:
        return f"new({self.value!r})"


@dataclass(frozen=True)
class Change:
    """A value that a line of a script has set, or what came after the scripts."""

    file: Path | None
    """None if no script has set it: then `source` tells."""
    line: int
    value: Any
    """What it was then; `DELETED` if the key was removed, and of a dictionary an empty one."""
    is_new: bool = False
    """Whether the script says that no base has the key, or stands on none."""
    source: str = ""
    """What gave the value beside the line: `--set config.lr`, `env DATA_DIR`."""


Histories: TypeAlias = dict[Key, tuple[Change, ...]]
"""All changes of each value, the oldest first."""


def spelt(key: Key) -> str:
    """Return a key as one types it: `config.optimizers[1].lr`."""
    words = ""
    for part in key:
        if isinstance(part, int) and not isinstance(part, bool):
            words += f"[{part}]"
        elif isinstance(part, str) and part.isidentifier():
            words += f".{part}" if words else part
        else:
            words += f"[{part!r}]"
    return words


# Reading the script.


@dataclass(frozen=True)
class _Statement:
    """A statement, as far as its text tells what it does to the hparams."""

    line: int
    spelled: Mapping[Key, int] = field(default_factory=dict)
    """The lines of the keys that it spells out, from the dictionary on that it writes to."""
    is_local: bool = False
    """Whether nothing can change but what it stores under one key."""
    place: Key = ()
    """The global name and the keys that lead to the dictionary it writes to, if they are plain."""
    under: Key = ()
    """The key in that dictionary, if it is one."""

    def line_of(self, key: Key, written_to: Sequence[Key]) -> int:
        """Return the line that sets `key`, if this statement does."""
        below = [key[len(path) :] for path in written_to if key[: len(path)] == path]
        # Where it writes to may be unknown: then the end of a key tells.
        for own in below or (key[start:] for start in range(len(key))):
            for end in range(len(own), 0, -1):
                if own[:end] in self.spelled:
                    return self.spelled[own[:end]]
        return self.line


def instrumented(source: bytes, file: Path) -> tuple[ast.Module, list[_Statement]]:
    """Return a script with a call behind each statement, and the statements by their numbers.

    A script that binds no `hparams` stays as it is.

    Raises:
        SyntaxError: It is no Python.
    """
    tree = ast.parse(source, str(file))
    instrumenting = _Instrumenting()
    if binds_hparams(tree):
        tree.body = instrumenting.with_calls(tree.body, is_global=True)
    return tree, instrumenting.statements


def binds_hparams(tree: ast.Module) -> bool:
    """Return whether a script binds the name `hparams`, or may: by a star, or in a function."""
    in_functions = (node for node in ast.walk(tree) if isinstance(node, ast.Global))
    return any(map(_binds, _outside_of_functions(tree))) or any(
        NAME in node.names for node in in_functions
    )


def _outside_of_functions(tree: ast.Module) -> Iterator[ast.AST]:
    for statement in tree.body:
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            yield from ast.walk(statement)


def _binds(node: ast.AST) -> bool:
    if isinstance(node, ast.alias):
        return (node.asname or node.name) in (NAME, "*")
    return isinstance(node, ast.Name) and node.id == NAME and isinstance(node.ctx, ast.Store)


class _Instrumenting:
    """Puts a call behind each statement, and numbers the statements."""

    def __init__(self) -> None:
        self.statements: list[_Statement] = []

    def with_calls(self, body: list[ast.stmt], *, is_global: bool) -> list[ast.stmt]:
        """Return the statements of a block with calls between them.

        Args:
            body: The statements.
            is_global: Whether their names are those of the script, not those of a function.
        """
        found = []
        for statement in body:
            found.append(statement)
            if isinstance(statement, ast.ClassDef):
                continue
            if not isinstance(statement, _SIMPLE):
                self._inside(statement, is_global=is_global)
            if _may_change(statement):
                found.append(self._call(statement, is_global=is_global))
        return found

    def _inside(self, statement: ast.stmt, *, is_global: bool) -> None:
        is_global &= not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef))
        for name in ("body", "orelse", "finalbody"):
            if inner := getattr(statement, name, None):
                setattr(statement, name, self.with_calls(inner, is_global=is_global))
        for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            part.body = self.with_calls(part.body, is_global=is_global)

    def _call(self, statement: ast.stmt, *, is_global: bool) -> ast.stmt:
        written_to, spelled, is_local = _stored(statement)
        at = {name: getattr(statement, name) for name in _POSITION}
        arguments: list[ast.expr] = [ast.Constant(len(self.statements), **at)]
        place, under = _place(written_to) if is_global else ((), ())
        if written_to is not None and not place:
            # It is evaluated when whatever it raises is caught.
            nothing = ast.arguments([], [], None, [], [], None, [])
            later = ast.Lambda(nothing, ast.copy_location(written_to, statement), **at)
            arguments.append(later)
        self.statements.append(_Statement(statement.lineno, spelled, is_local, place, under))
        return ast.Expr(ast.Call(ast.Name(HOOK, _LOAD, **at), arguments, [], **at), **at)


def _place(written_to: ast.expr | None) -> tuple[Key, Key]:
    """Return the name and the keys of `name["key"]["key"]`, and the key that is paired with it."""
    under: Key = ()
    match written_to:
        case ast.Tuple([container, ast.Constant(key)]):
            written_to, under = container, (key,)
    keys: list[Any] = []
    while isinstance(written_to, ast.Subscript) and isinstance(written_to.slice, ast.Constant):
        keys.append(written_to.slice.value)
        written_to = written_to.value
    if not isinstance(written_to, ast.Name):
        return (), ()
    return (written_to.id, *reversed(keys)), under


def _may_change(statement: ast.stmt) -> bool:
    """Return whether a statement may change the hparams, and the next one is reached after it."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        names = [alias.asname or alias.name for alias in statement.names]
        return NAME in names or "*" in names
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.Assign):
        names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
        return len(names) < len(statement.targets) or NAME in names or _acts(statement.value)
    if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        # To a list or a dictionary no number can be added.
        return not (isinstance(statement.value, ast.Constant) and statement.target.id != NAME)
    quiet = (ast.Return, ast.Raise, ast.Break, ast.Continue, ast.Pass, ast.Global, ast.Nonlocal)
    return not isinstance(statement, (*quiet, ast.FunctionDef, ast.AsyncFunctionDef))


def _name_of(call: ast.Call) -> str:
    """Return the last name of what is called: `layer` of `utils.layer(…)`."""
    match call.func:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name
    return ""


def _stored(statement: ast.stmt) -> tuple[ast.expr | None, dict[Key, int], bool]:
    """Return what a statement writes to and under which keys, and whether that is all it does."""
    match statement:
        case (
            ast.Assign(targets=[target, *_], value=value)
            | ast.AnnAssign(target=target, value=value)
        ) if value is not None:
            if isinstance(target, ast.Name) and target.id == NAME:
                return ast.Name(NAME, _LOAD), key_lines(value), False
            return _under_key(target, value)
        case ast.AugAssign(target=ast.Subscript() as target, value=value):
            return _under_key(target, value)
        case ast.AugAssign(target=ast.Name(name), op=ast.BitOr(), value=value):
            return ast.Name(name, _LOAD), key_lines(value), False
        case ast.Expr(ast.Call(ast.Attribute(written_to, "update"), arguments, keywords)):
            spelled = {key: line for each in arguments for key, line in key_lines(each).items()}
            spelled |= _of_keywords(keywords)
            return (written_to if _is_pure(written_to) else None), spelled, False
    every = [node for node in ast.walk(statement) if isinstance(node, ast.Dict)]
    return None, {key: line for node in every for key, line in key_lines(node).items()}, False


def _under_key(target: ast.expr, value: ast.expr) -> tuple[ast.expr | None, dict[Key, int], bool]:
    if not isinstance(target, ast.Subscript) or not _is_pure(target):
        return None, key_lines(value), False
    # The key's value is known when the statement has run: the pair stands for the place.
    place = ast.Tuple([target.value, target.slice], _LOAD)
    return place, key_lines(value), _is_pure(value) or not _acts(value)


def _acts(node: ast.expr) -> bool:
    """Return whether an expression may change something by being evaluated."""
    acts = (ast.Call, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
    return any(isinstance(each, acts) for each in ast.walk(node))


def _is_pure(node: ast.expr) -> bool:
    """Return whether an expression can be evaluated again without doing anything again."""
    if isinstance(node, ast.Subscript):
        return _is_pure(node.value) and _is_pure(node.slice)
    if isinstance(node, ast.Attribute):
        return _is_pure(node.value)
    return isinstance(node, (ast.Name, ast.Constant))


def key_lines(value: ast.expr) -> dict[Key, int]:
    """Return the lines of the keys that a dictionary, or `layer(…)`, spells out, at any depth."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
        return {**key_lines(value.left), **key_lines(value.right)}
    if isinstance(value, ast.Call) and _name_of(value) in ("dict", "layer"):
        return _of_keywords(value.keywords)
    if isinstance(value, ast.Call) and _name_of(value) == "new":
        return {key: line for each in value.args for key, line in key_lines(each).items()}
    if not isinstance(value, ast.Dict):
        return {}
    found: dict[Key, int] = {}
    for key, inner in zip(value.keys, value.values, strict=True):
        if isinstance(key, ast.Constant):
            found |= _entry(key.value, key.lineno, inner)
    return found


def _of_keywords(keywords: Sequence[ast.keyword]) -> dict[Key, int]:
    found: dict[Key, int] = {}
    for keyword in keywords:
        if keyword.arg is not None:
            found |= _entry(keyword.arg, keyword.value.lineno, keyword.value)
    return found


def _entry(key: Any, line: int, value: ast.expr) -> dict[Key, int]:
    return {(key,): line} | {(key, *below): at for below, at in key_lines(value).items()}


# Looking at the dictionary.


class _Seen:
    """What a dictionary or a list held when it was looked at last."""

    def __init__(self, value: Any) -> None:
        self.take(value)

    def take(self, value: Any) -> None:
        # All of it is kept, so that nothing else gets its identity.
        self.value = value
        self.copy = None if type(value) in (dict, list) else copied(value)
        self.parts = dict(_items(value))
        self.inner = {key: _Seen(part) for key, part in self.parts.items() if _is_container(part)}

    def changes(self, value: Any, path: Key) -> Iterator[tuple[Key, Any]]:
        """Yield what has changed, by its key: values, lists as a whole; and take it over."""
        if type(value) is not dict:
            if not self._is_still(value):
                self.take(value)
                yield path, copied(value)
            return
        old, had_any, touched = self.parts, bool(self.parts), list(self.inner)
        if not self._holds_the_same(value):
            for key in [key for key in old if key not in value]:
                yield from self.change_of(key, DELETED, path)
            touched += [key for key, part in value.items() if old.get(key, DELETED) is not part]
        for key in dict.fromkeys(touched):
            if key in value:
                yield from self.change_of(key, value[key], path)
        if not value and path and (had_any or value is not self.value):
            yield path, {}
        # In the order of now, which the next look compares.
        self.value, self.parts = value, dict(value)

    def change_of(self, key: Any, part: Any, path: Key) -> Iterator[tuple[Key, Any]]:
        """Yield what has changed under one key, and take it over."""
        below, inner = (*path, key), self.inner.get(key)
        if inner is not None and type(part) is type(inner.value):
            yield from inner.changes(part, below)
        elif inner is None and key in self.parts and self.parts[key] is part:
            return
        else:
            if inner is not None and type(inner.value) is dict:
                yield from ((leaf, DELETED) for leaf, _ in leaves(inner.value_seen(), below))
            elif part is DELETED:
                yield below, DELETED
            self.inner.pop(key, None)
            if _is_container(part):
                self.inner[key] = _Seen(part)
            if part is not DELETED:
                yield from leaves(part, below)
        if part is DELETED:
            self.parts.pop(key, None)
        else:
            self.parts[key] = part

    def value_seen(self) -> Any:
        """Return the dictionary or list as it was."""
        parts = {
            key: self.inner[key].value_seen() if key in self.inner else part
            for key, part in self.parts.items()
        }
        if type(self.value) is dict:
            return parts
        return list(parts.values()) if type(self.value) is list else self.copy

    def places_of(self, container: Any, path: Key = ()) -> Iterator[tuple[Key, _Seen]]:
        """Yield where a dictionary or list is in this one; of what is in a list, where that is."""
        is_list = type(self.value) is not dict
        if self.value is container or (is_list and self._holds(container)):
            yield path, self
        elif not is_list:
            for key, inner in self.inner.items():
                if inner.value is container or inner.inner:
                    yield from inner.places_of(container, (*path, key))

    def _holds(self, container: Any) -> bool:
        return any(True for inner in self.inner.values() for _ in inner.places_of(container))

    def _holds_the_same(self, value: Any) -> bool:
        return (
            len(value) == len(self.parts)
            and list(value) == list(self.parts)
            and all(map(is_, value.values(), self.parts.values()))
        )

    def _is_still(self, value: Any) -> bool:
        """Return whether a list, or a set and the like, is as it was, with all that is in it."""
        if type(value) is not list:
            return is_same(self.copy, value)
        if len(value) != len(self.parts) or not all(map(is_, value, self.parts.values())):
            return False
        return not any(True for key in self.inner for _ in self.change_of(key, value[key], ()))


def _is_container(value: Any) -> bool:
    """Return whether there may be another value in this one later."""
    if type(value) is tuple:
        return any(map(_is_container, value))
    return isinstance(value, (dict, list, set))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if type(value) is dict:
        yield from value.items()
    elif type(value) is list:
        yield from enumerate(value)


def leaves(value: Any, path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield the values in nested dictionaries; lists are values, and so is an empty dictionary."""
    if isinstance(value, New):
        yield from ((key, New(part)) for key, part in leaves(value.value, path))
    elif type(value) is dict and value:
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    else:
        yield path, copied(value)


def copied(value: Any) -> Any:
    """Return `value` with its dictionaries, lists and sets copied, and all else in them shared."""
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if type(value) is list:
        return [copied(item) for item in value]
    if type(value) is tuple:
        return tuple(copied(item) for item in value) if _is_container(value) else value
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


class Recorder:
    """Follows the dictionary `hparams` of a script that runs, and keeps what set its values.

    Args:
        file: The script.
        namespace: Its global names.
        statements: Those of its statements that call this.
        bases: Returns the recorders of the layers that have run for it so far, the newest first.
    """

    def __init__(
        self,
        file: Path,
        namespace: Mapping[str, Any],
        statements: Sequence[_Statement],
        bases: Callable[[], Iterable[Recorder]],
    ) -> None:
        self.histories: Histories = {}
        self.marked: set[Key] = set()
        """The keys that are meant to be new, as a `layer` has them that was asked for them."""
        self._file = file
        self._namespace = namespace
        self._statements = statements
        self._bases = bases
        self._seen = _Seen({})
        self._has_ended = False

    def __call__(self, number: int, written_to: Callable[[], Any] | None = None) -> None:
        """Note what a statement has changed.

        Args:
            number: That of the statement.
            written_to: Returns what it has written to, if its text tells: a dictionary, or one and
                a key in it.
        """
        hparams = self._namespace.get(NAME)
        if self._has_ended or type(hparams) is not dict:
            return
        statement = self._statements[number]
        try:
            self._look(hparams, statement, written_to)
        except RecursionError:
            place = f"{self._file}:{statement.line}"
            raise HparamsError(
                f"{place}: the hparams are too deep, or contain themselves"
            ) from None

    def _look(
        self, hparams: Any, statement: _Statement, written_to: Callable[[], Any] | None
    ) -> None:
        container, *under = self._target(statement, written_to)
        is_local = statement.is_local and hparams is self._seen.value
        places = list(self._seen.places_of(container)) if under and container is not None else []
        if is_local and places and all(type(seen.value) is dict for _, seen in places):
            changes = dict(
                change
                for path, seen in places
                for change in seen.change_of(under[0], container[under[0]], path)
            )
        else:
            changes = dict(self._seen.changes(hparams, ()))
            places = [] if container is None else list(self._seen.places_of(container))
        # A list is a value: what is written into it is written to all of it.
        written = [(*path, *under) if type(seen.value) is dict else path for path, seen in places]
        self._note(changes, statement, written, bool(under))

    def _target(
        self, statement: _Statement, written_to: Callable[[], Any] | None
    ) -> tuple[Any, ...]:
        """Return what a statement has written to, and the key in it, if they can be told."""
        try:
            if statement.place:
                container: Any = self._namespace
                for part in statement.place:
                    container = container[part]
                return container, *statement.under
            found = written_to() if written_to else None
        except Exception:  # What it wrote to is gone again.
            return (None,)
        return found if isinstance(found, tuple) else (found,)

    def end(self) -> None:
        """Follow the script no more: functions of it may still be called."""
        self._has_ended = True
        # What a layer has removed never comes into sight here.
        for base in self._bases():
            for key, changes in base.histories.items():
                if key in self.histories or self._is_value(key):
                    continue
                if changes[-1].value is DELETED:
                    self.histories[key] = changes
                elif (line := self._line_that_took(key)) is not None:
                    gone = Change(self._file, line, DELETED)
                    self.histories[key] = (*changes, gone)

    def _line_that_took(self, key: Key) -> int | None:
        """Return the line of what stands now where `key` was, above it or below."""
        for other, changes in self.histories.items():
            is_near = other[: len(key)] == key or key[: len(other)] == other
            if is_near and changes[-1].file == self._file:
                return changes[-1].line
        return None

    def _is_value(self, key: Key) -> bool:
        value = self.value_at(key)
        return value is not DELETED and not (type(value) is dict and value)

    def value_at(self, key: Key) -> Any:
        """Return what the hparams hold at `key`; `DELETED` if there is nothing."""
        value: Any = self._namespace.get(NAME)
        for part in key:
            if not isinstance(value, (dict, list, tuple)):
                return DELETED
            try:
                value = _bare(value[part])
            except (LookupError, TypeError):
                return DELETED
        return value

    def _note(
        self,
        changes: Mapping[Key, Any],
        statement: _Statement,
        written_to: Sequence[Key],
        has_key: bool,
    ) -> None:
        spelled = statement.spelled.items()
        own = {(*path, *key): line for path in written_to for key, line in spelled}
        if has_key:
            own |= dict.fromkeys(written_to, statement.line)
        emptied = {
            key[:end]
            for key, value in changes.items()
            if value is DELETED
            for end in range(len(key))
        }
        for key, value in changes.items():
            for end in range(1, len(key) if value is not DELETED else 0):
                if (section := key[:end]) in self.histories:
                    line = own.get(section) or statement.line_of(section, written_to)
                    self._make_section(section, line)
            line = own.get(key) or statement.line_of(key, written_to)
            self._add(key, value, line, key not in own and key not in emptied)
        for key, line in own.items():
            value = self.value_at(key)
            if value is DELETED:
                for removed in self._inherited(key):
                    self._add(removed, DELETED, line, may_be_of_base=False)
            elif key not in changes and not (type(value) is dict and value):
                self._add(key, copied(value), line, may_be_of_base=False)

    def _inherited(self, key: Key) -> list[Key]:
        """Return what the bases hold at `key` and below it."""
        return list(
            dict.fromkeys(
                below
                for base in self._bases()
                for below, changes in base.histories.items()
                if below[: len(key)] == key and changes[-1].value is not DELETED
            )
        )

    def _add(self, key: Key, value: Any, line: int, may_be_of_base: bool) -> None:
        before = self.histories.get(key)
        is_new, value = isinstance(value, New) or key in self.marked, _bare(value)
        # What stands on nothing has no base that a key could be missing in.
        is_new |= not any(base.histories for base in self._bases())
        if before is None:
            known = (base.histories[key] for base in self._bases() if key in base.histories)
            before = next(known, ())
        if before and may_be_of_base and is_same(before[-1].value, value):
            self.histories[key] = before
            return
        if before and (before[-1].file, before[-1].line) == (self._file, line):
            before = before[:-1]  # What a line does in a loop stands once.
        self.histories[key] = (*before, Change(self._file, line, value, is_new))

    def _make_section(self, key: Key, line: int) -> None:
        """Note that there is a section, where a value may have been."""
        changes = self.histories[key]
        if all(type(change.value) is dict for change in changes):
            del self.histories[key]  # It was a section all the time, and empty.
        elif changes[-1].value is not DELETED:
            self.histories[key] = (*changes, Change(self._file, line, DELETED))


def _bare(value: Any) -> Any:
    return _bare(value.value) if isinstance(value, New) else value


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, and of one type; so are all that is in them."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    try:
        return bool(one == other)
    except Exception:  # Of what compares otherwise, such as arrays.
        return False
