"""Scripts that bring data into the form that the datasets read, and where they put it.

Every data set becomes MNIST's four IDX files in a folder of its own below `data/processed`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from torch_lab.errors import UserError
from torch_lab.runs import project_root

__all__ = ["processed_folder", "run_as_script"]


def processed_folder(name: str) -> Path:
    """Return where the data set `name` belongs, whether or not it is there yet."""
    return project_root() / "data" / "processed" / name


def run_as_script(prepare: Callable[[], Path]) -> int:
    """Prepare a data set, say where it is on stdout, and return an exit code."""
    try:
        print(prepare())
    except UserError as error:
        hint = f"\n  {error.hint}" if error.hint else ""
        print(f"error: {error.message}{hint}", file=sys.stderr)
        return int(error.exit_code)
    return 0
