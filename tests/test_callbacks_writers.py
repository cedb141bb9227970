"""What the prediction writers leave on the disk."""

from __future__ import annotations

import csv
import json
import pickle
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torch_lab.callbacks import CsvWriter, JsonLinesWriter, NpzWriter, PredictionWriter
from torch_lab.errors import TorchLabError, UserError
from torch_lab.modules import LabModule

FORMATS = [CsvWriter, JsonLinesWriter, NpzWriter]


class Echo(pl.LightningModule):
    """Predicts what the batches are."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch


class Samples:
    """Samples 0, 1, ... as `LabModule` predicts them, in batches of two."""

    def __init__(self, size: int = 5) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Any]:
        md = {
            "idx": i + 10,
            "y": i % 2,
            "name": f'n "{i}",\nü',
            "box": torch.full((2,), float(i)),
            "site": {"id": i * 100},
        }
        scores = torch.tensor([i / 10, i + 0.5])
        return {"y_pred": scores, "out": scores * 2, "md": md}


def predict(
    writer: PredictionWriter,
    *datasets: Any,
    module: pl.LightningModule | None = None,
    **kwargs: Any,
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[writer],
        **kwargs,
    )
    loaders = [
        data if isinstance(data, DataLoader) else DataLoader(data, batch_size=2)
        for data in datasets
    ]
    trainer.predict(
        module or Echo(), loaders[0] if len(loaders) == 1 else loaders, return_predictions=False
    )


def batches(*values: Any) -> DataLoader[Any]:
    """Return a loader of ready batches, of which Lightning knows no indices."""
    return DataLoader(list(values), batch_size=None)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def objects(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


pytestmark = [
    pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices"),
    pytest.mark.filterwarnings("ignore:predict returned None"),
]


def test_csv_has_idx_scalars_and_out(tmp_path: Path) -> None:
    """By default: idx, metadata with one value per sample, and `out`, a column per number."""
    predict(CsvWriter(tmp_path / "a" / "p.csv"), Samples(3))
    assert rows(tmp_path / "a" / "p.csv") == [
        ["idx", "y", "name", "site.id", "out_0", "out_1"],
        ["10", "0", 'n "0",\nü', "0", "0.0", "1.0"],
        ["11", "1", 'n "1",\nü', "100", "0.2", "3.0"],
        ["12", "0", 'n "2",\nü', "200", "0.4", "5.0"],
    ]


def test_numbers_are_written_as_the_csv_module_writes_them(tmp_path: Path) -> None:
    """Though they are written without it: extremes, NaN, True, and rows with a text among them."""
    odd = [0.1, -0.0, 1e-5, 1e16, 1e22, float("nan"), float("-inf"), 3.0, 1 / 3, 5e-324]
    numbers = {
        "out": torch.tensor(odd, dtype=torch.float64),
        "half": torch.tensor(odd, dtype=torch.float16),
        "pair": torch.tensor([odd, odd], dtype=torch.float32).T,
        "whole": torch.arange(-5, 5),
        "is_odd": torch.arange(10) % 2 == 1,
        "none": torch.empty(10, 0),
    }
    names = [f"a{place}" for place in range(10)]
    predict(CsvWriter(tmp_path / "n.csv"), batches(numbers))
    predict(CsvWriter(tmp_path / "t.csv"), batches({**numbers, "name": names}))
    own, with_text = rows(tmp_path / "n.csv"), rows(tmp_path / "t.csv")
    assert own[0] == ["idx", "out", "half", "pair_0", "pair_1", "whole", "is_odd"]
    assert [row[:-1] for row in with_text] == own
    table = [[str(value) for value in numbers["out"].tolist()]]
    table.append([str(value) for value in numbers["half"].numpy()])
    table.append([str(value) for value in numbers["pair"][:, 0].numpy()])
    assert [row[1:4] for row in own[1:]] == [list(row) for row in zip(*table, strict=True)]
    assert [row[5:] for row in own[1:3]] == [["-5", "False"], ["-4", "True"]]


@pytest.mark.parametrize("writer", [CsvWriter, JsonLinesWriter])
def test_rows_take_no_memory_once_written(tmp_path: Path, writer: type[PredictionWriter]) -> None:
    """Ten times as many need no more at their peak: not for their texts, nor for their places."""
    peaks = []
    for size in (2_000, 4_000, 40_000):
        data = TensorDataset(torch.zeros(size, 1))
        tracemalloc.start()
        try:
            module = LabModule(torch.nn.Identity())
            predict(writer(tmp_path / "rows"), DataLoader(data, batch_size=100), module=module)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    _, few, many = peaks  # The first run of all imports and caches.
    assert many < few + 100_000


def test_json_lines_have_lists(tmp_path: Path) -> None:
    """The keys are those of CSV; several numbers per sample are one list."""
    predict(JsonLinesWriter(tmp_path / "p.jsonl"), Samples(3))
    assert objects(tmp_path / "p.jsonl")[1] == {
        "idx": 11, "y": 1, "name": 'n "1",\nü', "site.id": 100, "out": [0.2, 3.0],
    }  # fmt: skip


def test_npz_holds_everything_whole(tmp_path: Path) -> None:
    """All arrays of the prediction and its metadata, without pickled objects."""
    predict(NpzWriter(tmp_path / "p.npz"), Samples(3))
    with np.load(tmp_path / "p.npz") as arrays:
        assert set(arrays) == {"idx", "y", "name", "box", "site.id", "y_pred", "out"}
        assert arrays["idx"].tolist() == [10, 11, 12]
        assert arrays["box"].shape == (3, 2)
        assert arrays["name"][2] == 'n "2",\nü'
        np.testing.assert_array_equal(arrays["out"], arrays["y_pred"] * 2)


def test_columns_are_those_asked_for(tmp_path: Path) -> None:
    """`columns` chooses and orders, among them what is left out by default."""
    names = ["y_pred", "idx", "box"]
    predict(CsvWriter(tmp_path / "p.csv", names), Samples(2))
    predict(JsonLinesWriter(tmp_path / "p.jsonl", names), Samples(2))
    predict(NpzWriter(tmp_path / "p.npz", names), Samples(2))
    assert rows(tmp_path / "p.csv")[0] == ["y_pred_0", "y_pred_1", "idx", "box_0", "box_1"]
    assert objects(tmp_path / "p.jsonl")[1] == {"y_pred": [0.1, 1.5], "idx": 11, "box": [1.0, 1.0]}
    with np.load(tmp_path / "p.npz") as arrays:
        assert list(arrays) == names


@pytest.mark.parametrize(
    ("prediction", "table"),
    [
        (torch.tensor([[0.5], [1.5]]), [["idx", "out"], ["0", "0.5"], ["1", "1.5"]]),
        (np.array([3, 4]), [["idx", "out"], ["0", "3"], ["1", "4"]]),
        (torch.tensor(7), [["idx", "out"], ["0", "7"]]),
        (
            torch.arange(4).reshape(1, 2, 2),
            [["idx", "out_0_0", "out_0_1", "out_1_0", "out_1_1"], ["0", "0", "1", "2", "3"]],
        ),
        (
            {"idx": torch.tensor([5, 6]), "a": torch.tensor([True, False]), "b": 0.5, "c": None},
            [["idx", "a", "b"], ["5", "True", "0.5"], ["6", "False", "0.5"]],
        ),
        (
            {"out": torch.tensor([1, 2]), "y_pred": torch.tensor([3, 4]), "md": None},
            [["idx", "out"], ["0", "1"], ["1", "2"]],
        ),
        (
            {"y_pred": torch.tensor([0.5, 2.0], dtype=torch.bfloat16), "md": {"s": ["a", None]}},
            [["idx", "s", "y_pred"], ["0", "a", "0.5"], ["1", "", "2.0"]],
        ),
        (
            {"pair": [torch.tensor([1, 2]), torch.tensor([3, 4])]},
            [["idx", "pair_0", "pair_1"], ["0", "1", "3"], ["1", "2", "4"]],
        ),
    ],
    ids=["tensor", "array", "scalar", "matrix", "dict", "no md", "bf16 and None", "collated tuple"],
)
def test_any_tensors_serve(tmp_path: Path, prediction: Any, table: list[list[str]]) -> None:
    """A tensor or any dictionary of tensors is written, numbered when it has no idx."""
    predict(CsvWriter(tmp_path / "p.csv"), batches(prediction))
    assert rows(tmp_path / "p.csv") == table


def test_numbers_read_back_exactly(tmp_path: Path) -> None:
    """Text holds every bit of a number, and no digit more than needed."""
    single = torch.rand(50) ** 9
    double = torch.rand(50, dtype=torch.float64)
    prediction = {"single": single, "double": double, "half": single.half()}
    predict(CsvWriter(tmp_path / "p.csv"), batches(prediction))
    predict(JsonLinesWriter(tmp_path / "p.jsonl"), batches(prediction))
    _, *table = rows(tmp_path / "p.csv")
    lines = objects(tmp_path / "p.jsonl")
    for i in range(50):
        assert [np.float32(table[i][1]), float(table[i][2])] == [
            single[i].numpy(),
            double[i].item(),
        ]
        assert np.float32(lines[i]["single"]) == single[i].numpy()
        assert lines[i]["double"] == double[i].item()
        assert np.float16(lines[i]["half"]) == single[i].half().numpy()
        assert len(table[i][1]) <= 14


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    """NaN and infinity are not JSON; the other formats keep them."""
    values = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]])
    predict(JsonLinesWriter(tmp_path / "p.jsonl"), batches(values))
    predict(CsvWriter(tmp_path / "p.csv"), batches(values))
    assert [line["out"] for line in objects(tmp_path / "p.jsonl")] == [[1.0, None], [None, 2.0]]
    assert rows(tmp_path / "p.csv")[1:] == [["0", "1.0", "nan"], ["1", "inf", "2.0"]]


def test_the_place_in_the_dataset_stands_in_for_idx(tmp_path: Path) -> None:
    """Without idx in the metadata the index is the one that the sampler drew."""
    data = [torch.tensor(float(i)) for i in range(4)]
    predict(CsvWriter(tmp_path / "p.csv"), DataLoader(data, batch_size=3, sampler=[3, 1, 2, 0]))
    assert [row[0] for row in rows(tmp_path / "p.csv")[1:]] == ["3", "1", "2", "0"]
    predict(CsvWriter(tmp_path / "q.csv"), batches(torch.zeros(2), torch.zeros(3)))
    assert [row[0] for row in rows(tmp_path / "q.csv")[1:]] == ["0", "1", "2", "3", "4"]


def test_several_dataloaders_add_a_column(tmp_path: Path) -> None:
    """Rows say which dataloader they come from, and are numbered within it."""
    predict(CsvWriter(tmp_path / "p.csv"), batches(torch.zeros(2)), batches(torch.ones(1)))
    assert rows(tmp_path / "p.csv") == [
        ["dataloader", "idx", "out"],
        ["0", "0", "0.0"],
        ["0", "1", "0.0"],
        ["1", "0", "1.0"],
    ]


@pytest.mark.parametrize("writer", FORMATS)
def test_a_writer_serves_again(tmp_path: Path, writer: type[PredictionWriter]) -> None:
    """A second prediction replaces the file; a spawned process gets a working copy."""
    path = tmp_path / "p"
    first = pickle.loads(pickle.dumps(writer(path)))
    predict(first, Samples(5))
    predict(first, batches(torch.zeros(2)))
    second = path.read_bytes()
    predict(pickle.loads(pickle.dumps(first)), batches(torch.zeros(2)))
    if writer is not NpzWriter:  # An archive holds the time of day.
        assert path.read_bytes() == second
    assert files(tmp_path) == {"p"}


class Fails(Echo):
    """Fails in the second batch."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 1:
            raise RuntimeError("broken")
        return batch


@pytest.mark.parametrize("writer", FORMATS)
def test_a_failure_leaves_what_was_there(tmp_path: Path, writer: type[PredictionWriter]) -> None:
    """After an exception there is no part of a file, and an older file is as it was."""
    path = tmp_path / "p"
    with pytest.raises(RuntimeError, match="broken"):
        predict(writer(path), Samples(), module=Fails())
    assert files(tmp_path) == set()
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError, match="broken"):
        predict(writer(path), Samples(), module=Fails())
    assert path.read_text(encoding="utf-8") == "old"
    assert files(tmp_path) == {"p"}


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """The error is that of the disk, also when it comes with the last rows, and no part stays."""

    class Full(CsvWriter):
        def open(self, part: Path) -> None:
            super().open(part)
            self.close()
            super().open(Path("/dev/full"))

    with pytest.raises(OSError, match="No space left"):
        predict(Full(tmp_path / "p.csv"), Samples())
    assert files(tmp_path) == set()


@pytest.mark.parametrize("writer", FORMATS)
def test_nothing_predicted_leaves_nothing(tmp_path: Path, writer: type[PredictionWriter]) -> None:
    """No batches, no file; no samples, an empty one."""
    predict(writer(tmp_path / "p"), Samples(), limit_predict_batches=0)
    assert files(tmp_path) == set()

    class Nothing(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(())

    predict(writer(tmp_path / "p"), DataLoader(Nothing(), batch_size=None))
    assert files(tmp_path) == {"p"}


def test_other_loops_write_nothing(tmp_path: Path) -> None:
    """A writer among the callbacks of a training does not touch the disk."""

    class Trains(Echo):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[CsvWriter(tmp_path / "p.csv")],
    ).test(Trains(), batches(torch.zeros(1)), verbose=False)  # fmt: skip
    assert files(tmp_path) == set()


@pytest.mark.parametrize("writer", FORMATS)
def test_a_path_that_cannot_be_written_is_said_at_once(
    tmp_path: Path, writer: type[PredictionWriter]
) -> None:
    """The mistake is found before a batch is predicted."""

    class Never(Echo):
        def predict_step(self, *args: Any) -> Any:
            raise AssertionError("predicted")

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it is a directory"):
        predict(writer(tmp_path), Samples(), module=Never())
    with pytest.raises(UserError, match=r"cannot write predictions to .*file/p: "):
        predict(writer(tmp_path / "file" / "p"), Samples(), module=Never())
    with pytest.raises(UserError, match="File name too long"):
        predict(writer(tmp_path / ("p" * 250)), Samples(), module=Never())
    assert files(tmp_path) == {"file"}


@pytest.mark.parametrize(
    ("predictions", "columns", "message"),
    [
        ([None], None, "predict_step returned NoneType, which cannot be written"),
        (
            [torch.zeros(2, 3), torch.zeros(2, 4)],
            None,
            r"they were idx, out \(3,\); now they are idx, out \(4,\)",
        ),
        (
            [{"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(2)}],
            None,
            "they were idx, a; now they are idx, a, b",
        ),
        (
            [{"a": torch.zeros(2)}],
            ["idx", "aa", "b"],
            "the predictions have no 'aa' and no 'b'. They have: idx, a",
        ),
        (
            [{"out": torch.zeros(2), "w": torch.zeros(7)}],
            None,
            "the predictions' 'w' has 7 entries for 2 samples",
        ),
        ([{"a": [[1, 2], [3]]}], None, "the predictions' 'a' cannot be made a column"),
    ],
    ids=["None", "width", "names", "unknown", "length", "ragged"],
)
@pytest.mark.parametrize("writer", FORMATS)
def test_what_cannot_be_columns_is_said(
    tmp_path: Path,
    writer: type[PredictionWriter],
    predictions: list[Any],
    columns: Sequence[str] | None,
    message: str,
) -> None:
    """Predictions that do not fit end the run in words, and leave nothing."""

    class Given(Echo):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return predictions[batch_idx]

    with pytest.raises(TorchLabError, match=message):
        predict(writer(tmp_path / "p", columns), batches(*range(len(predictions))), module=Given())
    assert files(tmp_path) == set()


def test_npz_refuses_mixed_types(tmp_path: Path) -> None:
    """What NumPy could only pickle is found with the first batch."""
    with pytest.raises(TorchLabError, match="column 's' mixes types"):
        predict(NpzWriter(tmp_path / "p.npz"), batches({"s": ["a", None]}))


def test_columns_is_a_list() -> None:
    """A single string would be read as letters."""
    with pytest.raises(TypeError, match=r"\['out'\]"):
        CsvWriter("p.csv", "out")
