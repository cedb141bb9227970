"""Where a project is, and where its runs are: light, as a shell waits for the names of runs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

__all__ = [
    "CONFIG_SCRIPT",
    "VERSION",
    "artifacts_folder",
    "make_importable",
    "project_of",
    "unversioned",
]

CONFIG_SCRIPT: Final = "__main__.py"
"""The name of the script beside the hparams scripts that says what is made of hparams."""
VERSION: Final = re.compile(r"-v(\d+)$")
"""How the names of runs end."""


def unversioned(name: str) -> str:
    """Return the name of a run without its version."""
    return VERSION.sub("", name)


def project_of(start: Path) -> Path:
    """Return the project of `start`: the nearest parent with a `pyproject.toml` or `.git`.

    `TORCH_LAB_ROOT` overrides it; without any of them it is the working directory.
    """
    if override := os.environ.get("TORCH_LAB_ROOT"):
        return Path(override).expanduser().resolve()
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            return folder
    return Path.cwd()


def make_importable(root: Path) -> None:
    """Let scripts import what lies in a project's folder, or in its `src`."""
    # At the end, so that nothing there hides what is installed.
    folders = [str(folder) for folder in (root, root / "src")]
    sys.path.extend(folder for folder in folders if folder not in sys.path)


def artifacts_folder(root: Path) -> Path:
    """Return the folder that holds the runs of the project at `root`."""
    return root / "data" / "artifacts"
