"""Checkpoint files: whole at every moment, verified when read, and never more than plain values."""

from __future__ import annotations

import collections
import enum
import errno
import functools
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Lab
from torch_lab import checkpoints
from torch_lab.checkpoints import (
    AtomicCheckpointIO,
    Source,
    find_source,
    resumable,
)
from torch_lab.errors import CheckpointError, DamagedError, ExitCode
from torch_lab.plain import plain_values
from torch_lab.runs import Run
from warm import Warm


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run without checkpoints."""
    run = Run.plan(
        tmp_path / "data" / "artifacts",
        "00_toy-hparams",
        experiment="00_toy",
        script="hparams.py",
        hparams={},
        seed=0,
    )
    run.reserve()
    return run


def content(step: int, size: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"value": torch.full((size,), float(step))}, "global_step": step}


def written(run: Run, *steps: int) -> None:
    """Write `last` at each of the steps."""
    files = AtomicCheckpointIO()
    for step in steps:
        files.save_checkpoint(content(step), run.checkpoint("last"))


def found(run: Run, name: str = "last", trust: bool = False) -> Source:
    return find_source(run.name, name, run.folder.parents[2], trust=trust)


def step_of(source: Source | None) -> int:
    """Return the step of a checkpoint, all of which must be of that step."""
    assert source is not None
    loaded = source.load()
    assert loaded["state_dict"]["value"].unique().tolist() == [loaded["global_step"]]
    return int(loaded["global_step"])


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary checkpoints that take room: no other name stands for their content."""
    whole = {path.stat().st_ino for path in folder.glob("[!.]*.ckpt")}
    return [path for path in folder.glob(".*.ckpt.*") if path.stat().st_ino not in whole]


def damage(path: Path, how: str) -> None:
    """Damage the file at `path`, or put another in its place."""
    if how == "missing":
        path.unlink()
    elif how == "list":
        torch.save([1, 2], path)
    else:
        before = path.read_bytes()
        flipped = bytearray(before)
        flipped[len(flipped) // 2] ^= 1
        after = {
            "truncated": before[:-100],
            "empty": b"",
            "flipped": bytes(flipped),
            "text": b"To be written.\n",
        }
        # Not into the file itself, which may have other names.
        path.unlink()
        path.write_bytes(after[how])


DAMAGES = ["truncated", "empty", "flipped", "text", "list", "missing"]


def test_the_last_one_and_the_one_before_are_kept(run: Run) -> None:
    """`previous` is what `last` was, with its own sidecar; a link is no copy, and rotates too."""
    files = AtomicCheckpointIO()
    for step in range(4):
        files.save_checkpoint(content(step), run.checkpoint("best"))
        files.link(run.checkpoint("best"), run.checkpoint("last"))
    assert run.checkpoint("best").samefile(run.checkpoint("last"))
    for name, step in (("best", 3), ("last", 3), ("previous", 2)):
        assert step_of(found(run, name)) == step
        sidecar, data = run.sidecar(name), run.checkpoint(name).read_bytes()
        assert sidecar is not None and sidecar["step"] == step
        assert sidecar["sha256"] == hashlib.sha256(data).hexdigest()
        assert sidecar["size"] == len(data)
    assert len(list(run.checkpoints_folder.iterdir())) == 6


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    """What a callback of the user's writes elsewhere is not rotated, nor swept."""
    other = tmp_path / ".other.ckpt.new.tmp"
    other.write_text("half of it")
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint(content(step), tmp_path / "last.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "last.ckpt", "last.json"}


def test_a_bare_name_is_a_file_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for any other writer: a callback of the user's may write there."""
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint(content(step), "own.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"own.ckpt", "own.json"}


def test_linking_again_leaves_nothing_behind(run: Run) -> None:
    """A move from one name of a file to another does nothing at all, and is no reason to stay."""
    written(run, 1)
    for _ in range(2):
        AtomicCheckpointIO().link(run.checkpoint("last"), run.checkpoint("best"))
    assert len(list(run.checkpoints_folder.iterdir())) == 4


def test_what_a_kill_left_of_another_name_is_settled(run: Run) -> None:
    """A sidecar that was not moved any more comes to its checkpoint, whichever is written next."""
    written(run, 1)
    AtomicCheckpointIO().link(run.checkpoint("last"), run.checkpoint("best"))
    sidecar = run.checkpoint("best").with_suffix(".json")
    sidecar.rename(sidecar.with_name(".best.json.new.tmp"))
    written(run, 2)
    assert sidecar.is_file() and step_of(found(run, "best")) == 1
    sidecar.rename(sidecar.with_name(".best.json.new.tmp"))
    AtomicCheckpointIO().remove_checkpoint(run.checkpoint("best"))
    assert not list(run.checkpoints_folder.glob("*best*"))
    assert not list(run.checkpoints_folder.glob(".best*"))


@pytest.mark.parametrize("leftover", ["", ".last.ckpt.new.tmp", ".best.ckpt.new.tmp"])
def test_a_run_without_checkpoints_never_looks_as_if_it_had_lost_them(
    run: Run, monkeypatch: pytest.MonkeyPatch, leftover: str
) -> None:
    """Not before the first byte of the first one either, nor if that is written once more."""
    if leftover:
        run.checkpoints_folder.mkdir()
        (run.checkpoints_folder / leftover).write_bytes(b"PK" * 1000)
    write, seen = checkpoints._write, []

    def looked(*given: Any) -> str:
        seen.append(resumable(run))
        return write(*given)

    monkeypatch.setattr(checkpoints, "_write", looked)
    written(run, 1)
    assert seen == [None] and step_of(found(run)) == 1
    assert not list(run.checkpoints_folder.glob(".*"))


def test_disks_without_hard_links_hold_copies(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no second name can be made, `previous` and `best` are copies."""

    def refuse(*paths: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    written(run, 1, 2)
    AtomicCheckpointIO().link(run.checkpoint("last"), run.checkpoint("best"))
    assert [step_of(found(run, name)) for name in ("last", "previous", "best")] == [2, 1, 2]
    assert not run.checkpoint("best").samefile(run.checkpoint("last"))


def other_size(path: Path) -> str:
    size = json.loads(path.with_suffix(".json").read_text())["size"]
    actual = path.stat().st_size if path.exists() else 0
    return f"its size is {actual:,} bytes, not the {size:,} in its sidecar"


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_last_falls_back(run: Run, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """The one before is taken, and one warning names both and the reason."""
    written(run, 39, 40, 41)
    damage(run.checkpoint("last"), how)
    reasons = {"missing": "is missing", "empty": "is damaged (it is empty)"}
    reasons |= dict.fromkeys(("flipped",), "is damaged (its sha256 is not that in its sidecar)")
    reason = reasons.get(how, f"is damaged ({other_size(run.checkpoint('last'))})")
    expected = f"last of run {run.name} {reason}: previous is taken instead, step 40"
    for look_up in (found, resumable):
        assert step_of(look_up(run)) == 40
        (record,) = caplog.records
        assert record.getMessage() == expected
        caplog.clear()


@pytest.mark.parametrize("how", DAMAGES)
def test_without_sidecars_damage_is_found_too(run: Run, how: str) -> None:
    """An archive has checksums of its own; what holds no dictionary is no checkpoint."""
    written(run, 1, 2)
    for name in ("last", "previous"):
        run.checkpoint(name).with_suffix(".json").unlink()
    assert step_of(found(run)) == 2
    damage(run.checkpoint("last"), how)
    assert step_of(found(run)) == 1


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_in_both_is_an_error(run: Run, how: str) -> None:
    """It is one line that names both, and no reason to begin from scratch."""
    written(run, 1, 2)
    AtomicCheckpointIO().link(run.checkpoint("last"), run.checkpoint("best"))
    damage(run.checkpoint("previous"), "flipped")
    damage(run.checkpoint("last"), how)
    for look_up in (found, resumable):
        with pytest.raises(DamagedError) as caught:
            look_up(run)
        assert caught.value.exit_code == ExitCode.CODE_FAILED
        message = caught.value.message
        assert f"last of run {run.name} is" in message and "\n" not in message
        assert f"previous of run {run.name} is damaged (its sha256" in message


def test_other_names_do_not_fall_back(run: Run) -> None:
    """`best` is no state of training to replace by another; nor is a file given by its path."""
    written(run, 1, 2)
    AtomicCheckpointIO().link(run.checkpoint("last"), run.checkpoint("best"))
    damage(run.checkpoint("best"), "flipped")
    damage(run.checkpoint("last"), "flipped")
    with pytest.raises(DamagedError, match=r"best of run .* is damaged"):
        found(run, "best")
    with pytest.raises(DamagedError, match=r"last of run .* is damaged"):
        find_source(str(run.checkpoint("last")), "last", run.folder)
    with pytest.raises(CheckpointError, match=r"has no checkpoint 'bset'; did you mean best\?"):
        found(run, "bset")


def test_a_damaged_sidecar_does_not_cost_a_checkpoint(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """The archive's own checksums tell then, and find a flipped byte."""
    caplog.set_level(logging.DEBUG, logger="torch_lab")
    written(run, 1, 2)
    run.checkpoint("last").with_suffix(".json").write_text('{"sha256": "ab')
    assert step_of(found(run)) == 2
    assert "its own checksums are looked at" in caplog.text
    damage(run.checkpoint("last"), "flipped")
    assert step_of(found(run)) == 1
    assert "the checksum of" in caplog.text


def test_a_damaged_last_does_not_replace_a_whole_previous(run: Run) -> None:
    """What a run went on from stays until there are two newer ones."""
    written(run, 1, 2)
    damage(run.checkpoint("last"), "flipped")
    written(run, 3)
    assert [step_of(found(run, name)) for name in ("last", "previous")] == [3, 1]


def test_a_run_knows_whether_it_wrote_checkpoints(run: Run) -> None:
    """Without any it begins; with an empty folder it lost them, and does not begin silently."""
    assert resumable(run) is None
    written(run, 1)
    assert step_of(resumable(run)) == 1
    for path in run.checkpoints_folder.iterdir():
        path.unlink()
    with pytest.raises(DamagedError, match="has lost its checkpoints"):
        resumable(run)


def test_what_holds_code_is_refused_until_it_is_trusted(tmp_path: Path) -> None:
    """The error names what the file holds, and the flag."""
    path = tmp_path / "code.ckpt"
    torch.save({"state_dict": {}, "path": Path("x"), "part": functools.partial(int)}, path)
    with pytest.raises(CheckpointError) as caught:
        find_source(str(path), "last", tmp_path)
    assert "it holds code: builtins.int, functools.partial, pathlib." in caught.value.message
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.hint is not None and "--trust-checkpoint" in caught.value.hint
    trusted = find_source(str(path), "last", tmp_path, trust=True)
    assert trusted.trusted and trusted.load()["path"] == Path("x")


def test_trust_is_not_blindness(tmp_path: Path) -> None:
    """A trusted file that is no checkpoint is damaged as any other."""
    path = tmp_path / "text.ckpt"
    path.write_text("Once upon a time there was a model.\n")
    for trust in (False, True):
        with pytest.raises(DamagedError, match="is no checkpoint, or no more than a part of one"):
            find_source(str(path), "last", tmp_path, trust=trust)


def test_files_of_old_versions_of_torch_are_read(tmp_path: Path) -> None:
    """They are no archives; what they hold of code is named too."""
    path = tmp_path / "old.pt"
    torch.save(content(1), path, _use_new_zipfile_serialization=False)
    assert step_of(find_source(str(path), "last", tmp_path)) == 1
    torch.save({"a": functools.partial(int)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"it holds code: functools\.partial"):
        find_source(str(path), "last", tmp_path)


class Colour(enum.Enum):
    """One of several."""

    RED = "red"


Point = collections.namedtuple("Point", "x y")


class Compose:
    """An object of somebody's."""

    def __repr__(self) -> str:
        return "Compose()"


def odd_values() -> dict[str, Any]:
    """Return what hyper-parameters are found to hold."""
    labelled = torch.zeros(2)
    labelled.__dict__["label"] = Path("x")
    circle: dict[str, Any] = {}
    circle["self"] = circle
    return {
        "scalars": [np.float64(1.5), np.int64(3), np.bool_(True), np.str_("x"), np.longdouble(2)],
        "array": np.arange(3)[::-1],
        "strings": np.array(["a", "b"]),
        "objects": np.array([Path("x"), None], dtype=object),
        "path": Path("a") / "b",
        "enum": {Colour.RED: Colour.RED, signal.SIGINT: 1},
        "point": Point(1, torch.ones(2)),
        "default": collections.defaultdict(list, a=[Path("x")]),
        "ordered": collections.OrderedDict(a=Path("x")),
        "proxy": types.MappingProxyType({"a": 1}),
        "sets": {frozenset({1}), (1, np.int64(2))},
        "queue": collections.deque([1, 2]),
        "labelled": labelled,
        "lazy": torch.nn.LazyLinear(2).state_dict(),
        "circle": circle,
        "transform": Compose(),
        "function": functools.partial(int, base=2),
        "class": Compose,
        "range": range(3),
        "generator": torch.Generator(),
    }


def test_every_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    """Whatever users put into it is kept in plain values, or as text."""
    path = tmp_path / "odd.ckpt"
    state = {"hyper_parameters": odd_values(), "callbacks": {"Mine": {"seen": np.float32(2)}}}
    AtomicCheckpointIO().save_checkpoint(state, path)
    kept = torch.load(path, weights_only=True)
    assert kept["callbacks"] == {"Mine": {"seen": 2.0}}
    values = kept["hyper_parameters"]
    assert values["scalars"] == [1.5, 3, True, "x", 2.0]
    assert values["array"].tolist() == [2, 1, 0]
    assert (values["path"], values["objects"]) == (os.path.join("a", "b"), ["x", None])  # noqa: PTH118
    assert values["enum"] == {"red": "red", 2: 1}
    assert values["point"][0] == 1 and values["point"][1].tolist() == [1, 1]
    assert values["default"] == {"a": ["x"]} and values["ordered"] == {"a": "x"}
    assert values["transform"] == "Compose()"
    assert values["circle"] == {"self": "{'self': {...}}"}


def test_what_is_plain_is_not_touched() -> None:
    """A `state_dict` keeps its versions, and tensors are the same ones."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state = {"state_dict": network.state_dict(), "sizes": [1, (2, 3)], "type": torch.float16}
    values, as_text = plain_values(state)
    assert values is state and not as_text


def test_schedulers_find_their_functions_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a scheduler holds besides plain values is left to the one that takes its state."""

    class Warm(torch.optim.lr_scheduler.ExponentialLR):
        """A scheduler that keeps a function."""

        def __init__(self) -> None:
            self.curve = functools.partial(pow, 2)
            super().__init__(torch.optim.SGD([torch.zeros(1)], lr=0.1), gamma=0.5)

    old, new, path = Warm(), Warm(), tmp_path / "last.ckpt"
    old.optimizer.step()
    old.step()
    AtomicCheckpointIO().save_checkpoint({"lr_schedulers": [old.state_dict()]}, path)
    assert "lr_schedulers[0]['curve'] is a partial: left out" in caplog.text
    new.load_state_dict(torch.load(path, weights_only=True)["lr_schedulers"][0])
    assert (new.curve(3), new.last_epoch, new.get_last_lr()) == (8, 1, [0.05])


def test_what_became_text_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The warning names the place and the type."""
    files = AtomicCheckpointIO()
    for _ in range(2):
        state = {"hyper_parameters": {"transform": [Compose()], "path": Path("x")}}
        files.save_checkpoint(state, tmp_path / "last.ckpt")
    (record,) = caplog.records
    expected = "checkpoint: hyper_parameters['transform'][0] is a Compose: kept as text"
    assert record.getMessage() == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_changes_nothing(small_disk: Path) -> None:
    """The error says so; the old checkpoint stands, no room is taken; later ones are written."""
    files, path = AtomicCheckpointIO(), small_disk / "checkpoints" / "last.ckpt"
    with pytest.raises(OSError, match=r"No space left on device.*last\.ckpt"):
        files.save_checkpoint(content(0, 2_000_000), path)
    assert not list(small_disk.iterdir())
    files.save_checkpoint(content(1), path)
    before = {item.name: item.read_bytes() for item in path.parent.iterdir()}
    for size in (1_000_000, 2_000_000):
        with pytest.raises(OSError, match="No space left on device") as caught:
            (small_disk / "other").write_bytes(bytes(500_000))
            files.save_checkpoint(content(2, size), path)
        assert caught.value.errno == errno.ENOSPC
        assert {item.name: item.read_bytes() for item in path.parent.iterdir()} == before
    (small_disk / "other").unlink()
    files.save_checkpoint(content(3), path)
    assert step_of(find_source(str(path), "last", small_disk)) == 3


FILL = """
import pathlib
import pytorch_lightning as pl

class Fill(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        filler = pathlib.Path("disk/filler")
        if trainer.current_epoch == 2:
            try:
                with filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            except OSError:
                pass
        if trainer.current_epoch == 4:
            filler.unlink()
"""


def test_training_goes_on_while_the_disk_is_full(
    lab: Lab, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error says what is not written and since when; then it is written again."""
    monkeypatch.setenv("TORCH_LAB_ROOT", str(small_disk))
    lab.config('"module": module,', '"module": module, "callbacks": [Fill()],')
    lab.write("__main__.py", FILL + (lab.folder / "__main__.py").read_text())
    result = lab.train(lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 6}}}))
    assert result.code == 0, result.err
    assert result.err.count("No space left on device") == 2
    (folder,) = (small_disk / "data" / "artifacts").iterdir()
    run = Run.read(folder)
    steps = [step_of_file(run.checkpoint(name)) for name in ("last", "previous")]
    assert steps == [24, 20]
    assert not list(run.checkpoints_folder.glob(".*"))


def step_of_file(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_a_run_is_resumed_from_what_is_whole(lab: Lab) -> None:
    """`--resume` falls back as well, and never begins again where there were checkpoints."""
    lab.train(lab.path)
    run = lab.run()
    run.close("stopped", run.metrics)
    damage(run.checkpoint("last"), "truncated")
    result = lab.train(lab.path, "--resume")
    assert result.code == 0, result.err
    assert "previous is taken instead, step 4" in result.err
    assert step_of_file(run.checkpoint("last")) == 8
    run.close("stopped", run.metrics)
    for path in run.checkpoints_folder.iterdir():
        path.unlink()
    result = lab.train(lab.path, "--resume")
    assert result.code == ExitCode.CODE_FAILED
    assert result.err.startswith(f"error: run {run.name} has lost its checkpoints")
    assert result.err.count("\n") == 1


def test_a_read_only_disk_changes_nothing(small_disk: Path) -> None:
    """The error says so, and checkpoints are written again when it can be."""
    files, path = AtomicCheckpointIO(), small_disk / "checkpoints" / "last.ckpt"
    files.save_checkpoint(content(1), path)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        files.save_checkpoint(content(2), path)
    subprocess.run([*remount[:2], "remount,rw", str(small_disk)], check=True)
    assert step_of(find_source(str(path), "last", small_disk)) == 1
    files.save_checkpoint(content(3), path)
    assert step_of(find_source(str(path), "last", small_disk)) == 3


def test_what_is_no_fault_of_the_disk_is_not_called_one(run: Run) -> None:
    """Another error comes through as it is, and leaves nothing behind."""
    written(run, 1)
    before = sorted(run.checkpoints_folder.iterdir())

    class Unwilling(torch.Tensor):
        """A tensor that cannot be written."""

        __tensor_flatten__ = None

        def __reduce_ex__(self, *_: object) -> Any:
            raise RuntimeError("not today")

    unwilling = torch.zeros(2).as_subclass(Unwilling)
    with pytest.raises(RuntimeError, match="not today"):
        AtomicCheckpointIO().save_checkpoint({"x": unwilling}, run.checkpoint("last"))
    assert sorted(run.checkpoints_folder.iterdir()) == before


SAVER = """
import json, os, pathlib, sys
import torch
from torch_lab.checkpoints import AtomicCheckpointIO

files = AtomicCheckpointIO()

def save(folder, step, size, through):
    content = {"state_dict": {"value": torch.full((size,), float(step))}, "global_step": step}
    files.save_checkpoint(content, folder / f"{through}.ckpt")
    if through != "last":
        files.link(folder / f"{through}.ckpt", folder / "last.ckpt")

def die_at(count):
    left = [count]
    def dying(function):
        def replaced(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return function(*arguments, **options)
        return replaced
    for name in ("fsync", "link", "mkdir", "rename", "replace", "unlink"):
        setattr(os, name, dying(getattr(os, name)))

for line in sys.stdin:
    wish = json.loads(line)
    pid = os.fork()
    if pid == 0:
        die_at(wish["die_at"])
        folder, step = pathlib.Path(wish["folder"]), wish["step"]
        save(folder, step, wish["size"], wish["through"])
        while wish["forever"]:
            step += 1
            save(folder, step, wish["size"], wish["through"])
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Saver:
    """A process that saves checkpoints in children of its own, which die."""

    def __init__(self, python: str, script: Path) -> None:
        script.write_text(SAVER)
        self.process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Another file system than that of the checkpoints, as in most containers.
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/dev/shm"},
        )

    def start(self, run: Run, step: int, **wish: Any) -> int:
        """Return the id of a process that saves for `run`; `ended` waits for it."""
        folder = str(run.checkpoints_folder)
        defaults = {"die_at": 0, "size": 100, "through": "last", "forever": False}
        assert self.process.stdin and self.process.stdout
        wish = {**defaults, "folder": folder, "step": step, **wish}
        print(json.dumps(wish), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def ended(self) -> int:
        """Return its exit code."""
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def saver(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    """A process that saves checkpoints."""
    saver = Saver(warm.python, tmp_path_factory.mktemp("saver") / "saver.py")
    yield saver
    saver.close()


def has_all(run: Run) -> None:
    """Check that every checkpoint of `run` is whole, and that at most one was left half done."""
    folder = run.checkpoints_folder
    for path in folder.glob("[!.]*.ckpt"):
        step_of(found(run, path.stem))
    assert len(leftovers(folder)) <= 1


def moments(saver: Saver, run: Run, step: int, **wish: Any) -> Iterator[int]:
    """Yield every moment in a save, after a process died there."""
    moment, code = 1, 9
    while code:
        saver.start(run, step, die_at=moment, **wish)
        code = saver.ended()
        yield moment
        moment += 1
    assert moment > 8


@pytest.mark.slow
@pytest.mark.parametrize("through", ["last", "best"])
def test_a_kill_between_two_operations_leaves_whole_checkpoints(
    run: Run, saver: Saver, through: str
) -> None:
    """At each of them the first, the second and the third save of a run may end."""
    latest: int | None = None
    for step in (1, 2, 3):
        for _ in moments(saver, run, step, through=through):
            has_all(run)
            source = resumable(run)
            assert source is not None or latest is None
            if source is not None:
                assert step_of(source) in (latest, step)
        latest = step_of(resumable(run))
        assert latest == step
        assert not list(run.checkpoints_folder.glob(".*"))
    assert step_of(found(run, "previous")) in (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("through", ["last", "best"])
def test_two_kills_in_a_row_leave_whole_checkpoints(run: Run, saver: Saver, through: str) -> None:
    """A save that comes after a kill mends what that left, wherever it is killed itself."""
    saver.start(run, 1, through=through)
    assert saver.ended() == 0
    step = 1
    for first in range(1, 30):
        for second in range(1, 30):
            before = step_of(resumable(run))
            for moment in (first, second):
                step += 1
                saver.start(run, step, die_at=moment, through=through)
                saver.ended()
                has_all(run)
                assert step_of(resumable(run)) >= before


KILLS = [5, pytest.param(60, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", KILLS)
def test_kills_while_saving_leave_whole_checkpoints(run: Run, saver: Saver, kills: int) -> None:
    """None is unreadable, none is lost, and the next save takes the place of what was left."""
    draw, latest = random.Random(kills), 0
    for _ in range(kills):
        pid = saver.start(run, latest + 1, size=2_000_000, forever=True)
        time.sleep(draw.uniform(0.01, 0.4))
        os.kill(pid, signal.SIGKILL)
        assert saver.ended() == -signal.SIGKILL
        has_all(run)
        source = resumable(run)
        if latest or source is not None:
            assert step_of(source) >= latest
            latest = step_of(source)
    assert latest > kills / 2
    written(run, latest + 1)
    assert not list(run.checkpoints_folder.glob(".*"))
