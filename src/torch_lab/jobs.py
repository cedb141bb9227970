"""Several runs from one command, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch_lab.errors import ExitCode, Interrupted, SomeRunsFailedError
from torch_lab.experiment import Experiment
from torch_lab.signals import signals_as_exceptions
from torch_lab.utils import shown

__all__ = ["Outcome", "check", "outcome_rows", "run_all"]

_STATES: dict[int, str] = {
    ExitCode.DONE: "completed",
    ExitCode.CODE_FAILED: "failed",
    ExitCode.USAGE: "not started",
    ExitCode.NON_FINITE: "failed: NaN or infinite loss",
}
_GRACE = 10.0
"""Seconds that a child has to end after a signal."""


@dataclass(frozen=True)
class Outcome:
    """How one of several runs ended."""

    path: Path
    exit_code: int
    seconds: float
    record: dict[str, Any] = field(default_factory=dict)
    """The closing record; empty when the run did not complete."""

    @property
    def state(self) -> str:
        """How it ended, in words."""
        return _STATES.get(self.exit_code, "stopped")


def run_all(
    paths: Sequence[Path], options: Sequence[str], *, jobs: int, devices: Sequence[str]
) -> list[Outcome]:
    """Train every path in a process of its own, and return how each ended, in the order given.

    With one job the children use the terminal themselves; side by side, each one's output is
    shown when it has ended.

    Args:
        paths: Hparams scripts; all are loaded first, so that a mistake in the last stops the first.
        options: Further words for `train`.
        jobs: How many run at the same time.
        devices: GPU indices to deal out, one for each job; none to leave the choice to Lightning.

    Raises:
        UserError: One of the paths is wrong; none was started.
        Interrupted: A signal asked to end; the children were told, and have ended.
    """
    for path in paths:
        Experiment.load(path)
    pool = _Children(options, quiet=jobs > 1, devices=devices or [""] * jobs)
    with signals_as_exceptions(), ThreadPoolExecutor(jobs) as executor:
        futures = [executor.submit(pool.run, path) for path in paths]
        try:
            return [future.result() for future in futures]
        except Interrupted as interrupted:
            executor.shutdown(wait=False, cancel_futures=True)
            pool.stop(interrupted.signum)
            raise


def check(outcomes: Sequence[Outcome]) -> None:
    """Raise `SomeRunsFailedError` unless all completed."""
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    if failed:
        names = ", ".join(shown(outcome.path) for outcome in failed)
        raise SomeRunsFailedError(f"{len(failed)} of {len(outcomes)} runs failed: {names}")


def outcome_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Return the rows of the closing table: script, run, state, time, best score."""
    rows = []
    for outcome in outcomes:
        best = outcome.record.get("best") or {}
        score = f"{best['monitor']} {best['score']:.4g}" if best.get("score") is not None else ""
        name = outcome.record.get("run", "")
        rows.append([shown(outcome.path), name, outcome.state, f"{outcome.seconds:.1f} s", score])
    return rows


class _Children:
    """The processes that train, and the devices dealt out among them."""

    def __init__(self, options: Sequence[str], *, quiet: bool, devices: Sequence[str]) -> None:
        self.options = options
        self.quiet = quiet
        self.running: set[subprocess.Popen[bytes]] = set()
        self.devices: SimpleQueue[str] = SimpleQueue()
        for device in devices:
            self.devices.put(device)

    def run(self, path: Path) -> Outcome:
        device = self.devices.get()
        try:
            with tempfile.TemporaryDirectory(prefix="torch_lab-") as folder:
                return self._run(path, device, Path(folder))
        finally:
            self.devices.put(device)

    def _run(self, path: Path, device: str, folder: Path) -> Outcome:
        started = time.monotonic()
        record = folder / "record.json"
        words = ["train", str(path), *self.options, "--record", str(record)]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
        with (folder / "stdout").open("wb+") as stdout, (folder / "stderr").open("wb+") as stderr:
            print(f"{shown(path)} starts", file=sys.stderr)
            child = subprocess.Popen(
                [sys.executable, "-m", "torch_lab", *words],
                env=environment,
                stdout=stdout if self.quiet else None,
                stderr=stderr if self.quiet else None,
            )
            self.running.add(child)
            exit_code = child.wait()
            self.running.discard(child)
        if exit_code and self.quiet:
            sys.stderr.write((folder / "stderr").read_text(encoding="utf-8", errors="replace"))
        sys.stdout.write((folder / "stdout").read_text(encoding="utf-8", errors="replace"))
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        # A child that a signal killed has minus its number for a code.
        code = exit_code if exit_code >= 0 else 128 - exit_code
        return Outcome(path, code, time.monotonic() - started, found)

    def stop(self, signum: int) -> None:
        children = list(self.running)
        for child in children:
            child.send_signal(signum)
        deadline = time.monotonic() + _GRACE
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            child.kill()
