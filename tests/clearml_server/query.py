"""What all `get_all` have in common: filters, order, pages, and the fields that are asked for."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from clearml_server.protocol import ApiError
from clearml_server.state import Json, State

__all__ = ["get_all", "lookup", "project_fields"]

LIST_FIELDS = ("tags", "system_tags")
VALUE_FIELDS = ("id", "project", "status", "type", "user", "parent", "task", "framework", "uri")
PATTERN_FIELDS = ("name", "basename", "comment", "report")


def get_all(state: State, items: Iterable[Json], data: Json) -> tuple[list[Json], Json]:
    """Return the items that a request asks for, and what the answer says about scrolling."""
    found = [item for item in items if _matches(item, data)]
    for name in reversed(_as_list(data.get("order_by"))):
        field = name.removeprefix("-")
        found.sort(key=lambda item: _order(lookup(item, field)), reverse=name.startswith("-"))
    found, scroll = _page(state, found, data)
    only = _as_list(data.get("only_fields"))
    return ([project_fields(item, only) for item in found] if only else found), scroll


def lookup(item: Any, path: str) -> Any:
    """Return the value at a dotted path, None where there is nothing."""
    for name in path.split("."):
        item = item.get(name) if isinstance(item, dict) else None
    return item


def project_fields(item: Json, fields: Sequence[str]) -> Json:
    """Return an item with these fields (dotted paths) only, without those that it has not."""
    kept: Json = {}
    for field in fields:
        _copy_path(item, kept, field.split("."))
    return kept


def _copy_path(source: Json, target: Json, names: Sequence[str]) -> None:
    first, *rest = names
    if first not in source:
        return
    if rest and isinstance(source[first], dict):
        _copy_path(source[first], target.setdefault(first, {}), rest)
    elif not rest:
        target[first] = source[first]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _order(value: Any) -> tuple[bool, Any]:
    return (value is not None, value if value is not None else "")


def _page(state: State, found: list[Json], data: Json) -> tuple[list[Json], Json]:
    if data.get("size") is not None or data.get("scroll_id"):
        scroll = data.get("scroll_id") or f"scroll-{len(state.scrolls)}"
        start = state.scrolls.get(scroll, 0)
        size = int(data.get("size") or 50)
        state.scrolls[scroll] = start + size
        return found[start : start + size], {"scroll_id": scroll}
    if data.get("page") is None and data.get("page_size") is None:
        return found, {}
    size = int(data.get("page_size") or 500)
    start = int(data.get("page") or 0) * size
    return found[start : start + size], {}


def _matches(item: Json, data: Json) -> bool:
    hidden = "hidden" in item.get("system_tags", [])
    if hidden and not data.get("search_hidden") and not data.get("id"):
        return False
    return (
        all(_value_matches(item, field, data.get(field)) for field in VALUE_FIELDS)
        and all(_pattern_matches(item, [field], data.get(field)) for field in PATTERN_FIELDS)
        and all(_tags_match(item.get(field, []), data.get(field)) for field in LIST_FIELDS)
        and all(_range_matches(item, field, data.get(field)) for field in data)
        and _any_of_fields(item, data)
    )


def _value_matches(item: Json, field: str, wanted: Any) -> bool:
    values = _as_list(wanted)
    if not values:
        return True
    excluded = [value[1:] for value in values if isinstance(value, str) and value[:1] == "-"]
    included = [value for value in values if not (isinstance(value, str) and value[:1] == "-")]
    actual = item.get(field)
    return actual not in excluded and (not included or actual in included)


def _pattern_matches(item: Json, fields: Sequence[str], pattern: Any) -> bool:
    if not isinstance(pattern, str) or not pattern:
        return True
    try:
        wanted = re.compile(pattern, re.IGNORECASE if pattern.startswith("(?i)") else 0)
    except re.error as error:
        raise ApiError(400, 21, f"Invalid regular expression ({error}): {pattern}") from None
    return any(wanted.search(str(lookup(item, field) or "")) for field in fields)


def _any_of_fields(item: Json, data: Json) -> bool:
    for name in ("_any_", "_all_"):
        group = data.get(name)
        if not isinstance(group, dict):
            continue
        fields = group.get("fields", [])
        results = [_pattern_matches(item, [field], group.get("pattern")) for field in fields]
        if not (any(results) if name == "_any_" else all(results)):
            return False
    return True


def _range_matches(item: Json, field: str, wanted: Any) -> bool:
    """Compare times: `[">=2026-01-01", "<2027-01-01"]`."""
    for condition in _as_list(wanted):
        found = re.fullmatch(r"(>=|<=|>|<)(.+)", condition) if isinstance(condition, str) else None
        if found is None:
            continue
        actual = str(lookup(item, field) or "")
        limit = found[2].replace(" ", "T")
        outcome = {">": actual > limit, "<": actual < limit, "=": actual == limit}
        if not any(outcome[sign] for sign in found[1]):
            return False
    return True


def _tags_match(actual: Sequence[str], wanted: Any) -> bool:
    """Apply a filter on tags: plain ones, `-excluded`, and the operators `__$all`, `__$not`..."""
    needs_all = exclude_next = False
    included: list[bool] = []
    for tag in _as_list(wanted):
        if not isinstance(tag, str):
            continue
        if tag in ("__$all", "__$and"):
            needs_all = True
        elif tag in ("__$any", "__$or"):
            needs_all = False
        elif tag in ("__$not", "__$nop"):
            exclude_next = tag == "__$not"
        elif exclude_next or tag.startswith("-"):
            if tag.removeprefix("-" if not exclude_next else "") in actual:
                return False
            exclude_next = False
        else:
            included.append(tag in actual)
    return not included or (all(included) if needs_all else any(included))
