"""Modules of a project that are imported for a while, and then forgotten."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from torch_lab.imports import is_of_project

__all__ = ["imported_afresh"]

_SCRIPTS: Final = "torch_lab.scripts."


@contextlib.contextmanager
def imported_afresh(root: Path) -> Iterator[None]:
    """Forget the scripts, and the modules of the project at `root`, that are imported meanwhile.

    Two scripts that change a dictionary of a module which both import would change the same one.
    """
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.startswith(_SCRIPTS) or is_of_project(sys.modules[name], root):
                del sys.modules[name]
