"""Hparams in unusual ways: other imports, other types, secrets under other names, odd options."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest

import torch_lab
from conftest import CONFIG, Lab
from torch_lab import cli
from torch_lab.errors import HparamsError, ScriptError
from torch_lab.experiment import Experiment
from torch_lab.explaining import chains, layer_warnings
from torch_lab.overrides import Overrides, parsed_words
from torch_lab.redaction import MASK

BASE = 'hparams = {"config": {"lr": 0.1, "m": [3, 6], "seen": {"a"}, "val": {"x": 1}}}\n'
IMPORT = "from torch_lab.utils import import_script_as_module\n"


def loaded(lab: Lab, text: str, **options: Any) -> Experiment:
    """Write `hparams.py`, and load it."""
    lab.write("hparams.py", text)
    return Experiment.load(lab.path, **options)


def places(experiment: Experiment, key: str) -> list[tuple[str, int]]:
    """Return the files and lines that have set a key, the newest last."""
    return [(Path(each["file"]).name, each["line"]) for each in chains(experiment)[key]]


# Scripts that bind the hparams in other ways.


@pytest.mark.parametrize(
    "start",
    ["from base import *", "from base import hparams", "import base\nhparams = base.hparams"],
)
def test_a_base_that_is_a_sibling(lab: Lab, start: str) -> None:
    """It is followed as a layer is, and its keys are not taken for misspelt ones."""
    lab.write("base.py", BASE)
    experiment = loaded(lab, f'{start}\nhparams["config"]["lr"] = 0.5\n', set={"strict": True})
    own = start.count("\n") + 2
    assert places(experiment, "config.lr") == [("base.py", 1), ("hparams.py", own)]
    assert places(experiment, "config.m") == [("base.py", 1)]
    assert experiment.added_keys == []
    experiment = loaded(lab, f'{start}\nhparams["config"]["lrr"] = 0.5\n')
    assert len(experiment.added_keys) == 1


def test_hparams_that_a_function_binds(lab: Lab) -> None:
    experiment = loaded(
        lab, 'def build():\n    global hparams\n    hparams = {"config": {"lr": 1}}\n\n\nbuild()\n'
    )
    assert places(experiment, "config.lr") == [("hparams.py", 3)]


def test_a_script_that_only_imports_hparams_by_another_name_holds_none(lab: Lab) -> None:
    lab.write("base.py", BASE)
    helper = lab.write("helper.py", "from base import hparams as others\n")
    result = lab._main(cli.check, lab.folder / "base.py", helper, "--no-batch")
    assert result.code == 0 and "helper.py" in result.out.split("skipped", 1)[1]


def test_two_bases_side_by_side(lab: Lab) -> None:
    """Each stands on nothing: what one adds to the other is no mistake of the script on them."""
    lab.write("one.py", BASE)
    lab.write("two.py", 'hparams = {"config": {"gamma": 2}}\n')
    experiment = loaded(
        lab,
        IMPORT
        + 'hparams = import_script_as_module("one.py").hparams\n'
        + 'hparams["config"] |= import_script_as_module("two.py").hparams["config"]\n',
    )
    assert list(layer_warnings(experiment)) == []


def test_a_first_script_without_hparams_is_no_base(lab: Lab) -> None:
    """Such as one of presets: the differences are those to the first with hparams."""
    lab.write("presets.py", "adamw = {'lr': 0.2}\n")
    lab.write("base.py", BASE)
    experiment = loaded(
        lab,
        IMPORT
        + 'adamw = import_script_as_module("presets.py").adamw\n'
        + 'hparams = import_script_as_module("base.py").hparams\n'
        + 'hparams["config"] |= adamw\n',
    )
    assert [each.key for each in experiment.differences()] == ["config.lr"]


def test_what_is_called_layer_makes_no_difference(lab: Lab) -> None:
    """Ours marks what it adds under any name, and a function of the user's marks nothing."""
    lab.write("base.py", BASE)
    start = "from torch_lab.utils import layer as on, new\n"
    experiment = loaded(
        lab,
        start
        + 'made = on("base.py", config={"extra": new(3), "val": None})\n'
        + 'made = on("base.py", config={"extra": new(3)})\n'
        + 'hparams = {**made, "seed": 3}\n',
    )
    assert experiment.added_keys == []
    experiment = loaded(
        lab,
        "from base import hparams\ndef layer(n):\n    return n\n\n"
        'hparams["config"]["lrr"] = layer(3)\n',
    )
    assert len(experiment.added_keys) == 1


def test_what_is_no_python_is_refused(lab: Lab) -> None:
    lab.write("conf.txt", "hparams = {}\n")
    with pytest.raises(ScriptError, match=r"conf\.txt is not a Python script"):
        loaded(lab, IMPORT + 'hparams = import_script_as_module("conf.txt").hparams\n')


def test_hparams_that_contain_themselves(lab: Lab) -> None:
    with pytest.raises(HparamsError, match=r"hparams\.py:2: the hparams .* contain themselves"):
        loaded(lab, 'hparams = {"config": {}}\nhparams["config"]["all"] = hparams\n')


@pytest.mark.parametrize(
    "change",
    ['["val"] = None', '["val"] = "none"', '["off"] = {"a": {"b": 1}}', '["lr"] = {"start": 1}'],
)
def test_a_section_that_is_switched_is_no_added_key(lab: Lab, change: str) -> None:
    lab.write("base.py", BASE.replace('"lr"', '"off": None, "lr"'))
    experiment = loaded(lab, f'from base import hparams\nhparams["config"]{change}\n')
    assert experiment.added_keys == []


@pytest.mark.parametrize("value", ["None", 'new("none")'])
def test_what_a_layer_replaces_keeps_its_history(lab: Lab, value: str) -> None:
    """The keys of a section that a value takes the place of, and the other way round."""
    lab.write("base.py", BASE.replace('"lr"', '"off": None, "lr"'))
    experiment = loaded(
        lab,
        "from torch_lab.utils import layer, new\n"
        f'hparams = layer("base.py", config={{"val": {value}, "off": {{"a": 1}}}})\n',
    )
    for key in ("config.val.x", "config.off"):
        assert places(experiment, key) == [("base.py", 1), ("hparams.py", 2)]
        assert chains(experiment)[key][-1]["value"] == "deleted"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('"trainer": {"init": {"max_epoch": 3}}', "trainer.init has the unknown key 'max_epoch'"),
        ('"trainer": {"init": {"max_epochs": "3"}}', "trainer.init.max_epochs must be a whole"),
        ('"confg": {"lr": 3}', "hparams has the unknown key 'confg'"),
        ('"seed": "one"', "seed must be a whole number"),
        ('"config": None', "config must be a dictionary"),
    ],
)
def test_a_mistake_of_a_base_is_named_there(lab: Lab, section: str, message: str) -> None:
    """With its line, whichever script stands on it."""
    lab.write("base.py", f"\nhparams = {{\n    {section},\n}}\n")
    with pytest.raises(HparamsError) as caught:
        loaded(lab, IMPORT + 'hparams = import_script_as_module("base.py").hparams\n')
    assert caught.value.message.startswith("toys/experiments/00_toy/base.py:3: " + message)


def test_a_mistake_of_a_base_is_named_there_also_when_it_is_set(lab: Lab) -> None:
    lab.write("base.py", '\nhparams = {"trainer": {"init": {"max_epoch": 3}}}\n')
    with pytest.raises(HparamsError, match=r"base\.py:2: trainer\.init has the unknown key"):
        loaded(
            lab,
            IMPORT + 'hparams = import_script_as_module("base.py").hparams\n',
            set={"trainer.init.max_epoch": 4},
        )


@pytest.mark.parametrize("use", ["{} * 2", "1 + {}", "max({}, 3)", "int({})", "{}[0]"])
@pytest.mark.parametrize("later", ['ref("config.lr")', 'env("HOME")'])
def test_to_compute_with_what_is_not_known_is_an_error(lab: Lab, use: str, later: str) -> None:
    with pytest.raises(HparamsError, match=r"hparams\.py:2: no script can know what comes of it"):
        loaded(
            lab, f"from torch_lab.utils import env, ref\nx = {use.format(later)}\nhparams = {{}}\n"
        )


def test_a_key_that_is_not_there_can_be_removed(lab: Lab) -> None:
    experiment = loaded(
        lab,
        "from torch_lab.utils import DELETE\n"
        + BASE
        + 'hparams["config"]["nothing"] = DELETE\nhparams["config"]["lr"] = DELETE\n',
    )
    assert experiment.hparams.config.keys() == {"m", "seen", "val"}


def test_a_line_in_a_loop_stands_once(lab: Lab) -> None:
    """Else a thousand additions would be a thousand copies of a list."""
    experiment = loaded(lab, BASE + 'for x in range(1000):\n    hparams["config"]["m"].append(x)\n')
    assert places(experiment, "config.m") == [("hparams.py", 1), ("hparams.py", 3)]


def test_scripts_that_are_printed_together_share_nothing(lab: Lab) -> None:
    """Not even a preset that one of them changes in its place."""
    package = lab.root / "src" / "presets_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("adam = {'lr': 0.003}\n")
    start = 'from presets_of_mine import adam\nhparams = {"config": {"adam": adam}}\n'
    one = lab.write("one.py", start + 'hparams["config"]["adam"]["lr"] = 99\n')
    other = lab.write("two.py", start)
    result = lab.train(one, other, "--print")
    assert result.code == 0
    assert "99" in result.out.split("two.py")[0] and "0.003" in result.out.split("two.py")[1]


# Types.


@pytest.mark.parametrize(
    "change",
    ['config["seen"].add("b")', 'config["pair"][0]["n"] = 2', 'config["ordered"]["a"] = 2'],
)
def test_what_changes_within_is_noticed(lab: Lab, change: str) -> None:
    """Sets, dictionaries in tuples, and dictionaries of other types."""
    lab.write(
        "base.py",
        "from collections import OrderedDict\n"
        'hparams = {"config": {"seen": {"a"}, "pair": ({"n": 1},), "ordered": OrderedDict(a=1)}}\n',
    )
    experiment = loaded(
        lab,
        IMPORT
        + 'hparams = import_script_as_module("base.py").hparams\n'
        + f'config = hparams["config"]\n{change}\n',
    )
    key = f"config.{change.split(chr(34))[1]}"
    assert places(experiment, key) == [("base.py", 2), ("hparams.py", 4)]
    assert len(experiment.differences()) == 1


def test_dictionaries_keep_their_types(lab: Lab) -> None:
    text = (
        "from collections import Counter, OrderedDict\n"
        'hparams = {"config": {"o": OrderedDict(a=1), "c": Counter(a=1), "lr": 0.1}}\n'
    )
    for options in ({}, {"set": {"config.o.a": 3, "config.c.a": 3}}, {"unset": ["config.lr"]}):
        config = loaded(lab, text, **options).hparams.config
        assert type(config["o"]) is OrderedDict and type(config["c"]) is Counter
        assert config["c"]["a"] == (3 if "set" in options else 1)


def test_a_section_may_follow_another(lab: Lab) -> None:
    lab.write("base.py", 'hparams = {"config": {"train": {"n": 1}, "val": {"n": 2}}}\n')
    experiment = loaded(
        lab,
        "from torch_lab.utils import layer, ref\n"
        'hparams = layer("base.py", config={"val": ref("config.train")})\n',
    )
    assert experiment.hparams.config["val"] == {"n": 1}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["config.m+=(7,)", "config.m+=(8,)"], {"config.m+=": [7, 8]}),
        (["config.m+=[7]", "config.m+=(8,)"], {"config.m+=": [7, 8]}),
    ],
)
def test_additions_are_joined(words: list[str], expected: dict[str, Any]) -> None:
    assert parsed_words(words) == expected


def test_a_number_that_no_float_can_hold(lab: Lab) -> None:
    with pytest.raises(HparamsError, match=r"cannot take the place of 0\.1"):
        loaded(lab, BASE, set={"config.lr": 10**400})


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("False", False), ("0", False)]
)
def test_a_switch_in_the_environment(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, text: str, value: bool
) -> None:
    script = (
        "from torch_lab.utils import env\n"
        'hparams = {"config": {"on": env("TOY_SWITCH", default=True)}}\n'
    )
    monkeypatch.setenv("TOY_SWITCH", text)
    assert loaded(lab, script).hparams.config["on"] is value
    monkeypatch.setenv("TOY_SWITCH", "maybe")
    with pytest.raises(HparamsError) as caught:
        loaded(lab, script)
    assert caught.value.hint == "1, 0, true or false"


def test_what_is_removed_at_a_resume_stays_removed() -> None:
    """With all that was set below it."""
    record = Overrides({"config.val.x": 5, "config.lr": 1}).record()
    resumed = Overrides({}, ("config.val",)).over(record, "run")
    assert (dict(resumed.set), list(resumed.unset)) == ({"config.lr": 1}, ["config.val"])


def test_a_config_function_that_is_no_def(lab: Lab) -> None:
    """A mistake in its arguments is told as of any other."""
    lab.hparams("hparams", {})
    lab.write("__main__.py", CONFIG + "\n\ntrain_config = functools.partial(loader, 1, 2)\n")
    result = lab.train(lab.path, "--offline")
    assert result.code == 2 and "__main__.py: train_config(" in result.err


# Secrets.

SECRET = "hf_0123456789abcdef"


@pytest.mark.parametrize(
    "config",
    [
        '{"login": env("TOY_TOKEN")}',
        '{"api_key": env("TOY_TOKEN"), "header": ref("Bearer {config.api_key}")}',
        '{"api_key": env("TOY_NONE", default="hf_0123456789abcdef")}',
        '{"api_key": b"hf_0123456789abcdef"}',
    ],
)
def test_secrets_are_masked_wherever_they_stand(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    """In what is shown, and in what a run keeps."""
    monkeypatch.setenv("TOY_TOKEN", SECRET)
    lab.write(
        "base.py", f'from torch_lab.utils import env, ref\nhparams = {{"config": {config}}}\n'
    )
    lab.write(
        "hparams.py",
        IMPORT
        + 'hparams = import_script_as_module("base.py").hparams\n'
        + 'hparams["trainer"] = {"init": {"max_epochs": 1}}\n'
        + 'hparams["config"]["copy"] = hparams["config"].get("api_key", 3)\n',
    )
    shown = [lab._main(cli.explain, lab.path), lab.train(lab.path, "--print")]
    shown.append(lab.train(lab.path, "--offline"))
    assert [result.code for result in shown] == [0, 0, 0]
    assert not any("0123456789" in result.out + result.err for result in shown)
    assert "0123456789" not in (lab.run().folder / "run.json").read_text()


@pytest.mark.parametrize(
    "word", ["config.api_key=5", "config.credentials.folder=5", "config.api_key+=[5]"]
)
def test_errors_show_no_secrets(lab: Lab, word: str) -> None:
    keys = {"api_key": SECRET, "credentials": {"folder": SECRET}}
    lab.hparams("hparams", {"config": keys})
    result = lab.train(lab.path, "--offline", "--set", word)
    assert result.code == 2 and MASK in result.err and SECRET not in result.err


def test_a_secret_section_is_not_kept() -> None:
    record = Overrides({"config.credentials.folder": SECRET}).record()
    assert record["set"] == [] and record["not_kept"] == ["config.credentials.folder"]


# Commands.


def test_explain_knows_what_can_be_set(lab: Lab) -> None:
    """Defaults, items of lists, and any way to write a key."""
    lab.write("hparams.py", BASE)
    result = lab._main(cli.explain, lab.path, "seed", "config.m[0]", "config['lr']", "--json")
    found = json.loads(result.out)["keys"]
    assert [each["key"] for each in found] == ["seed", "config.m", "config.lr"]
    assert found[0]["changes"][0]["source"] == "the default"
    result = lab._main(cli.explain, lab.path, "config.lr.x")
    assert result.code == 2 and "has no config.lr.x" in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--offline", "--online"], "--offline and --online contradict each other"),
        (["--print", "--resume"], "--print and --resume contradict each other"),
        (["--print", "--queue", "default"], "--print and --queue contradict each other"),
        (["--not-exact"], "--not-exact is for --resume"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_options_that_contradict_each_other(
    lab: Lab, words: list[str], message: str, count: int
) -> None:
    """However many paths there are."""
    lab.write("hparams.py", BASE)
    result = lab.train(*[lab.path] * count, *words)
    assert result.code == 2 and message in result.err and lab.runs == []


def test_the_help_of_an_experiment_that_does_not_compile(lab: Lab) -> None:
    lab.write("hparams.py", BASE)
    lab.write("__main__.py", "def train_config(hparams:\n")
    result = lab.train(lab.path, "--help")
    assert result.code == 0 and "__main__.py:1: " in result.out and "Traceback" not in result.err


def test_keys_that_have_no_text_are_left_out_of_what_is_printed(lab: Lab) -> None:
    lab.write("hparams.py", 'hparams = {"config": {object(): 1, "lr": 2}}\n')
    result = lab.train(lab.path, "--print")
    namespace: dict[str, Any] = {}
    exec(result.out, namespace)
    assert namespace["hparams"]["config"] == {"lr": 2} and "# <object object" in result.out


# Notebooks.


@pytest.mark.parametrize(
    "edit",
    [
        'del config["lr"]',
        'config["gamma"] = 1',
        'config["val"]["y"] = {"z": 2}',
        'config["x.y"] = 1',
        "config[7] = 8",
    ],
)
def test_changed_hparams_are_refused_with_the_call_that_has_them(lab: Lab, edit: str) -> None:
    lab.write("hparams.py", BASE)
    experiment = torch_lab.load(lab.path)
    exec(edit, {"config": experiment.hparams["config"]})
    with pytest.raises(HparamsError) as caught:
        experiment.build()
    assert caught.value.hint is not None
    call = caught.value.hint.removeprefix("load it so: ")
    again = eval(call, {"torch_lab": torch_lab, "new": torch_lab.utils.new})
    assert again.hparams == experiment.hparams


def test_packages_of_the_project_are_importable_without_a_command(lab: Lab) -> None:
    """For `torch_lab.train` as for `torch_lab.load`."""
    package = lab.root / "src" / "toys_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("rate = 0.25\n")
    lab.write(
        "hparams.py",
        'from toys_of_mine import rate\n\nhparams = {"config": {"lr": rate}}\n',
    )
    run = torch_lab.train(lab.path, dev_run=1, tracking="offline")
    assert run.record.hparams["config"]["lr"] == 0.25
