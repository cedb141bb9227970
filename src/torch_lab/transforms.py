"""Steps that data goes through: from `(x, md)` to `(x, md)`.

`x` is the data of a sample or of a batch, `md` the dictionary of what is known about it. The same
steps serve datasets, augmentations and the outputs of a network. All of them can be pickled when
the callables in them can, so that spawned worker processes get them too.
"""

from __future__ import annotations

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias, final, overload

from torch import nn

from torch_lab.errors import did_you_mean

__all__ = [
    "BaseDataTransform",
    "BaseMetadataTransform",
    "BaseTransform",
    "Metadata",
    "TransformCompose",
    "TransformIterable",
    "as_transform",
]

Metadata: TypeAlias = dict[str, Any]
"""What is known about a sample or a batch, `idx` and `y` among it."""

_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class BaseTransform(ABC):
    """A step that sees data and metadata; subclasses write `compute(x, md)`.

    An exception in a step keeps its type and traceback, and gets a note that names the step.
    """

    @abstractmethod
    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """Return the new `(x, md)` of `x` and `md`; the subclasses below see one of the two."""

    @final
    def __call__(self, x: Any, md: Metadata) -> tuple[Any, Metadata]:
        """Return the new `(x, md)`, checked."""
        try:
            return self._run(x, md)
        except Exception as error:
            self._annotate(error)
            raise

    def _run(self, x: Any, md: Metadata) -> tuple[Any, Metadata]:
        result: Any = self.compute(x, md)
        if not _is_pair(result):
            raise TypeError(f"compute must return (x, md), it returned {_a(result)}")
        pair: tuple[Any, Metadata] = result
        return pair

    def _annotate(self, error: Exception) -> None:
        error.add_note(f"in transform {_name(self)}")


class BaseDataTransform(BaseTransform):
    """A step that sees the data alone; subclasses write `compute(x)`."""

    @abstractmethod
    def compute(self, x: Any) -> Any:
        """Return the new `x`."""

    def _run(self, x: Any, md: Metadata) -> tuple[Any, Metadata]:
        return _given(self.compute(x)), md


class BaseMetadataTransform(BaseTransform):
    """A step that sees the metadata alone; subclasses write `compute(md)`."""

    @abstractmethod
    def compute(self, md: Metadata) -> Metadata:
        """Return the new `md`."""

    def _run(self, x: Any, md: Metadata) -> tuple[Any, Metadata]:
        result = self.compute(md)
        if not isinstance(result, dict):
            raise TypeError(f"compute must return the metadata, a dict; it returned {_a(result)}")
        return x, result


@final
class TransformCompose(BaseTransform):
    """Transforms, one after another.

    Has a length, can be iterated, indexed, sliced (into a shorter `TransformCompose`), compared,
    hashed, and lengthened with `+` by another one or by a single transform.

    Args:
        transforms: Transforms or plain callables; for the latter see `as_transform`.
    """

    def __init__(self, *transforms: Callable[..., Any]) -> None:
        self.transforms: Final = transforms
        self._steps = [as_transform(transform) for transform in transforms]

    def compute(self, x: Any, md: Metadata) -> tuple[Any, Metadata]:
        """Return `(x, md)` after the last step."""
        for position, step in enumerate(self._steps):
            try:
                x, md = step(x, md)
            except Exception as error:
                error.add_note(f"at position {position} of {self!r}")
                raise
        return x, md

    def _annotate(self, error: Exception) -> None:
        """Add nothing: `compute` has said where."""

    def __len__(self) -> int:
        return len(self.transforms)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter(self.transforms)

    @overload
    def __getitem__(self, index: int) -> Callable[..., Any]: ...

    @overload
    def __getitem__(self, index: slice) -> TransformCompose: ...

    def __getitem__(self, index: int | slice) -> Callable[..., Any]:
        if isinstance(index, slice):
            return TransformCompose(*self.transforms[index])
        return self.transforms[index]

    def __add__(self, other: Callable[..., Any]) -> TransformCompose:
        if not callable(other):
            return NotImplemented
        return TransformCompose(*self.transforms, *_flat(other))

    def __radd__(self, other: Callable[..., Any]) -> TransformCompose:
        if not callable(other):
            return NotImplemented
        return TransformCompose(*_flat(other), *self.transforms)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TransformCompose):
            return NotImplemented
        return self.transforms == other.transforms

    def __hash__(self) -> int:
        return hash(self.transforms)

    def __repr__(self) -> str:
        return f"TransformCompose({', '.join(map(_name, self.transforms))})"


@final
class TransformIterable(BaseTransform):
    """One transform, applied to the elements of a dict, a list or a tuple.

    The container keeps its type (named tuples and subclasses too), and the one given is left as it
    was. Metadata goes through the elements in turn.

    Args:
        transform: A transform or a plain callable, see `as_transform`.
        apply_to: The keys of the dict, or indices of the list or tuple, whose elements are
            transformed; a single one may stand alone. All of them unless given.
    """

    def __init__(
        self,
        transform: Callable[..., Any],
        apply_to: Sequence[Any] | str | int | None = None,
    ) -> None:
        self.transform: Final = as_transform(transform)
        if isinstance(apply_to, str | int):
            apply_to = [apply_to]
        self.apply_to: Final = apply_to if apply_to is None else tuple(apply_to)

    def compute(self, x: Any, md: Metadata) -> tuple[Any, Metadata]:
        """Return `x` with the chosen elements transformed.

        Raises:
            ValueError: `x` lacks a key or an index of `apply_to`.
        """
        if not isinstance(x, dict | list | tuple):
            raise TypeError(f"x must be a dict, a list or a tuple, it is {_a(x)}")
        there = list(x) if isinstance(x, dict) else list(range(len(x)))
        elements: Any = list(x) if isinstance(x, tuple) else copy.copy(x)
        for key in there if self.apply_to is None else self.apply_to:
            self._check_key(key, x, there)
            elements[key], md = self._transformed(key, elements[key], md)
        return (_tuple_like(x, elements) if isinstance(x, tuple) else elements), md

    def _transformed(self, key: Any, element: Any, md: Metadata) -> tuple[Any, Metadata]:
        try:
            return self.transform(element, md)
        except Exception as error:
            error.add_note(f"at {key!r} of {self!r}")
            raise

    def _check_key(self, key: Any, x: Any, there: list[Any]) -> None:
        if key in there or (not isinstance(x, dict) and key in range(-len(x), 0)):
            return
        # No KeyError or IndexError: iteration over a dataset takes the latter for its end.
        kind = "key" if isinstance(x, dict) else "index"
        names = [name for name in there if isinstance(name, str)]
        hint = did_you_mean(key, names) if isinstance(key, str) else ""
        raise ValueError(
            f"{self!r}: x has no {kind} {key!r}{hint or '.'} "
            f"It has: {', '.join(map(repr, there)) or 'nothing'}."
        )

    def _annotate(self, error: Exception) -> None:
        """Add nothing: `compute` has said where."""

    def __repr__(self) -> str:
        chosen = "" if self.apply_to is None else f", apply_to={list(self.apply_to)}"
        return f"TransformIterable({_name(self.transform)}{chosen})"


def as_transform(transform: Callable[..., Any]) -> BaseTransform:
    """Return `transform` itself, or a plain callable brought to the shape of one.

    A callable with one required positional argument gets `x` and returns the new `x`. One with two
    gets `(x, md)` and returns the new `x`, or `(x, md)`: a pair whose second item is a dict.

    Raises:
        TypeError: `transform` is not callable, is the class of a transform, or asks for other
            arguments.
    """
    if isinstance(transform, BaseTransform):
        return transform
    if isinstance(transform, type) and issubclass(transform, BaseTransform):
        name = transform.__name__
        raise TypeError(f"{name} is a class; give an instance of it, such as {name}()")
    if not callable(transform):
        raise TypeError(f"a transform must be callable, this is {_a(transform)}: {transform!r}")
    return _FunctionTransform(transform)


@final
class _FunctionTransform(BaseTransform):
    """A plain callable as a transform."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function: Final = function
        self._takes_metadata = _takes_metadata(function)

    def compute(self, x: Any, md: Metadata) -> tuple[Any, Metadata]:
        if not self._takes_metadata:
            return _given(self.function(x)), md
        result = self.function(x, md)
        return result if _is_pair(result) else (_given(result), md)


def _takes_metadata(function: Callable[..., Any]) -> bool:
    """Return whether `function` asks for `(x, md)`, rather than for `x` alone."""
    # Calling a module goes through `*args`: what it asks for stands in its `forward`.
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # Some builtins have none; all the useful ones take `x`.
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind not in _VARIADIC]
    if len(required) > 2 or any(p.kind is p.KEYWORD_ONLY for p in required):
        names = ", ".join(p.name for p in required)
        raise TypeError(
            f"a transform gets (x) or (x, md), but {_name(function)} requires ({names}); "
            "bind the others with functools.partial"
        )
    return len(required) == 2


def _flat(transform: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    return transform.transforms if isinstance(transform, TransformCompose) else (transform,)


def _tuple_like(original: tuple[Any, ...], elements: list[Any]) -> tuple[Any, ...]:
    if hasattr(original, "_fields"):  # A named tuple takes its elements one by one.
        return type(original)(*elements)
    return type(original)(elements)


def _is_pair(result: Any) -> bool:
    return isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)


def _given(x: Any) -> Any:
    if x is None:
        raise TypeError("it returned None; is a `return` missing?")
    return x


def _name(transform: Callable[..., Any]) -> str:
    """Return what its author calls `transform`."""
    if isinstance(transform, _FunctionTransform):
        transform = transform.function
    if isinstance(transform, functools.partial):
        transform = transform.func
    if isinstance(transform, TransformCompose | TransformIterable):
        return repr(transform)
    return getattr(transform, "__qualname__", type(transform).__name__)


def _a(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
