"""A gate in a training loop, at which it stands still until the next stretch is asked for."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytorch_lightning as pl

__all__ = ["Gate"]


class Gate(pl.Callback):
    """Lets a training pass a stretch of steps at a time, and says how long each took.

    It tells seconds, and those of the processor. Where nobody has asked for stretches, it is open.
    """

    def __init__(self) -> None:
        self.steps = self.left = int(os.environ.get("STRETCH_STEPS", "-1"))
        self._begin()

    def step(self) -> None:
        """Count a step, at its end; of several processes the first one keeps the others waiting."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        self.left -= 1
        if self.left:
            return
        took = time.perf_counter() - self.began, time.process_time() - self.worked
        # A training may have made another stream of the standard output.
        print("stretch:", *took, flush=True, file=sys.__stdout__)
        if not sys.stdin.readline():
            os._exit(0)
        self.left = self.steps
        self._begin()

    def on_train_batch_end(self, *args: Any) -> None:
        self.step()

    def _begin(self) -> None:
        self.began, self.worked = time.perf_counter(), time.process_time()
