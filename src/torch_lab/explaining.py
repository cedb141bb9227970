"""Where each value of the hparams comes from, and what looks wrong in their layers.

```
config.learning_rate  0.0003
> decrease_lr.py:16   0.0003
  hparams.py:7        0.1
```
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch_lab.errors import HparamsError
from torch_lab.experiment import Experiment
from torch_lab.layering import did_you_mean_key, parsed_key, shown_change
from torch_lab.provenance import DELETED, Change, Key, is_same, leaves, spelt
from torch_lab.redaction import masked, masked_at, secrets_in
from torch_lab.runs import path_in_sources
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

    return {
        each.name: [_recorded(below(change)) for change in reversed(each.changes)]
        for each in _every(experiment)
    }


def explained(experiment: Experiment, wanted: Iterable[str] = ()) -> list[Explained]:
    """Return what has set each value of an experiment's hparams, or those that are wanted.

    Args:
        experiment: The experiment.
        wanted: Dotted keys, also of whole sections, of what was removed, and of what has a default
            alone; without any, all values that scripts have set, and after them what was removed.

    Raises:
        HparamsError: There is no such key, and never was.
    """
    every = list(_every(experiment))
    if not (names := list(wanted)):
        return sorted(every, key=lambda each: each.changes[0].value is DELETED)
    defaults = list(_defaults(experiment))
    found: dict[Key, Explained] = {}
    for name in names:
        key = parsed_key(name) or (name,)
        those = [each for each in every if _belongs(each.key, key)]
        those = those or [each for each in defaults if _belongs(each.key, key)]
        if not those:
            known = [each.key for each in [*every, *defaults]]
            near = did_you_mean_key(key, known, experiment.histories)
            raise HparamsError(f"{shown(experiment.script)} has no {name}{near}")
        found |= {each.key: each for each in those}
    return list(found.values())


def _every(experiment: Experiment) -> Iterator[Explained]:
    secrets = secrets_in(experiment.effective.hparams)

    def plain(key: Key, value: Any) -> Any:
        return value if value is DELETED else masked_at(key, value, secrets)

    for key, changes in experiment.histories.items():
        newest_first = reversed(changes)
        yield Explained(
            key, tuple(replace(each, value=plain(key, each.value)) for each in newest_first)
        )


def _defaults(experiment: Experiment) -> Iterator[Explained]:
    """Yield the values that no script has set."""
    for key, value in leaves(masked(experiment.hparams.as_dict())):
        if key not in experiment.histories:
            yield Explained(key, (Change(None, 0, value, source="the default"),))


def _belongs(key: Key, wanted: Key) -> bool:
    """Return whether a value is at or below a key, or the list that it leads into."""
    leads_into_it = len(key) < len(wanted) and isinstance(wanted[len(key)], int)
    return key[: len(wanted)] == wanted or (leads_into_it and wanted[: len(key)] == key)


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
    secrets = secrets_in(experiment.effective.hparams)
    for key, changes in experiment.histories.items():
        yield from _set_in_vain(key, changes, secrets)
    yield from experiment.added_keys


def _set_in_vain(key: Key, changes: tuple[Change, ...], secrets: Sequence[str]) -> Iterator[str]:
    for before, after in itertools.pairwise(changes):
        if before.file != after.file and is_same(before.value, after.value):
            value = masked_at(key, after.value, secrets)
            yield (
                f"{shown_change(after)} sets {spelt(key)} to {value!r}, which it was already "
                f"({shown_change(before)})"
            )
