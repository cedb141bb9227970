"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["beside", "publish"]


def beside(path: Path, label: str) -> Path:
    """Return a hidden name in the folder of `path`, where a move to `path` is atomic."""
    return path.with_name(f".{path.name}.{label}.tmp")


def publish(written: Path, path: Path) -> None:
    """Move `written`, once it is safe on the disk, to `path`, replacing what was there."""
    with written.open("rb") as file:
        os.fsync(file.fileno())
    written.replace(path)
