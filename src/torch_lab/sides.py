"""What can be compared: an hparams script as it is now, a run, or a run at a checkpoint.

Of a run its folder tells. Nothing but the hparams scripts is run, and no checkpoint is loaded.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch_lab.afresh import imported_afresh
from torch_lab.errors import CheckpointError, UserError, did_you_mean, listed
from torch_lab.experiment import Experiment
from torch_lab.explaining import chains
from torch_lab.imports import unkept_imports
from torch_lab.places import CONFIG_SCRIPT
from torch_lab.redaction import masked, masked_script
from torch_lab.runs import (
    Run,
    artifacts_folder,
    encoded,
    find_run,
    installed_packages,
    path_in_sources,
    project_root,
)
from torch_lab.utils import shown

__all__ = ["Line", "Side"]

_RESUMED: Final = re.compile(r"resumed-\d+")

Line: TypeAlias = Mapping[str, Any]
"""A `file`, by its path in the project, and a `line` in it; or the `source` that is no script."""


@dataclass(frozen=True)
class Side:
    """What is known of one of the two that are compared; secrets are masked."""

    name: str
    words: str
    """What it is, for a person."""
    experiment: Path
    """The experiment's folder, by its path in the project."""
    hparams: Any = field(repr=False)
    """With their defaults, as `run.json` has them."""
    lines: Mapping[str, Line] = field(repr=False)
    """What has set the values of the hparams, or removed them, by their keys."""
    code: Mapping[str, bytes] = field(repr=False)
    """The scripts by their paths: in the experiment's folder, or else in the project."""
    packages: Mapping[str, str] = field(repr=False)
    numbers: Mapping[str, float] | None = None
    """The step and the metrics of a run, at its end or at a checkpoint."""
    outcome: Mapping[str, Any] | None = None
    """How a run ended as a whole."""
    unknown: frozenset[str] = frozenset()
    """Scripts that it consists of as well, and of which nothing was kept."""
    note: str = ""
    """What else to know of a comparison with it."""
    look_up: Callable[[str], bytes | None] = field(default=lambda name: None, repr=False)
    """Returns a script that it does not import, if it is there all the same."""

    @classmethod
    def of(cls, given: str) -> Side:
        """Return what `given` means.

        Args:
            given: The path of an hparams script; the name or the folder of a run, or one of these
                with a checkpoint of the run, `RUN@best`; or the path of that checkpoint.

        Raises:
            ScriptError: There is no such script, or it does not run.
            HparamsError: Its hparams are wrong.
            CheckpointError: There is no such run, or no such checkpoint.
            UserError: A path leads to neither of them.
        """
        path = Path(given).expanduser()
        if path.suffix == ".ckpt" and _is_run(path.parent.parent):
            return _at_checkpoint(Run.read(path.parent.parent), path.stem)
        if path.suffix == ".py" or (path.exists() and not _is_run(path)):
            return _of_script(path)
        wanted, _, checkpoint = given.rpartition("@")
        if not wanted or _is_run(path) or _is_run(_artifacts() / given):
            return _of_run(_found_run(given))
        return _at_checkpoint(_found_run(wanted, checkpoint), checkpoint.removesuffix(".ckpt"))

    def source(self, name: str) -> bytes | None:
        """Return a script, if it is there."""
        return self.code[name] if name in self.code else self.look_up(name)

    def is_in_doubt(self, name: str) -> bool:
        """Return whether a script may have been a part of it, and nobody knows."""
        # What was imported by a script that was not kept is not known either.
        return bool(self.unknown) and name not in self.code


# Hparams scripts.


def _of_script(path: Path) -> Side:
    with imported_afresh(project_root(path.resolve())):
        experiment = Experiment.load(path)
        hparams = masked(encoded(experiment.hparams.as_dict()))
        scripts = experiment.scripts
    root = experiment.root
    folder = path_in_sources(experiment.folder, root)
    layers = [layer.path.name for layer in experiment.layers]

    def look_up(name: str) -> bytes | None:
        places = (experiment.folder / name, root / name)
        return next((_masked(place) for place in places if place.is_file()), None)

    return Side(
        name=f"{experiment.name}/{path.name}",
        words=f"{shown(experiment.script)}, as it is now"
        + (f" ({' > '.join(layers)})" if len(layers) > 1 else ""),
        experiment=folder,
        hparams=hparams,
        lines=_lines(chains(experiment)),
        code={_named(path_in_sources(script, root), folder): _masked(script) for script in scripts},
        packages={"python": sys.version.split()[0], **installed_packages()},
        look_up=look_up,
    )


def _masked(script: Path) -> bytes:
    # As a run keeps it: else the secrets in it would differ from the asterisks there.
    return masked_script(script.read_bytes())


def _named(path: Path, experiment: Path) -> str:
    """Return the name of a script that it shares with its counterpart in another experiment."""
    is_own = path.is_relative_to(experiment)
    return (path.relative_to(experiment) if is_own else path).as_posix()


# Runs.


def _artifacts() -> Path:
    return artifacts_folder(project_root())


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _found_run(wanted: str, having: str | None = None) -> Run:
    path = Path(wanted).expanduser()
    if _is_run(path):
        return Run.read(path)
    if len(path.parts) > 1 and path.resolve().parent != _artifacts().resolve():
        raise UserError(
            f"{wanted}: neither an hparams script nor the folder of a run",
            "a run of this project is named without its folder",
        )
    return find_run(_artifacts(), path.name, having)


def _of_run(run: Run) -> Side:
    best = run.best or {}
    score = {f"best {best['monitor']}": best["score"]} if best.get("score") is not None else {}
    started = datetime.fromisoformat(run.record.started).astimezone()
    return _recorded(
        run,
        name=run.name,
        words=f"{run.name}, {run.state}, {started:%Y-%m-%d %H:%M:%S}{_commit(run)}",
        numbers={**_step(run.sidecar("last") or {}), **run.metrics},
        outcome={"state": run.state, **score},
    )


def _at_checkpoint(run: Run, checkpoint: str) -> Side:
    names = sorted(run.checkpoint_names())
    if not run.checkpoint(checkpoint).is_file():
        raise CheckpointError(
            f"run {run.name} has no checkpoint {checkpoint!r}{did_you_mean(checkpoint, names)}",
            f"it has: {listed(names, 8) or 'none'}",
        )
    sidecar = run.sidecar(checkpoint)
    if sidecar is None:
        path = run.checkpoint(checkpoint).with_suffix(".json")
        raise CheckpointError(
            f"{shown(path)} is missing or damaged: it would tell of the checkpoint {checkpoint!r}"
        )
    # JSON has no word for what is not finite.
    metrics = {
        name: math.nan if value is None else value
        for name, value in sidecar.get("metrics", {}).items()
    }
    epoch, step = sidecar.get("epoch"), sidecar.get("step")
    at = f"epoch {epoch + 1}, step {step}" if isinstance(epoch, int) else f"step {step}"
    return _recorded(
        run,
        name=f"{run.name}@{checkpoint}",
        words=f"{run.name} at {checkpoint}: {at}{_commit(run)}",
        numbers={**_step(sidecar), **metrics},
    )


def _recorded(run: Run, **known: Any) -> Side:
    """Return what the folder of a run tells of its beginning, besides what is `known` already."""
    sources = run.folder / "sources"
    scripts = {
        path.relative_to(sources): path
        for path in sorted(sources.rglob("*.py"))
        if not _RESUMED.fullmatch(path.relative_to(sources).parts[0])
    }
    folder = _experiment_folder(run, scripts)
    root = project_root(run.folder.resolve())
    unkept = unkept_imports(scripts.values(), sources, folder, root)
    missing = [] if folder / CONFIG_SCRIPT in scripts else [folder / CONFIG_SCRIPT]
    return Side(
        experiment=folder,
        hparams=masked(run.record.hparams),
        lines=_lines(run.record.provenance),
        code={_named(below, folder): _masked(path) for below, path in scripts.items()},
        packages={"python": run.record.python, **run.record.packages},
        unknown=frozenset(_named(path, folder) for path in [*unkept, *missing]),
        note=_changed_later(run),
        **known,
    )


def _experiment_folder(run: Run, scripts: Iterable[Path]) -> Path:
    """Return the experiment's folder below that of the sources of a run, made here or elsewhere."""
    known = set(scripts)
    parts = Path(run.record.script).parts
    ends = (Path(*parts[start:]) for start in range(len(parts)))
    return next((end.parent for end in ends if end in known), Path(run.record.experiment))


def _lines(chains: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Line]:
    """Return what has set the hparams last."""
    kinds = {True: ("file", "line"), False: ("source",)}
    newest = {key: chain[-1] for key, chain in chains.items() if chain}
    return {
        key: {name: change[name] for name in kinds[change["file"] is not None]}
        for key, change in newest.items()
    }


def _commit(run: Run) -> str:
    record = run.record
    if record.commit is None:
        return ""
    changed = " with uncommitted changes" if record.changed else ""
    return f", {record.branch} {record.commit[:8]}{changed}"


def _step(sidecar: Mapping[str, Any]) -> dict[str, int]:
    return {"step": sidecar["step"]} if sidecar.get("step") is not None else {}


def _changed_later(run: Run) -> str:
    changed = any(each.get("changed") for each in run.record.resumed)
    if not changed and not any((run.folder / "sources").glob("resumed-*")):
        return ""
    return f"{run.name} went on with other hparams or scripts; it is compared as it began"
