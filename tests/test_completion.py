"""What a shell completes, asked as shells ask: with their words in the environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pexpect
import pytest

from conftest import Lab
from torch_lab import cli, completion
from torch_lab.outline import keys_in

FOLDER = "toys/experiments/00_toy/"
HEAVY = ("torch", "pytorch_lightning", "clearml", "torchmetrics", "numpy", "rich", "pydantic")
COMMANDS = {"train": cli.train, "infer": cli.infer, "torch-lab": cli.torch_lab}
LAYER = "from torch_lab.utils import import_script_as_module\n"

Ask = Callable[..., list[str]]


def variables(shell: str, line: str) -> dict[str, str]:
    """Return what a shell puts into the environment to have the last word of a line completed."""
    words = line.split(" ")
    if shell == "bash":
        # Readline takes words apart at each `=`.
        words = [part for word in words for part in re.split("(=)", word) if part or not word]
    name = words[0].replace("-", "_").upper()
    current = words[-1] if shell == "fish" else str(len(words) - 1)
    told = {"COMP_WORDS": " ".join(words), "COMP_CWORD": current}
    return {**told, f"_{name}_COMPLETE": f"{shell}_complete"}


@pytest.fixture
def ask(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """A function that has the last word of a line completed."""

    def ask(line: str, shell: str = "bash") -> list[str]:
        with monkeypatch.context() as patch:
            for name, value in variables(shell, line).items():
                patch.setenv(name, value)
            program = line.partition(" ")[0]
            lab.capsys.readouterr()
            with pytest.raises(SystemExit) as left:
                cli.main(COMMANDS[program], program, [])
        assert left.value.code == 0
        return [found for found in lab.capsys.readouterr().out.splitlines() if found]

    return ask


def values(found: list[str]) -> list[str]:
    """Return the completions without their kinds and explanations."""
    return [line.split("\t")[1] for line in found]


# Paths.


def test_paths_lead_to_hparams_scripts_alone(lab: Lab, ask: Ask) -> None:
    """No config script, no package's file, no sibling that holds no hparams, no other text."""
    lab.hparams("high", {})
    lab.write("helper.py", "rate = 0.1")
    lab.write("notes.txt", "hparams = {}")
    lab.write("__init__.py", "hparams = {}")
    lab.write("taken.py", "from presets import hparams")
    lab.write("inner/module.py", "hparams = {}")
    (lab.root / "docs").mkdir()
    (lab.root / "tool").mkdir()
    (lab.root / "tool" / "__main__.py").write_text("print('a program')")
    (lab.root / "tool" / "options.py").write_text("hparams = {}")
    scripts = [f"path\t{FOLDER}{name}.py" for name in ("high", "hparams", "taken")]
    assert ask(f"train {FOLDER}") == scripts
    assert ask("train ") == ask("train to") == scripts  # There is only one way.
    assert ask(f"train {FOLDER}hi") == [scripts[0]]
    assert ask(f"train {FOLDER}hparams.py {FOLDER}hi") == [scripts[0]]
    assert ask("train docs/") == ask("train nowhere/") == ask("train tool/") == []


def test_folders_on_the_way_are_offered(lab: Lab, ask: Ask, tmp_path: Path) -> None:
    """Those that lead to an experiment: none that is hidden, a run's, or an environment's."""
    for name in ("01_other", ".hidden"):
        shutil.copytree(lab.folder, lab.folder.parent / name)
    kept = lab.root / "data/artifacts/00_toy-hparams-v1"
    shutil.copytree(lab.folder, kept / "sources")
    (kept / "run.json").touch()
    shutil.copytree(lab.folder, lab.root / "env/lib/experiment")
    (lab.root / "env/pyvenv.cfg").touch()
    found = ["toys/experiments/00_toy", "toys/experiments/01_other"]
    assert values(ask("train ")) == found
    assert values(ask("train ", "zsh")) == values(ask("train ", "fish")) == [f"{x}/" for x in found]
    assert [line.split("\t")[0] for line in ask("train ", "zsh")] == ["part", "part"]
    assert values(ask("train toys/experiments/.h")) == ["toys/experiments/.hidden/hparams.py"]


def test_paths_may_begin_anywhere(lab: Lab, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the root, at home, or above; and they stay as they were typed."""
    monkeypatch.setenv("HOME", str(lab.root))
    assert values(ask(f"train {lab.folder}/h")) == [lab.path]
    assert values(ask("train ~/toys/")) == [f"~/{FOLDER}hparams.py"]
    assert values(ask("train ~/toys/", "zsh")) == [f"~/{FOLDER}hparams.py"]
    monkeypatch.chdir(lab.folder)
    assert values(ask("train ../")) == ["../00_toy/hparams.py"]
    assert values(ask("train ./")) == ["./hparams.py"]


def test_names_that_shells_take_apart_are_completed(lab: Lab, ask: Ask) -> None:
    """With a `=` in them, or a space; what stands already is not sent to bash again."""
    lab.hparams("rate=0.1", {})
    lab.hparams("my hparams", {})
    assert ask(f"train {FOLDER}rate=0") == ["path\t0.1.py"]
    assert ask(f"train {FOLDER}ra") == [f"path\t{FOLDER}rate=0.1.py"]
    assert ask(f"train {FOLDER}rate=0", "zsh") == [f"path\t{FOLDER}rate=0.1.py"]
    assert ask(f"train {FOLDER}m") == [f"path\t{FOLDER}my hparams.py"]
    assert ask(f"train {FOLDER}m", "zsh") == [f"path\t{FOLDER}my\\ hparams.py"]


@pytest.mark.parametrize(
    "line", ["infer ", "torch-lab train ", "torch-lab explain ", "torch-lab verify-resume "]
)
def test_every_command_with_a_path_completes_it(ask: Ask, line: str) -> None:
    """Under every name."""
    assert values(ask(line)) == [f"{FOLDER}hparams.py"]


def test_a_large_folder_is_not_searched(lab: Lab, ask: Ask) -> None:
    """It is offered, as it may lead to an experiment."""
    for number in range(1100):
        (lab.root / "pictures" / f"{number}").mkdir(parents=True)
    assert values(ask("train ")) == ["pictures", "toys"]


# Keys.


def test_keys_follow_set_and_unset(lab: Lab, ask: Ask) -> None:
    """Values with a `=` behind them, ready for the new one; to be removed, sections as well."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 2}}, "config": {"lr": 1}, "seed": 3})
    start = f"train {FOLDER}hparams.py"
    both = ["part\ttrainer.init.max_epochs=", "part\tconfig.lr=", "part\tseed="]
    assert ask(f"{start} --set ") == both
    assert ask(f"{start} --set=") == ask(f"{start} --offline --set seed=1 --set ") == both
    assert ask(f"{start} --set con") == ["part\tconfig.lr="]
    assert ask(f"{start} --set=con", "zsh") == ["part\t--set=config.lr="]
    assert ask(f"{start} --set config.lr=") == ask(f"{start} --set config.lr=0") == []
    assert values(ask(f"{start} --unset c")) == ["config", "config.lr"]
    assert values(ask(f"torch-lab explain {FOLDER}hparams.py c")) == ["config", "config.lr"]
    assert ask("train --set ") == []


def test_keys_are_read_and_nothing_is_run(lab: Lab, ask: Ask) -> None:
    """A script that would end the process, or write a file, only has keys."""
    lab.write(
        "hparams.py",
        """
        import pathlib
        hparams = {"config": {"lr": 0.1}}
        pathlib.Path("written").touch()
        raise SystemExit(1)
        """,
    )
    assert values(ask(f"train {FOLDER}hparams.py --set ")) == ["config.lr="]
    assert not (lab.root / "written").exists()


BLOCKS = """\
hparams = {}
for i in x:
    hparams['a'] = i
with y:
    hparams['b'] = 1
try:
    hparams['c'] = 1
except E:
    hparams['d'] = 1
match x:
    case 1:
        hparams['e'] = 1
"""
CIRCLE = "x = import_script_as_module('hparams.py')\n" * 50 + "hparams = {'a': 1}"
KEYS: list[tuple[str, str, str]] = [
    ("spelt out", "hparams = {'a': {'b': 1, 'c': {'d': 2}}, 'e': {}}", "a a.b a.c a.c.d e"),
    ("annotated", "hparams: dict = dict(a=dict(b=1), **{'c': 2})", "a a.b c"),
    ("computed", "x = 3\nhparams = {'a': f(x), 'b': [i for i in x]}", "a b"),
    ("lists of dictionaries", "hparams = {'a': [{'b': 1}, 2, [{'c': 3}]]}", "a a[0].b a[2][0].c"),
    ("stored", "hparams = {'a': {}}\nhparams['a']['b'] = {'c': 1}", "a a.b a.b.c"),
    ("through another name", "hparams = {'a': {}}\na = hparams['a']\na['b'] = 1", "a a.b"),
    ("removed", "hparams = {'a': 1, 'b': 2, 'c': 3}\ndel hparams['a']\nhparams.pop('b')", "c"),
    ("updated", "hparams = {'a': {}}\nhparams['a'].update({'b': 1}, c=2)", "a a.b a.c"),
    ("joined", "hparams = {'a': 1} | {'b': 2}\nhparams |= {'c': 3}", "a b c"),
    (
        "default",
        "hparams = {}\nhparams.setdefault('a', {'b': 1})\nhparams.setdefault('c')",
        "a a.b c",
    ),
    ("appended", "hparams = {'a': []}\nhparams['a'].append({'b': 1})", "a a[0].b"),
    (
        "extended",
        "hparams = {'a': []}\nhparams['a'] += [{'b': 1}]\nhparams['a'].extend([{'c': 1}])",
        "a a[0].b a[1].c",
    ),
    ("in a list", "hparams = {'a': [{'b': 1}]}\nhparams['a'][0]['c'] = 2", "a a[0].b a[0].c"),
    ("perhaps", "hparams = {}\nif x:\n    hparams['a'] = 1\nelse:\n    hparams['b'] = 2", "a b"),
    (
        "in blocks",
        BLOCKS,
        "a b c d e",
    ),
    ("spread", "base = {'a': 1}\nhparams = {**base, 'b': 2, **f()}", "a b"),
    (
        "copied",
        "import copy\nb = {'a': 1}\nhparams = copy.deepcopy(b)\nhparams['c'] = b.copy()",
        "a c c.a",
    ),
    ("chosen", "hparams = {'a': {'b': 1} if x else None}", "a a.b"),
    ("other keys", "hparams = {'a-b': 1, 3: 2, f(): 3, 'c': 4, ('d', 'e'): 5}", "[3] c"),
    ("in a function", "hparams = {'a': 1}\ndef f():\n    hparams['b'] = 1", "a"),
    (
        "layer",
        "hparams = import_script_as_module('base.py').hparams\nhparams['n'] = 1",
        "lr opt opt.p n",
    ),
    ("module", "base = import_script_as_module('base.py')\nhparams = base.hparams", "lr opt opt.p"),
    ("layers", "hparams = import_script_as_module('middle.py').hparams", "lr opt opt.p q"),
    (
        "merged",
        "hparams = layer('base.py', opt={'p': 2, 'r': new(1)}, lr=DELETE)",
        "opt opt.p opt.r",
    ),
    (
        "replaced",
        "hparams = layer('base.py', opt=new({'s': 1}), lr={'t': 1})",
        "lr lr.t opt opt.p opt.s",
    ),
    ("preset", "from presets import adam\nhparams = {'opt': adam}", "opt opt.beta"),
    (
        "presets",
        "import presets as p\nfrom . import presets\nhparams = {'a': p.adam, 'b': presets.adam}",
        "a a.beta b b.beta",
    ),
    (
        "package",
        "from library.inner import *\nfrom .library import own\nhparams = {'a': x_of, 'b': own}",
        "a a.x b b.y",
    ),
    (
        "unknown",
        "import os.path, sys\nfrom torch import nn\nhparams = {'a': nn.Linear, 'b': os.path.x}",
        "a b",
    ),
    ("no path", "hparams = {'a': import_script_as_module(x).hparams, 'b': layer(f())}", "a b"),
    ("missing layer", "hparams = import_script_as_module('nowhere.py').hparams", ""),
    ("circle", CIRCLE, "a"),
    ("no Python", "hparams = {'a': 1", ""),
    ("binary", "hparams = {'a': 1}\0", ""),
    ("none", "other = {'a': 1}", ""),
]


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in KEYS], ids=[x[0] for x in KEYS]
)
def test_the_keys_of_a_text(lab: Lab, text: str, expected: str) -> None:
    """Those that are spelt out are found, wherever they come from; a guess is no error."""
    lab.write("base.py", "hparams = {'lr': 1, 'opt': {'p': 1}}")
    lab.write(
        "middle.py",
        f"{LAYER}hparams = import_script_as_module('base.py').hparams\nhparams['q'] = 1",
    )
    lab.write("presets.py", "adam = {'beta': 1}")
    lab.write("library/__init__.py", "own = {'y': 1}")
    lab.write("library/inner.py", "x_of = {'x': 1}")
    found = keys_in(lab.write("hparams.py", text))
    assert sorted(found) == sorted(expected.split())


def test_the_keys_agree_with_a_run(lab: Lab) -> None:
    """Of the example's scripts, all keys are found, and no others."""
    from torch_lab.experiment import Experiment
    from torch_lab.utils import flattened

    folder = Path(cli.__file__).parents[1] / "example_project/experiments/00_mnist_demo"
    for script in folder.glob("hparams*.py"):
        leaves = {key for key, is_section in keys_in(script).items() if not is_section}
        assert leaves == set(flattened(Experiment.load(script).layers[-1].hparams))


# Runs.


@pytest.fixture
def runs(lab: Lab) -> Iterator[None]:
    """Folders of runs."""
    for name in ("00_toy-hparams-v1", "00_toy-hparams-v2", "00_toy-hparams-v10", "01_b-high-v1"):
        (lab.root / "data/artifacts" / name).mkdir(parents=True)
    (lab.root / "data/artifacts/notes").mkdir()
    yield


@pytest.mark.usefixtures("runs")
def test_runs_follow_resume(lab: Lab, ask: Ask) -> None:
    """The newest first, of the script that was named; or else a script, as RUN may be left out."""
    own = [f"00_toy-hparams-v{number}" for number in (10, 2, 1)]
    path = f"{FOLDER}hparams.py"
    assert values(ask(f"train {path} --resume ")) == [*own, path]
    assert values(ask("train --resume ")) == [*own, "01_b-high-v1", path]
    assert values(ask(f"train {path} --resume=00_toy-hparams-v1")) == [own[0], own[2]]
    assert values(ask(f"train {path} --resume=00_toy-hparams-v2", "zsh")) == [f"--resume={own[1]}"]
    assert values(ask(f"train {path} --resume=00_toy-hparams-v2", "fish")) == [f"--resume={own[1]}"]


@pytest.mark.usefixtures("runs")
def test_runs_are_named_with_and_without_their_versions(ask: Ask) -> None:
    """For the commands that take a run, and for what goes to `infer_config`; there files too."""
    names = ["01_b-high", "01_b-high-v1"]
    for line in (
        "torch-lab runs 01",
        "torch-lab sync 00_toy-hparams 01",
        f"infer {FOLDER}hparams.py 01",
    ):
        assert values(ask(line)) == names
    assert ask(f"infer {FOLDER}hparams.py data/p") == ["file\tdata/p"]
    assert ask("torch-lab runs nothing") == []


@pytest.mark.usefixtures("runs")
def test_runs_and_scripts_can_be_compared(lab: Lab) -> None:
    """Both are offered where either may stand."""
    context = click.Context(cli.torch_lab)
    found = [item.value for item in completion.comparable(context, "")]
    assert {"01_b-high", "01_b-high-v1", f"{FOLDER}hparams.py"} < set(found)
    found = [item.value for item in completion.comparable(context, "01_b-high-")]
    assert found == ["01_b-high-v1"]


# Options, and the rest.


def test_options_are_completed_with_what_they_are_for(ask: Ask) -> None:
    """By click itself."""
    assert ask("train --off") == ["plain\t--offline\tNever touch ClearML."]
    assert ask("train --jobs ") == []
    assert "runs" in values(ask("torch-lab "))
    assert values(ask("torch-lab --install-completion ")) == ["bash", "zsh", "fish"]


def test_nothing_heavy_is_loaded(lab: Lab) -> None:
    """For paths, keys and runs alike."""
    code = (
        "import os, sys\nfrom torch_lab import cli\n"
        "for line in sys.argv[1:]:\n"
        "    words = line.split(' ')\n"
        "    os.environ.update(COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))\n"
        "    try:\n        cli.main(cli.train, 'train', [])\n"
        "    except SystemExit as left:\n        assert left.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    lines = [
        f"train {word}" for word in ("to", f"{lab.path} --set ", f"{lab.path} --resume ", "--o")
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *lines],
        env={**os.environ, "_TRAIN_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = done.stdout.splitlines()
    assert f"path\t{FOLDER}hparams.py" in found and "part\ttrainer.init.max_epochs=" in found
    assert found[-1] == "[]"


# Shells.


def install(lab: Lab, *words: str, **given: str) -> tuple[int, str]:
    environment = {"HOME": str(lab.root / "home"), "PATH": os.environ["PATH"], **given}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "ZDOTDIR", "SHELL"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        lab.capsys.readouterr()
        code = cli.main(cli.torch_lab, "torch-lab", ["--install-completion", *words])
    captured = lab.capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize(("shell", "start"), [("bash", ".bashrc"), ("zsh", ".zshrc")])
def test_installing_adds_one_line(lab: Lab, shell: str, start: str) -> None:
    """To what the shell reads at its start, which stays as it was otherwise; and only once."""
    home = lab.root / "home"
    home.mkdir()
    (home / start).write_text("alias x=y")
    code, said = install(lab, SHELL=f"/usr/bin/{shell}")
    script = home / f".local/share/torch-lab/completion.{shell}"
    line = f"source {script}  # completion of torch-lab"
    assert code == 0 and f"wrote {script}" in said and f"added a line to {home / start}" in said
    assert (home / start).read_text() == f"alias x=y\n{line}\n"
    code, said = install(lab, shell)
    assert code == 0 and "added" not in said and (home / start).read_text().count(line) == 1


def test_places_of_the_users_own_are_kept_to(lab: Lab) -> None:
    """Those that the environment names; fish reads its folder by itself."""
    code, said = install(lab, "fish", XDG_CONFIG_HOME=str(lab.root / "config"))
    script = lab.root / "config/fish/conf.d/torch-lab.fish"
    assert code == 0 and said.startswith(f"wrote {script}\n") and "added" not in said
    assert "complete --command $program" in script.read_text()
    folders = {"XDG_DATA_HOME": str(lab.root / "share"), "ZDOTDIR": str(lab.root / "dots")}
    (lab.root / "dots").mkdir()
    assert install(lab, "zsh", **folders)[0] == 0
    assert (lab.root / "share/torch-lab/completion.zsh").is_file()
    assert (lab.root / "dots/.zshrc").read_text().startswith("source ")


def test_what_cannot_be_installed_is_said(lab: Lab) -> None:
    """Another shell, or a place that nobody can write to."""
    code, said = install(lab, "fihs")
    assert (code, "did you mean fish?" in said) == (2, True)
    code, said = install(lab, SHELL="/bin/tcsh")
    assert code == 2 and "no completion for the shell 'tcsh'" in said and "bash|zsh|fish" in said
    (lab.root / "home").touch()
    code, said = install(lab, "bash")
    assert code == 2 and "cannot be written" in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_can_be_had_from_click_as_well(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    """`_TRAIN_COMPLETE=bash_source train` prints the same."""
    monkeypatch.setenv("_TRAIN_COMPLETE", f"{shell}_source")
    with pytest.raises(SystemExit):
        cli.main(cli.train, "train", [])
    printed = lab.capsys.readouterr().out
    assert "train infer torch-lab" in printed and f"{shell}_complete" in printed
    if found := shutil.which(shell):
        checked = subprocess.run(
            [found, "-n"], input=printed, text=True, capture_output=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(0o700)


def test_a_real_bash_completes(lab: Lab) -> None:
    """At the press of a key; a program that only has the name `train` is not run."""
    lab.hparams("hparams", {"config": {"lr": 1}})
    install(lab, "bash")
    program(lab.root / "bin/train", "from torch_lab.cli import train_entry\ntrain_entry()")
    program(lab.root / "other/train", "open('ran', 'w')")
    environment = {**os.environ, "PS1": "> ", "HOME": str(lab.root / "home"), "TERM": "dumb"}
    environment["PATH"] = f"{lab.root / 'bin'}:{os.environ['PATH']}"
    bash = pexpect.spawn("bash", ["-i"], env=environment, encoding="utf-8", timeout=20)
    bash.setwinsize(24, 300)

    def typed(words: str, expected: str) -> None:
        bash.send(f"{words}\t")
        bash.expect_exact(expected)

    bash.sendline("PS1='> '; bind 'set bell-style none'; echo rea''dy")
    bash.expect_exact("ready\r\n> ")
    typed("train t", f"{FOLDER}hparams.py ")
    typed("--set c", "config.lr=")
    typed("3 --off", "3 --offline ")
    assert bash.before == ""  # No space behind the `=`.
    bash.sendcontrol("u")
    bash.sendline("PATH=other:$PATH; hash -r; touch toys.txt; echo d''one")
    bash.expect_exact("done\r\n> ")
    typed("train toys.t", "xt ")
    bash.close(force=True)
    assert not (lab.root / "ran").exists()
