"""Plain values: what `torch.load(weights_only=True)` reads, made of anything."""

from __future__ import annotations

import enum
import operator
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.serialization import get_safe_globals

__all__ = ["plain_values"]


def plain_values(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return `checkpoint` in what `torch.load(weights_only=True)` reads, and what was lost.

    Scalars and arrays of numpy become numbers and tensors, paths strings, members of enums their
    values, other mappings dictionaries, other sequences lists or tuples. Of anything else the
    `repr` is kept. Tensors are not copied, and what is plain already is not either.

    Returns:
        The values; and the places of what could not be kept, with what it was and became:
        `{"hyper_parameters['transform']": "a Compose: kept as text"}`.
    """
    converter = _Converter()
    values = converter.convert(checkpoint, ())
    return values, converter.lost


_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})
_ATOMS_OF_TORCH = frozenset(
    {torch.dtype, torch.device, torch.Size, torch.layout, torch.UntypedStorage, torch.TypedStorage}
)
_AS_THEY_ARE = _ATOMS | _ATOMS_OF_TORCH
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_CONTAINERS = frozenset({dict, OrderedDict, Counter, list, tuple, set})

_LEFT_OUT = "<left out>"
"""Stands for a value that is not written at all."""

_Place = tuple[Any, ...]
"""The keys on the way to a value, the last one first: `(key, (key of its parent, …))`."""


class _Converter:
    """Makes values plain, and remembers what it could not keep."""

    def __init__(self) -> None:
        self.lost: dict[str, str] = {}
        self._open: set[int] = set()

    def convert(self, value: Any, place: _Place) -> Any:
        """Return `value` itself if it is plain, or else what is plain and nearest to it."""
        kind = type(value)
        if kind in _AS_THEY_ARE:
            return value
        if isinstance(value, torch.Tensor):
            return self._text(value, place) if is_lazy(value) else _plain_tensor(value)
        if isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
            return self._container(value, place)
        if isinstance(value, enum.Enum):
            return self.convert(value.value, place)
        if isinstance(value, (np.generic, np.ndarray)):
            return self._of_numpy(value, place)
        return self._other(value, place)

    def _container(self, value: Any, place: _Place) -> Any:
        if id(value) in self._open:
            return self._text(value, place)
        self._open.add(id(value))
        made = (
            self._mapping(value, place) if isinstance(value, Mapping) else self._items(value, place)
        )
        self._open.remove(id(value))
        return made

    def _mapping(self, value: Mapping[Any, Any], place: _Place) -> Mapping[Any, Any]:
        pairs = ((key, self.convert(item, (key, place))) for key, item in value.items())
        made = {self._hashable(key, place): item for key, item in pairs if item is not _LEFT_OUT}
        # Of an OrderedDict attributes are written, too: `_metadata`, where it is a `state_dict`.
        attributes = getattr(value, "__dict__", None)
        is_plain = (
            type(value) in _CONTAINERS
            and len(made) == len(value)
            and all(map(operator.is_, made, value))
            and all(map(operator.is_, made.values(), value.values()))
            and (not attributes or self.convert(attributes, place) is attributes)
        )
        return value if is_plain else made

    def _items(self, value: Any, place: _Place) -> Any:
        if type(value) in _CONTAINERS and _ATOMS.issuperset(map(type, value)):
            return value
        if isinstance(value, (set, frozenset)):
            return {self._hashable(item, place) for item in value}
        made = [self.convert(item, (index, place)) for index, item in enumerate(value)]
        if type(value) in _CONTAINERS and all(a is b for a, b in zip(made, value, strict=True)):
            return value
        return tuple(made) if isinstance(value, tuple) else made

    def _hashable(self, value: Any, place: _Place) -> Any:
        """Return a key, or a member of a set, as a plain value."""
        if type(value) in _AS_THEY_ARE:
            return value
        made = self.convert(value, (value, place))
        try:
            hash(made)
        except TypeError:
            return self._text(value, (value, place))
        return made

    def _of_numpy(self, value: Any, place: _Place) -> Any:
        if isinstance(value, np.ndarray):
            try:
                return torch.from_numpy(value.copy())
            except (TypeError, ValueError):
                # Strings, objects, dates, and numbers in another byte order.
                return self.convert(value.tolist(), place)
        item = value.item()
        # A longdouble is its own item.
        return float(item) if isinstance(item, np.floating) else self.convert(item, place)

    def _other(self, value: Any, place: _Place) -> Any:
        if isinstance(value, PurePath):
            return str(value)
        if isinstance(value, str):
            return str.__str__(value)
        bases: tuple[Callable[[Any], Any], ...] = (int, float, complex, bytes, bytearray)
        base = next((kind for kind in bases if kind in type(value).__mro__), None)
        return self._text(value, place) if base is None else base(value)

    def _text(self, value: Any, place: _Place) -> str:
        is_left_out = _is_of_scheduler(place)
        what = "left out" if is_left_out else "kept as text"
        self.lost[_shown_place(place)] = f"a {type(value).__name__}: {what}"
        if is_left_out:
            return _LEFT_OUT
        try:
            return repr(value)
        except Exception:
            # Somebody else's `__repr__` is no reason to lose a checkpoint.
            return f"<{type(value).__name__}>"


def _is_of_scheduler(place: _Place) -> bool:
    """Return whether an attribute of a scheduler is at `place`.

    A scheduler takes back its whole state as it is: a text in the place of a function would fail at
    the next step, whereas the new scheduler of a resumed run has the function already.
    """
    return len(place) == 2 and len(place[1]) == 2 and place[1][1] == ("lr_schedulers", ())


def _plain_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return `value` without attributes and a class of somebody else's, which are no data."""
    if type(value) not in _TENSORS:
        # A class that torch is told to be safe, such as DTensor, has more than one tensor's data.
        is_known = type(value) in get_safe_globals() or hasattr(value, "__tensor_flatten__")
        return value if is_known else value.detach().as_subclass(torch.Tensor)
    return value.detach() if value.__dict__ else value


def _shown_place(place: _Place) -> str:
    keys = []
    while place:
        key, place = place
        keys.append(key)
    first, *inner = reversed(keys)
    return str(first) + "".join(f"[{key!r}]" for key in inner)
