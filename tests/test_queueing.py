"""Runs that are handed to agents: what is sent, what is run there, and what was edited between."""

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clearml_server import ClearMLServer
from conftest import CONFIG, Lab
from torch_lab import bootstrap, packing, queued, queueing
from torch_lab.edits import edited
from torch_lab.errors import HparamsError, ScriptError, UserError
from torch_lab.packing import pack, project_files, verify
from torch_lab.runs import Run, decoded, encoded
from torch_lab.server import Address, Server
from torch_lab.task_record import HPARAMS, parameters

HPARAMS_OF_TOY = {
    "trainer": {"init": {"max_epochs": 2}},
    "config": {"lr": 0.1, "api_key": "hunter22", "layers": [1, 2]},
}
INTERRUPTED = """
import os, pathlib, signal, time
import pytorch_lightning as pl

class Once(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        mark = pathlib.Path(os.environ["HOME"], "was-interrupted")
        if trainer.current_epoch == 1 and not mark.exists():
            mark.touch()
            time.sleep({seconds})  # Uploads are made every two seconds.
            os.kill(os.getpid(), signal.{signal})
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ClearMLServer]:
    with ClearMLServer() as started:
        keys = (started.access_key, started.secret_key)
        address = Address(started.api_url, started.files_url, started.web_url, *keys)
        # In this process the SDK would read its settings once, and for another server.
        monkeypatch.setattr(queueing, "found_server", lambda: Server(address))
        monkeypatch.setattr(queued, "found_server", lambda: Server(address))
        yield started


@pytest.fixture
def project(lab: Lab) -> Lab:
    """A repository without a remote, with a change, a file that git does not have, and a secret."""
    lab.hparams("hparams", HPARAMS_OF_TOY)
    (lab.root / ".gitignore").write_text("ignored.py\n", encoding="utf-8")
    (lab.root / "deleted.py").touch()
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "x"]):
        git(lab, *command)
    (lab.root / "deleted.py").unlink()
    lab.write("untracked.py", "X = 1\n")
    lab.write("__main__.py", CONFIG.replace("import torch\n", "import torch\nimport untracked\n"))
    for name in ("ignored.py", ".env"):
        (lab.root / name).write_text("secret", encoding="utf-8")
    return lab


def git(lab: Lab, *words: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.invalid"]
    subprocess.run(["git", "-C", str(lab.root), *who, *words], check=True)


def queue(lab: Lab, server: ClearMLServer, *words: str) -> dict[str, Any]:
    """Hand the experiment over, and return the task as the server has it."""
    done = lab.train("--queue", "default", "--json", *words, lab.path)
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["page"].endswith(f"/tasks/{told['task']}/output/log")
    task: dict[str, Any] = server.state.tasks[told["task"]]
    return task


def edit(task: dict[str, Any], name: str, value: str) -> None:
    """Edit one of the hparams as people do in the web application."""
    task["hyperparams"][HPARAMS][name]["value"] = value


def agent(
    task: dict[str, Any], server: ClearMLServer, home: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the script of a task as an agent does, but for the environment that it makes."""
    home.mkdir(exist_ok=True)
    script = home / task["script"]["entry_point"]
    script.write_text(task["script"]["diff"], encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = {"CLEARML_TASK_ID": task["id"], "CLEARML_AGENT_QUEUE_POLL_FREQ_SEC": "0.1"}
    return subprocess.run(
        [sys.executable, script.name],
        cwd=home,
        env={**environment, **server.environment(home), **told, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Handing over.


@pytest.mark.slow
def test_a_run_is_handed_over_and_goes_on_elsewhere(
    project: Lab, server: ClearMLServer, tmp_path: Path
) -> None:
    once = INTERRUPTED.format(seconds=4, signal="SIGKILL")
    config = (project.folder / "__main__.py").read_text().replace('"module": module', CALLBACK)
    project.write("__main__.py", once + config)
    task = queue(project, server)
    state = server.state
    assert (task["name"], task["status"]) == ("00_toy-hparams-v1", "queued")
    assert not any(project.runs)
    assert "torch==" in task["script"]["requirements"]["pip"]
    assert "torch-lab" not in task["script"]["requirements"]["pip"]
    assert "hunter22" not in json.dumps(task)
    edit(task, "config/lr", "0.5")

    home = tmp_path / "machine"
    killed = agent(task, server, home)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    shutil.rmtree(home / ".cache")
    done = agent(task, server, home)

    assert done.returncode == 0, done.stderr
    assert "config.lr 0.1 -> 0.5" in done.stderr
    assert "last.ckpt, epoch 1: goes on at step 4" in done.stderr
    assert task["status"] == "completed"
    (record,) = home.glob(".cache/torch_lab/queue/*/*/data/artifacts/*/run.json")
    run = json.loads(record.read_text())
    assert (run["name"], run["clearml_task_id"]) == (task["name"], task["id"])
    assert run["hparams"]["config"] == {"lr": 0.5, "api_key": "***", "layers": [1, 2]}
    assert (run["branch"], run["changed"], len(run["resumed"])) == ("main", True, 1)
    steps = [step for step, _ in state.scalars(task["id"])["loss"]["validate"]]
    assert steps == [0, 3, 7]
    assert bootstrap.MARK in task["script"]["diff"]
    assert not state.unknown
    assert last_weights(record.parent) == unbroken_weights(project, tmp_path)


CALLBACK = '"module": module, "callbacks": [Once()]'


def last_weights(folder: Path) -> list[float]:
    import torch

    found = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return [float(value) for weights in found.values() for value in weights.flatten()]


def unbroken_weights(lab: Lab, home: Path) -> list[float]:
    """Train the same here without an interruption."""
    (home / "was-interrupted").touch()
    lab.hparams("same", HPARAMS_OF_TOY | {"config": {**HPARAMS_OF_TOY["config"], "lr": 0.5}})
    done = lab.forked("--offline", str(lab.folder / "same.py"), HOME=str(home))
    assert done.code == 0, done.err
    return last_weights(lab.run().folder)


def test_the_version_is_above_those_here_and_there(
    project: Lab, server: ClearMLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queueing, "verify", lambda *_: None)
    assert queue(project, server)["name"] == "00_toy-hparams-v1"
    assert queue(project, server)["name"] == "00_toy-hparams-v2"
    hparams = encoded(HPARAMS_OF_TOY)
    artifacts = project.root / "data" / "artifacts"
    here = Run.plan(
        artifacts, "00_toy-hparams", experiment="00_toy", script="", hparams=hparams, seed=0
    )
    here.reserve(above=5)
    here.close("completed", {})
    assert queue(project, server)["name"] == "00_toy-hparams-v7"
    (waiting,) = server.state.queues.values()
    assert len(waiting["entries"]) == 3


def test_an_unknown_queue_is_refused_before_anything_is_made(
    project: Lab, server: ClearMLServer
) -> None:
    done = project.train("--queue", "defualt", project.path)
    assert done.code == 2
    assert "there is no such queue; did you mean default?" in done.err
    assert "queues there: default" in done.err
    assert not server.state.tasks


@pytest.mark.parametrize(
    "words", [["--offline"], ["--dev-run", "1"], ["--resume"], ["--jobs", "2"]], ids=str
)
def test_what_is_for_this_machine_does_not_go_with_a_queue(lab: Lab, words: list[str]) -> None:
    done = lab.train("--queue", "default", lab.path, *words)
    assert done.code == 2
    assert f"{words[0]} and --queue contradict each other" in done.err


def test_there_is_no_queue_without_a_server(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("CLEARML_", "TRAINS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(lab.root))
    done = lab.train("--queue", "default", lab.path)
    assert done.code == 5
    assert "ClearML is not configured on this machine" in done.err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"module": module', '"modul": module', "modul"),
        ("import torch\n", "import torch\nimport ignored\n", "No module named 'ignored'"),
    ],
    ids=["components", "a file that git ignores"],
)
def test_mistakes_are_found_before_anything_is_made(
    project: Lab, server: ClearMLServer, old: str, new: str, said: str
) -> None:
    project.config(old, new)
    (project.folder / "ignored.py").touch()
    done = project.train("--queue", "default", project.path)
    assert done.code == 2
    assert said in done.err
    assert not server.state.tasks


def test_hardware_of_the_agent_is_not_asked_of_this_machine(
    project: Lab, server: ClearMLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queueing, "verify", lambda *_: None)
    init = {"accelerator": "gpu", "devices": 8, "num_nodes": 2, "strategy": "ddp"}
    project.hparams("hparams", {"trainer": {"init": init}})
    task = queue(project, server)
    assert task["hyperparams"][HPARAMS]["trainer/init/devices"]["value"] == "8"


def test_a_checkpoint_to_start_from_must_be_on_the_server(
    project: Lab, server: ClearMLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queueing, "verify", lambda *_: None)
    assert project.train("--offline", project.path).code == 0
    first = project.run()
    section = {"checkpoint_task_id": first.name, "weights_only": True}
    project.hparams("hparams", {**HPARAMS_OF_TOY, "checkpoint": section})
    done = project.train("--queue", "default", project.path)
    assert done.code == 2
    assert "is on this machine alone" in done.err
    assert f"torch-lab sync {first.name} sends it" in done.err
    first.record.clearml_task_id = "0" * 32
    first.write()
    task = queue(project, server)
    assert task["parent"] == "0" * 32
    shown = task["hyperparams"][HPARAMS]["checkpoint/checkpoint_task_id"]["value"]
    assert shown == "0" * 32


# The code.


def test_what_is_on_disk_is_packed(project: Lab, tmp_path: Path) -> None:
    script = "toys/experiments/00_toy/hparams.py"
    (project.root / "run.sh").write_text("#!/bin/sh\n", encoding="utf-8")
    (project.root / "run.sh").chmod(0o755)
    (project.root / "data" / "artifacts" / "a-b-v1").mkdir(parents=True)
    (project.root / "data" / "artifacts" / "a-b-v1" / "run.json").touch()
    packed = pack(project.root, tmp_path / "code.zip")
    names = [name for name in packed.files if not name.startswith(".torch_lab/")]
    folder = "toys/experiments/00_toy"
    files = ["__main__.py", "hparams.py", "untracked.py"]
    assert sorted(names) == sorted(
        [".gitignore", "pyproject.toml", "run.sh", *(f"{folder}/{name}" for name in files)]
    )
    assert packed.left_out == (".env",)
    assert ".torch_lab/torch_lab/__init__.py" in packed.files
    bootstrap.unpack(packed.path, tmp_path / "there")
    assert os.access(tmp_path / "there" / "run.sh", os.X_OK)
    assert "import untracked" in (tmp_path / "there" / folder / "__main__.py").read_text()
    verify(packed, script)
    with pytest.raises(ScriptError, match="is not among the files"):
        verify(packed, "toys/experiments/00_toy/hparamz.py")
    project.write("untracked.py", "X = 2\n")
    with pytest.raises(UserError, match="changed while they were packed"):
        verify(packed, script)


def test_without_git_all_but_data_and_environments_is_packed(lab: Lab) -> None:
    for name in ("data/x.bin", ".venv/pyvenv.cfg", ".venv/x.py", "a/__pycache__/x.pyc", "a/b.txt"):
        (lab.root / name).parent.mkdir(parents=True, exist_ok=True)
        (lab.root / name).touch()
    folder = "toys/experiments/00_toy"
    assert project_files(lab.root) == sorted(
        ["a/b.txt", "pyproject.toml", f"{folder}/__main__.py", f"{folder}/hparams.py"]
    )


def test_a_project_that_is_too_large_is_refused(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packing, "MOST_BYTES", 2**20)
    (lab.root / "large.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(UserError, match=r"at most 1 MB.*the largest: large.bin \(3 MB\)"):
        pack(lab.root, tmp_path / "code.zip")


def test_nothing_is_unpacked_outside_of_the_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        archive.writestr("../outside.py", "")
    with pytest.raises(ValueError, match="leads out of"):
        bootstrap.unpack(tmp_path / "code.zip", tmp_path / "folder")
    assert not (tmp_path / "outside.py").exists()


def test_other_bytes_than_those_that_were_sent_are_not_run(
    project: Lab, server: ClearMLServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queueing, "verify", lambda *_: None)
    task = queue(project, server)
    (name,) = server.state.files
    server.state.files[name] += b"x"
    done = agent(task, server, tmp_path / "machine")
    assert done.returncode == 1
    assert "expected " in done.stderr
    assert not list((tmp_path / "machine").glob(".cache/torch_lab/queue/*/*"))


# Edited hparams.

ORIGINAL = {
    "seed": 0,
    "config": {
        "lr": 0.1,
        "name": "a",
        "flag": True,
        "none": None,
        "pair": (1, 2),
        "sizes": [1, 2],
        "path": Path("x"),
        "rates": [0.1],
        "empty": {},
        "password": "hunter22",
        "function": len,
        7: "seven",
    },
}


def shown(**changes: str | None) -> dict[str, str]:
    """Return what a task shows of `ORIGINAL` after changes in its config."""
    pairs = {name: each["value"] for name, each in parameters(recorded(), HPARAMS)}
    pairs |= {f"config/{name}": value for name, value in changes.items()}  # type: ignore[dict-item]
    return {name: value for name, value in pairs.items() if value is not None}


def recorded() -> dict[str, Any]:
    from torch_lab.redaction import masked

    found: dict[str, Any] = decoded(masked(encoded(ORIGINAL)))
    return found


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 0.001),
        ("lr", "1", 1.0),
        ("lr", "inf", float("inf")),
        ("name", "5", "5"),
        ("name", "", ""),
        ("flag", "false", False),
        ("none", "3", 3),
        ("none", "words", "words"),
        ("pair", "[3, 4]", (3, 4)),
        ("sizes", "[]", []),
        ("path", "y", Path("y")),
        ("rates", "[1, 0.5]", [1, 0.5]),
        ("password", "other", "other"),
    ],
)
def test_an_edited_value_has_the_type_that_it_had(name: str, text: str, value: Any) -> None:
    found, lines = edited(ORIGINAL, recorded(), shown(**{name: text}))
    assert found["config"] == {**ORIGINAL["config"], name: value}  # type: ignore[dict-item]
    assert type(found["config"][name]) is type(value)
    # Of a secret a record shows nothing, before and after.
    assert len(lines) == (name != "password")
    assert all(line.startswith(f"config.{name}") for line in lines)


def test_what_was_not_edited_keeps_its_value() -> None:
    found, lines = edited(ORIGINAL, recorded(), shown())
    assert found == ORIGINAL
    assert not lines


def test_a_value_of_another_machine_is_that_of_the_task() -> None:
    """A script may count processors: what the task shows is what is run."""
    here = {**ORIGINAL, "config": {**ORIGINAL["config"], "lr": 0.7}}  # type: ignore[dict-item]
    assert edited(here, recorded(), shown())[0]["config"]["lr"] == 0.1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("lr", "fast", "hparams/config/lr is 'fast': expected a number"),
        ("lr", "", "hparams/config/lr is '': expected a number"),
        ("lr", "True", "expected a number"),
        ("flag", "1", "expected True or False"),
        ("pair", "3", "expected a tuple"),
        ("sizes", "[1, 2.5]", "expected a list"),
        ("function", "max", "an object of the script"),
        ("lr", None, "hparams/config/lr was removed"),
        ("lrr", "1", "there is no such key; did you mean config/lr?"),
    ],
)
def test_a_wrong_edit_is_refused(name: str, text: str | None, said: str) -> None:
    with pytest.raises(HparamsError, match=said.replace("?", r"\?")):
        edited(ORIGINAL, recorded(), shown(**{name: text}))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config/lr", "fast", "hparams/config/lr is 'fast': expected a number; it was 0.1"),
        ("trainer/init/max_epochs", "2.5", "expected a whole number"),
        ("seed", "-1", "seed must be a whole number from 0"),
    ],
)
def test_a_wrong_edit_fails_the_task_in_words(
    project: Lab,
    server: ClearMLServer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str,
    said: str,
) -> None:
    monkeypatch.setattr(queueing, "verify", lambda *_: None)
    monkeypatch.setattr(queued.time, "sleep", lambda _: None)
    task = queue(project, server)
    task["status"] = "in_progress"
    edit(task, name, text)
    monkeypatch.setenv("CLEARML_TASK_ID", task["id"])
    done = project.train(project.path)
    assert done.code == 2
    assert said.partition(";")[0] in done.err
    assert (task["status"], task["status_reason"]) == ("failed", "HparamsError")
    assert said in task["status_message"]
    assert not any(project.runs)


# The real agent.


@pytest.fixture
def agent_environment(server: ClearMLServer, tmp_path: Path) -> dict[str, str]:
    """Return variables with which an agent runs tasks in a throw-away environment.

    Nothing is installed: an agent would otherwise change the `pip` of the Python that it is given.
    """
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    home = tmp_path / "machine"
    home.mkdir()
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        **server.environment(home),
        "CLEARML_WORKER_ID": "test:0",
        "CLEARML_AGENT_SKIP_PIP_VENV_INSTALL": str(folder / "bin" / "python"),
        "CLEARML_AGENT_SKIP_PYTHON_ENV_INSTALL": "1",
    }


class Agent:
    """A `clearml-agent` that takes tasks from the queue `default`."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.log = folder / "agent.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["clearml-agent", "daemon", "--queue", "default", "--foreground", "--cpu-only"],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Agent":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def wait(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_there():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


needs_agent = pytest.mark.skipif(
    shutil.which("clearml-agent") is None, reason="clearml-agent is not installed"
)
ENDED = ("completed", "failed", "stopped")


@pytest.mark.slow
@needs_agent
def test_an_agent_runs_what_is_queued(
    project: Lab, server: ClearMLServer, agent_environment: dict[str, str], tmp_path: Path
) -> None:
    good, wrong = queue(project, server), queue(project, server)
    edit(good, "config/lr", "0.5")
    edit(wrong, "config/lr", "fast")
    with Agent(agent_environment, tmp_path) as started:
        started.wait(lambda: {good["status"], wrong["status"]} <= set(ENDED))
        started.wait(
            lambda: "Process aborted" in server.state.console(wrong["id"]) or is_idle(server)
        )
    log = started.log.read_text()
    assert good["status"] == "completed", log
    assert "config.lr 0.1 -> 0.5" in server.state.console(good["id"])
    assert server.state.console(good["id"]).count("00_toy-hparams-v1 completed") == 1
    (record,) = (tmp_path / "machine").glob(f"**/{good['name']}/run.json")
    assert json.loads(record.read_text())["hparams"]["config"]["lr"] == 0.5
    assert {each["name"] for each in good["models"]["output"]} == {"best", "last"}
    assert (wrong["status"], wrong["status_reason"]) == ("failed", "HparamsError"), log
    assert "hparams/config/lr is 'fast': expected a number" in wrong["status_message"]
    assert not server.state.unknown


def is_idle(server: ClearMLServer) -> bool:
    """Return whether the agent has asked for another task since the last one."""
    return server.state.requests[-1].path == "queues.get_next_task"


LONG = """
import pytorch_lightning as pl, time

class Slow(pl.Callback):
    def on_train_batch_end(self, *_):
        time.sleep({seconds})
"""


@pytest.mark.slow
@needs_agent
def test_a_run_that_was_aborted_on_an_agent_goes_on_when_it_is_queued_again(
    project: Lab, server: ClearMLServer, agent_environment: dict[str, str], tmp_path: Path
) -> None:
    config = (project.folder / "__main__.py").read_text()
    callback = '"module": module, "callbacks": [Slow()]'
    project.write(
        "__main__.py", LONG.format(seconds=0.5) + config.replace('"module": module', callback)
    )
    project.hparams("hparams", {"trainer": {"init": {"max_epochs": 8}}})
    task = queue(project, server)
    api = queueing.found_server()
    with Agent(agent_environment, tmp_path) as started:
        started.wait(lambda: "epoch 1/8" in server.state.console(task["id"]))
        api.call("tasks.stop", task=task["id"])
        started.wait(lambda: task["status"] == "stopped")
        started.wait(lambda: is_idle(server))
        assert task["status"] == "stopped"
        assert "last" in {each["name"] for each in task["models"]["output"]}
        api.call("tasks.enqueue", task=task["id"], queue_name="default")
        started.wait(lambda: task["status"] == "completed")
    assert "goes on at step" in server.state.console(task["id"])
    (record,) = (tmp_path / "machine").glob(f"**/{task['name']}/run.json")
    assert len(json.loads(record.read_text())["resumed"]) == 1
