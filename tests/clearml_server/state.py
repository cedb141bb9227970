"""All that the server knows, as plain dictionaries that a test may look into."""

import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clearml_server.protocol import COMPANY, USER, exact_time, new_id, now, stored_time

__all__ = ["EventKey", "Json", "Request", "State", "TaskEvents"]

Json = dict[str, Any]


class Request(NamedTuple):
    """One request that arrived, answered or not."""

    method: str
    path: str
    """The endpoint without its version for the API, else the path of the file."""
    size: int
    when: float


class EventKey(NamedTuple):
    """What identifies an event of a task: sent again, it replaces the one before."""

    metric: str
    variant: str
    iteration: int | None
    key: str | None = None


@dataclass
class TaskEvents:
    """The events of one task (or model)."""

    scalars: dict[EventKey, Json] = field(default_factory=dict)
    plots: dict[EventKey, Json] = field(default_factory=dict)
    images: dict[EventKey, Json] = field(default_factory=dict)
    vectors: dict[EventKey, Json] = field(default_factory=dict)
    logs: list[Json] = field(default_factory=list)


class State:
    """The database and the files of one server.

    `tasks`, `models`, `projects` and `queues` map ids to what the server answers about them;
    `files` maps the path of a file to its bytes; `events` maps a task's id to its events.
    `requests` holds every request in the order of arrival, `unknown` the endpoints that this
    server does not know: a test should end with none.
    """

    def __init__(self, credentials: tuple[str, str]) -> None:
        self.lock = threading.RLock()
        self.credentials = credentials
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self.tokens: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Become a server with an empty database; tokens stay good, and the record of requests."""
        with self.lock:
            self.tasks: dict[str, Json] = {}
            self.models: dict[str, Json] = {}
            self.projects: dict[str, Json] = {}
            self.queues: dict[str, Json] = {}
            self.workers: dict[str, Json] = {}
            self.files: dict[str, bytes] = {}
            self.events: defaultdict[str, TaskEvents] = defaultdict(TaskEvents)
            self.scrolls: dict[str, int] = {}
            self.add_queue("default", tags=["default"])

    def scalars(self, task: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Return the scalars of a task: metric, variant, then (iteration, value) in order."""
        found: dict[str, dict[str, list[tuple[int, float]]]] = {}
        scalars = self.events.get(task, TaskEvents()).scalars
        for key, event in sorted(scalars.items(), key=lambda item: item[0]):
            points = found.setdefault(key.metric, {}).setdefault(key.variant, [])
            points.append((event["iter"], event["value"]))
        return found

    def console(self, task: str) -> str:
        """Return the console of a task, as its messages arrived."""
        return "\n".join(event.get("msg", "") for event in self.events.get(task, TaskEvents()).logs)

    def task_named(self, name: str) -> Json:
        """Return the one task with this name.

        Raises:
            LookupError: If there is none, or more than one.
        """
        found = [task for task in self.tasks.values() if task["name"] == name]
        if len(found) != 1:
            names = sorted(task["name"] for task in self.tasks.values())
            raise LookupError(f"{len(found)} tasks are named {name!r}; there are: {names}")
        return found[0]

    def add_queue(self, name: str, tags: list[str] | None = None) -> Json:
        """Create a queue."""
        moment = stored_time(now())
        queue: Json = {
            "id": new_id(),
            "name": name,
            "display_name": "",
            "user": USER,
            "company": COMPANY,
            "created": moment,
            "last_update": moment,
            "tags": [],
            "system_tags": sorted(tags or []),
            "entries": [],
            "metadata": {},
        }
        self.queues[queue["id"]] = queue
        return queue

    def touch(self, item: Json, *, update: bool = True) -> Json:
        """Note that a task or a model changed, and return what the answer says about it."""
        moment = now()
        names = ["last_change", "last_update"] if update else ["last_change"]
        item.update(dict.fromkeys(names, stored_time(moment)), last_changed_by=USER)
        return {**dict.fromkeys(names, exact_time(moment)), "last_changed_by": USER}
