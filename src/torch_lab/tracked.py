"""Which keys of `config` nobody has read: dictionaries that note what is read of them.

`tracked` makes them of ordinary ones, with those inside, also in lists and tuples. They are
dictionaries, and what is made of them is ordinary again. What counts as reading:

| what is done | what it reads |
| --- | --- |
| `config[key]`, `get`, `pop`, `setdefault`, `key in config` | the key |
| `"%(key)s" % config`, `"{key}".format_map(config)`, `case {"key": x}` | the key |
| `popitem` | the key that it returns |
| iteration, `reversed`, `keys`, `values`, `items`, `case {**rest}` | every key |
| `**config`, `dict(config)`, `copy`, `copy.copy`, `|`, `x.update(config)` | every key |
| `==`, `!=` | every key, also of the dictionaries inside that are compared |
| `copy.deepcopy`, `pickle`, `json`, `yaml` | every key, also of the dictionaries inside |
| `len`, `bool`, `repr`, `str`, `isinstance` | nothing |
| `config[key] = x`, `update`, `|=`, `del`, `clear` | nothing, but the key is the code's own now |

To have a dictionary that is inside another is not to read it. A list or a tuple is a value, read as
a whole; the dictionaries in it are tracked, by their indices. To ask whether a key is there counts:
code that names a key knows it. To show a dictionary does not: nothing depends on it.

CPython copies the storage of a dictionary without asking for its keys, but not if its class has an
`__iter__` of its own. What looks into the storage all the same finds the right values and leaves no
note: orjson, `dict.get(config, key)`, an instance after `instance.__dict__ = config`. What wants
exactly a `dict`, like `marshal` and `OmegaConf.create`, takes `copy.deepcopy(config)`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias

from torch_lab.provenance import Key

__all__ = ["Reads", "Tracked", "tracked"]

_Inner: TypeAlias = Sequence[tuple[Key, "Reads"]]
"""What is noted of the dictionaries in a value, by where they are in it."""


def tracked(given: Mapping[Any, Any]) -> tuple[Tracked, Reads]:
    """Return a copy of nested dictionaries that notes what is read of it, and the notes.

    Lists are copied too; everything else is shared.
    """
    _introduce_to_yaml()
    return _followed(given)


def _followed(given: Mapping[Any, Any]) -> tuple[Tracked, Reads]:
    dictionary = dict.__new__(Tracked)
    parts = {key: _part(value) for key, value in given.items()}
    dict.update(dictionary, {key: value for key, (value, _) in parts.items()})
    dictionary._reads = Reads(dictionary, {key: inner for key, (_, inner) in parts.items()})
    return dictionary, dictionary._reads


def _part(value: Any) -> tuple[Any, _Inner]:
    """Return a value with the dictionaries in it tracked, and their notes."""
    if type(value) is dict:
        dictionary, reads = _followed(value)
        return dictionary, [((), reads)]
    if type(value) not in (list, tuple):
        return value, []
    parts = [_part(item) for item in value]
    items = [item for item, _ in parts]
    inner = [
        ((index, *below), reads) for index, (_, found) in enumerate(parts) for below, reads in found
    ]
    if type(value) is list:
        return items, inner
    return (tuple(items) if inner else value), inner


def _introduce_to_yaml() -> None:
    """Have tracked dictionaries written as others: yaml goes by the exact type.

    Lightning writes hyperparameters with it, so it is there before a config function is called.
    """
    if (yaml := sys.modules.get("yaml.representer")) is not None:
        for representer in (yaml.SafeRepresenter, yaml.Representer):
            for kind in (Tracked, _Plain):
                representer.add_representer(kind, representer.represent_dict)


class Reads:
    """What nobody has read yet of a dictionary and of those inside.

    Args:
        dictionary: Of which nothing was read so far.
        inner: What is noted of the dictionaries below each of its keys.
    """

    __slots__ = ("_dictionary", "_inner", "_keys", "left")

    def __init__(self, dictionary: Tracked, inner: Mapping[Any, _Inner]) -> None:
        self.left = {
            key
            for key, value in dict.items(dictionary)
            if not isinstance(value, Tracked) or not value
        }
        """The keys of values that nobody has read. An empty dictionary is a value."""
        self._keys = tuple(inner)
        self._inner = {key: found for key, found in inner.items() if found}
        # Whether somebody else holds it shall be seen.
        self._dictionary: weakref.ref[_Plain] = weakref.ref(dictionary)

    def forget(self, keys: Iterable[Any]) -> None:
        """Note that `keys` hold something else now, or are gone."""
        for key in keys:
            self.left.discard(key)
            self._inner.pop(key, None)

    def unread(self) -> list[Key]:
        """Return the keys that nobody has read, in their order."""
        return [key for key, _ in self._unread(())]

    def forgotten(self) -> list[Key]:
        """Return the keys that nobody has read, and that nobody can read any more.

        Whoever holds a dictionary, like a module that keeps its `config`, may read it later. So the
        caller must not hold it.
        """
        return [key for key, reads in self._unread(()) if not reads.is_held]

    def end(self) -> None:
        """Note nothing any more, so that to read is as quick as ever."""
        if (dictionary := self._dictionary()) is not None:
            dictionary.__class__ = _Plain
        for inner in self._inner.values():
            for _, reads in inner:
                reads.end()

    @property
    def is_held(self) -> bool:
        """Whether there is somebody who can still read the dictionary."""
        return self._dictionary() is not None

    def _unread(self, path: Key) -> Iterator[tuple[Key, Reads]]:
        for key in self._keys:
            if key in self.left:
                yield (*path, key), self
            else:
                for below, reads in self._inner.get(key, ()):
                    yield from reads._unread((*path, key, *below))


class _Ordinary(type):
    """The type of types that make ordinary dictionaries: `type(config)(…)` is one, as is a copy."""

    def __call__(cls, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Plain(dict[Any, Any], metaclass=_Ordinary):
    """A dictionary of which ordinary ones are made, in whatever way."""

    __slots__ = ("__weakref__", "_reads")

    _reads: Reads

    def __reduce_ex__(self, protocol: Any) -> Any:
        # For `pickle`, `copy.copy` and `copy.deepcopy` alike.
        return dict, (), None, None, iter(self.items())


class Tracked(_Plain):
    """A dictionary that notes what is read of it; what counts stands at the top of this module."""

    __slots__ = ()

    __hash__ = None  # type: ignore[assignment]

    # One key.

    def __getitem__(self, key: Any) -> Any:
        value = dict.__getitem__(self, key)
        self._reads.left.discard(key)
        return value

    def get(self, key: Any, default: Any = None, /) -> Any:
        value = dict.get(self, key, default)
        self._reads.left.discard(key)
        return value

    def __contains__(self, key: Any) -> bool:
        is_there = dict.__contains__(self, key)
        self._reads.left.discard(key)
        return is_there

    def pop(self, key: Any, /, *default: Any) -> Any:
        value = dict.pop(self, key, *default)
        if self._reads.left:  # An empty dictionary may not ask for a hash, nor do we.
            self._reads.left.discard(key)
        return value

    def popitem(self) -> tuple[Any, Any]:
        key, value = dict.popitem(self)
        self._reads.left.discard(key)
        return key, value

    def setdefault(self, key: Any, default: Any = None, /) -> Any:
        value = dict.setdefault(self, key, default)
        self._reads.left.discard(key)
        return value

    # Every key.

    def __iter__(self) -> Iterator[Any]:
        self._reads.left.clear()
        return dict.__iter__(self)

    def __reversed__(self) -> Iterator[Any]:
        self._reads.left.clear()
        return dict.__reversed__(self)

    def keys(self) -> Any:
        self._reads.left.clear()
        return dict.keys(self)

    def values(self) -> Any:
        self._reads.left.clear()
        return dict.values(self)

    def items(self) -> Any:
        self._reads.left.clear()
        return dict.items(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other if isinstance(other, dict) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if isinstance(other, dict):
            for each in (self, other):
                if isinstance(each, Tracked):
                    each._reads.left.clear()
        return dict.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    # Writing.

    def __setitem__(self, key: Any, value: Any) -> None:
        dict.__setitem__(self, key, value)
        self._reads.forget([key])

    def __delitem__(self, key: Any) -> None:
        dict.__delitem__(self, key)
        self._reads.forget([key])

    def clear(self) -> None:
        keys = list(dict.keys(self))
        dict.clear(self)
        self._reads.forget(keys)

    def update(self, /, *args: Any, **kwargs: Any) -> None:
        new: dict[Any, Any] = {}
        try:
            dict.update(new, *args, **kwargs)
        finally:  # What comes before a failure is taken over.
            dict.update(self, new)
            self._reads.forget(new)

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self
