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


def event_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the event files in a folder and the ones below, by their paths in it."""
    for path in sorted(folder.rglob("*.tfevents.*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix(), path


def points_in(folder: Path, name: str, start: int = 0) -> tuple[list[Point], int]:
    """Return the scalars in an event file from the byte `start` on, and where reading ended.

    A record that is being written is left for the next time.

    Args:
        folder: The metrics folder of a run.
        name: The path of the file in it. What `add_scalars` has written to a folder below gets
            that folder's name behind its own.
        start: Where a record begins.
    """
    below = Path(name).parent.as_posix()
    series = "" if below == "." else f"/{below}"
    with (folder / name).open("rb") as file:
        file.seek(start)
        data = file.read(_MOST_BYTES)
        if len(data) >= _HEADER.size:
            # An image may be larger.
            length, _ = _HEADER.unpack_from(data)
            data += file.read(max(0, _HEADER.size + length + _FOOTER - len(data)))
    points: list[Point] = []
    at = 0
    while at + _HEADER.size <= len(data):
        length, _ = _HEADER.unpack_from(data, at)
        end = at + _HEADER.size + length + _FOOTER
        if end > len(data):
            break
        try:
            event = Event.FromString(data[at + _HEADER.size : end - _FOOTER])
        except DecodeError:
            break
        points += _scalars(event, series)
        at = end
    return points, start + at


def _scalars(event: Any, series: str) -> Iterator[Point]:
    time_ms = int(event.wall_time * 1000)
    for value in event.summary.value:
        if value.HasField("simple_value"):
            yield Point(f"{value.tag}{series}", event.step, value.simple_value, time_ms)
