"""What is in TensorBoard event files, read while they are written; torch is not needed for it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event

__all__ = ["Point", "event_files", "points_in"]

_HEADER: Final = struct.Struct("<QI")
"""Before a record: its length, and a checksum of that."""
_FOOTER: Final = 4
_MOST_BYTES: Final = 2**23
"""Read at once, so that a mirror that begins late takes little memory."""


class Point(NamedTuple):
    """A scalar that was logged."""

    tag: str
    step: int
    value: float
    time_ms: int
    """Since 1970."""
    end: int
    """Where its record ends in the file."""


def event_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the event files in a folder and the ones below, by their paths in it."""
    for path in sorted(folder.rglob("*.tfevents.*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix(), path


def points_in(path: Path, start: int = 0) -> tuple[list[Point], int]:
    """Return the scalars in an event file from the byte `start` on, and where reading ended.

    A record that is being written is left for the next time.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = memoryview(file.read(_MOST_BYTES))
    points: list[Point] = []
    at = 0
    while at + _HEADER.size <= len(data):
        length, _ = _HEADER.unpack_from(data, at)
        end = at + _HEADER.size + length + _FOOTER
        if end > len(data):
            break
        try:
            event = Event.FromString(bytes(data[at + _HEADER.size : end - _FOOTER]))
        except DecodeError:
            break
        points += _scalars(event, start + end)
        at = end
    return points, start + at


def _scalars(event: Any, end: int) -> Iterator[Point]:
    time_ms = int(event.wall_time * 1000)
    for value in event.summary.value:
        if value.HasField("simple_value"):
            yield Point(value.tag, event.step, value.simple_value, time_ms, end)
