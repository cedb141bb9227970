"""Hparams for a person to read: as Python that can be pasted, and in `train path --help`."""

from __future__ import annotations

import ast
import contextlib
import enum
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final

import click

from torch_lab.console import place_of
from torch_lab.errors import TorchLabError
from torch_lab.experiment import Experiment
from torch_lab.overrides import parsed_words
from torch_lab.provenance import Change, leaves, spelt
from torch_lab.redaction import masked
from torch_lab.utils import shown

__all__ = ["as_python", "write_help"]

_WIDTH: Final = 100
_LONGEST_VALUE: Final = 40
_BRACKETS: Final[Mapping[type, tuple[str, str]]] = {list: ("[", "]"), tuple: ("(", ")")}


# As Python.


def as_python(hparams: dict[str, Any]) -> str:
    """Return the text of a script that defines these hparams.

    What has no text of its own, such as an object, is left out there, with a comment that shows it.
    """
    writer = _Writer()
    lines = list(writer.lines(hparams, "", "hparams = ", ""))
    imports = [f"import {name}" for name in sorted(writer.modules)]
    imports += ["from pathlib import Path"] if writer.needs_path else []
    return "\n".join([*imports, *([""] if imports else []), *lines])


class _Writer:
    """Writes values as Python, and notes what must be imported for them."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.needs_path = False

    def lines(self, value: Any, indent: str, before: str, after: str) -> Iterator[str]:
        """Yield `value` on one line if there is room, else each item of it on lines of its own."""
        text = self.text(value)
        line = f"{indent}{before}{text}{after}"
        # The hparams themselves are to be read.
        if text is not None and len(line) <= _WIDTH and (indent or not value):
            yield line
        elif type(value) is dict and value:
            yield f"{indent}{before}{{"
            for key, item in value.items():
                if (name := self.text(key)) is None:
                    yield f"{indent}    # {_short(key)}: {_short(item)}"
                else:
                    yield from self.lines(item, f"{indent}    ", f"{name}: ", ",")
            yield f"{indent}}}{after}"
        elif type(value) in _BRACKETS and value:
            opening, closing = _BRACKETS[type(value)]
            yield f"{indent}{before}{opening}"
            for item in value:
                yield from self.lines(item, f"{indent}    ", "", ",")
            yield f"{indent}{closing}{after}"
        else:
            yield line if text is not None else f"{indent}{before}...{after}  # {_short(value)}"

    def text(self, value: Any) -> str | None:
        """Return `value` as an expression on one line; None if it has none."""
        if type(value) is str:
            return _quoted(value)
        if type(value) is float and not math.isfinite(value):
            return f'float("{value}")'
        if value is None or type(value) in (bool, int, float, complex, bytes):
            return repr(value)
        if type(value) in (list, tuple, dict, set, frozenset):
            return self._container(value)
        if isinstance(value, Path):
            self.needs_path = True
            return f"Path({_quoted(str(value))})"
        if isinstance(value, (type, enum.Enum, FunctionType, BuiltinFunctionType)):
            return self._named(value)
        return None

    def _container(self, value: Any) -> str | None:
        pairs = value.items() if type(value) is dict else ((item,) for item in value)
        texts = [[self.text(part) for part in pair] for pair in pairs]
        if any(None in each for each in texts):
            return None
        inner = ", ".join(": ".join(map(str, each)) for each in texts)
        if type(value) is frozenset or not (value or type(value) in (list, tuple, dict)):
            return f"{type(value).__name__}({f'{{{inner}}}' if value else ''})"
        if type(value) is tuple and len(value) == 1:
            inner += ","
        opening, closing = _BRACKETS.get(type(value), ("{", "}"))
        return f"{opening}{inner}{closing}"

    def _named(self, value: Any) -> str | None:
        """Return the name of what can be imported by it."""
        owner = type(value) if isinstance(value, enum.Enum) else value
        module, name = owner.__module__, owner.__qualname__
        name += f".{value.name}" if isinstance(value, enum.Enum) else ""
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not value or not module.replace(".", "").isidentifier():
            return None  # Such as a lambda, or what the script itself defines.
        if module == "builtins":
            return name
        self.modules.add(module)
        return f"{module}.{name}"


def _quoted(text: str) -> str:
    written = repr(text)
    if written.startswith("'") and '"' not in text:
        return '"' + written[1:-1].replace("\\'", "'") + '"'
    return written


def _short(value: Any) -> str:
    written = " ".join(repr(value).split())
    return written if len(written) <= _LONGEST_VALUE else f"{written[: _LONGEST_VALUE - 1]}…"


# In the help.


def write_help(
    script: Path, formatter: click.HelpFormatter, set: Sequence[str] = (), unset: Sequence[str] = ()
) -> None:
    """Write what there is to say of an experiment: its docstrings, its keys, and who sets them.

    Args:
        script: The hparams script. If it fails, a line says why.
        formatter: Where to.
        set: The words of `--set`.
        unset: Those of `--unset`.
    """
    try:
        # What a script prints is no help.
        with contextlib.redirect_stdout(sys.stderr):
            experiment = Experiment.load(script, set=parsed_words(set), unset=unset)
        docstrings = dict(_docstrings(experiment))
    except (Exception, SystemExit) as error:
        formatter.write_paragraph()
        formatter.write(f"The experiment is not shown: {_reason(error)}\n")
        return
    for file, told in docstrings.items():
        with formatter.section(shown(file)):
            _write(told.splitlines(), formatter)
    with formatter.section("Hparams"):
        _write(_table(_rows(experiment)), formatter)


def _docstrings(experiment: Experiment) -> Iterator[tuple[Path, str]]:
    for file in (experiment.config_script, experiment.script):
        if told := ast.get_docstring(ast.parse(file.read_bytes(), str(file))):
            yield file, told


def _write(lines: Sequence[str], formatter: click.HelpFormatter) -> None:
    # As they are: to fold them would break commands and lists.
    indent = " " * formatter.current_indent
    formatter.write("".join(f"{indent}{line}".rstrip() + "\n" for line in lines))


def _reason(error: BaseException) -> str:
    if isinstance(error, TorchLabError):
        return error.message
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shown(Path(error.filename))}:{error.lineno}: {error.msg}"
    place = place_of(error)
    told = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{told} ({place})" if place else told


def _rows(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """Yield each key with its value, and the line that sets it."""
    for key, value in leaves(masked(experiment.effective.hparams)):
        changes = experiment.histories.get(key, ())
        yield spelt(key), _short(value), _place(changes[-1], experiment) if changes else ""


def _place(change: Change, experiment: Experiment) -> str:
    """Return what set a value: `hparams.py:4`, with no more of the path than is needed."""
    if change.file is None:
        return change.source
    name = change.file.name if change.file.parent == experiment.folder else shown(change.file)
    return ", ".join(filter(None, [f"{name}:{change.line}", change.source]))


def _table(rows: Iterator[tuple[str, str, str]]) -> list[str]:
    cells = list(rows)
    first, second = (max((len(row[at]) for row in cells), default=0) for at in (0, 1))
    return [f"{key:<{first}}  {value:<{second}}  {place}" for key, value, place in cells]
