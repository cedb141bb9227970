"""Which key was meant: the nearest one, for keys that lie in sections.

The names of keys differ in what they say, and sections often do not: whoever is wrong about a
section knows the name. So the two are compared apart, and a name weighs more.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

__all__ = ["nearest_key"]

_FARTHEST: Final = 0.4
"""How much of a name may differ."""
_FARTHEST_IN_WHOLE: Final = 0.2
"""How much of a whole key may differ."""
_NAME: Final = 3.0
"""What a name that differs altogether costs, where a section costs 1."""
_WHOLE: Final = 6.0
"""What a whole key that differs altogether costs."""
_MISSING: Final = 0.3
"""What a section costs that one of two keys does not have."""

_Difference: TypeAlias = Callable[[str, str, float], float | None]
"""`_difference`, which remembers what it has returned."""


def nearest_key(key: str, choices: Iterable[str]) -> str | None:
    """Return the one of `choices` that `key` was probably meant to be; None when none is near.

    Neither case nor separators count, and a section may be wrong or missing: `learningRate` and
    `trainer.learning-rate` both mean `config.learning_rate`.

    Args:
        key: As it was typed: `config.optimizers[0].lr`.
        choices: The keys that there are. Of several that are as near, the first is returned.
    """
    parts = _parts(key)
    # Keys share their sections, and often their names.
    difference = functools.cache(_difference)
    costs = {choice: _cost(parts, _parts(choice), difference) for choice in choices}
    near = {choice: cost for choice, cost in costs.items() if cost is not None}
    return min(near, key=near.__getitem__, default=None)


def _parts(key: str) -> list[str]:
    """Return the sections of a key and its name, of letters and digits alone."""
    parts = re.split(r"[.\[]", re.sub(r"[^\w.\[]|_", "", key).lower())
    return [part for part in parts if part] or [""]


def _cost(one: Sequence[str], other: Sequence[str], difference: _Difference) -> float | None:
    """Return how far two keys are from each other; None for too far."""
    costs = []
    name = difference(one[-1], other[-1], _FARTHEST)
    if name is not None:
        costs.append(_NAME * name + _cost_of_sections(one[:-1], other[:-1], difference))
    # The whole tells where points are missing, or too many. Else names that are not near are not
    # made so by a section in common, however long it is.
    if name is not None or len(one) != len(other):
        whole = difference("".join(one), "".join(other), _FARTHEST_IN_WHOLE)
        costs += [] if whole is None else [_WHOLE * whole]
    return min(costs, default=None)


def _cost_of_sections(one: Sequence[str], other: Sequence[str], difference: _Difference) -> float:
    """Return what it costs to get the one from the other, by the same table as in `_edits`."""
    last = [_MISSING * column for column in range(len(other) + 1)]
    for section in one:
        now = [last[0] + _MISSING]
        for column, wanted in enumerate(other, 1):
            # What costs more is cheaper left out of one key, and put into the other.
            part = difference(section, wanted, 2 * _MISSING)
            replaced = last[column - 1] + (1.0 if part is None else part)
            now.append(min(now[-1] + _MISSING, last[column] + _MISSING, replaced))
        last = now
    return last[-1]


def _difference(one: str, other: str, most: float) -> float | None:
    """Return which part of the longer word is to be changed to get the other; None for too much.

    One letter of a short word may always be wrong, as long as another one is right.
    """
    if one == other:
        return 0.0
    length = max(len(one), len(other))
    allowed = max(1, int(most * length))
    # What two words have not in common has to be edited.
    common = sum(min(one.count(letter), other.count(letter)) for letter in set(one))
    if not common or length - common > allowed:
        return None
    edits = _edits(one, other)
    return edits / length if edits <= allowed else None


def _edits(one: str, other: str) -> int:
    """Return how many letters have to be put in, left out, replaced or swapped with the next.

    It is the distance of Damerau and Levenshtein, where no place is edited twice.
    """
    before, last = [0], list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        now = [row]
        for column, wanted in enumerate(other, 1):
            edits = min(now[-1] + 1, last[column] + 1, last[column - 1] + (letter != wanted))
            if row > 1 and column > 1 and letter == other[column - 2] and wanted == one[row - 2]:
                edits = min(edits, before[column - 2] + 1)
            now.append(edits)
        before, last = last, now
    return last[-1]
