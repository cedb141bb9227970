"""Samples that are in the validation data and in the training data alike."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from torch_lab.contents import contents
from torch_lab.datasets import ArrayDataset, BaseDataset
from torch_lab.loaders import given_to
from torch_lab.utils import length_of

__all__ = ["NotComparableError", "Overlap", "overlap"]

_MOST_SAMPLES: Final = 500_000
"""Of a loader: more could not be looked at in the time there is."""
_SHARE_OF_VALIDATION: Final = 0.4
"""Of the time; what it does not need goes to the training data."""


class NotComparableError(Exception):
    """The samples are not such that one can tell whether two of them are the same."""


@dataclass(frozen=True)
class Overlap:
    """How many of the validation samples are among the training samples."""

    count: int
    different: int
    """How many samples those are if the same one counts once, however often it is there."""
    validation: int
    """How many validation samples were looked at."""
    training: int
    """How many training samples were."""
    of_validation: int
    """How many there are."""
    of_training: int
    example: str = ""
    """Two that are the same."""

    @property
    def share(self) -> float:
        """The share of the validation samples that are training samples too, as far as is known."""
        looked_at = self.validation * self.training / self.of_training if self.of_training else 0
        return min(1.0, self.count / looked_at) if looked_at else 0.0

    @property
    def credible_share(self) -> float:
        """The share without its standard error; 0 where all that coincides is one and the same."""
        return self.share * (1 - 1 / math.sqrt(self.different)) if self.different else 0.0

    def __str__(self) -> str:
        count = f"{self.count:,}" if self.count else "none"
        verb = "are" if self.count > 1 else "is"
        told = f"{count} of {self.validation:,} validation samples {verb} among {self.training:,} "
        told += f"training samples{self.example}"
        if (self.validation, self.training) == (self.of_validation, self.of_training):
            return told
        told += f"; no more of the {self.of_validation:,} and {self.of_training:,} were compared"
        return f"{told}: about {100 * self.share:.3g} % of all" if self.different > 1 else told


def overlap(
    training: Iterable[tuple[str, object]],
    validation: Iterable[tuple[str, object]],
    seconds: float = 2.0,
) -> Overlap:
    """Compare samples for as long as there is time, and return how many coincide.

    What is compared is the data of a sample, `x` of `(x, y)` and `(x, md)`, by its bytes: without
    labels and metadata, and for datasets of torch_lab before augmentation and transform.

    Args:
        training: Loaders by their names.
        validation: Others.
        seconds: How long this may take.

    Raises:
        NotComparableError: Samples cannot be looked up, are others each time, or have no bytes.
    """
    first, second = ([_Samples.of(*each) for each in side] for side in (validation, training))
    for samples in (*first, *second):
        samples.check_is_comparable()
    begin = time.monotonic()
    known: dict[bytes, list[str]] = {}
    looked_at = 0
    for digest, place in _digests(first, begin + _SHARE_OF_VALIDATION * seconds):
        known.setdefault(digest, []).append(place)
        looked_at += 1
    compared, found = 0, dict[bytes, str]()
    for digest, place in _digests(second, begin + seconds):
        compared += 1
        if digest in known:
            found.setdefault(digest, place)
    example = next((f": {known[each][0]} is {found[each]}" for each in found), "")
    return Overlap(
        count=sum(len(known[digest]) for digest in found),
        different=len(found),
        validation=looked_at,
        training=compared,
        of_validation=sum(len(samples.order) for samples in first),
        of_training=sum(len(samples.order) for samples in second),
        example=example,
    )


@dataclass(frozen=True)
class _Samples:
    """The samples that a loader gives, as far as they are the user's data alone."""

    name: str
    dataset: Any
    order: Sequence[Any]
    """Their indices."""

    @classmethod
    def of(cls, name: str, loader: object) -> _Samples:
        dataset = given_to(loader, "dataset") if isinstance(loader, DataLoader) else loader
        length = length_of(dataset)
        has_places = hasattr(dataset, "__getitem__") and length is not None
        has_places = has_places and not isinstance(dataset, IterableDataset)
        if not isinstance(loader, DataLoader) or not has_places:
            kind = type(dataset).__name__
            raise NotComparableError(f"{name} has a {kind}, in which samples cannot be looked up")
        sampler = given_to(loader, "batch_sampler") or given_to(loader, "sampler")
        return cls(name, _bare(dataset), _indices(sampler, length or 0))

    def check_is_comparable(self) -> None:
        """Look at a sample twice: it must be the same both times."""
        for index in self.order[:1]:
            if _digest(self.dataset[index]) != _digest(self.dataset[index]):
                raise NotComparableError(f"a sample of {self.name} is another one each time")

    def digests(self, until: float) -> Iterator[tuple[bytes, str]]:
        """Yield digests and names, spread over all of the data, until the time is up."""
        count = min(len(self.order), _MOST_SAMPLES)
        spread = np.linspace(0, len(self.order) - 1, count).astype(np.int64)
        # In the same order for data of the same length: the same data is then seen to be the same,
        # however little of it there is time for.
        for place in np.random.default_rng(0).permutation(spread).tolist():
            index = self.order[place]
            yield _digest(self.dataset[index]), f"{self.name}[{index}]"
            if time.monotonic() >= until:
                return


def _digests(side: Sequence[_Samples], until: float) -> Iterator[tuple[bytes, str]]:
    for number, samples in enumerate(side):
        now = time.monotonic()
        yield from samples.digests(now + (until - now) / (len(side) - number))


def _indices(sampler: Any, length: int) -> Sequence[Any]:
    """Return the indices that `sampler` yields, all of those that it may yield if it draws."""
    if type(sampler) is BatchSampler:
        return _indices(sampler.sampler, length)
    if type(sampler) in (SequentialSampler, RandomSampler):
        return range(length)
    if isinstance(indices := getattr(sampler, "indices", None), Sequence):
        return indices
    # There are samplers that never end.
    yielded = itertools.islice(iter(sampler), length)
    parts = (each if isinstance(each, (list, tuple)) else [each] for each in yielded)
    return list(dict.fromkeys(itertools.chain.from_iterable(parts)))


def _bare(dataset: Any) -> Any:
    """Return `dataset` without what becomes of its samples, as far as that is known to us."""
    if isinstance(dataset, (ArrayDataset, BaseDataset)):
        bare = copy.copy(dataset)
        bare.augmentation = bare.transform = None
        return bare
    if type(dataset) is Subset:
        return Subset(_bare(dataset.dataset), dataset.indices)
    if type(dataset) is ConcatDataset:
        return ConcatDataset(map(_bare, dataset.datasets))
    return dataset


def _digest(sample: Any) -> bytes:
    """Return 16 bytes that stand for the data of a sample."""
    digest = hashlib.blake2b(digest_size=16)
    for title, data in contents(_data_of(sample)):
        if data is None:
            raise NotComparableError(f"a sample holds something of the type{title}")
        digest.update(f"{title}\0".encode())
        digest.update(data)
    return digest.digest()


def _data_of(sample: Any) -> Any:
    """Return a sample without its label and its number."""
    if isinstance(sample, tuple) and len(sample) == 2:
        return sample[0]
    if isinstance(sample, Mapping):
        return {key: value for key, value in sample.items() if key != "idx"}
    return sample
