"""Predictions to files: CSV, JSON lines, NPZ."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import uuid
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, TextIO

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_lab.errors import TorchLabError, UserError
from torch_lab.files import beside, publish

__all__ = ["Columns", "CsvWriter", "JsonLinesWriter", "NpzWriter", "PredictionWriter"]

Columns = dict[str, NDArray[Any]]
"""Arrays by name, each with one entry per sample in its first dimension."""

BUFFER_BYTES = 1 << 20
_NUMBERS: Final = "biuf"
"""The kinds of arrays that hold numbers, or True and False."""


class PredictionWriter(pl.callbacks.BasePredictionWriter):
    """Writes what `predict_step` returns to one file, which is whole or not there.

    A prediction is a dictionary, as of `LabModule` (`y_pred`, `out`, `md`) or any other, or a
    tensor, which is taken as `out`. Its values and those of its `md` become columns with one entry
    per sample; a single value is repeated. There is always an `idx`: the metadata's, or else the
    sample's place in the dataset as far as Lightning knows it, or else its place in the order of
    arrival. Several dataloaders add a column `dataloader`.

    The file is written beside its place and moved there at the end; after an exception nothing is
    left. In distributed prediction each rank writes a part (all must share the folder), and rank
    zero merges them, ordered by dataloader and `idx`.

    A format is a subclass with `open`, `append`, `finish`, `close` and `merge`.

    Args:
        path: The file to write. Its folder is made; what was there is replaced.
        columns: What to write, in this order, by the names in the prediction or its metadata
            (`a.b` for `b` in a dictionary `a`). By default as the format says.

    Raises:
        UserError: Before predicting, when the file cannot be written.
        TorchLabError: When a prediction cannot be made into columns, lacks a column that was asked
            for, or has others than the batch before.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        super().__init__("batch")
        if isinstance(columns, str):
            raise TypeError(f"columns takes a list of names: [{columns!r}]")
        self.path = Path(path).expanduser()
        self.columns = None if columns is None else list(columns)
        self._run = ""
        self._part: Path | None = None
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._keys: list[NDArray[np.int64]] = []
        self._seen: dict[int, int] = {}

    @abstractmethod
    def open(self, part: Path) -> None:
        """Start writing to `part`."""

    @abstractmethod
    def append(self, columns: Columns) -> None:
        """Write a batch. Names and shapes of a sample's values are the same for all batches."""

    def finish(self) -> None:
        """Write what waits for the last batch, if anything does."""

    @abstractmethod
    def close(self) -> None:
        """Release the file that `open` opened, if one is open."""

    @abstractmethod
    def merge(self, parts: Sequence[Path], order: NDArray[np.int64], path: Path) -> None:
        """Write the rows of `parts` to `path`.

        Args:
            parts: Finished files of this format; those without a batch are as `open` left them.
            order: For each row of `path`, which part and which row of it, `(rows, 2)`.
            path: The file to write.
        """

    def default_columns(self, metadata: Columns, outputs: Columns) -> list[str]:
        """Return the names to write when the user chose none: all of them."""
        return [*metadata, *outputs]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        self._shapes, self._keys, self._seen = None, [], {}
        self._run = trainer.strategy.broadcast(uuid.uuid4().hex[:8])
        part = self._part_of(trainer.global_rank)
        if self.path.is_dir():
            raise UserError(f"cannot write predictions to {self.path}: it is a directory")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.open(part)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot write predictions to {self.path}: {reason}") from error
        self._part = part

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        metadata, outputs = _columns_of(prediction)
        size = _batch_size(metadata | outputs)
        places = self._places(trainer, batch_indices, dataloader_idx, size)
        idx = (metadata | outputs).get("idx", places)
        origin = {"dataloader": np.asarray(dataloader_idx), "idx": idx}
        if len(trainer.num_predict_batches) == 1:
            del origin["dataloader"]
        metadata = origin | metadata
        names = self.columns or list(dict.fromkeys(self.default_columns(metadata, outputs)))
        columns = _chosen(metadata | outputs, names, size)
        self._check_shapes(columns)
        _forget_indices(trainer, batch_idx, dataloader_idx)
        if trainer.world_size > 1:
            is_number = idx.shape == (size,) and np.issubdtype(idx.dtype, np.integer)
            self._remember(dataloader_idx, idx if is_number else places)
        self.append(columns)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._part is not None
        self.finish()
        self.close()
        if trainer.world_size == 1:
            publish(self._part, self.path)
        else:
            self._merge_ranks(trainer, self._part)
        self._part = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._discard()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        # On a full disk what is buffered cannot be written out.
        with contextlib.suppress(OSError):
            self.close()
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            _keys_of(self._part).unlink(missing_ok=True)
            self._part = None

    def _part_of(self, rank: int) -> Path:
        return beside(self.path, f"{self._run}.{rank}")

    def _places(
        self, trainer: pl.Trainer, known: Sequence[int] | None, dataloader: int, size: int
    ) -> NDArray[np.int64]:
        start = self._seen.get(dataloader, 0)
        self._seen[dataloader] = start + size
        if known and len(known) == size:
            return np.asarray(known)
        return np.arange(start, start + size) * trainer.world_size + trainer.global_rank

    def _remember(self, dataloader: int, idx: NDArray[Any]) -> None:
        self._keys.append(np.stack([np.full(len(idx), dataloader), idx], axis=1).astype(np.int64))

    def _check_shapes(self, columns: Columns) -> None:
        shapes = {name: column.shape[1:] for name, column in columns.items()}
        if self._shapes is None:
            self._shapes = shapes
        elif self._shapes != shapes:
            before, now = (
                ", ".join(f"{name} {shape}" if shape else name for name, shape in some.items())
                for some in (self._shapes, shapes)
            )
            raise TorchLabError(
                f"the columns of the predictions changed from one batch to the next: "
                f"they were {before}; now they are {now}",
                "Return the same values, of the same shape per sample, for every batch.",
            )

    def _merge_ranks(self, trainer: pl.Trainer, part: Path) -> None:
        keys = np.concatenate([np.empty((0, 2), np.int64), *self._keys])
        with _keys_of(part).open("wb") as file:
            np.save(file, keys)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._part_of(rank) for rank in range(trainer.world_size)]
            merged = beside(self.path, self._run)
            try:
                self.merge(parts, _order([np.load(_keys_of(part)) for part in parts]), merged)
                publish(merged, self.path)
            finally:
                for path in [merged, *parts, *map(_keys_of, parts)]:
                    path.unlink(missing_ok=True)
        trainer.strategy.barrier()


class _TextWriter(PredictionWriter):
    """Rows as text, in constant memory."""

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        super().__init__(path, columns)
        self._file: TextIO | None = None

    def default_columns(self, metadata: Columns, outputs: Columns) -> list[str]:
        scalars = [name for name, column in metadata.items() if column.ndim < 2]
        return scalars + [name for name in outputs if name != "y_pred" or "out" not in outputs]

    def open(self, part: Path) -> None:
        self._file = _open_text(part)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def merge(self, parts: Sequence[Path], order: NDArray[np.int64], path: Path) -> None:
        records = [self.records(part) for part in parts]
        with _open_text(path) as file:
            file.write(self.header(records))
            if _is_in_order(order):
                file.writelines(next(records[part]) for part, _ in order.tolist())
            else:
                rows = [list(lines) for lines in records]
                file.writelines(rows[part][row] for part, row in order.tolist())

    def header(self, records: Sequence[Iterator[str]]) -> str:
        """Take the header off `records`, one iterator per part, and return it."""
        return ""

    def records(self, part: Path) -> Iterator[str]:
        """Yield the rows of `part` as text."""
        with part.open(encoding="utf-8", newline="") as file:
            yield from file


class CsvWriter(_TextWriter):
    """Writes predictions as CSV with a header, in UTF-8.

    By default the columns are `idx`, the metadata with one value per sample (`y` among them), then
    `out`, or else all that the prediction has. Values with several numbers per sample become
    several columns, `out_0`, `out_1`, ... Numbers are written so that they read back exactly.
    """

    def open(self, part: Path) -> None:
        super().open(part)
        self._has_header = False

    def append(self, columns: Columns) -> None:
        assert self._file is not None
        columns = {name: column for name, column in columns.items() if 0 not in column.shape[1:]}
        rows = csv.writer(self._file, lineterminator="\n")
        if not self._has_header:
            rows.writerow(name for key in columns for name in _names(key, columns[key]))
            self._has_header = True
        if all(column.dtype.kind in _NUMBERS for column in columns.values()):
            # Nothing to be quoted: as text alone it takes a quarter of the time.
            texts = (map(",".join, _cells(column)) for column in columns.values())
            self._file.writelines(",".join(row) + "\n" for row in zip(*texts, strict=True))
        else:
            cells = map(_cells, columns.values())
            rows.writerows(itertools.chain(*row) for row in zip(*cells, strict=True))

    def header(self, records: Sequence[Iterator[str]]) -> str:
        headers = [header for part in records if (header := next(part, None)) is not None]
        if len(set(headers)) > 1:
            raise TorchLabError(f"ranks predicted different columns: {' / '.join(headers)}")
        return headers[0] if headers else ""

    def records(self, part: Path) -> Iterator[str]:
        record = ""
        for line in super().records(part):
            record += line
            # A line break between quotes does not end the row.
            if record.count('"') % 2 == 0:
                yield record
                record = ""


class JsonLinesWriter(_TextWriter):
    """Writes predictions as JSON lines: one object per sample, in UTF-8.

    By default the keys are those of `CsvWriter`; values with several numbers per sample are lists.
    NaN and infinity, which JSON does not know, become null.
    """

    def append(self, columns: Columns) -> None:
        assert self._file is not None
        rows = zip(*map(_json_values, columns.values()), strict=True)
        encode = json.JSONEncoder(ensure_ascii=False, default=str).encode
        self._file.writelines(encode(dict(zip(columns, row, strict=True))) + "\n" for row in rows)


class NpzWriter(PredictionWriter):
    """Writes predictions as one NumPy archive of whole arrays, `np.load(path)["out"]`.

    By default it holds all that the prediction and its metadata have. The arrays are kept in memory
    until the end, and hold no pickled objects.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        super().__init__(path, columns)
        self._file: BinaryIO | None = None
        self._batches: list[Columns] = []

    def open(self, part: Path) -> None:
        self._file = part.open("wb")

    def append(self, columns: Columns) -> None:
        for name, column in columns.items():
            if column.dtype.hasobject:
                raise TorchLabError(
                    f"column {name!r} mixes types, which an NPZ file cannot hold",
                    "Leave it out with `columns`, or write CSV or JSON lines.",
                )
        self._batches.append(columns)

    def finish(self) -> None:
        assert self._file is not None
        _write_npz(self._file, _concatenated(self._batches))

    def close(self) -> None:
        self._batches = []
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def merge(self, parts: Sequence[Path], order: NDArray[np.int64], path: Path) -> None:
        tables = [dict(np.load(part)) for part in parts]
        starts = np.cumsum([0] + [len(next(iter(table.values()), ())) for table in tables])
        rows = starts[order[:, 0]] + order[:, 1]
        whole = _concatenated([table for table in tables if table])
        with path.open("wb") as file:
            _write_npz(file, {name: column[rows] for name, column in whole.items()})


def _columns_of(prediction: Any) -> tuple[Columns, Columns]:
    """Return metadata and outputs of a batch, each value an array."""
    if isinstance(prediction, (Tensor, np.ndarray)):
        prediction = {"out": prediction}
    if not isinstance(prediction, Mapping):
        raise TorchLabError(
            f"predict_step returned {type(prediction).__name__}, which cannot be written",
            "Return a tensor, or a dictionary of tensors.",
        )
    metadata = prediction.get("md")
    outputs = {name: value for name, value in prediction.items() if name != "md"}
    return dict(_arrays(metadata or {})), dict(_arrays(outputs))


def _arrays(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _arrays(value, f"{name}.")
        elif value is not None:
            yield name, _array(name, value)


def _array(name: str, value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16; single precision holds its values exactly.
        array: NDArray[Any] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return array
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
        # The default collation turns tuples in the metadata into a list of columns.
        return _array(name, torch.stack(list(value), dim=-1))
    try:
        return np.asarray(value, dtype=object if _is_mixed(value) else None)
    except ValueError as error:
        raise TorchLabError(f"the predictions' {name!r} cannot be made a column: {error}") from None


def _is_mixed(value: Any) -> bool:
    # NumPy would write numbers and None among strings as strings.
    return isinstance(value, (list, tuple)) and len({type(item) for item in value}) > 1


def _batch_size(columns: Columns) -> int:
    ordered = [columns[name] for name in ("idx", "out") if name in columns] + [*columns.values()]
    return next((len(column) for column in ordered if column.ndim), 1)


def _chosen(columns: Columns, names: Sequence[str], size: int) -> Columns:
    """Return the columns of these names, each of this size."""
    if missing := [name for name in names if name not in columns]:
        raise TorchLabError(
            f"the predictions have no {' and no '.join(map(repr, missing))}. "
            f"They have: {', '.join(columns)}"
        )
    chosen = {name: columns[name] for name in names}
    for name, column in chosen.items():
        if column.ndim == 0:
            chosen[name] = np.broadcast_to(column, size)
        elif len(column) != size:
            raise TorchLabError(
                f"the predictions' {name!r} has {len(column)} entries for {size} samples",
                "Name the values that have one entry per sample: `columns=[...]`.",
            )
    return chosen


def _forget_indices(trainer: pl.Trainer, batch: int, dataloader: int) -> None:
    """Let go of a batch's indices, of which Lightning keeps a list of all to the end."""
    loaders = trainer.predict_loop._combined_loader
    if loaders is not None:
        sampler = getattr(loaders.flattened[dataloader], "batch_sampler", None)
        seen: list[Sequence[int]] = getattr(sampler, "seen_batch_indices", [])
        if batch < len(seen):
            seen[batch] = ()


def _keys_of(part: Path) -> Path:
    return part.with_suffix(".keys")


def _order(keys: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return part and row for each row of the merged file, given (dataloader, idx) of each part."""
    places = [
        np.stack([np.full(len(key), part), np.arange(len(key))], axis=1)
        for part, key in enumerate(keys)
    ]
    dataloader, idx = np.concatenate(keys).T
    ordered: NDArray[np.int64] = np.concatenate(places)[np.lexsort((idx, dataloader))]
    return ordered


def _is_in_order(order: NDArray[np.int64]) -> bool:
    """Tell whether the rows of each part are wanted one after the other."""
    parts, rows = order.T
    return all(bool((np.diff(rows[parts == part]) == 1).all()) for part in np.unique(parts))


def _open_text(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="", buffering=BUFFER_BYTES)


def _names(name: str, column: NDArray[Any]) -> list[str]:
    """Return the names of the table's columns for one value: one for each of a sample's numbers."""
    names = ["_".join(map(str, [name, *place])) for place in np.ndindex(*column.shape[1:])]
    return names if len(names) > 1 else [name] * len(names)


def _cells(column: NDArray[Any]) -> Iterator[Sequence[Any]]:
    """Yield for each sample what stands in the table's columns, numbers as their texts."""
    flat = column.reshape(len(column), -1)
    if flat.dtype.kind in _NUMBERS and flat.dtype != np.float64:
        # Of 32 bits the shortest text that is exact; as Python's floats they would have 17 digits.
        yield from flat.astype(str).tolist()
    elif flat.dtype == np.float64:
        yield from (list(map(str, row)) for row in flat.tolist())
    else:
        yield from flat.tolist()


def _json_values(column: NDArray[Any]) -> Any:
    """Return a value for each sample, as JSON knows them."""
    if not np.issubdtype(column.dtype, np.floating):
        return column.tolist()
    # By way of the shortest exact text, as in `_cells`.
    numbers = column if column.dtype == np.float64 else column.astype(str).astype(np.float64)
    bad = ~np.isfinite(numbers)
    if bad.any():
        numbers = numbers.astype(object)
        numbers[bad] = None
    return numbers.tolist()


def _concatenated(tables: Sequence[Columns]) -> Columns:
    names = list(tables[0]) if tables else []
    return {name: np.concatenate([table[name] for table in tables]) for name in names}


def _write_npz(file: BinaryIO, columns: Columns) -> None:
    # Like np.savez, which has no room for a column named "file".
    with zipfile.ZipFile(file, "w") as archive:
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, column, allow_pickle=False)
