"""`torch-lab check`: all that can be known of a training before it is made.

Nothing heavy is imported for a look at scripts and keys; for a batch, `torch_lab.probe` is.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from torch_lab.afresh import imported_afresh
from torch_lab.console import Console, print_table
from torch_lab.errors import HparamsError, UserError, listed
from torch_lab.experiment import Experiment
from torch_lab.explaining import layer_warnings
from torch_lab.findings import Finding, Findings, Verdict
from torch_lab.importing import heavy_imports
from torch_lab.imports import parsed
from torch_lab.places import CONFIG_SCRIPT
from torch_lab.provenance import binds_hparams
from torch_lab.runs import project_root
from torch_lab.utils import shown

__all__ = ["Checked", "Report", "check"]

_TITLES: Final = ("check", "result", "what was found")
_TITLES_OF_SEVERAL: Final = ("script", "result", "first problem")
_ALWAYS: Final = (
    "config script",
    "components",
    "batch",
    "loss",
    "parameters",
    "checkpoints",
    "samples",
    "exact",
    "memory",
    "monitor",
)
"""What there is something to say of, unless what is before it is not ok."""
_NO_SCRIPTS_OF_HPARAMS: Final = (CONFIG_SCRIPT, "__init__.py")


@dataclass(frozen=True)
class Report:
    """What was found of one hparams script."""

    script: Path
    findings: Sequence[Finding]
    layers: Sequence[Path] = ()
    """The scripts that it is made of, itself included; none if it does not run."""

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong; there may be warnings."""
        return not self._with(Verdict.NOT_OK)

    @property
    def problems(self) -> list[Finding]:
        """What is wrong, and what may be."""
        return [*self._with(Verdict.NOT_OK), *self._with(Verdict.WARNING)]

    @property
    def result(self) -> str:
        """How it stands with the script, in words."""
        if not self.is_ok:
            return str(Verdict.NOT_OK)
        count = len(self._with(Verdict.WARNING))
        return f"ok, {count} warning{'s' * (count > 1)}" if count else str(Verdict.OK)

    def record(self) -> dict[str, Any]:
        """Return all of it for a program."""
        return {
            "script": str(self.script),
            "ok": self.is_ok,
            "checks": [finding.record() for finding in self.findings],
        }

    def table(self) -> Iterator[tuple[str, str, str]]:
        """Yield a row for each check."""
        for finding in self.findings:
            yield finding.check, str(finding.verdict), self._told(finding)

    def row(self) -> tuple[str, str, str]:
        """Return the row of the script among several."""
        first = next(iter(self.problems), None)
        told = "" if first is None else f"{first.check}: {self._told(first)}"
        return shown(self.script), self.result, told

    def details(self, *, in_table: int) -> Iterator[str]:
        """Yield the lines of the problems that the table has no room for.

        Args:
            in_table: Of how many problems it has a line.
        """
        for place, finding in enumerate(self.problems):
            if place >= in_table:
                yield f"{finding.check}: {self._told(finding)}"
            elif finding.details:
                yield f"{finding.check}:"
            yield from (f"  {line}" for line in finding.details.splitlines())

    def _told(self, finding: Finding) -> str:
        """Return what was found, without the script's name: that stands beside it."""
        own = re.escape(shown(self.script))
        in_line = re.sub(rf"^{own}:(\d+): ", r"line \1: ", finding.told)
        return re.sub(rf"^{own}: ", "", in_line).strip()

    def _with(self, verdict: Verdict) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict == verdict]


@dataclass(frozen=True)
class Checked:
    """What was found of all scripts."""

    reports: Sequence[Report]
    skipped: Sequence[Path]
    """What holds no hparams, and is none of a check's business."""

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong with any of them."""
        return all(report.is_ok for report in self.reports)

    def record(self) -> dict[str, Any]:
        """Return all of it for a program."""
        return {
            "ok": self.is_ok,
            "scripts": [report.record() for report in self.reports],
            "skipped": [str(path) for path in self.skipped],
        }

    def show(self, file: TextIO) -> None:
        """Print a table, and below it what it has no room for."""
        if len(self.reports) == 1:
            (report,) = self.reports
            print_table(_TITLES, report.table(), file)
            _print_details(report, len(report.problems), file)
        else:
            print_table(_TITLES_OF_SEVERAL, [report.row() for report in self.reports], file)
            for report in self.reports:
                _print_details(report, 1, file)
        if self.skipped:
            names = listed(map(shown, self.skipped))
            print(f"skipped, as they hold no hparams of an experiment: {names}", file=file)


def _print_details(report: Report, in_table: int, file: TextIO) -> None:
    if lines := list(report.details(in_table=in_table)):
        print(shown(report.script), *(f"  {line}" for line in lines), "", sep="\n", file=file)


def check(
    paths: Iterable[Path],
    *,
    batch: bool = True,
    tracking: str = "auto",
    trust_checkpoint: bool = False,
    set: Mapping[str, Any] | None = None,
    unset: Sequence[str] = (),
) -> Checked:
    """Check hparams scripts, and return what was found; no script stops the others.

    What the user's code prints goes to stderr.

    Args:
        paths: The scripts. Files among them that hold no hparams are left out, and so are those of
            which others are made, if no config script is beside them.
        batch: Whether to make the components, and pass a batch through them.
        tracking: `auto` to ask a ClearML server, if there is one, for checkpoints and datasets that
            are not here; `offline` to touch nothing of ClearML.
        trust_checkpoint: Read checkpoints that hold code, which can do anything that you can.
        set: Values for keys of all scripts, as `Experiment.load` takes them.
        unset: Keys to remove from all of them.

    Raises:
        UserError: There is no hparams script among `paths`.
        Interrupted: A signal asked to end.
    """
    given = list(dict.fromkeys(paths))
    skipped = [path for path in given if _holds_no_hparams(path)]
    scripts = [path for path in given if path not in skipped]
    if not scripts:
        raise UserError(
            f"there is no hparams script among: {listed(map(shown, given))}",
            "an hparams script assigns a dictionary to the name hparams",
        )
    look = functools.partial(
        _report,
        functools.partial(Experiment.load, set=set, unset=unset),
        batch=batch,
        tracking=tracking,
        trust_checkpoint=trust_checkpoint,
    )
    reports = _reports(look, scripts, several=batch and len(scripts) > 1)
    skipped += [path for path in scripts if path not in reports]
    return Checked([reports[path] for path in scripts if path in reports], skipped)


def _reports(
    look: Callable[[Path], Report], scripts: Sequence[Path], *, several: bool
) -> dict[Path, Report]:
    """Look at each script but those of which others are made, and return what was found."""
    reports: dict[Path, Report] = {}
    with Console(as_json=True) as console:  # Only results go to stdout.
        # A base without a config script beside it is skipped if others stand on it: so those come
        # last.
        for place, path in enumerate(sorted(scripts, key=_has_no_config_script)):
            layers = {layer for report in reports.values() for layer in report.layers}
            if _has_no_config_script(path) and path.resolve() in layers:
                continue
            if several:
                console.progress(shown(path), place / len(scripts))
            with _memory_given_back() if several else contextlib.nullcontext():
                reports[path] = look(path)
        if several:
            console.no_progress()
    return reports


@contextlib.contextmanager
def _memory_given_back() -> Iterator[None]:
    """Collect what holds on to each other, as trainers and their loops do, and nothing older."""
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def _holds_no_hparams(path: Path) -> bool:
    """Return whether a file is a Python script that binds no hparams."""
    if path.name in _NO_SCRIPTS_OF_HPARAMS:
        return path.is_file()
    if path.suffix != ".py" or not path.is_file():
        return False
    try:
        return not binds_hparams(parsed(path.read_bytes()))
    except SyntaxError:  # The check says what is wrong with it.
        return False


def _has_no_config_script(path: Path) -> bool:
    return not path.with_name(CONFIG_SCRIPT).is_file()


def _report(
    load: Callable[[Path], Experiment],
    path: Path,
    *,
    batch: bool,
    tracking: str,
    trust_checkpoint: bool,
) -> Report:
    findings = Findings()
    layers: list[Path] = []
    with imported_afresh(project_root(path.resolve())), findings.until_the_end():
        with findings.step("scripts", keys=HparamsError):
            experiment = load(path)
            experiment.check_added_keys()
        layers += [layer.path for layer in experiment.layers]
        findings.ok("scripts", " > ".join(layer.name for layer in layers))
        _note_keys(experiment, findings)
        # A structure that the config script wants is looked at there.
        with findings.step("config script", structure=HparamsError):
            has_structure = experiment.check_config_script()
        findings.ok("config script", shown(experiment.config_script))
        if has_structure:
            findings.ok("structure")
        if batch:
            with heavy_imports():
                from torch_lab.probe import probe

            probe(experiment, findings, tracking, trust_checkpoint=trust_checkpoint)
    found = {finding.check for finding in findings.all}
    if rest := [name for name in (_ALWAYS if batch else _ALWAYS[:1]) if name not in found]:
        findings.add("the rest", Verdict.NOT_CHECKED, ", ".join(rest))
    return Report(path, findings.all, layers)


def _note_keys(experiment: Experiment, findings: Findings) -> None:
    """Note what looks wrong in the layers; that the keys are known was seen when they were read."""
    warnings = list(layer_warnings(experiment))
    for warning in warnings:
        findings.warn("keys", warning)
    if not warnings:
        findings.ok("keys")
