"""What a peer is asked to do, by its command line: `name=value` for what is not the default."""

from __future__ import annotations

import sys
from types import SimpleNamespace

__all__ = ["settings"]


def settings(**defaults: int | str) -> SimpleNamespace:
    """Return the values of the command line, in the types of the defaults."""
    told = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := told.keys() - defaults.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}")
    values = {name: type(value)(told.get(name, value)) for name, value in defaults.items()}
    return SimpleNamespace(**values)
