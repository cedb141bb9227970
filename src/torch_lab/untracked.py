"""The files of a project that git neither has nor ignores: no commit tells what is in them."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from torch_lab.files import written_whole
from torch_lab.redaction import masked_diff, masked_script

__all__ = ["MOST_BYTES", "is_secret_file", "keep_untracked", "zip_entry"]

MOST_BYTES: Final = 20 * 2**20
"""How much is kept of a project, in bytes."""
_PRIVATE_KEY: Final = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY")
_BEGINNING: Final = 100
_SECRETS: Final = (
    ".env",
    ".env.*",
    "*.env",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
    "clearml.conf",
    ".netrc",
    ".npmrc",
    ".pypirc",
)


def keep_untracked(root: Path, names: Iterable[str], target: Path) -> list[str]:
    """Write the files to `target`, a zip file, the small ones first; return which were left out.

    What looks like a secret in texts is masked; files that hold nothing else are left out.

    Args:
        root: The project.
        names: Paths below it.
        target: Where the zip file goes; without files there is none.
    """
    files = sorted(_sizes(root, names), key=lambda file: file[1])
    left_out, total = [], 0
    kept = []
    for name, size in files:
        if is_secret_file(root / name) or total + size > MOST_BYTES:
            left_out.append(name)
        else:
            kept.append(name)
            total += size
    if kept:
        with (
            written_whole(target) as path,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for name in kept:
                try:
                    archive.writestr(zip_entry(name), _masked(root / name))
                except OSError:  # It is gone by now, or not ours to read.
                    left_out.append(name)
                except UnicodeEncodeError:  # Its name is no text, and an archive's names are.
                    left_out.append(os.fsencode(name).decode(errors="replace"))
    return left_out


def is_secret_file(path: Path) -> bool:
    """Return whether a file holds nothing but secrets, by its name or by how it begins."""
    if any(fnmatch.fnmatch(path.name, pattern) for pattern in _SECRETS):
        return True
    try:
        with path.open("rb") as file:
            return _PRIVATE_KEY.match(file.read(_BEGINNING)) is not None
    except OSError:
        return False


def _sizes(root: Path, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    for name in names:
        path = root / name
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                yield name, path.stat().st_size


def zip_entry(name: str) -> zipfile.ZipInfo:
    """Return an entry that gives an archive always the same bytes for the same files."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _masked(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".py":
        return masked_script(content)
    try:
        content.decode()
    except UnicodeDecodeError:
        return content
    return masked_diff(content)
