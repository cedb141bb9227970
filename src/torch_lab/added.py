"""Keys of `config` that a layer adds, and that no layer before it has: they may be misspelt."""

from __future__ import annotations

from torch_lab.layering import did_you_mean_key, shown_change
from torch_lab.provenance import DELETED, Histories, spelt

__all__ = ["added_keys"]


def added_keys(histories: Histories) -> list[str]:
    """Return a sentence for each of them, but those that are marked as `new`.

    The names in the other sections are known, and checked when the hparams are read.

    Args:
        histories: What has set each value.
    """
    return [
        f"{shown_change(changes[0])} adds {spelt(key)}, which no layer before it has"
        f"{did_you_mean_key(key, _of_others(key, histories), histories)}"
        for key, changes in histories.items()
        if key[0] == "config" and len(key) > 1
        if changes[0].file is not None and not changes[0].is_new
        if changes[-1].value is not DELETED and not _takes_a_place(key, histories)
    ]


def _takes_a_place(key: tuple[object, ...], histories: Histories) -> bool:
    """Return whether a value stands where a section was, or in one where a value was."""
    return any(
        other != key and (other[: len(key)] == key or key[: len(other)] == other)
        for other in histories
    )


def _of_others(key: tuple[object, ...], histories: Histories) -> list[tuple[object, ...]]:
    """Return the keys that another script than that of `key` has set first."""
    script = histories[key][0].file
    return [other for other, changes in histories.items() if changes[0].file != script]
