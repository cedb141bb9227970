"""Several paths: one after another, or side by side."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pexpect
import pytest

from conftest import CONFIG, Lab
from torch_lab.errors import ExitCode
from warm import Warm

ACTING = CONFIG.replace(
    "def train_config(hparams):",
    """
import os, signal, time
from pathlib import Path
import pytorch_lightning as pl

class Acts(pl.Callback):
    def __init__(self, name):
        self.name = name.partition("_")[0]

    def on_train_start(self, *args):
        if self.name == "late":
            raise OSError("broken late")
        if self.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.name == "stubborn":
            signal.signal(signal.SIGTERM, lambda *args: Path("told").touch())
        if self.name == "stubborn":
            Path("waits").touch()
            while True:
                time.sleep(1)

    def on_train_batch_end(self, *args):
        if self.name == "live":
            time.sleep(0.15)
        if self.name == "slow":
            Path("waits").touch()
            time.sleep(0.3)

def train_config(hparams):
    name = hparams["config"]["name"]
    print("device", os.environ.get("CUDA_VISIBLE_DEVICES"), name)
    if name.startswith("bad"):
        raise OSError("broken")
""",
).replace('"module": module', '"module": module, "callbacks": [Acts(name)]')


def paths(lab: Lab, *names: str) -> list[str]:
    """Write an hparams script for each name, and return their paths."""
    lab.write("__main__.py", ACTING)
    scripts = []
    for name in names:
        trainer = {"init": {"max_epochs": 100 if name.startswith("slow") else 1}}
        scripts.append(lab.hparams(name, {"config": {"name": name}, "trainer": trainer}))
    return [str(script) for script in scripts]


def wait_for(path: Path) -> None:
    """Wait until there is a file."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_table_names_runs_that_did_not_complete(lab: Lab) -> None:
    """Those that failed and those that were killed; it says which is which."""
    late, killed = paths(lab, "late", "killed")
    result = lab.command("train", late, late, killed, "--jobs", "3")
    assert result.code == ExitCode.SOME_FAILED
    table = result.out[result.out.rindex("script") :].splitlines()
    rows = sorted(line.split(maxsplit=2)[1:] for line in table if ".py" in line)
    assert [name for name, _ in rows] == ["00_toy-killed-v1", "00_toy-late-v1", "00_toy-late-v2"]
    assert rows[0][1].startswith("killed by SIGKILL ")
    assert rows[1][1].startswith("failed ")


def test_jobs_run_side_by_side_on_devices_dealt_out(lab: Lab, warm: Warm) -> None:
    """As many at a time as there are devices, each seeing its own alone of those we see."""
    words = [*paths(lab, "a", "b"), "--devices", "0", "1", "--json"]
    result = lab.command("train", *words, CUDA_VISIBLE_DEVICES="2, 3", python=warm.python)
    assert result.code == ExitCode.DONE, result.err
    said = [run.console_log.read_text().splitlines()[0] for run in lab.runs]
    assert {line.split()[1] for line in said} == {"2", "3"}
    records = [json.loads(line) for line in result.out.splitlines()]
    assert {record["run"] for record in records} == {"00_toy-a-v1", "00_toy-b-v1"}
    assert "completed" in result.err


def test_devices_are_as_given_where_nothing_hides_any(
    lab: Lab, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without CUDA_VISIBLE_DEVICES they are what CUDA counts; `--devices=` takes several too."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    result = lab.command(
        "train", "--devices=5", "6", *paths(lab, "bad", "bad_too"), python=warm.python
    )
    assert {"device 5", "device 6"} == {line[:8] for line in result.out.splitlines()[:2]}


@pytest.mark.parametrize("seen", ["2,3", "", "-1"])
def test_a_device_that_is_hidden_is_a_mistake(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    """An index beyond CUDA_VISIBLE_DEVICES starts nothing."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    result = lab.train(*paths(lab, "a"), "--devices", "2")
    assert result.code == ExitCode.USAGE
    assert f"--devices 2: there is no such GPU in CUDA_VISIBLE_DEVICES={seen}\n" in result.err
    assert not lab.runs


def test_a_mistake_in_the_last_stops_the_first(lab: Lab) -> None:
    """All paths are looked at before one is started."""
    result = lab.train(*paths(lab, "a"), lab.folder / "missing.py")
    assert result.code == ExitCode.USAGE
    assert "missing.py: no such file" in result.err
    assert not lab.runs


def test_a_failure_of_a_quiet_job_is_shown(lab: Lab, warm: Warm) -> None:
    """Of a job beside others, stderr is shown when it failed, and only then."""
    result = lab.command("train", *paths(lab, "bad", "a"), "--jobs", "2", python=warm.python)
    assert result.code == ExitCode.SOME_FAILED
    assert "OSError: broken" in result.err
    assert "epoch" not in result.err
    assert "00_toy-a-v1 completed" in result.out


def test_ctrl_c_in_a_terminal_stops_the_run(lab: Lab) -> None:
    """The one after the other draw their live line, and the one that runs records its end."""
    terminal = pexpect.spawn(
        sys.executable,
        ["-m", "torch_lab", "train", *paths(lab, "live", "slow", "a")],
        cwd=str(lab.root),
        env=lab.environment(TERM="xterm-256color"),  # type: ignore[arg-type]
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 120),
    )
    terminal.expect_exact("steps/s")
    terminal.expect_exact("slow.py starts")
    wait_for(lab.root / "waits")
    terminal.sendintr()
    said = terminal.read()
    terminal.close()
    assert terminal.exitstatus == ExitCode.INTERRUPT
    assert "stopped by SIGINT" in said
    assert {run.name: run.state for run in lab.runs} == {
        "00_toy-live-v1": "completed",
        "00_toy-slow-v1": "stopped",
    }


def test_a_signal_ends_all_jobs_and_starts_no_more(lab: Lab, warm: Warm) -> None:
    """The children are told once, and the job that waits for a device starts nothing."""
    words = ("train", *paths(lab, "slow", "slow_too"), "--jobs", "2", "--devices", "0")
    process = lab.start(*words, python=warm.python)
    wait_for(lab.root / "waits")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.TERMINATED
    assert err.count(" starts\n") == 1
    assert lab.run().state == "stopped"


def test_a_second_signal_leaves_no_process_behind(lab: Lab) -> None:
    """One that does not end when it is told is killed."""
    process = lab.start("train", *paths(lab, "stubborn", "a"))
    wait_for(lab.root / "waits")
    process.send_signal(signal.SIGTERM)
    wait_for(lab.root / "told")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.TERMINATED
    assert "stopped by SIGTERM" in err
    with pytest.raises(ProcessLookupError):
        os.kill(lab.run().record.pid, 0)
