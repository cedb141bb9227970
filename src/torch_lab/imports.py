"""What scripts import of their project, by their texts alone: nothing is run."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from torch_lab.places import CONFIG_SCRIPT

__all__ = ["imported_files", "is_of_project", "parsed", "unkept_imports"]

_INSTALLED: Final = {"site-packages", "dist-packages"}
_OTHERS: Final = sys.stdlib_module_names | {__name__.partition(".")[0]}
"""Whose modules are never those of a project."""


@dataclass(frozen=True)
class _Import:
    """What a statement imports, wherever that may be."""

    names: tuple[str, ...]
    """The dotted name in its parts; the last may be no module, but a name in one."""
    level: int = 0
    """How many dots stand in front of it."""

    @property
    def is_of_others(self) -> bool:
        """Whether it is no module of a project by its name alone."""
        return not self.level and self.names[0] in _OTHERS

    def files(self, script: Path, folders: Iterable[Path]) -> Mapping[tuple[str, ...], Path]:
        """Return the files that `script` runs for it, the packages around it first, by names.

        Args:
            script: Where the statement is.
            folders: Where modules are found; the first that has any of them counts.
        """
        places = list(script.parents)[self.level - 1 : self.level] if self.level else folders
        ends = range(1, len(self.names) + 1)
        for place in places:
            found = {self.names[:end]: _module(place.joinpath(*self.names[:end])) for end in ends}
            if any(found.values()):
                return {names: file for names, file in found.items() if file is not None}
        return {}


@dataclass(frozen=True)
class _Script:
    """Another script that a script runs."""

    path: str

    def files(self, script: Path, folders: Iterable[Path]) -> Mapping[tuple[str, ...], Path]:
        """Return its file, if it is found from where `script` is."""
        file = (script.parent / self.path).resolve()
        return {(self.path,): file} if file.is_file() else {}


@dataclass(frozen=True)
class _Places:
    """Where the scripts of an experiment find modules."""

    experiment: Path
    packages: Sequence[Path]
    """The folders of the project's packages."""

    @classmethod
    def below(cls, root: Path, experiment: Path, packages: Iterable[Path]) -> _Places:
        return cls(root / experiment, [root / folder for folder in packages])

    def files(self, wanted: _Import | _Script, script: Path) -> Mapping[tuple[str, ...], Path]:
        """Return what `script` runs for an import, by names."""
        # A module of a package does not see its neighbours by their bare names; a script does.
        is_package = (script.parent / "__init__.py").is_file()
        is_experiment = (script.parent / CONFIG_SCRIPT).is_file()
        beside = [script.parent] if is_experiment or not is_package else []
        return wanted.files(script, [*beside, self.experiment, *self.packages])


def imported_files(scripts: Iterable[Path], experiment: Path, root: Path) -> list[Path]:
    """Return the files of a project that scripts import, and those that these import in turn.

    An import counts wherever it stands, also in a function that is never called. What a program
    puts together while it runs (`importlib.import_module(name)`) is not found.

    Args:
        scripts: Where to begin.
        experiment: The folder whose modules can be imported by their bare names.
        root: The project. What is installed below it is none of its own.
    """
    places = _Places.below(root, experiment, _package_folders(root))
    found: dict[Path, None] = {}
    waiting = list(scripts)
    while waiting:
        script = waiting.pop()
        for wanted in _imports(script):
            new = [file for file in places.files(wanted, script).values() if file not in found]
            found |= dict.fromkeys(new)
            waiting += new
    return sorted(found)


def unkept_imports(scripts: Iterable[Path], kept: Path, experiment: Path, root: Path) -> set[Path]:
    """Return the files of a project that scripts import, and that were not kept with them.

    Args:
        scripts: Copies of scripts, in the folder `kept`.
        kept: The folder that they were copied to, by their paths in the project.
        experiment: The experiment's folder, by its path in the project.
        root: The project as it is now, which tells what is its own.
    """
    packages = _package_folders(root)
    then, now = (_Places.below(each, experiment, packages) for each in (kept, root))
    found = set()
    for script in scripts:
        original = root / script.relative_to(kept)
        for wanted in _imports(script):
            there = then.files(wanted, script)
            files = now.files(wanted, original)
            found |= {file for names, file in files.items() if names not in there}
    return {file.relative_to(root) for file in found if file.is_relative_to(root)}


def is_of_project(module: ModuleType, root: Path) -> bool:
    """Return whether a module that has been imported is a Python file of the project at `root`."""
    file = Path(getattr(module, "__file__", None) or "")
    is_own = file.is_relative_to(root) and _INSTALLED.isdisjoint(file.parts)
    return is_own and file.suffix == ".py" and module.__name__.partition(".")[0] not in _OTHERS


def parsed(source: bytes) -> ast.Module:
    """Return the syntax tree of a script, without a word about what is odd in it.

    Raises:
        SyntaxError: It is no Python.
    """
    with warnings.catch_warnings():
        # What a script deserves to be warned of, it is warned of when it runs.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (ValueError, RecursionError) as error:
            raise SyntaxError(str(error)) from None


def _package_folders(root: Path) -> list[Path]:
    """Return where the packages of a project are imported from, as paths below it."""
    listed = [Path(entry).resolve() for entry in sys.path if entry]
    own = [
        entry.relative_to(root)
        for entry in listed
        if entry.is_relative_to(root) and _INSTALLED.isdisjoint(entry.parts)
    ]
    # As the commands have them, also where none of them is running.
    return list(dict.fromkeys([*own, Path(), Path("src")]))


def _module(place: Path) -> Path | None:
    """Return the file of the module that would lie at `place`, if it is there."""
    candidates = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in candidates if file.is_file()), None)


def _imports(script: Path) -> Iterator[_Import | _Script]:
    try:
        nodes = list(ast.walk(parsed(script.read_bytes())))
    except (OSError, SyntaxError):
        return
    for node in nodes:
        for wanted in _imports_of(node):
            if not (isinstance(wanted, _Import) and wanted.is_of_others):
                yield wanted


def _imports_of(node: ast.AST) -> Iterator[_Import | _Script]:
    match node:
        case ast.Import(names=aliases):
            yield from (_Import(tuple(alias.name.split("."))) for alias in aliases)
        case ast.ImportFrom(module=module, names=aliases, level=level):
            names = tuple(module.split(".")) if module else ()
            yield from (_Import((*names, alias.name), level) for alias in aliases)
        case ast.Call(
            func=(
                ast.Name(id="import_script_as_module" | "layer")
                | ast.Attribute(attr="import_script_as_module" | "layer")
            ),
            args=[ast.Constant(value=str(path)), *_],
        ):
            yield _Script(path)
