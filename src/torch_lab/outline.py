"""The keys of an hparams script as its text tells them: nothing of it is run.

Dictionaries that are spelt out are followed through assignments, layers and imports of siblings. A
value that is computed is a leaf, whatever it may be.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from torch_lab.provenance import NAME, Key, copied, spelt

__all__ = ["keys_in"]

_LEAF: Final = ...
_DELETE: Final = object()
_COPIES: Final = {"copy", "deepcopy", "new"}
"""Calls that return what they are given, as far as keys go."""
_MOST_SCRIPTS: Final = 100


def keys_in(script: Path) -> dict[str, bool]:
    """Return the dotted keys of the hparams in `script`, and whether each is a dictionary.

    What cannot be read has none.
    """
    hparams = _Outlines().of(script).get(NAME)
    spelled = ((spelt(key), is_section) for key, is_section in _keys(hparams, ()))
    # In other keys than names there are brackets with quotes, which a shell has uses for.
    return {key: is_section for key, is_section in spelled if not {"'", '"'} & set(key)}


def _keys(value: Any, path: Key) -> Iterator[tuple[Key, bool]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _keys(item, (*path, index)) if isinstance(item, (dict, list)) else ()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key), isinstance(item, dict)
            yield from _keys(item, (*path, key))


class _Module(dict[str, Any]):
    """The global names of a script, and the outlines of their values."""


class _Outlines:
    """The outlines of scripts that stand on each other."""

    def __init__(self) -> None:
        self._open: list[Path] = []
        self._read = 0

    def of(self, script: Path) -> _Module:
        """Return the outline of `script`, as a run of it would begin afresh."""
        module = _Module()
        self._read += 1
        if script in self._open or self._read > _MOST_SCRIPTS:
            return module
        self._open.append(script)
        try:
            tree = ast.parse(script.read_bytes())
            _Outline(script, module, self).follow(tree.body)
        except (OSError, SyntaxError, ValueError, RecursionError):
            pass
        finally:
            self._open.pop()
        return module


class _Outline:
    """Follows the statements of one script.

    Args:
        script: The script.
        names: Where its global names are to be put.
        outlines: Those of all scripts.
    """

    def __init__(self, script: Path, names: _Module, outlines: _Outlines) -> None:
        self._script = script
        self._names = names
        self._outlines = outlines

    def follow(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._follow(statement)

    def _follow(self, statement: ast.stmt) -> None:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return
            case ast.Assign(targets=targets, value=value):
                held = self._value(value)
                for target in targets:
                    self._store(target, held)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._store(target, self._value(value))
            case ast.AugAssign(target=target, value=value):
                _extend(self._value(target), self._value(value))
            case ast.Delete(targets=targets):
                for target in targets:
                    self._delete(target)
            case ast.Expr(ast.Call(ast.Attribute(owner, method), arguments, keywords)):
                self._call_method(self._value(owner), method, arguments, keywords)
            case ast.Import() | ast.ImportFrom():
                self._import(statement)
        # Of what is done perhaps, or again and again, the keys may be there.
        for name in ("body", "orelse", "finalbody"):
            self.follow(getattr(statement, name, []))
        for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            self.follow(part.body)

    def _store(self, target: ast.expr, held: Any) -> None:
        match target:
            case ast.Name(name):
                self._names[name] = held
            case ast.Subscript(value=owner, slice=ast.Constant(key)):
                container = self._value(owner)
                if isinstance(container, dict) or _has(container, key):
                    container[key] = held

    def _delete(self, target: ast.expr) -> None:
        match target:
            case ast.Subscript(value=owner, slice=ast.Constant(key)):
                container = self._value(owner)
                if _has(container, key):
                    del container[key]

    def _call_method(
        self, owner: Any, method: str, arguments: list[ast.expr], keywords: list[ast.keyword]
    ) -> None:
        given = [self._value(argument) for argument in arguments]
        first = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else None
        if method == "update" and isinstance(owner, dict):
            for each in [*given, self._of_keywords(keywords)]:
                owner.update(each if isinstance(each, dict) else {})
        elif method == "setdefault" and isinstance(owner, dict) and first is not None:
            owner.setdefault(first, given[1] if len(given) > 1 else _LEAF)
        elif method == "pop" and isinstance(owner, dict):
            owner.pop(first, None)
        elif method == "append" and isinstance(owner, list):
            owner.extend(given)
        elif method == "extend" and given:
            _extend(owner, given[0])

    def _import(self, statement: ast.Import | ast.ImportFrom) -> None:
        """Follow the import of a sibling; what comes from elsewhere holds leaves."""
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if "." not in alias.name:
                    self._names[alias.asname or alias.name] = self._sibling(alias.name)
        elif statement.module is None and statement.level == 1:
            for alias in statement.names:
                self._names[alias.asname or alias.name] = self._sibling(alias.name)
        elif statement.module is not None and statement.level <= 1:
            module = self._sibling(statement.module.replace(".", "/"))
            for alias in statement.names:
                if alias.name == "*":
                    self._names.update(module)
                else:
                    self._names[alias.asname or alias.name] = module.get(alias.name, _LEAF)

    def _sibling(self, name: str) -> _Module:
        places = (f"{name}.py", f"{name}/__init__.py")
        files = (self._script.parent / place for place in places)
        file = next((file for file in files if file.is_file()), None)
        return self._outlines.of(file) if file else _Module()

    def _value(self, node: ast.expr | None) -> Any:
        match node:
            case ast.Dict(keys=keys, values=values):
                return self._of_pairs(keys, values)
            case ast.List(elts=items):
                return [self._value(item) for item in items]
            case ast.Name(name):
                return _DELETE if name == "DELETE" else self._names.get(name, _LEAF)
            case ast.Attribute(value=owner, attr=name):
                held = self._value(owner)
                # What a layer returns may be the dictionary itself.
                return held.get(name, _LEAF) if isinstance(held, _Module) else held
            case ast.Subscript(value=owner, slice=ast.Constant(key)):
                held = self._value(owner)
                return held[key] if _has(held, key) else _LEAF
            case ast.BinOp(left=left, right=right):
                return _joined(self._value(left), self._value(right))
            case ast.IfExp(body=body):
                return self._value(body)
            case ast.Call(func=function, args=arguments, keywords=keywords):
                return self._called(function, arguments, keywords)
        return _LEAF

    def _of_pairs(self, keys: list[ast.expr | None], values: list[ast.expr]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in zip(keys, values, strict=True):
            held = self._value(value)
            if isinstance(key, ast.Constant):
                found[key.value] = held
            elif key is None and isinstance(held, dict):
                found.update(held)
        return found

    def _of_keywords(self, keywords: list[ast.keyword]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for keyword in keywords:
            held = self._value(keyword.value)
            found |= {keyword.arg: held} if keyword.arg else held if isinstance(held, dict) else {}
        return found

    def _called(
        self, function: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword]
    ) -> Any:
        name = getattr(function, "attr", getattr(function, "id", ""))
        first = arguments[0] if arguments else None
        if name == "import_script_as_module":
            return self._script_at(first)
        if name == "layer":
            base = self._script_at(first).get(NAME, {})
            changes = [self._value(argument) for argument in arguments[1:]]
            for each in [*changes, self._of_keywords(keywords)]:
                base = _merged(base, each)
            return base
        if name == "dict":
            return _joined(copied(self._value(first)), self._of_keywords(keywords))
        if name in _COPIES:
            owner = function.value if isinstance(function, ast.Attribute) else None
            return copied(self._value(first if arguments else owner))
        return _LEAF

    def _script_at(self, path: ast.expr | None) -> _Module:
        if not isinstance(path, ast.Constant) or not isinstance(path.value, str):
            return _Module()
        given = Path(path.value).expanduser()
        beside = self._script.parent / given
        return self._outlines.of((beside if beside.is_file() else given).resolve())


def _has(container: Any, key: Any) -> bool:
    if isinstance(container, list):
        return isinstance(key, int) and -len(container) <= key < len(container)
    return isinstance(container, dict) and key in container


def _extend(held: Any, more: Any) -> None:
    if isinstance(held, dict) and isinstance(more, dict):
        held.update(more)
    elif isinstance(held, list) and isinstance(more, list):
        held.extend(more)


def _joined(left: Any, right: Any) -> Any:
    """Return what `left | right` or `left + right` has; one of them may be a leaf."""
    if isinstance(left, dict) or isinstance(right, dict):
        sides = [side for side in (left, right) if isinstance(side, dict)]
        return {key: value for side in sides for key, value in side.items()}
    if isinstance(left, list) and isinstance(right, list):
        return left + right
    return _LEAF


def _merged(base: Any, changes: Any) -> Any:
    """Return `base` as a layer has it that changes some of its values."""
    if not isinstance(changes, dict):
        return changes
    held = base if isinstance(base, dict) else {}
    merged = {key: value for key, value in held.items() if changes.get(key) is not _DELETE}
    for key, value in changes.items():
        if value is not _DELETE:
            merged[key] = _merged(merged.get(key), value)
    return merged
