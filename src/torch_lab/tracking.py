"""A run's task on a ClearML server, while the run is trained.

What the run logs and writes is sent by the run's mirror, from threads of its own; the SDK is
attached to the task for the user's own calls. Nothing here is waited for longer than its limit, and
nothing that fails here ends a training.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from torch_lab.errors import ServerError, TrackingError, UnreachableError
from torch_lab.mirror import Mirror
from torch_lab.processes import ENDLESS
from torch_lab.runs import Run, unversioned, version_in
from torch_lab.sdk import CLOSE_S, Line, attached, close, configured_address, task_of_agent, within
from torch_lab.server import Server
from torch_lab.task_record import page_of, project_of, task_name, task_of

__all__ = [
    "Silence",
    "Tracking",
    "connected",
    "found_server",
    "highest_version",
    "is_first",
    "opened",
    "versions_taken",
]

log = logging.getLogger(__name__)

_REFUSED_KEYS: Final = (401, 403)
_ANSWER_S: Final = 5.0
_ATTACH_S: Final = 8.0
_UPLOAD_S: Final = 30.0
_BETWEEN_SENDS_S: Final = 2.0
_BETWEEN_TRIES_S: Final = 15.0
_BETWEEN_LAST_TRIES_S: Final = 0.5
_BETWEEN_LOOKS_S: Final = 5.0
_BETWEEN_SHOWS_S: Final = 0.5
_SILENCE_S: Final = 600.0
_MEGABYTE: Final = 10**6

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
        server = Server(configured_address(), _ANSWER_S)
        within(_ANSWER_S, server.log_in)
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
    is_new = run.record.clearml_task_id is None and not run.record.resumed
    run.record.clearml_task_id = task_of_agent() or run.record.clearml_task_id
    try:
        task = task_of(run, server)
        if is_new:
            _settle_version(server, run, task)
        server.call("tasks.started", task=task, force=True)
        return Tracking(server, run, page_of(run, server, task))
    except ServerError as error:
        raise TrackingError(f"ClearML makes no task: {error}") from error


def _settle_version(server: Server, run: Run, task: str) -> None:
    """Take another version as long as an earlier task has it: of another machine, in this moment.

    Each makes its task first and looks then, so of two at least the later one sees the other.
    """
    while not is_first(server, run, task):
        base_name = unversioned(run.name)
        run.reserve_another(highest_version(server, project_of(run), base_name))
        server.call("tasks.edit", task=task, name=task_name(run), force=True)
    if task == task_of_agent():  # A clone that was queued has a name of its own.
        server.call("tasks.edit", task=task, name=task_name(run), force=True)


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
        run: The run; its folder is reserved, and knows its task.
        page: The address of the task in the web application.
    """

    def __init__(self, server: Server, run: Run, page: str) -> None:
        self.server = server
        self.run = run
        self.page = page
        self.id = str(run.record.clearml_task_id)
        on_agent = task_of_agent() is not None
        self.mirror = Mirror(server, run, self.id, project_of(run), on_agent=on_agent)
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
        self._shown = 0.0
        self._line = Line(lambda: bool(self._away))
        self._task = self._attached()

    def _attached(self) -> Any:
        """Return the SDK's object for the task; None if that takes long: then it comes later."""
        try:
            return within(_ATTACH_S, lambda: attached(self.run, self.id, self._line), ENDLESS)
        except TimeoutError:
            log.warning("ClearML is slow: Task.current_task() may be None for a while")
        except Exception as error:  # The SDK has many of its own.
            log.warning("Task.current_task() is None, as ClearML's SDK fails: %s", error)
        return None

    def discard(self) -> None:
        """Remove the task, if a mistake is found after it was made; that of an agent stays."""
        self._deadline = 0.0
        self._ends.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(1.0)
        if task_of_agent() != self.id:
            delete = {"task": self.id, "force": True}
            with contextlib.suppress(TimeoutError, ServerError):
                within(_ANSWER_S, lambda: self.server.call("tasks.delete", **delete))
        self._leave(math.inf)

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
        self._deadline = until - min(CLOSE_S, limit_s / 2)
        self._ends.set()
        total = self.mirror.unsent()
        for thread in self._threads:
            while thread.is_alive() and (left := self._deadline - time.monotonic()) > 0:
                thread.join(min(_BETWEEN_SHOWS_S, left))
                if thread.is_alive():
                    self._show_left(total, until, show)
        self._tell_end(until)
        self._leave(until)
        # The SDK has called it completed, whatever it was.
        return self._tell_end(until) and all(self._is_complete.values())

    def _leave(self, until: float) -> None:
        """Let the SDK send what it has, and nothing afterwards."""
        if self._task is not None:
            close(self._task, until)
        self._line.cut()

    def _show_left(self, total: int, until: float, show: Callable[[str, float], None]) -> None:
        left = max(0, self.mirror.unsent() - self._uploader.in_flight)
        seconds = max(0.0, until - time.monotonic())
        size = f"{left / 1e6:.1f} MB" if left >= _MEGABYTE else f"{left / 1e3:.0f} kB"
        self._shown = max(self._shown, 1 - left / total if total else 0.0)
        show(f"{size} to go to ClearML, which is waited for {seconds:.0f} s more", self._shown)

    def _tell_end(self, until: float) -> bool:
        """Set the state of the task, if that is possible in time."""
        # The mirror's own may still be waiting for an answer.
        server = Server(self.server.address, _ANSWER_S)
        try:
            within(max(0.5, until - time.monotonic()), lambda: self.mirror.end(server))
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
            goes_on = "" if self._ends.is_set() else "training goes on, "
            log.warning("ClearML: %s; %swhat is missing is sent later", error, goes_on)
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
