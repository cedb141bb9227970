"""The bytes of nested values, to tell equal ones from others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["contents"]


def contents(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names, types and shapes, and the bytes, of all that is in nested containers.

    What has no bytes that stand for it, such as an object of some other class, has None.

    Args:
        value: Tensors, arrays, images, records and plain values, in containers.
        path: The name of it, to name its parts by.
    """
    if isinstance(value, Tensor) and not value.is_nested:
        yield f"{path} {value.dtype} {tuple(value.shape)}", _bytes(value)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{path} {value.dtype} {value.shape}", value.tobytes()
    elif isinstance(value, (np.ndarray, np.void)) and value.dtype.names and value.dtype.hasobject:
        # Its bytes are addresses of objects.
        yield f"{path} {value.dtype} {value.shape}", None
    elif isinstance(value, np.ndarray) and not value.ndim:
        yield from contents(value.item(), path)
    elif isinstance(value, (Mapping, list, tuple, np.ndarray, Tensor)) or _is_record(value):
        for key, part in _items(value):
            yield from contents(part, f"{path}/{key}")
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        yield path, repr(value).encode()
    elif hasattr(value, "__array_interface__"):  # An image.
        yield from contents(np.asarray(value), path)
    else:
        # The representation of some other object may hold its address.
        yield f"{path} {type(value).__name__}", None


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Tensor):
        yield from enumerate(value.unbind())
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (Sequence, np.ndarray)):
        yield from enumerate(value)
    else:
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def _bytes(tensor: Tensor) -> Any:
    plain = tensor.detach()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    if plain.is_quantized:
        plain = plain.int_repr()
    plain = plain.resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
