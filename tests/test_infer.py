"""`infer`, from the path of a script and words to predictions."""

from __future__ import annotations

import json

import pytest
import torch

import torch_lab
from conftest import CONFIG, Lab
from torch_lab.errors import CheckpointError, ExitCode

WRITER = CONFIG.replace(
    '        "predict_dataloaders": loader(16, 2),\n',
    '        "predict_dataloaders": loader(16, 2),\n'
    '        "callbacks": [CsvWriter(arguments[0])],\n',
).replace("import functools", "import functools\nfrom torch_lab.callbacks import CsvWriter", 1)


def test_all_words_after_the_path_are_arguments(lab: Lab) -> None:
    """They reach `infer_config` as they are, options too; one `--` after the path is dropped."""
    result = lab.infer(lab.path, "run-v1", "--x", "-3", "--debug", "a b", "--", "1.0")
    assert result.code == 0, result.err
    assert "arguments: ('run-v1', '--x', '-3', '--debug', 'a b', '--', '1.0')\n" in result.out
    assert "arguments: ('--', '--x')\n" in lab.infer(lab.path, "--", "--", "--x").out
    assert "arguments: ()\n" in lab.infer(lab.path).out


def test_predictions_nobody_writes_are_warned_of(lab: Lab) -> None:
    """Without a writer the predictions would vanish, and without weights they mean nothing."""
    err = lab.infer(lab.path).err
    assert "warning: no prediction writer is among the callbacks" in err
    assert "warning: the weights are untrained" in err
    lab.write("__main__.py", WRITER)
    assert "no prediction writer" not in lab.infer(lab.path, "out.csv").err


def test_predictions_are_written_with_the_weights_of_a_run(lab: Lab) -> None:
    """`checkpoint` names a run; its weights predict, and the table says where the results are."""
    lab.write("__main__.py", WRITER)
    lab.train(lab.path)
    lab.hparams("trained", {"checkpoint": {"checkpoint_task_id": "00_toy-hparams"}})
    result = lab.infer(lab.folder / "trained.py", "results/out.csv")
    assert result.code == 0, result.err
    assert "weights  last of 00_toy-hparams-v1" in result.err
    assert "untrained" not in result.err
    assert result.out.splitlines()[-1] == "wrote  results/out.csv"
    assert len((lab.root / "results" / "out.csv").read_text().splitlines()) == 17


SOURCES = ["00_toy-hparams", "00_toy-hparams-v1", "id", "path", "relative path"]


@pytest.mark.parametrize("source", SOURCES)
def test_weights_are_found_by_name_id_and_path(lab: Lab, source: str) -> None:
    """A run's name, with its version or without; its id; the path of a file."""
    lab.train(lab.path)
    run = lab.run()
    wanted = {
        "id": run.record.id,
        "path": str(run.checkpoint("best")),
        "relative path": "data/artifacts/00_toy-hparams-v1/checkpoints/best.ckpt",
    }.get(source, source)
    checkpoint = {"checkpoint_task_id": wanted, "checkpoint_name": "best.ckpt"}
    lab.hparams("trained", {"checkpoint": checkpoint})
    result = lab.infer(lab.folder / "trained.py")
    assert result.code == 0, result.err
    assert "weights  best of 00_toy-hparams-v1" in result.err


def test_weights_loaded_by_infer_config_are_trained(lab: Lab) -> None:
    """The public helper loads them, and then no warning is due."""
    lab.train(lab.path)
    lab.config(
        '"module": LabModule(torch.nn.Linear(4, 2)),',
        '"module": LabModule(__import__("torch_lab").load_weights('
        "torch.nn.Linear(4, 2), arguments[0])),",
    )
    result = lab.infer(lab.path, "00_toy-hparams")
    assert "weights  last of 00_toy-hparams-v1" in result.err
    assert "untrained" not in result.err


def test_from_python_predictions_can_be_returned(lab: Lab) -> None:
    """`torch_lab.infer` returns them when asked, and the files that were written."""
    inference = torch_lab.infer(lab.path, "a", return_predictions=True)
    assert inference.predictions is not None
    assert [batch["out"].shape for batch in inference.predictions] == [(8, 2), (8, 2)]
    assert torch_lab.infer(lab.path).predictions is None
    lab.write("__main__.py", WRITER)
    assert [path.name for path in torch_lab.infer(lab.path, "out.csv").files] == ["out.csv"]


def test_trainer_keys_are_honoured(lab: Lab) -> None:
    """`trainer.init` and `trainer.predict` reach Lightning."""
    trainer = {"init": {"limit_predict_batches": 1}, "predict": {"return_predictions": True}}
    lab.hparams("hparams", {"trainer": trainer})
    predictions = torch_lab.infer(lab.path).predictions
    assert predictions is not None and len(predictions) == 1


def test_json_lists_the_files(lab: Lab) -> None:
    """`--json` prints them for machines."""
    lab.write("__main__.py", WRITER.replace('    print("arguments:", arguments)\n', ""))
    result = lab.infer("--json", lab.path, "out.csv")
    assert json.loads(result.out) == {"files": ["out.csv"]}


def test_an_inference_leaves_no_run(lab: Lab) -> None:
    """Nothing is reserved below `data/artifacts`."""
    lab.infer(lab.path)
    assert not lab.runs


BAD = {
    "wrong name": ({"checkpoint_task_id": "00_toy-hparms"}, "did you mean 00_toy-hparams"),
    "wrong checkpoint": (
        {"checkpoint_task_id": "00_toy-hparams", "checkpoint_name": "bset"},
        "has no checkpoint 'bset'; did you mean best?\n  it has: best, last",
    ),
    "unknown id": ({"checkpoint_task_id": "0" * 32}, "has the id or the ClearML task id 0000"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_checkpoint_that_is_not_there_is_refused(lab: Lab, name: str) -> None:
    """One line says which there are."""
    lab.train(lab.path)
    checkpoint, part = BAD[name]
    lab.hparams("trained", {"checkpoint": checkpoint})
    for result in (lab.infer(lab.folder / "trained.py"), lab.train(lab.folder / "trained.py")):
        assert result.code == ExitCode.USAGE
        assert part in result.err and "trained.py: checkpoint: " in result.err
    assert len(lab.runs) == 1


def test_weights_that_do_not_fit_are_refused(lab: Lab) -> None:
    """Names and shapes that differ are named."""
    lab.train(lab.path)
    with pytest.raises(CheckpointError, match=r"weight has the shape \(2, 4\), not \(3, 4\)"):
        torch_lab.load_weights(torch.nn.Linear(4, 3), "00_toy-hparams")
    with pytest.raises(
        CheckpointError, match=r"it lacks 0\.bias, 0\.weight; it has bias, weight, which"
    ):
        torch_lab.load_weights(torch.nn.Sequential(torch.nn.Linear(4, 2)), "00_toy-hparams")
