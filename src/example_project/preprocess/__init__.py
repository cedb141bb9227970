"""Scripts that bring data into the form that the datasets read, and where they put it.

Every data set becomes MNIST's four IDX files in a folder of its own below `data/processed`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch_lab.errors import TorchLabError
from torch_lab.remote_data import upload_dataset
from torch_lab.runs import project_root

__all__ = ["processed_folder", "run_as_script"]


def processed_folder(name: str) -> Path:
    """Return where the data set `name` belongs, whether or not it is there yet."""
    return project_root() / "data" / "processed" / name


def run_as_script(prepare: Callable[[], Path], words: Sequence[str] = ()) -> int:
    """Prepare a data set, say where it is on stdout, and return an exit code.

    Args:
        prepare: Returns the folder of the data set.
        words: Those of the command line. With `--upload` the data set goes to ClearML as well, and
            the last line is the id of that version.
    """
    parser = argparse.ArgumentParser(description="Prepare a data set.")
    parser.add_argument("--upload", action="store_true", help="upload it as a ClearML dataset, too")
    upload = parser.parse_args(words).upload
    try:
        folder = prepare()
        print(folder)
        if upload:
            print(upload_dataset(folder, folder.name, "example_project"))
    except TorchLabError as error:
        hint = f"\n  {error.hint}" if error.hint else ""
        print(f"error: {error.message}{hint}", file=sys.stderr)
        return int(error.exit_code)
    return 0
