"""The processes that make batches: they end with their parent, and their failures are explained."""

from __future__ import annotations

import ctypes
import itertools
import logging
import multiprocessing
import os
import re
import signal
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import (
    _MultiProcessingDataLoaderIter,
    _SingleProcessDataLoaderIter,
)

from torch_lab.errors import LoaderError, listed
from torch_lab.iterables import Envelope
from torch_lab.samplers import Order

__all__ = [
    "UNALIKE",
    "Desk",
    "IteratorMaker",
    "Pace",
    "Watch",
    "WorkerStart",
    "die_with_parent",
    "explained",
]

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
_SECONDS_BETWEEN_LOOKS: Final = 1.0
_SECONDS_BETWEEN_CHECKS: Final = 5.0
_NAMED_SAMPLES: Final = 8
_DEAD: Final = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) "
    r"(?:exited unexpectedly|is killed by signal: ([^.]+)\.)"
)
_CAUGHT: Final = "Caught LoaderError in DataLoader worker"
"""How torch begins the message of an error of ours that a worker has raised."""
UNALIKE: Final = "make them alike in a transform, or give the DataLoader a collate_fn"
"""How samples are mended that make no batch."""
_TIMED_OUT: Final = "DataLoader timed out after"
_MEASURED_STEPS: Final = 50
_SHARE_WORTH_TELLING: Final = 0.1
_TIMES_AS_FAST: Final = 8
"""By how much whole batches of images are made faster than samples of a `BaseDataset`."""


def die_with_parent() -> None:
    """Let this process be killed when the process that started it is gone, however that ended."""
    parent = os.getppid()
    started_by = multiprocessing.parent_process()
    # The kernel tells when the *thread* is gone that has started the process, so that must be one
    # that lasts as long as its process. A server may have started it on behalf of the parent.
    from_main_thread = threading.main_thread().name == "MainThread"
    is_child = started_by is None or started_by.pid == parent
    if from_main_thread and is_child and _kernel_kills_after_parent():
        # It does not if the parent was gone by then.
        if os.getppid() != parent:
            os._exit(1)
    else:
        threading.Thread(target=_die_after, args=(parent,), daemon=True).start()


def _kernel_kills_after_parent() -> bool:
    """Return whether the kernel will kill this process when its parent ends."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _die_after(parent: int) -> None:
    started_by = multiprocessing.parent_process()
    while os.getppid() == parent and (started_by is None or started_by.is_alive()):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


class WorkerStart:
    """What a worker does first, and then what the user has it do."""

    def __init__(self, given: Callable[[int], object] | None) -> None:
        self.given = given

    def __call__(self, worker: int) -> None:
        die_with_parent()
        # Ctrl-C, and a scheduler's signal to the group, are for the main process: it may need the
        # workers for the batch that it still finishes.
        with suppress(OSError):
            os.setpgid(0, 0)
        if self.given is not None:
            self.given(worker)


class Desk:
    """Where each worker puts down what it is making, in memory that the main process reads too.

    Args:
        workers: How many there are.
    """

    def __init__(self, workers: int) -> None:
        self.rows = torch.full((workers, 2), -1, dtype=torch.int64)
        if workers:
            self.rows.share_memory_()  # type: ignore[no-untyped-call]
        self._own: Any = None

    def take(self, batch: int) -> None:
        """Note that this worker begins with a batch."""
        if self._own is None and (info := get_worker_info()):
            # As an array: to set an item of a tensor takes twenty times as long.
            self._own = self.rows[info.id].numpy()
        if self._own is not None:
            self._own[:] = batch, -1

    def next_sample(self) -> None:
        """Note that it begins with the next sample of it."""
        if self._own is not None:
            self._own[1] += 1

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_own": None}


class Pace:
    """Finds out in the first steps what part of them goes into samples that are made one by one."""

    def __init__(self) -> None:
        self._times: list[tuple[float, float]] = []
        self.is_known = False

    def measured(self, make: Callable[[], Any]) -> Any:
        """Return the batch that `make` returns, and tell of the pace when there are enough."""
        began = time.perf_counter()
        batch = make()
        self._times.append((began, time.perf_counter()))
        if len(self._times) == _MEASURED_STEPS:
            self.is_known = True
            self._tell()
        return batch

    def _tell(self) -> None:
        waiting = statistics.median(end - began for began, end in self._times)
        starts = [began for began, _ in self._times]
        step = statistics.median(after - before for before, after in itertools.pairwise(starts))
        if waiting > _SHARE_WORTH_TELLING * step:
            log.info(
                "samples are made one by one, which is %.0f %% of a step (%.2f of %.2f ms, the "
                "median of %d): data in arrays, in a torch_lab.datasets.ArrayDataset, would make "
                "training about %.1f times as fast",
                *(100 * waiting / step, 1e3 * waiting, 1e3 * step, _MEASURED_STEPS),
                step / (step - waiting * (1 - 1 / _TIMES_AS_FAST)),
            )


class Watch:
    """What is known of a loader's iteration, to explain a failure by, or what it costs.

    Args:
        name: Of the loader.
        stage: What the loader is for: `train`, `validate` or `test`.
        order: What its indices come from.
        desk: Where its workers put down what they are making.
        pace: What measures the first batches, if they might be made faster.
    """

    def __init__(
        self, name: str, stage: str, order: Order, desk: Desk, pace: Pace | None = None
    ) -> None:
        self.name = name
        self.stage = stage
        self.desk = desk
        self.order = order
        self.pace = pace
        self.timed_out = False
        self.kills_before: int | None = None
        self.workers: list[Any] = []
        self.in_order = True

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"workers": []}

    def received(self, make: Callable[[], Any]) -> Any:
        """Return what `make` makes of the next batch of indices."""
        pace = self.pace
        return self.order.received(make() if pace is None or pace.is_known else pace.measured(make))

    def work_of(self, worker: int) -> str:
        """Return what a worker was doing, to end a sentence with."""
        number, place = self.desk.rows[worker].tolist()
        indices = dict(self.order.handed_out).get(number)
        if indices is None:
            return ""
        made = indices[place] if place >= 0 else indices
        return f" while it made {_named(made)} for batch {number}"

    def awaited(self) -> int | None:
        """Return which worker makes the batch that is waited for, if that can be told."""
        if not (self.in_order and self.workers and self.order.handed_out):
            return None
        return self.order.arrived % len(self.workers)


class IteratorMaker:
    """Makes a loader's iterators as torch does, but such that tell `watch` how it goes.

    It becomes an attribute of the loader, whose workers end when nobody has the loader any more:
    so it must not hold on to it.
    """

    def __init__(self, loader: DataLoader[Any], watch: Watch) -> None:
        self.loader = weakref.ref(loader)
        self.watch = watch

    def __call__(self) -> Any:
        loader = self.loader()
        assert loader is not None
        return (_InProcess if loader.num_workers == 0 else _InWorkers)(loader, self.watch)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.loader(), self.watch)


class _InProcess(_SingleProcessDataLoaderIter):
    def __init__(self, loader: DataLoader[Any], watch: Watch) -> None:
        self._watch = watch
        super().__init__(loader)

    def _next_data(self) -> Any:
        return self._watch.received(super()._next_data)


class _InWorkers(_MultiProcessingDataLoaderIter):
    """Notices at once when a worker is gone, and after the loader's `timeout` when one hangs.

    With a time limit, torch looks after the workers only when the limit is over.
    """

    def __init__(self, loader: DataLoader[Any], watch: Watch) -> None:
        self._watch = watch
        self._made_by = os.getpid()
        watch.kills_before = _kills_for_memory()
        watch.in_order = loader.in_order
        super().__init__(loader)

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        self._watch.workers = self._workers
        super()._reset(loader, first_iter)

    def __del__(self) -> None:
        # A worker has copies of other iterators, whose workers are not its own; and one that could
        # not be made has none.
        if os.getpid() == self._made_by and hasattr(self, "_shutdown"):
            super().__del__()

    def _next_data(self) -> Any:
        while True:
            data = super()._next_data()  # type: ignore[no-untyped-call]
            if not isinstance(data, Envelope) or data.report is not None:
                return self._watch.order.received(data)

    def _get_data(self) -> Any:
        limit = self._timeout or float("inf")
        until = time.monotonic() + limit
        while (left := until - time.monotonic()) > 0:
            found, data = self._try_get_data(min(left, _SECONDS_BETWEEN_CHECKS))  # type: ignore[no-untyped-call]
            if found:
                return data
            if self._pin_memory and not self._pin_memory_thread.is_alive():
                raise RuntimeError("Pin memory thread exited unexpectedly")
        self._watch.timed_out = True
        raise RuntimeError(f"{_TIMED_OUT} {limit:g} seconds")


def explained(error: BaseException, watches: Sequence[Watch]) -> LoaderError | None:
    """Return what happened to a worker, if that is what `error` comes from.

    Args:
        error: What iterating over a loader raised, or what was raised from it.
        watches: Those of all loaders that it may have been.
    """
    for each in _chain(error):
        if isinstance(each, LoaderError) and str(each).startswith(_CAUGHT):
            _, _, message = str(each).rpartition(f"{LoaderError.__name__}: ")
            return LoaderError(message.strip(), UNALIKE)
        if not isinstance(each, RuntimeError):
            continue
        if dead := _DEAD.search(str(each)):
            pids = [int(pid) for pid in dead[1].split(",")]
            return _death(pids, dead[2], watches)
        if _TIMED_OUT in str(each):
            return _delay(each, [watch for watch in watches if watch.timed_out])
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and what it comes from, the origin first."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__ or current.__context__
    return reversed(seen)


def _death(pids: list[int], reason: str | None, watches: Sequence[Watch]) -> LoaderError:
    for watch in watches:
        for number, worker in enumerate(watch.workers):
            if worker.pid in pids:
                how, memory = _how_it_ended(worker, reason), _memory_ran_out(watch)
                work = watch.work_of(number)
                cause = "; the kernel killed it, memory had run out" if memory else ""
                return LoaderError(
                    f"worker {number} of {watch.name} (pid {worker.pid}) {how}{work}{cause}",
                    _hint(how, memory),
                )
    numbers = ", ".join(map(str, pids))
    how = f"was killed ({reason})" if reason else "ended unexpectedly"
    return LoaderError(f"a worker of a DataLoader (pid {numbers}) {how}", _hint(how, False))


def _how_it_ended(worker: Any, reason: str | None) -> str:
    worker.join(timeout=1.0)
    code = worker.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code is not None:
        return f"ended with exit code {code}"
    return f"was killed ({reason})" if reason else "ended unexpectedly"


def _named(indices: Any) -> str:
    if not isinstance(indices, list | tuple):
        return f"sample {indices}"
    return f"samples {listed(indices, _NAMED_SAMPLES)}"


def _hint(how: str, memory: bool) -> str | None:
    if "SIGBUS" in how or "Bus error" in how:
        return "the shared memory, /dev/shm, may be full: give it more, or use fewer workers"
    if memory:
        return "fewer workers, a smaller prefetch_factor or smaller batches need less memory"
    if "SIGKILL" in how or "Killed" in how:
        return (
            "something killed it; a lack of memory is the usual cause"
            f" ({_available_memory()} available now)"
        )
    return None


def _delay(error: RuntimeError, watches: list[Watch]) -> LoaderError:
    seconds = str(error).partition(_TIMED_OUT)[2].removesuffix("seconds").strip()
    who, work = "a worker of a DataLoader", ""
    for watch in watches:
        worker = watch.awaited()
        who = (
            f"worker {worker} of {watch.name}" if worker is not None else f"workers of {watch.name}"
        )
        work = watch.work_of(worker) if worker is not None else ""
    return LoaderError(
        f"{who} gave no batch for {seconds} s (loader_timeout){work}",
        "if making a batch can take that long, set a higher loader_timeout",
    )


# Memory.


def _memory_ran_out(watch: Watch) -> bool:
    now = _kills_for_memory()
    return now is not None and watch.kills_before is not None and now > watch.kills_before


def _kills_for_memory() -> int | None:
    """Return how many processes of this container the kernel has killed for their memory."""
    for path in _event_files():
        with suppress(OSError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return None


def _event_files() -> Iterator[Path]:
    """Yield the files where the kernel counts such kills: of control groups, versions 2 and 1."""
    root = Path("/sys/fs/cgroup")
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield root / path.lstrip("/") / "memory.events"
            if "memory" in controllers.split(","):
                yield root / "memory" / path.lstrip("/") / "memory.oom_control"
    # In a container, its own group may be mounted at the root.
    yield root / "memory.events"
    yield root / "memory" / "memory.oom_control"


def _available_memory() -> str:
    import psutil

    return f"{psutil.virtual_memory().available / 2**30:.1f} GiB"
