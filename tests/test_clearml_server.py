"""The server that stands in for ClearML in tests: as the real one answers, and the real SDK."""

import base64
import http.client
import json
import os
import site
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from clearml_server import (
    DROP,
    ERROR500,
    HANG,
    REFUSE,
    UNAUTHORIZED,
    ClearMLServer,
    EventKey,
    Fault,
    State,
    slow,
)
from clearml_server.replay import NOT_COMPARED, RECORDINGS, Replay

PRELUDE = """
from clearml import Task
Task._report_subprocess_enabled = False
QUIET = {"auto_resource_monitoring": False, "auto_connect_frameworks": False}
"""


@pytest.fixture
def server() -> Iterator[ClearMLServer]:
    with ClearMLServer() as started:
        yield started


def call(
    server: ClearMLServer, endpoint: str, _secret: str | None = None, **data: Any
) -> tuple[int, dict[str, Any]]:
    """Ask the API, and return the status and the answer."""
    status, body = send(server.api_url, "GET", f"/v2.23/{endpoint}", json.dumps(data), _secret)
    return status, json.loads(body)


def ask(server: ClearMLServer, endpoint: str, **data: Any) -> dict[str, Any]:
    """Ask the API for what must succeed, and return the data of its answer."""
    status, answer = call(server, endpoint, **data)
    assert status == 200, answer["meta"]
    found: dict[str, Any] = answer["data"]
    return found


def send(
    url: str,
    method: str,
    path: str,
    body: str | bytes = b"",
    secret: str | None = None,
    **headers: str,
) -> tuple[int, bytes]:
    login = f"{ClearMLServer.access_key}:{secret or ClearMLServer.secret_key}".encode()
    headers["Authorization"] = f"Basic {base64.b64encode(login).decode()}"
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def upload(server: ClearMLServer, path: str, content: bytes) -> tuple[int, bytes]:
    head = f'--b\r\nContent-Disposition: form-data; name="{path}"; filename="{path}"\r\n\r\n'
    body = head.encode() + content + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return send(server.files_url, "POST", "/", body, **headers)


def make_task(server: ClearMLServer, name: str = "a task", status: str = "created") -> str:
    task: str = ask(server, "tasks.create", name=name, type="training")["id"]
    if status != "created":
        ask(server, "tasks.started", task=task)
    if status not in ("created", "in_progress"):
        ask(server, f"tasks.{status}", task=task)
    return task


def scalar(task: str, iteration: int, value: float, **more: Any) -> dict[str, Any]:
    event = {"type": "training_stats_scalar", "metric": "loss", "variant": "train", "task": task}
    return {**event, "iter": iteration, "value": value, **more}


def report(server: ClearMLServer, *events: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    lines = "\n".join(map(json.dumps, events))
    status, body = send(server.api_url, "GET", "/v2.23/events.add_batch", lines)
    return status, json.loads(body)


# As the real server answers.


def test_answers_are_those_that_were_recorded(server: ClearMLServer) -> None:
    replay = Replay(server)
    differences = [text for recording in RECORDINGS for text in replay.run(recording)]
    replay.close()
    assert len(RECORDINGS) == 9
    assert not differences, "\n".join([*differences, f"not compared: {NOT_COMPARED}"])
    assert not server.state.unknown


def test_a_difference_from_the_recording_is_found(server: ClearMLServer, tmp_path: Path) -> None:
    text = RECORDINGS[0].read_text(encoding="utf-8")
    changed = tmp_path / "changed.jsonl"
    changed.write_text(text.replace('"last_iteration":4', '"last_iteration":5'), encoding="utf-8")
    replay = Replay(server)
    (difference,) = replay.run(changed)
    replay.close()
    assert "data.task.last_iteration: recorded 5, answered 4" in difference


def test_an_unknown_endpoint_is_an_error_and_noted(server: ClearMLServer) -> None:
    status, answer = call(server, "tasks.no_such_thing")
    assert (status, answer["meta"]["result_code"], answer["data"]) == (400, 400, {})
    assert server.state.unknown == ["tasks.no_such_thing"]


def test_who_has_no_good_token_or_secret_is_refused(server: ClearMLServer) -> None:
    assert call(server, "auth.login", _secret="wrong")[0] == 401
    token = ask(server, "auth.login")["token"]
    for secret, expected in ((token, 200), ("forged", 401)):
        headers = {"Authorization": f"Bearer {secret}"}
        connection = http.client.HTTPConnection(urlsplit(server.api_url).netloc, timeout=5)
        connection.request("POST", "/tasks.get_all", "{}", headers)
        assert connection.getresponse().status == expected
        connection.close()


def test_a_missing_field_and_broken_json_are_errors(server: ClearMLServer) -> None:
    assert call(server, "projects.create")[1]["meta"]["result_subcode"] == 11
    assert send(server.api_url, "POST", "/tasks.get_all", "{")[0] == 400


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_never_parses(server: ClearMLServer, number: str) -> None:
    task = make_task(server)
    event = json.dumps(scalar(task, 0, 0.0)).replace("0.0", number)
    assert send(server.api_url, "GET", "/events.add_batch", event)[0] == 400
    assert not server.state.events[task].scalars


def test_a_scalar_sent_again_replaces_the_first_and_a_message_is_added(
    server: ClearMLServer,
) -> None:
    task = make_task(server)
    message = {"type": "log", "task": task, "msg": "hello"}
    for value in (1.0, 2.0):
        assert report(server, scalar(task, 3, value), message)[1]["data"]["added"] == 2
    events = server.state.events[task]
    assert list(events.scalars) == [EventKey("loss", "train", 3)]
    assert server.state.scalars(task) == {"loss": {"train": [(3, 2.0)]}}
    assert server.state.console(task) == "hello\nhello"


def test_events_of_no_task_are_not_added(server: ClearMLServer) -> None:
    task = make_task(server)
    status, answer = report(server, scalar("deadbeef", 0, 1.0))
    assert (status, answer["meta"]["result_subcode"]) == (400, 131)
    _, answer = report(server, scalar("deadbeef", 0, 1.0), scalar(task, 0, 1.0))
    assert answer["data"] == {
        "added": 1,
        "errors": 1,
        "errors_info": {"Invalid task id deadbeef": 1},
    }


@pytest.mark.parametrize(
    ("before", "change", "allowed"),
    [
        ("created", "completed", False),
        ("in_progress", "completed", True),
        ("in_progress", "failed", True),
        ("failed", "completed", False),
        ("completed", "started", True),
        ("stopped", "started", True),
        ("failed", "started", False),
        ("completed", "failed", False),
    ],
)
def test_a_status_changes_by_the_rules_unless_forced(
    server: ClearMLServer, before: str, change: str, allowed: bool
) -> None:
    task = make_task(server, status=before)
    status, answer = call(server, f"tasks.{change}", task=task)
    assert status == (200 if allowed else 400)
    if not allowed:
        assert answer["meta"]["result_subcode"] == 110
        assert server.state.tasks[task]["status"] == before
        ask(server, f"tasks.{change}", task=task, force=True)


def test_only_a_created_task_is_edited_without_force(server: ClearMLServer) -> None:
    task = make_task(server, status="completed")
    assert call(server, "tasks.edit", task=task, comment="new")[0] == 400
    ask(server, "tasks.edit", task=task, comment="new", force=True)
    assert server.state.tasks[task]["comment"] == "new"


def test_tasks_are_found_filtered_ordered_and_in_pages(server: ClearMLServer) -> None:
    ids = [make_task(server, f"run-{number}") for number in range(5)]
    other = make_task(server, "other", status="in_progress")
    ask(server, "tasks.update", task=other, tags=["x"])

    def names(**query: Any) -> list[str]:
        tasks = ask(server, "tasks.get_all", only_fields=["name"], **query)["tasks"]
        return [task["name"] for task in tasks]

    assert names(name=r"^run\-\d$", order_by=["-name"], page=0, page_size=2) == ["run-4", "run-3"]
    assert names(name=r"^run\-\d$", order_by=["name"], page=2, page_size=2) == ["run-4"]
    assert names(id=ids[:1]) == ["run-0"]
    assert names(status=["in_progress"]) == names(tags=["x"]) == ["other"]
    assert names(tags=["-x"], name="other") == []
    assert names(system_tags=["__$not", "archived"], name="run-1") == ["run-1"]
    assert names(_any_={"fields": ["name", "comment"], "pattern": "run-2"}) == ["run-2"]
    first = ask(server, "tasks.get_all", size=4)
    second = ask(server, "tasks.get_all", size=4, scroll_id=first["scroll_id"])
    assert [len(first["tasks"]), len(second["tasks"])] == [4, 2]


def test_a_queue_gives_out_its_tasks_in_order(server: ClearMLServer) -> None:
    queue = ask(server, "queues.get_default")["id"]
    first, second = make_task(server, "first"), make_task(server, "second")
    for task in (first, second):
        ask(server, "tasks.enqueue", task=task, queue=queue)
    ask(server, "tasks.dequeue", task=second)
    assert server.state.tasks[second]["status"] == "created"
    assert ask(server, "queues.get_next_task", queue=queue)["entry"]["task"] == first
    assert ask(server, "queues.get_next_task", queue=queue) == {}


@pytest.mark.parametrize("endpoint", ["tasks.create", "models.create", "queues.create"])
def test_a_name_has_three_characters(server: ClearMLServer, endpoint: str) -> None:
    assert call(server, endpoint, name="ab", uri="x")[0] == 400
    assert call(server, endpoint, name="abc", uri="x")[0] == 200


def test_deleting_a_task_takes_its_models_and_events(server: ClearMLServer) -> None:
    task = make_task(server, status="completed")
    model = ask(server, "models.create", name="last", uri="x", task=task, ready=False)["id"]
    report(server, scalar(task, 0, 1.0))
    assert call(server, "tasks.delete", task=task)[0] == 400
    assert ask(server, "tasks.delete", task=task, force=True)["deleted_models"] == 1
    assert task not in server.state.tasks
    assert model not in server.state.models
    assert task not in server.state.events


# Files.


def test_a_file_is_stored_and_read_whole_in_part_and_not_at_all(server: ClearMLServer) -> None:
    content = bytes(range(256)) * 4 + b"\r\n--not-the-end"
    path = "a project/run.1/models/last é.ckpt"
    url, target = server.files_url, "/" + quote(path)
    assert upload(server, path, content) == (200, json.dumps([path]).encode())
    assert server.state.files == {path: content}
    assert server.state.requests[-1][:2] == ("POST", path)
    assert send(url, "GET", target) == (200, content)
    assert send(url, "GET", target, Range="bytes=2-5") == (206, content[2:6])
    assert send(url, "GET", target, Range="bytes=1000-") == (206, content[1000:])
    assert send(url, "GET", target, Range="bytes=-3") == (206, content[-3:])
    assert send(url, "GET", target, Range="bytes=9999-")[0] == 416
    assert send(url, "HEAD", target) == (200, b"")
    assert send(url, "DELETE", target)[0] == 200
    assert send(url, "GET", target)[0] == send(url, "DELETE", target)[0] == 404
    assert send(url, "POST", target)[0] == 405


# Faults.


def ping(server: ClearMLServer) -> int:
    return call(server, "users.get_current_user")[0]


def fetch(server: ClearMLServer) -> int:
    return send(server.files_url, "GET", "/x")[0]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(REFUSE, ConnectionError), (DROP, http.client.RemoteDisconnected), (HANG, TimeoutError)],
)
def test_a_fault_ends_a_connection_until_healed(
    server: ClearMLServer, fault: Fault, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = http.client.HTTPConnection
    monkeypatch.setattr(
        http.client, "HTTPConnection", lambda host, timeout: connect(host, timeout=0.3)
    )
    url = server.api_url
    server.fault = fault
    with pytest.raises(expected):
        ping(server)
    assert fetch(server) == 404
    server.heal()
    assert (server.api_url, ping(server)) == (url, 200)
    server.files_fault = fault
    with pytest.raises(expected):
        fetch(server)
    assert ping(server) == 200


@pytest.mark.parametrize(("fault", "status"), [(ERROR500, 500), (UNAUTHORIZED, 401)])
def test_a_fault_is_an_answer_with_an_error(
    server: ClearMLServer, fault: Fault, status: int
) -> None:
    server.fault = server.files_fault = fault
    assert ping(server) == fetch(server) == status
    server.heal()
    assert ping(server) == 200


def test_a_slow_server_answers_right_and_wakes_when_healed(server: ClearMLServer) -> None:
    server.fault = slow(0.1)
    began = time.monotonic()
    assert ping(server) == 200
    assert time.monotonic() - began >= 0.1
    server.fault = slow(60)
    threading.Timer(0.1, server.heal).start()
    assert ping(server) == 200
    assert time.monotonic() - began < 10


def test_a_fault_may_be_limited_to_some_endpoints(server: ClearMLServer) -> None:
    task = make_task(server)
    server.fault = ERROR500.only(lambda endpoint: endpoint.startswith("events."))
    assert ping(server) == 200
    assert report(server, scalar(task, 0, 1.0))[0] == 500
    assert [request.path for request in server.state.requests][-1] == "events.add_batch"
    with pytest.raises(ValueError, match="DROP"):
        REFUSE.only(lambda endpoint: True)


def test_stopping_a_hanging_server_does_not_block() -> None:
    server = ClearMLServer()
    server.fault = HANG
    errors: list[Exception] = []

    def client() -> None:
        try:
            ping(server)
        except (OSError, http.client.HTTPException) as error:
            errors.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    while not server.state.requests:
        time.sleep(0.01)
    began = time.monotonic()
    server.stop()
    thread.join()
    assert time.monotonic() - began < 1
    assert len(errors) == 1


def test_a_server_forgets_everything_but_the_default_queue(server: ClearMLServer) -> None:
    task = make_task(server)
    upload(server, "a", b"a")
    report(server, scalar(task, 0, 1.0))
    server.forget()
    state = server.state
    assert not any((state.tasks, state.projects, state.models, state.files, state.events))
    assert [queue["name"] for queue in state.queues.values()] == ["default"]
    assert call(server, "tasks.get_by_id", task=task)[0] == 400
    assert state.requests


# The real SDK.

Run = Callable[..., Any]


@pytest.fixture
def run_sdk(server: ClearMLServer, tmp_path: Path) -> Run:
    """Return a function that runs a script of the SDK and returns what it sets as `answer`."""

    def run(script: str, **values: Any) -> Any:
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        save = "\nimport json; open('answer.json', 'w').write(json.dumps(answer))\n"
        path = tmp_path / "script.py"
        path.write_text(PRELUDE + "\n".join(lines) + "\n" + script + save, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, path.name],
            cwd=tmp_path,
            env={**os.environ, **server.environment(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not server.state.unknown
        return json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))

    return run


REPORT = """
from pathlib import Path
import numpy as np
from clearml import OutputModel
QUIET |= {"output_uri": True, "tags": ["t"]}
task = Task.init("demo/digits", "run-v0", reuse_last_task_id=False, **QUIET)
task.connect({"optimizer": {"lr": 0.1}, "note": None}, "hparams")
task.connect_configuration({"x": [1, 2]}, "config")
logger = task.get_logger()
for step in range(3):
    logger.report_scalar("loss", "train", 1 / (step + 1), step)
logger.report_scalar("nan", "x", float("nan"), 0)
logger.report_single_value("best", 0.25)
logger.report_scatter2d("figure", "line", iteration=1, scatter=[[0, 1], [1, 2]])
logger.report_image("image", "black", iteration=1, image=np.zeros((4, 4, 3), dtype=np.uint8))
print("a line of the console")
task.upload_artifact("hparams.json", {"lr": 0.1}, wait_on_upload=True)
for name in ("last", "best"):
    Path(name).write_bytes(name.encode())
    model = OutputModel(task=task, name=name, framework="PyTorch")
    model.update_weights(name, auto_delete_file=False, async_enable=False)
task.close()
answer = task.id
"""

READ = """
task = Task.get_tasks(project_name="demo/digits", task_name="^run-v0$")[0]
from clearml import InputModel
models = {name: task.models["output"][name] for name in ("last", "best")}
models["input"] = InputModel(models["last"].id)
try:
    Task.get_task("deadbeef")
except ValueError:
    unknown = "ValueError"
answer = {
    "id": task.id,
    "lr": task.get_parameter("hparams/optimizer/lr"),
    "files": {name: open(model.get_local_copy()).read() for name, model in models.items()},
    "artifact": task.artifacts["hparams.json"].get(),
    "scalars": task.get_reported_scalars()["loss"]["train"]["y"],
    "all": task.get_all_reported_scalars()["loss"]["train"]["x"],
    "single": task.get_reported_single_values(),
    "plots": len(task.get_reported_plots()),
    "console": "".join(task.get_reported_console_output(10)),
    "unknown": unknown,
}
"""

GO_ON = """
task = Task.init("demo/digits", "run-v0", reuse_last_task_id=known, continue_last_task=0, **QUIET)
task.get_logger().report_scalar("loss", "train", 0.2, 3)
task.mark_failed(status_reason="ArithmeticError", status_message="NaN in loss")
task.close()
answer = task.id
"""


def test_the_sdk_reports_a_run_and_reads_it_back_and_goes_on(
    server: ClearMLServer, run_sdk: Run
) -> None:
    task = run_sdk(REPORT)
    assert_reported(server.state, task)
    answer = run_sdk(READ)
    assert "a line of the console" in answer.pop("console")
    assert answer == {
        "id": task,
        "lr": "0.1",
        "files": {"last": "last", "best": "best", "input": "last"},
        "artifact": {"lr": 0.1},
        "scalars": [1.0, 0.5, 1 / 3],
        "all": [0, 1, 2],
        "single": {"best": 0.25},
        "plots": 1,
        "unknown": "ValueError",
    }
    assert run_sdk(GO_ON, known=task) == task
    assert len(server.state.scalars(task)["loss"]["train"]) == 4
    stored = server.state.tasks[task]
    assert (stored["status"], stored["status_message"]) == ("failed", "NaN in loss")


def assert_reported(state: State, task: str) -> None:
    """Check that all of `REPORT` arrived."""
    stored = state.tasks[task]
    assert (stored["status"], stored["tags"], stored["last_iteration"]) == ("completed", ["t"], 2)
    assert stored["hyperparams"]["hparams"]["optimizer/lr"]["value"] == "0.1"
    assert "x" in stored["configuration"]["config"]["value"]
    assert [artifact["key"] for artifact in stored["execution"]["artifacts"]] == ["hparams.json"]
    assert state.scalars(task)["loss"] == {"train": [(0, 1.0), (1, 0.5), (2, 1 / 3)]}
    assert state.scalars(task)["nan"] == {"x": [(0, 0.0)]}
    assert [key.metric for key in state.events[task].plots] == ["figure"]
    assert [key.variant for key in state.events[task].images] == ["black"]
    assert "a line of the console" in state.console(task)
    assert state.files[f"demo/digits/run-v0.{task}/models/last"] == b"last"


def test_the_sdk_sends_an_offline_run_later_and_queues_a_clone(
    server: ClearMLServer, run_sdk: Run
) -> None:
    script = """
from pathlib import Path
from clearml import OutputModel
task = Task.create("demo/digits", "late", task_type="training")
task.mark_started()
task.connect({"lr": 0.1}, "hparams")
logger = task.get_logger()
for step in range(2):
    logger.report_scalar("loss", "train", 1.0, step)
logger.report_text("an old line")
Path("last").write_bytes(b"last")
OutputModel(task=task, name="last").update_weights("last", upload_uri=files, async_enable=False)
task.flush(wait_for_uploads=True)
task.mark_completed()
clone = Task.clone(task, name="a clone")
Task.enqueue(clone, queue_name="default")
try:
    Task.enqueue(clone, queue_name="no_such_queue")
except ValueError as error:
    unknown = "no_such_queue" in str(error)
answer = [task.id, clone.id, clone.get_status(), unknown]
"""
    task, clone, status, unknown = run_sdk(script, files=server.files_url)
    state = server.state
    assert state.tasks[task]["status"] == "completed"
    assert state.scalars(task) == {"loss": {"train": [(0, 1.0), (1, 1.0)]}}
    assert "an old line" in state.console(task)
    assert list(state.files.values()) == [b"last"]
    assert (status, unknown) == ("queued", True)
    (queue,) = state.queues.values()
    assert [entry["task"] for entry in queue["entries"]] == [clone]


def test_the_sdk_makes_a_dataset_and_gets_it(
    server: ClearMLServer, run_sdk: Run, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a", encoding="utf-8")
    script = """
from pathlib import Path
from clearml import Dataset
made = Dataset.create(dataset_project="demo/sets", dataset_name="digits", output_uri=files)
made.add_files("data")
made.upload(show_progress=False)
made.finalize()
got = Dataset.get(dataset_project="demo/sets", dataset_name="digits")
answer = [got.id, (Path(got.get_local_copy()) / "a.txt").read_text()]
"""
    dataset, content = run_sdk(script, files=server.files_url)
    assert content == "a"
    assert server.state.tasks[dataset]["status"] == "completed"
    assert "dataset" in server.state.tasks[dataset]["system_tags"]


def test_the_sdk_says_that_the_secret_is_wrong(server: ClearMLServer, run_sdk: Run) -> None:
    server.secret_key = "another"
    script = """
try:
    Task.init("demo/digits", "run", **QUIET)
except Exception as error:
    answer = type(error).__name__
"""
    assert run_sdk(script) == "LoginError"


def test_the_sdk_loses_nothing_in_an_outage(server: ClearMLServer, run_sdk: Run) -> None:
    def outage() -> None:
        while not any(request.path == "tasks.started" for request in server.state.requests):
            time.sleep(0.01)
        server.fault = DROP.only(lambda endpoint: endpoint == "events.add_batch")
        while [request.path for request in server.state.requests].count("events.add_batch") < 2:
            time.sleep(0.01)
        server.heal()

    thread = threading.Thread(target=outage)
    thread.start()
    script = """
task = Task.init("demo/digits", "run", reuse_last_task_id=False, **QUIET)
for step in range(5):
    task.get_logger().report_scalar("loss", "train", step, step)
task.close()
answer = task.id
"""
    task = run_sdk(script)
    thread.join()
    assert len(server.state.scalars(task)["loss"]["train"]) == 5
    assert server.state.task_named("run")["status"] == "completed"


# The real agent.

REMOTE = """
from clearml import Task
Task._report_subprocess_enabled = False
task = Task.init("demo/digits", "remote", auto_resource_monitoring=False)
print("the agent runs with", task.connect({"lr": 1.0}, "hparams")["lr"])
task.close()
"""


@pytest.fixture
def agent_environment(server: ClearMLServer, tmp_path: Path) -> dict[str, str]:
    """Return variables with which an agent runs tasks in a throw-away environment.

    Nothing is installed: an agent would otherwise change the `pip` of the Python that it is given.
    """
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return {
        **os.environ,
        **server.environment(tmp_path),
        "CLEARML_WORKER_ID": "test:0",
        "CLEARML_AGENT_SKIP_PIP_VENV_INSTALL": str(folder / "bin" / "python"),
        "CLEARML_AGENT_SKIP_PYTHON_ENV_INSTALL": "1",
    }


@pytest.fixture
def repository(tmp_path: Path) -> str:
    """Return the address of a git repository with the script `run.py`."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "run.py").write_text(REMOTE, encoding="utf-8")
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.invalid"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    return f"file://{folder}"


@pytest.mark.slow
@pytest.mark.skipif(which("clearml-agent") is None, reason="clearml-agent is not installed")
@pytest.mark.parametrize("mode", ["daemon", "execute"])
def test_the_agent_runs_a_task(
    server: ClearMLServer,
    run_sdk: Run,
    agent_environment: dict[str, str],
    repository: str,
    tmp_path: Path,
    mode: str,
) -> None:
    script = """
task = Task.create(
    "demo/digits", "remote", repo=repository, branch="main", script="run.py",
    working_directory=".", add_task_init_call=False, packages=["clearml"],
)
task.set_parameters({"hparams/lr": 0.5})
if mode == "daemon":
    Task.enqueue(task, queue_name="default")
answer = task.id
"""
    task = run_sdk(script, repository=repository, mode=mode)
    arguments = {
        "daemon": ["--queue", "default", "--foreground", "--cpu-only"],
        "execute": ["--id", task],
    }
    with (tmp_path / "agent.log").open("wb") as log:
        agent = subprocess.Popen(
            ["clearml-agent", mode, *arguments[mode]],
            cwd=tmp_path,
            env=agent_environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 90
            ended = ("completed", "failed", "stopped")
            while server.state.tasks[task]["status"] not in ended and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            agent.terminate()
            agent.wait(20)
    assert server.state.tasks[task]["status"] == "completed", (tmp_path / "agent.log").read_text()
    assert "the agent runs with 0.5" in server.state.console(task)
    assert not server.state.unknown


def test_it_runs_by_hand() -> None:
    command = [sys.executable, "-m", "clearml_server", "--port", "0", "--files-port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        lines = list(iter(process.stdout.readline, "# Serving until Ctrl-C.\n"))
        (url,) = [line.partition("=")[2].strip() for line in lines if "CLEARML_API_HOST" in line]
        assert send(url, "GET", "/debug.ping")[0] == 200
        process.terminate()
