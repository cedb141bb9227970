"""Bad input: one line and perhaps a hint, exit 2, no traceback, and nothing is created."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conftest import CONFIG, Lab, Result

BASE = {"trainer": {"init": {"max_epochs": 1}}}


def refused(lab: Lab, result: Result, *parts: str) -> None:
    """Assert that the command was refused with a line that has `parts`."""
    header, error, message = result.err.partition("error: ")
    assert result.code == 2, result.err
    assert error and "Traceback" not in result.err, result.err
    # Only the baseline validation can tell that nothing logs what is monitored.
    assert not header or "which nothing logs" in message, result.err
    assert all(line.startswith("  ") for line in message.splitlines()[1:]), result.err
    for part in parts:
        assert part in result.err
    assert result.out == ""
    assert not lab.runs


HPARAMS: dict[str, tuple[object, list[str]]] = {
    "not a dictionary": ([1], ["hparams must be a dictionary, not [1] (list)"]),
    "section None": ({"trainer": None}, ["trainer must be a dictionary, not None", "leave it out"]),
    "section a list": ({"config": []}, ["config must be a dictionary, not [] (list)"]),
    "section misspelt": ({"trianer": {}}, ["unknown key 'trianer'; did you mean trainer?"]),
    "section unknown": ({"xyz": {}}, ["unknown key 'xyz'", "it may have: task, checkpoint"]),
    "key of another type": ({"trainer": {3: {}}}, ["trainer has the key 3; keys are strings"]),
    "call misspelt": ({"trainer": {"fitt": {}}}, ["unknown key 'fitt'; did you mean fit?"]),
    "Trainer keyword": (
        {"trainer": {"init": {"max_epoch": 3}}},
        ["trainer.init has the unknown key 'max_epoch'; did you mean max_epochs?"],
    ),
    "fit keyword": ({"trainer": {"fit": {"ckpt": 1}}}, ["trainer.fit has the unknown key 'ckpt'"]),
    "validate keyword": (
        {"trainer": {"validate": {"verbos": 1}}},
        ["trainer.validate has the unknown key 'verbos'; did you mean verbose?"],
    ),
    "logger": (
        {"trainer": {"init": {"logger": True}}},
        ["trainer.init.logger is not yours to set"],
    ),
    "root": (
        {"trainer": {"init": {"default_root_dir": "."}}},
        ["trainer.init.default_root_dir is not yours to set", "TORCH_LAB_ROOT"],
    ),
    "ckpt_path": ({"trainer": {"fit": {"ckpt_path": "x"}}}, ['set hparams["checkpoint"] instead']),
    "loaders": ({"trainer": {"test": {"dataloaders": []}}}, ["what the config function returns"]),
    "task keyword": ({"task": {"project": "x"}}, ["task has the unknown key 'project'"]),
    "task name": ({"task": {"task_name": 3}}, ["task.task_name must be a string, not 3 (int)"]),
    "checkpoint key": (
        {"checkpoint": {"weight_only": True}},
        ["unknown key 'weight_only'; did you mean weights_only?"],
    ),
    "checkpoint type": (
        {"checkpoint": {"weights_only": 1}},
        ["checkpoint.weights_only must be True or False, not 1 (int)"],
    ),
    "seed negative": ({"seed": -1}, ["seed must be a whole number from 0"]),
    "seed a bool": ({"seed": True}, ["seed must be a whole number", "True (bool)"]),
    "monitor": ({"config": {"monitor": 3}}, ["config.monitor must be the name of a metric"]),
    "mode": ({"config": {"monitor_mode": "up"}}, ['config.monitor_mode must be "min" or "max"']),
    "bad Trainer value": (
        {"trainer": {"init": {"accelerator": "abacus"}}},
        ["trainer.init:", "abacus"],
    ),
    "no such run": (
        {"checkpoint": {"checkpoint_task_id": "01_nothing"}},
        ["there is no run '01_nothing'", "runs there: none"],
    ),
    "no such file": (
        {"checkpoint": {"checkpoint_task_id": "there/it.ckpt"}},
        ["there/it.ckpt: no such file"],
    ),
    "monitor that nothing logs": (
        {**BASE, "config": {"monitor": "loss/valdate"}},
        [
            "config.monitor is 'loss/valdate'",
            "did you mean loss/validate?",
            "validation logs: loss/va",
        ],
    ),
}


@pytest.mark.parametrize("name", HPARAMS)
def test_wrong_hparams_are_refused_by_key(lab: Lab, name: str) -> None:
    """A wrong value in the hparams is named with its file, its line and its key."""
    hparams, parts = HPARAMS[name]
    lab.hparams("wrong", hparams)
    refused(lab, lab.train(lab.folder / "wrong.py"), "wrong.py:", *parts)


PATHS: dict[str, tuple[Callable[[Lab], str], list[str]]] = {
    "misspelt": (
        lambda lab: str(lab.folder / "hparms.py"),
        ["no such file; did you mean hparams.py?"],
    ),
    "nothing near": (lambda lab: str(lab.folder / "zzz.py"), ["no such file; ", "has: hparams.py"]),
    "folder misspelt": (lambda lab: "toyz/x.py", ["toyz/x.py: no such file; did you mean toys?"]),
    "directory": (lambda lab: str(lab.folder), ["is a directory; its hparams scripts: hparams.py"]),
    "empty directory": (lambda lab: "data", ["is a directory; it has no hparams scripts"]),
    "config script": (lambda lab: str(lab.folder / "__main__.py"), ["is the config script"]),
    "not Python": (lambda lab: str(lab.write("notes.txt", "")), ["is not a Python script"]),
    "nothing defined": (
        lambda lab: str(lab.write("other.py", "settings = {}")),
        ["other.py defines no hparams", "it has: settings"],
    ),
    "syntax error": (
        lambda lab: str(lab.write("broken.py", "hparams = {\n    'a': 1,,\n}\n")),
        ["broken.py:2: invalid syntax", "'a': 1,,", "       ^"],
    ),
    "null byte": (
        lambda lab: str(lab.write("null.py", "hparams = {}\0")),
        ["null.py: source code string cannot contain null bytes"],
    ),
    "circle": (
        lambda lab: str(
            lab.write(
                "circle.py",
                "from torch_lab.utils import import_script_as_module\n"
                "import_script_as_module('circle.py')",
            )
        ),
        ["in a circle: ", "circle.py -> "],
    ),
    "missing layer": (
        lambda lab: str(
            lab.write(
                "layer.py",
                "from torch_lab.utils import import_script_as_module\n"
                "import_script_as_module('hparam.py')",
            )
        ),
        ["hparam.py: no such script (imported by ", "layer.py); did you mean hparams.py?"],
    ),
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("command", ["train", "infer"])
def test_wrong_scripts_are_refused_by_path(lab: Lab, command: str, name: str) -> None:
    """A script that cannot serve is named, with the nearest that can."""
    (lab.root / "data").mkdir()
    path, parts = PATHS[name]
    refused(lab, getattr(lab, command)(path(lab)), *parts)


def test_a_missing_config_script_is_named(lab: Lab) -> None:
    """Without `__main__.py` the folder is named."""
    (lab.folder / "__main__.py").unlink()
    refused(lab, lab.train(lab.path), "00_toy has no __main__.py beside hparams.py")


def test_a_config_function_that_is_none_is_named(lab: Lab) -> None:
    """A name that holds something else is said so."""
    lab.write("__main__.py", "train_config = 3")
    refused(lab, lab.train(lab.path), "train_config is no function: 3")


@pytest.mark.parametrize("command", ["train", "infer"])
def test_a_missing_config_function_is_named(lab: Lab, command: str) -> None:
    """A config script without the function is named, with what it has instead."""
    lab.write("__main__.py", CONFIG.replace(f"{command}_config", f"{command}_confg"))
    near = f"defines no {command}_config; did you mean {command}_confg?"
    refused(lab, getattr(lab, command)(lab.path), near)


def test_a_syntax_error_in_the_config_script_is_shown(lab: Lab) -> None:
    """File, line and caret are shown."""
    lab.config("return {", "return {{")
    refused(lab, lab.train(lab.path), "__main__.py:", "^")


RETURNED: dict[str, tuple[str, str, list[str]]] = {
    "no dictionary": (
        "return {",
        "return module\n    {",
        ["must return a dictionary, not TrainLab"],
    ),
    "unknown key": ('"val_dataloaders"', '"val_loaders"', ["'val_loaders'; did you mean val_data"]),
    "missing key": ('"module": module,', "", ["train_config returned no 'module'"]),
    "no module": ('"module": module', '"module": torch.nn.Linear(2, 2)', ["module as Linear;"]),
    "a class": ('"module": module', '"module": TrainLabModule', ["as TrainLabModule itself;"]),
    "no loaders": (
        '"train_dataloaders": loader(32, 1, shuffle=True)',
        '"train_dataloaders": 3',
        ["train_dataloaders as int; expected a DataLoader"],
    ),
    "callbacks": (
        '"module": module',
        '"callbacks": 3, "module": module',
        ["callbacks as int; expe"],
    ),
    "a callback": (
        '"module": module',
        '"callbacks": [print], "module": module',
        ["callbacks[0] as builtin_function_or_method; expected a Callback"],
    ),
    "a dataset": (
        '"train_dataloaders": loader(32, 1, shuffle=True)',
        '"train_dataloaders": loader(32, 1).dataset',
        ["train_dataloaders as TensorDataset; expected a DataLoader"],
    ),
    "numbers": (
        '"train_dataloaders": loader(32, 1, shuffle=True)',
        '"train_dataloaders": [1, 2]',
        ["train_dataloaders[0] as int; expected a DataLoader"],
    ),
    "a signature": ("train_config(hparams)", "train_config()", ["train_config(): too many"]),
    "a datamodule": (
        '"module": module',
        '"datamodule": module, "module": module',
        ["returned a datamodule and train_dataloaders; return one of them"],
    ),
    "empty": (
        "loader(16, 2),\n    }\n\n\ndef infer",
        "loader(0, 2),\n    }\n\n\ndef infer",
        ["empty dataset"],
    ),
    "empty shuffled": (
        "loader(32, 1, sh",
        "loader(0, 1, sh",
        ["__main__.py:", "the dataset is empty"],
    ),
    "no whole batch": (
        "loader(32, 1, shuffle=True)",
        "loader(7, 1, drop_last=True)",
        ["train_dataloaders without a single batch", "drop_last"],
    ),
}


HOOKS = {"train": "training_step", "val": "validation_step", "test": "test_step"}


@pytest.mark.parametrize("stage", HOOKS)
def test_a_missing_step_is_refused(lab: Lab, stage: str) -> None:
    """A module that cannot do with the loaders what they are for is refused."""
    steps = "".join(
        f"    def {step}(self, batch, batch_idx): pass\n"
        for key, step in HOOKS.items()
        if key != stage
    )
    loaders = ", ".join(f"{key}_dataloaders=DataLoader([1.0])" for key in HOOKS)
    lab.write(
        "__main__.py",
        "import pytorch_lightning as pl\nfrom torch.utils.data import DataLoader\n"
        f"class Net(pl.LightningModule):\n    def configure_optimizers(self): pass\n{steps}"
        f"def train_config(hparams): return dict(module=Net(), {loaders})\n",
    )
    refused(lab, lab.train(lab.path), f"returned a Net as module, which defines no {HOOKS[stage]}")


@pytest.mark.parametrize("name", RETURNED)
def test_wrong_components_are_refused(lab: Lab, name: str) -> None:
    """What `train_config` returns is checked before anything is created."""
    old, new, parts = RETURNED[name]
    lab.config(old, new)
    refused(lab, lab.train(lab.path), "__main__.py", *parts)


@pytest.mark.parametrize("size", ["0", "-2", "1.5", "-0.5", "many", "nan", "inf", "0.0"])
def test_other_dev_runs_are_refused(lab: Lab, size: str) -> None:
    """`--dev-run` takes a number of batches, a fraction, or -1."""
    refused(lab, lab.train(lab.path, "--dev-run", size), f"--dev-run {size}: expected")


OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown": (["--ofline"], "no such option '--ofline'. (Did you mean one of: '--offline'"),
    "jobs": (["--jobs", "0"], "'--jobs'"),
    "devices": (["--devices", "gpu"], "--devices gpu: expected indices of GPUs"),
    "dev run of several": (["--jobs", "2", "--dev-run", "1"], "--dev-run takes one path"),
    "debug of several": (["--jobs", "2", "--debug"], "--debug takes one path"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options_are_refused(lab: Lab, name: str) -> None:
    """A wrong option is named, and where to find the right ones."""
    options, part = OPTIONS[name]
    refused(lab, lab.train(lab.path, *options), part)


def test_no_path_is_refused(lab: Lab) -> None:
    """Without a path the usage is pointed at."""
    refused(lab, lab.train(), "missing argument 'PATH...'", "try: train --help")


def test_the_wrong_number_of_arguments_shows_the_signature(lab: Lab) -> None:
    """`infer` says what `infer_config` takes."""
    lab.config(
        "hparams, *arguments):\n    print",
        "hparams, run, output='x.csv'):\n    arguments = 0; print",
    )
    refused(
        lab,
        lab.infer(lab.path),
        "infer_config(hparams, run, output='x.csv'): missing a required argument: 'run'",
    )
    refused(lab, lab.infer(lab.path, "a", "b", "c"), "too many positional arguments", "a b c")


OTHERS = {
    "module": '"module": type("Net", (), {"__module__": "lightning.net"})()',
    "datamodule": '"datamodule": type("D", (type("B", (), {"__module__": "lightning.b"}),), {})()',
}


@pytest.mark.parametrize("key", OTHERS)
def test_objects_of_the_other_lightning_are_explained(lab: Lab, key: str) -> None:
    """Objects of the package `lightning` do not mix with those of `pytorch_lightning`."""
    lab.write(
        "__main__.py",
        CONFIG.replace('"train_dataloaders": loader(32, 1, shuffle=True),', "")
        .replace('"val_dataloaders": loader(16, 2),', "")
        .replace('"module": module', f'"module": module, {OTHERS[key]}'),
    )
    if key == "module":
        lab.config('"module": module', OTHERS[key])
    refused(lab, lab.train(lab.path), f"returned {key} as", "import pytorch_lightning instead")


def test_loaders_in_containers_are_looked_at(lab: Lab) -> None:
    """An empty one among several is named by its place."""
    loader = "loader(16, 2),\n    }\n\n\ndef infer"
    lab.config(loader, '{"a": loader(16, 2), "b": [loader(0, 2)]},\n    }\n\n\ndef infer')
    refused(lab, lab.train(lab.path), "val_dataloaders['b'][0] over an empty dataset")


def test_what_lightning_refuses_is_a_mistake_of_the_user(lab: Lab) -> None:
    """Settings that only a running Trainer sees are refused in a line, and the folder removed."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1, "val_check_interval": 99}}})
    result = lab.train(lab.path)
    assert result.code == 2
    assert "error: " in result.err
    assert "val_check_interval" in result.err
    assert "Traceback" not in result.err
    assert not lab.runs


NO_SOURCE = "checkpoint.weights_only is True, but there is no checkpoint.checkpoint_task_id"


@pytest.mark.parametrize("command", ["train", "infer"])
@pytest.mark.parametrize("source", [{}, {"checkpoint_task_id": None}, {"checkpoint_task_id": ""}])
def test_weights_of_no_checkpoint_are_refused(
    lab: Lab, command: str, source: dict[str, object]
) -> None:
    """It would train, or predict, with weights of chance, in silence."""
    lab.hparams("hparams", {**BASE, "checkpoint": {"weights_only": True, **source}})
    refused(lab, getattr(lab, command)(lab.path), "hparams.py:1: ", NO_SOURCE, "a run's name")
