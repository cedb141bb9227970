"""The endpoints `projects.*`."""

from clearml_server.protocol import COMPANY, USER, ApiError, new_id, now, stored_time
from clearml_server.query import get_all, project_fields
from clearml_server.state import Json, State

__all__ = ["ENDPOINTS", "project_of", "touch_project"]


def project_of(state: State, name: str, description: str = "") -> Json:
    """Return the project with this name, created with all above it where it is missing."""
    for project in state.projects.values():
        if project["name"] == name:
            return project
    parent, _, basename = name.rpartition("/")
    moment = stored_time(now())
    project = {
        "id": new_id(),
        "company": COMPANY,
        "user": USER,
        "name": name,
        "basename": basename,
        "description": description,
        "created": moment,
        "tags": [],
        "system_tags": [],
        "last_update": moment,
        "featured": 9999,
        "path": [],
    }
    if parent:
        above = project_of(state, parent)
        project.update(parent=above["id"], path=[*above["path"], above["id"]])
    state.projects[project["id"]] = project
    return project


def touch_project(state: State, project: str | None) -> None:
    """Note that something in a project changed."""
    if project in state.projects:
        state.projects[project]["last_update"] = stored_time(now())


def _find(state: State, data: Json) -> Json:
    project = state.projects.get(data.get("project", ""))
    if project is None:
        raise ApiError(400, 401, f"Invalid project id: id={data.get('project')}")
    return project


def _create(state: State, data: Json) -> Json:
    if any(project["name"] == data["name"] for project in state.projects.values()):
        raise ApiError(
            400,
            801,
            "Value combination already exists (unique field already contains this value): "
            "err=Tried to save duplicate unique keys (E11000 Duplicate Key Error)",
        )
    project = project_of(state, data["name"], data.get("description", ""))
    _apply(project, data)
    return {"id": project["id"]}


def _apply(project: Json, data: Json) -> Json:
    names = ("name", "description", "tags", "system_tags", "default_output_destination")
    fields = {name: data[name] for name in names if name in data}
    for name in ("tags", "system_tags"):
        if name in fields:
            fields[name] = sorted(fields[name])
    project.update(fields)
    return fields


def _get_by_id(state: State, data: Json) -> Json:
    return {"project": _find(state, data)}


def _get_all(state: State, data: Json) -> Json:
    found, scroll = get_all(state, state.projects.values(), data)
    if not data.get("only_fields"):
        names = ["path"]
        found = [project_fields(p, [name for name in p if name not in names]) for p in found]
    return {"projects": found, **scroll}


def _get_or_create(state: State, data: Json) -> Json:
    return {"id": project_of(state, data["name"], data.get("description", ""))["id"]}


def _update(state: State, data: Json) -> Json:
    return {"updated": 1, "fields": _apply(_find(state, data), data)}


def _delete(state: State, data: Json) -> Json:
    project = _find(state, data)
    below = [p for p in state.projects.values() if project["id"] in (p["id"], *p["path"])]
    ids = {p["id"] for p in below}
    held = [task for task in state.tasks.values() if task.get("project") in ids]
    if held and not data.get("force"):
        raise ApiError(400, 402, f"Project has associated tasks: id={project['id']}")
    for task in held:
        task["project"] = None
    for item in ids:
        del state.projects[item]
    return {"deleted": 1, "disassociated_tasks": len(held), "urls": {}, "deleted_models": 0}


def _get_task_tags(state: State, data: Json) -> Json:
    wanted = data.get("projects") or list(state.projects)
    tasks = [task for task in state.tasks.values() if task.get("project") in wanted]
    return {
        name: sorted({tag for task in tasks for tag in task[name]})
        for name in ("tags", "system_tags")
    }


ENDPOINTS = {
    "projects.create": _create,
    "projects.delete": _delete,
    "projects.get_all": _get_all,
    "projects.get_all_ex": _get_all,
    "projects.get_by_id": _get_by_id,
    "projects.get_or_create": _get_or_create,
    "projects.get_task_tags": _get_task_tags,
    "projects.update": _update,
}
