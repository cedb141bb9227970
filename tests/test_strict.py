"""Keys that may be misspelt: named when a run starts, and refused where the hparams are strict."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import Lab
from torch_lab import cli
from torch_lab.experiment import Experiment
from torch_lab.redaction import MASK
from torch_lab.runs import Run

BASE = """
    hparams = {
        "trainer": {"init": {"max_epochs": 1}},
        "config": {"lr": 0.1},
    }
    """
FOLDER = "toys/experiments/00_toy"


@pytest.fixture
def misspelt(lab: Lab) -> Lab:
    """An experiment whose layer sets a key that its base has not."""
    lab.write("base.py", BASE)
    lab.write(
        "hparams.py",
        """
        from torch_lab.utils import import_script_as_module

        hparams = import_script_as_module("base.py").hparams
        hparams["config"]["lrr"] = 0.2
        """,
    )
    return lab


def told(result: Any) -> str:
    """Return what a command said, with single blanks."""
    return " ".join((result.out + result.err).split())


ADDED = f"{FOLDER}/hparams.py:5 adds config.lrr, which no layer before it has; did you mean "


def test_a_run_warns_of_it(misspelt: Lab) -> None:
    result = misspelt.train(misspelt.path, "--offline")
    assert result.code == 0
    assert ADDED + f"config.lr ({FOLDER}/base.py:4)?" in told(result)
    assert "new(…) around its value says that a key is meant to be new" in told(result)


@pytest.mark.parametrize("words", [["--strict"], ["--set", "strict=True"]])
def test_a_strict_run_refuses_it(misspelt: Lab, words: list[str]) -> None:
    result = misspelt.train(misspelt.path, "--offline", *words)
    assert (result.code, result.out, misspelt.runs) == (2, "", [])
    assert result.err.startswith(f"error: {ADDED}")
    assert "Traceback" not in result.err


def test_strict_hparams_refuse_it(misspelt: Lab) -> None:
    """In every command but those that only show."""
    script = misspelt.folder / "hparams.py"
    with script.open("a") as file:
        file.write('hparams["strict"] = True\n')
    for command, code in ((cli.train, 2), (cli.infer, 2), (cli.explain, 0)):
        result = misspelt._main(command, script)
        assert result.code == code and ADDED in told(result)
    assert misspelt.train(script, "--print").code == 0
    result = misspelt._main(cli.check, script, "--no-batch")
    assert result.code == 1 and "adds config.lrr" in told(result)


def test_what_is_marked_as_new_is_meant(misspelt: Lab) -> None:
    """It is no mistake; that nobody reads it is one still."""
    text = (misspelt.folder / "hparams.py").read_text()
    text = text.replace("import import_script", "import new, import_script")
    misspelt.write("hparams.py", text.replace("= 0.2", "= new(0.2)"))
    assert Experiment.load(misspelt.path, {"strict": True}).added_keys == []
    result = misspelt.train(misspelt.path, "--offline", "--strict")
    assert (result.code, misspelt.runs) == (2, [])
    assert f"train_config never reads config.lrr ({FOLDER}/hparams.py:5)" in told(result)
    misspelt.config('hparams["config"].get("lr", 0.1)', 'sum(hparams["config"].values())')
    result = misspelt.train(misspelt.path, "--offline", "--strict")
    assert result.code == 0 and "warning" not in told(result)
    assert misspelt.run().record.hparams["strict"] is True


def test_many_of_them(lab: Lab) -> None:
    """Eight are named."""
    lab.write("base.py", BASE)
    lab.write(
        "hparams.py",
        """
        from torch_lab.utils import import_script_as_module

        hparams = import_script_as_module("base.py").hparams
        hparams["config"] |= {f"k{number}": number for number in range(11)}
        """,
    )
    result = lab.train(lab.path, "--offline", "--dev-run", "1")
    assert result.code == 0
    assert told(result).count("which no layer before it has") == 8
    assert "to be new, and 3 more" in told(result)


@pytest.mark.parametrize("given", [1, "yes", None])
def test_it_is_true_or_false(lab: Lab, given: object) -> None:
    lab.hparams("hparams", {"strict": given})
    result = lab.train(lab.path)
    assert result.code == 2 and "strict must be True or False, not" in result.err


def test_check_takes_it(misspelt: Lab) -> None:
    """And `--set`, for all scripts."""
    result = misspelt._main(cli.check, misspelt.path, "--no-batch", "--strict")
    assert result.code == 1 and "adds config.lrr" in told(result)
    result = misspelt._main(cli.check, misspelt.path, "--no-batch", "--set", "config.lr=fast")
    assert result.code == 1 and "cannot take the place of 0.1 (float)" in told(result)
    words = ["--set", "config.lr=0.5", "--unset", "config.lrr"]
    result = misspelt._main(cli.check, misspelt.path, *words)
    assert result.code == 0 and "lrr" not in told(result)


def test_explain_takes_overrides(lab: Lab) -> None:
    """They are the last that set a value."""
    lab.hparams("hparams", {"config": {"lr": 0.1, "warmup": 3}})
    words = ["--set", "config.lr=0.5", "--unset", "config.warmup"]
    result = lab._main(cli.explain, lab.path, *words)
    assert result.code == 0
    assert "config.lr 0.5 > --set config.lr 0.5" in told(result)
    assert "config.warmup deleted > --unset config.warmup deleted" in told(result)


def test_the_record_of_a_run_keeps_the_chains(lab: Lab) -> None:
    """From the base on, with the files as `sources/` have them; secrets are not kept."""
    lab.write("base.py", BASE.replace('"lr": 0.1', '"lr": 0.1, "api_key": "hunter22", "gone": 1'))
    lab.write(
        "hparams.py",
        """
        from torch_lab.utils import DELETE, layer

        hparams = layer("base.py", config={"lr": 0.2, "gone": DELETE})
        """,
    )
    assert lab.train(lab.path, "--offline", "--set", "config.lr=0.3").code == 0
    run = lab.run()
    chains = run.record.provenance
    base, own = f"{FOLDER}/base.py", f"{FOLDER}/hparams.py"
    assert chains["config.lr"] == [
        {"file": base, "line": 4, "source": "", "value": "0.1"},
        {"file": own, "line": 4, "source": "", "value": "0.2"},
        {"file": None, "line": 0, "source": "--set config.lr", "value": "0.3"},
    ]
    assert [each["value"] for each in chains["config.gone"]] == ["1", "deleted"]
    assert chains["config.api_key"][0]["value"] == repr(MASK)
    assert "hunter22" not in (run.folder / "run.json").read_text()
    assert all((run.folder / "sources" / file).is_file() for file in (base, own))
    assert Run.read(run.folder).record.provenance == chains


def test_a_difference_shows_what_was_set_for_the_time(lab: Lab) -> None:
    """Of a run that was started with `--set`."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1}}, "config": {"lr": 0.1}})
    assert lab.train(lab.path, "--offline", "--set", "config.lr=0.3").code == 0
    result = lab._main(cli.diff, lab.run().name, lab.path)
    assert "config.lr 0.3 (--set config.lr) 0.1 (hparams.py:1)" in told(result)
    found = json.loads(lab._main(cli.diff, lab.run().name, lab.path, "--json").out)
    assert found["hparams"][0]["a"] == {"value": 0.3, "source": "--set config.lr"}
