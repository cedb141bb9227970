"""`torch-lab sync`: what a run's folder has, its task has too, once, whatever came between."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clearml_server import DROP, ClearMLServer
from conftest import CONFIG, Lab
from test_train import scalars
from torch_lab.errors import (
    ExitCode,
    ServerError,
    UnreachableError,
    UserError,
)
from torch_lab.mirror import Progress, split_tag
from torch_lab.runs import Run
from torch_lab.server import Address, Server, file_url
from torch_lab.sync import Synced, sync, to_sync
from torch_lab.untracked import keep_untracked

EPOCHS = {"trainer": {"init": {"max_epochs": 2, "log_every_n_steps": 1}}}


@pytest.fixture
def clearml() -> Iterator[ClearMLServer]:
    """A ClearML server of this test's own."""
    with ClearMLServer() as server:
        yield server
        assert not server.state.unknown


@pytest.fixture
def server(clearml: ClearMLServer, tmp_path: Path) -> Server:
    """The client of it."""
    keys = clearml.environment(tmp_path)
    return Server(
        Address(
            clearml.api_url,
            clearml.files_url,
            "http://web",
            keys["CLEARML_API_ACCESS_KEY"],
            keys["CLEARML_API_SECRET_KEY"],
        )
    )


def trained(lab: Lab, hparams: dict[str, Any] | None = None, name: str = "hparams") -> Run:
    """Return the run of a training without ClearML."""
    script = lab.hparams(name, {**EPOCHS, **(hparams or {})})
    assert lab.train(script, "--offline").code == 0
    return lab.runs[-1]


def synced(run: Run, server: Server) -> Synced:
    return sync(Run.read(run.folder), server, lambda line: None)


def there(clearml: ClearMLServer, task: str) -> dict[str, dict[int, float]]:
    """Return the scalars of a task, by their names in the event files."""
    found: dict[str, dict[int, float]] = {}
    for event in clearml.state.events[task].scalars.values():
        name = f"{event['metric']}/{event['variant']}"
        found.setdefault(name, {})[event["iter"]] = event["value"]
    return found


def console(clearml: ClearMLServer, task: str) -> str:
    """Return what the mirror sent of the console; the SDK has words of its own."""
    logs = clearml.state.events[task].logs
    return "".join(event["msg"] for event in logs if event["worker"].startswith("console.log:"))


def test_the_server_agrees_with_the_folder_and_stays_so(
    lab: Lab, clearml: ClearMLServer, server: Server
) -> None:
    """All of a run is on its task afterwards; the second time there is nothing to send."""
    run = trained(
        lab, {"task": {"project_name": "toys/signs", "tags": ("toy",)}, "config": {"lr": 0.5}}
    )
    first = synced(run, server)
    assert first.differences == []
    task = clearml.state.tasks[first.task]
    assert (task["name"], task["status"], task["tags"]) == (run.name, "completed", ["toy"])
    assert first.sent.scalars == first.scalars
    assert task["hyperparams"]["hparams"]["config/lr"]["value"] == "0.5"
    assert task["hyperparams"]["run"]["seed"]["value"] == str(run.record.seed)
    typed = json.loads(task["configuration"]["hparams"]["value"])
    assert typed == run.record.hparams
    main = task["configuration"]["toys/experiments/00_toy/__main__.py"]
    assert main["value"] == (lab.folder / "__main__.py").read_text()
    assert "torch==" in task["script"]["requirements"]["pip"]
    assert "completed in" in clearml.state.console(first.task)
    for tag, points in scalars(run).items():
        assert there(clearml, first.task)["/".join(split_tag(tag))] == dict(points), tag
    for name in ("last", "best"):
        sidecar = run.sidecar(name)
        assert sidecar is not None and first.models[name] == sidecar["sha256"]
    requests = len(clearml.state.requests)
    again = synced(run, server)
    assert (again.task, again.differences, bool(again.sent)) == (first.task, [], False)
    sending = ("events.add_batch", "tasks.edit", "models.create", "models.edit")
    assert not [each for each in clearml.state.requests[requests:] if each.path in sending]


def test_parents_come_first(lab: Lab, clearml: ClearMLServer, server: Server) -> None:
    """A run that went on from another one, both offline, is its child on the server too."""
    parent = trained(lab)
    source = {"checkpoint_task_id": parent.name, "weights_only": True}
    child = trained(lab, {"checkpoint": source}, "more")
    artifacts = parent.folder.parent
    runs = to_sync(artifacts, [child.name], everything=False)
    assert [run.name for run in runs] == [parent.name, child.name]
    tasks = [synced(run, server).task for run in runs]
    told = clearml.state.tasks[tasks[1]]
    assert told["parent"] == tasks[0]
    models = {model["name"]: model["id"] for model in clearml.state.models.values()}
    of_parent = Progress.of(parent.folder).models["last"]["id"]
    assert told["hyperparams"]["run"]["parent_model"]["value"] == of_parent != models["last"]
    # Which has a task by now.
    assert [run.name for run in to_sync(artifacts, [child.name], everything=False)] == [child.name]
    assert len(to_sync(artifacts, [], everything=True)) == 2
    with pytest.raises(UserError, match="which runs"):
        to_sync(artifacts, [], everything=False)


@pytest.mark.parametrize("after", [3, 6, 9, 12, 15, 18])
def test_what_is_interrupted_is_finished_the_next_time(
    lab: Lab, clearml: ClearMLServer, server: Server, after: int
) -> None:
    """Wherever the server was lost: nothing is missing, and nothing is there twice."""
    run = trained(lab)
    count = 0

    def late(endpoint: str) -> bool:
        nonlocal count
        count += 1
        return count > after

    clearml.fault = DROP.only(late)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        synced(run, server)
    clearml.heal()
    found = synced(run, server)
    assert found.differences == []
    (task,) = clearml.state.tasks
    assert console(clearml, task) == run.console_log.read_text()


def test_what_was_sent_but_not_noted_is_there_once(
    lab: Lab, clearml: ClearMLServer, server: Server
) -> None:
    """As after a kill between the two: scalars are replaced, the console is asked for."""
    run = trained(lab)
    task = synced(run, server).task
    (run.folder / "tracking.json").unlink()
    found = synced(run, server)
    assert (found.task, found.differences) == (task, [])
    assert console(clearml, task) == run.console_log.read_text()
    assert len(clearml.state.models) == 2


def test_what_is_lost_there_is_sent_again(lab: Lab, clearml: ClearMLServer, server: Server) -> None:
    """Whatever the notes say: a point, a value, the file of a model."""
    run = trained(lab)
    task = synced(run, server).task
    events = clearml.state.events[task].scalars
    lost, changed, *_ = events
    del events[lost]
    events[changed]["value"] = 7.0
    for path in [path for path in clearml.state.files if "/models/" in path]:
        del clearml.state.files[path]
    found = synced(run, server)
    assert (found.task, found.differences) == (task, [])
    last = run.sidecar("last")
    assert last is not None and found.models["last"] == last["sha256"]
    # What the user has reported with the SDK is theirs.
    server.add_events(
        [
            {
                "type": "training_stats_scalar",
                "task": task,
                "iter": 1,
                "metric": "own",
                "variant": "a",
                "value": 1.0,
                "timestamp": 1,
            }
        ]
    )
    assert synced(run, server).differences == []
    # A checkpoint that is damaged here stays there as it was.
    run.checkpoint("last").write_bytes(b"damaged")
    assert synced(run, server).models["last"] == last["sha256"]


def test_all_forms_of_scalars_are_sent(lab: Lab, clearml: ClearMLServer, server: Server) -> None:
    """Those beside a large image, and several in one call, which lie in folders of their own."""
    main = CONFIG.replace('"module": module', '"callbacks": [Own()], "module": module')
    lab.write(
        "__main__.py",
        main
        + """
import pytorch_lightning as pl
class Own(pl.Callback):
    def on_train_end(self, trainer, module):
        writer = trainer.logger.experiment
        writer.add_image("noise", torch.rand(3, 2000, 2000), 1)
        writer.add_scalars("both", {"a": 1.0, "b": 2.0}, 1)
        writer.add_scalar("after", 3.0, 1)
""",
    )
    found = synced(trained(lab), server)
    assert found.differences == []
    series = there(clearml, found.task)
    assert [series[name] for name in ("both/both_a", "both/both_b", "after/after")] == [
        {1: 1.0},
        {1: 2.0},
        {1: 3.0},
    ]
    (image,) = clearml.state.events[found.task].images.values()
    assert (image["metric"], image["iter"]) == ("noise", 1)
    content = clearml.state.files[image["url"].removeprefix(f"{clearml.files_url}/")]
    assert content.startswith(b"\x89PNG")


def test_a_parent_that_is_synced_later_is_told(
    lab: Lab, clearml: ClearMLServer, server: Server
) -> None:
    """The child's task was there before that of its parent."""
    parent = trained(lab)
    child = trained(
        lab, {"checkpoint": {"checkpoint_task_id": parent.name, "weights_only": True}}, "more"
    )
    tasks = [synced(run, server).task for run in (child, parent, child)]
    assert tasks[0] == tasks[2]
    assert clearml.state.tasks[tasks[0]]["parent"] == tasks[1]


def test_a_server_that_forgot_gets_all_again(
    lab: Lab, clearml: ClearMLServer, server: Server
) -> None:
    """As a task of a new id, which the run's record has then."""
    run = trained(lab)
    before = synced(run, server).task
    clearml.forget()
    after = synced(run, server)
    assert after.task != before and after.differences == []
    assert Run.read(run.folder).record.clearml_task_id == after.task


def test_a_nan_is_not_a_zero(lab: Lab, clearml: ClearMLServer, server: Server) -> None:
    """The point is left out, the task is tagged, and its text says where."""
    lab.write(
        "__main__.py",
        CONFIG.replace('"module": module', '"callbacks": [Nan()], "module": module')
        + """
import pytorch_lightning as pl
class Nan(pl.Callback):
    def on_train_batch_end(self, trainer, module, *args):
        for name, value in (("mine/nan", float("nan")), ("mine/inf", float("inf"))):
            module.log(name, value if trainer.global_step == 3 else 1.0)
""",
    )
    run = trained(lab)
    found = synced(run, server)
    assert found.differences == []
    scalars_there = there(clearml, found.task)
    assert all(
        math.isfinite(value) for points in scalars_there.values() for value in points.values()
    )
    assert sorted(scalars_there["mine/nan"]) == [0, 1, 3, 4, 5, 6, 7]
    assert "nan" in clearml.state.tasks[found.task]["tags"]
    assert "mine/nan is nan at step 2" in clearml.state.console(found.task)
    assert "mine/inf is inf at step 2" in clearml.state.console(found.task)


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        (
            "raise KeyError('oh')",
            "failed",
            "KeyError: 'oh' (toys/experiments/00_toy/__main__.py, line",
        ),
        ("__import__('os').kill(__import__('os').getpid(), 15)", "stopped", "Interrupted: SIGTERM"),
        ("__import__('os').kill(__import__('os').getpid(), 9)", "stopped", ""),
    ],
)
def test_how_it_ended_is_told(
    lab: Lab, clearml: ClearMLServer, server: Server, code: str, status: str, told: str
) -> None:
    """Also of a run whose process was killed."""
    main = CONFIG.replace('"module": module', '"callbacks": [End()], "module": module')
    ending = f"class End(pl.Callback):\n    def on_train_batch_end(self, *args):\n        {code}\n"
    lab.write("__main__.py", f"{main}\nimport pytorch_lightning as pl\n{ending}")
    lab.forked(lab.path, "--offline")
    found = synced(lab.run(), server)
    task = clearml.state.tasks[found.task]
    assert task["status"] == status
    assert task["status_message"].startswith(told)
    if not told:
        assert task["status_reason"] == "its process ended without a word"
    assert found.differences == []


def test_what_is_gone_on_disk_is_gone_there(
    lab: Lab, clearml: ClearMLServer, server: Server
) -> None:
    """Models of checkpoints that are not kept any more, and their files."""
    run = trained(lab, {"checkpoint": {"keep": 2}})
    task = synced(run, server).task
    names = {model["name"] for model in clearml.state.models.values()}
    assert {"last", "best"} < names
    extra = next(path for path in run.checkpoints_folder.glob("best-*.ckpt"))
    extra.with_suffix(".json").unlink()
    extra.unlink()
    found = synced(run, server)
    assert (found.task, found.differences) == (task, [])
    assert {model["name"] for model in clearml.state.models.values()} == names - {extra.stem}
    used = {model["uri"] for model in clearml.state.models.values()}
    kept = {f"{clearml.files_url}/{path}" for path in clearml.state.files if "/models/" in path}
    assert kept == used


def test_a_disk_that_is_away_removes_nothing(
    lab: Lab, clearml: ClearMLServer, server: Server
) -> None:
    """Of a folder that is not there nothing is known."""
    run = trained(lab)
    synced(run, server)
    there_before = dict(clearml.state.models), dict(clearml.state.files)
    run.checkpoints_folder.rename(run.folder / "elsewhere")
    synced(run, server)
    models = [path for path in clearml.state.files if "/models/" in path]
    assert (clearml.state.models, clearml.state.files.keys() >= set(models)) == (
        there_before[0],
        True,
    )
    assert set(models) == {path for path in there_before[1] if "/models/" in path}


def test_a_file_of_two_models_stays_for_the_other(
    lab: Lab, clearml: ClearMLServer, server: Server
) -> None:
    """The best checkpoint that is the last one too is one file there."""
    run = trained(lab)
    for suffix in (".ckpt", ".json"):
        shutil.copy(
            run.checkpoint("last").with_suffix(suffix), run.checkpoints_folder / f"other{suffix}"
        )
    synced(run, server)
    uris = {model["name"]: model["uri"] for model in clearml.state.models.values()}
    assert uris["other"] == uris["last"]
    for suffix in (".ckpt", ".json"):
        (run.checkpoints_folder / f"other{suffix}").unlink()
    found = synced(run, server)
    assert found.differences == [] and "last" in found.models
    assert "other" not in {model["name"] for model in clearml.state.models.values()}


@pytest.mark.parametrize("names", [["--all", "x"], []], ids=["both", "neither"])
def test_runs_are_named_or_all_are_meant(lab: Lab, names: list[str]) -> None:
    """One of the two."""
    result = lab.command("sync", *names)
    assert result.code == ExitCode.USAGE, result.err


def test_no_secret_leaves_the_machine(lab: Lab, clearml: ClearMLServer, server: Server) -> None:
    """Neither out of the hparams nor out of a file that git does not have."""
    secret = "s3cr3t-v4lue"
    own = {"api_key": secret, "headers": {"Authorization": f"Bearer {secret}"}, "lr": 0.1}
    main = lab.folder / "__main__.py"
    prints = "import os; print('the token is', os.environ['HF_TOKEN'])\n"
    main.write_text(prints + main.read_text())
    lab.hparams("base", {**EPOCHS, "config": {}})
    lab.write(
        "hparams.py",
        "from torch_lab.utils import import_script_as_module\n"
        "hparams = import_script_as_module('base.py').hparams\n"
        f"hparams['config'].update({own!r}, credentials=('a', {secret!r}))\n",
    )
    assert lab.command("train", lab.path, "--offline", HF_TOKEN=secret).code == 0
    run = lab.run()
    found = synced(run, server)
    everything = repr(clearml.state.tasks) + repr(clearml.state.events) + repr(clearml.state.files)
    assert secret not in everything
    assert all(
        secret.encode() not in path.read_bytes() for path in run.folder.rglob("*") if path.is_file()
    )
    assert found.differences == []


def test_texts_that_git_does_not_have_are_masked(tmp_path: Path) -> None:
    """Under any name; files of secrets are left out, and those that cannot be read."""
    for name in ("conf.yaml", "creds.json", "run.sh", "note.txt"):
        (tmp_path / name).write_text('{"wandb_api_key": "s3cr3t-v4lue"}\n')
    (tmp_path / "prod.env").write_text("KEY=s3cr3t-v4lue\n")
    (tmp_path / "deploy").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\ns3cr3t\n")
    names = ["conf.yaml", "creds.json", "run.sh", "note.txt", "prod.env", "deploy", "gone.txt"]
    target = tmp_path / "kept.zip"
    assert sorted(keep_untracked(tmp_path, names, target)) == ["deploy", "prod.env"]
    with zipfile.ZipFile(target) as archive:
        assert len(archive.namelist()) == 4
        assert all(b"s3cr3t" not in archive.read(name) for name in archive.namelist())


def test_a_run_that_is_trained_now_is_left_alone(lab: Lab, server: Server) -> None:
    """What it logs is sent by itself."""
    run = trained(lab)
    run.record.state, run.record.ended = "running", None
    run.write()
    with pytest.raises(UserError, match="is being trained by process"):
        synced(run, server)


def test_progress_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    """It is asked for on the server then."""
    for text in ("", "[1]", '{"files": 3, "more": 4}', "{"):
        (tmp_path / "tracking.json").write_text(text)
        assert Progress.of(tmp_path).task == ""


def test_urls_lead_nowhere_else() -> None:
    """Whatever a project or a run is called."""
    url = file_url("http://files:8081/", "../up/é a", "..", "x?y#z", "last.ckpt")
    assert url == "http://files:8081/up/__a/x_y_z/last.ckpt"


def test_refusals_are_in_words(clearml: ClearMLServer, server: Server) -> None:
    """With the address, what was asked for and why not."""
    with pytest.raises(ServerError, match=r"refuses tasks.get_by_id \(400\): .*[Tt]ask"):
        server.call("tasks.get_by_id", task="0" * 32)
    wrong = Server(Address(clearml.api_url, clearml.files_url, "", "key", "wrong"))
    with pytest.raises(ServerError, match="does not accept the credentials"):
        wrong.call("tasks.get_all")
