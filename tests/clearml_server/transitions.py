"""The endpoints `tasks.*` that change the status of a task, with the server's rules for that."""

from clearml_server.projects import touch_project
from clearml_server.protocol import USER, ApiError, exact_time, now, stored_time
from clearml_server.queues import find_queue, remove_from_queues
from clearml_server.state import Json, State
from clearml_server.tasks import find_task

__all__ = ["ENDPOINTS"]

# What may follow a status; anything may follow when forced.
ALLOWED = {
    "created": {"queued", "in_progress"},
    "queued": {"created", "in_progress", "stopped"},
    "in_progress": {"stopped", "failed", "created", "completed"},
    "stopped": {"closed", "created", "failed", "queued", "in_progress", "published", "completed"},
    "closed": {"created", "failed", "published", "stopped"},
    "failed": {"created", "stopped", "published", "queued"},
    "published": set(),
    "completed": {"published", "in_progress", "created"},
}


def _change(state: State, data: Json, status: str, stamp: str | None = None) -> Json:
    """Change the status of a task and return the answer; `stamp` is a time to note, `started`..."""
    task = find_task(state, data.get("task"))
    current = task["status"]
    if not data.get("force") and status not in {current, *ALLOWED[current]}:
        raise ApiError(
            400,
            110,
            "Invalid task status (Invalid status change): "
            f"current_status={current}, new_status={status}",
        )
    moment = now()
    times = ["status_changed", "last_update", "last_change", *([stamp] if stamp else [])]
    fields = {
        "status": status,
        "status_reason": data.get("status_reason") or "",
        "status_message": data.get("status_message") or "",
        "last_changed_by": USER,
    }
    task.update(fields, **dict.fromkeys(times, stored_time(moment)))
    touch_project(state, task.get("project"))
    return {"updated": 1, "fields": {**fields, **dict.fromkeys(times, exact_time(moment))}}


def _forget_times(task: Json, *names: str) -> None:
    for name in names:
        task.pop(name, None)


def _started(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    running = task["status"] == "in_progress"
    answer = _change(state, data, "in_progress", None if running else "started")
    if not running:
        _forget_times(task, "completed", "active_duration")
    return {**answer, "started": 1}


def _stop(state: State, data: Json) -> Json:
    """Stop a task: at once where nothing runs it for a queue, else by asking its worker to."""
    task = find_task(state, data.get("task"))
    worker = task.get("last_worker")
    if "development" in task["system_tags"] or worker is None or data.get("force"):
        remove_from_queues(state, task["id"])
        return _change(state, data, "stopped", "completed")
    return _change(state, {**data, "status_message": "stopping"}, task["status"])


def _stopped(state: State, data: Json) -> Json:
    return _change(state, data, "stopped", "completed")


def _completed(state: State, data: Json) -> Json:
    answer = _change(state, data, "completed", "completed")
    if data.get("publish"):
        _publish(state, {"task": data["task"], "force": True})
    return {**answer, "published": int(bool(data.get("publish")))}


def _failed(state: State, data: Json) -> Json:
    return _change(state, data, "failed", "completed")


def _close(state: State, data: Json) -> Json:
    return _change(state, data, "closed")


def _publish(state: State, data: Json) -> Json:
    answer = _change(state, data, "published", "published")
    task = find_task(state, data["task"])
    for entry in task["models"]["output"][-1:]:
        if data.get("publish_model", True) and entry["model"] in state.models:
            state.models[entry["model"]]["ready"] = True
    return {**answer, "committed_versions_results": []}


def _reset(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    if task["status"] == "published" and not data.get("force"):
        raise ApiError(400, 110, f"Invalid task status: task_id={task['id']}, status=published")
    change = {"task": task["id"], "status_reason": "reset", "status_message": "reset"}
    answer = _change(state, {**change, "force": data.get("force")}, "created")
    remove_from_queues(state, task["id"])
    deleted = _delete_results(state, task)
    empty = {
        "last_iteration": 0,
        "last_metrics": {},
        "unique_metrics": [],
        "metric_stats": {},
        "runtime": {},
    }
    task.update(empty)
    artifacts = task["execution"]["artifacts"]
    task["execution"]["artifacts"] = [a for a in artifacts if a["mode"] == "input"]
    task["execution"].pop("queue", None)
    _forget_times(
        task,
        *("started", "completed", "published", "active_duration", "enqueue_status"),
        *("last_worker", "last_worker_report"),
    )
    return {"deleted_models": deleted, "dequeued": {}, "events": {}, "urls": {}, **answer}


def _delete_results(state: State, task: Json) -> int:
    """Delete the events and the unpublished output models of a task; return how many models."""
    state.events.pop(task["id"], None)
    made = [m for m in state.models.values() if m.get("task") == task["id"] and not m["ready"]]
    for model in made:
        del state.models[model["id"]]
    task["models"]["output"] = []
    return len(made)


def _delete(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    free = task["status"] == "created" or "archived" in task["system_tags"]
    if not free and not data.get("force"):
        raise ApiError(
            400,
            123,
            "Task cannot be deleted (due to status, use force=True): "
            f"task={task['id']}, expected=created, current={task['status']}",
        )
    remove_from_queues(state, task["id"])
    deleted = _delete_results(state, task) if data.get("delete_output_models", True) else 0
    del state.tasks[task["id"]]
    touch_project(state, task.get("project"))
    return {
        "deleted": True,
        "updated_children": 0,
        "updated_models": 0,
        "deleted_models": deleted,
        "events": {},
        "urls": {},
    }


def _enqueue(state: State, data: Json) -> Json:
    queue = _queue_of_request(state, data)
    task = find_task(state, data.get("task"))
    before = task["status"] if task["status"] != "queued" else task.get("enqueue_status")
    answer = _change(state, data, "queued")
    remove_from_queues(state, task["id"])
    queue["entries"].append({"task": task["id"], "added": stored_time(now())})
    task["enqueue_status"] = before
    task["execution"]["queue"] = queue["id"]
    task["system_tags"] = [tag for tag in task["system_tags"] if tag != "development"]
    answer["fields"] |= {"enqueue_status": before, "execution.queue": queue["id"]}
    return {"queued": 1, **answer}


def _queue_of_request(state: State, data: Json) -> Json:
    if data.get("queue"):
        return find_queue(state, data["queue"])
    name = data.get("queue_name")
    for queue in state.queues.values():
        if queue["name"] == name or (not name and "default" in queue["system_tags"]):
            return queue
    return state.add_queue(name or "default")


def _dequeue(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    if task["status"] != "queued":
        raise ApiError(400, 110, f"Invalid task status: status={task['status']}, expected=queued")
    answer = _change(state, {**data, "force": True}, task.get("enqueue_status") or "created")
    remove_from_queues(state, task["id"])
    task["execution"].pop("queue", None)
    _forget_times(task, "enqueue_status")
    return {"dequeued": 1, **answer}


def _archive(state: State, data: Json) -> Json:
    for task in (find_task(state, item) for item in data["tasks"]):
        task["system_tags"] = sorted({*task["system_tags"], "archived"})
    return {"archived": len(data["tasks"])}


ENDPOINTS = {
    "tasks.archive": _archive,
    "tasks.close": _close,
    "tasks.completed": _completed,
    "tasks.delete": _delete,
    "tasks.dequeue": _dequeue,
    "tasks.enqueue": _enqueue,
    "tasks.failed": _failed,
    "tasks.publish": _publish,
    "tasks.reset": _reset,
    "tasks.started": _started,
    "tasks.stop": _stop,
    "tasks.stopped": _stopped,
}
