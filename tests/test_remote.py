"""Going on from a ClearML task: the copy here if it is the same, else a verified download."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_lab
from clearml_server import DROP, HANG, UNAUTHORIZED, ClearMLServer
from conftest import CONFIG, Lab, Result
from torch_lab import remote
from torch_lab.checkpoints import Source, find_source
from torch_lab.errors import CheckpointError, DamagedError, ExitCode, TrackingError
from torch_lab.remote import asking
from torch_lab.runs import Run
from torch_lab.server import Address, Server
from torch_lab.sync import sync
from warm import Warm

LOADING = CONFIG.replace(
    '"module": LabModule(torch.nn.Linear(4, 2))',
    '"module": LabModule(torch_lab.load_weights(torch.nn.Linear(4, 2), *arguments))',
).replace("import torch\n", "import torch\nimport torch_lab\n", 1)


@pytest.fixture
def clearml() -> Iterator[ClearMLServer]:
    with ClearMLServer() as server:
        yield server
        assert not server.state.unknown


@dataclass
class There:
    """A run on a server, and a project that has never heard of it."""

    lab: Lab
    clearml: ClearMLServer
    server: Server
    run: Run
    root: Path
    seen: int = 0
    """How many requests there were before the test."""

    @property
    def task(self) -> str:
        return str(self.run.record.clearml_task_id)

    def find(
        self, wanted: str | None = None, name: str = "last", root: Path | None = None
    ) -> Source:
        return find_source(wanted or self.task, name, root or self.root)

    def model(self, name: str) -> dict[str, Any]:
        models = self.clearml.state.models.values()
        return next(model for model in models if model["name"] == name)

    def file(self, name: str) -> str:
        """Return the path of a checkpoint on the file server."""
        return str(self.model(name)["uri"]).removeprefix(f"{self.clearml.files_url}/")

    def downloads(self) -> int:
        requests = self.clearml.state.requests[self.seen :]
        return len([each for each in requests if each.method == "GET" and "/models/" in each.path])

    def sync(self) -> None:
        sync(Run.read(self.run.folder), self.server, lambda line: None)
        self.run = Run.read(self.run.folder)


@pytest.fixture
def there(
    lab: Lab,
    clearml: ClearMLServer,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> There:
    keys = (clearml.access_key, clearml.secret_key)
    server = Server(Address(clearml.api_url, clearml.files_url, "", *keys), limit_s=1.0)
    monkeypatch.setattr(remote, "connected", lambda mode: (server, ""))
    assert lab.train(lab.path, "--offline").code == 0
    found = There(lab, clearml, server, lab.run(), tmp_path_factory.mktemp("elsewhere"))
    found.sync()
    found.seen = len(clearml.state.requests)
    return found


def bytes_of(run: Run, name: str = "last") -> bytes:
    return run.checkpoint(name).read_bytes()


# Online, as a user does it.


class Online:
    """Two projects with the same scripts, and a server that both know."""

    def __init__(self, clearml: ClearMLServer, warm: Warm, lab: Lab, other: Path) -> None:
        self.clearml = clearml
        self.warm = warm
        self.lab = lab
        self.other = other

    def run(self, root: Path, *words: str | Path) -> Result:
        env = {**os.environ, **self.clearml.environment(root), "TORCH_LAB_ROOT": str(root)}
        with self.lab.start(*words, python=self.warm.python, env=env) as process:
            out, err = process.communicate(timeout=90)
        return Result(process.returncode, out, err)

    def train(self, root: Path, name: str, checkpoint: dict[str, Any]) -> Run:
        init = {"max_epochs": 2 if not checkpoint or checkpoint.get("weights_only") else 4}
        script = self.lab.hparams(name, {"trainer": {"init": init}, "checkpoint": checkpoint})
        result = self.run(root, "train", script)
        assert result.code == 0, result.err
        folder = max((root / "data" / "artifacts").glob(f"*-{name}-v*"))
        return Run.read(folder)

    def task(self, run: Run) -> dict[str, Any]:
        return self.clearml.state.tasks[str(run.record.clearml_task_id)]


@pytest.mark.slow
def test_a_chain_over_two_machines(
    clearml: ClearMLServer, lab: Lab, warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Weights alone, in full, and inference by task id; where the run is not, it is downloaded."""
    online = Online(clearml, warm, lab, tmp_path_factory.mktemp("other"))
    lab.write("__main__.py", LOADING)
    first = online.train(lab.root, "first", {})
    task = first.record.clearml_task_id
    here = {"checkpoint_task_id": task, "weights_only": True}
    alone = online.train(lab.root, "alone", here)
    assert alone.record.parent is not None and alone.record.parent["task"] == task
    assert online.task(alone)["parent"] == task
    assert not [
        each for each in clearml.state.requests if each.method == "GET" and "/models/" in each.path
    ]
    (line,) = (first.folder / "derived_models.log").read_text().splitlines()
    assert line.split("\t")[:2] == [alone.name, str(alone.folder)]

    full = online.train(online.other, "full", {"checkpoint_task_id": task})
    sidecar = full.sidecar("last")
    assert sidecar is not None and (sidecar["step"], full.record.state) == (16, "completed")
    model = next(each for each in online.task(first)["models"]["output"] if each["name"] == "last")
    parent = full.record.parent or {}
    assert (parent["task"], parent["model"], parent["run"]) == (task, model["model"], first.name)
    assert parent["sha256"] == (first.sidecar("last") or {})["sha256"]
    assert online.task(full)["parent"] == task
    assert online.task(full)["hyperparams"]["run"]["parent_model"]["value"] == model["model"]
    assert not (online.other / "data" / "artifacts" / first.name).exists()

    result = online.run(online.other, "infer", lab.path, str(task), "best")
    assert result.code == 0, result.err
    assert f"best of {first.name}" in result.err
    again = online.run(online.other, "infer", lab.path, first.name, "best")
    assert again.code == 0, again.err
    files = [
        each for each in clearml.state.requests if each.method == "GET" and "best." in each.path
    ]
    assert len(files) == 1


# What is taken.


def test_the_copy_here_serves_if_it_is_the_same(there: There) -> None:
    """Whatever it is called here; one that is damaged is downloaded, one that is newer is not."""
    root = there.lab.root
    found = there.find(root=root)
    assert (found.path, there.downloads()) == (there.run.checkpoint("last"), 0)
    assert found.parent()["model"] == there.model("last")["id"]
    named = there.find(there.run.name, root=root)
    assert named.parent()["model"] == there.model("last")["id"]
    content = bytes_of(there.run)
    there.run.checkpoint("last").write_bytes(content[:-1] + b"x")
    found = there.find(root=root)
    assert found.path.parent == root / "data" / "cache" / "checkpoints"
    assert found.path.read_bytes() == content
    assert (str(found), found.run is not None) == (f"last of {there.run.name}", True)
    there.run.checkpoint("last").write_bytes(content)
    there.model("last")["metadata"]["step"]["value"] = "3"
    there.model("last")["metadata"]["sha256"]["value"] = "0" * 64
    assert there.find(root=root).path == there.run.checkpoint("last")
    there.model("last")["metadata"]["step"]["value"] = "8"
    with pytest.raises(DamagedError):
        _without_local(there).find(root=root)


def _without_local(there: There) -> There:
    for path in there.run.checkpoints_folder.iterdir():
        path.unlink()
    return there


def test_the_copy_here_serves_without_the_server(there: There) -> None:
    """As before there was one: offline, away, or without the task; a model's id is known too."""
    root = there.lab.root
    best = there.model("best")["id"]
    with asking("offline"):
        requests = len(there.clearml.state.requests)
        assert there.find(root=root).path == there.run.checkpoint("last")
        assert there.find(name=best, root=root).path == there.run.checkpoint("best")
        assert len(there.clearml.state.requests) == requests
    there.clearml.fault = DROP
    assert there.find(root=root).path == there.run.checkpoint("last")
    there.clearml.heal()
    there.clearml.forget()
    assert there.find(root=root).path == there.run.checkpoint("last")


def test_a_checkpoint_is_downloaded_once(there: There) -> None:
    """By the task's id, the run's name, with or without version, and by the id of the model."""
    by_id = there.find()
    assert by_id.path.read_bytes() == bytes_of(there.run)
    assert by_id.path.name == f"{by_id.sha256}.ckpt"
    told = json.loads(by_id.path.with_suffix(".json").read_text())
    assert (told["sha256"], told["task"]) == (by_id.sha256, there.task)
    for wanted in (there.run.name, "00_toy-hparams"):
        assert there.find(wanted).path == by_id.path
    assert there.find(name=there.model("last")["id"]).parent()["checkpoint"] == "last"
    assert there.downloads() == 1
    assert there.find(name="best").path.read_bytes() == bytes_of(there.run, "best")
    # Damaged in the cache.
    by_id.path.write_bytes(b"other")
    assert there.find().path.read_bytes() == bytes_of(there.run)


def test_names_are_those_of_runs(there: There) -> None:
    """The newest version that has the checkpoint; neither other scripts nor prefixes."""
    tasks = there.clearml.state.tasks
    own = tasks[there.task]
    for number, name in enumerate(("00_toy-hparams-v2", "00_toy-hparams-v9-v1", "00_toy-hp-v7")):
        other = json.loads(json.dumps(own)) | {"id": f"{number:032x}", "name": name}
        stem = name.removeprefix("00_toy-").rpartition("-v")[0]
        other["hyperparams"]["run"]["script"]["value"] = f"/x/00_toy/{stem}.py"
        if number == 0:
            other["models"]["output"] = [
                entry for entry in other["models"]["output"] if entry["name"] == "best"
            ]
        tasks[other["id"]] = other
    assert there.find("00_toy-hparams").remote.task == there.task  # type: ignore[union-attr]
    found = there.find("00_toy-hparams", "best").remote
    assert found is not None and found.run == "00_toy-hparams-v2"
    with pytest.raises(CheckpointError, match="neither here nor on ClearML; did you mean 00_toy-h"):
        there.find("00_toy-hprams")
    tasks["f" * 32] = {**own, "id": "f" * 32}
    with pytest.raises(CheckpointError, match="2 tasks of the run 00_toy-hparams-v1: "):
        there.find("00_toy-hparams-v1")


def test_a_model_of_others_is_cached_by_its_address(there: There) -> None:
    """Without a sha256 in its metadata; the digest is recorded beside it."""
    there.model("last")["metadata"] = {}
    found = there.find()
    assert json.loads(found.path.with_suffix(".json").read_text())["sha256"] == found.sha256
    assert there.find().path == found.path and there.downloads() == 1
    other = torch.nn.Linear(4, 2)
    torch.save(other.state_dict(), there.root / "other.pt")
    there.clearml.state.files[there.file("last")] = (there.root / "other.pt").read_bytes()
    there.model("last")["last_update"] = "later"
    weights = torch_lab.load_weights(torch.nn.Linear(4, 2), there.task, root=there.root)
    assert torch.equal(weights.weight, other.weight)


# What does not come.


def test_a_corrupted_download_is_refused(there: There) -> None:
    """Nothing of it stays; the next command gets it whole."""
    path = there.file("last")
    whole = there.clearml.state.files[path]
    there.clearml.state.files[path] = whole[:-9] + b"corrupted"
    with pytest.raises(DamagedError, match=f"last of {there.run.name} is damaged on ClearML"):
        there.find()
    cache = there.root / "data" / "cache" / "checkpoints"
    assert [item.name for item in cache.iterdir()] == [".lock"]
    there.clearml.state.files[path] = whole
    assert there.find().path.read_bytes() == whole


def test_an_interrupted_download_goes_on(there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where it stopped: what has come is not asked for again."""
    whole = bytes_of(there.run)
    cut = len(whole) // 2
    asked: list[int] = []
    read = Server.read

    def reading(self: Server, url: str, start: int = 0) -> Iterator[bytes]:
        asked.append(start)
        content = b"".join(read(self, url, start))
        yield content[: cut if not start else None]
        if not start:
            there.clearml.files_fault = HANG
            yield from read(self, url, 1)

    monkeypatch.setattr(Server, "read", reading)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"last of .*does not answer") as caught:
        there.find()
    assert time.monotonic() - begun < 10 and "where the download has stopped" in str(
        caught.value.hint
    )
    there.clearml.heal()
    assert there.find().path.read_bytes() == whole
    assert asked == [0, cut, cut]


def test_a_file_elsewhere_is_copied_and_never_moved(there: There, tmp_path: Path) -> None:
    """A model that was registered where it lies stays there."""
    original = tmp_path / "weights of mine.ckpt"
    original.write_bytes(bytes_of(there.run))
    there.model("last")["uri"] = original.as_uri()
    found = there.find()
    assert found.path.read_bytes() == original.read_bytes() and found.path.is_relative_to(
        there.root
    )
    assert original.is_file()
    there.model("best").update(metadata={}, uri=(tmp_path / "gone.ckpt").as_uri())
    with pytest.raises(CheckpointError, match="is a file of another machine"):
        there.find(name="best")
    there.model("best")["uri"] = "s3://bucket/best.ckpt"
    with pytest.raises(
        CheckpointError, match=r"s3://bucket/best\.ckpt is where only tools of ClearML"
    ):
        there.find(name="best")


@pytest.mark.parametrize("end", ["failed_uploading", "uploading_file"])
def test_what_was_never_uploaded_is_refused(there: There, end: str) -> None:
    """The SDK registers it all the same."""
    there.model("last")["uri"] = f"{there.clearml.files_url}/{end}"
    with pytest.raises(CheckpointError, match="was never uploaded to ClearML") as caught:
        there.find()
    assert f"torch-lab sync {there.run.name}" in str(caught.value.hint)


def test_another_host_gets_no_credentials(there: There) -> None:
    """Whoever can write a model's address must not get the reader's token."""
    with ClearMLServer() as foreign:
        foreign.state.files["x.ckpt"] = bytes_of(there.run)
        there.model("last")["uri"] = f"{foreign.files_url}/x.ckpt"
        seen: list[str | None] = []
        request = there.server._session.__class__.request

        def watched(self: Any, method: str, url: str, **options: Any) -> Any:
            if url.startswith(foreign.files_url):
                seen.append((options.get("headers") or {}).get("Authorization"))
            return request(self, method, url, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(there.server._session.__class__, "request", watched)
            assert there.find().path.read_bytes() == bytes_of(there.run)
        assert seen == [None]


@pytest.mark.parametrize("digest", ["../../../../escaped", "/tmp/escaped", "a" * 63, "A" * 64])
def test_nothing_escapes_the_cache(there: There, digest: str) -> None:
    """Whatever names and digests a server tells."""
    model, task = there.model("last"), there.clearml.state.tasks[there.task]
    model["metadata"]["sha256"]["value"] = digest
    model["name"] = "../../../escaped"
    for entry in task["models"]["output"]:
        entry["name"] = "../" * 6 + entry["name"]
    found = there.find(name=model["id"])
    assert found.path.parent == there.root / "data" / "cache" / "checkpoints"
    assert {path.suffix for path in found.path.parent.iterdir()} == {"", ".ckpt", ".json"}
    assert there.find(name=model["id"], root=there.lab.root).path.is_file()


def test_code_in_a_download_is_not_run(there: There, tmp_path: Path) -> None:
    """It is read like any checkpoint: tensors and plain values alone."""
    torch.save({"state_dict": {}, "code": Lab}, tmp_path / "code.ckpt")
    there.clearml.state.files[there.file("last")] = (tmp_path / "code.ckpt").read_bytes()
    there.model("last")["metadata"] = {}
    with pytest.raises(CheckpointError, match="it holds code"):
        there.find().load()


# Mistakes, in the command's words.


def mistake(there: There, checkpoint: dict[str, Any], *flags: str) -> Result:
    """Train in a project without that run, which must fail before anything is created."""
    script = there.lab.hparams("mistaken", {"checkpoint": checkpoint})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_LAB_ROOT", str(there.root))
        result = there.lab.train(script, *flags)
    assert not (there.root / "data" / "artifacts").exists()
    assert result.err.count("\n") <= 2
    return result


def test_mistakes_are_told_in_a_line(there: There) -> None:
    """Exit 2, with what there is; nothing was created."""
    wanted = {"checkpoint_task_id": there.task}
    cases = [
        ({"checkpoint_task_id": "0" * 32}, f"ClearML has no task {'0' * 32}"),
        ({"checkpoint_task_id": "nothing"}, "no run 'nothing', neither here nor on ClearML"),
        (wanted | {"checkpoint_name": "bst"}, "has no checkpoint 'bst'; did you mean best?"),
        (wanted | {"checkpoint_name": "1" * 32}, "has no model"),
    ]
    for checkpoint, words in cases:
        result = mistake(there, checkpoint)
        assert (result.code, words in result.err) == (ExitCode.USAGE, True), result.err
        assert "mistaken.py: checkpoint: " in result.err
    assert "it has: best, last" in mistake(there, wanted | {"checkpoint_name": "bst"}).err


def test_another_experiment_gives_weights_alone(there: There) -> None:
    """Going on in full from its task is refused."""
    run = there.clearml.state.tasks[there.task]["hyperparams"]["run"]
    run["script"]["value"] = "/x/experiments/07_other/hparams.py"
    result = mistake(there, {"checkpoint_task_id": there.task})
    assert result.code == ExitCode.USAGE
    assert "is of the experiment 07_other, and this is 00_toy" in result.err
    assert there.downloads() == 0
    weights = torch_lab.load_weights(torch.nn.Linear(4, 2), there.task, root=there.root)
    assert torch.equal(weights.weight, there.find().load()["state_dict"]["weight"])


def test_a_run_of_another_experiment_here_gives_weights_alone(lab: Lab) -> None:
    """As one on ClearML does; the path of its file is taken as it is."""
    assert lab.train(lab.path, "--offline").code == 0
    (lab.folder.parent / "01_next").mkdir()
    config = lab.write("../01_next/__main__.py", CONFIG)

    def goes_on(wanted: str, **section: bool) -> Result:
        hparams = {
            "checkpoint": {"checkpoint_task_id": wanted, **section},
            "trainer": {"init": {"max_epochs": 3}},
        }
        config.with_name("hparams.py").write_text(f"hparams = {hparams!r}")
        return lab.train(config.with_name("hparams.py"), "--offline")

    parent = lab.run()
    refused = goes_on(parent.name)
    assert refused.code == ExitCode.USAGE
    assert "is of the experiment 00_toy, and this is 01_next" in refused.err
    assert len(lab.runs) == 1
    assert goes_on(parent.name, weights_only=True).code == 0
    assert goes_on(str(parent.checkpoint("last"))).code == 0


def test_no_permission_is_told(there: There) -> None:
    """Of the API and of the file server."""
    there.clearml.fault = UNAUTHORIZED
    result = mistake(there, {"checkpoint_task_id": there.task})
    assert (result.code, "no permission: " in result.err) == (ExitCode.USAGE, True), result.err
    there.clearml.heal()
    there.clearml.files_fault = UNAUTHORIZED
    result = mistake(there, {"checkpoint_task_id": there.task})
    assert (result.code, "no permission: " in result.err) == (ExitCode.USAGE, True), result.err


def test_offline_touches_nothing(there: There) -> None:
    """A task that is not here is an error that says so; a cached copy changes nothing."""
    requests = len(there.clearml.state.requests)
    result = mistake(there, {"checkpoint_task_id": there.task}, "--offline")
    assert (result.code, "offline, ClearML is not asked" in result.err) == (2, True), result.err
    assert len(there.clearml.state.requests) == requests


def test_a_server_that_hangs_is_told_in_time(there: There) -> None:
    """When it is looked for, or while it is asked."""
    there.clearml.fault = HANG
    begun = time.monotonic()
    result = mistake(there, {"checkpoint_task_id": there.task})
    assert (result.code, "does not answer" in result.err) == (ExitCode.USAGE, True), result.err
    assert time.monotonic() - begun < 10


def test_without_a_server_an_id_from_elsewhere_is_an_error(
    there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That says why there is none; with --online it is ClearML's own error."""
    monkeypatch.setattr(remote, "connected", lambda mode: (None, "ClearML is not configured"))
    with pytest.raises(CheckpointError, match=f"{there.task}.* .ClearML is not configured"):
        there.find()

    def refusing(mode: str) -> Any:
        raise TrackingError("ClearML is not configured")

    monkeypatch.setattr(remote, "connected", refusing)
    with asking("online"), pytest.raises(TrackingError):
        there.find()


# Lineage.


def test_children_are_noted_once(there: There) -> None:
    """In the parent's folder; not those that come to nothing, and not again when they go on."""
    lab, parent = there.lab, there.run
    section = {"checkpoint_task_id": parent.name, "weights_only": True}
    child = lab.hparams("child", {"trainer": {"init": {"max_epochs": 1}}, "checkpoint": section})
    assert lab.train(child, "--offline").code == 0
    lab.hparams("typo", {"checkpoint": section, "config": {"monitor": "loss/valdate"}})
    assert lab.train(lab.folder / "typo.py", "--offline").code == ExitCode.USAGE
    assert lab.train(child, "--offline", "--dev-run", "1").code == 0
    (line,) = (parent.folder / "derived_models.log").read_text().splitlines()
    run = next(run for run in lab.runs if run.name == "00_toy-child-v1")
    assert line.split("\t") == [run.name, str(run.folder), run.record.started, "none"]
    assert (run.record.parent or {})["task"] == there.task
    source = replace(there.find(root=lab.root), run=Run.read(parent.folder))
    from torch_lab.checkpoints import note_child

    note_child(source, run)
    assert len((parent.folder / "derived_models.log").read_text().splitlines()) == 1
