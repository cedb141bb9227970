"""The README and the documentation tell the truth: what they show is run.

On each page, from top to bottom and in one copy of the project:

* a Python block whose first line is a path (`# src/my_project/models.py`) is written to that path;
* any other Python block is executed, in one namespace for the page;
* in a `console` block the lines that begin with `$ ` are run in a shell, one shell for a block, and
  must exit with 0, or with the code that a comment above the block says: `<!-- exit 2 -->`. What
  such a block shows below its command must be what the command said;
* below `<!-- with a ClearML server -->` the commands find one, which is the page's own;
* a block below `<!-- not run: the reason -->` is left alone.

The copy holds a finished run of the demo, and its scripts train a tenth of the epochs. That run
came of the command as it is installed; on the pages, commands start in the way of `warm`.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clearml_server import ClearMLServer
from warm import Warm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXPERIMENT = "src/example_project/experiments/00_mnist_demo"
DEMO = f"train {EXPERIMENT}/hparams.py --offline"

SHOWN_ONLY = {"text", "toml", "json", "csv", "yaml"}
FENCE = re.compile(r"^ *(`{3,}|~{3,})(.*)$")
NOT_RUN = re.compile(r"^<!-- not run: (\S.*) -->$")
WITH_SERVER = "<!-- with a ClearML server -->"
EXIT = re.compile(r"^<!-- exit (\d+) -->$")
EPOCHS = re.compile(r'("max_epochs"(?::|\] =) )(\d+)')
FILE = re.compile(r"^# ([\w./-]+\.(?:py|toml))$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: What stands behind the fence; `{...}` is a directive of Sphinx.
        text: What stands between the fences.
        line: The line of the page on which `text` begins, from 1.
        comment: The line above the block, blank ones apart.
    """

    language: str
    text: str
    line: int
    comment: str

    @property
    def is_run(self) -> bool:
        shown_only = self.language in SHOWN_ONLY or self.language.startswith("{")
        return not shown_only and not NOT_RUN.match(self.comment)

    @property
    def commands(self) -> list[str]:
        """Return what stands behind `$ `; a backslash at the end joins a line with the next."""
        joined = self.text.replace("\\\n", "")
        return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def blocks_of(page: Path) -> Iterator[Block]:
    """Return the fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    comment, number = "", 0
    while number < len(lines):
        if opening := FENCE.match(lines[number]):
            fence, language = opening.groups()
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == fence)
            text = "\n".join(lines[number + 1 : end])
            yield Block(language.strip(), text, number + 2, comment)
            comment, number = "", end
        elif lines[number].strip():
            comment = lines[number].strip()
        number += 1


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project in which the demo has been trained for a tenth of its epochs."""
    project = tmp_path_factory.mktemp("docs") / "torch-lab"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src/example_project", project / "src/example_project", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", project)
    for script in (project / EXPERIMENT).glob("hparams*.py"):
        shorten(script)
    run_in_shell([DEMO], project)
    return project


def shorten(script: Path) -> None:
    """Make an hparams script train for a tenth of its epochs."""
    text = script.read_text(encoding="utf-8")
    shorter = EPOCHS.sub(lambda match: f"{match[1]}{math.ceil(int(match[2]) / 10)}", text)
    assert shorter != text or "max_epochs" not in text
    script.write_text(shorter, encoding="utf-8")


@pytest.fixture
def project(finished_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a page's own copy of the finished demo, which is the working directory as well."""
    copy = shutil.copytree(finished_demo, tmp_path / "torch-lab")
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(copy / "src")
    for name in [name for name in sys.modules if name.partition(".")[0] == "example_project"]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    yield copy
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(copy)):
            del sys.modules[name]


@pytest.fixture
def clearml(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return the variables that lead to a ClearML server of the page's own."""
    with ClearMLServer() as server:
        yield server.environment(tmp_path)


def run_in_shell(
    commands: list[str],
    project: Path,
    expected: int = 0,
    scripts: Sequence[Path] = (),
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run `commands` in one shell, looking in `scripts` first; return all that they wrote."""
    folders = [*map(str, scripts), sysconfig.get_path("scripts"), os.environ["PATH"]]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": str(project / "src"),
        "OMP_NUM_THREADS": "1",
        **(variables or {}),
    }
    result = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", "\n".join(commands)],
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == expected, (
        f"{commands} ended with {result.returncode}:\n{result.stdout}"
    )
    return result.stdout


def run_console(
    block: Block, project: Path, warm: Warm, variables: Mapping[str, str] | None = None
) -> None:
    commands = [command for command in block.commands if command != DEMO]  # It ran already.
    failure = EXIT.match(block.comment)
    expected = int(failure[1]) if failure else 0
    said = run_in_shell(commands, project, expected, [warm.scripts], variables)
    if failure:
        shown = [line for line in block.text.splitlines() if not line.startswith("$ ")]
        assert [line for line in shown if line not in said] == [], said


def run_python(block: Block, page: Path, project: Path, namespace: dict[str, Any]) -> None:
    first_line = block.text.partition("\n")[0]
    if file := FILE.match(first_line):
        path = project / file[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text + "\n", encoding="utf-8")
        return
    # Blank lines in front let a traceback name the line of the page.
    exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_a_page_shows_works(
    page: Path, request: pytest.FixtureRequest, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command and every snippet of the page runs, in the page's order."""
    blocks = [block for block in blocks_of(page) if block.is_run]
    if not blocks:
        return
    project = request.getfixturevalue("project")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # Dataclasses look their module up.
    for block in blocks:
        if block.language == "console":
            is_online = block.comment == WITH_SERVER
            variables = request.getfixturevalue("clearml") if is_online else None
            run_console(block, project, warm, variables)
        else:
            run_python(block, page, project, vars(module))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_block_slips_through(page: Path) -> None:
    """Every block says its language, and every console block shows a command."""
    for block in blocks_of(page):
        known = {"python", "console", *SHOWN_ONLY}
        where = f"{page_id(page)}:{block.line}"
        assert block.language in known or block.language.startswith("{"), (
            f"{where}: {block.language!r}"
        )
        assert block.language != "console" or block.commands, f"{where}: no line begins with '$ '"


@pytest.mark.parametrize("command", ["train", "infer", "torch-lab"])
def test_every_option_is_documented(command: str) -> None:
    """The reference of the command line names every option that `--help` names."""
    documented = (ROOT / "docs/reference/command-line.md").read_text(encoding="utf-8")
    options = set(
        re.findall(r"(?<![\w-])--[a-z][a-z-]*", run_in_shell([f"{command} --help"], ROOT))
    )
    assert options
    assert {option for option in options if f"`{option}" not in documented} == set()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=page_id)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    """Every link of the page to a file of the project leads to a file."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
