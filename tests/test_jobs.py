"""Several paths: one after another, or side by side."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from conftest import CONFIG, Lab
from torch_lab.errors import ExitCode

SAYING = CONFIG.replace(
    "    module = TrainLabModule(",
    "    import os, time\n"
    "    print('device', os.environ.get('CUDA_VISIBLE_DEVICES'), hparams['config'].get('name'))\n"
    "    if hparams['config'].get('name') == 'bad': raise OSError('broken')\n"
    "    if hparams['config'].get('name') == 'slow': print('waits', flush=True); time.sleep(60)\n"
    "    module = TrainLabModule(",
)


def paths(lab: Lab, *names: str) -> list[str]:
    """Write an hparams script for each name, and return their paths."""
    lab.write("__main__.py", SAYING)
    trainer = {"init": {"max_epochs": 1}}
    return [
        str(lab.hparams(name, {"config": {"name": name}, "trainer": trainer})) for name in names
    ]


def test_several_paths_run_in_the_order_given(lab: Lab) -> None:
    """Each in a process of its own, with a table at the end; one that fails stops no other."""
    result = lab.command("train", *paths(lab, "b", "bad", "a"))
    assert result.code == ExitCode.SOME_FAILED
    said = [line for line in result.out.splitlines() if line.startswith("device")]
    assert said == ["device None b", "device None bad", "device None a"]
    assert "OSError: broken" in result.err
    assert "error: 1 of 3 runs failed: toys/experiments/00_toy/bad.py" in result.err
    table = result.out[result.out.rindex("script") :]
    assert "00_toy-a-v1" in table and "completed" in table and "failed" in table
    assert [run.name for run in lab.runs] == ["00_toy-a-v1", "00_toy-b-v1"]


def test_jobs_run_side_by_side_on_devices_dealt_out(lab: Lab) -> None:
    """As many at a time as there are devices, each seeing its own alone."""
    result = lab.command("train", *paths(lab, "a", "b"), "--devices", "0", "1", "--json")
    assert result.code == ExitCode.DONE, result.err
    lines = result.out.splitlines()
    devices = {line.split()[1] for line in lines if line.startswith("device")}
    assert devices == {"0", "1"}
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert {record["run"] for record in records} == {"00_toy-a-v1", "00_toy-b-v1"}
    assert "completed" in result.err


def test_a_mistake_in_the_last_stops_the_first(lab: Lab) -> None:
    """All paths are looked at before one is started."""
    result = lab.train(*paths(lab, "a"), lab.folder / "missing.py")
    assert result.code == ExitCode.USAGE
    assert "missing.py: no such file" in result.err
    assert not lab.runs


def test_a_failure_of_a_quiet_job_is_shown(lab: Lab) -> None:
    """What a job beside others said is shown when it failed."""
    result = lab.command("train", *paths(lab, "bad", "a"), "--jobs", "2")
    assert result.code == ExitCode.SOME_FAILED
    assert "OSError: broken" in result.err


def test_a_signal_ends_all_jobs(lab: Lab) -> None:
    """The children are told, and the exit code is the signal's."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch_lab", "train", *paths(lab, "slow", "a")],
        cwd=lab.root,
        env=lab.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "waits\n":
        pass
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == ExitCode.TERMINATED
    assert "stopped by SIGTERM" in err
    assert not lab.runs
