"""`train --queue`: a run is checked here, and handed to a ClearML agent with the code of now."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch_lab import bootstrap
from torch_lab.checkpoints import Source
from torch_lab.console import Console
from torch_lab.errors import (
    CheckpointError,
    ServerError,
    TrackingError,
    UserError,
    did_you_mean,
    listed,
)
from torch_lab.experiment import Experiment
from torch_lab.packing import Packed, is_checkout, pack, verify
from torch_lab.runs import Run, runs_of, unversioned
from torch_lab.server import Server, file_url
from torch_lab.signals import stopping_on_signals
from torch_lab.task_record import (
    create_task,
    described,
    page_of,
    parent_task,
    project_of,
    task_name,
)
from torch_lab.tracking import found_server, highest_version, is_first
from torch_lab.training import Options, prepared
from torch_lab.utils import shown

__all__ = ["Queued", "enqueue"]

log = logging.getLogger(__name__)

_UPLOAD_S: Final = 60.0
_ENTRY: Final = "torch_lab_queued.py"


@dataclass(frozen=True)
class Queued:
    """A run that waits for an agent."""

    name: str
    task: str
    queue: str
    page: str
    """The address of its task in the web application."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield what is worth knowing about it."""
        yield "run", f"{self.name} waits in the queue {self.queue}"
        yield "task", self.task
        yield "look", self.page


def enqueue(
    path: Path,
    queue: str,
    words: Sequence[str] = (),
    *,
    trust_checkpoint: bool = False,
    as_json: bool = False,
    set: Mapping[str, Any] | None = None,
    unset: Sequence[str] = (),
) -> Queued:
    """Hand the experiment of the hparams script at `path` to the agents of a queue.

    Args:
        path: The hparams script.
        queue: The name of the queue.
        words: What `train` gets on the agent beside the script.
        trust_checkpoint: Read a checkpoint that holds more than tensors and plain values.
        as_json: Print one line of JSON instead of a table.
        set: What `words` set in place of the script's hparams; see `Experiment.load`.
        unset: The keys that they remove.

    Raises:
        UserError: A script, the hparams, the components or the queue are wrong; nothing was made.
        TrackingError: There is no ClearML server; nothing was made.
    """
    with Console(as_json=as_json) as console:
        experiment = Experiment.load(path, set, unset)
        experiment.check_added_keys()
        _check_shows_no_secret(experiment)
        server = found_server()
        try:
            queue_id = _id_of(server, queue)
            run = _checked(experiment, trust=trust_checkpoint)
            made = _handed_over(server, run, experiment, queue, queue_id, words)
        except ServerError as error:
            raise TrackingError(f"ClearML: {error.message}", error.hint) from error
        if as_json:
            console.result(json.dumps(vars(made)))
        else:
            console.closing(made.rows())
    return made


def _check_shows_no_secret(experiment: Experiment) -> None:
    for key in experiment.overrides.secrets():
        raise UserError(
            f"--set {key} looks like a secret, and would be readable in the task",
            "let the agent's environment have it: env(…) in the script",
        )


def _id_of(server: Server, name: str) -> str:
    queues = {
        str(each["name"]): str(each["id"]) for each in server.every("queues.get_all", "queues")
    }
    if name not in queues:
        raise UserError(
            f"--queue {name!r}: there is no such queue{did_you_mean(name, queues)}",
            f"queues there: {', '.join(sorted(queues)) or 'none'}",
        )
    return queues[name]


def _checked(experiment: Experiment, *, trust: bool) -> Run:
    """Return the run that would be trained, after every check that can be made on this machine.

    Raises:
        UserError: A script, the hparams, the components or the checkpoint are wrong.
    """
    options = Options(trust=trust, tracking="auto", only_checks=True)
    with stopping_on_signals() as stop:
        training = prepared(experiment, options, stop)
    run, source = training.run, training.source
    if source is not None:
        run.record.hparams["checkpoint"]["checkpoint_task_id"] = _task_of(source)
    return run


def _task_of(source: Source) -> str:
    """Return the id of the task that has a checkpoint: of runs here an agent knows nothing.

    Raises:
        CheckpointError: There is none.
    """
    task = source.parent().get("task") or (source.run and source.run.record.clearml_task_id)
    if not task:
        hint = f"torch-lab sync {source.run.name} sends it" if source.run else None
        raise CheckpointError(f"{source} is on this machine alone: an agent has not got it", hint)
    return str(task)


def _handed_over(
    server: Server,
    run: Run,
    experiment: Experiment,
    queue: str,
    queue_id: str,
    words: Sequence[str],
) -> Queued:
    """Pack and verify the code, make the task, and put it into the queue."""
    root, script = experiment.root, _script_in_project(experiment)
    with tempfile.TemporaryDirectory(prefix="torch_lab-") as folder:
        packed = pack(root, Path(folder) / "code.zip")
        if packed.left_out:
            log.warning("an agent does not get: %s", listed(packed.left_out, 5))
        verify(packed, script, words)
        parent = parent_task(run)
        _take_version(server, run)
        _write_sources(run, experiment, Path(folder))
        task = create_task(run, server, parent)
        try:
            _settle_name(server, run, task)
            _describe(server, run, task, packed, [script, *words])
            server.call("tasks.enqueue", task=task, queue=queue_id)
        except BaseException:
            with contextlib.suppress(ServerError):
                server.call("tasks.delete", task=task, force=True)
            raise
    return Queued(task_name(run), task, queue, page_of(run, server, task))


def _script_in_project(experiment: Experiment) -> str:
    if not experiment.script.is_relative_to(experiment.root):
        raise UserError(
            f"{shown(experiment.script)} is not below {shown(experiment.root)}, the project that "
            "an agent would get",
            "unset TORCH_LAB_ROOT" if "TORCH_LAB_ROOT" in os.environ else None,
        )
    return experiment.script.relative_to(experiment.root).as_posix()


def _take_version(server: Server, run: Run) -> None:
    """Name the run with the version above all that there are, here and on the server."""
    base_name = run.record.name
    here = [each.record.version for each in runs_of(run.folder.parent, base_name)]
    _name(run, base_name, max([highest_version(server, project_of(run), base_name), *here]) + 1)


def _name(run: Run, base_name: str, version: int) -> None:
    run.record.name, run.record.version = f"{base_name}-v{version}", version


def _settle_name(server: Server, run: Run, task: str) -> None:
    """Take another version as long as an earlier task of another machine has it."""
    base_name = unversioned(run.record.name)
    while not is_first(server, run, task):
        _name(run, base_name, highest_version(server, project_of(run), base_name) + 1)
        server.call("tasks.edit", task=task, name=task_name(run), force=True)


def _write_sources(run: Run, experiment: Experiment, folder: Path) -> None:
    """Write the scripts where the description of a run looks for them; it has no folder here."""
    run.folder = folder / "run"
    run.folder.mkdir()
    run.write_sources(experiment.root, experiment.scripts, b"")


def _describe(server: Server, run: Run, task: str, packed: Packed, words: Sequence[str]) -> None:
    """Tell the task what it is of, with the code beside it and the script that gets it."""
    url = _upload(server, run, task, packed.path)
    server.call("tasks.edit", task=task, force=True, **described(run))
    server.call("tasks.edit", task=task, force=True, script=_script(run, packed, url, words))
    size = packed.path.stat().st_size
    # What goes in stays with the task when it is reset, and goes along when it is cloned.
    how = {"type": "archive", "mode": "input"}
    server.add_artifact(task, "code", url, size, packed.sha256, **how)


def _upload(server: Server, run: Run, task: str, path: Path) -> str:
    folder = f"{run.name}.{task}"
    url = file_url(server.address.files, project_of(run), folder, "artifacts", "code", "code.zip")
    with path.open("rb") as file:
        Server(server.address, _UPLOAD_S).upload(file, path.stat().st_size, url)
    return url


def _script(run: Run, packed: Packed, url: str, words: Sequence[str]) -> dict[str, Any]:
    """Return a script without a repository: all of it is in the place of the changes."""
    source = Path(bootstrap.__file__).read_text(encoding="utf-8")
    call = f"run(\n    {url!r},\n    {packed.sha256!r},\n    {list(words)!r},\n)\n"
    return {
        "binary": f"python{'.'.join(run.record.python.split('.')[:2])}",
        "repository": "",
        "branch": "",
        "version_num": "",
        "working_dir": ".",
        "entry_point": _ENTRY,
        "diff": f"{source}\n\n{call}",
        "requirements": {"pip": _requirements(run)},
    }


def _requirements(run: Run) -> str:
    """Return the packages of this environment, but for checkouts: no index has what is in them."""
    left_out = _checkouts() | ({"torch-lab"} if is_checkout() else set())
    packages = run.record.packages.items()
    lines = [f"{name}=={version}" for name, version in packages if name not in left_out]
    return f"# Python {run.record.python}\n\n" + "\n".join(lines) + "\n"


def _checkouts() -> set[str]:
    """Return the names of the distributions that are installed as links to a folder."""
    found = set()
    for folder in {Path(each) for each in sys.path if each}:
        for origin in folder.glob("*.dist-info/direct_url.json"):
            with origin.open(encoding="utf-8") as file:
                is_editable = json.load(file).get("dir_info", {}).get("editable")
            if is_editable:
                name = origin.parent.name.removesuffix(".dist-info").rpartition("-")[0]
                found.add(name.replace("_", "-").lower())
    return found
