"""A project's code as one file: what is on disk now, tracked by git or not, but for secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch_lab
from torch_lab.bootstrap import EXTRA, environment, unpack
from torch_lab.errors import ScriptError, UserError, did_you_mean, listed
from torch_lab.files import sha256_of
from torch_lab.redaction import masked_diff
from torch_lab.runs import CODE_FILE, code_state, is_made_here
from torch_lab.untracked import is_secret_file, zip_entry
from torch_lab.utils import shown

__all__ = ["MOST_BYTES", "Packed", "is_checkout", "pack", "project_files", "verify"]

MOST_BYTES: Final = 200 * 2**20
"""How large the files of a project may be together."""
_NOT_CODE: Final = {
    ".git",
    ".hg",
    ".ipynb_checkpoints",
    ".mypy_cache",
    ".nox",
    ".pytest_cache",
    ".ruff_cache",
    ".tox",
    "__pycache__",
    "node_modules",
}
_INSTALLED: Final = {"site-packages", "dist-packages"}
_TRY: Final = """
import sys
from pathlib import Path
sys.path.extend(folder for folder in (str(Path.cwd()), str(Path.cwd() / "src")))
from torch_lab.experiment import Experiment
from torch_lab.overrides import parsed_words
from torch_lab.scripts import import_script_as_module
script, *words = sys.argv[1:]
given = {
    option: [word.removeprefix(f"--{option}=") for word in words if word.startswith(f"--{option}=")]
    for option in ("set", "unset")
}
experiment = Experiment.load(script, parsed_words(given["set"]), given["unset"])
import_script_as_module(experiment.config_script)
"""


@dataclass(frozen=True)
class Packed:
    """An archive of code."""

    path: Path
    sha256: str
    files: Mapping[str, Path]
    """What is in it, and from where."""
    left_out: tuple[str, ...]
    """Secrets, and links to what is no file."""


def project_files(root: Path) -> list[str]:
    """Return the paths below `root` of what git tracks or does not ignore.

    Without git they are those of all files but data, caches and virtual environments. The runs are
    never among them.
    """
    found = _known_to_git(root)
    names = _walked(root) if found is None else found
    return sorted({name for name in names if not is_made_here(name)})


def _known_to_git(root: Path) -> list[str] | None:
    """Return what git tracks, submodules included, or does not ignore; None without git."""
    listings = (["--cached", "--recurse-submodules"], ["--others", "--exclude-standard"])
    found: list[str] = []
    for options in listings:
        command = ["git", "-C", str(root), "ls-files", "-z", *options]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        found += [name for name in os.fsdecode(done.stdout).split("\0") if name]
    # A repository in the repository is listed as a folder.
    return [name for name in found if not name.endswith("/")]


def _walked(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        is_root = here == root
        folders[:] = [
            name
            for name in folders
            if name not in _NOT_CODE
            and not (is_root and name == "data")
            and not name.endswith(".egg-info")
            and not (here / name / "pyvenv.cfg").is_file()
        ]
        yield from ((here / name).relative_to(root).as_posix() for name in files)


def is_checkout() -> bool:
    """Return whether torch_lab itself is no installed version, that an agent could install too."""
    return _library().parent.name not in _INSTALLED


def _library() -> Path:
    return Path(torch_lab.__file__).resolve().parent


def _library_files(root: Path) -> dict[str, Path]:
    """Return the files of torch_lab where it is a checkout outside of the project at `root`."""
    package = _library()
    if not is_checkout() or package.is_relative_to(root.resolve()):
        return {}
    found = (path for path in package.rglob("*") if path.is_file())
    return {
        f"{EXTRA}/{package.name}/{path.relative_to(package).as_posix()}": path
        for path in sorted(found)
        if "__pycache__" not in path.parts
    }


def pack(root: Path, target: Path) -> Packed:
    """Write the code of the project at `root` to the zip file `target`.

    Raises:
        UserError: It is too large.
    """
    candidates = {name: root / name for name in project_files(root)} | _library_files(root)
    # A link to a file is packed as that file; what was deleted, git still lists.
    files = {name: path for name, path in candidates.items() if path.is_file()}
    links = [name for name, path in candidates.items() if path.is_symlink() and name not in files]
    secrets = [name for name, path in files.items() if is_secret_file(path)]
    files = {name: path for name, path in files.items() if name not in secrets}
    _check_size(root, files)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files.items():
            archive.writestr(_entry(name, path), path.read_bytes())
        archive.writestr(zipfile.ZipInfo(CODE_FILE), json.dumps(_git_state(root)))
    return Packed(target, sha256_of(target), files, (*secrets, *links))


def _entry(name: str, path: Path) -> zipfile.ZipInfo:
    entry = zip_entry(name)
    entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
    return entry


def _git_state(root: Path) -> dict[str, object]:
    code = code_state(root)
    return {
        "commit": code.commit,
        "branch": code.branch,
        "repository": code.repository,
        "untracked": list(code.untracked),
        "changes": masked_diff(code.changes).decode(errors="replace"),
    }


def _check_size(root: Path, files: Mapping[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total <= MOST_BYTES:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    words = [f"{name} ({sizes[name] / 2**20:.0f} MB)" for name in largest]
    raise UserError(
        f"{shown(root)} has {total / 2**20:.0f} MB of code; at most {MOST_BYTES / 2**20:.0f} MB "
        f"are sent to an agent; the largest: {', '.join(words)}",
        "list data in .gitignore, and let the experiment fetch it: config.dataset_id, or a path "
        "that the agent has",
    )


def verify(packed: Packed, script: str, words: Sequence[str] = ()) -> None:
    """Unpack an archive elsewhere, compare every file, and load the experiment from there.

    Args:
        packed: The archive.
        script: The hparams script, below the project.
        words: What `train` gets beside it.

    Raises:
        UserError: A file changed meanwhile.
        ScriptError: The experiment cannot be loaded from what is in it.
    """
    if script not in packed.files:
        raise ScriptError(
            f"{script} is not among the files that an agent gets"
            f"{did_you_mean(script, packed.files)}",
            "git ignores it, or it is outside of the project",
        )
    with tempfile.TemporaryDirectory(prefix="torch_lab-") as name:
        folder = Path(name).resolve()
        unpack(packed.path, folder)
        changed = [
            name
            for name, path in packed.files.items()
            if not path.is_file() or sha256_of(path) != sha256_of(folder / name)
        ]
        if changed:
            raise UserError(f"changed while they were packed: {listed(changed)}", "try again")
        _load(folder, [script, *words], packed.left_out)


def _load(folder: Path, words: Sequence[str], left_out: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TRY, *words],
        cwd=folder,
        env=environment(folder, os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        without = f"; left out: {listed(left_out)}" if left_out else ""
        raise ScriptError(
            f"{words[0]} cannot be loaded from what an agent gets: {lines[-1]}{without}",
            "an agent gets what git tracks or does not ignore, but no secrets",
        )
