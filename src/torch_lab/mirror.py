"""A run's folder, mirrored to a task on a ClearML server, as far as the server has it not yet.

The folder is the truth: everything is read from it, while the run is trained or long after. What
has been sent is noted in the folder (`tracking.json`); who goes on, be it after a kill, begins
there. To send something again does no harm: the server keeps a scalar by its name and step, and how
far it has the console is asked for first.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from torch_lab.bootstrap import MARK
from torch_lab.errors import ServerError
from torch_lab.event_reader import Picture, Point, event_files, logged_in
from torch_lab.files import sha256_of, written_whole
from torch_lab.runs import Run
from torch_lab.server import Server, file_url
from torch_lab.task_record import described, parent_of, script_of

__all__ = ["STATE", "Mirror", "Progress", "Sent", "split_tag"]

STATE: Final = "resume"
"""The artifact from which a run goes on where its folder is not."""
_FILE: Final = "tracking.json"
_EVENTS_AT_ONCE: Final = 5_000
_CONSOLE_BYTES: Final = 50_000
_CONSOLE_MARK: Final = "console.log:"
"""The worker of a console event, before the byte of the file where it ends."""
_TRIES: Final = 3


@dataclass
class Progress:
    """What a task has of a run's folder."""

    server: str = ""
    task: str = ""
    files: dict[str, int] = field(default_factory=dict)
    """How many bytes of each event file."""
    console: int = 0
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    """By name: `id`, `sha256` and `uri`."""
    plots: dict[str, str] = field(default_factory=dict)
    """The sha256 of each."""
    artifacts: dict[str, str] = field(default_factory=dict)
    described: str = ""
    """The sha256 of what the task says of the run."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Where each metric was NaN or infinite first."""

    @classmethod
    def of(cls, folder: Path) -> Progress:
        """Return what is noted in a run's folder; nothing if it cannot be read."""
        try:
            found = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            known = {item.name for item in fields(cls)}
            return cls(**{key: value for key, value in found.items() if key in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls()

    def save(self, folder: Path) -> None:
        """Note it in a run's folder."""
        with written_whole(folder / _FILE) as file:
            # Copies, as another thread may add to them.
            values = {
                key: dict(value) if isinstance(value, dict) else value
                for key, value in vars(self).items()
            }
            file.write_text(json.dumps(values, indent=2), encoding="utf-8")


@dataclass
class Sent:
    """How much was sent."""

    scalars: int = 0
    console: int = 0
    """Bytes."""
    plots: int = 0
    models: int = 0
    records: int = 0
    """Edits of the task, and files beside it."""

    def __bool__(self) -> bool:
        return any(asdict(self).values())


class Mirror:
    """Sends what a run's folder has, and its task has not.

    Args:
        server: Where the task is.
        run: The run.
        task: The task's id.
        project: The name of the task's project.
        on_agent: Whether an agent runs it: that sends the console itself, and its machine may be
            gone tomorrow, so that what a checkpoint needs to go on elsewhere is sent with `last`.
    """

    def __init__(
        self, server: Server, run: Run, task: str, project: str, *, on_agent: bool = False
    ) -> None:
        self.server = server
        self.run = run
        self.task = task
        self.project = project
        self.on_agent = on_agent
        self.sent = Sent()
        self.progress = Progress.of(run.folder)
        self._lock = threading.Lock()
        self._console_is_known = False
        self._digests: dict[Path, tuple[tuple[int, int, int], str]] = {}
        if (self.progress.server, self.progress.task) != (server.address.api, task):
            self.progress = Progress(server=server.address.api, task=task)

    def save(self) -> None:
        """Note what was sent; a folder that cannot be written to costs nothing but that."""
        with self._lock, contextlib.suppress(OSError):
            self.progress.save(self.run.folder)

    def start_over(self, models: Mapping[str, str]) -> None:
        """Take nothing that was logged for sent, and of the checkpoints only what is there.

        Args:
            models: The sha256 of each on the server.
        """
        self.progress.files.clear()
        self.progress.plots.clear()
        for name, model in self.progress.models.items():
            if models.get(name) != model["sha256"]:
                model["sha256"] = ""
        self.save()

    def unsent(self) -> int:
        """Return how many bytes of checkpoints and logs the task has not."""
        progress, run = self.progress, self.run
        sidecars = [(name, run.sidecar(name) or {}) for name in run.checkpoint_names()]
        # The best may be the last, and is sent once then.
        sizes = {
            sidecar.get("sha256"): sidecar.get("size", 0)
            for name, sidecar in sidecars
            if name != "previous"
            and progress.models.get(name, {}).get("sha256") != sidecar.get("sha256")
        }
        logs = sum(
            path.stat().st_size - progress.files.get(name, 0)
            for name, path in event_files(run.metrics_folder)
        )
        return int(sum(sizes.values())) + logs

    # What is logged.

    def send_logged(self) -> bool:
        """Send the scalars, the console and the plots that are new; return whether any were.

        Raises:
            ServerError: The server refuses them, or does not answer; the rest goes next time.
        """
        before = asdict(self.sent)
        try:
            self._send_scalars()
            self._send_console()
            self._send_plots()
        finally:
            changed = asdict(self.sent) != before
            if changed:
                self.save()
        return changed

    def _send_scalars(self) -> None:
        for name, path in event_files(self.run.metrics_folder):
            # What is written meanwhile is for the next time, or this might never end. Who goes on
            # with a run cuts the files back.
            size = path.stat().st_size
            start = min(self.progress.files.get(name, 0), size)
            while start < size:
                logged = logged_in(self.run.metrics_folder, name, start)
                if logged.end == start:
                    break
                # Of the same step twice, such as the epoch's number, the server keeps the last.
                each = list({(point.tag, point.step): point for point in logged.points}.values())
                for first in range(0, len(each), _EVENTS_AT_ONCE):
                    self._send_points(each[first : first + _EVENTS_AT_ONCE])
                for picture in logged.pictures:
                    self._send_picture(picture)
                self.progress.files[name] = start = logged.end

    def _send_points(self, points: list[Point]) -> None:
        finite = [point for point in points if math.isfinite(point.value)]
        self.server.add_events([self._scalar(point) for point in finite])
        self.sent.scalars += len(finite)
        if len(finite) != len(points):
            self._tell_not_finite(point for point in points if not math.isfinite(point.value))

    def _scalar(self, point: Point) -> dict[str, Any]:
        metric, variant = split_tag(point.tag)
        return {
            "timestamp": point.time_ms,
            "type": "training_stats_scalar",
            "task": self.task,
            "iter": point.step,
            "metric": metric,
            "variant": variant,
            "value": point.value,
        }

    def _send_picture(self, picture: Picture) -> None:
        metric, variant = split_tag(picture.tag)
        url = self._url("images", f"{picture.tag}-{picture.step}.png")
        self.server.upload(io.BytesIO(picture.content), len(picture.content), url)
        event = {
            "timestamp": picture.time_ms,
            "type": "training_debug_image",
            "task": self.task,
            "iter": picture.step,
            "metric": metric,
            "variant": variant,
            "key": f"{picture.tag}-{picture.step}",
            "url": url,
        }
        self.server.add_events([event])
        self.sent.plots += 1

    def _tell_not_finite(self, points: Iterator[Point]) -> None:
        """Tag the task, and say where: the server would keep such a value as 0."""
        new = [point for point in points if point.tag not in self.progress.not_finite]
        first: dict[str, Point] = {}
        for point in new:
            first.setdefault(point.tag, point)
        if not first:
            return
        words = [f"{tag} is {point.value} at step {point.step}" for tag, point in first.items()]
        text = f"not sent: {'; '.join(words)}\n"
        self.server.add_events([self._log_event(text, "nan", next(iter(first.values())).time_ms)])
        tags = self.server.task(self.task).get("tags") or []
        if "nan" not in tags:
            self.server.call("tasks.edit", task=self.task, force=True, tags=[*tags, "nan"])
        self.progress.not_finite |= {tag: point.step for tag, point in first.items()}

    def _log_event(self, text: str, worker: str, time_ms: int) -> dict[str, Any]:
        return {
            "timestamp": time_ms,
            "type": "log",
            "task": self.task,
            "level": "info",
            "worker": worker,
            "msg": text,
        }

    def _send_console(self) -> None:
        if self.on_agent:
            with contextlib.suppress(OSError):  # The agent sends it; a later sync must not again.
                self.progress.console = self.run.console_log.stat().st_size
            return
        self._find_console()
        try:
            with self.run.console_log.open("rb") as file:
                file.seek(self.progress.console)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data if self.run.record.ended else data[: data.rfind(b"\n") + 1]
        for piece in _pieces(whole):
            end = self.progress.console + len(piece)
            text = piece.decode(errors="replace")
            now = int(time.time() * 1000)
            self.server.add_events([self._log_event(text, f"{_CONSOLE_MARK}{end}", now)])
            self.progress.console = end
            self.sent.console += len(piece)

    def _find_console(self) -> None:
        """Ask how far the server has the console: it would keep twice what it is sent twice."""
        if self._console_is_known:
            return
        told = self.server.call(
            "events.get_task_log", task=self.task, batch_size=100, navigate_earlier=True
        )
        marks = (str(event.get("worker", "")) for event in told.get("events", []))
        ends = [
            int(mark.removeprefix(_CONSOLE_MARK))
            for mark in marks
            if mark.startswith(_CONSOLE_MARK)
        ]
        self.progress.console = max([self.progress.console, *ends])
        self._console_is_known = True

    def _send_plots(self) -> None:
        for path in sorted(self.run.plots_folder.glob("*.png")):
            try:
                digest = self._digest(path)
            except OSError:  # It is being replaced.
                continue
            if self.progress.plots.get(path.name) == digest:
                continue
            url = self._url("plots", f"{path.stem}.{digest[:8]}.png")
            if not self._was_uploaded(path, digest, url):
                continue
            self.server.add_events([self._plot(path, url)])
            self.progress.plots[path.name] = digest
            self.sent.plots += 1

    def _digest(self, path: Path) -> str:
        """Return the sha256 of a file, which is read again only if it was replaced."""
        found = path.stat()
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
        if self._digests.get(path, (None, ""))[0] != stamp:
            self._digests[path] = (stamp, sha256_of(path))
        return self._digests[path][1]

    def _plot(self, path: Path, url: str) -> dict[str, Any]:
        name, _, epoch = path.stem.partition("-epoch_")
        metric, _, stage = name.rpartition("-")
        return {
            "timestamp": int(path.stat().st_mtime * 1000),
            "type": "plot",
            "task": self.task,
            "iter": int(epoch) if epoch.isdecimal() else 0,
            "metric": metric or name,
            "variant": stage or name,
            "plot_str": json.dumps(_image_plot(url, name)),
        }

    # Checkpoints.

    def send_checkpoints(self, server: Server | None = None) -> bool:
        """Upload checkpoints that are new, and remove those that are gone on disk.

        Args:
            server: Used for it instead of the mirror's own, from another thread.

        Returns:
            Whether anything was done.

        Raises:
            ServerError: A server does not answer, or refuses.
        """
        if not self.run.checkpoints_folder.is_dir():  # Of a disk that is away nothing is known.
            return False
        server = server or self.server
        names = self.run.checkpoint_names()
        changed = False
        for name in sorted(names - {"previous"}, key=lambda name: (name != "best", name)):
            changed |= self._send_checkpoint(server, name)
        for name in set(self.progress.models) - names:
            model = self.progress.models.pop(name)
            with contextlib.suppress(ServerError):  # Somebody may have removed it already.
                server.call("models.delete", model=model["id"], force=True)
            if not self._is_used(model["uri"]):
                server.remove(model["uri"])
            changed = True
        if changed:
            self.save()
        return changed

    def _send_checkpoint(self, server: Server, name: str) -> bool:
        for _ in range(_TRIES):
            sidecar = self.run.sidecar(name)
            known = self.progress.models.get(name, {})
            if sidecar is None or known.get("sha256") == sidecar["sha256"]:
                return False
            with contextlib.suppress(_ReplacedError, FileNotFoundError):
                url = self._uploaded(server, name, sidecar)
                if self.on_agent and name == "last":
                    self._send_state(server)
                self._register(server, name, sidecar, url)
                return True
        return False

    def _send_state(self, server: Server) -> None:
        """Send all of the run's folder but the checkpoints, for the run to go on elsewhere.

        The event files may have more than they had at the checkpoint: who goes on cuts them back.
        """
        url = self._url("artifacts", STATE, f"{STATE}.zip")
        with tempfile.TemporaryFile() as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(self.run.folder.rglob("*")):
                    if path.is_file() and path.suffix != ".ckpt" and path.name[:1] != ".":
                        archive.write(path, path.relative_to(self.run.folder).as_posix())
            size = file.tell()
            file.seek(0)
            digest = server.upload(file, size, url)
        server.add_artifact(self.task, STATE, url, size, digest)

    def _uploaded(self, server: Server, name: str, sidecar: Mapping[str, Any]) -> str:
        """Return where the file of a checkpoint is on the server, which has the best one once."""
        digest = str(sidecar["sha256"])
        for known in self.progress.models.values():
            if known["sha256"] == digest:
                return known["uri"]
        url = self._url("models", f"{name}.{digest[:16]}.ckpt")
        self._upload(server, self.run.checkpoint(name), digest, url)
        return url

    def _was_uploaded(self, path: Path, digest: str, url: str) -> bool:
        """Upload a file, and return whether it is still what it was."""
        try:
            self._upload(self.server, path, digest, url)
        except (_ReplacedError, FileNotFoundError):
            return False
        return True

    def _upload(self, server: Server, path: Path, digest: str, url: str) -> None:
        # What is open stays as it is, also when a newer one takes its name.
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise _ReplacedError
            size = file.tell()
            file.seek(0)
            if server.upload(file, size, url) != digest:
                raise _ReplacedError

    def _register(self, server: Server, name: str, sidecar: Mapping[str, Any], url: str) -> None:
        known = self.progress.models.get(name)
        if known is None:
            known = self._model_on_server(server, name)
        what = {
            "uri": url,
            "name": name,
            "framework": "PyTorch",
            "comment": f"{name} of {self.run.name}, step {sidecar.get('step')}",
        }
        if known is None:
            model = str(server.call("models.create", task=self.task, ready=False, **what)["id"])
        else:
            model = known["id"]
            server.call("models.edit", model=model, **what)
        server.call("models.add_or_update_metadata", model=model, metadata=_metadata(sidecar))
        server.call(
            "tasks.add_or_update_model", task=self.task, name=name, model=model, type="output"
        )
        self.progress.models[name] = {"id": model, "sha256": sidecar["sha256"], "uri": url}
        self.sent.models += 1
        self.save()
        if known and known["uri"] != url and not self._is_used(known["uri"]):
            server.remove(known["uri"])

    def _is_used(self, url: str) -> bool:
        return any(model["uri"] == url for model in self.progress.models.values())

    def _model_on_server(self, server: Server, name: str) -> dict[str, str] | None:
        """Return the model that a mirror made before it was killed, if it did."""
        task = server.task(self.task)
        for output in (task.get("models") or {}).get("output", []):
            if output.get("name") == name:
                found = server.call("models.get_by_id", model=output["model"])["model"]
                return {"id": found["id"], "uri": found.get("uri") or "", "sha256": ""}
        return None

    def _url(self, *parts: str) -> str:
        folder = f"{self.run.name}.{self.task}"
        return file_url(self.server.address.files, self.project, folder, *parts)

    # What the run is, and how it ended.

    def describe(self) -> bool:
        """Tell the task what the run is, if it does not say so yet; return whether it was told."""
        record = described(self.run, self._parent_model())
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        changed = self.progress.described != digest
        if changed:
            self._tell(record)
            if not self._has_queued_code():
                script = script_of(self.run)
                self.server.call("tasks.edit", task=self.task, force=True, script=script)
            self.progress.described = digest
            self.sent.records += 1
            self.save()
        return changed

    def _parent_model(self) -> str | None:
        """Return the id of the model that the run started from, if its parent's mirror knows it."""
        parent, told = parent_of(self.run), self.run.record.parent or {}
        models = Progress.of(parent.folder).models if parent else {}
        return models.get(str(told.get("checkpoint")), {}).get("id")

    def _has_queued_code(self) -> bool:
        """Return whether the task's script is that of a queued run, which may be queued again."""
        task = self.server.task(self.task)
        return MARK in str((task.get("script") or {}).get("diff") or "")

    def _tell(self, record: Mapping[str, Any]) -> None:
        """Set what is ours of a task, and leave what the user's code has connected to it."""
        of_task = {"task": self.task, "force": True}
        parameters = [each for part in record["hyperparams"].values() for each in part.values()]
        self.server.call(
            "tasks.edit_hyper_params",
            **of_task,
            hyperparams=parameters,
            replace_hyperparams="section",
        )
        objects = list(record["configuration"].values())
        self.server.call("tasks.edit_configuration", **of_task, configuration=objects)
        self.server.call("tasks.edit", **of_task, comment=record["comment"])

    def set_parent(self, parent: str) -> None:
        """Make another task the parent of this one, if it is not yet."""
        told = self.server.task(self.task)
        if told.get("parent") != parent:
            self.server.call("tasks.edit", task=self.task, force=True, parent=parent)
            self.sent.records += 1

    def send_artifacts(self) -> bool:
        """Send the files that are kept with the run, if they are new; return whether any were."""
        changed = False
        for path in (self.run.folder / "untracked.zip", self.run.folder / "run.json"):
            if not path.is_file() or (path.name == "run.json" and not self.run.record.ended):
                continue
            digest = self._digest(path)
            if self.progress.artifacts.get(path.stem) == digest:
                continue
            url = self._url("artifacts", path.stem, path.name)
            if not self._was_uploaded(path, digest, url):
                continue
            size = path.stat().st_size
            self.server.add_artifact(self.task, path.stem, url, size, digest)
            self.progress.artifacts[path.stem] = digest
            self.sent.records += 1
            self.save()
            changed = True
        return changed

    def end(self, server: Server | None = None) -> bool:
        """Set the task's state to the run's; return whether it was another.

        Args:
            server: Used for it instead of the mirror's own, from another thread.

        Raises:
            ServerError: The server refuses, or does not answer.
        """
        server = server or self.server
        record, state = self.run.record, self.run.state
        told = server.task(self.task)
        status = _STATUS.get(state)
        if status is None or (
            told.get("status") == status and (told.get("status_message") or "") == _message(record)
        ):
            return False
        if told.get("status") in ("created", "queued"):
            server.call("tasks.started", task=self.task, force=True)
        reason = "its process ended without a word" if state == "lost" else _reason(record)
        endpoint = f"tasks.{status}"
        server.call(
            endpoint,
            task=self.task,
            force=True,
            status_reason=reason,
            status_message=_message(record),
        )
        self.sent.records += 1
        return True


_STATUS: Final = {
    "completed": "completed",
    "failed": "failed",
    "stopped": "stopped",
    "lost": "stopped",
}


class _ReplacedError(Exception):
    """A file became another one while it was read."""


def _reason(record: Any) -> str:
    return str(record.reason or record.state).partition(":")[0]


def _message(record: Any) -> str:
    return record.reason or ""


def _pieces(data: bytes) -> Iterator[bytes]:
    """Yield `data` in pieces that end with a line, as far as lines are not too long."""
    while data:
        cut = data.rfind(b"\n", 0, _CONSOLE_BYTES) + 1 if len(data) > _CONSOLE_BYTES else 0
        piece = data[: cut or _CONSOLE_BYTES]
        yield piece
        data = data[len(piece) :]


def _metadata(sidecar: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what a sidecar says as the metadata of a model."""
    values = {key: sidecar[key] for key in ("step", "epoch", "sha256", "size") if key in sidecar}
    values |= sidecar.get("metrics") or {}
    return [
        {"key": key, "type": type(value).__name__, "value": str(value)}
        for key, value in values.items()
    ]


def _image_plot(url: str, title: str) -> dict[str, Any]:
    """Return a plot that shows the image at `url`."""
    width, height = 640, 480
    image = {
        "source": url,
        "xref": "x",
        "yref": "y",
        "x": 0,
        "y": height,
        "sizex": width,
        "sizey": height,
        "sizing": "contain",
        "layer": "below",
        "opacity": 1.0,
    }
    layout = {
        "images": [image],
        "title": title,
        "xaxis": {"visible": False, "range": [0, width]},
        "yaxis": {"visible": False, "range": [0, height], "scaleanchor": "x"},
        "margin": {"l": 0, "r": 0, "t": 64, "b": 0},
        "showlegend": False,
    }
    return {"data": [], "layout": layout}


def split_tag(tag: str) -> tuple[str, str]:
    """Return the graph and the line in it that a logged name becomes: `loss/train` two parts."""
    metric, _, variant = tag.partition("/")
    return metric, variant or metric
