"""Runs with a task on a ClearML server: every run is there in the end, and none ever waits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clearml_server import DROP, ERROR500, HANG, REFUSE, UNAUTHORIZED, ClearMLServer, Fault, slow
from conftest import CONFIG, Lab, Result
from test_sync import console, there
from test_train import scalars
from torch_lab.errors import ExitCode
from torch_lab.mirror import split_tag
from torch_lab.runs import Run
from torch_lab.server import Address, Server
from torch_lab.tracking import Silence
from warm import Warm

GATE = """
import os
import time
from pathlib import Path

import pytorch_lightning as pl


class Gate(pl.Callback):
    \"\"\"Waits in a step for a file, if the environment names one.\"\"\"

    def on_train_batch_end(self, trainer, *args):
        gate = os.environ.get("GATE")
        if gate and trainer.global_step == 6:
            Path(gate).with_suffix(".reached").touch()
            while not Path(gate).exists():
                time.sleep(0.02)
"""


class Online:
    """A project whose runs are tracked on a server of its own."""

    def __init__(self, lab: Lab, server: ClearMLServer, warm: Warm) -> None:
        self.lab = lab
        self.server = server
        self.warm = warm
        self.gate = lab.root / "gate.open"
        main = CONFIG.replace('"module": module', '"callbacks": [Gate()], "module": module')
        lab.write("__main__.py", main + GATE)
        init = {"max_epochs": 3, "log_every_n_steps": 1}
        lab.hparams("hparams", {"trainer": {"init": init}, "task": {"project_name": "toys/signs"}})

    def environment(self, **variables: str) -> dict[str, str]:
        return {**os.environ, **self.server.environment(self.lab.root), **variables}

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        env = self.environment(**variables)
        return self.lab.start(*words, python=self.warm.python, env=env)

    def run(self, *words: str, **variables: str) -> Result:
        with self.start(*words, **variables) as process:
            out, err = process.communicate(timeout=90)
        return Result(process.returncode, out, err)

    def train(self, *words: str) -> Result:
        return self.run("train", self.lab.path, *words)

    def with_fault(
        self, fault: Callable[[], None], limit: str = "--upload-timeout=4"
    ) -> tuple[Result, float]:
        """Train, with a fault from the sixth step on; return also how long the end took."""
        with self.start("train", self.lab.path, limit, GATE=str(self.gate)) as process:
            self.wait_for(self.gate.with_suffix(".reached").exists)
            self.wait_for(lambda: any(self.server.state.events.values()))
            fault()
            self.gate.touch()
            out, err = process.communicate(timeout=90)
            ended = Run.read(self.lab.runs[-1].folder).record.ended
        return Result(process.returncode, out, err), time.time() - timestamp(ended)

    def wait_for(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.05)

    def task(self) -> dict[str, object]:
        (task,) = self.server.state.tasks.values()
        return task

    def check_whole(self, run: Run) -> None:
        """Sync the run, and check that the task has all of it, once."""
        result = self.run("sync", run.name, "--json")
        assert result.code == 0, result.err
        (found,) = json.loads(result.out)
        assert found["differences"] == []
        task = found["task"]
        assert console(self.server, task) == run.console_log.read_text()
        series = there(self.server, task)
        for tag, points in scalars(run).items():
            assert series["/".join(split_tag(tag))] == dict(points), tag
        again = json.loads(self.run("sync", run.name, "--json").out)[0]
        assert not any(again["sent"].values())


def read_until(process: subprocess.Popen[str], words: str) -> None:
    """Read what a process says, to the line with these words."""
    assert process.stderr is not None
    while words not in (line := process.stderr.readline()):
        assert line, f"it ended without saying {words!r}"


def timestamp(when: str | None) -> float:
    from datetime import datetime

    assert when is not None
    return datetime.fromisoformat(when).timestamp()


@pytest.fixture
def online(lab: Lab, warm: Warm) -> Iterator[Online]:
    with ClearMLServer() as server:
        yield Online(lab, server, warm)
        assert not server.state.unknown


READ_BACK = """
import json, sys
from clearml import Task
task = Task.get_task(task_id=sys.argv[1])
print(json.dumps({
    "name": task.name, "project": task.get_project_name(), "status": task.get_status(),
    "parameters": task.get_parameters(), "tags": task.get_tags(),
    "typed": task.get_configuration_object("hparams"),
    "config": task.get_configuration_object("toys/experiments/00_toy/__main__.py"),
    "script": task.get_script(), "artifacts": sorted(task.artifacts),
    "models": {model.name: model.url for model in task.models["output"]},
    "metadata": {model.name: model.get_all_metadata() for model in task.models["output"]},
    "scalars": task.get_reported_scalars(), "parent": task.parent,
    "console": "".join(task.get_reported_console_output(100)),
}, default=str))
"""


def test_all_of_a_run_is_on_its_task(online: Online) -> None:
    """Read back with the SDK: what it is, what it logged, what it wrote, how it ended."""
    lab = online.lab
    subprocess.run(["git", "init", "-q"], check=True, cwd=lab.root)
    for name, value in (("user.name", "a"), ("user.email", "a@b")):
        subprocess.run(["git", "config", name, value], check=True, cwd=lab.root)
    (lab.root / ".gitignore").write_text("data/\n.clearml/\n")
    subprocess.run(["git", "add", ".gitignore", "pyproject.toml"], check=True, cwd=lab.root)
    subprocess.run(["git", "commit", "-qm", "a"], check=True, cwd=lab.root)
    (lab.root / "pyproject.toml").write_text("# changed\n")
    result = online.train()
    assert result.code == 0, result.err
    run = lab.run()
    assert f"{run.name}, on ClearML: http" in result.err
    task = run.record.clearml_task_id
    done = subprocess.run(
        [online.warm.python, "-c", READ_BACK, str(task)],
        env=online.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["name"], found["project"]) == (run.name, "toys/signs")
    assert found["status"] == "completed"
    assert found["parameters"]["hparams/trainer/init/max_epochs"] == "3"
    assert found["parameters"]["run/seed"] == str(run.record.seed)
    assert json.loads(found["typed"]) == run.record.hparams
    assert found["config"] == (lab.folder / "__main__.py").read_text()
    assert "+# changed" in online.task()["script"]["diff"]  # type: ignore[index]
    assert online.task()["script"]["version_num"] == run.record.commit  # type: ignore[index]
    entry_point = f"-m torch_lab train {online.lab.path}"
    assert online.task()["script"]["entry_point"] == entry_point  # type: ignore[index]
    assert found["artifacts"] == ["run", "untracked"]
    assert set(found["models"]) == {"last", "best"}
    sidecar = run.sidecar("last")
    assert sidecar is not None
    assert found["metadata"]["last"]["sha256"]["value"] == sidecar["sha256"]
    assert found["metadata"]["last"]["step"]["value"] == "12"
    for tag, points in scalars(run).items():
        metric, variant = split_tag(tag)
        series = found["scalars"][metric][variant]
        assert dict(zip(series["x"], series["y"], strict=True)) == dict(points)
    assert "epoch 3/3" in found["console"]
    online.check_whole(run)


FAULTS = {
    "refuse": (REFUSE, "cannot be reached"),
    "hang": (HANG, "does not answer within 5 s"),
    "secret": (UNAUTHORIZED, "does not accept the credentials"),
    "broken": (ERROR500, "500"),
}


@pytest.mark.parametrize(
    "name",
    [
        "secret",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAULTS if name != "secret"),
    ],
)
def test_a_server_that_is_not_to_be_had_at_the_start(online: Online, name: str) -> None:
    """The run goes on offline; a line says why, and how to send it later. `--online` refuses."""
    fault, told = FAULTS[name]
    online.server.fault = fault
    result = online.train()
    assert result.code == 0, result.err
    run = online.lab.run()
    assert told in result.err and f"torch-lab sync {run.name} sends it later" in result.err
    began = time.monotonic()
    refused = online.train("--online")
    assert refused.code == ExitCode.NO_TRACKING
    assert time.monotonic() - began < 15
    assert told in refused.err and refused.err.count("error:") == 1
    assert online.lab.run().name == run.name
    online.server.heal()
    online.check_whole(run)


@pytest.mark.parametrize(("host", "told"), [("", "is not set"), ("lab:8008", "is 'lab:8008'")])
def test_keys_go_to_the_server_that_they_are_for(
    lab: Lab, warm: Warm, host: str, told: str
) -> None:
    """Never to the public one because the address is missing."""
    keys = {"CLEARML_API_ACCESS_KEY": "key", "CLEARML_API_SECRET_KEY": "secret"}
    result = lab.command(
        "train", lab.path, "--online", python=warm.python, CLEARML_API_HOST=host, **keys
    )
    assert result.code == ExitCode.NO_TRACKING
    assert f"CLEARML_API_HOST {told}" in result.err and not lab.runs


def test_a_key_without_its_secret_is_named(lab: Lab, warm: Warm) -> None:
    """Nothing is asked with half of the credentials."""
    keys = {"CLEARML_API_HOST": "http://127.0.0.1:9", "CLEARML_API_ACCESS_KEY": "key"}
    result = lab.command("train", lab.path, "--online", python=warm.python, **keys)
    assert result.code == ExitCode.NO_TRACKING
    assert "no secret key" in result.err and not lab.runs


def test_an_address_of_something_else_is_told(online: Online) -> None:
    """Such as that of the file server."""
    result = online.run(
        "train", online.lab.path, "--online", CLEARML_API_HOST=online.server.files_url
    )
    assert result.code == ExitCode.NO_TRACKING
    assert "CLEARML_API_HOST is the address of the API server" in result.err and not online.lab.runs


def test_a_dev_run_cannot_be_tracked(online: Online) -> None:
    """Who asks for both is told so."""
    result = online.run("train", online.lab.path, "--online", "--dev-run", "1")
    assert result.code == ExitCode.USAGE
    assert "--dev-run and --online contradict each other" in result.err


def test_a_silence_is_told_once() -> None:
    """After ten minutes without a scalar, and again after the next."""
    silence = Silence(0.0)
    told = [silence.is_long(count, 60.0 * minute) for minute, count in enumerate([0, 5, *[9] * 15])]
    assert [minute for minute, each in enumerate(told) if each] == [12]
    assert not silence.is_long(10, 1200.0) and silence.is_long(10, 1800.0)


def test_offline_touches_nothing(online: Online) -> None:
    """Not even a look whether the server is there."""
    assert online.train("--offline").code == 0
    assert online.server.state.requests == []
    assert online.train("--offline", "--online").code == ExitCode.USAGE


def test_without_clearml_a_run_is_offline(lab: Lab, warm: Warm) -> None:
    """It is said what would have to be done."""
    result = lab.command("train", lab.path, python=warm.python)
    assert result.code == 0 and "offline: ClearML is not configured" in result.err
    refused = lab.command("train", lab.path, "--online", python=warm.python)
    assert refused.code == ExitCode.NO_TRACKING
    assert "clearml-init" in refused.err
    assert lab.command("sync", "--all", python=warm.python).code == ExitCode.NO_TRACKING
    assert len(lab.runs) == 1


def uploads(endpoint: str) -> bool:
    return "/models/" in endpoint


@pytest.mark.parametrize(
    "fault",
    [
        REFUSE,
        *(
            pytest.param(fault, marks=pytest.mark.slow)
            for fault in (HANG, DROP, ERROR500, UNAUTHORIZED, slow(1.0))
        ),
    ],
    ids=lambda fault: str(fault.kind),
)
def test_a_server_that_is_lost_in_the_middle(online: Online, fault: Fault) -> None:
    """The run ends with its own exit code, soon; what is missing is sent later."""

    def lose() -> None:
        online.server.fault = fault

    result, end_s = online.with_fault(lose)
    assert result.code == 0, result.err
    assert end_s < 9
    online.server.heal()
    online.check_whole(online.lab.run())


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(HANG, marks=pytest.mark.slow),
        DROP,
        *(
            pytest.param(fault, marks=pytest.mark.slow)
            for fault in (ERROR500, UNAUTHORIZED, slow(60.0))
        ),
    ],
    ids=lambda fault: str(fault.kind),
)
def test_a_server_that_is_lost_at_the_very_end(online: Online, fault: Fault) -> None:
    """All is there but how the run ended: that is waited for no longer than the default limit."""

    def lose() -> None:
        online.server.fault = fault.only(lambda endpoint: endpoint == "tasks.completed")

    result, end_s = online.with_fault(lose, "--upload-timeout=10")
    assert result.code == 0, result.err
    assert end_s < 12 and "torch-lab sync" in result.err
    assert online.task()["status"] == "in_progress"
    online.server.heal()
    online.check_whole(online.lab.run())
    assert online.task()["status"] == "completed"


OWN_CALLS = """
class Calls(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        from clearml import Task
        import matplotlib.pyplot as plt
        task, step = Task.current_task(), trainer.global_step
        task.get_logger().report_scalar("own", "step", float(step), step)
        figure = plt.figure()
        plt.plot([1, 2])
        plt.show()
        figure.savefig("own.png")
        plt.close(figure)
        task.set_parameter("own/step", step)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        HANG,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (REFUSE, UNAUTHORIZED, ERROR500)),
    ],
    ids=lambda fault: str(fault.kind),
)
def test_calls_of_the_users_wait_for_no_server(online: Online, fault: Fault) -> None:
    """Nor do they fill the terminal, or keep the process; what they told comes with the server."""
    main = online.lab.folder / "__main__.py"
    text = main.read_text().replace("[Gate()]", "[Gate(), Calls()]")
    main.write_text(text + OWN_CALLS)
    began = 0.0

    def lose() -> None:
        nonlocal began
        online.server.fault = fault
        began = time.time()

    result, end_s = online.with_fault(lose)
    assert result.code == 0, result.err
    ended = timestamp(online.lab.run().record.ended)
    # Six steps, of which the first may wait for each of its calls.
    assert ended - began < 15 and end_s < 9
    assert len(result.err.splitlines()) < 60 and "Traceback" not in result.err
    online.server.heal()
    online.check_whole(online.lab.run())


@pytest.mark.slow
def test_a_server_that_is_slow_at_the_start(online: Online) -> None:
    """There is one task, which is the run's, and in its state in the end."""
    online.server.fault = slow(1.5)
    result = online.train()
    assert result.code == 0, result.err
    assert "on ClearML: http" in result.err
    online.server.heal()
    online.check_whole(online.lab.run())
    assert online.task()["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [REFUSE, HANG], ids=lambda fault: str(fault.kind))
def test_a_file_server_that_is_lost(online: Online, fault: Fault) -> None:
    """What is logged is there all the same; checkpoints come with sync."""

    def lose() -> None:
        online.server.files_fault = fault

    result, end_s = online.with_fault(lose)
    assert result.code == 0, result.err
    assert end_s < 9 and "torch-lab sync" in result.err
    assert online.task()["status"] == "completed"
    online.server.heal()
    online.check_whole(online.lab.run())


@pytest.mark.slow
def test_a_server_that_forgets_everything(online: Online) -> None:
    """It gets a new task, with all of the run."""
    result, _ = online.with_fault(online.server.forget)
    assert result.code == 0 and "torch-lab sync" in result.err
    online.check_whole(online.lab.run())


@pytest.mark.slow
def test_a_server_that_comes_back(online: Online) -> None:
    """Nothing is missing at the end, and sync has nothing to send."""

    def lose_for_a_while() -> None:
        online.server.fault = REFUSE
        time.sleep(4)
        online.server.heal()

    result, _ = online.with_fault(lose_for_a_while)
    assert result.code == 0 and "torch-lab sync" not in result.err
    online.check_whole(online.lab.run())


@pytest.mark.slow
def test_a_kill_in_the_middle_of_an_upload(online: Online) -> None:
    """The next sync makes the task whole, in the same task."""
    online.server.files_fault = slow(20.0).only(uploads)
    with online.start("train", online.lab.path, GATE=str(online.gate)) as process:
        online.wait_for(online.gate.with_suffix(".reached").exists)
        online.wait_for(lambda: any(uploads(each.path) for each in online.server.state.requests))
        process.kill()
        process.communicate()
    run = online.lab.run()
    assert online.task()["status"] == "in_progress"
    online.server.heal()
    online.check_whole(run)
    assert online.task()["status"] == "stopped"


def test_sigterm_with_an_open_task(online: Online) -> None:
    """Exit 143, stopped, the checkpoint is there; the run goes on in its own task, exactly."""
    with online.start("train", online.lab.path, GATE=str(online.gate)) as process:
        online.wait_for(online.gate.with_suffix(".reached").exists)
        process.send_signal(signal.SIGTERM)
        read_until(process, "stopping after this batch")
        online.gate.touch()
        _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.TERMINATED, err
    run = online.lab.run()
    task = online.task()
    assert (task["status"], task["status_message"]) == ("stopped", "Interrupted: SIGTERM")
    sidecar = run.sidecar("last")
    assert sidecar is not None and sidecar["step"] == 6
    models = {model["name"]: model for model in online.server.state.models.values()}
    assert sidecar["sha256"][:16] in models["last"]["uri"]
    assert online.train("--resume").code == 0
    run = online.lab.run()
    assert online.task()["id"] == run.record.clearml_task_id
    assert online.task()["status"] == "completed"
    online.check_whole(run)
    assert online.train().code == 0
    unbroken = online.lab.runs[-1]
    assert scalars(unbroken) == scalars(run) and unbroken.metrics == run.metrics


def test_a_run_begun_offline_goes_on_with_a_task(online: Online) -> None:
    """Under its own name, though another machine has a task of that name."""
    with online.start("train", online.lab.path, "--offline", GATE=str(online.gate)) as process:
        online.wait_for(online.gate.with_suffix(".reached").exists)
        process.send_signal(signal.SIGTERM)
        read_until(process, "stopping after this batch")
        online.gate.touch()
        process.communicate(timeout=60)
    run = online.lab.run()
    other = online.lab.root / "other"
    assert online.run("train", online.lab.path, TORCH_LAB_ROOT=str(other)).code == 0
    assert online.task()["name"] == run.name
    result = online.train("--resume")
    assert result.code == 0, result.err
    run = online.lab.run()
    assert len(online.server.state.tasks) == 2
    online.check_whole(run)


def test_an_abort_from_the_web_saves_a_checkpoint(online: Online) -> None:
    """The run ends as by SIGTERM, and its task is stopped."""
    with online.start("train", online.lab.path, GATE=str(online.gate)) as process:
        online.wait_for(online.gate.with_suffix(".reached").exists)
        online.wait_for(lambda: online.server.state.tasks)
        online.task()["status"], online.task()["status_message"] = "stopped", "aborted by somebody"
        read_until(process, "stopped on the ClearML server: aborted by somebody")
        online.gate.touch()
        process.communicate(timeout=60)
    assert process.returncode == ExitCode.TERMINATED
    sidecar = online.lab.run().sidecar("last")
    assert sidecar is not None and sidecar["step"] == 6
    told = online.task()["status"], online.task()["status_message"]
    assert told == ("stopped", "stopped on the ClearML server: aborted by somebody")


def test_a_failure_is_told(online: Online) -> None:
    """With the exception, the file and the line; a mistake that is found early leaves no task."""
    main = online.lab.folder / "__main__.py"
    text = main.read_text()
    main.write_text(text.replace("Path(gate).with_suffix", "1 / 0; Path(gate).with_suffix"))
    result = online.run("train", online.lab.path, GATE="x")
    assert result.code == ExitCode.CODE_FAILED
    task = online.task()
    assert (task["status"], task["status_reason"]) == ("failed", "ZeroDivisionError")
    assert "toys/experiments/00_toy/__main__.py, line" in str(task["status_message"])
    main.write_text(text)
    online.lab.hparams("typo", {"config": {"monitor": "loss/valdate"}})
    assert online.run("train", str(online.lab.folder / "typo.py")).code == ExitCode.USAGE
    assert len(online.server.state.tasks) == 1


def test_two_machines_make_one_project() -> None:
    """In the same moment: the server refuses the later one, which then takes what is there."""
    with ClearMLServer() as server:
        keys = (server.access_key, server.secret_key)
        address = Address(server.api_url, server.files_url, server.web_url, *keys)
        barrier = threading.Barrier(2, timeout=30)

        def machine(_: int) -> list[str | None]:
            own, found = Server(address), []
            own.log_in()
            for number in range(20):
                barrier.wait()
                found.append(own.project(f"project {number}"))
            return found

        with ThreadPoolExecutor(2) as machines:
            first, second = machines.map(machine, range(2))
    assert first == second
    assert len(set(first)) == 20


def test_two_machines_take_different_versions(
    online: Online, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of the same hparams in the same moment; those of the server count, other names do not."""
    other = tmp_path_factory.mktemp("other")
    roots = [str(online.lab.root), str(other)]
    processes = [online.start("train", online.lab.path, TORCH_LAB_ROOT=root) for root in roots]
    for process in processes:
        _, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
    names = {str(task["name"]) for task in online.server.state.tasks.values()}
    assert names == {"00_toy-hparams-v1", "00_toy-hparams-v2"}
    folders = [path for root in roots for path in Path(root).glob("data/artifacts/*")]
    assert {folder.name for folder in folders} == names
    assert online.run("train", online.lab.path, TORCH_LAB_ROOT=str(other)).code == 0
    longer = online.lab.hparams("hparams-v9", {"trainer": {"init": {"max_epochs": 1}}})
    assert online.run("train", str(longer)).code == 0
    names = {str(task["name"]) for task in online.server.state.tasks.values()}
    assert {"00_toy-hparams-v3", "00_toy-hparams-v9-v1"} <= names
