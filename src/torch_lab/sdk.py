"""ClearML's SDK, so that `Task.current_task()` works in the user's code, and figures are captured.

It makes the connection that the user's own calls go through, and knows how a machine is set up. By
itself it waits for a server that is away for ever, wherever it is called, and prints each of its
tries; here nobody waits for it but a few seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from torch_lab.errors import TrackingError
from torch_lab.processes import ENDLESS
from torch_lab.runs import Run
from torch_lab.server import Address
from torch_lab.task_record import project_of, task_name

__all__ = ["CLOSE_S", "Line", "attached", "close", "configured_address", "task_of_agent", "within"]

log = logging.getLogger(__name__)

CLOSE_S: Final = 3.0
"""How long the SDK may take to send the last of what it has."""
_MAIN_THREAD_S: Final = 2.0
"""How long the training waits for a call of the user's to the server."""
_SILENCE_S: Final = 15.0
"""For how long nothing is waited for after it was waited for in vain."""
_BETWEEN_TRIES_S: Final = 5.0
_SENDER: Final = "torch_lab-clearml"
_TIMEOUTS_S: Final = (5.0, 30.0)
"""How long the SDK may wait for a connection, and for an answer."""
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
_BETWEEN_LOOKS_S: Final = 5.0
_ABORT_LIMIT_S: Final = 900.0
"""How long an agent waits for a run that was aborted: for a checkpoint, and for what is sent."""

_T = TypeVar("_T")


def configured_address() -> Address:
    """Return where the server is and who asks it, as the environment or `clearml.conf` says.

    Raises:
        TrackingError: Something is missing, or is no address.
    """
    _import_quietly()
    from clearml.backend_api import Session
    from clearml.config import config_obj

    def setting(variable: str, key: str) -> str:
        return os.environ.get(f"CLEARML_{variable}") or str(config_obj.get(key, None) or "")

    # The keys of a server of one's own must not go to the public one.
    host = setting("API_HOST", "api.api_server") or str(config_obj.get("api.host", None) or "")
    if not host.startswith(("http://", "https://")):
        what = f"is {host!r}" if host else "is not set"
        raise TrackingError(
            f"ClearML: CLEARML_API_HOST {what}", "it is an address like http://clearml.lab:8008"
        )
    access_key = setting("API_ACCESS_KEY", "api.credentials.access_key")
    secret_key = setting("API_SECRET_KEY", "api.credentials.secret_key")
    token = os.environ.get("CLEARML_AUTH_TOKEN", "")
    if not access_key and not token:
        raise TrackingError("ClearML has no credentials", "run clearml-init")
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


def _import_quietly() -> None:
    """Import the SDK such that it says nothing: what matters we say ourselves."""
    os.environ.setdefault("CLEARML_LOG_LEVEL", "CRITICAL")
    import clearml.task

    # It prints where the task is, which the header says, to where results belong.
    vars(clearml.task)["print"] = _say_nothing


def _say_nothing(*_: object, **__: object) -> None:
    """Print nothing."""


def task_of_agent() -> str | None:
    """Return the id of the task that this process was started for by an agent, if it was."""
    return os.environ.get("CLEARML_TASK_ID") or os.environ.get("TRAINS_TASK_ID") or None


def within(seconds: float, function: Callable[[], _T], name: str = "torch_lab-asks-clearml") -> _T:
    """Return what `function` returns, called in a thread that is left alone after a while.

    Args:
        seconds: After how long.
        function: What is called.
        name: Of the thread.

    Raises:
        TimeoutError: It takes longer.
    """
    found: Future[_T] = Future()
    thread = threading.Thread(target=_resolve, args=(found, function), name=name, daemon=True)
    thread.start()
    return found.result(seconds)


def _resolve(found: Future[Any], function: Callable[[], Any]) -> None:
    try:
        found.set_result(function())
    except BaseException as error:
        found.set_exception(error)


class Line:
    """What the SDK sends its requests through.

    In threads of its own it tries until the server answers, so that nothing is lost. The training
    waits a few seconds at most: what it tells the server is then sent later, in its order, and what
    it asks fails.

    Args:
        is_away: Returns whether the server is known not to answer now.
    """

    def __init__(self, is_away: Callable[[], bool]) -> None:
        self._is_known_away = is_away
        self._silent_until = 0.0
        self._is_cut = False
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = (
            queue.SimpleQueue()
        )
        self._sender = threading.Thread(target=self._send_waiting, name=_SENDER, daemon=True)

    def lay(self) -> None:
        """Have the SDK use it."""
        from clearml.backend_api import Session
        from clearml.backend_interface.base import InterfaceBase
        from clearml.config import config_obj

        self._original = InterfaceBase._send.__func__  # type: ignore[attr-defined]
        InterfaceBase._send = classmethod(self._sent)  # type: ignore[assignment]
        Session._session_timeout = _TIMEOUTS_S
        retries = dict.fromkeys(("total", "connect", "read", "redirect", "status"), 1)
        options = {"http_retries_config": retries, "initialize_logging": False}
        session = Session(config=config_obj, **options)  # type: ignore[arg-type]
        InterfaceBase._set_default_session(session)
        self._sender.start()

    def cut(self) -> None:
        """Let nothing through any more: the run has ended, and its task says how."""
        self._is_cut = True

    def _sent(self, cls: Any, session: Any, req: Any, *args: Any, **options: Any) -> Any:
        def once() -> Any:
            return self._original(cls, _Once(session), req, *args, **options)

        if threading.current_thread() is not threading.main_thread():
            return self._until_sent(once)
        is_question = type(req).__name__.startswith("Get")
        limit_s = 0.0 if self._is_away() else _MAIN_THREAD_S
        try:
            if is_question:
                until = time.monotonic() + limit_s
                return within(limit_s, lambda: self._until_sent(once, until))
            return self._queued(once).result(limit_s)
        except TimeoutError:
            self._silent_until = time.monotonic() + _SILENCE_S
            if is_question:
                raise ConnectionError("ClearML does not answer") from None
            return _accepted(req)

    def _queued(self, once: Callable[[], Any]) -> Future[Any]:
        """Return what will be the answer to a request, which is sent after those before it."""
        answer: Future[Any] = Future()
        self._waiting.put((answer, lambda: self._until_sent(once)))
        return answer

    def _is_away(self) -> bool:
        return self._is_known_away() or time.monotonic() < self._silent_until

    def _until_sent(self, once: Callable[[], Any], until: float = float("inf")) -> Any:
        """Return the answer to a request, which is sent again as long as there is none."""
        while True:
            if self._is_cut or time.monotonic() > until:
                raise ConnectionError("ClearML does not answer")
            try:
                answer = once()
            except _NoAnswerError:
                time.sleep(min(_BETWEEN_TRIES_S, max(0.1, until - time.monotonic())))
            else:
                self._silent_until = 0.0
                return answer

    def _send_waiting(self) -> None:
        while True:
            _resolve(*self._waiting.get())


class _NoAnswerError(BaseException):
    """There was no answer; not an `Exception`, which the SDK would print, and try again."""


class _Once:
    """A session of the SDK's that says it if there is no answer.

    Args:
        session: The session.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def send(self, *args: Any, **options: Any) -> Any:
        """Send a request once."""
        import requests
        from clearml.backend_api.session.session import LoginError

        try:
            answer = self._session.send(*args, **options)
        except (requests.RequestException, OSError, LoginError) as error:
            raise _NoAnswerError from error
        if answer.meta.result_code > 500:
            raise _NoAnswerError
        return answer


def _accepted(req: Any) -> Any:
    """Return an answer that says nothing to a request that is sent later."""
    from clearml.backend_api import CallResult
    from clearml.backend_api.session.response import ResponseMeta

    answers = vars(sys.modules[type(req).__module__])
    answer = answers[type(req).__name__.replace("Request", "Response")]
    meta = ResponseMeta.from_raw_data(status_code=200, text="")
    return CallResult(meta=meta, response=answer())


def attached(run: Run, task: str, line: Line) -> Any:
    """Return the SDK's object for the task of a run, which has become the current one.

    Args:
        run: The run.
        task: The id of its task.
        line: What the SDK talks to the server through from now on.
    """
    from clearml import Task
    from clearml.backend_interface.task.development.stop_signal import TaskStopSignal

    # A reporter in a process of its own loses its last events, and forks beside our threads.
    Task._report_subprocess_enabled = False  # type: ignore[assignment]
    # It would kill the process without a checkpoint: the run is asked to end instead.
    TaskStopSignal.enabled = False  # type: ignore[assignment]
    # The seeds are the run's.
    Task.set_random_seed(None)
    line.lay()
    with _hooks_kept():
        made: Any = Task.init(**_init_arguments(run, task))
    # It waits for the server for ever.
    atexit.unregister(made._at_exit)
    if task_of_agent() is not None:
        # An agent would kill the process at once; so it waits for its end.
        waits = {
            "_abort_callback_timeout": _ABORT_LIMIT_S,
            "_abort_poll_freq": _BETWEEN_LOOKS_S,
            "_abort_callback_completed": "",
        }
        made._set_runtime_properties(waits)
    return made


def _init_arguments(run: Run, task: str) -> dict[str, Any]:
    """Return what `Task.init` gets: what the hparams say, over what suits a run."""
    return {
        "output_uri": True,
        # Without a GPU all that it has to say is that there is none.
        "auto_resource_monitoring": _has_gpu(),
        "auto_connect_arg_parser": False,
        "auto_connect_streams": False,
        "auto_connect_frameworks": _FRAMEWORKS,
        **(run.hparams.get("task") or {}),
        "project_name": project_of(run),
        "task_name": task_name(run),
        "reuse_last_task_id": task,
        # Anything else would be added to the steps.
        "continue_last_task": 0,
    }


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


def close(task: Any, until: float) -> None:
    """Close the SDK's task, if that does not take long.

    Args:
        task: What `attached` returned.
        until: When to give up, in seconds of the monotonic clock.
    """
    for name in ("clearml", "clearml.Task", "clearml.Metrics"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.suppress(Exception):
        left = max(0.5, until - time.monotonic())
        within(min(CLOSE_S, left), task.close, ENDLESS)
