"""The endpoints `tasks.*` that create, read and change tasks."""

import copy
from typing import Any

from clearml_server.models import find_model
from clearml_server.projects import project_of, touch_project
from clearml_server.protocol import COMPANY, USER, ApiError, check_name, new_id, now, stored_time
from clearml_server.query import get_all
from clearml_server.state import Json, State

__all__ = ["ENDPOINTS", "find_task", "set_duration"]

EDITABLE = (
    "name",
    "tags",
    "system_tags",
    "type",
    "comment",
    "parent",
    "project",
    "models",
    "container",
    "execution",
    "hyperparams",
    "configuration",
    "runtime",
)


def find_task(state: State, task: str | None) -> Json:
    """Return a task by its id.

    Raises:
        ApiError: If there is none.
    """
    found = state.tasks.get(task or "")
    if found is None:
        raise ApiError(400, 101, f"Invalid task id: id={task}, company={COMPANY}")
    return found


def set_duration(task: Json) -> None:
    """Set how long a task runs; the server does so whenever it hears of a running one."""
    if task["status"] == "in_progress" and "started" in task:
        started = type(now()).fromisoformat(task["started"])
        task["active_duration"] = int((now() - started).total_seconds())


def _new_task(name: str, task_type: str) -> Json:
    moment = stored_time(now())
    return {
        "id": new_id(),
        "company": COMPANY,
        "user": USER,
        "name": name,
        "type": task_type,
        "status": "created",
        "comment": "",
        "report_assets": [],
        "created": moment,
        "output": {},
        "execution": _new_execution(),
        "tags": [],
        "system_tags": [],
        "script": {"binary": "python", "repository": "", "entry_point": "", "requirements": {}},
        "last_update": moment,
        "last_change": moment,
        "last_iteration": 0,
        "last_metrics": {},
        "unique_metrics": [],
        "metric_stats": {},
        "hyperparams": {},
        "configuration": {},
        "runtime": {},
        "models": {"input": [], "output": []},
        "container": {},
        "last_changed_by": USER,
    }


def _new_execution() -> Json:
    return {
        "test_split": 0,
        "parameters": {},
        "model_desc": {},
        "model_labels": {},
        "artifacts": [],
    }


def _fields(task: Json, data: Json) -> Json:
    """Return what a request changes in a task, as the answer lists it."""
    check_name(data)
    fields = {name: copy.deepcopy(data[name]) for name in EDITABLE if name in data}
    for name in ("tags", "system_tags"):
        if name in fields:
            fields[name] = sorted(fields[name] or [])
    if "script" in data:
        fields["script"] = {**task["script"], **data["script"]}
    if "output_dest" in data:
        fields["output"] = {**task["output"], "destination": data["output_dest"]}
    if "execution" in fields:
        fields["execution"] = {**_new_execution(), **fields["execution"]}
        fields["execution"]["artifacts"] = _artifacts(fields["execution"]["artifacts"])
    return fields


def _artifacts(artifacts: list[Json]) -> list[Json]:
    full = [{"mode": "output", "display_data": [], **artifact} for artifact in artifacts]
    for artifact in full:
        artifact["display_data"] = sorted(artifact["display_data"])
    return sorted(full, key=lambda artifact: artifact["key"])


def _create(state: State, data: Json) -> Json:
    task = _new_task(data["name"], data.get("type", "training"))
    task.update(_fields(task, data))
    state.tasks[task["id"]] = task
    touch_project(state, task.get("project"))
    return {"id": task["id"]}


def _edit(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    if not data.get("force") and task["status"] != "created":
        raise ApiError(400, 110, f"Invalid task status: expected=created, status={task['status']}")
    fields = _fields(task, data)
    task.update(copy.deepcopy(fields))
    only_tags = set(fields) <= {"tags", "system_tags"}
    return {"updated": 1, "fields": {**fields, **state.touch(task, update=not only_tags)}}


def _update(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    names = ("name", "tags", "system_tags", "comment", "project")
    fields = _fields(task, {name: data[name] for name in names if name in data})
    task.update(fields)
    return {"updated": 1, "fields": {**fields, **state.touch(task, update=False)}}


def _get_by_id(state: State, data: Json) -> Json:
    task = state.tasks.get(data.get("task", ""))
    if task is None:
        raise ApiError(400, 101, f"Invalid task id: ids=({data.get('task')})")
    return {"task": task}


def _get_all(state: State, data: Json) -> Json:
    found, scroll = get_all(state, state.tasks.values(), data)
    return {"tasks": found, **scroll}


def _get_types(state: State, data: Json) -> Json:
    wanted = data.get("projects") or list(state.projects)
    tasks = [task for task in state.tasks.values() if task.get("project") in wanted]
    return {"types": sorted({task["type"] for task in tasks})}


def _clone(state: State, data: Json) -> Json:
    source = find_task(state, data.get("task"))
    task = _new_task(data.get("new_task_name") or source["name"], source["type"])
    kept = ("comment", "project", "tags", "script", "hyperparams", "configuration", "container")
    task.update({name: copy.deepcopy(source[name]) for name in kept if name in source})
    execution = copy.deepcopy(source["execution"])
    execution.pop("queue", None)
    execution["artifacts"] = [a for a in execution["artifacts"] if a["mode"] == "input"]
    new = {
        name: data[f"new_task_{name}"]
        for name in ("comment", "parent", "project", "tags", "system_tags", "container")
        if data.get(f"new_task_{name}") is not None
    }
    if "new_project_name" in data:
        new["project"] = project_of(state, data["new_project_name"])["id"]
    system_tags = [t for t in source["system_tags"] if t not in ("development", "archived")]
    task.update(
        parent=source.get("parent") or source["id"],
        execution={**execution, **data.get("execution_overrides", {})},
        models={"input": list(source["models"]["input"]), "output": []},
        system_tags=system_tags,
    )
    if "destination" in source["output"]:
        task["output"] = {"destination": source["output"]["destination"]}
    task.update(new)
    state.tasks[task["id"]] = task
    touch_project(state, task.get("project"))
    return {"id": task["id"]}


def _edit_hyper_params(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    mode = data.get("replace_hyperparams", "none")
    params = data["hyperparams"]
    if mode == "all":
        task["hyperparams"] = {}
    if mode == "section":
        for param in params:
            task["hyperparams"].pop(param["section"], None)
    for param in params:
        task["hyperparams"].setdefault(param["section"], {})[param["name"]] = param
    state.touch(task, update=any(param["section"] != "properties" for param in params))
    return {"updated": 1}


def _delete_hyper_params(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    for param in data["hyperparams"]:
        section = task["hyperparams"].get(param["section"], {})
        if param.get("name"):
            section.pop(param["name"], None)
        if not param.get("name") or not section:
            task["hyperparams"].pop(param["section"], None)
    state.touch(task)
    return {"deleted": 1}


def _get_hyper_params(state: State, data: Json) -> Json:
    def listed(task: Json) -> list[Any]:
        return [param for section in task["hyperparams"].values() for param in section.values()]

    tasks = [find_task(state, task) for task in data["tasks"]]
    return {"params": [{"task": task["id"], "hyperparams": listed(task)} for task in tasks]}


def _edit_configuration(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    if data.get("replace_configuration"):
        task["configuration"] = {}
    task["configuration"].update({item["name"]: item for item in data["configuration"]})
    state.touch(task)
    return {"updated": 1}


def _delete_configuration(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    for name in data["configuration"]:
        task["configuration"].pop(name, None)
    state.touch(task)
    return {"deleted": 1}


def _get_configurations(state: State, data: Json) -> Json:
    names = data.get("names")
    found = []
    for task in (find_task(state, item) for item in data["tasks"]):
        items = [c for name, c in task["configuration"].items() if not names or name in names]
        found.append({"task": task["id"], "configuration": items})
    return {"configurations": found}


def _get_configuration_names(state: State, data: Json) -> Json:
    tasks = [find_task(state, task) for task in data["tasks"]]
    return {
        "configurations": [{"task": t["id"], "names": sorted(t["configuration"])} for t in tasks]
    }


def _set_requirements(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    task["script"]["requirements"] = data["requirements"]
    state.touch(task)
    return {"updated": 1, "fields": {}}


def _add_artifacts(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    new = _artifacts(data["artifacts"])
    replaced = {(artifact["key"], artifact["mode"]) for artifact in new}
    kept = [a for a in task["execution"]["artifacts"] if (a["key"], a["mode"]) not in replaced]
    task["execution"]["artifacts"] = _artifacts([*kept, *new])
    state.touch(task)
    return {"updated": 1}


def _delete_artifacts(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    gone = {(a["key"], a.get("mode", "output")) for a in data["artifacts"]}
    kept = [a for a in task["execution"]["artifacts"] if (a["key"], a["mode"]) not in gone]
    task["execution"]["artifacts"] = kept
    state.touch(task)
    return {"deleted": 1}


def _add_model(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    find_model(state, data.get("model"))
    models = task["models"][data["type"]]
    entry = {"name": data["name"], "model": data["model"], "updated": stored_time(now())}
    for index, known in enumerate(models):
        if known["name"] == data["name"]:
            models[index] = entry
            break
    else:
        models.append(entry)
    if "iteration" in data:
        task["last_iteration"] = max(task["last_iteration"], data["iteration"])
    set_duration(task)
    state.touch(task)
    return {"updated": 1}


def _delete_models(state: State, data: Json) -> Json:
    task = find_task(state, data.get("task"))
    for gone in data["models"]:
        models = task["models"][gone["type"]]
        task["models"][gone["type"]] = [entry for entry in models if entry["name"] != gone["name"]]
    state.touch(task)
    return {"updated": 1}


def _ping(state: State, data: Json) -> Json:
    state.touch(find_task(state, data.get("task")))
    return {}


def _move(state: State, data: Json) -> Json:
    project = data.get("project") or project_of(state, data["project_name"])["id"]
    for task in data["ids"]:
        find_task(state, task)["project"] = project
    return {"project_id": project}


ENDPOINTS = {
    "tasks.add_or_update_artifacts": _add_artifacts,
    "tasks.add_or_update_model": _add_model,
    "tasks.clone": _clone,
    "tasks.create": _create,
    "tasks.delete_artifacts": _delete_artifacts,
    "tasks.delete_configuration": _delete_configuration,
    "tasks.delete_hyper_params": _delete_hyper_params,
    "tasks.delete_models": _delete_models,
    "tasks.edit": _edit,
    "tasks.edit_configuration": _edit_configuration,
    "tasks.edit_hyper_params": _edit_hyper_params,
    "tasks.get_all": _get_all,
    "tasks.get_all_ex": _get_all,
    "tasks.get_by_id": _get_by_id,
    "tasks.get_by_id_ex": _get_by_id,
    "tasks.get_configuration_names": _get_configuration_names,
    "tasks.get_configurations": _get_configurations,
    "tasks.get_hyper_params": _get_hyper_params,
    "tasks.get_types": _get_types,
    "tasks.move": _move,
    "tasks.ping": _ping,
    "tasks.set_requirements": _set_requirements,
    "tasks.update": _update,
}
