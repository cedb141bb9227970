"""A small project for every test that wants one, and two ways into it: here, and as a command."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from torch_lab import cli
from torch_lab.runs import Run
from warm import Warm

LONG = (
    *(
        "test_demo.py",
        "test_tracking.py",
        "test_docs.py",
        "test_distributed.py",
        "test_exact.py",
        "test_jobs.py",
    ),
    *("test_robustness.py", "test_cli.py", "test_faults.py", "test_train.py", "test_verify.py"),
    *("test_queueing.py", "test_workers.py", "test_callbacks_progress.py", "test_notebook.py"),
    *(
        "test_background_distributed.py",
        "test_checkpoint_files.py",
        "test_remote.py",
        "test_remote_data.py",
    ),
)
"""Whose tests begin first: a long file at the end would leave the other cores idle."""
CONFIG = '''
"""A network learns the sign of a sum."""

import functools

import torch
from torch.utils.data import DataLoader, TensorDataset

from torch_lab.modules import LabModule, TrainLabModule


def loader(count, seed, **kwargs):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x.sum(dim=1) > 0).long()), batch_size=8, **kwargs)


def train_config(hparams):
    module = TrainLabModule(
        torch.nn.Linear(4, 2),
        torch.nn.CrossEntropyLoss(),
        functools.partial(torch.optim.SGD, lr=hparams["config"].get("lr", 0.1)),
    )
    return {
        "module": module,
        "train_dataloaders": loader(32, 1, shuffle=True),
        "val_dataloaders": loader(16, 2),
    }


def infer_config(hparams, *arguments):
    print("arguments:", arguments)
    return {
        "module": LabModule(torch.nn.Linear(4, 2)),
        "predict_dataloaders": loader(16, 2),
    }
'''


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


class Lab:
    """A project with one experiment, `00_toy`."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys
        self.folder = root / "toys" / "experiments" / "00_toy"
        self.folder.mkdir(parents=True)
        self.hparams("hparams", {"trainer": {"init": {"max_epochs": 2}}})
        self.write("__main__.py", CONFIG)

    def write(self, name: str, text: str) -> Path:
        """Write a file of the experiment."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    def hparams(self, name: str, hparams: Any) -> Path:
        """Write an hparams script that holds `hparams`."""
        return self.write(f"{name}.py", f"hparams = {hparams!r}\n")

    def config(self, old: str, new: str) -> None:
        """Replace a part of the config script."""
        assert old in CONFIG
        self.write("__main__.py", CONFIG.replace(old, new))

    @property
    def path(self) -> str:
        return str(self.folder / "hparams.py")

    @property
    def runs(self) -> list[Run]:
        """The runs on disk, by name."""
        artifacts = self.root / "data" / "artifacts"
        return [Run.read(folder) for folder in sorted(artifacts.glob("*"))]

    def run(self) -> Run:
        """The only run on disk."""
        (run,) = self.runs
        return run

    def _main(self, command: Any, *arguments: str | Path) -> Result:
        self.capsys.readouterr()
        with warnings.catch_warnings():
            # As in a terminal: what Lightning warns of is no error there.
            warnings.simplefilter("default")
            code = cli.main(command, command.name, [str(argument) for argument in arguments])
        end_workers()
        captured = self.capsys.readouterr()
        return Result(code, captured.out, captured.err)

    def train(self, *arguments: str | Path) -> Result:
        """Run `train` in this process."""
        return self._main(cli.train, *arguments)

    def infer(self, *arguments: str | Path) -> Result:
        """Run `infer` in this process."""
        return self._main(cli.infer, *arguments)

    def forked(self, *words: str | Path, **variables: str) -> Result:
        """Run `train` with `words` in a fork of this process, which has imported everything.

        For what ends its process; of what is imported, and of launchers, it says nothing.
        """
        files = [self.root / name for name in ("forked.out", "forked.err")]
        child = os.fork()
        if not child:
            code = 1
            try:
                code = self._in_fork([str(word) for word in words], variables, files)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Result(code, *(file.read_text() for file in files))

    def _in_fork(self, words: list[str], variables: dict[str, str], files: list[Path]) -> int:
        os.environ.update(variables)
        sys.stdout, sys.stderr = (file.open("w", buffering=1) for file in files)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_DFL)
        warnings.simplefilter("default")
        return cli.main(cli.train, "train", words)

    def environment(self, **variables: str) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", **variables}

    def start(
        self, *words: str | Path, python: str = sys.executable, **options: Any
    ) -> subprocess.Popen[str]:
        """Start `python -m torch_lab` with `words`, its streams piped; `options` are Popen's."""
        command = [python, "-m", "torch_lab", *map(str, words)]
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": self.environment()}
        return subprocess.Popen(command, cwd=self.root, text=True, **{**defaults, **options})

    def command(self, *words: str | Path, python: str = sys.executable, **variables: str) -> Result:
        """Run `python -m torch_lab` with `words` in a process of its own."""
        done = subprocess.run(
            [python, "-m", "torch_lab", *map(str, words)],
            cwd=self.root,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)


def end_workers() -> None:
    """End the DataLoader workers that an error has left, as the end of their process would do.

    Otherwise the collection of their iterator, whenever it comes, waits 5 s for each of them.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.terminate()
            child.join()


@pytest.fixture(autouse=True)
def no_workers_are_left() -> Iterator[None]:
    """End the DataLoader workers that a test has left."""
    yield
    end_workers()


@pytest.fixture(autouse=True)
def no_server_but_the_tests_own(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever runs the tests may have ClearML set up: no run of theirs shall go there.

    Tests that are marked `real_clearml` are for that server.
    """
    if request.node.get_closest_marker("real_clearml"):
        return
    for name in list(os.environ):
        if name.startswith(("CLEARML_", "TRAINS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CLEARML_CONFIG_FILE", str(tmp_path / "none.conf"))


@pytest.fixture(autouse=True)
def checkpoints_can_be_trusted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that every checkpoint that a test's runs have written loads with `weights_only=True`.

    Those that a test has damaged or replaced are not those that their sidecars tell of.
    """
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder and (written := [*filter(is_own, folder.rglob("checkpoints/*.ckpt"))]):
        import torch

        for path in written:
            torch.load(path, map_location="meta", weights_only=True)


def is_own(checkpoint: Path) -> bool:
    """Return whether a checkpoint is as its run has written it."""
    sidecar, record = checkpoint.with_suffix(".json"), checkpoint.parent.parent / "run.json"
    try:
        digest = json.loads(sidecar.read_text())["sha256"]
        return record.is_file() and digest == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files in front; `--dist=loadfile` hands files out in this order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A Python that starts at once, for what does not depend on how a process starts."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:  # The path of a socket is short.
        warm = Warm(Path(folder))
        yield warm
        warm.end()


@pytest.fixture
def lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Lab]:
    """A project in an empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_LAB_ROOT", raising=False)
    (tmp_path / "pyproject.toml").touch()
    path = list(sys.path)
    yield Lab(tmp_path, capsys)
    sys.path[:] = path
