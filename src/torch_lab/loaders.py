"""The user's DataLoaders, fitted for a run: they go on where it ended, and name what fails.

A loader stays the object that it is. Its sampler is replaced by one that is a function of the
position in training (`samplers`), its dataset by one that is seeded by that position and names the
sample that fails, its iterator by one that watches the workers (`workers`).
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    IterDataPipe,
    MapDataPipe,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from torch_lab.components import each_loader
from torch_lab.datasets import ArrayDataset
from torch_lab.errors import LoaderError, listed
from torch_lab.iterables import Enveloping, SeededIterable, SourceOrder, has_state
from torch_lab.samplers import Order, Position, StampedBatch, StampedIndex, why_not_exact
from torch_lab.seeds import (
    SeededGenerator,
    Stream,
    derived,
    seed_generators,
)
from torch_lab.utils import length_of
from torch_lab.workers import UNALIKE, Desk, IteratorMaker, Pace, Watch, WorkerStart

__all__ = ["Loaders", "given_to"]

_STAGES: Final = {
    "train": ("train_dataloaders", Stream.TRAIN),
    "validate": ("val_dataloaders", Stream.VALIDATION),
    "test": ("test_dataloaders", Stream.TEST),
    "predict": ("predict_dataloaders", Stream.PREDICT),
}
_HOOKS: Final = {
    "train_dataloader": "train",
    "val_dataloader": "validate",
    "test_dataloader": "test",
}
_PLAIN_DATA: Final = (TensorDataset, list, tuple, range, np.ndarray, Tensor)
_NAMED_SAMPLES: Final = 8


@dataclass(frozen=True)
class _Role:
    """What a loader is there for."""

    stage: str
    name: str
    index: int
    cycles: bool

    @property
    def trains(self) -> bool:
        return self.stage == "train"

    def bits(self, seed: int) -> int:
        _, stream = _STAGES[self.stage]
        return derived(seed, Stream.DATA, stream, self.index)


class Loaders:
    """All loaders of a run.

    Args:
        position: Where training stands; read whenever the training data is gone through anew.
        debug: Whether to load in this process, where a debugger reaches.
        timeout: After how many seconds without a batch workers count as hanging, for loaders that
            have no time limit of their own; None for never.
        shard: Whether the processes of a distributed run share the samples out, as Lightning's
            `use_distributed_sampler` would have it; that must be off then.
        overfit: Whether samples come in the order of the data, as Lightning's `overfit_batches`
            has it.
    """

    def __init__(
        self,
        position: Position,
        *,
        debug: bool = False,
        timeout: float | None = 600.0,
        shard: bool = True,
        overfit: bool = False,
    ) -> None:
        self.position = position
        self.debug = debug
        self.timeout = timeout
        self.shard = shard
        self.overfit = overfit
        # Stands for this object in the loaders, without a cycle that would keep workers alive.
        self._token = object()
        self._watches: dict[str, Watch] = {}
        self._reasons: dict[str, list[str]] = {}
        self._trained: dict[str, Any] = {}
        self._restored: dict[str, Any] = {}
        self._fitted: dict[str, DataLoader[Any]] = {}
        self._pins = False

    @property
    def reasons(self) -> list[str]:
        """Why training may not be exact after a resume, a sentence each; those of all loaders.

        The loaders of a datamodule are known when Lightning has asked for them.
        """
        return [f"{name}: {why}" for name, whys in self._reasons.items() for why in whys]

    @property
    def watches(self) -> list[Watch]:
        """What is known of each loader's iteration."""
        return list(self._watches.values())

    def latest_indices(self, stage: str, number: int) -> Sequence[Any] | None:
        """Return the indices of the samples in the batch that a loader has made last.

        Args:
            stage: `train`, `validate` or `test`.
            number: Which of the loaders, if batches come from one after the other; of several
                that make a batch together, as in training, nothing is known.
        """
        watches = [watch for watch in self.watches if watch.stage == stage]
        if number >= len(watches) or (stage == "train" and len(watches) > 1):
            return None
        indices = watches[number].order.latest_indices
        return indices if isinstance(indices, (list, tuple)) else None

    @property
    def have_partial_batches(self) -> bool:
        """Whether the last batch of a loader is smaller than the others."""
        return any(watch.order.has_partial_batch for watch in self.watches)

    def facts(self) -> dict[str, dict[str, int | None]]:
        """Return how much data there is to train with, by loader; None where that is not known."""
        return {
            name: {
                "samples": length_of(getattr(loader, "dataset", None)),
                "batch_size": getattr(loader, "batch_size", None),
            }
            for name, loader in self._trained.items()
        }

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Return where iterable datasets stood when `batches` had been trained in this epoch."""
        orders = {name: watch.order for name, watch in self._watches.items()}
        sources = {name: each for name, each in orders.items() if type(each) is SourceOrder}
        states = {name: each.state(batches) for name, each in sources.items()}
        return {name: state for name, state in states.items() if state is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let iterable datasets begin where `state` says when they are next gone through."""
        self._restored.update(state)

    def prepare(self, given: Any, stage: str) -> Any:
        """Fit the loaders in `given` for a run, and return what to hand to the Trainer.

        Args:
            given: A DataLoader, or several in lists, dictionaries or a CombinedLoader. They are
                changed in place; what has to be another object is replaced in what is returned.
            stage: `train`, `validate`, `test` or `predict`.
        """
        return self._prepared(given, stage, _STAGES[stage][0])

    def prepare_datamodule(self, datamodule: pl.LightningDataModule) -> None:
        """Do the same to whatever loaders `datamodule` will return."""
        for hook in _HOOKS:
            if is_overridden(hook, datamodule, pl.LightningDataModule):
                # Of the class, not bound: a bound method cannot be pickled from its own instance.
                function = getattr(type(datamodule), hook)
                prepared = functools.partial(self._prepared_from, function, datamodule, hook)
                setattr(datamodule, hook, prepared)

    def _prepared_from(self, function: Callable[[Any], Any], datamodule: Any, hook: str) -> Any:
        return self._prepared(function(datamodule), _HOOKS[hook], hook)

    def _prepared(self, given: Any, stage: str, name: str) -> Any:
        leaves = [leaf for leaf in each_loader(name, given) if leaf[1] is not None]
        # Lightning's default for several training loaders, too.
        mode = getattr(given, "_mode", "max_size_cycle")
        cycles = mode == "max_size_cycle" and len(leaves) > 1
        replaced = {}
        loader: Any
        for index, (own_name, loader) in enumerate(leaves):
            role = _Role(stage, own_name, index, cycles)
            is_plain = isinstance(loader, DataLoader)
            fitted = self._fit(loader, role) if is_plain else self._resumed(loader, role)
            replaced[own_name] = fitted
            if role.trains:
                self._trained[own_name] = fitted
        return _with_leaves(given, name, replaced)

    def pin_batches(self) -> None:
        """Have all DataLoaders copy their batches into pinned memory, also those that come later.

        From there they go to the device while the training goes on.
        """
        self._pins = True
        for loader in self._fitted.values():
            _pin(loader)

    # Loaders that are no DataLoaders.

    def _resumed(self, loader: Any, role: _Role) -> Any:
        if not role.trains or has_state(loader) or isinstance(loader, _Resumed):
            return loader
        if hasattr(loader, "__len__") and hasattr(loader, "__getitem__"):
            return _Resumed(loader, self.position, role.cycles)
        self._reasons[role.name] = [
            f"a {type(loader).__name__} cannot begin in the middle of an epoch; use a DataLoader"
        ]
        return loader

    # DataLoaders.

    def _fit(self, loader: DataLoader[Any], role: _Role) -> DataLoader[Any]:
        """Fit `loader` in place, or a copy of it if it has another role in this run already."""
        if fitting := vars(loader).get("_fitting"):
            if fitting.by is self._token and fitting.role == role:
                return loader
            if fitting.by is self._token:
                loader = copy.copy(loader)
            _undo(loader, fitting)
        before = dict(vars(loader))
        if role.trains:
            self._reasons[role.name] = _reasons(loader, role)
        self._fit_workers(loader)
        self._fit_data(loader, role)
        changed = {key: before[key] for key in before if vars(loader)[key] is not before[key]}
        vars(loader)["_fitting"] = _Fitting(self._token, role, changed)
        self._fitted[role.name] = loader
        if self._pins:
            _pin(loader)
        return loader

    def _fit_workers(self, loader: DataLoader[Any]) -> None:
        # DataLoader refuses to have some attributes set; a new one would lose a subclass's state.
        if self.debug:
            # It refuses some of these alone, and others alone do not go together.
            vars(loader).update(
                num_workers=0, timeout=0, prefetch_factor=None, persistent_workers=False
            )
        if loader.num_workers:
            start = WorkerStart(loader.worker_init_fn)
            vars(loader).update(worker_init_fn=start, timeout=loader.timeout or self.timeout or 0)

    def _fit_data(self, loader: DataLoader[Any], role: _Role) -> None:
        if isinstance(loader.dataset, (IterDataPipe, MapDataPipe)):
            return
        generator = SeededGenerator.seeded(role.bits(self.position.seed))
        vars(loader).update(generator=generator)
        desk = Desk(loader.num_workers)
        pace = None
        if isinstance(loader.dataset, IterableDataset):
            order = self._fit_iterable(loader, role)
        else:
            pace = self._pace_of(loader, role)
            order = self._fit_samples(loader, role, desk)
        if role.stage == "predict" or _iterates_itself(loader):
            # Lightning makes a new loader for predictions, to get hold of its indices.
            return
        key = "sampler" if loader.batch_sampler is None else "batch_sampler"
        watch = Watch(role.name, role.stage, order, desk, pace)
        self._watches[role.name] = watch
        vars(loader).update({key: order, "_get_iterator": IteratorMaker(loader, watch)})

    def _pace_of(self, loader: DataLoader[Any], role: _Role) -> Pace | None:
        makes_batches = hasattr(_whole(loader.dataset), "__getitems__")
        is_of_samples = loader.batch_sampler is not None and not makes_batches
        is_measured = role.trains and not (loader.num_workers or self.debug)
        return Pace() if is_of_samples and is_measured else None

    def _fit_samples(self, loader: DataLoader[Any], role: _Role, desk: Desk) -> Order:
        bits = role.bits(self.position.seed)
        if self.overfit and role.stage in ("train", "validate"):
            _set_sequential(loader)
        draws = not _draws_nothing(loader)
        # What draws nothing and is made here needs no seed, and nobody asks what it is making.
        is_bare = not draws and not loader.num_workers
        if not is_bare:
            by_index = role.stage == "predict"
            dataset = _Fitted(loader.dataset, bits if draws else None, by_index, desk)
            vars(loader).update(dataset=dataset, collate_fn=_Collating(loader.collate_fn, dataset))
        return Order(
            _index_sampler(loader),
            self.position if role.trains else None,
            bits,
            cycles=role.cycles,
            shard=self.shard,
            stamps=not is_bare,
            **_options(loader),
        )

    def _fit_iterable(self, loader: DataLoader[Any], role: _Role) -> Order:
        bits = role.bits(self.position.seed)
        keeps_state = role.trains and has_state(loader.dataset)
        dataset: Any = loader.dataset
        source = SeededIterable(dataset, bits, loader.batch_size or 1, loader.persistent_workers)
        vars(loader).update(dataset=source)
        if keeps_state:
            vars(loader).update(collate_fn=Enveloping(loader.collate_fn, source))
        return SourceOrder(
            _index_sampler(loader),
            self.position if role.trains else None,
            bits,
            feeds=source,
            name=role.name,
            workers=max(1, loader.num_workers),
            restored=self._restored,
            **_options(loader),
        )


@dataclass(frozen=True)
class _Fitting:
    """What was done to a loader."""

    by: object
    role: _Role
    before: dict[str, Any]


def given_to(loader: DataLoader[Any], name: str) -> Any:
    """Return what the user has given a loader under `name`, also after it was fitted for a run."""
    fitting = vars(loader).get("_fitting")
    return (fitting.before if fitting else {}).get(name, vars(loader).get(name))


def _undo(loader: DataLoader[Any], fitting: _Fitting) -> None:
    del vars(loader)["_fitting"]
    vars(loader).pop("_get_iterator", None)
    vars(loader).update(fitting.before, _iterator=None)


def _pin(loader: DataLoader[Any]) -> None:
    fitting: _Fitting = vars(loader)["_fitting"]
    fitting.before.setdefault("pin_memory", loader.pin_memory)
    vars(loader).update(pin_memory=True)


def _index_sampler(loader: DataLoader[Any]) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _options(loader: DataLoader[Any]) -> dict[str, Any]:
    return {
        "generator": loader.generator,
        "yields_batches": loader.batch_sampler is not None,
        "keeps_workers": loader.persistent_workers,
        "ahead": loader.num_workers * (loader.prefetch_factor or 0),
    }


def _set_sequential(loader: DataLoader[Any]) -> None:
    """Let `loader` yield the samples in the order of the data."""
    sampler = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    vars(loader).update(sampler=sampler)
    if loader.batch_size is not None:
        batches = BatchSampler(sampler, loader.batch_size, loader.drop_last)
        vars(loader).update(batch_sampler=batches)


def _iterates_itself(loader: DataLoader[Any]) -> bool:
    """Return whether a subclass makes its iterators in its own way, as torchdata's does."""
    return type(loader)._get_iterator is not DataLoader._get_iterator or has_state(loader)


def _reasons(loader: DataLoader[Any], role: _Role) -> list[str]:
    """Return why a resume may not be exact."""
    kind, data = type(loader).__name__, type(loader.dataset).__name__
    if _iterates_itself(loader):
        return [f"{kind} finds its place by itself, and what its workers draw is lost"]
    reasons = []
    if type(loader).__iter__ is not DataLoader.__iter__:
        reasons.append(f"{kind} has an __iter__ of its own, which may have a state that is lost")
    if loader.num_workers and not loader.in_order:
        reasons.append("with in_order=False, batches come in the order in which they are ready")
    if isinstance(loader.dataset, IterableDataset):
        if not has_state(loader.dataset):
            reasons.append(
                f"{data} is an IterableDataset without state_dict: where it was is lost, and it"
                " begins anew"
            )
        elif role.cycles:
            reasons.append(
                f"{data} is an IterableDataset beside other loaders: which pass over it was under"
                ' way is lost; CombinedLoader(..., "min_size") makes one pass of each'
            )
    elif why := why_not_exact(_index_sampler(loader)):
        reasons.append(why)
    return reasons


def _draws_nothing(loader: DataLoader[Any]) -> bool:
    """Return whether it is known that no random numbers are drawn to make a batch."""
    collates = loader.collate_fn in (default_collate, default_convert)
    return collates and _is_plain(loader.dataset)


def _is_plain(dataset: Any) -> bool:
    if type(dataset) is ArrayDataset:
        return dataset.augmentation is None and dataset.transform is None
    if type(dataset) is Subset:
        return _is_plain(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_is_plain, dataset.datasets))
    return type(dataset) in _PLAIN_DATA


def _whole(dataset: Any) -> Any:
    """Return what a dataset is a part of, or itself."""
    return _whole(dataset.dataset) if type(dataset) is Subset else dataset


def _with_leaves(given: Any, name: str, leaves: Mapping[str, Any]) -> Any:
    """Return `given` with its leaves replaced by those of the same name; itself if none differs."""
    if isinstance(given, CombinedLoader):
        found = {id(loader): own_name for own_name, loader in each_loader(name, given)}
        given.flattened = [leaves.get(found.get(id(each), ""), each) for each in given.flattened]
        return given
    if isinstance(given, Mapping):
        items = {key: _with_leaves(each, f"{name}[{key!r}]", leaves) for key, each in given.items()}
        return items if any(items[key] is not given[key] for key in items) else given
    if isinstance(given, (list, tuple)):
        parts = [_with_leaves(each, f"{name}[{i}]", leaves) for i, each in enumerate(given)]
        is_same = all(mine is other for mine, other in zip(parts, given, strict=True))
        return given if is_same else parts
    return leaves.get(name, given)


class _Resumed:
    """A sequence of batches that begins where training stands; else it is that sequence."""

    def __init__(self, batches: Sequence[Any], position: Position, cycles: bool) -> None:
        self.batches = batches
        self.position = position
        self.cycles = cycles
        self.epoch: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return self._from(self.position.epoch, self.position.batch)

    def _from(self, epoch: int, batch: int) -> Iterator[Any]:
        # What is gone through again within an epoch begins at its start.
        start = batch if self.epoch != epoch else 0
        self.epoch = epoch
        if self.cycles:
            start %= len(self.batches)
        for index in range(start, len(self.batches)):
            yield self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]


class _Fitted(Dataset[Any]):
    """A dataset that seeds the generators, and names the sample that fails; else it is `dataset`.

    Args:
        dataset: The dataset of the user.
        bits: What the seeds are derived from, besides the batch and the place in it; None if no
            random numbers are drawn.
        by_index: Whether batches come without a stamp, and are seeded by their first index.
        desk: Where it is told what is being made.
    """

    def __init__(self, dataset: Dataset[Any], bits: int | None, by_index: bool, desk: Desk) -> None:
        # Not by assignment, which sets attributes of the dataset.
        vars(self).update(dataset=dataset, bits=bits, by_index=by_index, desk=desk, latest=None)
        vars(self).update(in_batches=hasattr(dataset, "__getitems__"))

    def __getitem__(self, index: Any) -> Any:
        seed = self._seed_for(index)
        if seed is not None:
            seed_generators(seed)
        return self._sample(index.index if isinstance(index, StampedIndex) else index)

    def __getitems__(self, indices: list[Any]) -> Any:
        seed = self._seed_for(indices)
        given = indices.given if isinstance(indices, StampedBatch) else indices
        self.__dict__["latest"] = given
        if isinstance(indices, StampedBatch):
            self.desk.take(indices.stamp.batch)
        # What this seeds in the process that trains is seeded again before the batch is used.
        if seed is not None:
            seed_generators(seed)
        return self._batch(given) if self.in_batches else self._samples(given)

    def _seed_for(self, request: Any) -> int | None:
        if self.bits is None:
            return None
        if isinstance(request, StampedBatch | StampedIndex):
            return derived(self.bits, *request.stamp)
        first = request[0] if isinstance(request, list) else request
        return derived(self.bits, first) if self.by_index and isinstance(first, int) else None

    def _samples(self, indices: Iterable[Any]) -> list[Any]:
        dataset, next_sample, samples = self.dataset, self.desk.next_sample, []
        try:
            for index in indices:
                next_sample()
                samples.append(dataset[index])
        except Exception as error:
            self._add_note(error, f"sample {index}")
            raise
        return samples

    def _sample(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            self._add_note(error, f"sample {index}")
            raise

    def _batch(self, indices: Any) -> Any:
        try:
            return self.dataset.__getitems__(indices)
        except Exception as error:
            failing = [index for index in indices if not self._can_fetch(index)]
            if failing:
                self._add_note(error, f"sample {failing[0]}")
            raise

    def _can_fetch(self, index: Any) -> bool:
        try:
            self.dataset[index]
        except Exception:
            return False
        return True

    def _add_note(self, error: Exception, samples: str) -> None:
        note = f"{samples} of {type(self.dataset).__name__}"
        # Datasets of our own have said it already.
        if not any(note in given for given in getattr(error, "__notes__", ())):
            error.add_note(f"in {note}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["dataset"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A worker_init_fn opens files for the dataset of `get_worker_info()`, which is this one.
        setattr(self.dataset, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.dataset)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Fitted, (self.dataset, self.bits, self.by_index, self.desk)


class _Collating:
    """A collate function that says which samples do not go together."""

    def __init__(self, collate: Callable[[Any], Any], dataset: _Fitted) -> None:
        self.collate = collate
        self.dataset = dataset

    def __call__(self, samples: Any) -> Any:
        try:
            return self.collate(samples)
        except Exception as error:
            indices = vars(self.dataset)["latest"]
            if not (isinstance(samples, list) and indices and len(samples) == len(indices)):
                raise
            misfit = _misfit(samples, list(indices))
            if self.collate in (default_collate, default_convert):
                raise LoaderError(f"samples make no batch: {misfit}", UNALIKE) from error
            error.add_note(misfit)
            raise


def _misfit(samples: list[Any], indices: list[Any]) -> str:
    """Return which of `samples` differs from most of the others, and in what."""
    forms = [dict(_form(sample, "")) for sample in samples]
    for part in dict.fromkeys(part for form in forms for part in form):
        values = [form.get(part, "is missing") for form in forms]
        usual, _ = Counter(values).most_common(1)[0]
        for index, value in zip(indices, values, strict=True):
            if value != usual:
                other = indices[values.index(usual)]
                return f"sample {index} {value}{part}, sample {other} {usual}{part}"
    return f"the batch has the samples {listed(indices, _NAMED_SAMPLES)}"


def _form(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield what has to be the same in all samples of a batch, by the place within a sample."""
    where = f" at {place}" if place else ""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _form(item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield where, f"has {len(value)} parts"
        for index, item in enumerate(value):
            yield from _form(item, f"{place}[{index}]")
    elif isinstance(value, (Tensor, np.ndarray)):
        yield where, f"has shape {tuple(value.shape)}"
        yield f"{where} (type)", f"has {value.dtype}"
    else:
        yield where, f"is a {type(value).__name__}"
