"""Checkpoints: written whole, verified when read, and gone on from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

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


def test_a_damaged_last_falls_back(lab: Lab) -> None:
    """A new run goes on from the one before, and the command says why."""
    lab.train(lab.path)
    last = lab.run().checkpoint("last")
    last.write_bytes(last.read_bytes()[:-100])
    result = lab.train(goes_on(lab))
    assert result.code == 0, result.err
    assert "last of run 00_toy-hparams-v1 is damaged (its size is" in result.err
    assert "previous is taken instead, step " in result.err
    assert lab.runs[1].record.parent["checkpoint"] == "previous"


def test_damaged_checkpoints_are_refused(lab: Lab) -> None:
    """With none to fall back to nothing is created; the error is no mistake of the user's."""
    lab.train(lab.path)
    for name in ("last", "previous", "best"):
        path = lab.run().checkpoint(name)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content)
    for name in ("last", "best"):
        result = lab.train(goes_on(lab, checkpoint_name=name))
        assert result.code == ExitCode.CODE_FAILED
        assert f"{name} of run 00_toy-hparams-v1 is damaged" in result.err
    assert len(lab.runs) == 1


def test_a_checkpoint_that_holds_code_is_refused(lab: Lab) -> None:
    """What cannot be read with `weights_only=True` is not read, unless the flag says so."""
    state = torch.nn.Linear(4, 2).state_dict()
    torch.save({"state_dict": state, "path": Path("x")}, lab.root / "code.ckpt")
    script = goes_on(lab, checkpoint_task_id="code.ckpt", weights_only=True)
    result = lab.train(script)
    assert result.code == ExitCode.USAGE
    assert "code.ckpt holds more than tensors and plain values" in result.err
    assert "pathlib." in result.err and "--trust-checkpoint" in result.err
    assert lab.train(script, "--trust-checkpoint").code == 0
    torch.save([1], lab.root / "list.ckpt")
    result = lab.train(goes_on(lab, checkpoint_task_id="list.ckpt"))
    assert result.code == ExitCode.CODE_FAILED
    assert "list.ckpt holds a list, no checkpoint" in result.err


def test_sidecars_describe_their_checkpoints(lab: Lab) -> None:
    """sha256, size, step, epoch, run and metrics are those of the file."""
    lab.train(lab.path)
    run = lab.run()
    for name in ("last", "previous", "best"):
        sidecar, content = run.sidecar(name), run.checkpoint(name).read_bytes()
        assert sidecar["sha256"] == hashlib.sha256(content).hexdigest()
        assert sidecar["size"] == len(content)
        assert (sidecar["run"], sidecar["run_id"]) == (run.name, run.record.id)
        assert sidecar["score"] == sidecar["metrics"]["loss/validate"]


def test_checkpoints_hold_the_bare_models_weights(lab: Lab) -> None:
    """`model.load_state_dict(checkpoint["state_dict"])` works, read with `weights_only=True`."""
    lab.train(lab.path)
    torch.nn.Linear(4, 2).load_state_dict(weights(lab.run()))


def test_removing_a_checkpoint_removes_its_sidecar(tmp_path: Path) -> None:
    """Nothing is left of it."""
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    writer.remove_checkpoint(tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())


PARTIAL = [{"strict": False}, {"exclude": ["weight"]}]


@pytest.mark.parametrize("section", PARTIAL)
def test_a_part_of_the_weights_starts_a_run(lab: Lab, section: dict[str, Any]) -> None:
    """The command tells which; if it were none, nothing is created."""
    state = {"weight": torch.zeros(7, 4), "bias": torch.full((2,), 5.0)}
    torch.save(state, lab.root / "other.ckpt")
    source = {"checkpoint_task_id": "other.ckpt", "weights_only": True, **section}
    result = lab.train(goes_on(lab, **source))
    assert result.code == 0, result.err
    assert "loaded 1 of 2 tensors" in result.err
    torch.save({"weight": torch.zeros(7, 4)}, lab.root / "other.ckpt")
    result = lab.train(goes_on(lab, "none", **{**source, "strict": False}))
    assert result.code == ExitCode.USAGE
    assert "nothing of other.ckpt fits the model: loaded 0 of 2 tensors" in result.err
    assert len(lab.runs) == 1
