"""Run folders: versions, records, and finding them again."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import Lab
from torch_lab.errors import CheckpointError, UserError
from torch_lab.listing import listed_runs
from torch_lab.runs import (
    Run,
    artifacts_folder,
    code_state,
    decoded,
    encoded,
    find_run,
    latest_unfinished,
    project_root,
    runs_of,
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


OTHER = """
import sys, time
from pathlib import Path
from torch_lab.runs import Run
run = Run.plan(Path(sys.argv[1]), "00-h", experiment="00", script="h.py", hparams={}, seed=0)
run.reserve()
print(run.folder, flush=True)
time.sleep(60)
"""


@contextmanager
def started_elsewhere(artifacts: Path) -> Iterator[tuple[Run, subprocess.Popen[str]]]:
    """Start a process with a run, which is killed at the end."""
    command = [sys.executable, "-c", OTHER, artifacts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Run.read(Path(process.stdout.readline().strip())), process
        process.kill()


def changed(run: Run, **record: Any) -> Run:
    """Change fields of the record on disk, and return the run with them."""
    path = run.folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **record}))
    return Run.read(run.folder)


def test_a_run_whose_process_is_gone_is_lost(tmp_path: Path) -> None:
    """Killed, it had no chance to say how it ended; to look at it changes nothing."""
    with started_elsewhere(tmp_path) as (run, process):
        assert run.state == "running"
        process.kill()
        process.wait()
        assert run.state == "lost"
        assert json.loads((run.folder / "run.json").read_text())["state"] == "running"
    run.close("failed", {})
    assert run.state == "failed"


def test_a_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    """Numbers are used again: what counts is when the process was started too."""
    run = reserved(tmp_path, "00-h")
    assert run.state == "running"
    started = run.record.process_started
    assert started is not None
    assert changed(run, process_started=started - 100).state == "lost"
    assert changed(run, process_started=None).state == "running"
    far_away = changed(run, process_started=started - 100, host=f"not-{socket.gethostname()}")
    assert far_away.state == "running"


def test_a_run_is_trained_by_one_process(tmp_path: Path) -> None:
    """Another one is told by which; when that is gone, it goes on with the run."""
    with started_elsewhere(tmp_path) as (run, process):
        told = f"00-h-v1 is being trained by process {process.pid} on host {socket.gethostname()}"
        with pytest.raises(UserError, match=told):
            run.lock(wait_s=0.2)
        process.kill()
        process.wait()
        run.reopen(from_step=3)
    with pytest.raises(UserError, match=f"by process {os.getpid()}"):
        Run.read(run.folder).lock(wait_s=0.0)
    run.close("stopped", {})
    Run.read(run.folder).lock(wait_s=0.0)


def test_a_run_that_goes_on_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record says that it runs here, and keeps what was and each time it went on."""
    run = reserved(tmp_path, "00-h")
    before = copy.deepcopy(run.record)
    run.close("failed", {"loss": 0.5}, reason="why")
    monkeypatch.setattr(sys, "argv", ["train", "h.py", "--resume"])
    for step in (None, 7):
        run = Run.read(run.folder)
        changed(run, host="elsewhere", pid=1, process_started=None)
        run.reopen(from_step=step)
        on_disk = Run.read(run.folder)
        assert on_disk.record == run.record and on_disk.state == "running"
        run.close("stopped", {})
    record = on_disk.record
    for name in ("id", "version", "started", "parent", "argv", "host", "pid", "process_started"):
        assert getattr(record, name) == getattr(before, name)
    assert (record.reason, record.ended) == (None, None)
    assert [each["from_step"] for each in record.resumed] == [None, 7]
    assert record.resumed[1]["argv"] == ["train", "h.py", "--resume"]
    keys = {"when", "ended_before", "pid", "host", "argv", "from_step", "changed"}
    assert record.resumed[1].keys() == keys


def test_a_completed_run_does_not_go_on(tmp_path: Path) -> None:
    """Neither one that was completed while this process waited for it, nor one that is gone."""
    run, stale = (reserved(tmp_path, "00-h"), Run.read(tmp_path / "00-h-v1"))
    run.close("completed", {})
    before = (run.folder / "run.json").read_bytes()
    with pytest.raises(UserError, match="00-h-v1 is completed"):
        stale.reopen()
    assert (run.folder / "run.json").read_bytes() == before
    shutil.rmtree(run.folder)
    with pytest.raises(UserError, match="cannot go on with 00-h-v1"):
        stale.reopen()


def test_a_run_that_went_on_meanwhile_is_looked_at_again(tmp_path: Path) -> None:
    """What was chosen to go on from is old by now."""
    run, stale = (reserved(tmp_path, "00-h"), Run.read(tmp_path / "00-h-v1"))
    run.close("stopped", {})
    run.reopen()
    run.close("stopped", {})
    with pytest.raises(UserError, match=f"went on in process {os.getpid()} .* meanwhile"):
        stale.reopen()
    Run.read(run.folder).reopen()


def test_a_copy_of_a_run_has_no_lock(tmp_path: Path) -> None:
    """A spawned process gets one; it can hold the run together with its parent."""
    run = reserved(tmp_path, "00-h")
    member = pickle.loads(pickle.dumps(run))
    assert member == run == copy.deepcopy(run)
    member.join()
    run.close("failed", {})
    with pytest.raises(UserError, match="is being trained"):
        Run.read(run.folder).lock(wait_s=0.0)


def test_the_newest_unfinished_run(tmp_path: Path) -> None:
    """Of one base name; neither completed nor running."""
    assert runs_of(tmp_path / "nothing", "00-h") == []
    assert latest_unfinished(tmp_path, "00-h") is None
    states = ("failed", "stopped", "completed")
    runs = [reserved(tmp_path, "00-h") for _ in range(10)]
    for run, state in zip(runs, states, strict=False):
        run.close(state, {})
    reserved(tmp_path, "00-h-more").close("failed", {})
    for run in runs[3:]:
        shutil.rmtree(run.folder)
    running = reserved(tmp_path, "00-h")
    (tmp_path / "00-h-v9").mkdir()
    assert [run.name for run in runs_of(tmp_path, "00-h")] == [
        *("00-h-v4", "00-h-v3", "00-h-v2", "00-h-v1")
    ]
    assert latest_unfinished(tmp_path, "00-h") == runs[1]
    changed(running, process_started=0.0)
    lost = latest_unfinished(tmp_path, "00-h")
    assert lost is not None and lost.name == "00-h-v4"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "", ".", "a\\b", "a\0"])
def test_a_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    """Names come from hparams, command lines and files."""
    run = reserved(tmp_path, "00-h")
    for path_of in (run.checkpoint, run.sidecar):
        with pytest.raises(CheckpointError, match="a checkpoint's name, not a path"):
            path_of(name)
    with pytest.raises(CheckpointError, match="a run's name, not a path"):
        find_run(tmp_path, name, having="last")
    with pytest.raises(CheckpointError, match="a checkpoint's name, not a path"):
        find_run(tmp_path, "00-h", having=name)
    with pytest.raises(CheckpointError, match="a run's name, not a path"):
        runs_of(tmp_path, name)


def test_a_record_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in hparams, nor in commands, reasons and sources; not even in memory."""
    monkeypatch.setattr(sys, "argv", ["train", "--token", "s1", "h.py"])
    hparams = encoded({"config": {"api_key": "s2", "max_tokens": 3, "url": "http://u:s3@h"}})
    run = Run.plan(tmp_path / "artifacts", "00-h", **{**RECORD, "hparams": hparams})
    run.reserve()
    script = tmp_path / "h.py"
    script.write_text("hparams = {'config': {'api_key': 's2', 'max_tokens': 3}}\n")
    run.write_sources(tmp_path, [script], changes=b"+API_KEY = 's4'\n")
    run.close("failed", {}, reason="no answer from http://u:s5@h")
    run.reopen()
    run.close("failed", {}, reason="no answer from http://u:s5@h")
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert not any(f"s{number}" in path.read_text() for number in range(1, 6)), path
    assert run.hparams == {"config": {"api_key": "***", "max_tokens": 3, "url": "http://u:***@h"}}
    assert Run.read(run.folder) == run
    copied = run.folder / "sources" / "h.py"
    assert copied.read_text() == "hparams = {'config': {'api_key': \"***\", 'max_tokens': 3}}\n"


def test_the_runs_of_a_project_are_listed(lab: Lab) -> None:
    """Oldest first, with what is known of each; names begin with what is asked for."""
    artifacts = lab.root / "data" / "artifacts"
    with started_elsewhere(artifacts) as (lost, process):
        process.kill()
    other, run = reserved(artifacts, "01-x"), reserved(artifacts, "00-h")
    run.checkpoint("last").parent.mkdir()
    for name, score in (("last", 2.0), ("best", 0.25)):
        sidecar = {"epoch": 1, "step": 20, "monitor": "loss/validate", "score": score}
        run.checkpoint(name).with_suffix(".json").write_text(json.dumps(sidecar))
    other.checkpoint("last").parent.mkdir()
    other.checkpoint("last").with_suffix(".json").write_text("{")
    run.close("completed", {})
    (artifacts / "broken-v1").mkdir()
    (artifacts / "broken-v1" / "run.json").touch()
    rows = listed_runs(artifacts)
    assert [(row["run"], row["state"]) for row in rows] == [
        *((lost.name, "lost"), ("01-x-v1", "running"), ("00-h-v2", "completed"))
    ]
    assert [row["step"] for row in rows] == [None, None, 20]
    assert rows[0]["duration_s"] is None and rows[1]["duration_s"] >= 0
    assert listed_runs(artifacts, "00-h") == [rows[0], rows[2]]
    table = lab.command("runs")
    assert table.code == 0
    words = [line.split() for line in table.out.splitlines() if "-v" in line]
    assert [line[:2] for line in words] == [[row["run"], row["state"]] for row in rows]
    assert words[-1][-4:] == ["2", "20", "loss/validate", "0.25"]
    assert json.loads(lab.command("runs", "00-h", "--json").out) == [rows[0], rows[2]]
    wrong = lab.command("runs", "00_h")
    assert wrong.code == 2
    assert wrong.err.startswith("error: there is no run '00_h' in data/artifacts; did you mean")


def test_a_project_without_runs_has_an_empty_list(lab: Lab) -> None:
    """Nothing is created by looking."""
    assert listed_runs(lab.root / "data" / "artifacts") == []
    code = (
        "import sys\nfrom torch_lab.cli import main, torch_lab\n"
        "assert main(torch_lab, 'torch-lab', ['runs', '--json']) == 0\n"
        "print([name for name in ('torch', 'pytorch_lightning', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
    assert not (lab.root / "data").exists()


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


def test_sources_stay_in_their_folder(tmp_path: Path) -> None:
    """However their path is written."""
    script = tmp_path / "out.py"
    script.write_text("x = 1\n")
    (tmp_path / "p").mkdir()
    run = reserved(tmp_path / "p" / "artifacts", "00-h")
    run.write_sources(tmp_path / "p", [tmp_path / "p" / ".." / "out.py"], changes=b"")
    kept = [path for path in tmp_path.rglob("out.py") if path != script]
    assert kept == [run.folder / "sources" / script.relative_to("/")]
