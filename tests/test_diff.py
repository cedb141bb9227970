"""`torch-lab diff`: what differs between scripts, runs and checkpoints, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import CONFIG, Lab, Result
from torch_lab import cli, comparing
from torch_lab.code_changes import Kind, code_changes
from torch_lab.comparing import _hparams_differences
from torch_lab.experiment import Experiment
from torch_lab.runs import Run, artifacts_folder, encoded
from torch_lab.sides import Side

LAYER = """
from torch_lab.utils import import_script_as_module

hparams = import_script_as_module("hparams.py").hparams
"""
MODEL = '''
"""Networks."""

import torch
from toys.blocks import block


class Net(torch.nn.Module):
    """A network."""

    width = 3

    def __init__(self, depth=1):
        """Make it."""
        super().__init__()
        self.block = block(depth)

    def forward(self, x):
        return self.block(x)
'''


def diff(lab: Lab, *words: str | Path) -> Result:
    """Run `torch-lab diff` in this process."""
    return lab._main(cli.diff, *words)


def record(lab: Lab, *words: str | Path) -> dict[str, Any]:
    """Return what `torch-lab diff --json` says."""
    result = diff(lab, *words, "--json")
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def lines_of(text: str) -> list[str]:
    """Return the lines of a report with single blanks."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip(" ─")]


def recorded(lab: Lab, script: str | Path, **metrics: float) -> Run:
    """Return a completed run of a script, without training."""
    experiment = Experiment.load(script)
    run = Run.plan(
        artifacts_folder(experiment.root),
        experiment.base_name,
        experiment=experiment.name,
        script=str(experiment.script),
        hparams=encoded(experiment.hparams.as_dict()),
        seed=0,
    )
    run.reserve()
    run.write_sources(experiment.root, experiment.scripts, b"")
    run.close("completed", metrics)
    return run


def edited(run: Run, **changes: Any) -> None:
    """Change `run.json`."""
    path = run.folder / "run.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**found, **changes}), encoding="utf-8")


def with_checkpoint(run: Run, name: str, **sidecar: Any) -> None:
    """Give a run a checkpoint, of which its sidecar alone is looked at."""
    run.checkpoints_folder.mkdir(exist_ok=True)
    run.checkpoint(name).touch()
    run.checkpoint(name).with_suffix(".json").write_text(json.dumps(sidecar))


# Hparams.


def test_values_that_differ_are_shown_with_the_lines_that_set_them(lab: Lab) -> None:
    """Changed, added and removed ones; what is equal is not shown."""
    lab.write("hparams.py", "hparams = {'config': {\n 'lr': 0.1,\n 'wd': 0.0,\n 'same': 1}}\n")
    high = lab.write(
        "high.py",
        LAYER + "hparams['config']['lr'] = 0.5\n"
        "hparams['config']['new'] = {'deep': [1]}\ndel hparams['config']['wd']\n",
    )
    result = diff(lab, lab.path, high)
    assert (result.code, result.err) == (0, "")
    assert lines_of(result.out) == [
        "a toys/experiments/00_toy/hparams.py, as it is now",
        "b toys/experiments/00_toy/high.py, as it is now (hparams.py > high.py)",
        "hparams 00_toy/hparams.py 00_toy/high.py",
        "config.lr 0.1 (hparams.py:2) 0.5 (high.py:5)",
        "config.wd 0.0 (hparams.py:3) nothing (high.py:7)",
        "config.new.deep nothing [1] (high.py:6)",
    ]
    (rate, *_) = record(lab, lab.path, high)["hparams"]
    file = "toys/experiments/00_toy/hparams.py"
    assert rate["a"] == {"value": 0.1, "file": file, "line": 2}


def test_exit_codes_are_those_of_diff(lab: Lab) -> None:
    """With --exit-code 1 if anything differs, 0 if nothing does; without it always 0."""
    high = lab.write("high.py", LAYER + "hparams['seed'] = 1\n")
    assert [diff(lab, lab.path, high, *word).code for word in ([], ["--exit-code"])] == [0, 1]
    equal = diff(lab, lab.path, lab.path, "--exit-code")
    assert equal.code == 0
    assert lines_of(equal.out)[-1] == "equal no differences"
    assert record(lab, lab.path, lab.path)["equal"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ((1,), [1]),
        ("x", Path("x")),
        ({}, None),
        ([1, 2], [2, 1]),
        ("1", 1),
        ("a#1.b", "a#2.b"),
        ("x at 0x1", "x at 0x2"),
    ],
    ids=repr,
)
def test_values_of_other_types_differ(lab: Lab, one: Any, other: Any) -> None:
    """Python would call some of them equal."""
    paths = []
    for name, value in (("one", one), ("other", other)):
        text = f"from pathlib import Path, PosixPath\nhparams = {{'config': {{'a': {value!r}}}}}\n"
        paths.append(lab.write(f"{name}.py", text))
    (found,) = record(lab, *paths)["hparams"]
    assert found["name"] == "config.a"
    assert len({found[side]["value"].__repr__() for side in "ab"}) == 2


def test_values_that_only_look_different_are_equal(lab: Lab) -> None:
    """Sets in another order, NaN, and objects at another address."""
    script = lab.write(
        "odd.py",
        "class Thing:\n    pass\n\n\n"
        "hparams = {'config': {'a': {'x', 'y'}, 'b': float('nan'), 'c': Thing(), 5: 'five'}}\n",
    )
    run = recorded(lab, script)
    hparams = run.record.hparams
    assert "0x" in json.dumps(hparams), "an object is kept by its repr"
    pairs = dict(hparams["config"]["value"])
    pairs["a"]["value"].reverse()
    edited(run, hparams=hparams)
    assert record(lab, script, run.name)["hparams"] == []


def test_a_section_that_is_empty_on_one_side_is_no_value(lab: Lab) -> None:
    """The keys in it are; what is no section at all is a difference."""
    one = lab.hparams("one", {"config": {"a": {}, "b": {}, "c": 1}})
    other = lab.hparams("two", {"config": {"a": {"x": {"y": 1}}, "b": 2, "c": {"z": 1}}})
    found = record(lab, one, other)["hparams"]
    assert [each["name"] for each in found] == [
        "config.b",
        "config.c",
        "config.a.x.y",
        "config.c.z",
    ]


def test_keys_are_compared_with_few_others(lab: Lab) -> None:
    """Empty sections that one side has alone are looked up, not searched for in all keys."""
    compared = []

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return str.__eq__(self, other)

    side = Side.of(str(lab.hparams("hparams", {"config": {}})))
    full, bare = ({Name(f"{kind}{n}"): {} for n in range(300)} for kind in ("one", "two"))
    found = _hparams_differences(replace(side, hparams=full), replace(side, hparams=bare))
    assert len(list(found)) == 600
    assert len(compared) < 20 * 600


def test_lists_of_dictionaries_are_compared_by_element(lab: Lab) -> None:
    """The key leads to the value that differs, the line is that of the list."""
    one = lab.write(
        "one.py", "hparams = {'config': {\n 'o': [{'lr': 1, 'n': [1, 2]}, {'lr': 2}]}}\n"
    )
    other = lab.write("two.py", "hparams = {'config': {'o': [{'lr': 1, 'n': [1]}, {'lr': 3}]}}\n")
    found = record(lab, one, other)["hparams"]
    assert [each["name"] for each in found] == ["config.o[0].n", "config.o[1].lr"]
    assert [each["a"]["line"] for each in found] == [2, 2]


def test_long_values_are_cut_where_they_differ(lab: Lab) -> None:
    """The table shows the first difference; JSON has all of it."""
    one, other = list(range(100)), [*range(60), -1, *range(61, 100)]
    result = diff(
        lab, *(lab.hparams(n, {"config": {"a": v}}) for n, v in (("o", one), ("p", other)))
    )
    assert "58, 59, 60, 61" in result.out
    assert "58, 59, -1, 61" in result.out
    assert "0, 1, 2" not in result.out
    assert record(lab, lab.folder / "o.py", lab.folder / "p.py")["hparams"][0]["a"]["value"] == one


def test_a_run_shows_the_lines_that_it_has_kept(lab: Lab) -> None:
    """Those of `provenance` in its record; without it there are none."""
    lab.hparams("hparams", {"config": {"lr": 0.1}})
    run = recorded(lab, lab.path)
    lab.write("hparams.py", "\n\nhparams = {'config': {'lr': 0.2}}\n")
    assert "config.lr 0.1 0.2 (hparams.py:3)" in lines_of(diff(lab, run.name, lab.path).out)
    base, script = "toys/experiments/base.py", "toys/experiments/00_toy/hparams.py"
    chain = [{"file": base, "line": 7, "value": 1}, {"file": script, "line": 9, "value": 0.1}]
    edited(run, provenance={"config.lr": chain})
    assert "config.lr 0.1 (hparams.py:9) 0.2 (hparams.py:3)" in lines_of(
        diff(lab, run.name, lab.path).out
    )
    edited(run, provenance={"config.lr": chain[:1]})
    assert f"config.lr 0.1 ({base}:7) 0.2 (hparams.py:3)" in lines_of(
        diff(lab, run.name, lab.path).out
    )


@pytest.mark.parametrize("module", ["presets", "toys.presets"])
def test_two_scripts_do_not_share_a_dictionary(lab: Lab, module: str) -> None:
    """Both change that of a module which they import; each has its own change alone."""
    for folder in (lab.folder, lab.root / "toys"):
        (folder / "presets.py").write_text("adam = {'lr': 1, 'eps': 1}\n")
    start = f"from {module} import adam\n\nhparams = {{'config': adam}}\n"
    one = lab.write("one.py", start + "adam['lr'] = 2\n")
    other = lab.write("two.py", start + "adam['eps'] = 2\n")
    found = record(lab, one, other)["hparams"]
    values = {each["name"]: (each["a"]["value"], each["b"]["value"]) for each in found}
    assert values == {"config.lr": (2, 1), "config.eps": (1, 2)}


def test_secrets_are_nowhere(lab: Lab) -> None:
    """Not in tables, nor in JSON, nor in the lines of the code; and a masked one equals itself."""
    lab.hparams("hparams", {"config": {"api_key": "hunter2", "lr": 1}})
    secret = 'TOKEN = "hunter2"  # of mine\n\n\ndef use(x, password="hunter2"):\n    return {}\n'
    lab.write("__main__.py", CONFIG + secret.format("x"))
    run = recorded(lab, lab.path)
    assert record(lab, run.name, lab.path)["equal"]
    lab.write("__main__.py", CONFIG + secret.format("x + 1") + "MY_API_KEY = 'hunter2'\n")
    lab.hparams("hparams", {"config": {"api_key": "hunter3", "password": "hunter2", "lr": 2}})
    told = [diff(lab, run.name, lab.path, *word).out for word in (["--verbose"], ["--json"])]
    assert "x + 1" in told[0]
    assert all("config.password" in text and "hunter" not in text for text in told)


# Code.


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("def loader(", "# how data comes\n\n\ndef loader(", {}),
        ("    return DataLoader(", "    return  DataLoader(  # all\n", {}),
        (
            '"""A network learns the sign of a sum."""',
            "'''A network learns.'''",
            "module docstring",
        ),
        ('    print("arguments:"', "    '''Infer.'''\n    print('arguments:'", "docstring"),
        ('    print("arguments:"', '    print("given:"', {"infer_config": "changed"}),
        ("def infer_config(hparams", "def infer_config(hp", {"infer_config": "changed"}),
        ("shuffle=True", "shuffle=False", {"train_config": "changed"}),
        ("def loader(", "WIDTH = 3\n\n\ndef loader(", {"module level": "changed"}),
        ("def loader(", "def other():\n    pass\n\n\ndef loader(", {"other": "added"}),
        ("import functools\n", "", {"module level": "changed"}),
        (
            "def infer_config(",
            "@functools.cache\ndef infer_config(",
            {"infer_config": "changed"},
        ),
    ],
)
def test_the_config_script_is_compared_by_function(
    lab: Lab, old: str, new: str, expected: dict[str, str] | str
) -> None:
    """Comments and formatting are no change, docstrings are named as such."""
    run = recorded(lab, lab.path)
    lab.config(old, new)
    if isinstance(expected, str):
        name = "module level" if expected.startswith("module") else "infer_config"
        expected = {name: "docstring only"}
    found = record(lab, run.name, lab.path, "--exit-code") if not expected else None
    found = found or record(lab, run.name, lab.path)
    assert {each["name"]: each["change"] for each in found["code"]} == expected
    assert all(each["file"] == "__main__.py" for each in found["code"])


def test_the_lines_of_a_change_are_shown(lab: Lab) -> None:
    """Where it is on both sides; with --verbose what was removed and added."""
    run = recorded(lab, lab.path)
    lab.config("def loader(", "\n# below this\ndef loader(")
    config = (lab.folder / "__main__.py").read_text()
    config = config.replace("loader(16, 2)", "loader(17, 2)").replace("print(", "print(1, ")
    lab.write("__main__.py", config)
    short, long = (diff(lab, run.name, lab.path, *word).out for word in ([], ["--verbose"]))
    assert "__main__.py" in lines_of(short)
    assert "train_config changed 17 19" in lines_of(short)
    assert '-        "val_dataloaders": loader(16, 2),' not in short
    assert '  -        "val_dataloaders": loader(16, 2),\n' in long
    assert '  +        "val_dataloaders": loader(17, 2),\n' in long
    assert "@@" not in long


def test_the_line_is_that_of_the_change(lab: Lab) -> None:
    """Not that of a docstring above it, which differs as well."""
    before = "if True:\n    'one'\n    a = 1\n\nz = 1\n"
    after = before.replace("one", "two\n    more".replace("\n", " ")).replace("z = 1", "z = 2")
    (change,) = code_changes(before.encode(), after.encode())
    assert (change.kind, change.line_before, change.line_after) == (Kind.CHANGED, 5, 5)
    (change,) = code_changes(before.encode(), after.replace("z = 2", "z = 1").encode())
    assert (change.kind, change.line_before, change.line_after) == (Kind.DOCSTRING, 1, 1)


def test_methods_and_classes_are_parts(lab: Lab) -> None:
    """A class that is new is one line; of one that changed its methods are."""
    lab.write("nets.py", MODEL)
    lab.write("__main__.py", "import nets\n" + CONFIG)
    run = recorded(lab, lab.path)
    model = MODEL.replace("return self", "return -self").replace("Make it", "Set it up")
    lab.write(
        "nets.py", model.replace("width = 3", "width = 4") + "\n\nclass Two(Net):\n    pass\n"
    )
    found = [(each["name"], each["change"]) for each in record(lab, run.name, lab.path)["code"]]
    assert found == [
        ("Net", "changed"),
        ("Net.__init__", "docstring only"),
        ("Net.forward", "changed"),
        ("Two", "added"),
    ]
    lab.write("nets.py", "class Net:\n    def forward(self):\n        pass\n")
    renamed = "class Other:\n    def forward(self):\n        pass\n"
    other = lab.write("copy/nets.py", renamed).parent
    for name in ("hparams.py", "__main__.py"):
        (other / name).write_text((lab.folder / name).read_text())
    found = record(lab, lab.path, other / "hparams.py")["code"]
    assert [(each["name"], each["change"]) for each in found] == [
        ("Other", "added"),
        ("Net", "removed"),
    ]


def project(lab: Lab) -> None:
    """Give the experiment code of the project, imported in each way."""
    package = lab.root / "toys"
    (package / "models.py").write_text(MODEL)
    (package / "blocks.py").write_text("def block(depth):\n    return depth\n")
    (lab.root / "src/lib/tools").mkdir(parents=True)
    (lab.root / "src/lib/__init__.py").touch()
    (lab.root / "src/lib/tools/__init__.py").write_text("from .inner import tool\n")
    (lab.root / "src/lib/tools/inner.py").write_text("def tool():\n    return 1\n")
    lab.write("helpers.py", "def helper():\n    from lib import tools\n    return tools\n")
    other = package / "experiments/01_other/__main__.py"
    other.parent.mkdir()
    other.write_text("import beside\n\n\ndef shared():\n    return 1\n")
    (other.parent / "__init__.py").touch()
    (other.parent / "beside.py").write_text("def near():\n    return 1\n")
    start = "import json\nfrom toys import models\nfrom helpers import helper\n"
    more = f"BASE = import_script_as_module('../{other.parent.name}/__main__.py')\n"
    layer = "from torch_lab.utils import import_script_as_module\n"
    lab.write("__main__.py", start + layer + CONFIG + more)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("toys/models.py", "Net.forward"),
        ("toys/blocks.py", "block"),
        ("src/lib/tools/inner.py", "tool"),
        ("toys/experiments/00_toy/helpers.py", "helper"),
        ("toys/experiments/01_other/__main__.py", "shared"),
        ("toys/experiments/01_other/beside.py", "near"),
    ],
)
def test_imported_code_of_the_project_is_compared(lab: Lab, file: str, name: str) -> None:
    """However far it lies, and in whatever way it is imported; nothing of it is run."""
    project(lab)
    run = recorded(lab, lab.path)
    assert record(lab, run.name, lab.path)["equal"]
    path = lab.root / file
    path.write_text(re.sub(r"return (\S+)", r"return (\1, 0)", path.read_text()))
    (found,) = record(lab, run.name, lab.path)["code"]
    assert (found["name"], found["change"]) == (name, "changed")
    assert found["file"] == file.removeprefix("toys/experiments/00_toy/")


def test_a_package_does_not_hide_what_is_installed(lab: Lab) -> None:
    """Its modules do not see each other by their bare names, so that is another one's."""
    for name in ("__init__", "datasets", "models"):
        (lab.root / f"toys/{name}.py").write_text("import datasets\n" * (name == "models"))
    lab.write("__main__.py", "import toys.models\n" + CONFIG)
    run = recorded(lab, lab.path)
    assert not (run.folder / "sources/toys/datasets.py").exists()
    assert (run.folder / "sources/toys/models.py").exists()


def test_what_is_installed_is_no_code_of_the_project(lab: Lab, monkeypatch: Any) -> None:
    """A virtual environment may lie in the project's folder."""
    installed = lab.root / ".venv/lib/site-packages"
    installed.mkdir(parents=True)
    (installed / "others.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(installed)
    lab.write("__main__.py", "import others\n" + CONFIG)
    assert {path.name for path in Experiment.load(lab.path).scripts} == {
        "hparams.py",
        "__main__.py",
    }


def test_files_that_one_side_has(lab: Lab) -> None:
    """A module that is new or gone is one line; one that nobody imports any more is still there."""
    lab.write("__main__.py", "import first\n" + CONFIG)
    lab.write("first.py", "x = 1\n")
    run = recorded(lab, lab.path)
    lab.write("__main__.py", "import second\n" + CONFIG)
    lab.write("second.py", "x = 1\n")

    def changes() -> set[tuple[str, ...]]:
        found = record(lab, run.name, lab.path)["code"]
        return {(each["file"], each["name"], each["change"]) for each in found}

    config, new = ("__main__.py", "module level", "changed"), ("second.py", "file", "added")
    assert changes() == {config, new}
    (lab.folder / "first.py").unlink()
    assert changes() == {config, new, ("first.py", "file", "removed")}


def test_what_a_run_has_not_kept_is_not_compared(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and nobody claims that it is new or that all is equal."""
    project(lab)
    run = recorded(lab, lab.path)
    (run.folder / "sources/toys/models.py").unlink()
    (run.folder / "sources/toys/blocks.py").unlink()
    looked_at: list[bytes | None] = []
    original = comparing.code_changes
    monkeypatch.setattr(
        comparing, "code_changes", lambda *both: looked_at.extend(both) or original(*both)
    )
    found = record(lab, run.name, lab.path)
    assert looked_at and None not in looked_at
    assert (found["code"], found["equal"]) == ([], True)
    assert found["not_compared"] == ["toys/blocks.py", "toys/models.py"]
    told = lines_of(diff(lab, run.name, lab.path).out)
    assert told[2:] == [
        "equal no differences in what was compared",
        "not compared toys/blocks.py, toys/models.py: a run has not kept them",
    ]


def test_two_experiments_are_compared_file_by_file(lab: Lab) -> None:
    """Their config scripts and helpers are counterparts, wherever the folders lie."""
    lab.write("helpers.py", "def helper():\n    return 1\n")
    lab.write("__main__.py", "import helpers\n" + CONFIG)
    other = lab.root / "elsewhere" / "01_copy"
    other.mkdir(parents=True)
    for path in lab.folder.glob("*.py"):
        (other / path.name).write_text(path.read_text())
    assert record(lab, lab.path, other / "hparams.py")["code"] == []
    (other / "helpers.py").write_text("def helper():\n    return 2\n")
    (found,) = record(lab, lab.path, other / "hparams.py")["code"]
    assert (found["file"], found["name"]) == ("helpers.py", "helper")


def test_functions_of_hparams_scripts_are_code(lab: Lab) -> None:
    """Their values are compared as such; that they are set otherwise is no difference."""
    script = "def decay(x):\n    return x\n\n\nhparams = {'config': {'f': decay, 'lr': 1}}\n"
    lab.write("hparams.py", script)
    run = recorded(lab, lab.path)
    lab.write("hparams.py", script.replace("1}", "2 - 1}"))
    assert record(lab, run.name, lab.path)["equal"]
    lab.write("hparams.py", script.replace("return x", "return 2 * x"))
    (found,) = record(lab, run.name, lab.path)["code"]
    assert (found["file"], found["name"]) == ("hparams.py", "decay")


def test_a_script_that_is_no_python_differs_as_a_whole(lab: Lab) -> None:
    """It may be of another version of Python, or half written."""
    run = recorded(lab, lab.path)
    lab.write("__main__.py", CONFIG + "def half(\n")
    (found,) = record(lab, run.name, lab.path)["code"]
    assert (found["name"], found["change"]) == ("file, which is no Python", "changed")


# Packages and results.


def test_versions_of_packages(lab: Lab) -> None:
    """Those that changed have a row each; those that one side has alone share one."""
    run = recorded(lab, lab.path)
    packages = {**run.record.packages, "torch": "1.0", "only-there": "3"}
    del packages["pytest"]
    edited(run, packages=packages, python="3.9.1")
    found = {each["name"]: each for each in record(lab, run.name, lab.path)["packages"]}
    assert set(found) == {"python", "torch", "only-there", "pytest"}
    assert found["only-there"]["b"] is None
    told = lines_of(diff(lab, run.name, lab.path).out)
    assert f"python 3.9.1 {sys.version.split()[0]}" in told
    assert f"others only-there 3 pytest {run.record.packages['pytest']}" in told


def test_a_run_equals_its_script_and_itself(lab: Lab) -> None:
    """Trained for real: nothing differs until something is changed; then what came out, too."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1}}, "config": {"lr": 0.1}})
    assert lab.train(lab.path, "--offline").code == 0
    run = lab.run()
    for pair in ([run.name, lab.path], [run.name, run.folder], [f"{run.name}@last", run.name]):
        equal = diff(lab, *pair, "--exit-code")
        assert (equal.code, lines_of(equal.out)[2:]) == (0, ["equal no differences"])
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 2}}, "config": {"lr": 0.5}})
    assert lab.train(lab.path, "--offline").code == 0
    found = record(lab, run.name, "00_toy-hparams")
    assert found["b"] == "00_toy-hparams-v2"
    assert [each["name"] for each in found["hparams"]] == ["trainer.init.max_epochs", "config.lr"]
    assert (found["code"], found["packages"]) == ([], [])
    results = {each["name"]: (each["a"]["value"], each["b"]["value"]) for each in found["results"]}
    assert results["step"] == (4, 8)
    assert {"best loss/validate", "loss/validate", "loss/train"} <= set(results)
    first, second = lab.runs
    assert results["loss/validate"] == tuple(
        run.metrics["loss/validate"] for run in (first, second)
    )


def test_checkpoints_have_the_results_of_their_sidecars(lab: Lab) -> None:
    """Two of one run differ in nothing but those; how a run ended is no fact of a checkpoint."""
    run = recorded(lab, lab.path, **{"loss/validate": 0.25, "f1": float("nan")})
    metrics = {"loss/validate": 0.5, "f1": None}
    with_checkpoint(run, "best", step=3, epoch=0, monitor="f1", score=0.5, metrics=metrics)
    last = {"loss/validate": 0.25, "f1": None}
    with_checkpoint(run, "last", step=9, epoch=2, monitor="f1", score=None, metrics=last)
    told = lines_of(diff(lab, f"{run.name}@best", f"{run.folder}@last.ckpt").out)
    assert told == [
        f"a {run.name} at best: epoch 1, step 3",
        f"b {run.name} at last: epoch 3, step 9",
        f"results {run.name}@best {run.name}@last change",
        "step 3 9 +6",
        "loss/validate 0.5 0.25 -0.25",
    ]
    assert lines_of(diff(lab, run.checkpoint("best"), f"{run.name}@last").out) == told
    found = record(lab, f"{run.name}@best", run.name)["results"]
    assert [each["name"] for each in found] == ["step", "loss/validate"]
    assert record(lab, f"{run.name}@last", run.name)["equal"]


def test_numbers_that_look_equal_are_shown_in_full(lab: Lab) -> None:
    """Four digits are enough only if they differ."""
    one, other = (recorded(lab, lab.path, loss=value) for value in (0.25, 0.25000001))
    assert "loss 0.25 0.25000001 +1e-08" in lines_of(diff(lab, one.name, other.name).out)


def test_a_run_is_compared_as_it_began(lab: Lab) -> None:
    """Scripts that had changed when it was resumed are none of its own, and a note says so."""
    run = recorded(lab, lab.path)
    later = run.folder / "sources/resumed-1/toys/experiments/00_toy/__main__.py"
    later.parent.mkdir(parents=True)
    later.write_text("import nowhere\n")
    found = record(lab, run.name, lab.path)
    assert (found["code"], found["not_compared"]) == ([], [])
    assert "compared as it began" in found["notes"][0]
    assert lines_of(diff(lab, run.name, lab.path).out)[-1].startswith(f"note {run.name} went on")


# What is given.


def test_what_is_not_there_is_an_error_in_one_line(lab: Lab) -> None:
    """Each names what there is instead, and the command ends with 2."""
    run = recorded(lab, lab.path)
    with_checkpoint(run, "best", step=1)
    with_checkpoint(run, "last", step=1)
    expected = {
        f"{lab.folder}/hparamz.py": "no such file; did you mean hparams.py?",
        str(lab.folder): "is a directory; its hparams scripts: hparams.py",
        "00_toy-hparam": "there is no run '00_toy-hparam' in data/artifacts; did you mean",
        f"{run.folder}0": "there is no run '00_toy-hparams-v10'",
        f"{run.name}@bset": f"run {run.name} has no checkpoint 'bset'; did you mean best?\n"
        "  it has: best, last",
        "00_toy@last": "there is no run '00_toy'",
        "some/where": "some/where: neither an hparams script nor the folder of a run",
        f"{run.name}@": "expected a checkpoint's name",
    }
    for given, message in expected.items():
        for words in ([given, lab.path], [lab.path, given]):
            result = diff(lab, *words)
            assert (result.code, result.out) == (2, "")
            assert result.err.startswith("error: ")
            assert message in result.err
    run.checkpoint("best").with_suffix(".json").write_text("{")
    damaged = diff(lab, f"{run.name}@best", lab.path)
    assert damaged.code == 2
    assert "checkpoints/best.json is missing or damaged" in damaged.err


def test_names_with_an_at_sign(lab: Lab) -> None:
    """A run that has one in its name is found by it, with a checkpoint or without."""
    run = recorded(lab, lab.hparams("rate@last", {"config": {"a": 1}}))
    with_checkpoint(run, "last", step=1, epoch=0, metrics={})
    for given in (run.name, f"{run.name}@last", run.folder, f"{run.folder}@last"):
        found = record(lab, given, lab.folder / "rate@last.py")
        assert found["a"] == run.name + "@last" * str(given).endswith("v1@last")
        assert found["equal"]


def test_a_run_that_was_made_elsewhere_is_compared(lab: Lab, tmp_path: Path) -> None:
    """Its folder may be copied to another machine, where the project has another path."""
    run = recorded(lab, lab.path)
    edited(run, script="/home/them/project/toys/experiments/00_toy/hparams.py")
    copied = run.folder.rename(tmp_path / "copied")
    assert record(lab, copied, lab.path)["equal"]
    lab.config("shuffle=True", "shuffle=False")
    (found,) = record(lab, copied, lab.path)["code"]
    assert found["name"] == "train_config"


def test_what_a_script_prints_is_not_in_the_json(lab: Lab) -> None:
    """Programs read stdout; people read the rest."""
    script = lab.write("loud.py", "print('hello')\nhparams = {}\n")
    result = diff(lab, script, lab.path, "--json")
    assert json.loads(result.out)["b"] == "00_toy/hparams.py"
    assert result.err == "hello\n"


def test_neither_torch_nor_the_config_script_is_needed(lab: Lab) -> None:
    """A comparison of a run with its script imports nothing heavy."""
    project(lab)
    run = recorded(lab, lab.path)
    code = (
        "import sys\nfrom torch_lab.comparing import compared\n"
        f"print(compared({run.name!r}, {lab.path!r}).is_equal)\n"
        "heavy = ('torch', 'pytorch_lightning', 'clearml', 'numpy', 'toys')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=lab.root, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n[]\n", "")
