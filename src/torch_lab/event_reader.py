"""What is in TensorBoard event files, read while they are written; torch is not needed for it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event

__all__ = ["Logged", "Picture", "Point", "event_files", "logged_in"]

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


class Picture(NamedTuple):
    """An image that was logged."""

    tag: str
    step: int
    content: bytes
    """A PNG file."""
    time_ms: int


@dataclass
class Logged:
    """What was read of an event file."""

    end: int
    """The byte where reading ended."""
    points: list[Point] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def event_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the event files in a folder and the ones below, by their paths in it."""
    for path in sorted(folder.rglob("*.tfevents.*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix(), path


def logged_in(folder: Path, name: str, start: int = 0) -> Logged:
    """Return the scalars and images in an event file from the byte `start` on.

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
    found = Logged(start)
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
        _collect(event, series, found)
        at = end
    found.end = start + at
    return found


def _collect(event: Any, series: str, found: Logged) -> None:
    """Add what an event holds to what was found."""
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        time_ms = int(event.wall_time * 1000)
        if kind == "simple_value":
            tag = f"{value.tag}{series}"
            found.points.append(Point(tag, event.step, value.simple_value, time_ms))
        elif kind == "image":
            content = value.image.encoded_image_string
            found.pictures.append(Picture(value.tag, event.step, content, time_ms))
