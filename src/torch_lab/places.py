"""Where a project is, and where its runs are: light, as a shell waits for the names of runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["artifacts_folder", "project_of"]


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


def artifacts_folder(root: Path) -> Path:
    """Return the folder that holds the runs of the project at `root`."""
    return root / "data" / "artifacts"
