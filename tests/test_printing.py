"""`train … --print` and `train path --help`: what the hparams are, before anything runs."""

from __future__ import annotations

import enum
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Lab
from torch_lab.experiment import Experiment
from torch_lab.printing import as_python
from torch_lab.runs import decoded

LAYER = "from torch_lab.utils import import_script_as_module\n"


def pasted(text: str) -> dict[str, Any]:
    """Return the hparams of a script with this text."""
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    hparams: dict[str, Any] = namespace["hparams"]
    return hparams


# As Python.


def test_what_is_printed_can_be_pasted(lab: Lab) -> None:
    """As an hparams script it makes the same experiment, defaults and all; nothing is created."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 2}}, "config": {"lr": 0.1}})
    lab.write(
        "high.py",
        f"{LAYER}hparams = import_script_as_module('hparams.py').hparams\n"
        "hparams['config'] |= {'lr': 0.1 * 3, 'steps': (1, [2, {'a': None}])}\nprint('loud')",
    )
    before = sorted(lab.root.rglob("*"))
    done = lab.train(lab.folder / "high.py", "--print")
    assert (done.code, done.err) == (0, "loud\n")
    assert done.out.startswith('# toys/experiments/00_toy/high.py\nhparams = {\n    "task": {')
    assert sorted(lab.root.rglob("*")) == before
    script = lab.write("pasted.py", done.out)
    again, first = (Experiment.load(path).hparams for path in (script, lab.folder / "high.py"))
    assert again.as_dict() == first.as_dict() and again.config["steps"] == (1, [2, {"a": None}])


def test_several_scripts_are_printed_one_after_another(lab: Lab) -> None:
    """Each under its name."""
    other = lab.hparams("other", {"seed": 3})
    done = lab.train(lab.path, other, "--print")
    assert done.code == 0
    lines = [line for line in done.out.splitlines() if line.startswith(("#", "hparams"))]
    paths = [f"# toys/experiments/00_toy/{name}.py" for name in ("hparams", "other")]
    assert lines == [paths[0], "hparams = {", paths[1], "hparams = {"]


def test_json_keeps_the_types(lab: Lab) -> None:
    """As the record of a run does; one line for each script."""
    values = {"shape": (1, 2), "limit": math.inf, "place": Path("data"), "set": {1}}
    imports = "from math import inf\nfrom pathlib import Path, PosixPath\n"
    script = lab.write("hparams.py", f"{imports}hparams = {{'config': {values}}}")
    done = lab.train(script, lab.hparams("other", {}), "--print", "--json")
    first, second = (decoded(json.loads(line)) for line in done.out.splitlines())
    assert first["config"] == values and second["config"] == {}


def test_what_options_change_is_printed(lab: Lab) -> None:
    """A dev run, debugging and overrides have hparams of their own."""
    done = lab.train(lab.path, "--print", "--dev-run", "2", "--debug")
    init = pasted(done.out)["trainer"]["init"]
    assert init["overfit_batches"] == 2 and init["detect_anomaly"] is True
    script = lab.hparams("more", {"trainer": {"init": {"max_epochs": 2}}, "config": {"lr": 1}})
    words = ["--set", "trainer.init.max_epochs=7", "--unset", "config.lr"]
    found = pasted(lab.train(script, "--print", *words).out)
    assert found["trainer"]["init"] == {"max_epochs": 7} and found["config"] == {}
    refused = lab.train(lab.path, "--print", "--dev-run", "none")
    assert refused.code == 2 and refused.out == ""


def test_a_mistake_is_one_here_as_well(lab: Lab) -> None:
    """Wrong hparams are not printed."""
    done = lab.train(lab.hparams("wrong", {"sed": 1}), "--print")
    assert (done.code, done.out) == (2, "") and "did you mean seed?" in done.err


def test_secrets_are_masked(lab: Lab) -> None:
    """In what is printed, in JSON, and in the help; wherever they are in a value."""
    keys = {"api_key": "tops3cret", "tokens": 3, "passwords": ("tops3cret", ["tops3cret"])}
    lab.hparams("hparams", {"config": {**keys, "url": "http://me:tops3cret@host"}})
    for words in (["--print"], ["--print", "--json"], ["--help"]):
        done = lab.train(lab.path, *words)
        assert done.code == 0 and "***" in done.out and "tops3cret" not in done.out
        assert "http://me:***@host" in done.out


class Colour(enum.Enum):
    """Something with members."""

    RED = 1


VALUES: list[tuple[object, str]] = [
    (None, "None"),
    (True, "True"),
    (1e-3, "0.001"),
    (math.inf, 'float("inf")'),
    (2j, "2j"),
    (b"a", "b'a'"),
    ("it's", '"it\'s"'),
    ('say "x"', "'say \"x\"'"),
    ("'\"\n\\", "'\\'\"\\n\\\\'"),
    ("ü\t", '"ü\\t"'),
    ([], "[]"),
    ([1, "a"], '[1, "a"]'),
    ((), "()"),
    ((1,), "(1,)"),
    (set(), "set()"),
    ({2}, "{2}"),
    (frozenset(), "frozenset()"),
    (frozenset({3}), "frozenset({3})"),
    ({}, "{}"),
    ({1: {"a": (2,)}}, '{1: {"a": (2,)}}'),
    (int, "int"),
    (len, "len"),
    (math.sqrt, "math.sqrt"),
    (Path("a b"), 'Path("a b")'),
    (Colour.RED, "test_printing.Colour.RED"),
    (Lab.write, "conftest.Lab.write"),
]


@pytest.mark.parametrize(("value", "expected"), VALUES, ids=[each[1] for each in VALUES])
def test_values_are_written_as_python(value: object, expected: str) -> None:
    """And read back as they were."""
    text = as_python({"config": {"value": value}})
    assert f'"config": {{"value": {expected}}},' in text
    assert pasted(text)["config"]["value"] == value


def test_nan_is_written_too() -> None:
    """It equals nothing."""
    assert math.isnan(pasted(as_python({"config": math.nan}))["config"])


def test_what_has_no_text_is_left_out_with_a_word() -> None:
    """An object, a lambda, a class of a function: the rest can still be pasted."""

    class Local:
        """Out of reach."""

        def __repr__(self) -> str:
            return "Local with a representation\n  that is too long to be shown"

    values = {"object": Local(), "list": [1, lambda: 2], "class": Local, "kept": 3}
    text = as_python({"config": values})
    assert '"object": ...,  # Local with a representation that is too…' in text
    assert pasted(text)["config"] == {"object": ..., "list": [1, ...], "class": ..., "kept": 3}


def test_long_values_go_over_several_lines() -> None:
    """None is wider than the project's own code, as long as there is where to fold."""
    values = {"words": ["word"] * 40, "nested": ({"key": "x" * 40, "other": "y" * 60},)}
    text = as_python({"config": values})
    assert max(map(len, text.splitlines())) <= 100
    assert pasted(text)["config"] == values


# In the help.


def test_help_tells_of_the_experiment(lab: Lab) -> None:
    """What the scripts say of themselves, and each key with its value and the line that sets it."""
    lab.write(
        "hparams.py",
        'hparams = {\n    "trainer": {"init": {"max_epochs": 2}},\n'
        '    "config": {"lr": 0.1, "steps": [1], "gone": 1},\n}\n',
    )
    lab.write(
        "high.py",
        '"""A higher rate.\n\n    train high.py  # as it stands\n\nResult: none.\n"""\n'
        f"{LAYER}hparams = import_script_as_module('hparams.py').hparams\n"
        "hparams['config']['lr'] *= 3\nhparams['config']['steps'].append(2)\n"
        "del hparams['config']['gone']\nprint('loud')\n",
    )
    before = sorted(lab.root.rglob("*"))
    done = lab.train(lab.folder / "high.py", "--help")
    assert done.code == 0 and done.out.startswith("Usage: train [OPTIONS] PATH...")
    assert done.out.partition("Show this message and exit.\n")[2] == (
        "\ntoys/experiments/00_toy/__main__.py:\n  A network learns the sign of a sum.\n"
        "\ntoys/experiments/00_toy/high.py:\n  A higher rate.\n\n"
        "      train high.py  # as it stands\n\n  Result: none.\n"
        "\nHparams:\n"
        "  trainer.init.max_epochs  2                    hparams.py:2\n"
        "  config.lr                0.30000000000000004  high.py:9\n"
        "  config.steps             [1, 2]               high.py:10\n"
    )
    assert sorted(lab.root.rglob("*")) == before


def test_the_words_of_a_help_may_come_in_any_order(lab: Lab) -> None:
    """Options and their values are no paths."""
    for words in (
        ["-h", lab.path],
        ["--jobs", "2", lab.path, "--help"],
        ["--resume", lab.path, "-h"],
    ):
        assert "trainer.init.max_epochs  2  hparams.py:1" in lab.train(*words).out


def test_overrides_and_what_follows_others_are_in_the_help(lab: Lab) -> None:
    """With what they come from; a wrong one costs no help."""
    lab.write(
        "hparams.py",
        "from torch_lab.utils import ref\n"
        "hparams = {'config': {'lr': 1.0, 'half': ref('config.lr')}, 'seed': 1}",
    )
    done = lab.train(lab.path, "--help", "--set", "config.lr=0.5", "--unset", "seed")
    assert done.out.endswith(
        "\nHparams:\n  config.lr    0.5  --set config.lr\n"
        "  config.half  0.5  hparams.py:2, follows config.lr\n"
    )
    done = lab.train(lab.path, "--help", "--set", "config.rl=0.5")
    assert done.code == 0 and "\nThe experiment is not shown: --set config.rl" in done.out


def test_a_layer_of_another_folder_is_named_in_full(lab: Lab) -> None:
    """The line is one of a file that lies elsewhere."""
    lab.write("../01_b/__main__.py", "")
    script = lab.write(
        "../01_b/hparams.py",
        f"{LAYER}hparams = import_script_as_module('../00_toy/hparams.py').hparams",
    )
    assert "2  toys/experiments/00_toy/hparams.py:1" in lab.train(script, "--help").out


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "1 / 0",
            "ZeroDivisionError: division by zero (toys/experiments/00_toy/hparams.py, line 1)",
        ),
        ("hparams = {", "toys/experiments/00_toy/hparams.py:1: '{' was never closed"),
        (
            "hparams = {'sed': 1}",
            "toys/experiments/00_toy/hparams.py:1: hparams has the unknown key",
        ),
        (
            "raise SystemExit('no\\nway')",
            "SystemExit: no way (toys/experiments/00_toy/hparams.py, l",
        ),
        (None, "toys/experiments/00_toy/hparam.py: no such file; did you mean hparams.py?"),
    ],
    ids=["exception", "syntax", "wrong key", "exit", "no file"],
)
def test_a_script_that_fails_costs_no_help(lab: Lab, text: str | None, why: str) -> None:
    """The usual help comes, with a line that says why there is no more."""
    path = "toys/experiments/00_toy/hparam.py" if text is None else lab.write("hparams.py", text)
    done = lab.train(path, "--help")
    assert (done.code, done.err) == (0, "")
    usual, _, last = done.out.rpartition("\n\n")
    assert usual == lab.train("--help").out.rstrip() and last.count("\n") == 1
    assert last.startswith(f"The experiment is not shown: {why}")


def test_torch_is_imported_by_none_of_it(lab: Lab) -> None:
    """Nor is anything else that takes its time."""
    code = (
        "import sys\nfrom torch_lab.cli import main, train\n"
        f"for words in (['--print'], ['--help']):\n"
        f"    assert main(train, 'train', [{lab.path!r}, *words]) == 0\n"
        "print([name for name in ('torch', 'clearml', 'numpy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
