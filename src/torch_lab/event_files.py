"""TensorBoard event files that survive: whole records only, and no error that stops a training.

torch's `SummaryWriter` hands what it is given to a thread, which ends without a word when the disk
is full, and nobody knows what of it is in the file. Here everything happens in the caller's thread.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from torch_lab.files import sync

__all__ = ["EventFile", "EventWriter"]

log = logging.getLogger(__name__)

_PREFIX = "events.out.tfevents."
_WRITE_EVERY_S = 2.0
_WRITE_BYTES = 2**20
_KEEP_BYTES = 2**26


class EventWriter(SummaryWriter):
    """A `SummaryWriter` that writes as this module says.

    Args:
        folder: Where the event files go; it is made, the one above has to be there.
    """

    all_writers: Any
    file_writer: Any

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(str(folder))

    def add_values(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars as one record: all of them are in the file, or none."""
        event = Event(step=step, summary=_summary(values))
        self._get_file_writer().add_event(event)

    def add_scalars(
        self, main_tag: str, tag_scalar_dict: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Write scalars to a folder each; see `SummaryWriter`."""
        self._get_file_writer()
        for tag in tag_scalar_dict:
            # Where it looks for a writer before it makes one of its own.
            folder = f"{self.folder}/{main_tag.replace('/', '_')}_{tag}"
            if folder not in self.all_writers:
                self.all_writers[folder] = _FileWriter(Path(folder), self.folder.parent)
        super().add_scalars(main_tag, tag_scalar_dict, *args, **kwargs)

    def save(self) -> bool:
        """Write all that is in memory, and return whether it is safe on the disk."""
        saved = [writer.event_writer.save() for writer in (self.all_writers or {}).values()]
        return all(saved)

    def _get_file_writer(self) -> FileWriter:
        if self.all_writers is None:
            self.file_writer = _FileWriter(self.folder, self.folder.parent)
            self.all_writers = {str(self.folder): self.file_writer}
        writer: FileWriter = self.file_writer
        return writer


def _summary(values: Mapping[str, float]) -> Summary:
    items = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    return Summary(value=items)


class _FileWriter(FileWriter):
    """torch's, but for the file that it would open."""

    def __init__(self, folder: Path, below: Path) -> None:
        self.event_writer = EventFile(folder, below)


class EventFile:
    """An event file, with what is to be written to it.

    It is written every few seconds while events come, and when it is flushed. What cannot be
    written stays in memory, up to 64 MiB. A process that was forked writes nothing: what it has in
    memory is its parent's.

    Args:
        folder: Where the file goes.
        below: A folder above, which is never made: it is gone when the run was removed.
    """

    def __init__(self, folder: Path, below: Path) -> None:
        self._folder = folder
        self._below = below
        self._path: Path | None = None
        self._size = 0
        """Bytes of the whole records in the file."""
        self._pending = _Pending()
        self._due = 0.0
        self._failing_since: str | None = None
        self._owner = os.getpid()
        self._lock = threading.RLock()

    def get_logdir(self) -> str:
        """Return the folder."""
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        """Add an event."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            now = time.monotonic()
            if not self._pending.records:
                self._due = now + _WRITE_EVERY_S
            self._pending.add(_framed(event))
            is_much = self._pending.size > _WRITE_BYTES and self._failing_since is None
            if is_much or now >= self._due:
                self._write(durably=False)

    def flush(self) -> None:
        """Write what is in memory, as far as that is possible."""
        self._flush(durably=False)

    def save(self) -> bool:
        """Write what is in memory, and return whether all of it is safe on the disk."""
        return self._flush(durably=True)

    def close(self) -> None:
        """Write what is in memory; what cannot be written is lost, and an error says so."""
        self._flush(durably=False)
        if lost := len(self._pending.records):
            log.error("%s: %d records of metrics are lost", self._folder, lost)
            self._pending = _Pending()

    def reopen(self) -> None:
        """Go on after `close`."""

    def _flush(self, *, durably: bool) -> bool:
        if os.getpid() != self._owner:
            return False
        with self._lock:
            return self._write(durably=durably)

    def _write(self, *, durably: bool) -> bool:
        try:
            if self._pending.records:
                self._append(b"".join(self._pending.records))
            if durably and self._path is not None:
                sync(self._path)
                sync(self._folder)
        except OSError as error:
            self._put_off(error)
            return False
        if self._failing_since is not None:
            self._recovered()
        return True

    def _append(self, data: bytes) -> None:
        # Somebody may have removed or cut the file meanwhile.
        if self._path is None or not _holds(self._path, self._size):
            self._path, self._size = self._new_file(), 0
        whole = data if self._size else _framed(_header()) + data
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            # What is left of a record that did not fit is cut off, so that the file can be read;
            # so is what was written when something interrupted this before it took note.
            os.ftruncate(descriptor, self._size)
            _write_at(descriptor, self._size, whole)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._size)
            raise
        finally:
            os.close(descriptor)
        self._size, self._pending = self._size + len(whole), _Pending(lost=self._pending.lost)

    def _new_file(self) -> Path:
        """Create a file under a name as TensorBoard's own writer gives it."""
        self._below.stat()
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, and never goes back. Clocks do.
        stamps = (path.name.split(".")[3] for path in self._folder.glob(f"{_PREFIX}*"))
        before = (int(stamp) for stamp in stamps if stamp.isdecimal())
        for stamp in itertools.count(max(int(time.time()), 1 + max(before, default=0))):
            name = f"{_PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
                break
        return self._folder / name

    def _put_off(self, error: OSError) -> None:
        self._due = time.monotonic() + _WRITE_EVERY_S
        if self._failing_since is None:
            self._failing_since = time.strftime("%H:%M:%S")
            log.error(
                "metrics since %s are not on disk, but kept in memory: %s: %s",
                self._failing_since,
                self._folder,
                error.strerror,
            )

    def _recovered(self) -> None:
        lost = f", but for {self._pending.lost} records that were too much for the memory"
        log.warning(
            "metrics since %s are written now%s",
            self._failing_since,
            lost * bool(self._pending.lost),
        )
        self._failing_since, self._pending.lost = None, 0


@dataclass
class _Pending:
    """Records to be written; of more than 64 MiB the newest."""

    records: deque[bytes] = field(default_factory=deque)
    size: int = 0
    lost: int = 0

    def add(self, record: bytes) -> None:
        self.records.append(record)
        self.size += len(record)
        while self.size > _KEEP_BYTES:
            self.size -= len(self.records.popleft())
            self.lost += 1


def _header() -> Event:
    source = SourceMetadata(writer="torch_lab.event_files")
    return Event(wall_time=time.time(), file_version="brain.Event:2", source_metadata=source)


def _framed(event: Event) -> bytes:
    """Return an event as the record that TensorBoard reads."""
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()


def _holds(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size >= size
    except FileNotFoundError:
        return False


def _write_at(descriptor: int, offset: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
