"""The tracking of runs against a real ClearML server, that of the environment: see the docs.

All that they leave there is a project of their own, which they delete.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import CONFIG, Lab, Result
from torch_lab.errors import ExitCode
from torch_lab.server import Address, Server

pytestmark = [
    pytest.mark.real_clearml,
    pytest.mark.skipif("CLEARML_API_HOST" not in os.environ, reason="CLEARML_API_HOST is not set"),
]

STOPPING = """
import os
import signal

import pytorch_lightning as pl


class Stopping(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if "STOP" in os.environ and trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
"""


class Real:
    """A project whose runs are tracked on the server of the environment."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.project = f"torch-lab tests {uuid.uuid4().hex}"
        main = CONFIG.replace('"module": module', '"callbacks": [Stopping()], "module": module')
        lab.write("__main__.py", main + STOPPING)
        init = {"max_epochs": 3, "log_every_n_steps": 1}
        lab.hparams("hparams", {"trainer": {"init": init}, "task": {"project_name": self.project}})
        address = Address(
            api=os.environ["CLEARML_API_HOST"],
            files=os.environ["CLEARML_FILES_HOST"],
            web=os.environ["CLEARML_WEB_HOST"],
            access_key=os.environ["CLEARML_API_ACCESS_KEY"],
            secret_key=os.environ["CLEARML_API_SECRET_KEY"],
        )
        self.server = Server(address, limit_s=30.0)

    def train(self, *words: str, **variables: str) -> Result:
        return self.lab.command("train", self.lab.path, "--upload-timeout=60", *words, **variables)

    def synced(self) -> dict[str, Any]:
        """Sync the only run, check that it is whole then, and return what was told."""
        result = self.lab.command("sync", self.lab.run().name, "--json")
        assert result.code == 0, result.err
        (found,) = json.loads(result.out)
        assert found["differences"] == [] and found["scalars"] and set(found["models"])
        return found

    def task(self) -> dict[str, Any]:
        """Return the task of the only run."""
        told = self.server.call("tasks.get_by_id", task=self.lab.run().record.clearml_task_id)
        return dict(told["task"])

    def delete(self) -> None:
        """Delete the project, with all that is in it."""
        project = self.server.project(self.project, create=False)
        if project is not None:
            self.server.call("projects.delete", project=project, force=True, delete_contents=True)


@pytest.fixture
def real(lab: Lab) -> Iterator[Real]:
    real = Real(lab)
    yield real
    real.delete()


def test_online_all_is_there_at_the_end(real: Real) -> None:
    """After an online run nothing differs, and sync has nothing to send."""
    result = real.train("--online")
    assert result.code == 0, result.err
    task, run = real.task(), real.lab.run()
    assert (task["name"], task["status"]) == (run.name, "completed")
    found = real.synced()
    assert found["task"] == run.record.clearml_task_id
    assert not any(found["sent"].values())


def test_an_offline_run_is_sent_later(real: Real) -> None:
    """The first sync sends it, the second nothing."""
    result = real.train("--offline")
    assert result.code == 0, result.err
    assert real.lab.run().record.clearml_task_id is None
    sent = real.synced()["sent"]
    assert sent["scalars"] and sent["console"] and sent["models"] == 2
    assert real.task()["status"] == "completed"
    assert not any(real.synced()["sent"].values())


def test_a_run_goes_on_in_its_own_task(real: Real) -> None:
    """Stopped, it is stopped there; resumed, it completes the same task, each step once."""
    stopped = real.train("--online", STOP="1")
    assert stopped.code == ExitCode.TERMINATED, stopped.err
    task = real.task()
    assert task["status"] == "stopped"
    resumed = real.train("--online", "--resume")
    assert resumed.code == 0, resumed.err
    assert (real.task()["id"], real.task()["status"]) == (task["id"], "completed")
    assert not any(real.synced()["sent"].values())
