"""Values that are set and removed for one time: `--set`, `--unset`, and the same from Python."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torch_lab
from clearml_server import ClearMLServer
from conftest import CONFIG, Lab
from torch_lab import queueing
from torch_lab.errors import HparamsError, UserError
from torch_lab.experiment import Experiment
from torch_lab.overrides import Overrides, parsed_words
from torch_lab.provenance import spelt
from torch_lab.redaction import masked_arguments
from torch_lab.server import Address, Server
from torch_lab.utils import DELETE, new, ref

SCRIPT = """
    from pathlib import Path

    from torch_lab.utils import ref

    hparams = {
        "config": {
            "lr": 0.1,
            "batch_size": 64,
            "name": "toy",
            "augment": True,
            "warmup": None,
            "milestones": [3, 6],
            "betas": (0.9, 0.99),
            "data": Path("data"),
            "function": len,
            "optimizers": [{"name": "adam", "lr": 0.1}, {"name": "sgd", "lr": 0.2}],
            "model": {"kind": "mlp", "depth": 2, "api_key": "hunter22"},
            "follows": ref("config.batch_size"),
            "mixed": [1, "a"],
            "tags": {"x", "y"},
            7: "seven",
        },
    }
"""


TOLD_WORDS = """
    import json, pathlib, sys

    hparams = {"config": {"x": "", "y": [], "z": 0}}
    if "torch_lab" in sys.argv[0]:  # In a process of its own, which need not train for this.
        pathlib.Path("words.json").write_text(json.dumps(sys.argv))
        raise SystemExit(0)
"""
LATE = """
    def train_config(hparams):
        import parts  # The tried-out archive is loaded without torch: that is quicker.

        return parts.train_config(hparams)
"""


@pytest.fixture
def path(lab: Lab) -> Path:
    """An hparams script with values of many types."""
    return lab.write("hparams.py", SCRIPT)


def config_of(path: Path, *words: str, unset: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the section `config`, as `--set` with each of the words makes it."""
    return Experiment.load(path, parsed_words(words), unset).hparams.config


def at(config: Any, *parts: Any) -> Any:
    for part in parts:
        config = config[part]
    return config


# Words.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["config.lr=3e-3"], {"config.lr": 3e-3}),
        (["config.lr = 3e-3 "], {"config.lr": 3e-3}),
        (["a=1_000"], {"a": 1000}),
        (["a=-3"], {"a": -3}),
        (["a=None"], {"a": None}),
        (["a=True"], {"a": True}),
        (["a=true"], {"a": "true"}),
        (["a=mlp"], {"a": "mlp"}),
        (["a='5'"], {"a": "5"}),
        (["a="], {"a": ""}),
        (["a=x=y"], {"a": "x=y"}),
        (["a=runs/{x}"], {"a": "runs/{x}"}),
        (["a=[1, (2, 'b')]"], {"a": [1, (2, "b")]}),
        (["a={'b': 1}"], {"a": {"b": 1}}),
        (["a=2024-01-01"], {"a": "2024-01-01"}),
        (["a=os.system('x')"], {"a": "os.system('x')"}),
        (["a=new(3)"], {"a": new(3)}),
        (["a=new(text)"], {"a": new("text")}),
        (["a=new([1, (2)])"], {"a": new([1, 2])}),
        (["a=renew(3)"], {"a": "renew(3)"}),
        (["a.b[0].c=1"], {"a.b[0].c": 1}),
        (["a['x.y']=1"], {"a['x.y']": 1}),
        (["a['x=y'][0]=z=1"], {"a['x=y'][0]": "z=1"}),
        (["a['b']+=[1]", "a.b+=[2]"], {"a.b+=": [1, 2]}),
        (["a={[]: 1}"], {"a": "{[]: 1}"}),
        (["a=5in"], {"a": "5in"}),
        (["a+=[1]", "a+=[2]"], {"a+=": [1, 2]}),
        (["a=1", "a=2"], {"a": 2}),
        (["a+=[1]", "a=[2]"], {"a": [2]}),
        (["a=[1]", "a+=[2]"], {"a": [1], "a+=": [2]}),
        (["a=[1]", "a+=[2]", "a=[3]", "b=1"], {"a": [3], "b": 1}),
    ],
)
def test_words_are_literals_or_else_strings(words: list[str], expected: dict[str, Any]) -> None:
    found = parsed_words(words)
    assert found == expected
    assert [type(each) for each in found.values()] == [type(each) for each in expected.values()]


@pytest.mark.parametrize("word", ["", "config.lr", "=3", "config.=3", ".a=3", "a b=3", "a[b]=3"])
def test_a_word_that_sets_nothing_is_refused(path: Path, lab: Lab, word: str) -> None:
    result = lab.train(path, "--offline", "--set", word)
    assert (result.code, lab.runs) == (2, [])
    key, sign, _ = word.partition("=")
    expected = f"{key or 'nothing'} is no key" if sign else "expected KEY=VALUE"
    assert f"error: --set {word}: {expected}" in result.err


@pytest.mark.parametrize("value", ["DELETE", "ref('config.lr')", 'env("HOME")', "new(DELETE)"])
def test_words_of_scripts_are_refused(path: Path, lab: Lab, value: str) -> None:
    """They would be strings; in quotes they are."""
    result = lab.train(path, "--offline", "--set", f"config.name={value}")
    assert result.code == 2 and "a script can say" in result.err
    assert Experiment.load(path, parsed_words(["config.name='DELETE'"])).hparams.config["name"]


@pytest.mark.parametrize(
    "options", [{"set": ["config.lr=3"]}, {"set": {3: 4}}, {"unset": "config.lr"}, {"unset": [3]}]
)
def test_overrides_of_other_types_are_refused(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be a"):
        torch_lab.load(path, **options)


def test_what_is_unset_is_not_suggested_for_itself(path: Path, lab: Lab) -> None:
    result = lab.train(path, "--offline", "--unset", "seed")
    assert result.code == 2 and "has no such key" in result.err and "seed?" not in result.err


# Types.


@pytest.mark.parametrize(
    ("word", "parts", "expected"),
    [
        ("config.lr=3e-3", ["lr"], 3e-3),
        ("config.lr=3", ["lr"], 3.0),
        ("config.lr=inf", ["lr"], math.inf),
        ("config.lr=None", ["lr"], None),
        ("config.batch_size=8", ["batch_size"], 8),
        ("config.name=other", ["name"], "other"),
        ("config.name='5'", ["name"], "5"),
        ("config.name={epoch}", ["name"], "{epoch}"),
        ("config.augment=False", ["augment"], False),
        ("config.warmup=5", ["warmup"], 5),
        ("config.warmup={'a': 1}", ["warmup"], {"a": 1}),
        ("config.milestones=[9]", ["milestones"], [9]),
        ("config.milestones=(9, 10)", ["milestones"], [9, 10]),
        ("config.milestones=[]", ["milestones"], []),
        ("config.milestones[0]=4", ["milestones"], [4, 6]),
        ("config.milestones[-1]=7", ["milestones"], [3, 7]),
        ("config.milestones+=[9]", ["milestones"], [3, 6, 9]),
        ("config.betas=[0, 0.5]", ["betas"], (0.0, 0.5)),
        ("config.betas[1]=0.5", ["betas"], (0.9, 0.5)),
        ("config.betas+=(1,)", ["betas"], (0.9, 0.99, 1.0)),
        ("config.data=/data", ["data"], Path("/data")),
        ("config.optimizers[1].lr=1", ["optimizers", 1], {"name": "sgd", "lr": 1.0}),
        ("config.model.kind=conv", ["model", "kind"], "conv"),
        ("config.model={'depth': 3}", ["model", "depth"], 3),
        ("config.model={'depth': 3}", ["model", "kind"], "mlp"),
        ("config.model=None", ["model"], None),
        ("config.follows=32", ["follows"], 32),
        ("config.batch_size=32", ["follows"], 32),
        ("config.mixed=['b', None]", ["mixed"], ["b", None]),
        ("config.tags={'z'}", ["tags"], {"z"}),
        ("config[7]=eight", [7], "eight"),
        ("config.batch_size=new('many')", ["batch_size"], "many"),
        ("config.lr=new({'a': 1})", ["lr"], {"a": 1}),
    ],
)
def test_what_fits_takes_the_place(path: Path, word: str, parts: list[Any], expected: Any) -> None:
    """It has the type of what was there."""
    found = at(config_of(path, word), *parts)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("word", "shown", "before"),
    [
        ("config.lr=fast", "'fast' (str)", "0.1 (float) in toys/experiments/00_toy/hparams.py:8"),
        ("config.lr=True", "True (bool)", "0.1 (float)"),
        ("config.lr=[0.1]", "[0.1] (list)", "0.1 (float)"),
        ("config.lr={'a': 1}", "{'a': 1} (dict)", "0.1 (float)"),
        ("config.batch_size=1.5", "1.5 (float)", "64 (int)"),
        ("config.batch_size=False", "False (bool)", "64 (int)"),
        ("config.name=5", "5 (int)", "'toy' (str)"),
        ("config.augment=1", "1 (int)", "True (bool)"),
        ("config.augment=true", "'true' (str)", "True (bool)"),
        ("config.milestones=9", "9 (int)", "[3, 6] (list)"),
        ("config.milestones=[0.5]", "[0.5] (list)", "[3, 6] (list)"),
        ("config.milestones=['a']", "['a'] (list)", "[3, 6] (list)"),
        ("config.milestones[0]=x", "'x' (str)", "3 (int)"),
        ("config.milestones+=[x]", "'[x]' (str)", "[3, 6]"),
        ("config.milestones+=['x']", "['x'] (list)", "[3, 6]"),
        ("config.betas=['a']", "['a'] (list)", "(0.9, 0.99) (tuple)"),
        ("config.data=5", "5 (int)", "Path('data')"),
        ("config.function=len", "'len' (str)", "(builtin_function_or_method)"),
        ("config.model=conv", "'conv' (str)", "(dict)"),
        ("config.model={'depth': 'two'}", "'two' (str)", "2 (int)"),
        ("config.follows=many", "'many' (str)", "64 (int)"),
        ("seed=many", "'many' (str)", "0 (int), the default"),
        ("checkpoint.strict=1", "1 (int)", "True (bool), the default"),
    ],
)
def test_what_does_not_fit_is_shown_beside_what_was_there(
    path: Path, lab: Lab, word: str, shown: str, before: str
) -> None:
    result = lab.train(path, "--offline", "--set", word)
    assert (result.code, lab.runs) == (2, [])
    assert result.err.startswith(f"error: --set {word.partition('=')[0].removesuffix('+')}")
    assert shown in result.err
    if "+=[x]" not in word:
        assert before in result.err


@pytest.mark.parametrize(
    ("word", "mend"),
    [
        ("config.name=5", "config.name='5'"),
        ("config.augment=1", "True or False"),
        ("config.batch_size=1.5", "with 64.0 in toys/experiments/00_toy/hparams.py:9"),
        ("config.milestones+=9", "config.milestones+=[9]"),
        ("config.milestones[2]=9", "config.milestones has 2 items"),
        ("config.lr+=[1]", "it adds to lists, and there is 0.1 (float)"),
        ("config.gamma=1", '--set "config.gamma=new(1)"'),
        ("config.lr.x=1", "config.lr is 0.1 (float), which has no keys"),
        ("config.follows.x=1", "config.follows is ref('config.batch_size') in toys"),
    ],
)
def test_a_mistake_says_what_to_do(path: Path, word: str, mend: str) -> None:
    with pytest.raises(HparamsError) as caught:
        config_of(path, word)
    assert mend in f"{caught.value} {caught.value.hint}"


# Keys.


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("config.btach_size=8", "config.batch_size (toys/experiments/00_toy/hparams.py:9)?"),
        ("confg.lr=1", "config.lr (toys"),
        ("batch_size=8", "config.batch_size"),
        ("config.model.knid='x'", "config.model.kind"),
        ("config.model={'knid': 'x'}", "config.model.kind"),
        ("config.optimizers[0].nam=x", "config.optimizers[0].name"),
        ("trainer.init.max_epoch=1", "trainer.init.max_epochs?"),
        ("trainer.init.acelerator=cpu", "trainer.init.accelerator?"),
        ("checkpoint.kep=1", "checkpoint.keep?"),
        ("sed=1", "seed?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(
    path: Path, lab: Lab, word: str, near: str
) -> None:
    result = lab.train(path, "--offline", "--set", word)
    assert (result.code, lab.runs) == (2, [])
    assert "hparams.py has no such key" in result.err
    assert f"; did you mean {near}" in result.err


def test_names_that_torch_lab_and_lightning_have_can_be_set(path: Path) -> None:
    """Also those that the script does not mention."""
    words = ["seed=5", "checkpoint.keep=3", "trainer.init.accelerator=cpu", "task.task_name=x"]
    hparams = Experiment.load(path, parsed_words(words)).hparams
    assert (hparams.seed, hparams.checkpoint.keep) == (5, 3)
    assert hparams.trainer.init == {"accelerator": "cpu"}
    assert hparams.task["task_name"] == "x"


def test_a_dictionary_of_defaults_is_not_filled_in(path: Path) -> None:
    """What is set is what the hparams then say, and no more."""
    experiment = Experiment.load(path, parsed_words(["checkpoint={'keep': 2}"]))
    assert experiment.effective.hparams["checkpoint"] == {"keep": 2}
    assert experiment.hparams.checkpoint.every_minutes == 5.0


@pytest.mark.parametrize(
    ("word", "parts", "expected"),
    [
        ("config.gamma=new(0.5)", ["gamma"], 0.5),
        ("config.a.b.c=new(1)", ["a"], {"b": {"c": 1}}),
        ("config.model.width=new(3)", ["model", "width"], 3),
        ("config.model=new({'width': 3})", ["model", "depth"], 2),
    ],
)
def test_new_adds_keys(path: Path, word: str, parts: list[str], expected: Any) -> None:
    assert at(config_of(path, word), *parts) == expected


def test_overrides_change_nothing_but_what_they_name(path: Path) -> None:
    before = config_of(path)
    after = config_of(path, "config.optimizers[0].lr=0.5", "config.milestones+=[9]")
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"optimizers", "milestones"}
    assert list(before) == list(after)


# Removing.


def test_keys_and_items_are_removed(path: Path) -> None:
    """All at once: an index counts the items of the script."""
    keys = ("config.warmup", "config.model.kind", "config.milestones[0]", "config.milestones[1]")
    config = config_of(path, unset=(*keys, "config.betas[-1]", "config.optimizers[0].lr"))
    assert "warmup" not in config
    assert config["model"] == {"depth": 2, "api_key": "hunter22"}
    assert (config["milestones"], config["betas"]) == ([], (0.9,))
    assert config["optimizers"] == [{"name": "adam"}, {"name": "sgd", "lr": 0.2}]


def test_keys_that_overlap_are_removed_once(path: Path) -> None:
    experiment = Experiment.load(path, {}, ["config.model", "config.model.kind", "config.model"])
    assert "model" not in experiment.hparams.config
    assert len(experiment.histories["config", "model", "kind"]) == 2


def test_a_section_can_be_removed(path: Path) -> None:
    assert Experiment.load(path, unset=["config"]).hparams.config == {}


def test_removed_and_set_a_dictionary_is_replaced(path: Path) -> None:
    """Its keys need no mark, as the script has them."""
    config = config_of(path, "config.model={'kind': 'conv'}", unset=("config.model",))
    assert config["model"] == {"kind": "conv"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("config.wramup", "has no such key; did you mean config.warmup"),
        ("config.milestones[2]", "has no such key"),
        ("seed", "has no such key"),
        ("config.", "expected a key"),
    ],
)
def test_what_is_not_there_cannot_be_removed(path: Path, lab: Lab, key: str, message: str) -> None:
    result = lab.train(path, "--offline", "--unset", key)
    assert (result.code, lab.runs) == (2, [])
    assert f"error: --unset {key}: " in result.err
    assert message in result.err


# From Python.


def test_values_from_python_are_taken_as_they_are(path: Path) -> None:
    """Strings are no literals there, and objects are allowed."""
    given = {"config.name": "5", "config.function": max, "config.warmup": "None"}
    config = Experiment.load(path, given, ["config.lr"]).hparams.config
    assert (config["name"], config["function"], config["warmup"]) == ("5", max, "None")
    assert "lr" not in config


def test_refs_can_be_set(path: Path) -> None:
    """They follow what is set with them."""
    given = {"config.milestones": [ref("config.batch_size")], "config.batch_size": 8}
    assert Experiment.load(path, given).hparams.config["milestones"] == [8]


def test_values_from_python_have_to_fit_too(path: Path) -> None:
    with pytest.raises(HparamsError, match=r"'fast' \(str\) cannot take the place of 0\.1"):
        Experiment.load(path, {"config.lr": "fast"})
    with pytest.raises(HparamsError, match=r"did you mean config\.lr"):
        Experiment.load(path, {"config.lrr": 1})


def test_train_takes_them(lab: Lab) -> None:
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1}}, "config": {"lr": 0.1, "x": 1}})
    run = torch_lab.train(lab.path, tracking="offline", set={"config.lr": 0.5}, unset=["config.x"])
    assert run.hparams["config"] == {"lr": 0.5}


def test_a_loaded_experiment_has_its_values(path: Path) -> None:
    with pytest.raises(UserError, match="give set and unset to its load"):
        torch_lab.train(Experiment.load(path), set={"config.lr": 1})


# Provenance.


def test_the_history_ends_with_what_was_set(path: Path) -> None:
    experiment = Experiment.load(
        path,
        parsed_words(
            [
                *("config.lr=3", "config.milestones+=[9]", "config.optimizers[1].lr=1"),
                *("config.gamma=new(1)", "config.model={'kind': 'conv'}", "config.batch_size=64"),
            ]
        ),
        ["config.model.depth", "config.mixed[0]"],
    )
    found = {
        spelt(key): [
            (each.file.name if each.file else each.source, each.line, each.value)
            for each in changes
        ]
        for key, changes in experiment.histories.items()
    }
    assert found["config.lr"] == [("hparams.py", 8, 0.1), ("--set config.lr", 0, 3.0)]
    assert found["config.milestones"][1:] == [("--set config.milestones+=", 0, [3, 6, 9])]
    optimizers = [{"name": "adam", "lr": 0.1}, {"name": "sgd", "lr": 1.0}]
    assert found["config.optimizers"][1:] == [("--set config.optimizers[1].lr", 0, optimizers)]
    assert found["config.gamma"] == [("--set config.gamma", 0, 1)]
    assert found["config.model.kind"][1:] == [("--set config.model", 0, "conv")]
    assert found["config.model.api_key"] == [("hparams.py", 18, "hunter22")]
    assert found["config.model.depth"][1:] == [("--unset config.model.depth", 0, DELETE)]
    assert found["config.mixed"][1:] == [("--unset config.mixed[0]", 0, ["a"])]
    assert found["config.batch_size"][1:] == [("--set config.batch_size", 0, 64)]
    assert found["config.name"] == [("hparams.py", 10, "toy")]
    assert experiment.histories["config", "gamma"][0].is_new


@pytest.mark.parametrize("seed", range(40))
def test_histories_and_values_agree(path: Path, seed: int) -> None:
    """With generated overrides."""
    draw = random.Random(seed)
    words = [
        *("config.lr=3", "config.milestones+=[9]", "config.optimizers[1].lr=1"),
        *("config.model=None", "config.gamma=new(1)", "config.model={'kind': 'conv'}"),
        "config.warmup={'a': {'b': 1}}",
        *("config.model=new({'x': {}})", "config.follows=3", "config.batch_size=1"),
    ]
    keys = ["config.model.kind", "config.warmup", "config.mixed[0]", "config.tags", "config.betas"]
    experiment = Experiment.load(
        path,
        parsed_words(draw.sample(words, draw.randrange(len(words)))),
        draw.sample(keys, draw.randrange(len(keys))),
    )
    values = {key: changes[-1].value for key, changes in experiment.histories.items()}
    left = {key: value for key, value in values.items() if value is not DELETE and value != {}}
    rebuilt: dict[Any, Any] = {}
    for key, value in left.items():
        within = rebuilt
        for part in key[:-1]:
            within = within.setdefault(part, {})
        within[key[-1]] = value
    assert rebuilt == without_empty(experiment.effective.hparams)


def without_empty(value: Any) -> Any:
    """Return a dictionary without empty ones in it."""
    if not isinstance(value, dict):
        return value
    items = {key: without_empty(item) for key, item in value.items()}
    return {key: item for key, item in items.items() if item != {}}


# Commands.


def test_a_run_has_the_values_that_were_set(path: Path, lab: Lab) -> None:
    """They reach `train_config`, the header and the record."""
    words = ["--set", "config.lr=0.5", "--set=config.milestones+=[9]", "--unset", "config.mixed"]
    result = lab.train("--offline", "--set", "trainer.init.max_epochs=1", *words, path)
    assert result.code == 0, result.err
    told = [line.strip() for line in result.err.splitlines()]
    assert "set     config.mixed removed" in told
    assert {"config.lr = 0.5", "config.milestones += [9]"} <= {*told}
    run = lab.run()
    config = run.hparams["config"]
    assert (config["lr"], config["milestones"], "mixed" in config) == (0.5, [3, 6, 9], False)
    assert run.record.overrides == {
        "set": ["trainer.init.max_epochs=1", "config.lr=0.5", "config.milestones+=[9]"],
        "unset": ["config.mixed"],
        "not_kept": [],
    }


def test_infer_takes_them_before_the_path(path: Path, lab: Lab) -> None:
    """What follows the path is for `infer_config`."""
    lab.config('print("arguments:", arguments)', 'print(hparams["config"]["lr"], arguments)')
    result = lab.infer("--set", "config.lr=0.5", path, "--set", "config.lr=0.7")
    assert result.code == 0, result.err
    assert "0.5 ('--set', 'config.lr=0.7')" in result.out


def test_they_hold_for_all_of_several_paths(path: Path, lab: Lab) -> None:
    """A script that they do not fit stops all, before anything starts."""
    other = lab.hparams("other", {"config": {"batch_size": 8}})
    result = lab.train(path, other, "--offline", "--set", "config.lr=0.5")
    assert (result.code, lab.runs) == (2, [])
    assert "--set config.lr: toys/experiments/00_toy/other.py has no such key" in result.err


def test_they_reach_the_processes_of_several_runs(lab: Lab) -> None:
    """As they were given."""
    path = lab.write("hparams.py", TOLD_WORDS)
    words = ["--set", "config.x=a 'b' $c", "--set", "config.y+=[1]", "--unset", "config.z"]
    result = lab.train(path, "--jobs", "1", "--offline", *words)
    assert result.code == 0, result.err
    told = json.loads((lab.root / "words.json").read_text())
    expected = ["--set=config.x=a 'b' $c", "--set=config.y+=[1]", "--unset=config.z"]
    assert [word for word in told if word.startswith(("--set", "--unset"))] == expected


# Going on.


@pytest.fixture
def stopped(lab: Lab) -> str:
    """A run with overrides that failed in its second epoch."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 2}}, "config": {"lr": 0.1, "x": 1}})
    lab.config(
        '"val_dataloaders": loader(16, 2),',
        '"val_dataloaders": loader(16, 2), "callbacks": [Once()],',
    )
    config = (lab.folder / "__main__.py").read_text()
    once = (
        "import os, pytorch_lightning as pl\n\n"
        "class Once(pl.Callback):\n"
        "    def on_train_epoch_start(self, trainer, module):\n"
        "        assert trainer.current_epoch == 0 or 'GO_ON' in os.environ\n"
    )
    (lab.folder / "__main__.py").write_text(once + config)
    words = ["--set", "config.lr=0.5", "--unset", "config.x"]
    assert lab.train(lab.path, "--offline", *words).code == 1
    return lab.path


def test_what_was_set_holds_when_a_run_goes_on(
    stopped: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GO_ON", "1")
    result = lab.train(stopped, "--offline", "--resume")
    assert result.code == 0, result.err
    assert "changed" not in result.err
    assert "config.lr = 0.5" in result.err
    assert lab.run().record.resumed[0]["changed"] == []


def test_what_is_set_anew_takes_its_place(
    stopped: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GO_ON", "1")
    result = lab.train(stopped, "--offline", "--resume", "--set", "config.lr=0.7")
    assert result.code == 0, result.err
    assert lab.run().record.resumed[0]["changed"] == ["config.lr 0.5 -> 0.7"]


def test_a_run_whose_script_lost_a_key_says_what_it_was_started_with(
    stopped: str, lab: Lab
) -> None:
    lab.hparams("hparams", {"config": {"rate": 0.1, "x": 1}})
    result = lab.train(stopped, "--offline", "--resume")
    assert result.code == 2
    assert "was started with other hparams (config.x removed; config.lr = 0.5): --set" in result.err


@pytest.mark.parametrize(
    "given",
    [
        {"config.lr": 0.5, "config.name": "'quoted'", "config.milestones+=": [9]},
        {"config.name": "5", "config.empty": "", "config.none": "None"},
        {"config.data": Path("/data"), "config.x": (1, {"a": None}), "config.lr": math.inf},
        {"config.gamma": new({"a": [1]}), "config.d": new("text")},
    ],
)
def test_a_record_keeps_values(given: dict[str, Any]) -> None:
    """What it has in words comes back the same, where a string serves for a path too."""
    record = json.loads(json.dumps(Overrides(given, ["config.x"]).record()))
    back = Overrides().over(record, "run")
    expected = {
        key: str(value) if isinstance(value, Path) else value for key, value in given.items()
    }
    assert record["not_kept"] == []
    assert (back.set, list(back.unset)) == (expected, ["config.x"])


@pytest.mark.parametrize("key", ["config.api_key", "config.password", "config.function"])
def test_secrets_and_objects_are_not_kept(key: str) -> None:
    """Whoever goes on with the run gives them again."""
    value = len if key == "config.function" else "hunter22"
    record = Overrides({key: value, "config.lr": 1}).record()
    assert record == {"set": ["config.lr=1"], "unset": [], "not_kept": [key]}
    with pytest.raises(UserError, match=f"--set {key}, whose value its record does not keep"):
        Overrides().over(record, "run")
    assert Overrides({key: value}).over(record, "run").set == {key: value, "config.lr": 1}
    assert Overrides({}, [key]).over(record, "run").unset == (key,)


@pytest.mark.parametrize(
    ("given", "unset", "expected"),
    [
        ({"a": 1}, (), ({"a": 1, "b": 2}, ["c"])),
        ({}, ("a",), ({"b": 2}, ["c", "a"])),
        ({"c": 3}, (), ({"a": 0, "b": 2, "c": 3}, [])),
        ({"['a']": 1}, ("['c']",), ({"b": 2, "['a']": 1}, ["['c']"])),
        ({"a+=": [1]}, (), ({"b": 2, "a+=": [1]}, ["c"])),
    ],
)
def test_what_is_given_anew_comes_before_what_is_kept(
    given: dict[str, Any], unset: tuple[str, ...], expected: Any
) -> None:
    found = Overrides(given, unset).over(Overrides({"a": 0, "b": 2}, ("c",)).record(), "run")
    assert (found.set, list(found.unset)) == expected


# Secrets.


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "config.api_key=hunter22"],
        ["--set=config.api_key=hunter22"],
        ["--set", "config.model={'api_key': 'hunter22'}"],
        ["--set=config.model=new({'x': {'api_key': 'hunter22'}})"],
        ["--set", "config['api_key']=hunter22"],
    ],
)
def test_secrets_are_masked_in_the_record_of_the_command(words: list[str]) -> None:
    assert "hunter22" not in " ".join(masked_arguments(words))


def test_secrets_are_masked_in_the_header() -> None:
    lines = Overrides({"config.api_key": "hunter22", "config.a": {"password": "hunter22"}}).lines()
    assert lines == ["config.api_key = '***'", "config.a = {'password': '***'}"]


# Queues.


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ClearMLServer]:
    with ClearMLServer() as started:
        keys = (started.access_key, started.secret_key)
        address = Address(started.api_url, started.files_url, started.web_url, *keys)
        monkeypatch.setattr(queueing, "found_server", lambda: Server(address))
        yield started


def test_what_is_set_goes_along_to_an_agent(lab: Lab, server: ClearMLServer) -> None:
    """As words of its command; the task shows the values."""
    config = "{'lr': 0.1, 'x': env('NO'), 'y': 0}"
    script = f"from torch_lab.utils import env\nhparams = {{'config': {config}}}"
    path = lab.write("hparams.py", script)
    lab.write("parts.py", CONFIG)
    lab.write("__main__.py", LATE)
    words = ["--set", "config.lr=0.5", "--set", "config.x=a 'b'", "--unset", "config.y"]
    result = lab.train("--queue", "default", "--json", *words, path)
    assert result.code == 0, result.err
    task = server.state.tasks[json.loads(result.out)["task"]]
    for word in ("--set=config.lr=0.5", "--set=config.x=a 'b'", "--unset=config.y"):
        assert repr(word) in task["script"]["diff"]
    assert task["hyperparams"]["hparams"]["config/lr"]["value"] == "0.5"


def test_a_secret_does_not_go_along(lab: Lab, server: ClearMLServer) -> None:
    path = lab.hparams("hparams", {"config": {"api_key": "x"}})
    result = lab.train("--queue", "default", "--set", "config.api_key=hunter22", path)
    assert result.code == 2
    assert "--set config.api_key looks like a secret" in result.err
    assert server.state.tasks == {}
