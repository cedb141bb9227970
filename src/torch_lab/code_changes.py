"""What differs between two versions of a script: its functions, by what they do.

Both are compared as syntax trees, so that comments, blank lines, quotes and line breaks do not
count. Strings that stand by themselves do nothing: where nothing else differs, it is the docstring.
"""

from __future__ import annotations

import ast
import copy
import difflib
import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from torch_lab.imports import parsed
from torch_lab.provenance import binds_hparams

__all__ = ["MODULE_LEVEL", "WHOLE_FILE", "CodeChange", "Kind", "code_changes", "holds_hparams"]

MODULE_LEVEL: Final = "module level"
"""What the statements of a script that define no function and no class go by."""
WHOLE_FILE: Final = "file"
"""What a script goes by that only one version has."""
_UNREADABLE: Final = "file, which is no Python"
_DEFINITIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Kind(enum.StrEnum):
    """How a part of a script differs."""

    CHANGED = "changed"
    ADDED = "added"
    REMOVED = "removed"
    DOCSTRING = "docstring only"


@dataclass(frozen=True)
class CodeChange:
    """A part of a script that differs."""

    kind: Kind
    name: str
    """A function, a class or a method (`Net.forward`), `MODULE_LEVEL`, or the whole file."""
    line_before: int | None = None
    line_after: int | None = None
    lines: tuple[str, ...] = ()
    """The lines that were removed and added, with those around them, as `diff -u` has them."""


def code_changes(before: bytes | None, after: bytes | None) -> list[CodeChange]:
    """Return in what two versions of a script differ; None for one that there is not."""
    if before == after:
        return []
    if before is None or after is None:
        return [CodeChange(Kind.ADDED if before is None else Kind.REMOVED, WHOLE_FILE)]
    try:
        old, new = _parts(before), _parts(after)
    except SyntaxError:
        return [CodeChange(Kind.CHANGED, _UNREADABLE)]
    # In the order of the new version, where it has them.
    names = dict.fromkeys([*new, *old])
    pairs = ((name, old.get(name, ()), new.get(name, ())) for name in names)
    found = [change for pair in pairs if (change := _change(*pair)) is not None]
    # Of a class that is new or gone nobody wants to read every method.
    whole = {change.name for change in found if change.kind in (Kind.ADDED, Kind.REMOVED)}
    return [change for change in found if whole.isdisjoint(_around(change.name))]


def _around(name: str) -> list[str]:
    """Return the names of the classes that something is in."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def holds_hparams(source: bytes) -> bool:
    """Return whether a script has hparams, be they its own or another's."""
    try:
        return binds_hparams(parsed(source))
    except SyntaxError:
        return False


@dataclass(frozen=True)
class _Piece:
    """A statement of a script, or the head of a class."""

    line: int
    text: str
    tree: str
    """It without its place."""
    bare: str
    """The same without docstrings; nothing, if it is one."""


def _parts(source: bytes) -> dict[str, tuple[_Piece, ...]]:
    """Return the functions, classes and methods of a script, and the rest, by their names.

    Raises:
        SyntaxError: It is no Python.
    """
    tree = parsed(source)
    # Only these end a line to the parser.
    lines = source.decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    parts: dict[str, tuple[_Piece, ...]] = {}
    for name, node in _named(tree.body, "", MODULE_LEVEL):
        text, whole = _text(node, lines), ast.dump(node)
        piece = _Piece(node.lineno, text, whole, _bare(node))
        parts[name] = (*parts.get(name, ()), piece)
    return parts


def _named(body: Sequence[ast.stmt], prefix: str, rest: str) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the statements of a body, with the names of the parts that they belong to."""
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            name = f"{prefix}{statement.name}"
            head = copy.copy(statement)
            head.body = []
            yield name, head
            yield from _named(statement.body, f"{name}.", name)
        elif isinstance(statement, _DEFINITIONS):
            yield f"{prefix}{statement.name}", statement
        else:
            yield rest, statement


def _text(node: ast.stmt, lines: Sequence[str]) -> str:
    decorators = getattr(node, "decorator_list", [])
    start = min([node.lineno, *(each.lineno for each in decorators)])
    is_head = isinstance(node, ast.ClassDef)
    inner = [part.end_lineno for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    ends = [*inner, node.lineno] if is_head else [node.end_lineno]
    return "\n".join(lines[start - 1 : max(end for end in ends if end is not None)])


def _bare(node: ast.stmt) -> str:
    """Return a statement's tree without docstrings, which are removed from it."""
    if _is_string(node):
        return ""
    for inner in ast.walk(node):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(inner, block, None)
            if isinstance(statements, list):
                setattr(inner, block, [each for each in statements if not _is_string(each)])
    return ast.dump(node)


def _is_string(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _change(name: str, old: Sequence[_Piece], new: Sequence[_Piece]) -> CodeChange | None:
    if [piece.tree for piece in old] == [piece.tree for piece in new]:
        return None
    bare_old, bare_new = ([piece for piece in side if piece.bare] for side in (old, new))
    if not (bare_old and bare_new) and name != MODULE_LEVEL:
        kind = Kind.REMOVED if bare_old else Kind.ADDED
        return CodeChange(kind, name, _first_line(old), _first_line(new))
    is_docstring = [piece.bare for piece in bare_old] == [piece.bare for piece in bare_new]
    kind = Kind.DOCSTRING if is_docstring else Kind.CHANGED
    if is_docstring:
        places = _places(old, new, attrgetter("tree"))
    else:
        places = _places(bare_old, bare_new, attrgetter("bare"))
    return CodeChange(kind, name, *places, lines=tuple(_diff(old, new)))


def _first_line(pieces: Sequence[_Piece]) -> int | None:
    return pieces[0].line if pieces else None


def _places(
    old: Sequence[_Piece], new: Sequence[_Piece], compared: Callable[[_Piece], str]
) -> tuple[int | None, int | None]:
    """Return the lines of the first statements that differ in what is `compared` of them."""
    pairs = enumerate(zip(old, new, strict=False))
    shorter = min(len(old), len(new))
    differing = (at for at, (one, other) in pairs if compared(one) != compared(other))
    first = next(differing, shorter)
    lines = [side[min(first, len(side) - 1)].line if side else None for side in (old, new)]
    return lines[0], lines[1]


def _diff(old: Sequence[_Piece], new: Sequence[_Piece]) -> Iterator[str]:
    before, after = ("\n".join(piece.text for piece in side).split("\n") for side in (old, new))
    lines = list(difflib.unified_diff(before, after, n=2, lineterm=""))
    for number, line in enumerate(lines[2:]):
        # The numbers would count from the start of the function.
        if not line.startswith("@@"):
            yield line
        elif number:
            yield "…"
