"""Which key was meant: the nearest one, for keys that lie in sections.

The names of keys differ in what they say, and sections often do not: whoever is wrong about a
section knows the name. So the two are compared apart, and a name weighs more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

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


def nearest_key(key: str, choices: Iterable[str]) -> str | None:
    """Return the one of `choices` that `key` was probably meant to be; None when none is near.

    Neither case nor separators count, and a section may be wrong or missing: `learningRate` and
    `trainer.learning-rate` both mean `config.learning_rate`.

    Args:
        key: As it was typed: `config.optimizers[0].lr`.
        choices: The keys that there are. Of several that are as near, the first is returned.
    """
    parts = _parts(key)
    costs = {choice: _cost(parts, _parts(choice)) for choice in choices}
    near = {choice: cost for choice, cost in costs.items() if cost is not None}
    return min(near, key=near.__getitem__, default=None)


def _parts(key: str) -> list[str]:
    """Return the sections of a key and its name, of letters and digits alone."""
    parts = [re.sub(r"\W|_", "", part).lower() for part in re.split(r"[.\[]", key)]
    return [part for part in parts if part] or [""]


def _cost(one: Sequence[str], other: Sequence[str]) -> float | None:
    """Return how far two keys are from each other; None for too far."""
    costs = []
    if (name := _difference(one[-1], other[-1], _FARTHEST)) is not None:
        costs.append(_NAME * name + _cost_of_sections(one[:-1], other[:-1]))
    # The whole tells where points are missing, or too many.
    if (whole := _difference("".join(one), "".join(other), _FARTHEST_IN_WHOLE)) is not None:
        costs.append(_WHOLE * whole)
    return min(costs, default=None)


def _cost_of_sections(one: Sequence[str], other: Sequence[str]) -> float:
    if not one or not other:
        return _MISSING * (len(one) + len(other))
    return min(
        _cost_of_sections(one[:-1], other[:-1]) + _difference_of_sections(one[-1], other[-1]),
        _cost_of_sections(one[:-1], other) + _MISSING,
        _cost_of_sections(one, other[:-1]) + _MISSING,
    )


def _difference_of_sections(one: str, other: str) -> float:
    # What costs more is cheaper left out of one key, and put into the other.
    difference = _difference(one, other, 2 * _MISSING)
    return 1.0 if difference is None else difference


def _difference(one: str, other: str, most: float) -> float | None:
    """Return which part of the longer word is to be changed to get the other; None for too much."""
    length = max(len(one), len(other), 1)
    if one == other:
        return 0.0
    if abs(len(one) - len(other)) > most * length:
        return None
    difference = _edits(one, other) / length
    return difference if difference <= most else None


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
