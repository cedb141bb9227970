"""The endpoints `events.*`: what training reports, and reading it back."""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from clearml_server.metrics import note_events
from clearml_server.protocol import ApiError, now
from clearml_server.state import EventKey, Json, State, TaskEvents
from clearml_server.tasks import find_task

__all__ = ["ENDPOINTS"]

KINDS = {
    "training_stats_scalar": "scalars",
    "training_stats_vector": "vectors",
    "training_debug_image": "images",
    "plot": "plots",
}
SINGLE_VALUE = -(2**31)  # The iteration of a value that has none.
MAX_SAMPLES = 6000


def _add(state: State, data: Json) -> Json:
    return _add_events(state, [data])


def _add_batch(state: State, data: Json) -> Json:
    if not data["events"]:
        raise ApiError(400, 17, "Batch request with no items")
    return _add_events(state, data["events"])


def _add_events(state: State, events: Sequence[Json]) -> Json:
    errors: dict[str, int] = {}
    added: dict[str, list[Json]] = {}
    for event in events:
        problem = _problem(state, event)
        if problem:
            errors[problem] = errors.get(problem, 0) + 1
            continue
        _store(state.events[event["task"]], event)
        added.setdefault(event["task"], []).append(event)
    for item, new in added.items():
        owner = state.tasks.get(item) or state.models[item]
        note_events(state, owner, new, is_task=item in state.tasks)
    if not added:
        listed = ", ".join(f"{name}={count}" for name, count in errors.items())
        raise ApiError(400, 131, f"Events not added: {listed}")
    count = sum(len(new) for new in added.values())
    return {"added": count, "errors": sum(errors.values()), "errors_info": errors}


def _problem(state: State, event: Json) -> str | None:
    """Return why an event cannot be stored, and complete it where it can."""
    if event.get("model_event") and "model" in event:
        event["task"] = event.pop("model")
    kind, task = event.get("type"), event.get("task")
    if kind is None:
        return "Event must have a 'type' field"
    if kind not in KINDS and kind != "log":
        return f"Invalid event type {kind}"
    if task is None:
        return "Event must have a 'task' field"
    owners = state.models if event.get("model_event") else state.tasks
    locked = owners.get(task, {}).get("status") == "published"
    if task not in owners or (locked and not event.get("allow_locked")):
        return f"Invalid {'model' if event.get('model_event') else 'task'} id {task}"
    event.pop("allow_locked", None)
    event.setdefault("timestamp", int(now().timestamp() * 1000))
    event.update(metric=event.get("metric") or "", variant=event.get("variant") or "")
    return None


def _store(events: TaskEvents, event: Json) -> None:
    if event["type"] == "log":
        events.logs.append(event)
        return
    key = EventKey(event["metric"], event["variant"], event.get("iter"), event.get("key"))
    getattr(events, KINDS[event["type"]])[key] = event


def _events_of(state: State, data: Json) -> TaskEvents:
    owners = state.models if data.get("model_events") else state.tasks
    if data["task"] not in owners:
        find_task(state, data["task"])
    return state.events.get(data["task"], TaskEvents())


def _wanted(events: Iterable[Json], data: Json) -> list[Json]:
    """Return the events whose metric and variant a request asks for: all, without `metrics`."""
    if isinstance(data.get("metric"), str):
        events = [event for event in events if event["metric"] == data["metric"]]
    metrics = data.get("metrics")
    if not metrics:
        return list(events)
    variants = {item["metric"]: item.get("variants") for item in metrics if "metric" in item}
    return [
        event
        for event in events
        if event["metric"] in variants
        and (not variants[event["metric"]] or event["variant"] in variants[event["metric"]])
    ]


def _scroll(state: State, events: Sequence[Json], data: Json, size: int) -> tuple[list[Json], str]:
    scroll = data.get("scroll_id") or f"scroll-{len(state.scrolls)}"
    start = state.scrolls.get(scroll, 0)
    state.scrolls[scroll] = start + size
    return list(events[start : start + size]), scroll


def _by_time(event: Json) -> int:
    return int(event["timestamp"])


def _by_iteration(event: Json) -> tuple[int, int]:
    return int(event.get("iter") or 0), _by_time(event)


def _get_task_log(state: State, data: Json) -> Json:
    """Return the newest messages, or the oldest ones where the request starts at the head."""
    events = sorted(_events_of(state, data).logs, key=_by_time)
    size = int(data.get("batch_size") or 500)
    limit = data.get("from_timestamp")
    earlier = data.get("navigate_earlier", True)
    if limit is not None:
        events = [e for e in events if (_by_time(e) < limit if earlier else _by_time(e) > limit)]
    found = events[-size:] if earlier else events[:size]
    if data.get("order", "desc") == "desc":
        found.reverse()
    return {"events": found, "returned": len(found), "total": len(events), "scroll_id": None}


def _get_task_events(state: State, data: Json) -> Json:
    stored = _events_of(state, data)
    kind = data.get("event_type")
    everything: list[Json] = list(stored.logs) if kind in (None, "log") else []
    for name, field in KINDS.items():
        if kind in (None, name):
            everything += getattr(stored, field).values()
    events = sorted(_wanted(everything, data), key=_by_iteration)
    if data.get("order") == "desc":
        events.reverse()
    found, scroll = _scroll(state, events, data, int(data.get("batch_size") or 500))
    return {"events": found, "returned": len(found), "total": len(events), "scroll_id": scroll}


def _scalars_raw(state: State, data: Json) -> Json:
    events = sorted(_wanted(_events_of(state, data).scalars.values(), data), key=_by_iteration)
    found, scroll = _scroll(state, events, data, int(data.get("batch_size") or 10_000))
    variants: dict[str, dict[str, Json]] = {}
    for event in found:
        series = variants.setdefault(event["metric"], {}).setdefault(
            event["variant"], {"iter": [], "y": [], "timestamp": []}
        )
        series["iter"].append(event["iter"])
        series["y"].append(event["value"])
        series["timestamp"].append(event["timestamp"])
    answer = {"returned": len(found), "total": len(events), "scroll_id": scroll}
    return {**answer, "variants": variants}


def _histogram(state: State, data: Json) -> Json:
    samples = int(data.get("samples") or MAX_SAMPLES)
    if samples > MAX_SAMPLES:
        raise ApiError(400, 12, f"Validation error (samples: {samples} is over {MAX_SAMPLES})")
    series: dict[str, dict[str, list[Json]]] = {}
    events = _wanted(_events_of(state, data).scalars.values(), data)
    for event in sorted(events, key=lambda e: (e["metric"], e["variant"], _by_iteration(e))):
        if event["iter"] != SINGLE_VALUE:
            variants = series.setdefault(event["metric"], {})
            variants.setdefault(event["variant"], []).append(event)
    key = data.get("key") or "iter"
    return {
        metric: {
            variant: {"name": variant, **_curve(points, samples, key)}
            for variant, points in variants.items()
        }
        for metric, variants in series.items()
    }


def _curve(points: Sequence[Json], samples: int, key: str) -> Json:
    """Return a curve of at most `samples` points: the means of neighbours where there are more."""
    width = math.ceil(len(points) / samples)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return {
        "x": [_x_value(group[0], key) for group in groups],
        "y": [sum(event["value"] for event in group) / len(group) for group in groups],
    }


def _x_value(event: Json, key: str) -> Any:
    if key == "iso_time":
        return datetime.fromtimestamp(event["timestamp"] / 1000, UTC).isoformat()
    return event[key]


def _multi_histogram(state: State, data: Json) -> Json:
    metrics: Json = {}
    for task in data["tasks"]:
        for metric, variants in _histogram(state, {**data, "task": task}).items():
            for variant, curve in variants.items():
                by_task = metrics.setdefault(metric, {}).setdefault(variant, {})
                by_task[task] = {**curve, "name": find_task(state, task)["name"]}
    return {"metrics": metrics}


def _get_task_metrics(state: State, data: Json) -> Json:
    kind = KINDS.get(data.get("event_type", ""), "")
    found = []
    for task in data["tasks"]:
        stored = _events_of(state, {**data, "task": task})
        fields = [kind] if kind else list(KINDS.values())
        names = {key.metric for field in fields for key in getattr(stored, field)}
        found.append({"task": task, "metrics": sorted(names)})
    return {"metrics": found}


def _scalar_names(state: State, data: Json) -> Json:
    names: dict[str, list[str]] = {}
    for key in sorted(_events_of(state, data).scalars):
        variants = names.setdefault(key.metric, [])
        if key.variant not in variants:
            variants.append(key.variant)
    return {"metrics": names}


def _scalar_data(state: State, data: Json) -> Json:
    return _get_task_events(state, {**data, "event_type": "training_stats_scalar", "order": "desc"})


def _latest_scalars(state: State, data: Json) -> Json:
    task = find_task(state, data["task"])
    scalars = sorted(_events_of(state, data).scalars.values(), key=_by_iteration)
    latest: dict[str, dict[str, Json]] = {}
    for event in scalars:
        latest.setdefault(event["metric"], {})[event["variant"]] = {
            "name": event["variant"],
            "last_value": event["value"],
            "last_timestamp": event["timestamp"],
        }
    return {
        "metrics": [
            {"name": metric, "variants": list(variants.values())}
            for metric, variants in latest.items()
        ],
        "last_iter": task["last_iteration"],
        "name": task["name"],
        "status": task["status"],
        "last_timestamp": max(map(_by_time, scalars), default=None),
    }


def _single_values(state: State, data: Json) -> Json:
    tasks = []
    for task in data["tasks"]:
        scalars = _wanted(_events_of(state, {**data, "task": task}).scalars.values(), data)
        values = [
            {name: event[name] for name in ("metric", "variant", "value", "timestamp")}
            for event in scalars
            if event["iter"] == SINGLE_VALUE
        ]
        tasks.append({"task": task, "task_name": _name(state, task), "values": values})
    return {"tasks": [task for task in tasks if task["values"]]}


def _name(state: State, item: str) -> str:
    name: str = (state.tasks.get(item) or state.models[item])["name"]
    return name


def _last_iterations(events: Iterable[Json], count: int) -> list[Json]:
    """Return the events of the last iterations of each metric and variant, newest first."""
    kept: list[Json] = []
    seen: dict[tuple[str, str], int] = {}
    for event in sorted(events, key=_by_iteration, reverse=True):
        series = (event["metric"], event["variant"])
        seen[series] = seen.get(series, 0) + 1
        if seen[series] <= count:
            kept.append(event)
    return kept


def _get_task_plots(state: State, data: Json) -> Json:
    plots = _wanted(_events_of(state, data).plots.values(), data)
    found = _last_iterations(plots, int(data.get("iters") or 1))
    return {"plots": found, "returned": len(found), "total": len(plots), "scroll_id": None}


def _get_multi_task_plots(state: State, data: Json) -> Json:
    plots: Json = {}
    total = 0
    for task in data["tasks"]:
        answer = _get_task_plots(state, {**data, "task": task})
        total += answer["total"]
        for event in answer["plots"]:
            series = plots.setdefault(event["metric"], {}).setdefault(event["variant"], {})
            of_task = series.setdefault(task, {})
            plot = of_task.setdefault(str(event["iter"]), {"name": _name(state, task), "plots": []})
            plot["plots"].append(event)
    return {"plots": plots, "returned": total, "total": total, "scroll_id": None}


def _debug_images(state: State, data: Json) -> Json:
    """Return the images of the last iterations, once: the answer to a scroll is empty."""
    metrics = []
    again = data.get("scroll_id") in state.scrolls
    for item in data["metrics"]:
        images = _wanted(_events_of(state, item).images.values(), {"metrics": [item]})
        iterations: dict[int, list[Json]] = {}
        for event in sorted(images, key=_by_iteration, reverse=True):
            iterations.setdefault(event["iter"], []).append(event)
        latest = list(iterations.items())[: int(data.get("iters") or 1)]
        listed = [] if again else [{"iter": i, "events": found} for i, found in latest]
        metrics.append({"task": item["task"], "metric": item.get("metric"), "iterations": listed})
    _, scroll = _scroll(state, [], data, 1)
    return {"metrics": metrics, "scroll_id": scroll}


def _delete_for_task(state: State, data: Json) -> Json:
    find_task(state, data["task"])
    return {"deleted": state.events.pop(data["task"], None) is not None}


ENDPOINTS = {
    "events.add": _add,
    "events.add_batch": _add_batch,
    "events.debug_images": _debug_images,
    "events.delete_for_task": _delete_for_task,
    "events.get_multi_task_plots": _get_multi_task_plots,
    "events.get_scalar_metric_data": _scalar_data,
    "events.get_scalar_metrics_and_variants": _scalar_names,
    "events.get_task_events": _get_task_events,
    "events.get_task_latest_scalar_values": _latest_scalars,
    "events.get_task_log": _get_task_log,
    "events.get_task_metrics": _get_task_metrics,
    "events.get_task_plots": _get_task_plots,
    "events.get_task_single_value_metrics": _single_values,
    "events.multi_task_scalar_metrics_iter_histogram": _multi_histogram,
    "events.scalar_metrics_iter_histogram": _histogram,
    "events.scalar_metrics_iter_raw": _scalars_raw,
}
