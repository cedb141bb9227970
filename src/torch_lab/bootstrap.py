"""What an agent runs for a run that was queued: it gets the code, verifies it, and trains.

The text of this file is the script of the task. On the agent there may be nothing else yet: it
needs Python and the ClearML SDK alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

__all__ = ["EXTRA", "MARK", "environment", "run", "unpack"]

EXTRA: Final = ".torch_lab"
"""The folder in the archive for what is not the project's: torch_lab itself, the state of git."""
MARK: Final = "What an agent runs for a run that was queued"
"""By this a task's script is known to be this one."""
_HOME: Final = "TORCH_LAB_QUEUE_HOME"


def run(url: str, sha256: str, words: Sequence[str]) -> NoReturn:
    """Become the `train` of the task's code.

    Args:
        url: Where the archive of the code is.
        sha256: What is expected of it.
        words: What `train` gets.
    """
    home = Path(os.environ.get(_HOME) or "~/.cache/torch_lab/queue").expanduser()
    task = os.environ.get("CLEARML_TASK_ID") or os.environ.get("TRAINS_TASK_ID") or "no-task"
    # One folder for each task: a task that is queued again finds its run there.
    folder = home / task / sha256[:16]
    if not folder.is_dir():
        _fetch(url, sha256, folder)
    os.chdir(folder)
    command = [sys.executable, "-m", "torch_lab", "train", *words]
    print(f"torch_lab: {' '.join(command[1:])} in {folder}", flush=True)
    os.execve(sys.executable, command, environment(folder, os.environ))


def _fetch(url: str, sha256: str, folder: Path) -> None:
    """Download the archive, verify it, and unpack it into `folder`, which is whole or not there."""
    from clearml import StorageManager

    archive = StorageManager.get_local_copy(url, extract_archive=False, force_download=True)
    if not archive:
        sys.exit(f"torch_lab: {url}, the code of this task, cannot be downloaded")
    found = _sha256(Path(archive))
    if found != sha256:
        sys.exit(f"torch_lab: {url} has the sha256 {found}, expected {sha256}")
    new = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    unpack(Path(archive), new)
    new.rename(folder)


def _sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file into `folder`.

    Raises:
        ValueError: A name in it leads out of the folder.
    """
    root = folder.resolve()
    with zipfile.ZipFile(archive) as files:
        for entry in files.infolist():
            target = (root / entry.filename).resolve()
            if target == root or not target.is_relative_to(root):
                raise ValueError(f"{entry.filename} leads out of {folder}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.open(entry) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            if entry.external_attr >> 16 & 0o100:
                target.chmod(0o755)


def environment(folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """Return `variables` such that the code in `folder` is a project, found before all others."""
    own = [folder / "src", folder, folder / EXTRA]
    path = [str(each) for each in own if each.is_dir()]
    before = variables.get("PYTHONPATH")
    return {
        **variables,
        "PYTHONPATH": os.pathsep.join([*path, *([before] if before else [])]),
        "TORCH_LAB_ROOT": str(folder),
        # The folder may lie in somebody's repository; its own stayed behind.
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
    }
