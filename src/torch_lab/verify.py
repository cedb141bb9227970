"""The proof of exact resume for an experiment: train it, kill it, go on, and compare.

Each training is a process of its own (`torch_lab.tracing`), with a folder of its own for its run
and its traces. Here nothing is loaded but what they have written down.
"""

from __future__ import annotations

import enum
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch_lab.errors import UnbrokenRunError, UserError
from torch_lab.experiment import Experiment
from torch_lab.runs import Run
from torch_lab.signals import stopping_on_signals
from torch_lab.utils import shown

__all__ = [
    "TITLES",
    "Difference",
    "Hook",
    "KillPoint",
    "Kind",
    "Outcome",
    "Report",
    "Trial",
    "Verification",
    "chosen",
    "differences",
    "reached",
]

TITLES = ("killed at", "resumed from", "result")
_MOST_STEPS = 200
_REASON = re.compile(r"if this run is interrupted, it cannot go on exactly: (.*)")


class Hook(enum.StrEnum):
    """Where in a training its process is killed."""

    BATCH_START = "batch-start"
    OPTIMIZER = "optimizer"
    BATCH_END = "batch-end"
    VALIDATION = "validation"
    EPOCH_END = "epoch-end"


_PLACES = {
    Hook.BATCH_START: "start of the batch",
    Hook.OPTIMIZER: "before the optimizer's step",
    Hook.BATCH_END: "end of the batch",
    Hook.VALIDATION: "in the validation after it",
    Hook.EPOCH_END: "end of the epoch",
}


@dataclass(frozen=True)
class KillPoint:
    """The first call of a hook in a step, or in a later one."""

    step: int
    """Counted from 1; a validation and the end of an epoch belong to the step before them."""
    hook: Hook = Hook.BATCH_END

    @classmethod
    def parse(cls, text: str) -> KillPoint:
        """Return what `7` or `7:validation` means.

        Raises:
            UserError: It means nothing.
        """
        step, _, hook = text.partition(":")
        if not step.isdecimal() or int(step) < 1 or hook not in ("", *Hook):
            raise UserError(
                f"--kill-at {text}: expected a step from 1 on, with or without a place, like "
                "7:validation",
                f"the places are {', '.join(Hook)}",
            )
        return cls(int(step), Hook(hook or Hook.BATCH_END))

    def __str__(self) -> str:
        return f"{self.step}" if self.hook == Hook.BATCH_END else f"{self.step}:{self.hook}"

    @property
    def words(self) -> str:
        """What a person reads."""
        return f"step {self.step}, {_PLACES[self.hook]}"


# What is compared.


class Kind(enum.IntEnum):
    """What differs; in the order in which it comes about in a step."""

    INPUTS = 0
    RATE = 1
    LOSS = 2
    WEIGHTS = 3
    STEPS = 4
    LOGGED = 5
    STATE = 6
    """Weights, optimizers and schedulers in the last checkpoint."""
    OTHERS = 7
    """What callbacks and the user's own hooks have put there."""


_FIELDS = {Kind.INPUTS: "inputs", Kind.RATE: "rates", Kind.LOSS: "loss", Kind.WEIGHTS: "weights"}
_TRAINED = (
    "state_dict",
    "torch_lab_state_dict",
    "optimizer_states",
    "lr_schedulers",
    "global_step",
)


@dataclass(frozen=True, order=True)
class Difference:
    """Something that is not the same in two trainings; the smallest is the first."""

    step: float
    """Counted from 1; infinite for the last checkpoint."""
    kind: Kind
    name: str = ""
    """Which of its kind."""
    detail: str = ""

    def __str__(self) -> str:
        name, detail = (f" {part}" if part else "" for part in (self.name, self.detail))
        match self.kind:
            case Kind.LOGGED:
                return f"logged{name}{detail}"
            case Kind.STATE | Kind.OTHERS:
                return f"last checkpoint:{name}{detail}"
            case Kind.STEPS:
                return f"step {self.step}{name}{detail}"
        return f"step {self.step}: {_FIELDS[self.kind]}{name}{detail}"


@dataclass(frozen=True)
class Outcome:
    """What a training wrote down."""

    trace: Mapping[int, Sequence[Mapping[str, Any]]]
    """For each rank the lines of its batches; those made twice are there twice."""
    hooks: Sequence[KillPoint] = ()
    """The hooks that an unbroken training of rank 0 went through."""
    scalars: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """Steps and values by tag."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What is in the last checkpoint, by dotted paths."""

    @classmethod
    def read(cls, trace: Path) -> Outcome:
        """Return what was written to the files of `trace`."""
        ranks = {
            int(path.suffix[1:]): [json.loads(line) for line in path.read_text().splitlines()]
            for path in trace.parent.glob(f"{trace.name}.*")
            if path.suffix[1:].isdecimal()
        }
        batches = {rank: [e for e in ranks[rank] if "inputs" in e] for rank in sorted(ranks)}
        hooks = [KillPoint(e["step"], Hook(e["hook"])) for e in ranks.get(0, []) if "hook" in e]
        file = trace.with_name(f"{trace.name}.outcome")
        rest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return cls(batches, list(dict.fromkeys(hooks)), **rest)

    @property
    def steps(self) -> list[int]:
        """The number of the step of each batch."""
        return [line["step"] for line in self.trace.get(0, ())]

    def epoch_start(self, step: int) -> int:
        """Return the first step of the epoch that `step` is in."""
        lines = self.trace[0]
        epoch = next(line["epoch"] for line in reversed(lines) if line["step"] <= step)
        return int(next(line["step"] for line in lines if line["epoch"] == epoch))


def differences(expected: Outcome, found: Outcome) -> list[Difference]:
    """Return in what two trainings differ, the first in time first."""
    ranks = expected.trace.keys() | found.trace.keys()
    pairs = ((rank, expected.trace.get(rank, ()), found.trace.get(rank, ())) for rank in ranks)
    of_traces = itertools.chain.from_iterable(itertools.starmap(_in_traces, pairs))
    logged, state = _in_scalars(expected, found), _in_state(expected.state, found.state)
    return sorted([*of_traces, *logged, *state])


def _in_traces(
    rank: int, expected: Iterable[Mapping[str, Any]], found: Iterable[Mapping[str, Any]]
) -> Iterator[Difference]:
    on_rank = f"on rank {rank} " if rank else ""
    lines = {(line["epoch"], line["batch"]): line for line in expected}
    made = set()
    for line in found:
        key = (line["epoch"], line["batch"])
        made.add(key)
        if key in lines:
            yield from _in_lines(on_rank, lines[key], line)
        else:
            yield Difference(line["step"], Kind.STEPS, detail=f"{on_rank}was not to be made")
    for key in lines.keys() - made:
        yield Difference(lines[key]["step"], Kind.STEPS, detail=f"{on_rank}was not made")


def _in_lines(
    on_rank: str, expected: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[Difference]:
    for kind, entry in _FIELDS.items():
        one, other = expected[entry], found[entry]
        for name in dict.fromkeys([*one, *other]):
            before, now = one.get(name), other.get(name)
            if not _same(before, now):
                detail = f"{on_rank}{_change(before, now)}".strip()
                yield Difference(expected["step"], kind, name, detail)


def _in_scalars(expected: Outcome, found: Outcome) -> Iterator[Difference]:
    for tag in expected.scalars.keys() | found.scalars.keys():
        pairs = itertools.zip_longest(expected.scalars.get(tag, ()), found.scalars.get(tag, ()))
        for one, other in pairs:
            if not _same(one, other):
                detail = f"{_point(other)} instead of {_point(one)}"
                # Logged with the number of the batch's step, counted from 0.
                yield Difference((one or other)[0] + 1, Kind.LOGGED, tag, detail)
                break


def _point(value: Sequence[float] | None) -> str:
    return "nothing" if value is None else f"{value[1]:.9g} at step {value[0]:g}"


def _in_state(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    for path in expected.keys() | found.keys():
        one, other = expected.get(path), found.get(path)
        if not _same(one, other) or (path in expected) != (path in found):
            kind = Kind.STATE if path.startswith(_TRAINED) else Kind.OTHERS
            yield Difference(math.inf, kind, path, _change(one, other))


def _same(one: Any, other: Any) -> bool:
    # A NaN is not equal to itself.
    return repr(one) == repr(other)


def _change(before: Any, now: Any) -> str:
    """Say how numbers differ; of digests there is nothing to say."""
    if not all(isinstance(value, (int, float)) for value in (before, now)):
        return ""
    short = f"{now:.9g}", f"{before:.9g}"
    one, other = short if short[0] != short[1] else (repr(now), repr(before))
    return f"{one} instead of {other}"


# Causes.


def _why_not_repeatable(found: Sequence[Difference]) -> str:
    """Return the likely cause for that two unbroken runs differ."""
    # What is logged may be of the clock, and is no cause of anything.
    first = next((each for each in found if each.kind < Kind.LOGGED), found[0])
    told = f"the experiment is not repeatable: two unbroken runs differ too ({first})\n"
    if first.kind == Kind.INPUTS:
        return told + (
            "likely a generator that is seeded from the clock or the system (random.Random(),\n"
            "numpy.random.default_rng(), os.urandom), the order of a set, or what worker\n"
            "processes share; the generators of random, numpy.random and torch are seeded"
        )
    if first.kind < Kind.LOGGED:
        return told + (
            "their inputs are the same: likely a kernel that is not deterministic\n"
            "(trainer.init.deterministic = True), or a generator of the model's own"
        )
    return told + (
        "their training is the same: likely the validation's data is drawn from a generator of\n"
        "its own, or a callback has the time in its state"
    )


def _why_not_resumed(first: Difference, reasons: Sequence[str]) -> str:
    """Return the likely cause for that only resumed runs differ."""
    if first.kind in (Kind.INPUTS, Kind.STEPS):
        return "\n".join(reasons) or (
            "the data depends on what was done before: likely a dataset, a sampler or a transform\n"
            "that holds a generator or a counter of its own, which no checkpoint holds\n"
            "draw from random, numpy.random or torch, which are seeded for each sample"
        )
    if first.kind == Kind.LOGGED:
        return (
            "training is the same up to there: likely the module or a callback keeps values of\n"
            "an epoch by itself (use self.log and torchmetrics, or give the module the methods\n"
            "epoch_state_dict and load_epoch_state_dict); or, if it is of a validation, its data\n"
            "holds a generator of its own"
        )
    if first.kind == Kind.OTHERS:
        return "likely state of a callback that load_state_dict does not set back"
    return (
        "the inputs are the same: likely the module or a callback has state that no checkpoint\n"
        "holds; make it a buffer (register_buffer), or return it from state_dict"
    )


# The trainings.


@dataclass(frozen=True)
class Trial:
    """A training that was killed and resumed."""

    kill: KillPoint
    resumed_from: int | None = None
    """The step of the checkpoint; None for the start of the run."""
    found: Outcome | None = None
    """None if it did not come to its end."""
    failure: str = ""
    """Why."""


@dataclass(frozen=True)
class _Training:
    """A training in a folder of its own, by one process or by several in turn."""

    script: Path
    folder: Path
    words: Sequence[str]

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    @property
    def outcome(self) -> Outcome:
        return Outcome.read(self.folder / "trace")

    @property
    def run(self) -> Run:
        (folder,) = (self.folder / "artifacts").iterdir()
        return Run.read(folder)

    @property
    def was_killed(self) -> bool:
        trace = self.folder / "trace.0"
        return trace.is_file() and '{"killed"' in trace.read_text()

    def go(self, *words: str) -> int:
        """Train in a process of its own; return how it ended, with all that it had started."""
        self.folder.mkdir(exist_ok=True)
        paths = ("--artifacts", self.folder / "artifacts", "--trace", self.folder / "trace")
        command = [sys.executable, "-m", "torch_lab", "trace", self.script, *self.words, *paths]
        with self.output.open("ab") as output, stopping_on_signals() as stop:
            stop.deferred = True  # What is being started could not be ended yet.
            child = subprocess.Popen(
                [str(word) for word in (*command, *words)],
                # So that what it starts can be ended with it. Ctrl-C reaches this process alone.
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            try:
                stop.deferred = False
                stop.answer()
                return child.wait()
            finally:
                with suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def reasons(self) -> list[str]:
        """Return why a resume may not be exact, as the training itself warned."""
        return list(dict.fromkeys(_REASON.findall(self.output.read_text(errors="replace"))))

    def last_words(self) -> str:
        """Return the line that says what went wrong."""
        lines = self.output.read_text(errors="replace").strip().splitlines()
        errors = (
            line for line in reversed(lines) if re.match(r"error: |\w*(Error|Exception)\b", line)
        )
        return next(errors, lines[-1] if lines else "it said nothing")


@dataclass(frozen=True)
class Report:
    """What came out of a verification."""

    script: Path
    expected: Outcome
    limit: int
    """After how many steps training was to end."""
    trials: Sequence[Trial]
    again: Outcome | None = None
    """Of a second unbroken run, if something differs."""
    reasons: Sequence[str] = ()
    """Why torch_lab itself holds that the run may not go on exactly."""
    folder: Path | None = None
    """What is left to look at."""

    @property
    def is_exact(self) -> bool:
        """Whether all of the resumed runs were the same as the unbroken one."""
        return not any(map(self.problem, self.trials))

    def problem(self, trial: Trial) -> Difference | str | None:
        """Return what is wrong with a trial: the first difference, or why it did not end."""
        if trial.found is None:
            return trial.failure
        found = differences(self.expected, trial.found)
        return next((each for each in found if each.name not in self.not_compared), None)

    @property
    def _differs_again(self) -> list[Difference]:
        """In what the unbroken runs differ from each other."""
        return [] if self.again is None else differences(self.expected, self.again)

    @property
    def not_compared(self) -> list[str]:
        """What is logged and differs between unbroken runs, if nothing else does: times, maybe."""
        found = self._differs_again
        only_logged = all(each.kind == Kind.LOGGED for each in found)
        return sorted({each.name for each in found}) if only_logged else []

    def causes(self) -> list[str]:
        """Return why something differs, as far as that can be told."""
        firsts = [each for each in map(self.problem, self.trials) if isinstance(each, Difference)]
        if firsts and self._differs_again and not self.not_compared:
            return [_why_not_repeatable(self._differs_again)]
        return list(dict.fromkeys(_why_not_resumed(first, self.reasons) for first in firsts))

    @property
    def is_whole(self) -> bool:
        """Whether the experiment would make no more steps."""
        steps = self.expected.steps
        done = self.expected.state.get("global_step", steps[-1])
        return bool(done - steps[0] + 1 < self.limit)

    def table(self) -> Iterator[tuple[str, str, str]]:
        """Yield the rows below `TITLES`."""
        for trial in self.trials:
            step = trial.resumed_from
            start = "" if trial.found is None and step is None else "its start"
            at = start if step is None else f"step {step}"
            yield trial.kill.words, at, str(self.problem(trial) or "equal")

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield what is to be said below the table."""
        steps = self.expected.steps
        epochs = len({line["epoch"] for line in self.expected.trace[0]})
        what = "the whole run" if self.is_whole else "the start of the run; --steps N for more"
        yield "trained", f"steps {steps[0]} to {steps[-1]} in {_count(epochs, 'epoch')}: {what}"
        if not any(point.hook == Hook.EPOCH_END for point in self.expected.hooks):
            yield "", "no epoch ends within them: what is done at its end was not compared"
        bad = [trial for trial in self.trials if self.problem(trial)]
        exact = "exact: each ended with the same bits as the unbroken one"
        count = f"{len(bad)} of {_count(len(self.trials), 'resumed run')}"
        yield "result", f"not exact: {count} differ{'s' * (len(bad) == 1)}" if bad else exact
        for cause in self.causes():
            yield "cause", cause
        if not bad and self.reasons:
            yield "but", "\n".join(self.reasons)
        if self.not_compared:
            names = ", ".join(self.not_compared)
            yield "not compared", f"{names}\n(unbroken runs differ in it, and in nothing else)"
        if bad:
            kills = " ".join(f"--kill-at {trial.kill}" for trial in bad)
            script = shown(self.script)
            yield "again", f"torch-lab verify-resume {script} --steps {self.limit} {kills}"
        if self.folder is not None:
            yield "folder", str(self.folder)

    def record(self) -> dict[str, Any]:
        """Return all of it for a program."""
        return {
            "script": str(self.script),
            "exact": self.is_exact,
            "steps": [self.expected.steps[0], self.expected.steps[-1]],
            "whole": self.is_whole,
            "trials": [self._record_of(trial) for trial in self.trials],
            "causes": self.causes(),
            "reasons": list(self.reasons),
            "not_compared": self.not_compared,
            "folder": str(self.folder) if self.folder else None,
        }

    def _record_of(self, trial: Trial) -> dict[str, Any]:
        problem = self.problem(trial)
        known = isinstance(problem, Difference) and math.isfinite(problem.step)
        return {
            "killed_at": trial.kill.step,
            "in": trial.kill.hook,
            "resumed_from": trial.resumed_from,
            "equal": problem is None,
            "problem": str(problem) if problem else None,
            "differs_at": problem.step if known and isinstance(problem, Difference) else None,
        }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


@dataclass(frozen=True)
class Verification:
    """What is to be proved, and how.

    Args:
        path: The hparams script.
        kills: Where to kill.
        count: At how many more places, drawn at random.
        steps: After how many steps to end; enough for the kills if not given.
        trust: Whether checkpoints may hold code.
        keep: Whether to keep all that was written.
        say: Where a line goes that says what is being done.
    """

    path: Path
    kills: Sequence[KillPoint] = ()
    count: int = 0
    steps: int | None = None
    trust: bool = False
    keep: bool = False
    say: Callable[[str], None] = print

    def run(self) -> Report:
        """Train, kill, resume and compare.

        Raises:
            UserError: The script is wrong, or the run is never where it was to be killed.
            UnbrokenRunError: The training fails without being killed; what it said was shown.
            Interrupted: A signal asked to end; no process is left.
        """
        experiment = Experiment.load(self.path)
        script = experiment.script
        late = [kill for kill in self.kills if self.steps and kill.step > self.steps]
        # Of a run that goes on from another one, the first step has a higher number.
        if late and experiment.hparams.checkpoint.checkpoint_task_id is None:
            raise UserError(f"--kill-at {late[0]} is after the end: --steps {self.steps}")
        with stopping_on_signals():
            folder = Path(tempfile.mkdtemp(prefix="torch-lab-verify-"))
            keeps = self.keep
            try:
                report = self._report(script, folder)
                keeps = keeps or not report.is_exact
            finally:
                if keeps:
                    self.say(f"the trainings are in {folder}")
                else:
                    shutil.rmtree(folder, ignore_errors=True)
            return replace(report, folder=folder if keeps else None)

    def _report(self, script: Path, folder: Path) -> Report:
        count = 1 + len(self.kills) + self.count
        self.say(f"1 of {count}: the unbroken run, {self._limit} steps at most")
        first = self._unbroken(script, folder / "unbroken")
        expected = first.outcome
        kills = self._kills(expected)
        trials = []
        for number, kill in enumerate(kills, 1):
            self.say(f"{number + 1} of {1 + len(kills)}: killed at {kill.words}, and resumed")
            trials.append(self._trial(script, folder / f"kill-{number}", expected, kill))
        report = Report(script, expected, self._limit, trials, reasons=first.reasons())
        if not any(isinstance(report.problem(trial), Difference) for trial in trials):
            return report
        self.say("something differs: the unbroken run again, to see whether it repeats")
        return replace(report, again=self._unbroken(script, folder / "again").outcome)

    @property
    def _limit(self) -> int:
        return self.steps or max([_MOST_STEPS, *(2 * kill.step for kill in self.kills)])

    def _training(self, script: Path, folder: Path, every: int | None) -> _Training:
        words = ["--steps", str(self._limit)]
        words += ["--every", str(every)] if every else []
        words += ["--trust-checkpoint"] if self.trust else []
        return _Training(script, folder, words)

    def _unbroken(self, script: Path, folder: Path) -> _Training:
        training = self._training(script, folder, every=None)
        if code := training.go():
            self.say(training.output.read_text(errors="replace").rstrip())
            raise UnbrokenRunError("the run fails without being killed: see above", code)
        if not training.outcome.steps:
            raise UserError(
                f"{shown(script)}: the run makes no step, so it cannot be killed in one"
            )
        return training

    def _kills(self, expected: Outcome) -> list[KillPoint]:
        """Return where to kill, in the order of the run."""
        given = [reached(kill, expected) for kill in self.kills]
        others = [point for point in expected.hooks if point not in given]
        wanted = {*given, *chosen(others, self.count, random.Random())}
        return [point for point in expected.hooks if point in wanted]

    def _trial(self, script: Path, folder: Path, expected: Outcome, kill: KillPoint) -> Trial:
        # So that it is killed well behind a checkpoint of the same epoch, if that is old enough.
        steps = kill.step - expected.epoch_start(kill.step) + 1
        training = self._training(script, folder, every=max(1, (steps + 1) // 2))
        code = training.go("--kill-at", str(kill))
        if training.was_killed:
            code = training.go("--resume", training.run.name)
        resumed = training.run.record.resumed if training.was_killed else []
        step = resumed[-1]["from_step"] if resumed else None
        if not training.was_killed and not code:
            return Trial(kill, step, failure="it ended before it could be killed")
        if code:
            return Trial(kill, step, failure=f"the run failed: {training.last_words()}")
        return Trial(kill, step, training.outcome)


def chosen(points: Iterable[KillPoint], count: int, chance: random.Random) -> list[KillPoint]:
    """Return `count` of `points`; hooks are all as likely, the first step is for want of others."""
    left = list(points)
    left = [point for point in left if point.step > left[0].step] or left
    found: list[KillPoint] = []
    while left and len(found) < count:
        hook = chance.choice(sorted({point.hook for point in left}))
        found.append(chance.choice([point for point in left if point.hook == hook]))
        left.remove(found[-1])
    return found


def reached(kill: KillPoint, expected: Outcome) -> KillPoint:
    """Return where an unbroken run is first at the hook of `kill`, in its step or a later one.

    Raises:
        UserError: It never is.
    """
    for point in expected.hooks:
        if point.hook == kill.hook and point.step >= kill.step:
            return point
    steps = expected.steps
    if kill.step > steps[-1]:
        raise UserError(f"--kill-at {kill}: the run has only {steps[-1]} steps")
    raise UserError(f"--kill-at {kill}: the run comes to no {kill.hook} from that step on")
