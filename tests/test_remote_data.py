"""ClearML datasets: uploaded in versions, fetched once, verified, and told by the run."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZipFile

import pytest

import example_project
from clearml_server import DROP, REFUSE, UNAUTHORIZED, ClearMLServer
from conftest import Lab, Result
from torch_lab import remote
from torch_lab.errors import ExitCode, UserError
from torch_lab.remote import asking
from torch_lab.remote_data import dataset_folder
from torch_lab.runs import Run
from torch_lab.server import Address, Server
from warm import Warm

FILES = {"a.txt": b"a" * 3000, "below/b.txt": b"b", "below/gone.txt": b"gone"}
CHANGED = {"a.txt": b"a" * 3000, "below/b.txt": b"other", "c.txt": b"c"}
UPLOAD = """
import sys
from pathlib import Path
from torch_lab.errors import TorchLabError
from torch_lab.remote_data import upload_dataset
try:
    print(upload_dataset(Path(sys.argv[1]), "letters", "toys"))
except TorchLabError as error:
    print(error.message)
    sys.exit(int(error.exit_code))
"""


@dataclass
class Uploaded:
    """A server with two versions of a dataset, made by the SDK from two folders."""

    clearml: ClearMLServer
    warm: Warm
    root: Path
    ids: list[str] = field(default_factory=list)

    def run(self, *words: str | Path, **variables: str) -> Result:
        env = {**os.environ, **self.clearml.environment(self.root), **variables}
        done = subprocess.run(
            [self.warm.python, *map(str, words)],
            env={**env, "TORCH_LAB_ROOT": str(self.root)},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def upload(self, files: dict[str, bytes]) -> Result:
        shutil.rmtree(self.root / "letters", ignore_errors=True)
        for name, content in files.items():
            path = self.root / "letters" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (self.root / "upload.py").write_text(UPLOAD)
        return self.run(self.root / "upload.py", self.root / "letters")

    def archive(self, dataset: str) -> str:
        """Return the path on the file server of the archive of a version."""
        found = [path for path in self.clearml.state.files if dataset in path and ".zip" in path]
        (path,) = found
        return path

    def listing(self, dataset: str) -> str:
        """Return the path on the file server of the list of a version's files."""
        files = self.clearml.state.files
        (path,) = [path for path in files if dataset in path and path.endswith("state.json")]
        return path

    def downloads(self) -> list[str]:
        requests = self.clearml.state.requests
        return [each.path for each in requests if each.method == "GET" and ".zip" in each.path]


@pytest.fixture(scope="module")
def uploaded(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uploaded]:
    with ClearMLServer() as clearml:
        found = Uploaded(clearml, warm, tmp_path_factory.mktemp("uploads"))
        for files in (FILES, FILES, CHANGED):
            result = found.upload(files)
            assert result.code == 0, result.err
            found.ids.append(result.out.strip())
        yield found
        assert not clearml.state.unknown


@pytest.fixture
def project(uploaded: Uploaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project that knows the server, which is as it was afterwards."""
    keys = (uploaded.clearml.access_key, uploaded.clearml.secret_key)
    address = Address(uploaded.clearml.api_url, uploaded.clearml.files_url, "", *keys)
    monkeypatch.setattr(remote, "connected", lambda mode: (Server(address, limit_s=1.0), ""))
    monkeypatch.setenv("TORCH_LAB_ROOT", str(tmp_path))
    state = uploaded.clearml.state
    before = dict(state.files), json.dumps(state.tasks)
    state.requests.clear()
    yield tmp_path
    uploaded.clearml.heal()
    state.files, state.tasks = before[0], json.loads(before[1])


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_versions_have_parents(uploaded: Uploaded) -> None:
    """The same files are no new version; a changed one stores what has changed."""
    first, same, second = uploaded.ids
    assert first == same != second
    state = uploaded.clearml.state.files[uploaded.listing(second)]
    assert json.loads(state)["dependency_graph"][second] == [first]
    archive = uploaded.clearml.state.files[uploaded.archive(second)]
    assert sorted(ZipFile(io.BytesIO(archive)).namelist()) == ["below/b.txt", "c.txt"]


def test_a_version_is_fetched_once(uploaded: Uploaded, project: Path) -> None:
    """With what its parents have; offline the copy serves, and one that was changed does not."""
    first, _, second = uploaded.ids
    with asking("auto") as access:
        folder = dataset_folder(second)
        assert dataset_folder(second) == folder == project / "data" / "cache" / "datasets" / second
    assert content(folder) == CHANGED
    told = {"id": second, "name": "letters", "project": "toys", "version": "1.0.1"}
    assert access.datasets == [told]
    assert content(dataset_folder(first)) == FILES
    assert len(uploaded.downloads()) == 3
    requests = len(uploaded.clearml.state.requests)
    with asking("offline") as access:
        assert content(dataset_folder(second)) == CHANGED
    assert (access.datasets, len(uploaded.clearml.state.requests)) == ([told], requests)
    os.utime(folder / "a.txt")
    with asking("offline"):
        dataset_folder(second)
    (folder / "a.txt").write_bytes(b"A" * 3000)
    assert content(dataset_folder(second)) == CHANGED


def test_a_damaged_archive_is_refused(uploaded: Uploaded, project: Path) -> None:
    """By the sha256 of each file; nothing of it serves, and the next command gets it whole."""
    first = uploaded.ids[0]
    path = uploaded.archive(first)
    whole = uploaded.clearml.state.files[path]
    other = io.BytesIO()
    with ZipFile(other, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data.upper())
    for damaged in (other.getvalue(), whole[:-40], b"", whole.replace(b"a.txt", b"x.txt")):
        uploaded.clearml.state.files[path] = damaged
        with pytest.raises(UserError, match="a dataset is damaged on ClearML"):
            dataset_folder(first)
        assert not (project / "data" / "cache" / "datasets" / first).exists()
    uploaded.clearml.state.files[path] = whole
    assert content(dataset_folder(first)) == FILES


def test_an_interrupted_fetch_goes_on(
    uploaded: Uploaded, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where the download stopped."""
    first = uploaded.ids[0]
    asked: list[int] = []
    read = Server.read

    def reading(self: Server, url: str, start: int = 0) -> Iterator[bytes]:
        whole = b"".join(read(self, url, start))
        if not url.endswith(".zip"):
            yield whole
            return
        asked.append(start)
        yield whole[: 50 if not start else None]
        if not start:
            uploaded.clearml.files_fault = DROP
            yield from read(self, url, 1)

    monkeypatch.setattr(Server, "read", reading)
    with pytest.raises(UserError, match=f"dataset {first}: .*cannot be reached"):
        dataset_folder(first)
    uploaded.clearml.heal()
    assert content(dataset_folder(first)) == FILES
    assert asked == [0, 50]


def test_mistakes_are_told_in_a_line(uploaded: Uploaded, project: Path) -> None:
    """Of the user's kind, with what is wrong; nothing is left of them in the cache."""
    first, state = uploaded.ids[0], uploaded.clearml.state
    with pytest.raises(UserError, match=f"ClearML has no dataset {'0' * 32}"):
        dataset_folder("0" * 32)
    for wrong in ("../../x", "letters", ""):
        with pytest.raises(UserError, match="is no id of a ClearML dataset"):
            dataset_folder(wrong)
    with asking("offline"), pytest.raises(UserError, match="not in the cache; offline, ClearML"):
        dataset_folder(first)
    state.tasks[first]["status"] = "in_progress"
    with pytest.raises(UserError, match="is not finalised"):
        dataset_folder(first)
    state.tasks[first]["status"] = "completed"
    state.tasks[first]["system_tags"] = []
    with pytest.raises(UserError, match="and no dataset"):
        dataset_folder(first)
    state.tasks[first]["system_tags"] = ["dataset"]
    for fault, words in ((UNAUTHORIZED, "no permission: "), (REFUSE, "cannot be reached")):
        uploaded.clearml.fault = fault
        with pytest.raises(UserError, match=f"dataset {first}: {words}|dataset .*{words}"):
            dataset_folder(first)
        uploaded.clearml.heal()
    assert not list((project / "data" / "cache" / "datasets").glob("[0-9a-f]*"))


def test_no_file_leads_out_of_the_folder(uploaded: Uploaded, project: Path) -> None:
    """Whatever a dataset says that it has; and links are not followed."""
    first, state = uploaded.ids[0], uploaded.clearml.state
    listing = uploaded.listing(first)
    told = json.loads(state.files[listing])
    for name in ("../../escaped", "/tmp/escaped", "a/../../b", ""):
        told["dataset_file_entries"][0]["relative_path"] = name
        state.files[listing] = json.dumps(told).encode()
        with pytest.raises(UserError, match="would lie outside of its folder"):
            dataset_folder(first)
    told["dataset_file_entries"].pop(0)
    told["dataset_link_entries"] = [{"link": "s3://x/y"}]
    state.files[listing] = json.dumps(told).encode()
    with pytest.raises(UserError, match="has 1 links to files"):
        dataset_folder(first)
    state.files[listing] = b"no list"
    with pytest.raises(UserError, match="list of files that cannot be read"):
        dataset_folder(first)


@pytest.mark.slow
def test_the_demo_trains_with_a_dataset(uploaded: Uploaded, lab: Lab, project: Path) -> None:
    """It is uploaded once, fetched elsewhere, and the run and its task say which version it was."""
    words = ("-m", "example_project.preprocess.digits", "--upload")
    result = uploaded.run(*words)
    assert result.code == 0, result.err
    folder, dataset = result.out.splitlines()
    assert folder == str(uploaded.root / "data" / "processed" / "digits")
    again = uploaded.run(*words)
    assert (again.code, again.out) == (0, result.out), again.err

    demo = Path(example_project.__file__).parent / "experiments" / "00_mnist_demo"
    shutil.copytree(demo, lab.root / "00_mnist_demo")
    script = lab.root / "00_mnist_demo" / "fetched.py"
    script.write_text(
        "from torch_lab.utils import import_script_as_module\n"
        'hparams = import_script_as_module("hparams.py").hparams\n'
        f'hparams["config"] |= {{"dataset_id": {dataset!r}, "dataset": "no such"}}\n'
        'hparams["trainer"]["init"]["max_epochs"] = 1\n'
    )
    env = {**os.environ, **uploaded.clearml.environment(lab.root)}
    with lab.start("train", script, python=uploaded.warm.python, env=env) as process:
        _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    run = Run.read(lab.root / "data" / "artifacts" / "00_mnist_demo-fetched-v1")
    told = {"id": dataset, "name": "digits", "project": "example_project", "version": "1.0.0"}
    assert run.record.datasets == [told]
    task = uploaded.clearml.state.tasks[str(run.record.clearml_task_id)]
    assert dataset in task["hyperparams"]["run"]["datasets"]["value"]
    assert task["status"] == "completed"


def test_an_unknown_dataset_ends_the_command(lab: Lab, uploaded: Uploaded, project: Path) -> None:
    """In one line, exit 2, before anything is created."""
    lab.write(
        "__main__.py",
        "from torch_lab.remote_data import dataset_folder\n"
        "def train_config(hparams):\n    return dataset_folder('1' * 32)\n",
    )
    result = lab.train(lab.path)
    assert result.code == ExitCode.USAGE
    assert f"ClearML has no dataset {'1' * 32}" in result.err
    assert not (lab.root / "data" / "artifacts").exists()


def test_an_upload_without_a_server_says_so(uploaded: Uploaded) -> None:
    """As any command that insists on ClearML."""
    result = uploaded.run(
        uploaded.root / "upload.py", uploaded.root / "letters", CLEARML_API_ACCESS_KEY=""
    )
    assert result.code == ExitCode.NO_TRACKING
    assert result.out.startswith("ClearML is not configured")
