"""The bytes of nested values: equal ones have the same, and what has none is said so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from torch_lab.contents import contents


def told(value: Any) -> list[tuple[str, Any]]:
    return list(contents(value))


def test_an_array_of_one_object_is_what_it_holds() -> None:
    """`np.load` returns a dictionary that was saved in an array without dimensions."""
    value = {"x": np.arange(2), "y": "text"}
    assert told(np.array(value, dtype=object)) == told(value)
    assert [title for title, _ in told({"a": np.array(value, dtype=object)})] == [
        "/a/x int64 (2,)",
        "/a/y",
    ]


def test_arrays_of_objects_are_compared_by_their_parts() -> None:
    """Equal ones are equal, wherever their parts lie in memory."""

    def made(last: str) -> np.ndarray:
        return np.array([["a", "".join(["b", "c"])], [None, last]], dtype=object)

    assert told(made("d")) == told(made("d")) != told(made("e"))
    assert [title for title, _ in told(made("d"))] == ["/0/0", "/0/1", "/1/0", "/1/1"]


@pytest.mark.parametrize("shape", [(), (2,), (2, 1)])
def test_records_with_objects_have_no_bytes(shape: tuple[int, ...]) -> None:
    """Those that they have are addresses: equal ones would differ, and others be equal."""
    records = np.zeros(shape, dtype=[("a", object), ("b", int)])
    ((title, data),) = told(records)
    assert (title.endswith(f" {shape}"), data) == (True, None)
    assert told(records.reshape(-1)[0]) == [(f" {records.dtype} ()", None)]


def test_records_without_objects_have_bytes() -> None:
    """They are plain numbers."""
    records = np.array([(1, 2.0)], dtype=[("a", int), ("b", float)])
    assert told(records)[0][1] == records.tobytes()
    assert told(records[0]) == [("", repr(records[0]).encode())]
