"""Several processes train one run: under Lightning's launchers, torchrun and SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Lab
from warm import Warm

TWO = {"max_epochs": 2, "accelerator": "cpu", "devices": 2}


@pytest.fixture
def pair(lab: Lab) -> Lab:
    """A project whose hparams ask for two processes."""
    lab.hparams("hparams", {"trainer": {"init": {**TWO, "strategy": "ddp"}}})
    return lab


def whole(lab: Lab, err: str) -> None:
    """Assert that two processes left one whole run, and that rank zero alone spoke."""
    run = lab.run()
    assert run.state == "completed"
    assert run.name == "00_toy-hparams-v1"
    assert run.sidecar("last")["step"] == 4  # 32 samples, batches of 8, shared by two.
    assert set(run.metrics) == {"loss/train", "loss/validate"}
    assert err.count("epoch 2/2") == 1
    assert err.count("CPU x 2") == 1
    assert run.console_log.read_text().count("epoch 2/2") == 1


def script(name: str) -> Path:
    """Return the path of a console script of this environment."""
    return Path(sys.executable).with_name(name)


@pytest.mark.slow
def test_ddp_starts_from_the_console_script(pair: Lab) -> None:
    """Lightning starts the script again for rank 1, and both write one run."""
    done = subprocess.run(
        [script("train"), pair.path],
        cwd=pair.root,
        env=pair.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("completed in") == 1
    whole(pair, done.stderr)


@pytest.mark.slow
def test_ddp_starts_from_the_module(pair: Lab) -> None:
    """`python -m torch_lab train` is started again as such."""
    result = pair.command("train", pair.path)
    assert result.code == 0, result.err
    whole(pair, result.err)


def test_spawned_processes_find_the_scripts(lab: Lab, warm: Warm) -> None:
    """`ddp_spawn` sends classes of the scripts to processes that never saw them."""
    lab.config("def train_config", "class Net(torch.nn.Linear):\n    pass\n\n\ndef train_config")
    text = (lab.folder / "__main__.py").read_text()
    lab.write("__main__.py", text.replace("torch.nn.Linear(4, 2),", "Net(4, 2),", 1))
    lab.hparams("hparams", {"trainer": {"init": {**TWO, "strategy": "ddp_spawn"}}})
    result = lab.command("train", lab.path, "--no-validate", python=warm.python)
    assert result.code == 0, result.err
    whole(lab, result.err)


def test_torchrun_starts_one_run(pair: Lab, warm: Warm) -> None:
    """Under torchrun the ranks are told apart by the environment."""
    done = subprocess.run(
        [
            warm.python,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
            "-m",
            "torch_lab",
            "train",
            pair.path,
        ],
        cwd=pair.root,
        env=pair.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole(pair, done.stderr)


def test_slurm_starts_one_run(pair: Lab, warm: Warm) -> None:
    """Under SLURM too: two tasks of one job step."""
    job = {
        "SLURM_JOB_ID": str(20000 + os.getpid() % 10000),
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    environments = [
        pair.environment(**job, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")
    ]
    tasks = [
        pair.start("train", pair.path, python=warm.python, env=environment)
        for environment in environments
    ]
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert outputs[1] == ("", "")
    whole(pair, outputs[0][1])


def test_an_error_on_one_rank_ends_all(pair: Lab, warm: Warm) -> None:
    """No process waits for one that failed; the run is recorded as failed."""
    pair.config(
        "    module = TrainLabModule(",
        "    hparams['config']['lr'] = Rate()\n    module = TrainLabModule(",
    )
    text = (pair.folder / "__main__.py").read_text()
    pair.write(
        "__main__.py",
        text + "\nimport os\nclass Rate(float):\n"
        "    def __new__(cls):\n"
        "        if os.environ.get('LOCAL_RANK') == '1': raise OSError('rank 1')\n"
        "        return super().__new__(cls, 0.1)\n",
    )
    result = pair.command("train", pair.path, python=warm.python)
    assert result.code != 0
    assert "OSError: rank 1" in result.err
