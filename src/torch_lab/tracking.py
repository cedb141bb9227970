"""A run's task on a ClearML server, made by the SDK, while the run is trained.

The SDK makes the task, so that `Task.current_task()` and captured figures work; what the run logs
and writes is sent by the run's mirror, from threads of its own. Nothing here is waited for longer
than its limit, and nothing that fails here ends a training.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from torch_lab.errors import ServerError, TrackingError, UnreachableError
from torch_lab.mirror import Mirror
from torch_lab.processes import ENDLESS
from torch_lab.runs import Run, unversioned, version_in
from torch_lab.server import Address, Server
from torch_lab.task_record import parent_task, project_of, task_name

__all__ = [
    "Silence",
    "Tracking",
    "connected",
    "found_server",
    "highest_version",
    "is_first",
    "opened",
    "task_of_agent",
    "versions_taken",
]

log = logging.getLogger(__name__)

_REFUSED_KEYS: Final = (401, 403)
_ANSWER_S: Final = 5.0
_INIT_S: Final = 8.0
_CLOSE_S: Final = 3.0
_UPLOAD_S: Final = 30.0
_BETWEEN_SENDS_S: Final = 2.0
_BETWEEN_TRIES_S: Final = 15.0
_BETWEEN_LAST_TRIES_S: Final = 0.5
_BETWEEN_LOOKS_S: Final = 5.0
_BETWEEN_SHOWS_S: Final = 0.5
_SILENCE_S: Final = 600.0
_FRAMEWORKS: Final = dict.fromkeys(
    (
        "catboost",
        "detect_repository",
        "fastai",
        "gradio",
        "hydra",
        "joblib",
        "lightgbm",
        "megengine",
        "pytorch",
        "scikit",
        "tensorboard",
        "tensorflow",
        "tfdefines",
        "xgboost",
    ),
    False,
) | {"matplotlib": True}

_ABORT_LIMIT_S: Final = 900.0
"""How long an agent waits for a run that was aborted: for a checkpoint, and for what is sent."""

_T = TypeVar("_T")


# Finding the server.


def found_server() -> Server:
    """Return the ClearML server that this machine is set up for, once it has answered.

    Raises:
        TrackingError: There is none, it does not answer in time, or it does not know the keys.
    """
    if not _is_configured():
        raise TrackingError(
            "ClearML is not configured on this machine",
            "run clearml-init, or set CLEARML_API_HOST, CLEARML_API_ACCESS_KEY and "
            "CLEARML_API_SECRET_KEY",
        )
    try:
        server = Server(_address(), _ANSWER_S)
        _within(_ANSWER_S, server.log_in)
    except TimeoutError:
        raise TrackingError(f"ClearML does not answer within {_ANSWER_S:.0f} s") from None
    except UnreachableError as error:
        raise TrackingError(f"ClearML: {error.message}") from error
    except ServerError as error:
        hint = (
            "make new credentials in ClearML's web application, and run clearml-init"
            if error.code in _REFUSED_KEYS
            else "CLEARML_API_HOST is the address of the API server, like http://clearml.lab:8008"
        )
        raise TrackingError(f"ClearML: {error.message}", hint) from error
    return server


def _is_configured() -> bool:
    """Return whether there are keys, or a file that may have some; the SDK is slow to import."""
    names = ("API_ACCESS_KEY", "AUTH_TOKEN")
    if any(os.environ.get(f"{maker}_{name}") for maker in ("CLEARML", "TRAINS") for name in names):
        return True
    named = os.environ.get("CLEARML_CONFIG_FILE") or os.environ.get("TRAINS_CONFIG_FILE")
    files = [named] if named else ["~/clearml.conf", "~/trains.conf"]
    return any(Path(file).expanduser().is_file() for file in files)


def _address() -> Address:
    """Return what the environment or `clearml.conf` says."""
    _quiet_sdk()
    from clearml.backend_api import Session
    from clearml.config import config_obj

    def setting(variable: str, key: str) -> str:
        return os.environ.get(f"CLEARML_{variable}") or str(config_obj.get(key, None) or "")

    access_key = setting("API_ACCESS_KEY", "api.credentials.access_key")
    token = os.environ.get("CLEARML_AUTH_TOKEN", "")
    # The keys of a server of one's own must not go to the public one.
    host = setting("API_HOST", "api.api_server") or str(config_obj.get("api.host", None) or "")
    if not host.startswith(("http://", "https://")):
        what = f"is {host!r}" if host else "is not set"
        raise TrackingError(
            f"ClearML: CLEARML_API_HOST {what}", "it is an address like http://clearml.lab:8008"
        )
    if not access_key and not token:
        raise TrackingError("ClearML has no credentials", "run clearml-init")
    secret_key = setting("API_SECRET_KEY", "api.credentials.secret_key")
    if not secret_key and not token:
        raise TrackingError(
            "ClearML has an access key, and no secret key", "set CLEARML_API_SECRET_KEY too"
        )
    if not setting("FILES_HOST", "api.files_server"):
        files = Session.get_files_server_host()
        log.warning("CLEARML_FILES_HOST is not set: checkpoints go to %s", files)
    try:
        return Address(
            api=Session.get_api_server_host(),
            files=Session.get_files_server_host(),
            web=Session.get_app_server_host(),
            access_key=access_key,
            secret_key=secret_key,
            token=token,
        )
    except ValueError as error:
        raise TrackingError(f"ClearML: {error}; CLEARML_WEB_HOST tells it") from error


def _quiet_sdk() -> None:
    """Import the SDK such that it says nothing below a warning; what matters we say ourselves."""
    os.environ.setdefault("CLEARML_LOG_LEVEL", "ERROR")
    import clearml  # noqa: F401


def _within(seconds: float, function: Callable[[], _T], name: str = "torch_lab-asks-clearml") -> _T:
    """Return what `function` returns, called in a thread that is left alone after a while.

    Raises:
        TimeoutError: It takes longer.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def connected(mode: str) -> tuple[Server | None, str]:
    """Return the server, and if there is none why.

    Args:
        mode: `auto`, or `online` to insist on it.

    Raises:
        TrackingError: It is insisted on, and not to be had.
    """
    try:
        return found_server(), ""
    except TrackingError as error:
        if mode == "online":
            raise
        return None, error.message


def highest_version(server: Server, project: str, base_name: str) -> int:
    """Return the highest version that the server has of a run's name; 0 for none.

    Args:
        server: The server.
        project: The project of the tasks.
        base_name: The run's name without its version.
    """
    found = server.project(project, create=False)
    if found is None:
        return 0
    tasks = server.every(
        "tasks.get_all",
        "tasks",
        project=[found],
        name=f"^{re.escape(base_name)}-v[0-9]+",
        only_fields=["name"],
        search_hidden=True,
    )
    return max((version_in(str(task["name"]), base_name) or 0 for task in tasks), default=0)


def task_of_agent() -> str | None:
    """Return the id of the task that this process was started for by an agent, if it was."""
    return os.environ.get("CLEARML_TASK_ID") or os.environ.get("TRAINS_TASK_ID") or None


def versions_taken(server: Server, run: Run) -> int:
    """Return the version below the one that a run shall have: below that of an agent's task."""
    base_name, task = run.record.name, task_of_agent()
    if task is not None:
        name = str(server.task(task)["name"])
        if version := version_in(name, base_name):
            return version - 1
    return highest_version(server, project_of(run), base_name)


# While the run is trained.


def opened(server: Server, run: Run) -> Tracking:
    """Return the tracking of a run whose folder is reserved, under a version that nobody else has.

    Raises:
        TrackingError: The server does not answer in time, or refuses.
    """
    try:
        _forget_missing_task(server, run)
        is_new = run.record.clearml_task_id is None and not run.record.resumed
        tracking = Tracking(server, run, parent_task(run))
        run.record.clearml_task_id = tracking.id
        run.write()
        if is_new:
            _settle_version(tracking)
    except TimeoutError:
        raise TrackingError("ClearML takes too long to make a task") from None
    except Exception as error:  # The SDK has many of its own.
        raise TrackingError(f"ClearML makes no task: {error}") from error
    return tracking


def _forget_missing_task(server: Server, run: Run) -> None:
    known = run.record.clearml_task_id
    if known and not server.has_task(known):
        run.record.clearml_task_id = None


def _settle_version(tracking: Tracking) -> None:
    """Take another version as long as an earlier task has it: of another machine, in this moment.

    Each makes its task first and looks then, so of two at least the later one sees the other.
    """
    server, run = tracking.server, tracking.run
    while not is_first(server, run, tracking.id):
        base_name = unversioned(run.name)
        run.reserve_another(highest_version(server, project_of(run), base_name))
        server.call("tasks.edit", task=tracking.id, name=task_name(run), force=True)
    if tracking.task.name != task_name(run):  # A clone that was queued has a name of its own.
        server.call("tasks.edit", task=tracking.id, name=task_name(run), force=True)


def is_first(server: Server, run: Run, task: str) -> bool:
    """Return whether no earlier task has the name of a run.

    Args:
        server: The server.
        run: The run.
        task: The id of its task.
    """
    found = server.every(
        "tasks.get_all",
        "tasks",
        project=[server.project(project_of(run))],
        name=f"^{re.escape(run.name)}(-|$)",
        only_fields=["id", "created"],
        search_hidden=True,
    )
    ranked = sorted((str(each["created"]), str(each["id"])) for each in found)
    return not ranked or ranked[0][1] == task


class Silence:
    """Notices when nothing is logged for long: the task shows it then, through the console.

    Args:
        now: A clock's time, in seconds.
    """

    def __init__(self, now: float) -> None:
        self._count = 0
        self._since = now
        self._is_told = False

    def is_long(self, count: int, now: float) -> bool:
        """Return, once for each silence, whether `count` has stayed the same for too long."""
        if count != self._count:
            self._count, self._since, self._is_told = count, now, False
        if self._is_told or now - self._since < _SILENCE_S:
            return False
        self._is_told = True
        return True


class Tracking:
    """The task of a run that is being trained.

    Args:
        server: Where it is.
        run: The run; its folder is reserved.
        parent: The id of the parent's task.
    """

    def __init__(self, server: Server, run: Run, parent: str | None) -> None:
        self.server = server
        self.run = run
        # The SDK prints where the task is, which the header says, to where results belong.
        in_time = threading.Event()
        in_time.set()
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                self.task = _within(_INIT_S, lambda: _opened_task(run, parent, in_time))
            except TimeoutError:
                in_time.clear()
                raise
        self.id = str(self.task.id)
        self.mirror = Mirror(server, run, self.id, project_of(run), on_agent=_is_on_agent())
        self._ends = threading.Event()
        self._deadline = float("inf")
        self._uploader = Server(server.address, _UPLOAD_S)
        self._threads = [
            threading.Thread(target=self._send, name="torch_lab-mirror", daemon=True),
            threading.Thread(target=self._upload, name="torch_lab-uploads", daemon=True),
        ]
        self._is_complete = {thread.name: False for thread in self._threads}
        self._described = ""
        self._away: set[str] = set()
        self._told: set[str] = set()
        self._silence = Silence(time.monotonic())
        self.abort = ""
        """How the task was stopped on the server, if it was."""
        self._looked_at = 0.0

    @property
    def page(self) -> str:
        """The address of the task in the web application."""
        return str(self.task.get_output_log_web_page())

    def discard(self) -> None:
        """Remove the task, if a mistake is found after it was made; that of an agent stays."""
        self._deadline = 0.0
        self._ends.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(1.0)
        if task_of_agent() == self.id:
            _close(self.task)
            return
        with contextlib.suppress(TimeoutError, ServerError):
            _within(_ANSWER_S, lambda: self.server.call("tasks.delete", task=self.id, force=True))
        _close(self.task)

    def begin(self) -> None:
        """Begin to send what the run logs and writes."""
        for thread in self._threads:
            thread.start()

    def end(self, limit_s: float, show: Callable[[str, float], None]) -> bool:
        """Send what is left, and end the task as the run did; return whether all was sent.

        Args:
            limit_s: How long that may take, in seconds.
            show: Told every now and then what is left, and which part of it was sent.
        """
        until = time.monotonic() + limit_s
        self._deadline = until - min(_CLOSE_S, limit_s / 2)
        self._ends.set()
        total = self.mirror.unsent()
        for thread in self._threads:
            while thread.is_alive() and (left := self._deadline - time.monotonic()) > 0:
                thread.join(min(_BETWEEN_SHOWS_S, left))
                if thread.is_alive():
                    self._show_left(total, until, show)
        self._tell_end(until)
        _close(self.task, until)
        # The SDK has called it completed, whatever it was.
        return self._tell_end(until) and all(self._is_complete.values())

    def _show_left(self, total: int, until: float, show: Callable[[str, float], None]) -> None:
        left = max(0, self.mirror.unsent() - self._uploader.in_flight)
        seconds = max(0.0, until - time.monotonic())
        text = f"{left / 1e6:.1f} MB to go to ClearML, which is waited for {seconds:.0f} s more"
        show(text, 1 - left / total if total > left else 0.0)

    def _tell_end(self, until: float) -> bool:
        """Set the state of the task, if that is possible in time."""
        # The mirror's own may still be waiting for an answer.
        server = Server(self.server.address, _ANSWER_S)
        try:
            _within(max(0.5, until - time.monotonic()), lambda: self.mirror.end(server))
        except Exception as error:
            log.debug("the state of the task is not set: %s", error)
            return False
        return True

    # In threads of their own.

    def _send(self) -> None:
        self._until_done(self._send_once)

    def _send_once(self) -> None:
        if self.run.record.state != self._described:
            # Only its end changes what is said of a run.
            self.mirror.describe()
            self._described = self.run.record.state
        self.mirror.send_logged()
        if self._silence.is_long(self.mirror.sent.scalars, time.monotonic()):
            minutes = _SILENCE_S / 60
            log.warning("nothing was logged for %.0f minutes: does the run hang?", minutes)
        self.mirror.send_artifacts()
        self._look_for_abort()

    def _upload(self) -> None:
        self._until_done(lambda: self.mirror.send_checkpoints(self._uploader))

    def _until_done(self, step: Callable[[], object]) -> None:
        """Repeat a step until the run ends, and once more; that it fails is told once."""
        name = threading.current_thread().name
        wait_s = _BETWEEN_SENDS_S
        while True:
            ended = self._ends.wait(wait_s)
            try:
                step()
            except UnreachableError as error:
                self._tell_away(name, error)
                wait_s = _BETWEEN_TRIES_S
                if ended:
                    time.sleep(_BETWEEN_LAST_TRIES_S)
            except Exception as error:  # Whatever it is, the training goes on.
                self._tell_refused(error)
                wait_s = _BETWEEN_TRIES_S
                if ended:
                    return
            else:
                self._tell_back(name)
                wait_s = _BETWEEN_SENDS_S
                if ended:
                    self._is_complete[name] = True
                    return
            if time.monotonic() > self._deadline:
                return

    def _tell_refused(self, error: Exception) -> None:
        words = f"not sent to ClearML: {error}"
        if words not in self._told:
            self._told.add(words)
            log.warning("%s", words)

    def _tell_away(self, name: str, error: ServerError) -> None:
        if not self._away:
            log.warning("ClearML: %s; training goes on, what is missing is sent later", error)
        self._away.add(name)

    def _tell_back(self, name: str) -> None:
        if name in self._away:
            self._away.discard(name)
            if not self._away:
                log.info("ClearML answers again")

    def _look_for_abort(self) -> None:
        """End the run by a signal, as a user would, if the task was stopped on the server."""
        now = time.monotonic()
        if self.abort or self._ends.is_set() or now - self._looked_at < _BETWEEN_LOOKS_S:
            return
        self._looked_at = now
        self.server.call("tasks.ping", task=self.id)
        fields = ["status", "status_reason", "status_message"]
        for told in self.server.every("tasks.get_all", "tasks", id=[self.id], only_fields=fields):
            message = str(told.get("status_message") or "")
            is_stopped = told.get("status") != "in_progress" or "stopping" in message
            if is_stopped and not self._ends.is_set():
                words = dict.fromkeys([str(told.get("status_reason") or ""), message])
                why = ", ".join(word for word in words if word not in ("", "stopping"))
                self.abort = "stopped on the ClearML server" + (f": {why}" if why else "")
                log.warning("%s", self.abort)
                os.kill(os.getpid(), signal.SIGTERM)


def _opened_task(run: Run, parent: str | None, in_time: threading.Event) -> Any:
    """Return the SDK's task for a run: a new one, or that which it has.

    Args:
        run: The run.
        parent: The id of the parent's task.
        in_time: Cleared when nobody waits for it any more: then a new task is removed again.
    """
    _quiet_sdk()
    from clearml import Task
    from clearml.backend_interface.task.development.stop_signal import TaskStopSignal

    # A reporter in a process of its own loses its last events, and forks beside our threads.
    Task._report_subprocess_enabled = False  # type: ignore[assignment]
    # It would kill the process without a checkpoint; see `_look_for_abort`.
    TaskStopSignal.enabled = False  # type: ignore[assignment]
    # The seeds are the run's.
    Task.set_random_seed(None)
    known, on_agent = run.record.clearml_task_id, _is_on_agent()
    with _hooks_kept():
        task: Any = Task.init(**_init_arguments(run))
    # It waits for the server for ever.
    atexit.unregister(task._at_exit)
    if not (in_time.is_set() or known or on_agent):
        task.delete(raise_on_error=False)
    if parent is not None:
        task.set_parent(parent)
    if on_agent:
        # It would kill the process at once; so it waits for its end: see `_look_for_abort`.
        waits = {
            "_abort_callback_timeout": _ABORT_LIMIT_S,
            "_abort_poll_freq": _BETWEEN_LOOKS_S,
            "_abort_callback_completed": "",
        }
        task._set_runtime_properties(waits)
    return task


def _init_arguments(run: Run) -> dict[str, Any]:
    """Return what `Task.init` gets: what the hparams say, over what suits a run."""
    section = dict(run.hparams.get("task") or {})
    known = run.record.clearml_task_id
    on_agent = _is_on_agent()
    return {
        "output_uri": True,
        # Without a GPU all that it has to say is that there is none.
        "auto_resource_monitoring": _has_gpu(),
        "auto_connect_arg_parser": False,
        "auto_connect_streams": False,
        "auto_connect_frameworks": _FRAMEWORKS,
        **section,
        "project_name": project_of(run),
        "task_name": task_name(run),
        "reuse_last_task_id": known or False,
        # On an agent anything else would be added to the steps.
        "continue_last_task": 0 if known or on_agent else False,
    }


def _is_on_agent() -> bool:
    return task_of_agent() is not None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def _hooks_kept() -> Iterator[None]:
    """Leave the interpreter's hooks as they are; signals are, as this is not the main thread."""
    before = sys.excepthook, sys.exit
    try:
        yield
    finally:
        sys.excepthook, sys.exit = before


def _close(task: Any, until: float = math.inf) -> None:
    """Close the SDK's task, if that does not take long."""
    for name in ("clearml", "clearml.Task", "clearml.Metrics"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.suppress(Exception):
        left = max(0.5, until - time.monotonic())
        _within(min(_CLOSE_S, left), task.close, ENDLESS)
