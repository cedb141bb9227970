"""What a task (or a model) remembers of its events: last values, extremes, the last iteration."""

from collections.abc import Sequence

from clearml_server.protocol import field_hash
from clearml_server.state import Json, State
from clearml_server.tasks import set_duration

__all__ = ["note_events"]


def note_events(state: State, owner: Json, events: Sequence[Json], *, is_task: bool) -> None:
    """Update a task or a model after a batch of its events."""
    iterations = [event["iter"] for event in events if event.get("iter") is not None]
    owner["last_iteration"] = max([owner["last_iteration"], *iterations])
    series: dict[tuple[str, str], list[Json]] = {}
    for event in events:
        if event["type"] == "training_stats_scalar":
            series.setdefault((event["metric"], event["variant"]), []).append(event)
    for new in series.values():
        _note_scalars(owner["last_metrics"], new)
    if is_task:
        owner["metric_stats"] = _stats(events)
        set_duration(owner)
    state.touch(owner)


def _stats(events: Sequence[Json]) -> Json:
    """Return when each metric was last heard of, in the newest batch: the server keeps no other."""
    stats: Json = {}
    for event in events:
        metric = event["metric"]
        entry = stats.setdefault(field_hash(metric), {"metric": metric, "event_stats_by_type": {}})
        by_type = entry["event_stats_by_type"].setdefault(event["type"], {"last_update": 0})
        by_type["last_update"] = max(by_type["last_update"], event["timestamp"])
    return stats


def _note_scalars(last_metrics: Json, events: Sequence[Json]) -> None:
    metric, variant = events[0]["metric"], events[0]["variant"]
    entry = last_metrics.setdefault(field_hash(metric), {}).setdefault(
        field_hash(variant), {"metric": metric, "variant": variant}
    )
    entry["value"] = max(events, key=lambda event: (event["iter"], event["timestamp"]))["value"]
    _note_extreme(entry, "min", min(events, key=lambda event: event["value"]))
    _note_extreme(entry, "max", max(events, key=lambda event: event["value"]))
    if "first_value" not in entry:
        first = min(events, key=lambda event: event["iter"])
        entry.update(first_value=first["value"], first_value_iteration=first["iter"])
    known = entry.get("count", 0)
    total = entry.get("mean_value", 0.0) * known + sum(event["value"] for event in events)
    entry["count"] = known + len(events)
    entry["mean_value"] = round(total / entry["count"], 2)


def _note_extreme(entry: Json, name: str, event: Json) -> None:
    value, known = event["value"], entry.get(f"{name}_value")
    if known is None or (value < known if name == "min" else value > known):
        entry.update({f"{name}_value": value, f"{name}_value_iteration": event["iter"]})
