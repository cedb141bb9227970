"""Small tools that know nothing of experiments and runs."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch_lab.layering import DELETE, env, layer, new, ref
from torch_lab.scripts import import_script_as_module, shown

__all__ = [
    "DELETE",
    "dict_as_str",
    "env",
    "flattened",
    "import_script_as_module",
    "layer",
    "length_of",
    "new",
    "parameters_of",
    "process_rank",
    "ref",
    "shown",
]


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by dotted keys; an empty dictionary is a leaf."""
    return dict(_leaves(nested, prefix))


def _leaves(nested: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def dict_as_str(nested: Mapping[str, Any]) -> str:
    """Return a dictionary as text to read: a line for each leaf, with its dotted key."""
    return "\n".join(f"{key}: {value!r}" for key, value in flattened(nested).items())


def length_of(value: object) -> int | None:
    """Return how much is in `value`, or None where that is not known, as for iterable data."""
    try:
        return len(value)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def process_rank() -> int:
    """Return this process's rank among those that train together, as its launcher tells.

    It tells in the environment; 0 when nothing is told. Known launchers: torchrun, SLURM, and
    Lightning's own, which starts the script again with `LOCAL_RANK` set.
    """
    for name in ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return int(os.environ.get("LOCAL_RANK", "0")) or node


@functools.cache
def parameters_of(module: str, function: str) -> tuple[str, ...]:
    """Return the names of a function's parameters, read from its source: nothing is imported.

    Importing Lightning or ClearML takes seconds; a misspelt key is to be found before that.

    Args:
        module: Dotted name, like `"pytorch_lightning.trainer.trainer"`.
        function: Name of a function, or `"Class.method"`.
    """
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
    folder = Path(spec.submodule_search_locations[0])
    path = folder.joinpath(*inner).with_suffix(".py") if inner else folder / "__init__.py"
    return _parameters(_definition(path.read_text(encoding="utf-8"), function))


def _definition(source: str, function: str) -> ast.FunctionDef:
    scope: list[ast.stmt] = ast.parse(source).body
    *classes, name = function.split(".")
    for class_name in classes:
        scope = next(
            node.body
            for node in scope
            if isinstance(node, ast.ClassDef) and node.name == class_name
        )
    # Of overloads, the last one is the function itself.
    found = [node for node in scope if isinstance(node, ast.FunctionDef) and node.name == name]
    return found[-1]


def _parameters(definition: ast.FunctionDef) -> tuple[str, ...]:
    arguments = definition.args
    names = [item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return tuple(name for name in names if name not in ("self", "cls"))
