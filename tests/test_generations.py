"""Scripts that are loaded again run afresh with their siblings, and what was loaded stays whole."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import sys
from typing import TYPE_CHECKING

import pytest

import torch_lab
from torch_lab.experiment import Experiment
from torch_lab.scripts import import_script_as_module

if TYPE_CHECKING:
    from conftest import Lab  # A spawned process imports this file, and shall not import torch.


def test_scripts_of_one_experiment_share_their_siblings(lab: Lab) -> None:
    """A class of a sibling is the same for the hparams and for the config script."""
    lab.write("helper.py", "class Rate(float): pass")
    lab.write("hparams.py", "from helper import Rate\nhparams = {'config': {'lr': Rate(0.1)}}")
    check = "import helper\n    assert type(hparams['config']['lr']) is helper.Rate\n    module ="
    lab.config("module =", check)
    first, second = torch_lab.load(lab.path), torch_lab.load(lab.path)
    for experiment in (first, second, first):
        experiment.build()
    one, other = (type(each.hparams["config"]["lr"]) for each in (first, second))
    assert one is not other


def report(thing: object, answers: multiprocessing.SimpleQueue) -> None:  # type: ignore[type-arg]
    """Send back what a spawned process makes of `thing`."""
    answers.put((type(thing).__module__.rpartition("/")[2], vars(thing)))


def test_objects_of_every_generation_can_be_pickled(lab: Lab) -> None:
    """Also of one whose scripts were loaded again since, and for a spawned process."""
    lab.write("package/__init__.py", "from .inner import Net")
    lab.write("package/inner.py", "class Net: pass")
    lab.write("hparams.py", "import package\nhparams = {'config': {'net': package.Net()}}")
    nets = [torch_lab.load(lab.path).hparams["config"]["net"] for _ in range(2)]
    for number, net in enumerate(nets):
        net.value = number
        assert type(pickle.loads(pickle.dumps(net))) is type(net)
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=report, args=(nets[1], answers))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    name, values = answers.get()
    assert re.fullmatch(r"00_toy#\d+\.package\.inner", name) and values == {"value": 1}


def test_a_preset_that_a_script_has_changed_is_whole_again(lab: Lab) -> None:
    """What one load does to a dictionary of a sibling, the next one does not see."""
    lab.write("presets.py", "adam = {'lr': 0.1}")
    path = lab.write("changing.py", "from presets import adam\nadam['lr'] *= 2\nhparams = adam")
    assert [import_script_as_module(path).hparams for _ in range(2)] == [{"lr": 0.2}] * 2


def test_the_sources_are_those_of_the_generation(lab: Lab) -> None:
    """A sibling that an edited script imports no more is none of it."""
    lab.write("helper.py", "")
    lab.write("hparams.py", "import helper\nhparams = {}")
    before = Experiment.load(lab.path)
    lab.write("hparams.py", "hparams = {}")
    after = Experiment.load(lab.path)
    names = [{path.name for path in each.scripts} for each in (before, after)]
    assert names == [{"helper.py", "hparams.py", "__main__.py"}, {"hparams.py", "__main__.py"}]


def test_a_layer_of_another_folder_is_of_the_same_generation(lab: Lab) -> None:
    """It runs afresh as well, and finds its own siblings."""
    lab.write("../00_base/helper.py", "rate = 1")
    lab.write(
        "../00_base/hparams.py", "from helper import rate\nhparams = {'config': {'lr': rate}}"
    )
    lab.write("helper.py", "factor = 2")
    lab.write(
        "hparams.py",
        "from helper import factor\nfrom torch_lab.utils import import_script_as_module\n"
        "hparams = import_script_as_module('../00_base/hparams.py').hparams\n"
        "hparams['config']['lr'] *= factor",
    )
    found = [torch_lab.load(lab.path).hparams["config"]["lr"]]
    lab.write("../00_base/helper.py", "rate = 3")
    found.append(torch_lab.load(lab.path).hparams["config"]["lr"])
    assert found == [2, 6]


def test_a_module_of_a_package_imports_as_in_python(lab: Lab) -> None:
    """By a bare name what is beside the script, not what is beside itself."""
    lab.write("package/__init__.py", "")
    lab.write("package/inner.py", "from other import place")
    lab.write("package/other.py", "place = 'in the package'")
    lab.write("other.py", "place = 'beside the script'")
    path = lab.write(
        "hparams.py", "from package.inner import place\nhparams = {'config': {0: place}}"
    )
    assert import_script_as_module(path).hparams == {"config": {0: "beside the script"}}


@pytest.mark.parametrize("edited", ["helper.py", "package/__init__.py", "package/inner.py"])
def test_an_edit_in_the_same_second_is_seen(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, edited: str
) -> None:
    """Of a sibling, however small; and nothing is cached beside it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for name in ("helper.py", "package/__init__.py", "package/inner.py"):
        lab.write(name, "rate = 1")
    path = lab.write(
        "hparams.py",
        "import helper, package.inner\nhparams = [helper.rate, package.rate, package.inner.rate]",
    )
    assert import_script_as_module(path).hparams == [1, 1, 1]
    lab.write(edited, "rate = 2")
    assert sorted(import_script_as_module(path).hparams) == [1, 1, 2]
    assert not list(lab.folder.rglob("__pycache__"))


def test_a_script_finds_its_siblings_again_after_a_layer(lab: Lab) -> None:
    """Also those whose names the layer has had for its own."""
    lab.write("../00_base/helper.py", "place = 'base'")
    lab.write("../00_base/hparams.py", "import helper\nhparams = {'base': helper.place}")
    lab.write("helper.py", "place = 'own'")
    path = lab.write(
        "hparams.py",
        "import helper\nfrom torch_lab.utils import import_script_as_module\nfirst = helper\n"
        "hparams = import_script_as_module('../00_base/hparams.py').hparams\n"
        "import helper\nassert helper is first\nhparams['own'] = helper.place",
    )
    assert import_script_as_module(path).hparams == {"base": "base", "own": "own"}


def test_a_sibling_may_stand_on_a_script_elsewhere(lab: Lab) -> None:
    """While it is being imported, from within a package: all finds what it should."""
    lab.write("../00_base/inner.py", "place = 'base'")
    lab.write("../00_base/hparams.py", "import inner\nhparams = {'base': inner.place}")
    lab.write("package/__init__.py", "")
    lab.write("package/inner.py", "import inner\nplace = inner.hparams['base']")
    lab.write(
        "inner.py",
        "from torch_lab.utils import import_script_as_module\n"
        "hparams = import_script_as_module('../00_base/hparams.py').hparams",
    )
    path = lab.write("hparams.py", "from package.inner import place\nhparams = {'place': place}")
    assert import_script_as_module(path).hparams == {"place": "base"}
