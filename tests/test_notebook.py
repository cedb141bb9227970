"""An experiment at hand, as in a notebook; and the notebook of the documentation."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import pytorch_lightning as pl
import torch

import torch_lab
from conftest import CONFIG, Lab
from notebooks import ROOT, Executed, copied_project, executed, read_outputs
from torch_lab.callbacks.cell import CellLine
from torch_lab.errors import CheckpointError, HparamsError, ScriptError
from torch_lab.notebook import LoadedExperiment
from torch_lab.runs import Run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]

PAGE = "docs/how-to/notebook.ipynb"
NUMBER = re.compile(r"\d+(\.\d+)?")
HELPED = CONFIG.replace("import torch\n", "import torch\nimport helper\n", 1)


def trained(experiment: LoadedExperiment) -> Run:
    return experiment.train(tracking="offline")


def weights(run: Run) -> torch.Tensor:
    checkpoint = torch.load(run.checkpoint("last"), weights_only=True)
    weight: torch.Tensor = checkpoint["state_dict"]["weight"]
    return weight


# The page.


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project for the page to be run in."""
    return copied_project(tmp_path_factory.mktemp("notebook") / "torch-lab")


@pytest.fixture(scope="module")
def page(project: Path) -> Executed:
    """Return the page, after its cells have run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("CLEARML_", "TRAINS_"))]:
            patch.delenv(name)
        patch.setenv("CLEARML_CONFIG_FILE", str(project / "none.conf"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("TORCH_LAB_ROOT", raising=False)
        return executed(project / PAGE)


def test_the_page_shows_what_its_cells_put_out(page: Executed) -> None:
    """Every cell runs, and prints and returns what the page says; numbers depend on the machine.

    `python tests/notebooks.py docs/how-to/notebook.ipynb` writes it into the page.
    """
    shown = nbformat.read(ROOT / PAGE, as_version=4).cells
    for cell, ran in zip(shown, page.cells, strict=True):
        pair = ["".join(read_outputs(each)) for each in (cell, ran)]
        told, said = [NUMBER.sub("N", text).splitlines() for text in pair]
        assert said == told, cell.source


def test_a_notebook_has_a_live_line(page: Executed) -> None:
    """It is one display in a cell, told anew; streams get plain lines, one for each epoch."""
    kinds = [kind for kind, _ in page.displays]
    texts = [text for _, text in page.displays]
    assert kinds.count("display_data") <= 3  # Of the cells that fit, train and predict.
    assert any("epoch 1/1" in text and "steps/s" in text for text in texts)
    assert page.displays[-1] == ("update_display_data", "")
    stderr = page.streams("stderr")
    assert "\r" not in stderr and "\x1b[2K" not in stderr
    assert len(re.findall(r"^epoch 1/1  step 23 .* loss/train", stderr, re.MULTILINE)) == 2


def test_a_run_in_a_notebook_keeps_what_was_shown(page: Executed, project: Path) -> None:
    """Its `console.log` has the header and the closing table, which rich would show elsewhere."""
    run = Run.read(project / "data/artifacts/00_mnist_demo-hparams-v1")
    log = run.console_log.read_text()
    assert "run     00_mnist_demo-hparams-v1, offline" in log
    assert "completed in" in log and "epoch 1/1  step 23" in log
    assert [folder.name for folder in run.folder.parent.iterdir()] == [run.name]


def test_there_is_no_cell_outside_of_a_notebook() -> None:
    """A terminal and a pipe have lines of their own."""
    assert not CellLine().is_possible
    assert not pickle.loads(pickle.dumps(CellLine())).is_possible


# Loading.


def test_loading_is_light(lab: Lab) -> None:
    """`torch_lab.load` imports no torch, and finds a mistake without it."""
    code = (
        f"import sys, torch_lab\nfound = torch_lab.load({lab.path!r})\n"
        "print(found.hparams['trainer']['init'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'max_epochs': 2} False\n"


def test_an_experiment_says_how_it_was_loaded(lab: Lab) -> None:
    """Its `repr` is the call, and evaluates to the same."""
    lab.hparams("hparams", {"config": {"lr": 0.1}})
    found = torch_lab.load(lab.path, set={"config.lr": 0.5})
    assert repr(found) == (
        "torch_lab.load('toys/experiments/00_toy/hparams.py', set={'config.lr': 0.5})"
    )
    assert eval(repr(found)).hparams == found.hparams
    assert type(found.hparams) is dict and found.hparams["config"] == {"lr": 0.5}
    assert found.hparams["checkpoint"]["keep"] == 1  # With its defaults.


def test_keys_can_be_removed_and_a_wrong_one_is_refused(lab: Lab) -> None:
    """As on the command line; the `repr` tells of it as well."""
    lab.hparams("hparams", {"config": {"lr": 0.1, "warmup": 3}})
    found = torch_lab.load(lab.path, unset=["config.warmup"])
    assert found.hparams["config"] == {"lr": 0.1}
    assert repr(found).endswith("hparams.py', unset=['config.warmup'])")
    with pytest.raises(HparamsError, match=r"did you mean config\.lr"):
        torch_lab.load(lab.path, set={"config.rl": 1.0})


def test_packages_of_the_project_can_be_imported(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Those in its folder and in its `src`, wherever the notebook lies."""
    (lab.root / "src").mkdir()
    (lab.root / "src" / "of_source_folder.py").write_text("rate = 0.2")
    (lab.root / "of_root_folder.py").write_text("rate = 0.3")
    lab.write(
        "hparams.py",
        "import of_root_folder, of_source_folder\n"
        "hparams = {'config': {'lr': of_root_folder.rate + of_source_folder.rate}}",
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert torch_lab.load(lab.path).hparams["config"] == {"lr": 0.5}


# Building.


def test_what_is_built_trains_as_a_run_does_and_leaves_nothing(lab: Lab) -> None:
    """The same bits; no folder, no file."""
    experiment = torch_lab.load(lab.path)
    before = sorted(lab.root.rglob("*"))
    trainer, module, data = experiment.build()
    assert isinstance(module.model, torch.nn.Linear)
    trainer.fit(module, data)
    assert trainer.callback_metrics["loss/validate"] > 0
    trainer.validate(module, data, verbose=False)
    assert sorted(lab.root.rglob("*")) == before
    assert torch.equal(weights(trained(experiment)), module.model.weight)


def test_data_that_is_not_there_is_not_asked_for(lab: Lab) -> None:
    """Without validation data, the trainer fits without."""
    lab.config('        "val_dataloaders": loader(16, 2),\n', "")
    trainer, module, data = torch_lab.load(lab.path).build()
    with pytest.warns(UserWarning, match="no `val_dataloader`"):
        trainer.fit(module, data)
    assert trainer.global_step == 8 and "loss/validate" not in trainer.callback_metrics


def test_a_datamodule_is_handed_on(lab: Lab) -> None:
    """What `train_config` returns as a datamodule is the data."""
    lab.config(
        '        "train_dataloaders": loader(32, 1, shuffle=True),\n'
        '        "val_dataloaders": loader(16, 2),\n',
        '        "datamodule": Data(),\n',
    )
    with (lab.folder / "__main__.py").open("a") as file:
        file.write(
            "import pytorch_lightning as pl\n"
            "class Data(pl.LightningDataModule):\n"
            "    def train_dataloader(self):\n        return loader(32, 1, shuffle=True)\n"
        )
    trainer, module, data = torch_lab.load(lab.path, set={"trainer.init": {"max_steps": 3}}).build()
    assert type(data).__name__ == "Data"
    with pytest.warns(UserWarning, match="no `val_dataloader`"):
        trainer.fit(module, data)
    assert trainer.global_step == 3


def test_weights_that_the_hparams_name_are_loaded(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone; where they go on in full, a warning says that this does not."""
    run = trained(torch_lab.load(lab.path))
    start = {"checkpoint_task_id": run.name, "weights_only": True}
    lab.hparams("weights", {"checkpoint": start})
    _, module, _ = torch_lab.load(lab.folder / "weights.py").build()
    assert torch.equal(module.model.weight, weights(run))
    assert "its weights alone" not in caplog.text
    lab.hparams("on", {"checkpoint": {"checkpoint_task_id": run.name}})
    _, module, _ = torch_lab.load(lab.folder / "on.py").build()
    assert torch.equal(module.model.weight, weights(run))
    assert "its weights alone" in caplog.text
    lab.hparams("missing", {"checkpoint": {"checkpoint_task_id": "nothing"}})
    with pytest.raises(
        CheckpointError, match=r"missing\.py: checkpoint: there is no run 'nothing'"
    ):
        torch_lab.load(lab.folder / "missing.py").build()


def test_callbacks_that_want_a_logger_have_one(lab: Lab) -> None:
    """A monitor of the learning rate refuses to be without; nothing is written all the same."""
    monitor = pl.callbacks.LearningRateMonitor()
    trainer, module, data = torch_lab.load(
        lab.path, set={"trainer.init": {"max_steps": 1, "callbacks": [monitor]}}
    ).build()
    trainer.fit(module, data)
    assert monitor in trainer.callbacks and not (lab.root / "data").exists()


# Training, editing, loading again.


def test_it_trains_again_after_edits(lab: Lab) -> None:
    """Of the hparams script, of a sibling and of a module in a package beside it."""
    lab.write("__main__.py", HELPED.replace('.get("lr", 0.1)', '["lr"]'))
    lab.write("helper.py", "from package.inner import factor\nrate = 0.1 * factor")
    lab.write("package/__init__.py", "")
    lab.write("package/inner.py", "factor = 1")
    script = "import helper\nhparams = {'trainer': {'init': {'max_steps': 1}}, 'config': {'lr': "
    lab.write("hparams.py", f"{script}helper.rate * 1}}}}")
    experiment = torch_lab.load(lab.path)
    runs = [trained(experiment), trained(experiment)]
    lab.write("hparams.py", f"{script}helper.rate * 2}}}}")
    runs.append(trained(torch_lab.load(lab.path)))
    lab.write("helper.py", "from package.inner import factor\nrate = 0.2 * factor")
    runs.append(trained(torch_lab.load(lab.path)))
    lab.write("package/inner.py", "factor = 2")
    runs.append(trained(torch_lab.load(lab.path)))
    assert [run.hparams["config"]["lr"] for run in runs] == [0.1, 0.1, 0.2, 0.4, 0.8]
    assert [run.record.version for run in runs] == [1, 2, 3, 4, 5]
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(weights(runs[1]), weights(runs[2]))
    kept = "sources/toys/experiments/00_toy/helper.py"
    assert ["0.2" in (run.folder / kept).read_text() for run in runs] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("edited", ["hparams.py", "base.py", "helper.py", "late.py"])
def test_an_edit_after_loading_is_refused(lab: Lab, edited: str) -> None:
    """The record would have other scripts than those that ran; those of the config script too."""
    lab.write("__main__.py", HELPED.replace("import helper", "import late"))
    lab.write("late.py", "")
    lab.write("helper.py", "rate = 0.1")
    lab.write("base.py", "import helper\nhparams = {'config': {'lr': helper.rate}}")
    lab.write(
        "hparams.py",
        "from torch_lab.utils import import_script_as_module\n"
        "hparams = import_script_as_module('base.py').hparams",
    )
    experiment = torch_lab.load(lab.path)
    experiment.build()
    lab.write(edited, (lab.folder / edited).read_text() + "\n")
    with pytest.raises(ScriptError, match=f"00_toy/{edited} has changed since") as raised:
        experiment.build()
    assert str(raised.value.hint).endswith(f"experiment = {experiment!r}")
    torch_lab.load(lab.path).build()


def test_an_edit_of_the_config_script_is_seen_at_once(lab: Lab) -> None:
    """It runs whenever the parts are made."""
    experiment = torch_lab.load(lab.path)
    assert experiment.build()[1].model.bias is not None
    lab.config(
        "torch.nn.Linear(4, 2),\n        torch", "torch.nn.Linear(4, 2, bias=False),\n        torch"
    )
    assert experiment.build()[1].model.bias is None


def test_a_changed_dictionary_is_refused(lab: Lab) -> None:
    """A change would be in no script; the error shows how to load with it."""
    lab.hparams("hparams", {"config": {"lr": 0.1, "n": 1, "list": [1]}})
    experiment = torch_lab.load(lab.path, set={"config.n": 2})
    experiment.hparams["config"]["lr"] = 0.5
    experiment.hparams["config"]["list"].append(2)
    with pytest.raises(HparamsError, match=r"changed \(config\.lr, config\.list\)") as raised:
        experiment.train()
    hint = str(raised.value.hint)
    assert "set={'config.n': 2, 'config.lr': 0.5, 'config.list': [1, 2]}" in hint
    again = eval(hint.removeprefix("load it so: "))
    assert again.hparams == experiment.hparams


def test_it_predicts(lab: Lab) -> None:
    """`infer` hands its words on, and returns what came out."""
    found = torch_lab.load(lab.path).infer("a", "b", return_predictions=True)
    assert found.predictions is not None and len(found.predictions) == 2
    assert "arguments: ('a', 'b')" in lab.capsys.readouterr().out
