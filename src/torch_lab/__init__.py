"""Run experiments with PyTorch: plain Python for a config language, a folder for a record.

`train` and `infer` are what the commands of these names do; `load` returns an experiment to look
at; `load_weights` serves `infer_config`. They are imported when they are first used, so that
`import torch_lab` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_lab.notebook import load
    from torch_lab.runner import infer, train
    from torch_lab.weights import load_weights

__all__ = ["__version__", "infer", "load", "load_weights", "train"]

__version__ = "0.1.0"

_HOMES = {
    "infer": "torch_lab.runner",
    "load": "torch_lab.notebook",
    "load_weights": "torch_lab.weights",
    "train": "torch_lab.runner",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
