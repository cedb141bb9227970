"""What a person sees: header, closing table, errors; and `console.log`, which keeps all of it.

While a `Console` is open, `sys.stdout` and `sys.stderr` also go to `console.log`, as a terminal
would show them at the end: of a line that was drawn again and again the last state, no colours.
Log records and warnings of third parties go to `console.log` alone.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from torch_lab.errors import Interrupted, TorchLabError, UserError
from torch_lab.redaction import MASK, secrets_around
from torch_lab.utils import shown

__all__ = [
    "Console",
    "is_open",
    "place_of",
    "print_rows",
    "print_table",
    "raised_in_lightning",
    "rendered",
    "user_frames",
]

log = logging.getLogger("torch_lab")

_ERASE_LINE = "\r\x1b[2K"
_CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_IN_WORKER = re.compile(
    r"Caught \w+ in (?P<where>DataLoader worker process \d+)\.\n"
    r"Original Traceback \(most recent call last\):\n"
)
_FRAME = re.compile(r"^  File \"[^\n]*\n(?:    [^\n]*\n)*", re.MULTILINE)
_FILE = re.compile(r"^  File \"([^\"]*)\"")
"""A worker's traceback, which comes as the message of its error."""
_HERE = str(Path(__file__).parent)
_THIRD_PARTIES = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_QUIET_LOGGERS = ("pytorch_lightning", "lightning_fabric", "lightning")
"""Loggers to which Lightning gives a handler of their own when it is imported."""


class Console:
    """Takes over the terminal for a run, and gives it back when closed.

    Args:
        quiet: Show nothing, as on the ranks that only follow.
        debug: Show debug records too.
        as_json: Send what others print to stdout to stderr: a program reads stdout.
    """

    def __init__(self, *, quiet: bool = False, debug: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.level = logging.DEBUG if debug else logging.INFO
        self._stdout = sys.stdout
        self._transcript = _Transcript()
        self._restore = ExitStack()

    def __enter__(self) -> Console:
        handler = _Handler(self._transcript, least=logging.ERROR if self.quiet else self.level)
        if self.quiet:
            self._transcript.attach(Path(os.devnull))
        else:
            self._restore.enter_context(_teed(self._transcript, as_json=self.as_json))
        self._restore.enter_context(_logging_to(handler, self.level))
        self._restore.enter_context(_warnings_to(handler))
        self._restore.callback(self._transcript.close)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore.close()

    def attach(self, path: Path) -> None:
        """Keep what was shown so far, and from now on, in the file at `path`."""
        if not self.quiet:
            self._transcript.attach(path)

    def header(self, rows: Iterable[tuple[str, str]]) -> None:
        """Show what the run is, on stderr."""
        if not self.quiet:
            print_rows(rows, sys.stderr)

    def closing(self, rows: Iterable[tuple[str, str]]) -> None:
        """Show what came out of it, on stdout."""
        if not self.quiet:
            print_rows(rows, sys.stdout)

    def progress(self, text: str, fraction: float) -> None:
        """Show a bar in a terminal and `text` beside it, in place of what this showed before."""
        if not self.quiet and sys.stderr.isatty():
            from torch_lab.callbacks.progress import BAR_CELLS, bar

            line = f"{bar(fraction, BAR_CELLS, sys.stderr)}  {text}"
            print(f"{_ERASE_LINE}{line}", end="", file=sys.stderr, flush=True)

    def no_progress(self) -> None:
        """Remove the bar that was shown last."""
        if not self.quiet and sys.stderr.isatty():
            print(_ERASE_LINE, end="", file=sys.stderr, flush=True)

    def result(self, text: str) -> None:
        """Show `text` on stdout."""
        if not self.quiet:
            print(text, file=self._stdout)

    def keep(self, text: str) -> None:
        """Add `text` to the file alone."""
        self._transcript.add_line(text)


class _Transcript:
    """The lines that were shown, in memory until there is a file for them."""

    def __init__(self) -> None:
        self.live: _Tee | None = None
        """The stream whose last line is still being redrawn."""
        self._file: TextIO = io.StringIO()
        self._secrets = secrets_around()

    def attach(self, path: Path) -> None:
        shown = self._file
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if isinstance(shown, io.StringIO):
            self._file.write(shown.getvalue())

    def add_line(self, line: str) -> None:
        text = _CONTROL_SEQUENCE.sub("", line.rpartition("\r")[2])
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        self._file.write(text + "\n")

    def close(self) -> None:
        self._file.close()


class _Tee(io.TextIOBase):
    """Writes to a stream, and whole lines to the transcript."""

    def __init__(self, stream: TextIO, transcript: _Transcript) -> None:
        self._stream = stream
        self._transcript = transcript
        self._line = ""

    def write(self, text: str) -> int:
        if self._transcript.live is not None and not text.startswith("\r"):
            self._transcript.live.erase_line()
        self._transcript.live = None
        self._pass_on(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._transcript.add_line(line)
        if self._line.startswith(_ERASE_LINE):
            self._transcript.live = self
            self._line = self._line[self._line.rindex("\r") :]
        return len(text)

    def erase_line(self) -> None:
        """Make room for a line of another stream: the live line will be drawn again below it."""
        self._line = ""
        self._stream.write(_ERASE_LINE)
        self._stream.flush()

    def _pass_on(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            plain = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            self._stream.write(plain)
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        """Write to nowhere from now on: whoever read the stream has left, the run goes on."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


@contextmanager
def _teed(transcript: _Transcript, *, as_json: bool) -> Iterator[None]:
    stdout, stderr = sys.stdout, sys.stderr
    sys.stderr = _Tee(stderr, transcript)
    sys.stdout = sys.stderr if as_json else _Tee(stdout, transcript)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr


class _Handler(logging.Handler):
    """Shows the records of torch_lab and the user; keeps those of third parties in the file."""

    def __init__(self, transcript: _Transcript, least: int) -> None:
        super().__init__(least)
        self._transcript = transcript

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._show(record)
        except Exception:  # As in the standard library: a bad log call ends no program.
            self.handleError(record)

    def _show(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno in (logging.DEBUG, logging.INFO) else record.levelname.lower()
        prefix = f"{level}: " if level else ""
        ours = record.name.partition(".")[0] == "torch_lab"
        if ours or not _is_third_party(record.pathname):
            print(prefix + self.format(record), file=sys.stderr)
        else:
            self._transcript.add_line(f"{prefix}{record.name}: {self.format(record)}")

    def show_warning(
        self, message: Warning | str, category: type[Warning], file: str, line: int
    ) -> None:
        # Lightning's warnings may name a line of ours, which called it.
        if self.level > logging.WARNING or _is_third_party(file) or file.startswith(_HERE):
            self._transcript.add_line(
                warnings.formatwarning(message, category, file, line).rstrip()
            )
        else:
            print(f"warning: {file}:{line}: {category.__name__}: {message}", file=sys.stderr)


def _is_third_party(file: str) -> bool:
    return file.startswith(_THIRD_PARTIES)


@contextmanager
def _logging_to(handler: logging.Handler, level: int) -> Iterator[None]:
    root = logging.getLogger()
    quiet = [logging.getLogger(name) for name in _QUIET_LOGGERS]
    before = root.level, root.handlers, [(each.handlers, each.propagate) for each in quiet]
    root.setLevel(level)
    root.handlers = [handler]
    for each in quiet:
        each.handlers, each.propagate = [], True
    try:
        yield
    finally:
        root.handlers = before[1]
        root.setLevel(before[0])
        for each, (handlers, propagate) in zip(quiet, before[2], strict=True):
            each.handlers, each.propagate = handlers, propagate


@contextmanager
def _warnings_to(handler: _Handler) -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        handler.show_warning(message, category, filename, lineno)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def is_open() -> bool:
    """Return whether a console has the streams of this process, be it by a fork."""
    return isinstance(sys.stderr, _Tee)


def print_rows(rows: Iterable[tuple[str, str]], file: TextIO) -> None:
    """Print labels and values in two columns; further lines of a value stand below its first."""
    from rich.text import Text

    listed = list(rows)
    width = max((len(label) for label, _ in listed), default=0)
    style = "" if os.environ.get("NO_COLOR") else "dim"
    for label, value in listed:
        for index, line in enumerate(value.split("\n")):
            title = ("" if index else label).ljust(width + 2)
            _print(Text.assemble((title, style), line), file)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], file: TextIO) -> None:
    """Print a table with a title above each column."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _print(table, file)


def _print(renderable: Any, file: TextIO) -> None:
    from rich.console import Console as RichConsole

    # Nothing is known of the width of a file, and folding a path would break it.
    width = None if file.isatty() else 1000
    # In a notebook rich would write past `file`, and so past the transcript.
    options: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    console = RichConsole(file=file, width=width, force_jupyter=False, **options)
    console.print(renderable, soft_wrap=True)


def rendered(error: BaseException, *, debug: bool = False) -> str:
    """Return `error` as text for the user.

    Of our own errors their message, and the hint below it; of the user's, the traceback from the
    user's frame on, with the frames of Lightning and torch_lab folded unless `debug`.
    """
    if isinstance(error, UserError) or (isinstance(error, TorchLabError) and not debug):
        hint = "".join(f"\n  {line}" for line in (error.hint or "").splitlines())
        return f"error: {error.message}{hint}"
    if isinstance(error, Interrupted) and not debug:
        return error.why or f"stopped by {error}"
    if not debug and (in_worker := _from_worker(str(error))):
        return in_worker
    told = traceback.TracebackException.from_exception(error)
    if not debug:
        _fold(told)
    return "".join(told.format()).rstrip()


def _from_worker(message: str) -> str:
    """Return the traceback in the message of an error from a worker, from the user's frame on."""
    if not (begin := _IN_WORKER.match(message)):
        return ""
    frames = _FRAME.findall(message, begin.end())
    _, _, rest = message.rpartition(frames[-1]) if frames else ("", "", message[begin.end() :])
    from_user = itertools.dropwhile(lambda frame: _is_others(_FILE.findall(frame)[0]), frames)
    kept = [frame for frame in from_user if not _is_folded(_FILE.findall(frame)[0])]
    title = f"Traceback (most recent call last, in {begin['where']}):\n" if kept else ""
    return f"{title}{''.join(kept)}{rest}".rstrip()


def _fold(told: traceback.TracebackException) -> None:
    """Begin at the user's first frame, without ours and Lightning's below; the causes too."""
    from_user = itertools.dropwhile(lambda frame: _is_others(frame.filename), told.stack)
    kept = [frame for frame in from_user if not _is_folded(frame.filename)]
    # Without a frame of the user's, those of other packages tell the most.
    kept = kept or [frame for frame in told.stack if not _is_folded(frame.filename)]
    if kept:
        told.stack = traceback.StackSummary.from_list(kept)
    for cause in (told.__cause__, told.__context__):
        if cause is not None:
            _fold(cause)


def _is_folded(file: str) -> bool:
    """Return whether a frame is ours, Lightning's or the importer's: not the user's business."""
    return file.startswith((_HERE, "<frozen importlib")) or _is_lightning(file)


def _is_lightning(file: str) -> bool:
    packages = {"pytorch_lightning", "lightning_fabric", "lightning_utilities"}
    return not packages.isdisjoint(Path(file).parts)


def raised_in_lightning(error: BaseException) -> bool:
    """Return whether Lightning raised `error` of itself, not called by code of the user's."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return bool(files) and _is_lightning(files[-1]) and all(map(_is_others, files))


def user_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return `trace` up to the user's last frame: the one that a debugger opens in."""
    frames: list[tuple[FrameType, int, int]] = []
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lasti, trace.tb_lineno))
        trace = trace.tb_next
    while len(frames) > 1 and _is_others(frames[-1][0].f_code.co_filename):
        frames.pop()
    result: TracebackType | None = None
    for frame, instruction, line in reversed(frames):
        result = TracebackType(result, frame, instruction, line)
    return result


def place_of(error: BaseException) -> str | None:
    """Return where in the user's code `error` was raised; None if no such code took part."""
    frames = traceback.extract_tb(user_frames(error.__traceback__))
    if not frames or _is_others(frames[-1].filename):
        return None
    return f"{shown(Path(frames[-1].filename))}, line {frames[-1].lineno}"


def _is_others(file: str) -> bool:
    return _is_third_party(file) or _is_folded(file) or file.startswith("<")
