"""Where each value of the hparams comes from, and what looks wrong in their layers.

```
config.learning_rate  0.0003
  decrease_lr.py:16   0.0003
  hparams.py:7        0.1
```
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch_lab.errors import HparamsError
from torch_lab.experiment import Experiment
from torch_lab.layering import shown_change
from torch_lab.provenance import DELETED, Change, Key, is_same, spelt
from torch_lab.redaction import masked_at
from torch_lab.runs import path_in_sources
from torch_lab.suggestions import nearest_key
from torch_lab.utils import shown

__all__ = ["Explained", "chains", "explained", "explained_rows", "layer_warnings"]


@dataclass(frozen=True)
class Explained:
    """A key of the hparams, with all that has set it; secrets are masked."""

    key: Key
    changes: tuple[Change, ...]
    """The newest first: the first one holds."""

    @property
    def name(self) -> str:
        """The key as one types it."""
        return spelt(self.key)

    def record(self) -> dict[str, Any]:
        """Return it in what JSON can hold."""
        value = self.changes[0].value
        return {
            "key": self.name,
            "value": None if value is DELETED else repr(value),
            "is_deleted": value is DELETED,
            "changes": [_recorded(change) for change in self.changes],
        }


def _recorded(change: Change) -> dict[str, Any]:
    return {
        "file": str(change.file) if change.file else None,
        "line": change.line,
        "source": change.source,
        "value": repr(change.value),
    }


def chains(experiment: Experiment) -> dict[str, list[dict[str, Any]]]:
    """Return what has set each value, the newest last, as a run's record keeps it.

    Files are named by their paths in the project; secrets are masked.
    """

    def below(change: Change) -> Change:
        file = change.file and path_in_sources(change.file, experiment.root)
        return replace(change, file=file)

    every = (_explained(key, changes) for key, changes in experiment.histories.items())
    return {
        each.name: [_recorded(below(change)) for change in reversed(each.changes)] for each in every
    }


def explained(experiment: Experiment, wanted: Iterable[str] = ()) -> list[Explained]:
    """Return what has set each value of an experiment's hparams, or those that are wanted.

    Args:
        experiment: The experiment.
        wanted: Dotted keys, also of whole sections and of what was removed; without any, all
            values that there are.

    Raises:
        HparamsError: There is no such key, and never was.
    """
    every = [_explained(key, changes) for key, changes in experiment.histories.items()]
    found = [each for each in every if each.changes[0].value is not DELETED]
    if not (names := list(wanted)):
        return found
    below = {name: [each for each in every if _is_below(each.name, name)] for name in names}
    for name, each in below.items():
        if not each:
            near = nearest_key(name, [known.name for known in every])
            raise HparamsError(
                f"{shown(experiment.script)} has no {name}"
                + (f"; did you mean {near}?" if near else "")
            )
    return [each for found in below.values() for each in found]


def _explained(key: Key, changes: Iterable[Change]) -> Explained:
    def plain(value: Any) -> Any:
        return value if value is DELETED else masked_at(key, value)

    newest_first = reversed(tuple(changes))
    return Explained(key, tuple(replace(each, value=plain(each.value)) for each in newest_first))


def _is_below(name: str, section: str) -> bool:
    return name == section or name.startswith((f"{section}.", f"{section}["))


def explained_rows(found: Iterable[Explained]) -> Iterator[tuple[str, str]]:
    """Yield the lines of a report: each key with its value, and below it what has set it."""
    for each in found:
        yield each.name, repr(each.changes[0].value)
        for number, change in enumerate(each.changes):
            yield f"{'>' if number == 0 else ' '} {shown_change(change)}", repr(change.value)


def layer_warnings(experiment: Experiment) -> Iterator[str]:
    """Yield what looks wrong in the layers of an experiment, a sentence each.

    That is a base of another experiment, a value that a layer sets to what it was already, and a
    key of `config` that a layer adds: it may be misspelt. Keys of the other sections are checked by
    their names.
    """
    for layer in experiment.layers[:-1]:
        is_elsewhere = layer.path.parent != experiment.folder
        # A folder of bases alone is no experiment.
        if is_elsewhere and layer.path.with_name(experiment.config_script.name).is_file():
            yield (
                f"{shown(experiment.script)} is layered on {shown(layer.path)}, which is of "
                f"another experiment, {layer.path.parent.name}"
            )
    for key, changes in experiment.histories.items():
        yield from _set_in_vain(key, changes)
    yield from experiment.added_keys


def _set_in_vain(key: Key, changes: tuple[Change, ...]) -> Iterator[str]:
    for before, after in itertools.pairwise(changes):
        if before.file != after.file and is_same(before.value, after.value):
            value = masked_at(key, after.value)
            yield (
                f"{shown_change(after)} sets {spelt(key)} to {value!r}, which it was already "
                f"({shown_change(before)})"
            )
