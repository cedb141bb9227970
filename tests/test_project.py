"""The project keeps its own rules: names, layers of text, versions, lengths."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torch_lab

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MODULES = [
    path
    for path in sorted((ROOT / "src/torch_lab").rglob("*.py"))
    if path.name == "__init__.py" or not path.stem.startswith("_")
]
LONGEST_FUNCTION = 50


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def public_definitions(path: Path) -> set[str]:
    """Return the functions and classes of a module whose names do not begin with an underscore."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, definitions)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_all_names_what_a_module_defines(path: Path) -> None:
    """`__all__` holds every public function and class of a module, and only what is there."""
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    assert public_definitions(path) - set(module.__all__) == set()
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def long_functions(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            reasoned = "# long because " in (ast.get_source_segment(source, node) or "")
            if length > LONGEST_FUNCTION and not reasoned:
                yield f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_long_function_says_why(path: Path) -> None:
    """No function is longer than 50 lines without a comment `# long because ...` in it."""
    assert list(long_functions(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_lightning_has_one_spelling(path: Path) -> None:
    """Lightning is imported as `pytorch_lightning`: objects of the two packages do not mix."""
    source = path.read_text(encoding="utf-8")
    assert re.findall(r"^\s*(?:import|from) lightning\b.*", source, re.MULTILINE) == []


def test_compromised_releases_of_lightning_are_excluded() -> None:
    """No release of Lightning that is known to be harmful can be installed."""
    [lightning] = [
        requirement
        for requirement in pyproject()["project"]["dependencies"]
        if requirement.startswith("pytorch-lightning")
    ]
    assert "!=2.6.2" in lightning
    assert "!=2.6.3" in lightning
    assert "<2.7" in lightning, "private attributes hold for one minor version"


def test_every_dependency_has_a_locked_version() -> None:
    """`constraints.txt` holds a version of everything that `pyproject.toml` names."""
    project = pyproject()["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *itertools.chain.from_iterable(extras)]
    locked = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}
    assert names - {name.lower() for name in locked} == set()


def test_every_dependency_has_a_reason() -> None:
    """The design names each dependency of the library, and why it is there."""
    design = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    for requirement in pyproject()["project"]["dependencies"]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert f"\n| {name} |" in design


def test_the_version_is_single() -> None:
    """The package's version is the one of its installation."""
    assert torch_lab.__version__ == importlib.metadata.version("torch-lab")


def test_the_package_is_typed() -> None:
    """Type checkers of users see our types."""
    assert (Path(torch_lab.__file__).parent / "py.typed").is_file()


def test_console_scripts_lead_somewhere() -> None:
    """`train`, `infer` and `torch-lab` are installed, and each leads to a function."""
    scripts = importlib.metadata.distribution("torch-lab").entry_points.select(
        group="console_scripts"
    )
    assert {script.name for script in scripts} == {"train", "infer", "torch-lab"}
    assert all(callable(script.load()) for script in scripts)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_named_targets_exist(page: str) -> None:
    """Every `make target` that a page shows is a target of the Makefile."""
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = set(re.findall(r"(?:`|\$ |^ {4})make ([a-z-]+)", text, re.MULTILINE))
    assert shown - make_targets() == set()


def test_continuous_integration_runs_what_contributors_run() -> None:
    """The workflow runs `.ci/run`, on the oldest Python that we support and on a recent one."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert "run: .ci/run" in workflow
    oldest = pyproject()["project"]["requires-python"].removeprefix(">=")
    assert f'"{oldest}"' in workflow
