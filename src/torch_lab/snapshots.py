"""Snapshots: copies of a training's state, which stay as they are while it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch

__all__ = ["Snapshots"]

_TENSORS: Final = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Snapshots:
    """Takes snapshots, one after the other, each in the memory of the one before.

    That takes a fifth of the time: pages that are new cost more than what is written to them.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []

    def taken(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of plain values, with its tensors on the CPU; the one before is no more.

        What shares its memory, or is one object in two places, does so in the copy: so both make
        the same file, byte by byte, if all is on the CPU.
        """
        copier = _Copier(self._storages)
        copied: dict[str, Any] = copier.copy(values)
        self._storages = copier.storages
        return copied


class _Copier:
    """Copies values, each object once."""

    def __init__(self, spare: Iterable[torch.UntypedStorage]) -> None:
        self._copies: dict[int, Any] = {}
        self._copied_storages: dict[int, torch.UntypedStorage] = {}
        self._originals: list[Any] = []
        self._spare: dict[int, list[torch.UntypedStorage]] = {}
        for storage in spare:
            self._spare.setdefault(storage.nbytes(), []).append(storage)

    @property
    def storages(self) -> list[torch.UntypedStorage]:
        """What the copies lie in."""
        return list(self._copied_storages.values())

    def copy(self, value: Any) -> Any:
        if isinstance(value, (torch.Tensor, dict, list, tuple, set, bytearray)):
            if id(value) not in self._copies:
                self._copies[id(value)] = self._copied(value)
                # What is gone leaves its id to another.
                self._originals.append(value)
            return self._copies[id(value)]
        if isinstance(value, torch.UntypedStorage):
            return self._storage(value)
        return self._typed(value) if isinstance(value, torch.TypedStorage) else value

    def _typed(self, typed_storage: torch.TypedStorage) -> Any:
        untyped = self._storage(typed_storage._untyped_storage)
        made: Any = torch.TypedStorage
        return made(wrap_storage=untyped, dtype=typed_storage.dtype, _internal=True)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return self._dictionary(value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.copy, value))
        return type(value)(value)

    def _dictionary(self, value: dict[Any, Any]) -> dict[Any, Any]:
        made = type(value)()
        for key, item in value.items():
            made[key] = self.copy(item)
        # Of an OrderedDict attributes are written, too.
        if attributes := getattr(value, "__dict__", None):
            vars(made).update(self.copy(attributes))
        return made

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        is_view_with_a_flag = value.is_conj() or value.is_neg()
        is_strided = value.layout == torch.strided and not (value.is_quantized or value.is_meta)
        if type(value) not in _TENSORS or is_view_with_a_flag or not is_strided:
            return value if value.is_meta else value.detach().to("cpu", copy=True)
        storage = self._storage(value.untyped_storage())
        place = (value.storage_offset(), value.size(), value.stride())
        made = torch.empty(0, dtype=value.dtype).set_(storage, *place)
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(made, value.requires_grad)
        copied: torch.Tensor = made.requires_grad_(value.requires_grad)
        return copied

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage._cdata not in self._copied_storages:
            size = storage.nbytes()
            spare = self._spare.get(size)
            copied = spare.pop() if spare else torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
            _copy(storage, copied)
            self._copied_storages[storage._cdata] = copied
            self._originals.append(storage)
        return self._copied_storages[storage._cdata]


def _copy(source: torch.UntypedStorage, target: torch.UntypedStorage) -> None:
    """Copy what is in `source`; by whole numbers, if it can be, as bytes take a quarter longer."""
    if source.nbytes() % torch.int64.itemsize:
        target.copy_(source, non_blocking=False)
    else:
        _numbers_in(target).copy_(_numbers_in(source))


def _numbers_in(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64, device=storage.device).set_(storage)
