"""How commands import what is large: nothing is looked through meanwhile, or loaded in vain."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Final

__all__ = ["heavy_imports"]

_SIGNAL: Final = "scipy.signal"
_WAITS: Final = "__waits__"
_LOCK: Final = threading.RLock()


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and what stands on it in less time, in the process of a command.

    A process that has torch already is left as it is: other things live there.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    _defer_signal()
    gc.disable()
    try:
        yield
        # All of it stays to the end. To go through a million objects, meanwhile and when the
        # interpreter is torn down, takes a third of a short process.
        gc.freeze()
    finally:
        gc.enable()


class _Deferred(ModuleType):
    """A module that runs when something of it is used that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        with _LOCK:  # Who comes meanwhile, from another thread, gets no half of it.
            if vars(self).pop(_WAITS, False):
                assert self.__spec__ is not None and self.__spec__.loader is not None
                self.__spec__.loader.exec_module(self)
                self.__class__ = ModuleType  # type: ignore[assignment]
        return ModuleType.__getattribute__(self, name)


def _defer_signal() -> None:
    """Let `scipy.signal` wait for its first use.

    torchmetrics imports it, a seventh of all that there is to import, to add a `hamming` that scipy
    has moved; so that is there already, and does the same.
    """
    if _SIGNAL in sys.modules or importlib.util.find_spec("scipy") is None:
        return
    spec = importlib.util.find_spec(_SIGNAL)
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Deferred

    def hamming(*args: Any, **options: Any) -> Any:
        return module.windows.hamming(*args, **options)

    vars(module).update({"hamming": hamming, _WAITS: True})
    sys.modules[_SIGNAL] = module
