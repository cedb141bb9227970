"""The endpoints `models.*`."""

from clearml_server.projects import project_of, touch_project
from clearml_server.protocol import COMPANY, USER, ApiError, check_name, new_id, now, stored_time
from clearml_server.query import get_all
from clearml_server.state import Json, State

__all__ = ["ENDPOINTS", "find_model"]

EDITABLE = (
    "name",
    "tags",
    "system_tags",
    "task",
    "comment",
    "uri",
    "project",
    "parent",
    "framework",
    "design",
    "labels",
    "metadata",
    "ready",
)


def find_model(state: State, model: str | None) -> Json:
    """Return a model by its id.

    Raises:
        ApiError: If there is none.
    """
    found = state.models.get(model or "")
    if found is None:
        raise ApiError(400, 201, f"Invalid model id: id={model}, company={COMPANY}")
    return found


def _create(state: State, data: Json) -> Json:
    moment = stored_time(now())
    model: Json = {
        "id": new_id(),
        "company": COMPANY,
        "user": USER,
        "created": moment,
        "tags": [],
        "system_tags": [],
        "design": {},
        "labels": {},
        "ready": True,
        "last_update": moment,
        "last_change": moment,
        "last_changed_by": USER,
        "metadata": {},
        "last_iteration": 0,
        "last_metrics": {},
    }
    model.update(_fields(data))
    state.models[model["id"]] = model
    return {"created": True, "id": model["id"]}


def _fields(data: Json) -> Json:
    check_name(data)
    fields = {name: data[name] for name in EDITABLE if name in data}
    for name in ("tags", "system_tags"):
        if name in fields:
            fields[name] = sorted(fields[name])
    if isinstance(fields.get("metadata"), list):
        fields["metadata"] = {item["key"]: item for item in fields["metadata"]}
    return fields


def _edit(state: State, data: Json) -> Json:
    model = find_model(state, data.get("model"))
    fields = _fields(data)
    if model["ready"] and "uri" in fields and fields["uri"] != model.get("uri"):
        raise ApiError(400, 203, f"Model is ready: id={model['id']}, company={COMPANY}")
    model.update(fields)
    touch_project(state, model.get("project"))
    return {"updated": 1, "fields": {**fields, "ui_cache": {}, **state.touch(model)}}


def _update(state: State, data: Json) -> Json:
    model = find_model(state, data.get("model"))
    fields = _fields(data)
    model.update(fields)
    only_labels = set(fields) <= {"name", "comment", "tags", "system_tags"}
    return {"updated": 1, "fields": {**fields, **state.touch(model, update=not only_labels)}}


def _update_for_task(state: State, data: Json) -> Json:
    task = state.tasks[data["task"]]
    found = [entry["model"] for entry in task["models"]["output"] if entry["name"] == data["name"]]
    fields: Json = {name: data[name] for name in ("uri", "name", "comment", "tags") if name in data}
    if found:
        return {"id": found[0], "created": False, **_update(state, {**fields, "model": found[0]})}
    made = _create(state, {**fields, "task": task["id"], "project": task.get("project")})
    entry = {"name": data["name"], "model": made["id"], "updated": stored_time(now())}
    task["models"]["output"].append(entry)
    return made


def _get_by_id(state: State, data: Json) -> Json:
    return {"model": find_model(state, data.get("model"))}


def _get_all(state: State, data: Json) -> Json:
    models = list(state.models.values())
    if data.get("ready") is not None:
        models = [model for model in models if model["ready"] == data["ready"]]
    found, scroll = get_all(state, models, data)
    return {"models": found, **scroll}


def _get_by_task_id(state: State, data: Json) -> Json:
    found = [m for m in state.models.values() if m.get("task") == data["task"]]
    return {"model": found[-1]} if found else {}


def _delete(state: State, data: Json) -> Json:
    model = find_model(state, data.get("model"))
    if model["ready"] and not data.get("force"):
        raise ApiError(400, 205, f"Model is in use (published, use force=True): id={model['id']}")
    del state.models[model["id"]]
    for task in state.tasks.values():
        kept = [entry for entry in task["models"]["output"] if entry["model"] != model["id"]]
        task["models"]["output"] = kept
    return {"deleted": 1, "url": model.get("uri")}


def _set_ready(state: State, data: Json) -> Json:
    model = find_model(state, data.get("model"))
    if model["ready"]:
        raise ApiError(400, 203, f"Model is ready: id={model['id']}, company={COMPANY}")
    model["ready"] = True
    state.touch(model)
    return {"updated": 1}


def _add_metadata(state: State, data: Json) -> Json:
    model = find_model(state, data.get("model"))
    if data.get("replace_metadata"):
        model["metadata"] = {}
    for item in data["metadata"]:
        model["metadata"][item["key"]] = item
    state.touch(model)
    return {"updated": 1}


def _delete_metadata(state: State, data: Json) -> Json:
    model = find_model(state, data.get("model"))
    for key in data["keys"]:
        model["metadata"].pop(key, None)
    state.touch(model)
    return {"updated": 1}


def _archive_many(state: State, data: Json) -> Json:
    return _tag_many(state, data, archive=True)


def _unarchive_many(state: State, data: Json) -> Json:
    return _tag_many(state, data, archive=False)


def _tag_many(state: State, data: Json, *, archive: bool) -> Json:
    for model in (find_model(state, item) for item in data["ids"]):
        tags = set(model["system_tags"]) - {"archived"}
        model["system_tags"] = sorted(tags | {"archived"} if archive else tags)
    succeeded = [
        {"id": item, "archived" if archive else "unarchived": True} for item in data["ids"]
    ]
    return {"succeeded": succeeded, "failed": []}


def _move(state: State, data: Json) -> Json:
    project = data.get("project") or project_of(state, data["project_name"])["id"]
    for model in data["ids"]:
        find_model(state, model)["project"] = project
    return {"project_id": project}


ENDPOINTS = {
    "models.add_or_update_metadata": _add_metadata,
    "models.archive_many": _archive_many,
    "models.create": _create,
    "models.delete": _delete,
    "models.delete_metadata": _delete_metadata,
    "models.edit": _edit,
    "models.get_all": _get_all,
    "models.get_all_ex": _get_all,
    "models.get_by_id": _get_by_id,
    "models.get_by_id_ex": _get_by_id,
    "models.get_by_task_id": _get_by_task_id,
    "models.move": _move,
    "models.set_ready": _set_ready,
    "models.unarchive_many": _unarchive_many,
    "models.update": _update,
    "models.update_for_task": _update_for_task,
}
