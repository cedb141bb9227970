"""Scripts run as modules: afresh each time, importable by name in any process.

A script at `/project/00_demo/hparams.py` becomes the module
`torch_lab.scripts./project/00_demo.hparams`. The name holds the path, so that a spawned process,
which knows nothing of this one, finds the script again when it unpickles a class that was defined
in it. A second run of the same script in one process is `….hparams#2`.

While a script runs, its siblings are importable (`import helpers`, `from .helpers import Net`), as
they are for `python script.py`. They get names of the same kind, so that two experiments may each
have a `helpers.py`.

What is imported from outside of all scripts begins a generation: it runs afresh with its layers and
their siblings, as in a new process. Of the second one, the names are
`torch_lab.scripts./project/00_demo#2.hparams`; the first one stays as it was, so that what it has
made can still be pickled.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from torch_lab.errors import ScriptError, did_you_mean
from torch_lab.provenance import HOOK, Recorder, copied, instrumented

if TYPE_CHECKING:
    from importlib.abc import Loader as _Loader
    from importlib.abc import MetaPathFinder as _MetaPathFinder
else:
    # It imports as much as all of this: the resources of packages, temporary files, archives.
    _Loader = _MetaPathFinder = object

__all__ = [
    "Layer",
    "edited_since_they_ran",
    "generation_of",
    "import_script_as_module",
    "layers_of",
    "of_generation",
    "running",
    "running_script",
    "shown",
    "siblings_of",
]

__path__: list[str] = []  # Makes this module a package: scripts are its sub-modules.

_LAYERS = "__layers__"
_NUMBER = re.compile(r"#\d+$")
"""Which run of a script, or which generation of a folder, from the second on."""
_running: ContextVar[tuple[Path, ...]] = ContextVar("running scripts", default=())
_layers: ContextVar[list[Layer] | None] = ContextVar("layers of the running script", default=None)
_generation: ContextVar[int | None] = ContextVar("generation of the running scripts", default=None)


@dataclass(frozen=True)
class Layer:
    """A script that ran, and the hparams that it held when it ended."""

    path: Path
    hparams: Any
    recorder: Recorder = field(repr=False, compare=False)
    """What has followed them."""


def import_script_as_module(path: str | Path) -> ModuleType:
    """Run a script afresh and return its module.

    Every call runs the script again, so two layers never share a dictionary. The module is
    registered under a name of its own: an `if __name__ == "__main__":` block does not fire, and
    classes defined in the script can be pickled. A call from outside of all scripts runs the
    siblings that they import afresh as well.

    Args:
        path: Absolute, or with `~`, or relative: to the script that is calling if the file is
            there, else to the working directory.

    Raises:
        ScriptError: It is missing, does not compile, or imports itself in a circle.
    """
    script = _found(path)
    _refuse_circle(script)
    layers: list[Layer] = []
    outer = _layers.set(layers)
    try:
        with of_generation(_generation.get() or _next_generation()):
            module = importlib.import_module(_unused_name(script))
    except SyntaxError as error:
        raise _syntax_error(error, script) from error
    finally:
        _layers.reset(outer)
    recorder: Recorder = vars(module)[HOOK]
    hparams = copied(getattr(module, "hparams", None))
    layers.append(Layer(script, hparams, recorder))
    vars(module)[_LAYERS] = tuple(layers)
    if (above := _layers.get()) is not None:
        above.extend(layers)
    return module


def layers_of(module: ModuleType) -> tuple[Layer, ...]:
    """Return every script that ran for `module`, the base layer first and its own last."""
    layers: tuple[Layer, ...] = vars(module)[_LAYERS]
    return layers


def generation_of(module: ModuleType) -> int:
    """Return the generation of the script that runs, or has run, as `module`."""
    return _generation_in(module.__name__)


@contextlib.contextmanager
def of_generation(number: int) -> Iterator[None]:
    """Let scripts and siblings that are imported meanwhile be of a generation."""
    token = _generation.set(number)
    try:
        yield
    finally:
        _generation.reset(token)


@contextlib.contextmanager
def running(script: Path, generation: int | None = None) -> Iterator[None]:
    """Run code of `script`: its siblings can be imported, and relative paths start at its folder.

    `sys.path` stays as it is.

    Args:
        script: The script.
        generation: That of it which has the code; the one that runs, if not given.
    """
    token = _running.set((*_running.get(), script))
    outer = _generation.set(generation or _generation.get() or 1)
    finder = _SiblingFinder(script.parent, _package_of(script.parent))
    # The siblings of a script elsewhere that imports this one may have the names of its own.
    hidden = {name: sys.modules.pop(name) for name in _short_names() & sys.modules.keys()}
    before = set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        _generation.reset(outer)
        _running.reset(token)
        sys.meta_path.remove(finder)
        for name in finder.short_names - before:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def _short_names() -> set[str]:
    """Return the names that siblings of the scripts that run have been imported by."""
    finders = [finder for finder in sys.meta_path if isinstance(finder, _SiblingFinder)]
    return {name for finder in finders for name in finder.short_names}


def running_script() -> Path | None:
    """Return the script whose code is running, if one is."""
    return _running.get()[-1] if _running.get() else None


def siblings_of(script: Path, generation: int = 1) -> list[Path]:
    """Return the modules beside `script` that have been imported, by it or for it.

    Args:
        script: The script.
        generation: That of it which is meant.
    """
    with of_generation(generation):
        package = f"{_package_of(script.parent)}."
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(package)]
    files = {module.__file__ for module in modules if module.__file__}
    return sorted(Path(file) for file in files)


def edited_since_they_ran(generation: int) -> list[Path]:
    """Return the files of a generation's scripts and siblings that are not what has run of them."""
    ran = [
        module.__spec__.loader
        for name, module in list(sys.modules.items())
        if name.startswith(f"{__name__}.")
        and _generation_in(name) == generation
        and module.__spec__ is not None
    ]
    return sorted({Path(one.path) for one in ran if isinstance(one, _FreshLoader) and one.is_stale})


def _found(path: str | Path) -> Path:
    script, calling = Path(path).expanduser(), running_script()
    if calling is not None:
        beside = calling.parent / script
        script = script if script.is_file() and not beside.is_file() else beside
    script = script.resolve()
    if script.is_file() and script.suffix == ".py":
        return script
    if script.is_file():
        raise ScriptError(f"{path} is not a Python script")
    if script.is_dir():
        raise ScriptError(f"{path} is a directory, not a script")
    names = (
        [sibling.name for sibling in script.parent.glob("*.py")] if script.parent.is_dir() else []
    )
    by = f" (imported by {shown(calling)})" if calling else ""
    raise ScriptError(f"{path}: no such script{by}{did_you_mean(script.name, names)}")


def _refuse_circle(script: Path) -> None:
    running = _running.get()
    if script in running:
        circle = [*running[running.index(script) :], script]
        raise ScriptError(
            "scripts import each other in a circle: " + " -> ".join(shown(step) for step in circle),
            hint="move what they share into a script that imports none of them",
        )


def shown(path: Path) -> str:
    """Return `path` as a person would type it: relative, if below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _syntax_error(error: SyntaxError, script: Path) -> ScriptError:
    where = shown(Path(error.filename or script))
    where += f":{error.lineno}" if error.lineno else ""
    line = (error.text or "").rstrip("\n")
    indent = len(line) - len(line.lstrip())
    caret = " " * max((error.offset or 1) - 1 - indent, 0) + "^"
    return ScriptError(f"{where}: {error.msg}", hint=f"{line.lstrip()}\n{caret}" if line else None)


def _package_of(folder: Path) -> str:
    """Return the name of the package of scripts in `folder`, in the generation that runs.

    Dots and `#` have meanings of their own in it.
    """
    number = _generation.get() or 1
    return f"{__name__}.{_escaped(str(folder))}" + (f"#{number}" if number > 1 else "")


def _next_generation() -> int:
    """Return the first generation of which nothing has been imported."""
    names = [name for name in list(sys.modules) if name.startswith(f"{__name__}.")]
    return 1 + max(map(_generation_in, names), default=0)


def _generation_in(name: str) -> int:
    """Return the generation in the name of a module that is a script or a sibling of one."""
    folder = name.removeprefix(f"{__name__}.").partition(".")[0]
    number = _NUMBER.search(folder)
    return int(number[0][1:]) if number else 1


def _escaped(part: str) -> str:
    for character in "%.#":
        part = part.replace(character, f"%{ord(character):02X}")
    return part


def _unused_name(script: Path) -> str:
    name = f"{_package_of(script.parent)}.{_escaped(script.stem)}"
    numbered = (f"{name}#{number}" for number in itertools.count(2))
    return next(
        candidate for candidate in itertools.chain([name], numbered) if candidate not in sys.modules
    )


def _unescaped(part: str) -> str:
    for character in "#.%":
        part = part.replace(f"%{ord(character):02X}", character)
    return part


class _ScriptFinder(_MetaPathFinder):
    """Finds `torch_lab.scripts.<folder>` and the scripts below it, in any process."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        folder, *inner = fullname.removeprefix(f"{__name__}.").split(".")
        if not inner:
            return importlib.machinery.ModuleSpec(fullname, None, is_package=True)
        *packages, name = inner
        place = Path(_unescaped(_NUMBER.sub("", folder))).joinpath(*map(_unescaped, packages))
        stem = _unescaped(_NUMBER.sub("", name))
        script = place / f"{stem}.py"
        if script.is_file():
            kind = _FreshLoader if packages else _ScriptLoader
            return importlib.util.spec_from_loader(fullname, kind(fullname, str(script)))
        package = place / stem / "__init__.py"
        if not package.is_file():
            return None
        return importlib.util.spec_from_file_location(
            fullname,
            package,
            loader=_FreshLoader(fullname, str(package)),
            submodule_search_locations=[str(package.parent)],
        )


class _FreshLoader(importlib.machinery.SourceFileLoader):
    """Runs what is in a file now, never a cached .pyc."""

    _ran: bytes | None = None

    def get_data(self, path: str) -> bytes:
        data = self._ran = super().get_data(path)
        return data

    @property
    def is_stale(self) -> bool:
        """Whether the file is not what has run."""
        try:
            return Path(self.path).read_bytes() != self._ran
        except OSError:
            return True

    def get_code(self, fullname: str) -> CodeType:
        # Such a file counts as fresh when an edit keeps size and second.
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


class _ScriptLoader(_FreshLoader):
    """Runs a script with its siblings importable, and with relative layers found beside it."""

    def exec_module(self, module: ModuleType) -> None:
        script = Path(self.path)
        tree, statements = instrumented(self.get_data(self.path), script)
        package = module.__name__.rpartition(".")[0]
        recorder = Recorder(script, vars(module), statements, _Bases(package))
        vars(module)[HOOK] = recorder
        with running(script, generation_of(module)):
            exec(compile(tree, script, "exec", dont_inherit=True), vars(module))
        recorder.end()


class _Bases:
    """Finds what has followed the layers of a script, and the siblings that it imports.

    Args:
        package: The package of the script, which is running.
    """

    def __init__(self, package: str) -> None:
        self._package = f"{package}."
        self._counts = 0, 0
        self._found: list[Recorder] = []

    def __call__(self) -> list[Recorder]:
        """Return them, the newest first."""
        layers = _layers.get() or []
        if self._counts != (counts := (len(layers), len(sys.modules))):
            siblings = [
                vars(module)[HOOK]
                for name, module in reversed(sys.modules.items())
                if name.startswith(self._package) and _is_sibling(module)
            ]
            self._found = [*(layer.recorder for layer in reversed(layers)), *siblings]
            self._counts = counts
        return self._found


def _is_sibling(module: ModuleType) -> bool:
    """Return whether a script was imported by its short name, and is no layer, now or of old."""
    names = vars(module)
    is_imported = HOOK in names and _LAYERS not in names
    return is_imported and Path(names["__file__"]) not in _running.get()


class _SiblingFinder(_MetaPathFinder):
    """Makes `import name` import `torch_lab.scripts.<folder>.name`."""

    def __init__(self, folder: Path, package: str) -> None:
        self.folder = folder
        self.package = package
        self.short_names: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = fullname.partition(".")[0]
        # A sibling named like a module of the standard library would break others that import it.
        if top in sys.stdlib_module_names or not self._has(top):
            return None
        self.short_names.add(fullname)
        return importlib.machinery.ModuleSpec(fullname, _Alias(f"{self.package}.{fullname}"))

    def _has(self, name: str) -> bool:
        return (self.folder / f"{name}.py").is_file() or (
            self.folder / name / "__init__.py"
        ).is_file()


class _Alias(_Loader):
    """Loads the module named `full`, and puts it into `sys.modules` under its short name too."""

    def __init__(self, full: str) -> None:
        self.full = full

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        sys.modules[module.__spec__.name] = importlib.import_module(self.full)


def _install_finder() -> None:
    if not any(isinstance(finder, _ScriptFinder) for finder in sys.meta_path):
        # In front of the finder of packages, which would take the modules in one from its cache.
        sys.meta_path.insert(0, _ScriptFinder())


# The one piece of work at import: without it no spawned process could import scripts by name.
_install_finder()
