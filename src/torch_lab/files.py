"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["beside", "link", "move", "publish", "sha256_of", "sync", "written_whole"]


def beside(path: Path, label: str) -> Path:
    """Return a hidden name in the folder of `path`, where a move to `path` is atomic."""
    return path.with_name(f".{path.name}.{label}.tmp")


def publish(written: Path, path: Path) -> None:
    """Move `written`, once it is safe on the disk, to `path`, replacing what was there."""
    sync(written)
    move(written, path)
    sync(path.parent)


def move(written: Path, path: Path) -> None:
    """Move `written` to `path`, replacing what was there; safe once their folder is synced."""
    written.replace(path)
    # Where both are names of one file already, a move does nothing, and leaves both.
    written.unlink(missing_ok=True)


def link(existing: Path, name: Path) -> None:
    """Make `name` another name of the file `existing`, or a copy where a disk has no such links.

    A copy is safe on the disk then.
    """
    name.unlink(missing_ok=True)
    try:
        os.link(existing, name)
    except OSError:
        shutil.copyfile(existing, name)
        sync(name)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a name to write to; what is there at the end becomes `path`, after an error nothing."""
    written = beside(path, "new")
    try:
        yield written
        publish(written, path)
    finally:
        written.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the sha256 of what is in a file, in hexadecimal digits."""
    import hashlib  # It loads a library, which commands that only read have no use for.

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are safe on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
