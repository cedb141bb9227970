"""Run folders: versions, records, and finding them again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from torch_lab.errors import CheckpointError
from torch_lab.runs import (
    Run,
    artifacts_folder,
    code_state,
    decoded,
    encoded,
    find_run,
    project_root,
)

RECORD = {"experiment": "00", "script": "h.py", "hparams": {}, "seed": 0}


def reserved(artifacts: Path, name: str) -> Run:
    """Return a new run on disk."""
    run = Run.plan(artifacts, name, **RECORD)
    run.reserve()
    return run


def test_a_planned_run_is_not_on_disk(tmp_path: Path) -> None:
    """Nothing is created before it is reserved."""
    Run.plan(tmp_path / "artifacts", "00-h", **RECORD)
    assert not list(tmp_path.iterdir())


def test_versions_count_up_from_the_highest(tmp_path: Path) -> None:
    """Names that share a prefix are not counted, and gaps are not filled."""
    for name in ("00-h-v4", "00-h-more-v9", "00-h-v2", "00-h-v10x", "x00-h-v7", "notes"):
        (tmp_path / name).mkdir()
    assert reserved(tmp_path, "00-h").name == "00-h-v5"
    assert reserved(tmp_path, "00-h").name == "00-h-v6"
    assert reserved(tmp_path, "00-h-more").name == "00-h-more-v10"


def test_a_record_is_read_back(tmp_path: Path) -> None:
    """What was written is read, and how it ended too."""
    run = reserved(tmp_path, "00-h")
    assert Run.read(run.folder) == run
    assert run.state == "running"
    run.close("failed", {"loss": 0.5}, reason="why")
    again = Run.read(run.folder)
    assert (again.state, again.metrics, again.record.reason) == ("failed", {"loss": 0.5}, "why")
    assert again.record.ended is not None and again.record.ended >= again.record.started


def test_a_folder_without_a_record_is_no_run(tmp_path: Path) -> None:
    """A missing or broken record is an error with the folder's name."""
    for content in (None, "{", "{}"):
        if content is not None:
            (tmp_path / "run.json").write_text(content)
        with pytest.raises(CheckpointError, match="holds no run"):
            Run.read(tmp_path)


def test_a_record_of_a_later_version_can_be_read(tmp_path: Path) -> None:
    """Unknown fields are passed over."""
    run = reserved(tmp_path, "00-h")
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**record, "news": 1}))
    assert Run.read(run.folder) == run


def test_the_newest_run_with_the_checkpoint_is_found(tmp_path: Path) -> None:
    """A name without a version means the newest that has what is wanted."""
    first, second, third = (reserved(tmp_path, "00-h") for _ in range(3))
    for run, name in ((first, "last"), (second, "last"), (second, "best")):
        run.checkpoint(name).parent.mkdir(exist_ok=True)
        run.checkpoint(name).touch()
    assert find_run(tmp_path, "00-h", having="last") == second
    assert find_run(tmp_path, "00-h-v1", having="last") == first
    assert find_run(tmp_path, "00-h", having="other") == third
    assert find_run(tmp_path, third.record.id, having="last") == third


def test_an_unknown_run_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    """So is one where there are no runs at all."""
    reserved(tmp_path, "00_demo-hparams")
    with pytest.raises(CheckpointError, match="did you mean 00_demo-hparams"):
        find_run(tmp_path, "00_demo-hparms", having="last")
    with pytest.raises(CheckpointError, match="there is no run 'x'") as error:
        find_run(tmp_path / "nothing", "x", having="last")
    assert error.value.hint == "runs there: none"


VALUES = [
    None,
    True,
    False,
    0,
    1,
    -2,
    0.5,
    1.0,
    "x",
    "",
    [],
    {},
    (),
    (1, "a", (None,)),
    {1, 2},
    frozenset({"a"}),
    math.inf,
    -math.inf,
    Path("a/b"),
    {1: "a", (2,): None},
    {"__type__": "mine", "value": 3},
    [{"a": [1, (2,)]}],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_from_json_in_their_types(value: object) -> None:
    """True is not 1, a tuple is no list, and a key may be a number."""
    back = decoded(json.loads(json.dumps(encoded(value), allow_nan=False)))
    assert back == value
    assert type(back) is type(value) and repr(back) == repr(value)


def test_nan_comes_back_and_of_other_things_their_repr() -> None:
    """What JSON has no form for is kept in words."""
    assert math.isnan(decoded(encoded(math.nan)))
    assert decoded(encoded(range(3))) == "range(0, 3)"


def test_the_root_is_the_nearest_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pyproject.toml` or `.git` mark it, `TORCH_LAB_ROOT` overrides; else where one works."""
    monkeypatch.delenv("TORCH_LAB_ROOT", raising=False)
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert project_root(Path("/nowhere/at/all")) == deep
    (tmp_path / ".git").mkdir()
    assert project_root(deep) == tmp_path
    (tmp_path / "a" / "pyproject.toml").touch()
    assert project_root(deep) == tmp_path / "a"
    monkeypatch.setenv("TORCH_LAB_ROOT", str(tmp_path / "c"))
    assert artifacts_folder(project_root(deep)) == tmp_path / "c" / "data" / "artifacts"


def test_without_git_there_is_no_code_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a missing checkout nor a missing git is an error."""
    assert str(code_state(tmp_path)) == "no git commit"
    monkeypatch.setenv("PATH", "")
    assert code_state(tmp_path).commit is None


def test_sources_outside_the_project_are_kept_too(tmp_path: Path) -> None:
    """By their whole path."""
    inside, outside = tmp_path / "p" / "in.py", tmp_path / "out.py"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_text(path.name)
    run = reserved(tmp_path / "p" / "artifacts", "00-h")
    run.write_sources(tmp_path / "p", [inside, outside], changes=b"")
    assert (run.folder / "sources" / "in.py").read_text() == "in.py"
    kept = run.folder / "sources" / outside.relative_to("/")
    assert kept.read_text() == "out.py"
    assert not (run.folder / "sources" / "changes.diff").exists()
