"""Several runs from one command, each in a process of its own."""

from __future__ import annotations

import glob
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TextIO

from torch_lab.afresh import imported_afresh
from torch_lab.errors import CheckpointError, ExitCode, Interrupted, SomeRunsFailedError, UserError
from torch_lab.experiment import Experiment
from torch_lab.runs import Run, artifacts_folder, project_root
from torch_lab.signals import stopping_on_signals
from torch_lab.utils import shown

__all__ = ["Outcome", "check", "outcome_rows", "run_all"]

_STATES: dict[int, str] = {
    ExitCode.DONE: "completed",
    ExitCode.CODE_FAILED: "failed",
    ExitCode.USAGE: "not started",
    ExitCode.NON_FINITE: "failed: NaN or infinite loss",
    ExitCode.NO_TRACKING: "not started: no tracking",
    ExitCode.HANGUP: "stopped by SIGHUP",
    ExitCode.INTERRUPT: "stopped by SIGINT",
    ExitCode.TERMINATED: "stopped by SIGTERM",
    ExitCode.WARNED: "stopped by SIGUSR1",
    **{-each: f"killed by {each.name}" for each in signal.Signals},
}


@dataclass(frozen=True)
class Outcome:
    """How one of several runs ended."""

    script: Path
    exit_code: int
    """That of its process; minus the signal's number when a signal killed it."""
    seconds: float
    run: Run | None
    """None if it ended before there was one."""

    @property
    def state(self) -> str:
        """How it ended, in words."""
        return _STATES.get(self.exit_code, f"failed: exit code {self.exit_code}")


def run_all(
    paths: Sequence[Path],
    options: Sequence[str],
    *,
    jobs: int,
    devices: Sequence[str],
    set: Mapping[str, Any] | None = None,
    unset: Sequence[str] = (),
) -> list[Outcome]:
    """Train every path in a process of its own, and return how each ended, in the order given.

    With one job the children write to the terminal themselves. Side by side, what each writes to
    stdout is shown when it has ended, and what it writes to stderr if it failed.

    Args:
        paths: Hparams scripts; all are loaded first, so that a mistake in the last stops the first.
        options: Further words for `train`.
        jobs: How many run at the same time.
        devices: Indices of the GPUs to deal out, one for each job, among those that this process
            sees; none to leave the choice to Lightning.
        set: What the options set in place of the hparams of each script; see `Experiment.load`.
        unset: The keys that they remove.

    Raises:
        UserError: One of the paths or devices is wrong; none was started.
        Interrupted: A signal asked to end; the children were told, and have ended.
    """
    experiments = []
    for path in paths:
        # What one changes of a module that others import is its own business, as it is in its run.
        with imported_afresh(project_root(path.resolve())):
            experiments.append(Experiment.load(path, set, unset))
        experiments[-1].check_added_keys()
    dealt = [_visible(device) for device in devices]
    pool = _Children(options, quiet=jobs > 1, devices=dealt or [None] * jobs)
    with stopping_on_signals(), ThreadPoolExecutor(jobs) as executor:
        try:
            return list(executor.map(pool.run, experiments))
        except Interrupted as interrupted:
            executor.shutdown(wait=False, cancel_futures=True)
            pool.stop(interrupted.signum)
            raise


def _visible(device: str) -> str:
    """Return what CUDA calls the GPU at the index `device` of those that this process sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return device
    names = [name for name in seen.replace(" ", "").split(",") if name not in ("", "-1")]
    if int(device) >= len(names):
        raise UserError(
            f"--devices {device}: there is no such GPU in CUDA_VISIBLE_DEVICES={seen}",
            "indices count the GPUs listed there, from 0",
        )
    return names[int(device)]


def check(outcomes: Sequence[Outcome]) -> None:
    """Raise `SomeRunsFailedError` unless all completed."""
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    if failed:
        names = ", ".join(shown(outcome.script) for outcome in failed)
        raise SomeRunsFailedError(f"{len(failed)} of {len(outcomes)} runs failed: {names}")


def outcome_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Return the rows of the closing table: script, run, state, time, best score."""
    rows = []
    for outcome in outcomes:
        run = outcome.run
        best = (run and run.best) or {}
        score = f"{best['monitor']} {best['score']:.4g}" if best.get("score") is not None else ""
        seconds = f"{outcome.seconds:.1f} s"
        rows.append([shown(outcome.script), run.name if run else "", outcome.state, seconds, score])
    return rows


class _Children:
    """The processes that train, and the devices dealt out among them."""

    def __init__(
        self, options: Sequence[str], *, quiet: bool, devices: Sequence[str | None]
    ) -> None:
        self.options = options
        self.quiet = quiet
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False
        self.lock = threading.Lock()
        self.devices: SimpleQueue[str | None] = SimpleQueue()
        for device in devices:
            self.devices.put(device)

    def run(self, experiment: Experiment) -> Outcome:
        device = self.devices.get()
        try:
            return self._run(experiment, device)
        finally:
            self.devices.put(device)

    def _run(self, experiment: Experiment, device: str | None) -> Outcome:
        started = datetime.now(UTC)
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            child = self._start(experiment.script, device, stdout, stderr)
            exit_code = child.wait()
            self.running.discard(child)
            if exit_code:
                _show(stderr, sys.stderr)
            _show(stdout, sys.stdout)
        seconds = (datetime.now(UTC) - started).total_seconds()
        run = _run_of(experiment, child.pid, started)
        return Outcome(experiment.script, exit_code, seconds, run)

    def _start(
        self, script: Path, device: str | None, stdout: IO[bytes], stderr: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        seen = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        with self.lock:
            if self.stopping:
                raise CancelledError
            print(f"{shown(script)} starts", file=sys.stderr)
            child = subprocess.Popen(
                [sys.executable, "-m", "torch_lab", "train", *self.options, str(script)],
                env={**os.environ, **seen},
                # Ctrl-C signals the terminal's whole group: in a group of its own, a child is told
                # by `stop` alone, and not a second time. Such a group cannot read the terminal.
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=stdout if self.quiet else None,
                stderr=stderr if self.quiet else None,
            )
            self.running.add(child)
        return child

    def stop(self, signum: int) -> None:
        """Start no more children, tell those there are, and wait; a second signal kills them."""
        with self.lock:
            self.stopping = True
            children = list(self.running)
        try:
            with stopping_on_signals(quiet=True):
                for child in children:
                    child.send_signal(signum)
                for child in children:
                    child.wait()
        finally:
            for child in children:
                _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End `child` and its own children, if it is still there."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _show(written: IO[bytes], stream: TextIO) -> None:
    written.seek(0)
    stream.write(written.read().decode(errors="replace"))
    stream.flush()


def _run_of(experiment: Experiment, pid: int, since: datetime) -> Run | None:
    """Return the run that a process of this machine has recorded since it was started, if any."""
    folders = f"{glob.escape(experiment.base_name)}-v*"
    for folder in artifacts_folder(experiment.root).glob(folders):
        with suppress(CheckpointError):
            run = Run.read(folder)
            own = (run.record.pid, run.record.host) == (pid, socket.gethostname())
            if own and datetime.fromisoformat(run.record.started) >= since:
                return run
    return None
