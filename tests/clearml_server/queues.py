"""The endpoints `queues.*` and `workers.*`."""

from clearml_server.protocol import COMPANY, ApiError, check_name, now, stored_time
from clearml_server.query import get_all
from clearml_server.state import Json, State

__all__ = ["ENDPOINTS", "find_queue", "remove_from_queues"]


def find_queue(state: State, queue: str | None) -> Json:
    """Return a queue by its id.

    Raises:
        ApiError: If there is none.
    """
    found = state.queues.get(queue or "")
    if found is None:
        raise ApiError(400, 701, f"Invalid queue id: id={queue}, company={COMPANY}")
    return found


def remove_from_queues(state: State, task: str) -> int:
    """Remove a task from every queue, and return from how many."""
    removed = 0
    for queue in state.queues.values():
        kept = [entry for entry in queue["entries"] if entry["task"] != task]
        removed += len(queue["entries"]) - len(kept)
        queue["entries"] = kept
    return removed


def _create(state: State, data: Json) -> Json:
    check_name(data)
    if any(queue["name"] == data["name"] for queue in state.queues.values()):
        raise ApiError(
            400,
            801,
            "Value combination already exists (unique field already contains this value): "
            "err=Tried to save duplicate unique keys (E11000 Duplicate Key Error)",
        )
    return {"id": state.add_queue(data["name"], data.get("system_tags"))["id"]}


def _get_by_id(state: State, data: Json) -> Json:
    return {"queue": find_queue(state, data.get("queue"))}


def _get_all(state: State, data: Json) -> Json:
    found, scroll = get_all(state, state.queues.values(), data)
    return {"queues": found, **scroll}


def _get_default(state: State, _: Json) -> Json:
    queue = next((q for q in state.queues.values() if "default" in q["system_tags"]), None)
    if queue is None:
        raise ApiError(400, 705, "No default queue")
    return {"id": queue["id"], "name": queue["name"]}


def _update(state: State, data: Json) -> Json:
    queue = find_queue(state, data.get("queue"))
    fields: Json = {name: data[name] for name in ("name", "tags", "system_tags") if name in data}
    queue.update(fields)
    return {"updated": 1, "fields": fields}


def _delete(state: State, data: Json) -> Json:
    queue = find_queue(state, data.get("queue"))
    if queue["entries"] and not data.get("force"):
        raise ApiError(400, 704, f"Queue is not empty (use force=true to delete): id={queue['id']}")
    del state.queues[queue["id"]]
    return {"deleted": 1}


def _add_task(state: State, data: Json) -> Json:
    queue = find_queue(state, data.get("queue"))
    if any(entry["task"] == data["task"] for entry in queue["entries"]):
        raise ApiError(400, 702, f"Task already queued: task={data['task']}")
    queue["entries"].append({"task": data["task"], "added": stored_time(now())})
    return {"added": 1}


def _remove_task(state: State, data: Json) -> Json:
    queue = find_queue(state, data.get("queue"))
    kept = [entry for entry in queue["entries"] if entry["task"] != data["task"]]
    removed, queue["entries"] = len(queue["entries"]) - len(kept), kept
    if not removed:
        raise ApiError(400, 703, f"Invalid queue or task not in queue: task={data['task']}")
    return {"removed": removed}


def _get_next_task(state: State, data: Json) -> Json:
    queue = find_queue(state, data.get("queue"))
    if not queue["entries"]:
        return {}
    entry = queue["entries"].pop(0)
    answer = {"entry": entry}
    if data.get("get_task_info"):
        task = state.tasks[entry["task"]]
        answer["task_info"] = {"company": task["company"], "user": task["user"]}
    return answer


def _peek_task(state: State, data: Json) -> Json:
    entries = find_queue(state, data.get("queue"))["entries"]
    return {"task": entries[0]["task"]} if entries else {}


def _get_num_entries(state: State, data: Json) -> Json:
    return {"num": len(find_queue(state, data.get("queue"))["entries"])}


def _register(state: State, data: Json) -> Json:
    worker = data["worker"]
    state.workers[worker] = {"id": worker, "register_time": stored_time(now()), **data}
    return {}


def _unregister(state: State, data: Json) -> Json:
    if state.workers.pop(data["worker"], None) is None:
        raise ApiError(400, 1001, f"Invalid worker id: worker={data['worker']}")
    return {}


def _status_report(state: State, data: Json) -> Json:
    worker = state.workers.setdefault(data["worker"], {"id": data["worker"]})
    worker.update(data, last_activity_time=stored_time(now()))
    task = state.tasks.get(data.get("task", ""))
    if task is not None:
        task.update(last_worker=data["worker"], last_worker_report=stored_time(now()))
    return {}


def _get_workers(state: State, _: Json) -> Json:
    return {"workers": list(state.workers.values())}


def _get_runtime_properties(state: State, data: Json) -> Json:
    return {"runtime_properties": state.workers.get(data["worker"], {}).get("properties", [])}


def _set_runtime_properties(state: State, data: Json) -> Json:
    worker = state.workers.setdefault(data["worker"], {"id": data["worker"]})
    worker["properties"] = data["runtime_properties"]
    return {"added": [item["key"] for item in data["runtime_properties"]], "errors": []}


ENDPOINTS = {
    "queues.add_task": _add_task,
    "queues.create": _create,
    "queues.delete": _delete,
    "queues.get_all": _get_all,
    "queues.get_all_ex": _get_all,
    "queues.get_by_id": _get_by_id,
    "queues.get_default": _get_default,
    "queues.get_next_task": _get_next_task,
    "queues.get_num_entries": _get_num_entries,
    "queues.peek_task": _peek_task,
    "queues.remove_task": _remove_task,
    "queues.update": _update,
    "workers.get_all": _get_workers,
    "workers.get_runtime_properties": _get_runtime_properties,
    "workers.register": _register,
    "workers.set_runtime_properties": _set_runtime_properties,
    "workers.status_report": _status_report,
    "workers.unregister": _unregister,
}
