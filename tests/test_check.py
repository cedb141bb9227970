"""`torch-lab check` says what is wrong with a script before anything is trained."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from clearml_server import ClearMLServer
from conftest import CONFIG, Lab, Result
from torch_lab import cli
from torch_lab.datasets import ArrayDataset, BaseDataset
from torch_lab.overlap import NotComparableError, Overlap, overlap

ORDER = ["scripts", "keys", "config script", "components", "batch", "loss", "parameters"]
ORDER += ["checkpoints", "samples", "exact", "memory", "monitor"]
MODULE = CONFIG[CONFIG.index("TrainLabModule(\n") : CONFIG.index("    return {")]
DATA = CONFIG[CONFIG.index('        "train_dataloaders"') : CONFIG.index("    }\n")]
LIGHTNING = ("import torch\n", "import pytorch_lightning as pl\nimport torch\n")


def checked(lab: Lab, *words: str | Path) -> Result:
    """Run `torch-lab check`."""
    return lab._main(cli.check, "--offline", *words)


def record(lab: Lab, *words: str | Path) -> dict[str, Any]:
    """Return what `--json` tells; the exit code must agree with it."""
    result = checked(lab, "--json", *words)
    found = json.loads(result.out)
    assert result.code == (0 if found["ok"] else 1), result.err
    return found


def found_in(lab: Lab, *words: str | Path) -> dict[str, dict[str, Any]]:
    """Return what is found of one script, by check; what is worse counts for more."""
    (script,) = record(lab, *(words or (lab.path,)))["scripts"]
    severity = ["not checked", "ok", "warning", "not ok"]
    checks = sorted(script["checks"], key=lambda check: severity.index(check["verdict"]))
    return {check["check"]: check for check in checks}


def verdicts(lab: Lab, *words: str | Path) -> dict[str, str]:
    """Return the verdicts of one script, by check."""
    return {name: check["verdict"] for name, check in found_in(lab, *words).items()}


def configure(lab: Lab, *pairs: tuple[str, str]) -> None:
    """Write the config script with the second of each pair in the place of the first."""
    text = CONFIG
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    lab.write("__main__.py", text)


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


# One script.


def test_a_sound_script_is_ok_in_all_and_nothing_is_left(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check has a row that says ok, the exit code is 0, and no file was made anywhere."""
    temporary = lab.root / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = files_below(lab.root)
    result = checked(lab, lab.path)
    rows = [line.split() for line in result.out.splitlines()[3:] if line.strip()]
    assert [" ".join(row).split(" ok ")[0].removesuffix(" ok") for row in rows] == ORDER
    assert result.code == 0
    assert "loss" in result.out and "a guess among 2 classes has 0.6931" in result.out
    assert "none of 16 validation samples is among 32 training samples" in result.out
    assert files_below(lab.root) == before


MISTAKES: dict[str, tuple[str, str, str, list[str]]] = {
    "key": ("", "", "keys", ["hparams has the unknown key 'trianer'", "did you mean trainer?"]),
    "raises": (
        'hparams["config"].get("lr", 0.1)',
        'hparams["config"]["lr"]',
        "components",
        ["toys/experiments/00_toy/__main__.py, line 21: KeyError: 'lr'"],
    ),
    "no train_config": (
        "def train_config",
        "def train_confi",
        "config script",
        ["defines no train_config; did you mean train_confi?"],
    ),
    "components": (
        '"val_dataloaders"',
        '"validation_dataloaders"',
        "components",
        ["returned the unknown key 'validation_dataloaders'"],
    ),
    "shapes": ("torch.nn.Linear(4, 2)", "torch.nn.Linear(5, 2)", "batch", ["mat1 and mat2"]),
    "labels": (
        "torch.nn.CrossEntropyLoss()",
        "lambda y_pred, y: y_pred.sum() * float('nan')",
        "batch",
        ["the training loss is NaN"],
    ),
    "in place": (
        "torch.nn.Linear(4, 2)",
        "torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Sigmoid(), torch.nn.ReLU(True))",
        "batch",
        ["modified by an inplace operation"],
    ),
    "validation alone": (
        "loader(16, 2),\n    }\n\n\ndef infer",
        "DataLoader([1, 2]),\n    }\n\n\ndef infer",
        "batch",
        ["a batch must be (x, md)"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_where_it_is(lab: Lab, name: str) -> None:
    """The check that finds it is not ok and says what it is, what needs it is not checked."""
    old, new, check, parts = MISTAKES[name]
    if old:
        lab.config(old, new)
    else:
        lab.hparams("hparams", {"trianer": {}})
    found = found_in(lab)
    assert found[check]["verdict"] == "not ok"
    assert all(part in found[check]["told"] for part in parts), found[check]["told"]
    assert found["the rest"]["verdict"] == "not checked"
    after = [name for name in ORDER if name not in ("scripts", "keys", *found)]
    assert found["the rest"]["told"] == ", ".join(after)


def test_an_error_of_several_lines_has_one_in_the_table(lab: Lab) -> None:
    """Such as that of a structure, which the config script wants and is looked at there."""
    raised = 'raise HparamsError("config: 2 mismatches\\n  one\\n  two", "a hint")\n'
    lab.write("__main__.py", f"from torch_lab.errors import HparamsError\n{raised}")
    found = found_in(lab)["structure"]
    assert (found["told"], found["details"]) == ("config: 2 mismatches", "  one\n  two\na hint")
    assert "  structure:\n      one\n      two\n    a hint\n" in checked(lab, lab.path).out


def test_the_traceback_begins_at_the_users_frame(lab: Lab) -> None:
    """Below the table stands the traceback of an error in train_config, without our frames."""
    lab.config('hparams["config"].get("lr", 0.1)', 'hparams["config"]["lr"]')
    result = checked(lab, lab.path)
    assert result.code == 1
    assert "Traceback" in result.out and "KeyError: 'lr'" in result.out
    assert "torch_lab" not in result.out.partition("Traceback")[2]


INIT: dict[str, tuple[dict[str, Any], str, str]] = {
    "accelerator": ({"accelerator": "gpus"}, "components", "did you mean gpu?"),
    "strategy": ({"strategy": "dpp"}, "components", "did you mean ddp?"),
    "gradients": ({"gradient_clip_algorithm": "x"}, "components", "gradient_clip_algorithm"),
    "precision": ({"precision": "17"}, "batch", "17"),
    "interval": ({"val_check_interval": 100}, "batch", "`val_check_interval` (100) must be"),
    "no step": ({"max_epochs": 0}, "batch", "the training makes no step"),
}


@pytest.mark.parametrize("name", INIT)
def test_wrong_arguments_of_the_trainer_are_found(lab: Lab, name: str) -> None:
    """Also of those that this machine does not need, and of those that only a fit looks at."""
    init, check, part = INIT[name]
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 2, **init}}})
    found = found_in(lab)[check]
    assert (found["verdict"], part in found["told"]) == ("not ok", True), found


def test_a_script_for_other_machines_is_checked_on_a_cpu(lab: Lab) -> None:
    """Accelerator, devices, strategy and precision of a cluster pass, and reach train_config."""
    init = {"accelerator": "gpu", "devices": [0, 1], "num_nodes": 2, "strategy": "ddp"}
    init |= {"precision": "16-true", "accumulate_grad_batches": 4, "min_epochs": 2}
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 3, **init}}})
    told = 'assert len(hparams["trainer"]["init"]["devices"]) == 2\n    module = TrainLabModule('
    lab.config("module = TrainLabModule(", told)
    found = verdicts(lab)
    assert found == dict.fromkeys(ORDER, "ok")


def test_the_plan_of_the_run_is_the_real_one(lab: Lab) -> None:
    """A schedule that is made for all steps of the run sees all of them; one alone is made."""
    schedule = """functools.partial(torch.optim.SGD, lr=0.1),
        lambda optimizer: print("steps", module.trainer.estimated_stepping_batches)
        or torch.optim.lr_scheduler.StepLR(optimizer, 1),
    """
    optimizer = 'functools.partial(torch.optim.SGD, lr=hparams["config"].get("lr", 0.1)),'
    loss = "lambda y_pred, y: print('loss') or torch.nn.functional.cross_entropy(y_pred, y)"
    configure(lab, (optimizer, schedule), ("torch.nn.CrossEntropyLoss()", loss))
    result = checked(lab, lab.path)
    assert result.code == 0, result.out
    assert result.err.splitlines() == ["steps 8", "loss", "loss"]  # Of training and validation.


def test_a_monitor_that_nothing_logs_is_found(lab: Lab) -> None:
    """`config.monitor` is compared with what a validation logs; all else is checked too."""
    lab.hparams("hparams", {"config": {"monitor": "loss/valdate"}})
    found = found_in(lab)
    assert found["monitor"]["verdict"] == "not ok"
    assert "did you mean loss/validate?" in found["monitor"]["told"]
    assert "the rest" not in found


def test_parameters_without_a_gradient_are_named(lab: Lab) -> None:
    """A layer that is left out of the forward pass is a warning."""
    model = """
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)
    """
    lab.write("models.py", f"import torch\n{textwrap.dedent(model)}")
    configure(lab, ("        torch.nn.Linear(4, 2),", "        __import__('models').Model(),"))
    found = found_in(lab)["batch"]
    assert found["verdict"] == "warning"
    told = "no gradient comes to 2 parameters: model.unused.weight, model.unused.bias"
    assert found["told"] == told


def test_a_loss_far_above_a_guess_is_a_hint(lab: Lab) -> None:
    """Logits that are far too large are told, and no error."""
    lab.config("x = torch.randn(", "x = 1000 * torch.randn(")
    found = found_in(lab)["loss"]
    assert found["verdict"] == "warning"
    assert "a guess among 2 classes has 0.6931: are the inputs scaled" in found["told"]
    assert found["values"]["loss"] > 10


OWN_MODULE = """
import pytorch_lightning as pl
import torch


class Own(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        self.logger.experiment.add_scalar("own", 1.0, 0)

    def validation_step(self, batch, batch_idx):
        self.log("loss/validate", torch.tensor(1.0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)
"""


def test_a_module_without_a_loss_is_not_checked_for_it(lab: Lab) -> None:
    """A module that optimises by itself, and returns nothing, passes with an unknown loss."""
    lab.write("own.py", OWN_MODULE)
    configure(lab, (MODULE, "__import__('own').Own()\n"))
    found = found_in(lab)
    assert found["loss"]["verdict"] == "not checked"
    assert found["loss"]["told"] == "training_step returned None"
    assert found["batch"]["verdict"] == "ok"
    assert found["batch"]["told"].startswith("forward, backward and a step in ")
    assert found["memory"]["values"]["gradients"] == 4 * 10


def test_memory_is_that_of_a_batch(lab: Lab) -> None:
    """Parameters, gradients, Adam's moments and the kept activations are counted to the byte.

    The optimizer makes its step, though the run would wait for two more batches.
    """
    init = {"max_epochs": 1, "accumulate_grad_batches": 3}
    lab.hparams("hparams", {"trainer": {"init": init}})
    model = "torch.nn.Sequential(torch.nn.Linear(4, 100), torch.nn.ReLU(), torch.nn.Linear(100, 2))"
    configure(
        lab, ("        torch.nn.Linear(4, 2),", f"        {model},"), ("optim.SGD", "optim.Adam")
    )
    found = found_in(lab)
    sizes = found["memory"]["values"]
    count = 4 * 100 + 100 + 100 * 2 + 2
    assert found["parameters"]["values"] == {"parameters": count, "trained": count}
    assert (sizes["parameters"], sizes["gradients"]) == (4 * count, 4 * count)
    assert sizes["optimizer"] == 2 * 4 * count + 4 * 4  # And the step of each of four tensors.
    assert sizes["batch"] == 8 * 4 * 4 + 8 * 8
    # What the ReLU gives, the logarithms of the softmax, and the weight that they are summed by.
    assert 8 * 100 * 4 + 8 * 2 * 4 <= sizes["activations"] <= 8 * 100 * 4 + 8 * 2 * 4 + 8
    assert found["checkpoints"]["values"]["bytes"] == 3 * 4 * count + 4 * 4
    assert sizes["bytes"] == sum(size for name, size in sizes.items() if name != "bytes")


def test_what_cannot_be_measured_passes_all_the_same(lab: Lab) -> None:
    """torch.func does not go with hooks on what autograd keeps: the batch passes without them."""
    lab.config(
        "torch.nn.CrossEntropyLoss()",
        "lambda y_pred, y: torch.func.grad(lambda x: (x**3).sum())(y_pred).sum()",
    )
    found = found_in(lab)
    assert found["batch"]["verdict"] == "ok"
    assert "activations cannot be measured" in found["memory"]["told"]


def test_checkpoints_that_the_disk_has_no_room_for_are_found(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room for three of the four files at once is too small."""
    usage = namedtuple("usage", "total used free")
    for room, verdict in ((4 * 40, "ok"), (4 * 40 - 1, "not ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=room: usage(0, 0, free))
        found = found_in(lab)["checkpoints"]
        assert found["verdict"] == verdict
        assert found["values"] == {"bytes": 40, "files": 4, "free": room}


def test_samples_on_both_sides_are_found(lab: Lab) -> None:
    """Validation data that is training data is not ok; a sample or two of many are a warning."""
    validation = '"val_dataloaders": loader(16, 2)'
    configure(lab, (validation, '"val_dataloaders": loader(32, 1)'))
    found = found_in(lab)["samples"]
    assert found["verdict"] == "not ok"
    assert "32 of 32 validation samples are among 32 training samples" in found["told"]
    assert "val_dataloaders[" in found["told"]
    few = "torch.cat([loader(32, 1).dataset[3][0].reshape(1, 4), torch.randn(99, 4)])"
    few = f"DataLoader(TensorDataset({few}, torch.zeros(100).long()))"
    configure(lab, (validation, f'"val_dataloaders": {few}'))
    found = found_in(lab)["samples"]
    assert found["verdict"] == "warning", found
    assert "1 of 100 validation samples is among 32 training samples" in found["told"]
    assert "val_dataloaders[0] is train_dataloaders[3]" in found["told"]


@pytest.mark.parametrize("often", [1, 5])
def test_one_sample_on_both_sides_is_a_warning(lab: Lab, often: int) -> None:
    """Among ten validation samples too, and however often it is there, as a blank image is."""
    parts = f"[loader(32, 1).dataset[3][0].repeat({often}, 1), torch.randn({10 - often}, 4)]"
    ten = f"DataLoader(TensorDataset(torch.cat({parts}), torch.zeros(10).long()))"
    configure(lab, ('"val_dataloaders": loader(16, 2)', f'"val_dataloaders": {ten}'))
    found = found_in(lab)["samples"]
    assert f"{often} of 10 validation samples" in found["told"]
    assert found["verdict"] == "warning", found


def test_whether_the_run_is_exact_is_told(lab: Lab) -> None:
    """The reasons are those that the run itself would warn of; no worker process is started."""
    keywords = "shuffle=True, num_workers=2, in_order=False, persistent_workers=True"
    loss = """
    import multiprocessing

    import torch

    class Loss(torch.nn.CrossEntropyLoss):
        def forward(self, *arguments):
            assert multiprocessing.active_children() == []
            return super().forward(*arguments)
    """
    lab.write("losses.py", loss)
    own = "__import__('losses').Loss()"
    configure(lab, ("shuffle=True", keywords), ("torch.nn.CrossEntropyLoss()", own))
    found = found_in(lab)
    assert found["batch"]["verdict"] == "ok", found["batch"]
    assert found["exact"]["verdict"] == "warning"
    assert "with in_order=False, batches come in the order" in found["exact"]["told"]
    assert multiprocessing.active_children() == []


DATAMODULE = """class Data(pl.LightningDataModule):
    def setup(self, stage):
        self.made = loader(32, 1, shuffle=True), loader(16, 2), loader(16, 3)

    def train_dataloader(self):
        return self.made[0]

    def val_dataloader(self):
        return self.made[1]

    def test_dataloader(self):
        return self.made[2]

    def teardown(self, stage):
        del self.made


def train_config"""


def test_a_datamodule_is_looked_at_while_it_has_its_data(lab: Lab) -> None:
    """Samples are compared before it is torn down, and a batch of the test is made too."""
    data = '        "datamodule": Data(),\n'
    configure(lab, LIGHTNING, ("def train_config", DATAMODULE), (DATA, data))
    found = found_in(lab)
    assert {each["verdict"] for each in found.values()} == {"ok"}
    assert found["samples"]["values"]["training"] == 32
    assert "one of validation and test too" in found["batch"]["told"]


def test_callbacks_of_the_user_are_not_called(lab: Lab) -> None:
    """They might write something: of the run's parts they alone are left out."""
    callback = """class Called(pl.Callback):
    def on_train_batch_end(self, *arguments):
        raise AssertionError


def train_config"""
    given = ('"module": module,', '"module": module, "callbacks": [Called()],')
    configure(lab, LIGHTNING, ("def train_config", callback), given)
    assert set(verdicts(lab).values()) == {"ok"}


def test_a_checkpoint_of_a_run_is_missed_where_there_are_runs(lab: Lab) -> None:
    """With no run at all, as in CI, the rest is checked; with others, a wrong name is wrong."""
    section = {"checkpoint_task_id": "00_toy-hparms", "weights_only": True}
    lab.hparams("on", {"checkpoint": section})
    found = found_in(lab, lab.folder / "on.py")
    assert found["start"]["verdict"] == "warning"
    assert "there is no run '00_toy-hparms'" in found["start"]["told"]
    assert set(ORDER) - {"monitor"} <= set(found)
    lab.train(lab.path, "--offline")
    found = found_in(lab, lab.folder / "on.py")
    assert found["start"]["verdict"] == "not ok"
    assert "did you mean" in found["start"]["told"]
    lab.hparams("on", {"checkpoint": {**section, "checkpoint_task_id": "00_toy-hparams"}})
    found = found_in(lab, lab.folder / "on.py")
    assert found["start"]["told"] == "starts from the weights in last of 00_toy-hparams-v1"
    assert [run.name for run in lab.runs] == ["00_toy-hparams-v1"]


def test_a_checkpoint_that_holds_code_is_read_if_it_is_trusted(lab: Lab) -> None:
    """What `train --trust-checkpoint` reads is checked with the same flag, and not without it."""
    state = torch.nn.Linear(4, 2).state_dict()
    names = {name: f"model.{name}" for name in state}
    content = {"state_dict": {names[name]: state[name] for name in state}, "path": Path("x")}
    torch.save(content, lab.root / "code.ckpt")
    section = {"checkpoint_task_id": "code.ckpt", "weights_only": True}
    lab.hparams("on", {"checkpoint": section})
    found = found_in(lab, lab.folder / "on.py")["start"]
    assert found["verdict"] == "warning"
    assert "code.ckpt holds more than tensors and plain values" in found["told"]
    found = found_in(lab, lab.folder / "on.py", "--trust-checkpoint")["start"]
    assert found["verdict"] == "ok"
    assert found["told"].startswith("starts from the weights in")


def test_no_task_is_made(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ClearML server is asked nothing where nothing is wanted of it."""
    with ClearMLServer() as server:
        for name, value in server.environment(lab.root).items():
            monkeypatch.setenv(name, value)
        assert lab._main(cli.check, lab.path).code == 0
        assert server.state.requests == []


def test_what_torch_lab_warns_of_is_in_the_table(lab: Lab) -> None:
    """And what the script logs or prints goes to stderr, also with --json."""
    lab.write(
        "chatty.py",
        """
        import logging
        print("printed")
        logging.getLogger(__name__).warning("logged by the script")
        logging.getLogger("torch_lab.anything").warning("warned by torch_lab")
        hparams = {}
        """,
    )
    result = checked(lab, lab.folder / "chatty.py", "--no-batch", "--json")
    (script,) = json.loads(result.out)["scripts"]
    assert "printed" in result.err and "logged by the script" in result.err
    assert "warned by torch_lab" not in result.err
    told = [check["told"] for check in script["checks"] if check["verdict"] == "warning"]
    assert told == ["warned by torch_lab"]
    assert checked(lab, lab.folder / "chatty.py", "--no-batch").code == 0


def test_torch_is_left_as_it_was(lab: Lab) -> None:
    """Settings of one script's trainer do not reach the next script."""
    lab.hparams("hparams", {"trainer": {"init": {"deterministic": True, "max_epochs": 1}}})
    dtype = "torch.set_default_dtype(torch.float64)\n    module = TrainLabModule("
    lab.config("module = TrainLabModule(", dtype)
    checked(lab, lab.path)
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()


# Several scripts.


def test_a_failing_script_does_not_stop_the_others(lab: Lab) -> None:
    """Each has a row with its first problem, in the order given; details stand below."""
    lab.write("breaks.py", "hparams = {}\nhparams['config']['a'] = 1\n")
    lab.write("leaves.py", "import sys\nhparams = {}\nsys.exit(3)\n")
    lab.write("syntax.py", "hparams = {,}\n")
    names = ["breaks.py", "hparams.py", "leaves.py", "nowhere.py", "syntax.py"]
    result = checked(lab, *(f"toys/experiments/00_toy/{name}" for name in names))
    assert result.code == 1
    rows = [line for line in result.out.splitlines() if line.startswith(" toys/")]
    assert [Path(row.split()[0]).name for row in rows] == names
    assert "not ok   scripts: toys/experiments/00_toy/breaks.py, line 2: KeyError" in rows[0]
    assert rows[1].split()[1:] == ["ok"]
    assert "leaves.py, line 3: SystemExit: 3" in rows[2]
    assert "not ok   scripts: no such file; toys/experiments/00_toy has: breaks.py" in rows[3]
    assert "scripts: line 1: invalid syntax" in rows[4]
    assert "    hparams['config']['a'] = 1" in result.out


def test_what_holds_no_hparams_is_skipped(lab: Lab) -> None:
    """Config scripts, packages and helpers that a pattern of the shell passes along are not run."""
    lab.write("__init__.py", "raise AssertionError\n")
    lab.write("helpers.py", "raise AssertionError\n\ndef made(hparams):\n    hparams = {}\n")
    lab.write("star.py", "from .layer import *\n")
    lab.write("layer.py", "hparams = {'trianer': 1}\n")
    found = record(lab, "--no-batch", *sorted(lab.folder.glob("*.py")))
    names = [Path(script["script"]).name for script in found["scripts"]]
    assert names == ["hparams.py", "layer.py", "star.py"]
    assert [script["ok"] for script in found["scripts"]] == [True, False, False]
    skipped = {Path(path).name for path in found["skipped"]}
    assert skipped == {"__init__.py", "__main__.py", "helpers.py"}
    result = checked(lab, lab.folder / "helpers.py")
    assert (result.code, "there is no hparams script among" in result.err) == (2, True)


def test_a_base_that_is_no_experiment_is_a_layer(lab: Lab) -> None:
    """A script without a config script is no mistake where others stand on it, and else it is."""
    lab.write("../bases/base.py", "hparams = {}\n")
    lab.write("../bases/other.py", "hparams = {}\n")
    lab.write(
        "layered.py",
        """
        from torch_lab.utils import import_script_as_module
        hparams = import_script_as_module("../bases/base.py").hparams
        """,
    )
    bases = lab.folder.parent / "bases"
    found = record(
        lab, "--no-batch", bases / "base.py", bases / "other.py", lab.folder / "layered.py"
    )
    told = {Path(each["script"]).name: each["checks"][-2]["told"] for each in found["scripts"]}
    assert list(told) == ["other.py", "layered.py"]
    assert [each["ok"] for each in found["scripts"]] == [False, True]
    assert "has no __main__.py beside other.py" in told["other.py"]
    assert [Path(path).name for path in found["skipped"]] == ["base.py"]


def test_scripts_do_not_see_what_others_have_changed(lab: Lab) -> None:
    """A dictionary that a script takes from a module and changes is itself again for the next."""
    lab.write("../../presets.py", "ADAM = {'lr': 1}\n")
    text = """
        from toys.presets import ADAM
        from siblings import SGD
        assert (ADAM, SGD) == ({"lr": 1}, {"lr": 2})
        ADAM["lr"] = SGD["lr"] = 3
        hparams = {"config": {"optimizer": ADAM}}
    """
    lab.write("siblings.py", "SGD = {'lr': 2}\n")
    scripts = [lab.write(f"{name}.py", text) for name in ("one", "two")]
    found = record(lab, "--no-batch", *scripts)
    assert found["ok"], found


def test_without_a_batch_nothing_is_made(lab: Lab) -> None:
    """`train_config` is not called, and torch is not imported unless a script does."""
    lab.write("__main__.py", "def train_config(hparams):\n    raise AssertionError\n")
    text = """
        import sys
        from torch_lab import cli
        code = cli.main(cli.torch_lab, "torch-lab", ["check", "--no-batch", *sys.argv[1:]])
        heavy = {"torch", "pytorch_lightning", "clearml", "numpy"} & set(sys.modules)
        sys.exit(code or len(heavy))
    """
    script = lab.write("../../run.py", text)
    command = [sys.executable, script, lab.path]
    done = subprocess.run(command, cwd=lab.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "config script   ok" in done.stdout and "components" not in done.stdout


def test_forty_scripts_take_less_than_a_second(lab: Lab) -> None:
    """A project of ten experiments, each of four scripts in layers, is looked at in no time."""
    keys = {f"key_{number}": {"a": number, "b": [1, 2, 3]} for number in range(20)}
    base = {"task": {"project_name": "toys"}, "trainer": {"init": {"max_epochs": 1}}}
    scripts = []
    for experiment in range(10):
        folder = f"../{experiment:02d}_many"
        lab.write(f"{folder}/__main__.py", "def train_config(hparams):\n    return {}\n")
        lab.write(f"{folder}/hparams.py", f"hparams = { ({**base, 'config': keys})!r}\n")
        names = ["hparams.py"]
        for layer in range(3):
            lines = [
                "from torch_lab.utils import import_script_as_module",
                f"hparams = import_script_as_module({names[-1]!r}).hparams",
                *(f"hparams['config']['key_{key}']['a'] = {layer}" for key in range(5)),
            ]
            lab.write(f"{folder}/layer_{layer}.py", "\n".join(lines))
            names.append(f"layer_{layer}.py")
        scripts += [lab.folder.parent / folder[3:] / name for name in names]
    assert len(scripts) == 40
    took = []
    for _ in range(2):  # The first one imports something.
        started = time.process_time()
        assert record(lab, "--no-batch", *scripts)["ok"]
        took.append(time.process_time() - started)
    assert min(took) < 1.0, took


# Samples.


def loader(x: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.as_tensor(x), torch.zeros(len(x))), **options)


def shared(training: Any, validation: Any, seconds: float = 5.0) -> tuple[int, int, int]:
    """Return how many samples are on both sides, and how many were compared."""
    found = overlap([("train", training)], [("validation", validation)], seconds)
    return found.count, found.validation, found.training


X = torch.arange(60.0).reshape(20, 3)


def test_only_what_a_sampler_yields_is_compared() -> None:
    """A dataset that two samplers share out has nothing in common with itself."""
    data = TensorDataset(X, torch.zeros(20))
    halves = [SubsetRandomSampler(part) for part in (range(10), range(10, 20))]
    assert shared(*(DataLoader(data, sampler=half) for half in halves)) == (0, 10, 10)
    overlapping = SubsetRandomSampler(range(5, 20))
    first, second = DataLoader(data, sampler=halves[0]), DataLoader(data, sampler=overlapping)
    assert shared(first, second) == (5, 15, 10)
    batches = BatchSampler(halves[0], 3, drop_last=False)
    assert shared(DataLoader(data, batch_sampler=batches), second) == (5, 15, 10)
    only_last = WeightedRandomSampler([0.0] * 19 + [1.0], 20)
    assert shared(DataLoader(data, sampler=only_last), second) == (1, 15, 1)
    assert shared(DataLoader(Subset(data, [3, 5])), second) == (1, 15, 2)


def test_augmentations_and_transforms_hide_nothing() -> None:
    """Datasets of ours are compared as they are before, whatever is made of them."""
    noisy = ArrayDataset(X, augmentation=lambda x: x + torch.randn(x.shape))
    scaled = ArrayDataset(X[:5].clone(), transform=lambda x: x / 2)
    assert shared(DataLoader(noisy), DataLoader(scaled)) == (5, 5, 20)
    both = ConcatDataset([ArrayDataset(X[:2], augmentation=lambda x: x * 0), Subset(noisy, [7])])
    assert shared(DataLoader(both), DataLoader(ArrayDataset(X))) == (3, 20, 3)
    single = Single(augmentation=lambda x: x + np.random.randn(3))
    assert shared(DataLoader(single), DataLoader(Single())) == (20, 20, 20)
    assert single.augmentation is not None


class Single(BaseDataset):
    """Samples one by one."""

    def __len__(self) -> int:
        return 20

    def get_raw_data(self, i: int) -> Any:
        return X[i].numpy()


class Noise(TensorDataset):
    """Samples that are others each time."""

    def __getitem__(self, index: Any) -> Any:
        return torch.randn(3)


class Stream(IterableDataset[Any]):
    """Samples without places."""

    def __iter__(self) -> Any:
        return iter(X)


@pytest.mark.parametrize(
    ("training", "why"),
    [
        (DataLoader(Noise(X)), "a sample of train is another one each time"),
        (DataLoader(Stream()), "train has a Stream, in which samples cannot be looked up"),
        ([X, X], "train has a list, in which samples cannot be looked up"),
        (DataLoader([object()], collate_fn=list), "a sample holds something of the type object"),
    ],
    ids=["random", "iterable", "list", "object"],
)
def test_what_cannot_be_compared_is_said(training: Any, why: str) -> None:
    """No overlap is claimed, or denied, of samples that cannot be told apart."""
    with pytest.raises(NotComparableError, match=why):
        overlap([("train", training)], [("validation", loader(X))])


def test_when_time_is_up_the_numbers_say_so() -> None:
    """What was compared of the same data is the same part of it, and its share is all of it."""
    many = torch.arange(3_000_000.0).reshape(-1, 3)
    found = overlap([("train", loader(many))], [("validation", loader(many))], seconds=0.0)
    assert (found.count, found.validation, found.training) == (1, 1, 1)
    assert found.share == 1.0
    assert str(found).endswith("; no more of the 1,000,000 and 1,000,000 were compared")
    started = time.monotonic()
    found = overlap([("train", loader(many))], [("validation", loader(many[:9]))], seconds=0.3)
    assert time.monotonic() - started < 3
    assert found.validation == 9 and 9 < found.training < 1_000_000
    assert found.share == min(1.0, found.count / 9 / (found.training / 1_000_000))


def test_a_share_is_credible_if_different_samples_coincide() -> None:
    """The share is reckoned up, and less sure the fewer different samples coincide."""
    one = Overlap(10, 1, validation=1000, training=5, of_validation=1000, of_training=1_000_000)
    assert (one.share, one.credible_share) == (1.0, 0.0)
    assert str(one).endswith("1,000 and 1,000,000 were compared")
    many = Overlap(64, 64, validation=1600, training=2400, of_validation=9000, of_training=48_000)
    assert many.share == pytest.approx(0.8)
    assert many.credible_share == pytest.approx(0.7)
    assert str(many).endswith("9,000 and 48,000 were compared: about 80 % of all")
    two = Overlap(2, 2, validation=2, training=2, of_validation=1000, of_training=1000)
    assert two.credible_share > 0.05


def test_labels_and_numbers_of_samples_do_not_count() -> None:
    """The same data under other labels, or at another index, is the same data."""
    first = DataLoader([{"x": row, "idx": i} for i, row in enumerate(X)])
    second = DataLoader([{"x": row, "idx": i} for i, row in enumerate(X.flip(0))])
    assert shared(first, second) == (20, 20, 20)
    other = DataLoader(TensorDataset(X, torch.ones(20)))
    assert shared(loader(X), other) == (20, 20, 20)
