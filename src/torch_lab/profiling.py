"""What Lightning asks for the time of its steps, and how it is told that nobody asks."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from pytorch_lightning.profilers import PassThroughProfiler

__all__ = ["NoProfiler"]

_NOTHING: Final = contextlib.nullcontext()


class NoProfiler(PassThroughProfiler):
    """A profiler that notes nothing, in no time.

    Lightning enters a context of its profiler some sixty times a step; that of its own default is a
    generator, which takes longer to make than what is done in most of them.
    """

    def profile(self, action_name: str) -> Any:
        """Return a context in which nothing is noted."""
        return _NOTHING
