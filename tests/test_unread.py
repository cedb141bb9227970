"""Keys of `config` that are set and that `train_config` never reads are named, with their lines."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from conftest import CONFIG, Lab
from torch_lab.errors import HparamsError
from torch_lab.experiment import Experiment


@pytest.fixture(autouse=True)
def in_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "torch_lab")


def warnings_of(lab: Lab, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    """Return what is warned of when the components are made."""
    caplog.clear()
    Experiment.load(lab.path, **options).train_components()
    return [record.getMessage() for record in caplog.records]


def reading(body: str) -> str:
    """Return a config script whose `train_config` does `body` first."""
    start = "def train_config(hparams):\n"
    assert start in CONFIG
    return CONFIG.replace(start, f"{start}    {body}\n")


def test_a_key_that_is_never_read(lab: Lab) -> None:
    """The command warns of it, with the line that set it, and trains."""
    lab.write(
        "base.py", 'hparams = {\n    "config": {\n        "lr": 0.1,\n        "lrr": 1,\n    },\n}'
    )
    lab.write(
        "hparams.py",
        """
        from torch_lab.utils import import_script_as_module

        hparams = import_script_as_module("base.py").hparams
        hparams["trainer"] = {"init": {"max_epochs": 1}}
        hparams["config"]["warmup"] = {"steps": 3}
        hparams["config"]["monitor"] = "loss/validate"
        hparams["config"]["monitor_mode"] = "min"
        """,
    )
    result = lab.train(lab.path, "--offline")
    assert result.code == 0
    told = " ".join(result.err.split())
    folder = "toys/experiments/00_toy"
    assert f"{folder}/__main__.py: train_config never reads config.lrr ({folder}/base.py:4)" in told
    assert f"config.warmup.steps ({folder}/hparams.py:6)" in told
    assert "monitor (" not in told and "config.lr (" not in told


def test_nothing_is_said_when_all_is_read(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Nor of the section that is ours, nor of what `--dev-run` adds."""
    lab.hparams("hparams", {"config": {"lr": 0.1, "model": {"dim": 3}, "monitor": "loss/validate"}})
    lab.write("__main__.py", reading('dict(**hparams["config"]["model"])'))
    assert warnings_of(lab, caplog) == []
    result = lab.train(lab.path, "--offline", "--dev-run", "1")
    assert result.code == 0 and "never reads" not in result.err
    lab.write("__main__.py", CONFIG)
    lab.hparams("hparams", {"config": {}, "trainer": {"init": {"max_epochs": 1}}})
    result = lab.train(lab.path, "--offline", "--dev-run", "1")
    assert result.code == 0 and "never reads" not in result.err


def test_strict(lab: Lab) -> None:
    """It is an error that says where, and nothing is created."""
    lab.hparams("hparams", {"config": {"lrr": 0.1}})
    with pytest.raises(HparamsError, match=r"never reads config\.lrr \(.*hparams\.py:1\)"):
        Experiment.load(lab.path, {"strict": True}).train_components()
    assert lab.runs == []


def test_many_keys(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Twenty of them are named, and all where they are an error."""
    lab.hparams("hparams", {"config": {f"k{number}": number for number in range(23)}})
    (told,) = warnings_of(lab, caplog)
    assert "config.k19 (" in told and "config.k20" not in told and told.endswith(" and 3 more")
    with pytest.raises(HparamsError, match=r"config\.k22 \("):
        Experiment.load(lab.path, {"strict": True}).train_components()


def test_a_cycle_holds_nothing(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Such as the frame that Lightning's `save_hyperparameters` leaves behind."""
    lab.hparams("hparams", {"config": {"lr": 0.1, "lrr": 1}})
    body = "import inspect; frame = inspect.currentframe(); hparams['config']['lr']"
    lab.write("__main__.py", reading(body))
    (told,) = warnings_of(lab, caplog)
    assert "never reads config.lrr" in told


def test_strict_hparams_say_what_is_kept(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """A component may read it later: that is no error, and not passed over in silence."""
    lab.hparams("hparams", {"strict": True, "config": {"lr": 0.1, "later": 1}})
    lab.write("__main__.py", reading("train_config.kept = hparams['config']"))
    (told,) = warnings_of(lab, caplog)
    assert told.startswith("not read so far, and kept, so perhaps later: config.later (")


def test_keys_in_lists(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """They are named by their indices, with the line of the list."""
    given = 'hparams = {"config": {"parts": []}}'
    layer = 'hparams["config"]["parts"] = [{"lr": 1, "dim": 2}, {"dim": 3}]'
    lab.write("hparams.py", f"{given}\n\n{layer}\n")
    lab.write("__main__.py", reading('[part["dim"] for part in hparams["config"]["parts"]]'))
    (told,) = warnings_of(lab, caplog)
    assert "config.parts[0].lr (" in told and told.endswith("hparams.py:3)")


def test_what_the_components_hold_may_be_read_later(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    """No key of a dictionary that a factory keeps is named; those around it are."""
    lab.hparams("hparams", {"config": {"lrr": 1, "optimizer": {"lr": 0.1, "momentum": 0.9}}})
    lab.config(
        'functools.partial(torch.optim.SGD, lr=hparams["config"].get("lr", 0.1))',
        'functools.partial(made, kept=hparams["config"]["optimizer"])',
    )
    text = (lab.folder / "__main__.py").read_text()
    lab.write(
        "__main__.py", text + "\n\ndef made(p, kept):\n    return torch.optim.SGD(p, **kept)\n"
    )
    (told,) = warnings_of(lab, caplog)
    assert "config.lrr (" in told and "optimizer" not in told
    assert lab.train(lab.path, "--offline", "--dev-run", "1").code == 0


def test_the_scripts_see_ordinary_dictionaries(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Outside of `config`, which is a dictionary by every test but that of its type."""
    lab.hparams("hparams", {"config": {"lr": 0.1}, "trainer": {"init": {"max_epochs": 1}}})
    check = 'assert type(hparams) is type(hparams["trainer"]) is dict'
    lab.write("__main__.py", reading(f'{check} and isinstance(hparams["config"], dict)'))
    assert warnings_of(lab, caplog) == []
