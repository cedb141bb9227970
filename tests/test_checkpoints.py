"""Checkpoints: written whole, verified when read, and gone on from."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import Lab
from test_train import scalars, weights
from torch_lab.checkpoints import AtomicCheckpointIO
from torch_lab.errors import ExitCode


def goes_on(lab: Lab, name: str = "more", epochs: int = 4, **checkpoint: object) -> Path:
    """Write an hparams script that goes on from the run of the first."""
    source = {"checkpoint_task_id": "00_toy-hparams", **checkpoint}
    return lab.hparams(name, {"checkpoint": source, "trainer": {"init": {"max_epochs": epochs}}})


def test_training_goes_on_in_a_new_run(lab: Lab) -> None:
    """The step counts on, the optimizer and the loss go on, and the parent is recorded."""
    lab.train(lab.path)
    result = lab.train(goes_on(lab))
    assert result.code == 0, result.err
    assert "goes on from last of 00_toy-hparams-v1" in result.err
    parent, child = lab.runs
    assert child.record.parent["run"] == parent.name
    assert child.record.parent["sha256"] == parent.sidecar("last")["sha256"]
    assert (child.sidecar("last")["step"], child.sidecar("last")["epoch"]) == (16, 3)
    baseline = scalars(child)["loss/validate"][0]
    assert baseline == (8, pytest.approx(parent.metrics["loss/validate"]))


def test_weights_alone_start_at_step_zero(lab: Lab) -> None:
    """`weights_only` takes the weights and nothing else."""
    lab.train(lab.path)
    result = lab.train(goes_on(lab, epochs=1, weights_only=True))
    assert result.code == 0, result.err
    assert "starts from the weights in last of 00_toy-hparams-v1" in result.err
    parent, child = lab.runs
    assert child.sidecar("last")["step"] == 4
    baseline = scalars(child)["loss/validate"][0]
    assert baseline == (0, pytest.approx(parent.metrics["loss/validate"]))


def test_nothing_left_to_train_is_said(lab: Lab) -> None:
    """A `max_epochs` that is reached already is refused before anything is created."""
    lab.train(lab.path)
    result = lab.train(goes_on(lab, epochs=2))
    assert result.code == ExitCode.USAGE
    assert "has trained 2 epochs, and trainer.init.max_epochs is 2" in result.err
    assert len(lab.runs) == 1


def test_bare_weights_cannot_be_gone_on_from(lab: Lab) -> None:
    """A file of weights alone is refused with the key that uses it; then it serves."""
    torch.save(torch.nn.Linear(4, 2).state_dict(), lab.root / "bare.ckpt")
    refused = lab.train(goes_on(lab, checkpoint_task_id="bare.ckpt"))
    assert refused.code == ExitCode.USAGE
    assert "holds weights alone" in refused.err and '["weights_only"] = True' in refused.err
    assert not lab.runs
    assert lab.train(goes_on(lab, checkpoint_task_id="bare.ckpt", weights_only=True)).code == 0
    assert lab.run().record.parent["run"] is None


def damage(path: Path, how: str) -> None:
    """Damage the file at `path`."""
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[:-100], "empty": b"", "flipped": content}[how])


DAMAGES = [("truncated", True), ("empty", True), ("flipped", True), ("truncated", False)]


@pytest.mark.parametrize(("how", "sidecar"), [*DAMAGES, ("empty", False)])
def test_a_damaged_checkpoint_is_refused(lab: Lab, how: str, sidecar: bool) -> None:
    """The sidecar's sha256 tells; without a sidecar torch does, of all but a flipped byte."""
    lab.train(lab.path)
    last = lab.run().checkpoint("last")
    damage(last, how)
    if not sidecar:
        last.with_suffix(".json").unlink()
    result = lab.train(goes_on(lab))
    assert result.code == ExitCode.USAGE
    assert "last.ckpt is damaged" in result.err
    assert len(lab.runs) == 1


def test_a_checkpoint_that_holds_code_is_refused(lab: Lab) -> None:
    """What cannot be read with `weights_only=True` is not read."""
    torch.save({"state_dict": {}, "path": Path("x")}, lab.root / "code.ckpt")
    result = lab.train(goes_on(lab, checkpoint_task_id="code.ckpt"))
    assert result.code == ExitCode.USAGE
    assert "code.ckpt holds more than tensors and plain values" in result.err
    torch.save([1], lab.root / "list.ckpt")
    result = lab.train(goes_on(lab, checkpoint_task_id="list.ckpt"))
    assert "list.ckpt holds a list, no checkpoint" in result.err


def test_sidecars_describe_their_checkpoints(lab: Lab) -> None:
    """sha256, size, step, epoch, run and metrics are those of the file."""
    lab.train(lab.path)
    run = lab.run()
    for name in ("last", "best"):
        sidecar, content = run.sidecar(name), run.checkpoint(name).read_bytes()
        assert sidecar["sha256"] == hashlib.sha256(content).hexdigest()
        assert sidecar["size"] == len(content)
        assert (sidecar["run"], sidecar["run_id"]) == (run.name, run.record.id)
        assert sidecar["score"] == sidecar["metrics"]["loss/validate"]


def test_checkpoints_hold_the_bare_models_weights(lab: Lab) -> None:
    """`model.load_state_dict(checkpoint["state_dict"])` works, read with `weights_only=True`."""
    lab.train(lab.path)
    torch.nn.Linear(4, 2).load_state_dict(weights(lab.run()))


KILLED = """
import os, sys, pathlib, torch
from torch_lab.checkpoints import AtomicCheckpointIO
writer = AtomicCheckpointIO()
writer.save_checkpoint({"value": torch.zeros(1000), "global_step": 0}, sys.argv[1])
count = 0
def count_down(name):
    original = getattr(pathlib.Path, name)
    def replaced(self, target):
        global count
        count += 1
        if count == int(sys.argv[2]): os._exit(9)
        return original(self, target)
    setattr(pathlib.Path, name, replaced)
count_down("replace")
writer.save_checkpoint({"value": torch.ones(1000), "global_step": 1}, sys.argv[1])
"""


@pytest.mark.parametrize(("moment", "expected"), [(1, 0.0), (2, 1.0), (3, 1.0)])
def test_a_kill_between_the_moves_leaves_a_whole_checkpoint(
    tmp_path: Path, moment: int, expected: float
) -> None:
    """Before the first move the old one stands; before the second the new one, which verifies."""
    path = tmp_path / "last.ckpt"
    subprocess.run([sys.executable, "-c", KILLED, str(path), str(moment)], check=False)
    assert torch.load(path, weights_only=True)["value"].unique() == expected
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sidecars = [*tmp_path.glob("*.json"), *tmp_path.glob(".last.json.*tmp")]
    assert digest in {json.loads(sidecar.read_text())["sha256"] for sidecar in sidecars}
    assert len(list(tmp_path.iterdir())) <= 4


def test_removing_a_checkpoint_removes_its_sidecar(tmp_path: Path) -> None:
    """Nothing is left of it."""
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    writer.remove_checkpoint(tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())
