"""Experiments: two scripts in, checked components out.

An experiment is a folder with a config script, `__main__.py`, and hparams scripts beside it.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from torch_lab.added import added_keys
from torch_lab.components import InferComponents, TrainComponents
from torch_lab.errors import ComponentsError, HparamsError, ScriptError, did_you_mean, listed
from torch_lab.hparams import Hparams
from torch_lab.imports import imported_files
from torch_lab.layering import cleared, shown_change
from torch_lab.overrides import Effective, Overrides, effective, resolved
from torch_lab.places import CONFIG_SCRIPT, make_importable
from torch_lab.provenance import Histories, Key, spelt
from torch_lab.redaction import masked
from torch_lab.runs import project_root
from torch_lab.scripts import (
    Layer,
    generation_of,
    import_script_as_module,
    layers_of,
    of_generation,
    running,
    siblings_of,
)
from torch_lab.tracked import tracked
from torch_lab.utils import flattened, shown

__all__ = ["Difference", "Experiment", "differences"]

log = logging.getLogger(__name__)

_STRUCTURE = "config_structure"
_MOST_UNREAD = 20
_READ_BY_US = frozenset({"monitor", "monitor_mode"})


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


@dataclass(frozen=True)
class Difference:
    """A value that is not what it was in other hparams."""

    key: str
    base: object
    value: object

    def __str__(self) -> str:
        return f"{self.key} {self.base!r} -> {self.value!r}"


def differences(base: Mapping[str, Any], own: Mapping[str, Any]) -> list[Difference]:
    """Return in which values nested dictionaries differ.

    Args:
        base: What they are compared with.
        own: What they are now.
    """
    before, now = flattened(base), flattened(own)
    pairs = {
        key: (before.get(key, _NOTHING), now.get(key, _NOTHING))
        for key in dict.fromkeys([*before, *now])
    }
    return [
        Difference(key, was, is_now)
        for key, (was, is_now) in pairs.items()
        # An empty section is no value of its own.
        if repr(was) != repr(is_now) and {repr(was), repr(is_now)} != {"{}", "nothing"}
    ]


@dataclass(frozen=True)
class Experiment:
    """An hparams script with the config script beside it."""

    script: Path
    """The hparams script."""
    hparams: Hparams
    layers: tuple[Layer, ...] = field(repr=False)
    """Every script that made the hparams, the base first and `script` last."""
    effective: Effective = field(repr=False)
    """What the scripts and the overrides say, without defaults, and what has set each value."""
    overrides: Overrides = field(default_factory=Overrides, repr=False)
    """What was set in place of what the scripts say."""
    generation: int = field(default=1, repr=False, compare=False)
    """That of the scripts: the config script shares siblings with those that made the hparams."""

    @classmethod
    def load(
        cls, path: str | Path, set: Mapping[str, Any] | None = None, unset: Sequence[str] = ()
    ) -> Experiment:
        """Run the hparams script at `path` afresh, with what it imports from beside it; check it.

        Args:
            path: The hparams script.
            set: What `--set` does: values by their keys, such as `config.learning_rate`. Behind
                `config.milestones+=` stands what is added to a list.
            unset: Keys to remove.

        Raises:
            ScriptError: It is missing, does not compile, or has no config script beside it.
            HparamsError: It holds no `hparams`, or wrong ones, or what is set does not fit.
        """
        script = _hparams_script(Path(path).expanduser())
        make_importable(project_root(script))
        module = import_script_as_module(script)
        if not hasattr(module, "hparams"):
            raise HparamsError(f"{shown(script)} defines no hparams", _names_in(module))
        project_name, layers = _package_name(script.parent), layers_of(module)
        if not isinstance(module.hparams, dict):
            Hparams.parse(module.hparams, script, project_name)  # Which says so.
        overrides = Overrides(set or {}, unset)
        found = effective(
            Effective(module.hparams, layers[-1].recorder.histories),
            overrides,
            script=script,
            defaults=_defaults(script),
        )
        hparams = Hparams.parse(found.hparams, script, project_name, found.histories)
        return cls(script, hparams, layers, found, overrides, generation_of(module))

    @property
    def histories(self) -> Histories:
        """What has set each value of the hparams."""
        return self.effective.histories

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return self.script.parent

    @property
    def root(self) -> Path:
        """The project that it belongs to."""
        return project_root(self.script)

    @property
    def name(self) -> str:
        """The name of the experiment's folder."""
        return self.folder.name

    @property
    def base_name(self) -> str:
        """What names its runs, without their version."""
        return f"{self.name}-{self.script.stem}"

    @property
    def config_script(self) -> Path:
        """The config script."""
        return self.folder / CONFIG_SCRIPT

    @property
    def scripts(self) -> tuple[Path, ...]:
        """Every script that makes the experiment so far, and what they import of the project."""
        scripts = [*(layer.path for layer in self.layers), self.config_script]
        scripts += siblings_of(self.script, self.generation)
        return tuple(dict.fromkeys([*scripts, *imported_files(scripts, self.folder, self.root)]))

    @property
    def base(self) -> Layer:
        """The first script with hparams: the others stand on it."""
        return next(layer for layer in self.layers if isinstance(layer.hparams, dict))

    @property
    def added_keys(self) -> list[str]:
        """What layers add to `config` that may be misspelt, a sentence each."""
        return added_keys(self.histories)

    def check_added_keys(self) -> None:
        """Refuse what layers add without saying so, if the hparams are strict.

        Raises:
            HparamsError: There are such keys.
        """
        if self.hparams.strict and (added := self.added_keys):
            raise HparamsError(
                "\n".join(added), "new(…) around its value says that a key is meant to be new"
            )

    def differences(self) -> list[Difference]:
        """Return in what the hparams differ from those of the base layer."""
        return differences(masked(self._alone(self.base.hparams)), masked(self.effective.hparams))

    def _alone(self, hparams: dict[str, Any]) -> dict[str, Any]:
        """Return the hparams of a layer as they are without those above it."""
        try:
            return resolved(Effective(hparams, {}), defaults=_defaults(self.script)).hparams
        except HparamsError:  # What they follow may come with a layer.
            plain: dict[str, Any] = cleared(hparams)
            return plain

    def check_config_script(self) -> bool:
        """Run the config script, and see that its `train_config` could be called.

        Returns:
            Whether it says what `config` should look like.

        Raises:
            ScriptError: It does not compile.
            HparamsError: `config` does not look like that.
            ComponentsError: It has no `train_config`, or that takes something else than hparams.
        """
        module = self._config_module()
        self._function_in(module, "train_config", ())
        return hasattr(module, _STRUCTURE)

    def train_components(self) -> TrainComponents:
        """Return what `train_config` makes of the hparams; warn of keys that it has not read.

        What a component holds it may read later: of that nothing is said.

        Raises:
            ScriptError: The config script does not compile.
            HparamsError: There are keys in `config` that it has not read, and hparams are strict.
            ComponentsError: It has no `train_config`, or that returned something else.
        """
        function = self._function_in(self._config_module(), "train_config", ())
        given = self.hparams.as_dict()
        given["config"], reads = tracked(given["config"])
        with running(self.config_script, self.generation):
            returned = self._called(function, given)
        del given  # Whoever holds it still may read it later; we do not.
        if reads.unread() != reads.forgotten():
            gc.collect()  # A cycle that nobody can reach, such as of frames, may hold them.
        if unread := self._set_by_scripts(reads.forgotten()):
            self._tell_of_unread(unread)
        held = self._set_by_scripts(set(reads.unread()) - set(reads.forgotten()))
        if held and self.hparams.strict:
            log.warning("not read so far, and kept, so perhaps later: %s", listed(sorted(held), 8))
        reads.end()
        return TrainComponents.parse(returned, f"{shown(self.config_script)}: train_config")

    def infer_components(self, arguments: Sequence[str]) -> InferComponents:
        """Return what `infer_config` makes of the hparams and `arguments`.

        Raises:
            ScriptError: The config script does not compile.
            ComponentsError: It has no `infer_config`, that takes other arguments, or it returned
                something else than components.
        """
        function = self._function_in(self._config_module(), "infer_config", arguments)
        with running(self.config_script, self.generation):
            returned = self._called(function, self.hparams.as_dict(), *arguments)
        return InferComponents.parse(returned, f"{shown(self.config_script)}: infer_config")

    def _check_structure(self, module: ModuleType) -> None:
        """Check that `config` is as the config script says, if it does.

        Args:
            module: The config script, which may hold a `config_structure`.

        Raises:
            HparamsError: It is not, with every place where it is not; or the structure is wrong.
        """
        if hasattr(module, _STRUCTURE):
            from torch_lab.structures import Structure

            given = getattr(module, _STRUCTURE)
            structure = Structure.read(given, "config", shown(self.config_script))
            added = self.hparams.added
            config = {key: value for key, value in self.hparams.config.items() if key not in added}
            structure.check(config, shown(self.script), self._line_of)

    def _set_by_scripts(self, keys: Iterable[Key]) -> list[str]:
        """Return keys of `config` with the lines that set them, without those that are ours."""
        found = []
        for key in keys:
            line = self._line_of(key)
            if line is not None and key[0] not in _READ_BY_US:
                found.append(f"{spelt(('config', *key))} ({line})")
        return found

    def _line_of(self, key: Key) -> str | None:
        """Return the `file:line` that set a value of `config`, or the list that holds it."""
        path, histories = ("config", *key), self.histories
        for end in range(len(path), 1, -1):
            if path[:end] in histories:
                return shown_change(histories[path[:end]][-1])
        return None

    def _tell_of_unread(self, unread: Sequence[str]) -> None:
        named = len(unread) if self.hparams.strict else _MOST_UNREAD
        told = f"{shown(self.config_script)}: train_config never reads {listed(unread, named)}"
        if self.hparams.strict:
            hint = "mend or remove them, or have train_config read them"
            raise HparamsError(told, hint)
        log.warning("%s", told)

    def _config_module(self) -> ModuleType:
        """Return the config script, after `config` was checked by it."""
        with of_generation(self.generation):
            module = import_script_as_module(self.config_script)
        self._check_structure(module)
        return module

    def _function_in(
        self, module: ModuleType, name: str, arguments: Sequence[str]
    ) -> Callable[..., object]:
        """Return a function of the config script that takes the hparams and `arguments`."""
        where = shown(self.config_script)
        if not hasattr(module, name):
            others = set(_own_names(module)) - {"train_config", "infer_config"}
            near = did_you_mean(name, others)
            raise ComponentsError(f"{where} defines no {name}{near}", _names_in(module))
        function: object = getattr(module, name)
        if not callable(function):
            raise ComponentsError(f"{where}: {name} is no function: {function!r}")
        try:
            signature = inspect.signature(function)
        except ValueError as error:  # Such as of a partial that nothing fits.
            raise ComponentsError(f"{where}: {name}: {error}") from None
        try:
            signature.bind({}, *arguments)
        except TypeError as error:
            raise ComponentsError(
                f"{where}: {name}{_bare(signature)}: {error}",
                f"given after the hparams: {' '.join(arguments) or 'nothing'}",
            ) from None
        return function

    def _called(self, function: Callable[..., object], *arguments: object) -> object:
        try:
            return function(*arguments)
        except ValueError as error:
            # torch refuses to shuffle nothing, far from the line that made the loader.
            if "num_samples=0" not in str(error):
                raise
            code = getattr(function, "__code__", None)
            file = code.co_filename if code else str(self.config_script)
            place = _last_place(error.__traceback__, file)
            raise ComponentsError(f"{place}: the dataset is empty") from None


def _bare(signature: inspect.Signature) -> inspect.Signature:
    """Return `signature` without its annotations."""
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return inspect.Signature(bare)


def _defaults(script: Path) -> dict[str, Any]:
    return Hparams.parse({}, script, _package_name(script.parent)).as_dict()


def _hparams_script(path: Path) -> Path:
    if path.is_dir():
        scripts = sorted(item.name for item in path.glob("*.py") if item.name[:2] != "__")
        held = (
            f"its hparams scripts: {', '.join(scripts)}" if scripts else "it has no hparams scripts"
        )
        raise ScriptError(f"{path} is a directory; {held}")
    if not path.is_file():
        raise ScriptError(f"{path}: no such file{_nearest(path)}")
    if path.name == CONFIG_SCRIPT:
        raise ScriptError(f"{path} is the config script; give an hparams script beside it")
    if path.suffix != ".py":
        raise ScriptError(f"{path} is not a Python script")
    script = path.resolve()
    if not (script.parent / CONFIG_SCRIPT).is_file():
        raise ScriptError(f"{shown(script.parent)} has no {CONFIG_SCRIPT} beside {path.name}")
    return script


def _nearest(path: Path) -> str:
    """Return a suggestion for the deepest part of `path` that is not there."""
    missing = path
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    names = [
        item.name for item in missing.parent.iterdir() if item.is_dir() or item.suffix == ".py"
    ]
    suggestion = did_you_mean(missing.name, names)
    if suggestion:
        return suggestion
    scripts = sorted(name for name in names if not name.startswith((".", "__")))[:8]
    return f"; {missing.parent} has: {', '.join(scripts)}" if scripts else ""


def _package_name(folder: Path) -> str:
    """Return the name of the package that holds the experiment, or of what could be one."""
    for parent in folder.parents:
        if parent.name == "experiments" and parent.parent.name:
            return parent.parent.name
    package = folder
    while (package.parent / "__init__.py").is_file():
        package = package.parent
    return package.name if package != folder else folder.parent.name or folder.name


def _own_names(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]


def _names_in(module: ModuleType) -> str:
    return f"it has: {', '.join(_own_names(module)) or 'nothing'}"


def _last_place(traceback: TracebackType | None, file: str) -> str:
    """Return the last line of `file` that a traceback passes."""
    place = shown(Path(file))
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            place = f"{shown(Path(file))}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place
