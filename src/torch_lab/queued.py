"""A queued run, on the agent that got it: its edited hparams, its folder, and how it fails."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch_lab.bootstrap import unpack
from torch_lab.edits import edited
from torch_lab.errors import (
    CheckpointError,
    Interrupted,
    ServerError,
    TorchLabError,
)
from torch_lab.experiment import Experiment
from torch_lab.files import sha256_of
from torch_lab.hparams import Hparams
from torch_lab.mirror import STATE, Progress
from torch_lab.redaction import masked_message
from torch_lab.runs import Run, artifacts_folder, decoded, plain_name, runs_of
from torch_lab.sdk import task_of_agent
from torch_lab.server import Server
from torch_lab.task_record import HPARAMS
from torch_lab.tracking import found_server
from torch_lab.utils import process_rank, shown

__all__ = ["AgentTask"]

log = logging.getLogger(__name__)

_DOWNLOAD_S: Final = 60.0
_POLL: Final = "CLEARML_AGENT_QUEUE_POLL_FREQ_SEC"
"""How often an agent looks at the state of a task, in seconds."""


@dataclass(frozen=True)
class AgentTask:
    """The task that an agent started this process for."""

    id: str
    server: Server
    told: dict[str, Any]
    """What the server says of it."""

    @classmethod
    def of_process(cls) -> AgentTask | None:
        """Return the task of this process; None if no agent started it.

        Raises:
            TrackingError: The server cannot be asked.
        """
        task = task_of_agent()
        if task is None:
            return None
        server = found_server()
        return cls(task, server, server.task(task))

    # Hparams.

    def edited(self, experiment: Experiment) -> tuple[Experiment, list[str]]:
        """Return the experiment with the hparams that the task shows, and what was edited.

        Raises:
            HparamsError: A value is of the wrong type, or not what the hparams may have.
        """
        typed = (self.told.get("configuration") or {}).get(HPARAMS)
        section = (self.told.get("hyperparams") or {}).get(HPARAMS)
        if not typed or not section:
            return experiment, []
        original = decoded(json.loads(typed["value"]))
        shown = {str(each["name"]): str(each.get("value") or "") for each in section.values()}
        given = experiment.hparams.as_dict()
        values, lines = edited(given, original, shown)
        project = experiment.hparams.task["project_name"]
        hparams = Hparams.parse(values, experiment.script, project_name=project)
        effective = experiment.effective.with_edits(given, values, f"edited in task {self.id}")
        return replace(experiment, hparams=hparams, effective=effective), lines

    # Going on.

    def run_to_resume(self, experiment: Experiment) -> str | None:
        """Return the name of the unfinished run of this task, which is fetched if it must be.

        Of processes that were launched to train together, the first one has told the others.
        """
        if process_rank() > 0:
            return None
        artifacts = artifacts_folder(experiment.root)
        models = {
            str(each["name"]): str(each["model"])
            for each in (self.told.get("models") or {}).get("output") or []
        }
        for run in runs_of(artifacts, experiment.base_name):
            if run.record.clearml_task_id != self.id or run.state == "completed":
                continue
            # Who resets a task wants it from its start.
            was_reset = Progress.of(run.folder).models and not models
            return None if was_reset else run.name
        return self._restored(artifacts, models) if "last" in models else None

    def _restored(self, artifacts: Path, models: dict[str, str]) -> str | None:
        """Fetch the folder of the run from the server; return its name, if it can be gone on with.

        Raises:
            CheckpointError: There is another run of that name here.
        """
        state = self._artifact(STATE)
        if state is None:
            log.warning("task %s has a checkpoint, but not what it needs to go on from", self.id)
            return None
        server = Server(self.server.address, _DOWNLOAD_S)
        artifacts.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".restored-", dir=artifacts) as name:
            folder = Path(name) / "run"
            if server.download(str(state["uri"]), Path(name) / "state.zip") != state["hash"]:
                raise CheckpointError(f"the artifact {STATE} of task {self.id} is damaged")
            unpack(Path(name) / "state.zip", folder)
            run = Run.read(folder)
            for checkpoint, model in models.items():
                _fetch(server, run, checkpoint, model)
            target = artifacts / plain_name(run.name, "a run's name")
            if run.record.clearml_task_id != self.id:
                raise CheckpointError(f"the artifact {STATE} of task {self.id} is of another task")
            if target.exists():
                raise CheckpointError(f"{shown(target)} is another run than that of this task")
            shutil.move(folder, target)
        log.info("run %s was fetched from task %s", run.name, self.id)
        return run.name

    def _artifact(self, key: str) -> dict[str, Any] | None:
        artifacts = (self.told.get("execution") or {}).get("artifacts") or []
        return next((each for each in artifacts if each["key"] == key), None)

    # Failing.

    @contextlib.contextmanager
    def told_of_failures(self) -> Iterator[None]:
        """Let the task end as the run does, in the words of the run and not in those of an agent.

        An agent would replace them by the exit code of a process that it sees end first.
        """
        if process_rank() > 0:
            yield
            return
        try:
            yield
        except (Exception, Interrupted) as error:
            with contextlib.suppress(ServerError):
                self._tell(error)
                time.sleep(float(os.environ.get(_POLL) or 5.0) + 2.0)
            raise

    def _tell(self, error: BaseException) -> None:
        status = self.server.task(self.id).get("status")
        if status not in ("in_progress", "queued", "created"):
            return
        hint = f"; {error.hint}" if isinstance(error, TorchLabError) and error.hint else ""
        self.server.call(
            "tasks.stopped" if isinstance(error, Interrupted) else "tasks.failed",
            task=self.id,
            force=True,
            status_reason=type(error).__name__,
            status_message=masked_message(f"{type(error).__name__}: {error}{hint}"),
        )


def _fetch(server: Server, run: Run, name: str, model: str) -> None:
    """Download a checkpoint of a run to its folder.

    Raises:
        CheckpointError: The last one is not what its sidecar says.
    """
    url = str(server.call("models.get_by_id", model=model)["model"]["uri"])
    path = run.checkpoint(name)
    server.download(url, path)
    sidecar = run.sidecar(name)
    if sidecar is not None and sidecar.get("sha256") == sha256_of(path):
        return
    if name == "last":
        raise CheckpointError(f"the model {name} of the task of {run.name} is damaged")
    # A better one was found after the last checkpoint; it will be found again.
    path.unlink()
    path.with_suffix(".json").unlink(missing_ok=True)
