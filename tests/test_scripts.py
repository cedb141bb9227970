"""Scripts as modules: afresh each time, with siblings, and known by name to every process."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from torch_lab.errors import ScriptError
from torch_lab.scripts import layers_of
from torch_lab.utils import dict_as_str, import_script_as_module, process_rank

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A function that writes a script in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


LAYER = "from torch_lab.utils import import_script_as_module\n"


def test_every_call_runs_the_script_afresh(write: Write) -> None:
    """Two layers never share a dictionary, and an edit is seen at once."""
    path = write("base.py", "hparams = {'a': {'b': 1}}")
    first, second = import_script_as_module(path), import_script_as_module(path)
    first.hparams["a"]["b"] = 2
    assert second.hparams == {"a": {"b": 1}}
    write("base.py", "hparams = {'a': {'b': 3}}")
    assert import_script_as_module(path).hparams == {"a": {"b": 3}}
    assert not list(path.parent.glob("__pycache__"))


@pytest.mark.parametrize("form", ["absolute", "relative", "home"])
def test_paths_of_every_form_are_found(
    write: Write, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Absolute, relative to the working directory, and below `~`."""
    path = write("some where/base.py", "value = 5")
    monkeypatch.setenv("HOME", str(path.parent.parent))
    forms = {"absolute": path, "relative": "some where/base.py", "home": "~/some where/base.py"}
    assert import_script_as_module(forms[form]).value == 5


def test_a_layers_relative_path_starts_at_the_layer(write: Write) -> None:
    """The calling script's folder comes first, the working directory second."""
    write("base.py", "value = 'here'")
    write("only.py", "value = 'only here'")
    write("deep/base.py", "value = 'deep'")
    top = write(
        "deep/top.py",
        f"{LAYER}base = import_script_as_module('base.py').value\n"
        "only = import_script_as_module('only.py').value\n",
    )
    module = import_script_as_module(top)
    assert (module.base, module.only) == ("deep", "only here")


def test_layers_are_told_from_the_base_up(write: Write) -> None:
    """Each with the hparams that it ended with, whatever the layers above did to them."""
    write("base.py", "hparams = {'lr': 1}")
    write(
        "middle.py",
        f"{LAYER}hparams = import_script_as_module('base.py').hparams\nhparams['lr'] = 2",
    )
    top = write(
        "top.py", f"{LAYER}hparams = import_script_as_module('middle.py').hparams\nhparams['n'] = 3"
    )
    layers = layers_of(import_script_as_module(top))
    assert [layer.path.name for layer in layers] == ["base.py", "middle.py", "top.py"]
    assert [layer.hparams for layer in layers] == [{"lr": 1}, {"lr": 2}, {"lr": 2, "n": 3}]


def test_main_blocks_do_not_run_and_dataclasses_work(write: Write) -> None:
    """The module has a name of its own, and is registered under it."""
    path = write(
        "base.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int = 1\n"
        "if __name__ == '__main__':\n    raise SystemExit\n",
    )
    module = import_script_as_module(path)
    assert module.Point(2).x == 2
    assert sys.modules[module.__name__] is module
    assert pickle.loads(pickle.dumps(module.Point(3))).x == 3


def test_siblings_are_importable_and_nothing_is_left(write: Write) -> None:
    """Absolutely and relatively, packages too; `sys.path` and short names are untouched."""
    write("helper.py", "class Net: pass")
    write("package/__init__.py", "")
    write("package/inner.py", "from helper import Net")
    path = write(
        "script.py",
        "import helper, package.inner\nfrom . import helper as same\n"
        "from .package.inner import Net\n"
        "assert helper is same and Net is helper.Net is package.inner.Net\n",
    )
    before = list(sys.path)
    module = import_script_as_module(path)
    assert sys.path == before
    assert "helper" not in sys.modules and "package.inner" not in sys.modules
    assert pickle.loads(pickle.dumps(module.helper.Net())).__class__ is module.helper.Net


def test_two_experiments_may_have_siblings_of_the_same_name(write: Write) -> None:
    """Each gets its own."""
    for name in ("a", "b"):
        write(f"{name}/helper.py", f"value = '{name}'")
        write(f"{name}/script.py", "import helper")
    found = [import_script_as_module(f"{name}/script.py").helper.value for name in ("a", "b")]
    assert found == ["a", "b"]


def test_siblings_do_not_hide_the_standard_library(write: Write) -> None:
    """A sibling named like one of its modules is left alone."""
    write("colorsys.py", "raise RuntimeError")
    path = write("script.py", "import colorsys")
    assert import_script_as_module(path).colorsys.rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0)


def report(thing: object, answers: multiprocessing.SimpleQueue) -> None:  # type: ignore[type-arg]
    """Send back what a spawned process makes of `thing`."""
    answers.put((type(thing).__name__, vars(thing)))


@pytest.mark.parametrize("name", ["Own", "Other"])
def test_spawned_processes_unpickle_classes_of_scripts(write: Write, name: str) -> None:
    """A process that never ran the script imports it by its name, siblings and all."""
    write("with space/other.py", "class Other: pass")
    path = write("with space/v1.2.py", "from other import Other\nclass Own: pass")
    import_script_as_module(path)
    thing = getattr(import_script_as_module(path), name)()
    thing.value = 7
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=report, args=(thing, answers))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert answers.get() == (name, {"value": 7})


def test_a_circle_is_shown(write: Write) -> None:
    """Scripts that import each other are refused, with the way around."""
    write("a.py", f"{LAYER}import_script_as_module('b.py')")
    write("b.py", f"{LAYER}import_script_as_module('a.py')")
    with pytest.raises(ScriptError, match=r"in a circle: a\.py -> b\.py -> a\.py"):
        import_script_as_module("a.py")


def test_what_is_no_script_is_refused(write: Write, tmp_path: Path) -> None:
    """Missing files with the nearest name, directories as such."""
    write("base.py", "")
    with pytest.raises(ScriptError, match=r"no such script; did you mean base\.py\?"):
        import_script_as_module("bse.py")
    with pytest.raises(ScriptError, match=r"no such script$"):
        import_script_as_module("nowhere/base.py")
    with pytest.raises(ScriptError, match="is a directory"):
        import_script_as_module(tmp_path)


def test_a_failing_script_can_be_run_again(write: Write) -> None:
    """An exception leaves neither a module nor a finder behind."""
    path = write("base.py", "1 / 0")
    finders = list(sys.meta_path)
    with pytest.raises(ZeroDivisionError):
        import_script_as_module(path)
    assert sys.meta_path == finders
    write("base.py", "value = 1")
    assert import_script_as_module(path).value == 1


def test_a_dictionary_is_shown_by_dotted_keys() -> None:
    """One line for each leaf."""
    assert dict_as_str({"a": {"b": 1, "c": {}}, "d": "x"}) == "a.b: 1\na.c: {}\nd: 'x'"


RANKS: list[tuple[dict[str, str], bool]] = [
    ({}, True),
    ({"RANK": "3", "LOCAL_RANK": "1"}, False),
    ({"SLURM_PROCID": "2"}, False),
    ({"LOCAL_RANK": "1"}, False),
    ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
    ({"GROUP_RANK": "2"}, False),
    ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
]


@pytest.mark.parametrize(("environment", "is_zero"), RANKS)
def test_the_launcher_tells_the_rank(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_zero: bool
) -> None:
    """Only one process of all is rank zero, whichever launcher started it."""
    for name in (
        "RANK",
        "SLURM_PROCID",
        "JSM_NAMESPACE_RANK",
        "NODE_RANK",
        "GROUP_RANK",
        "LOCAL_RANK",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (process_rank() == 0) is is_zero
