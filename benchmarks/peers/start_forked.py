"""Trains one batch in a fork of this process, which has imported all, for each folder on stdin.

Says how many seconds the processor worked from the fork until the trainer was set up: all that a
training does before it computes anything, without the imports, which vary by more than that.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path

import torch_lab.runner  # noqa: F401 - so that a fork has it
from torch_lab.cli import main, train


def trained(folder: Path, words: list[str]) -> int:
    """Train in the project at `folder`, and return the exit code."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the fork ends
    os.chdir(folder)
    return main(train, "train", words)


def attend() -> None:
    """Answer each line."""
    gc.freeze()
    for line in sys.stdin:
        folder, told = Path(line.strip()), Path(os.environ["FOLDER"]) / "set_up"
        told.unlink(missing_ok=True)
        os.environ["BEGAN"] = str(time.time())
        child = os.fork()
        if not child:
            code = 1
            try:
                code = trained(folder, sys.argv[1:])
            finally:
                os._exit(code)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"a training in {folder} failed")
        print(told.read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    attend()
