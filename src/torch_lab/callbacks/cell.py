"""A line in the output of a notebook's cell that is drawn over and over."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from typing import Any

__all__ = ["COLUMNS", "CellLine"]

COLUMNS = 100
"""How wide a line may be: nobody knows how wide the page is."""


class CellLine:
    """A line that a notebook shows where it was first drawn in a cell, above what follows it.

    It is IPython's display, which is told anew what to show; streams of a notebook have no cursor.
    """

    def __init__(self) -> None:
        self._cell: int | None = None
        self._display: Any = None
        self._is_shown = False

    def __getstate__(self) -> dict[str, Any]:
        # Another process has another notebook, or none.
        return {"_cell": None, "_display": None, "_is_shown": False}

    @property
    def is_possible(self) -> bool:
        """Whether a notebook's kernel is this process, rather than a fork of it or a terminal."""
        return (
            getattr(_shell(), "kernel", None) is not None and not multiprocessing.parent_process()
        )

    def draw(self, text: str) -> None:
        """Show `text` in the place of what was drawn before in the cell that runs."""
        # There is one in a notebook, and only there it is needed: it is no dependency.
        display = importlib.import_module("IPython.display").display
        self._is_shown = True
        cell = _shell().execution_count
        if self._display is None or self._cell != cell:
            self._cell = cell
            self._display = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self._display.update({"text/plain": text}, raw=True)

    def clear(self) -> None:
        """Show nothing there any more."""
        if self._is_shown:
            self._is_shown = False
            self._display.update({"text/plain": ""}, raw=True)


def _shell() -> Any:
    """Return the IPython that runs in this process, if one does: it is never imported for this."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()
