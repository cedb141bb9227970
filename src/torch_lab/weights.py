"""Weights out of a checkpoint, all of them or some, and what was loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from torch_lab.checkpoints import Source, find_source
from torch_lab.errors import CheckpointError, did_you_mean, listed
from torch_lab.hparams import CheckpointSection
from torch_lab.runs import project_root
from torch_lab.utils import shown

__all__ = ["LoadReport", "check_fits", "load_source", "load_weights", "loaded_from"]

log = logging.getLogger(__name__)

_COMPILED = "_orig_mod."
_DISTRIBUTED = "module."
_MODEL = "model."


@dataclass(frozen=True)
class LoadReport:
    """Which weights were loaded, by their names in the bare model; buffers count as weights."""

    loaded: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    """Those that the patterns left out."""
    missing: tuple[str, ...] = ()
    """Those that the checkpoint does not have."""
    unexpected: tuple[str, ...] = ()
    """Those that the model does not have."""
    other_shape: Mapping[str, str] = field(default_factory=dict)
    """Those that have another shape in the checkpoint, with both: `"(2, 3), not (5, 3)"`."""

    def __str__(self) -> str:
        total = sum(map(len, (self.loaded, self.skipped, self.missing, self.other_shape)))
        parts: dict[str, Sequence[str]] = {
            "left out by the patterns": self.skipped,
            "not in the checkpoint": self.missing,
            "other shape": [f"{name} ({both})" for name, both in self.other_shape.items()],
            "not in the model": self.unexpected,
        }
        told = [f"{what}: {listed(names)}" for what, names in parts.items() if names]
        return "; ".join([f"loaded {len(self.loaded)} of {total} tensors", *told])


def load_weights(
    module: torch.nn.Module,
    run: str | Path,
    name: str = "last",
    root: str | Path | None = None,
    *,
    strict: bool = True,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    trust: bool = False,
) -> torch.nn.Module:
    """Load weights into `module` from a run's checkpoint, and return it.

    How much was loaded, and what was not, is logged.

    Args:
        module: A `LightningModule`, or the bare model; whichever has the checkpoint's names.
        run: A run's name, with its version or without for the newest; a ClearML task id; or the
            path of a checkpoint file.
        name: The checkpoint's name, with or without `.ckpt`; not used for a path.
        root: The project whose runs are meant; if not given, that of the script that is running
            (in `infer_config`, say), or else of the working directory.
        strict: Whether names and shapes must be those of the model; if not, the weights that have
            the same are loaded.
        include: Patterns (`"encoder.*"`) of the weights to load, by their names in the bare model;
            none for all.
        exclude: Patterns of the weights not to load.
        trust: Whether the checkpoint may run code when it is read.

    Raises:
        CheckpointError: There is no such run or checkpoint, it does not fit, nothing of it would be
            loaded, or a pattern matches nothing.
        DamagedError: It is damaged.
    """
    project = project_root() if root is None else Path(root).expanduser().resolve()
    source = find_source(str(run), name.removesuffix(".ckpt"), project, trust=trust)
    section = CheckpointSection(strict=strict, include=_tuple(include), exclude=_tuple(exclude))
    load_source(module, source, section)
    return module


def _tuple(patterns: Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def load_source(
    module: torch.nn.Module,
    source: Source,
    section: CheckpointSection | None = None,
    *,
    script: Path | None = None,
) -> LoadReport:
    """Load the weights at `source` into `module` or its model, whichever has their names.

    Args:
        module: What to load into.
        source: Where they are.
        section: Says, by `strict`, `include` and `exclude`, which are loaded; without it all.
        script: The hparams script that has `section`; errors name it, and the key.

    Raises:
        CheckpointError: They do not fit, or nothing would be loaded.
        DamagedError: The checkpoint is damaged.
    """
    fitting = _Fitting(module, source, f"{shown(script)}: checkpoint" if script else "")
    report = fitting.report(section or CheckpointSection())
    fitting.load(report)
    # Told by `loaded_from`; an attribute, as a model has nowhere else to keep it.
    vars(fitting.target)["_weights_from"] = str(source)
    log.info("weights from %s: %s", source, report)
    return report


def check_fits(module: torch.nn.Module, source: Source) -> None:
    """Check that the weights at `source` are those of `module` or its model.

    Raises:
        CheckpointError: They do not fit.
        DamagedError: The checkpoint is damaged.
    """
    _Fitting(module, source).report(CheckpointSection())


def loaded_from(module: torch.nn.Module) -> str | None:
    """Return where the weights of `module`, or of a part of it, were loaded from, if they were."""
    found = (vars(part).get("_weights_from") for part in module.modules())
    return next((str(place) for place in found if place), None)


class _Fitting:
    """The weights at `source` held against those of `module` or its model, by their bare names.

    Args:
        module: What to load into.
        source: Where the weights are.
        section: The script and the section that ask for them; empty where a call does.
    """

    def __init__(self, module: torch.nn.Module, source: Source, section: str = "") -> None:
        self.source = source
        self.section = section
        self.target, self.given = _best_pair(module, _state(source))
        self.own = self.target.state_dict()
        # A LightningModule's model is meant by the patterns, not its place in it.
        prefix = _MODEL if isinstance(getattr(self.target, "model", None), torch.nn.Module) else ""
        self.own_names = {_bare(name).removeprefix(prefix): name for name in self.own}
        self.given_names = {name.removeprefix(prefix): name for name in self.given}

    def report(self, section: CheckpointSection) -> LoadReport:
        """Return what `section` has loaded; refuse what it does not allow."""
        self._check_patterns(section)
        chosen = [name for name in self.own_names if _is_chosen(name, section)]
        given = {name for name in self.given_names if _is_chosen(name, section)}
        other_shape = {name: self._other_shape(name) for name in chosen if name in given}
        report = LoadReport(
            loaded=tuple(name for name in chosen if other_shape.get(name) == ""),
            skipped=tuple(name for name in self.own_names if not _is_chosen(name, section)),
            missing=tuple(name for name in chosen if name not in given),
            unexpected=tuple(name for name in sorted(given) if name not in self.own_names),
            other_shape={name: both for name, both in other_shape.items() if both},
        )
        if section.strict:
            self._check_exact(report)
        if self.own and not report.loaded:
            raise self._error(f"nothing of {self.source} fits the model: {report}")
        return report

    def load(self, report: LoadReport) -> None:
        """Load what `report` says."""
        state = {self.own_names[name]: self.given[self.given_names[name]] for name in report.loaded}
        self.target.load_state_dict(state, strict=False)

    def _other_shape(self, name: str) -> str:
        """Return the two shapes of a weight, or nothing if they are one."""
        own, given = self.own[self.own_names[name]], self.given[self.given_names[name]]
        if is_lazy(own):
            return ""
        shapes = [tuple(getattr(value, "shape", ())) for value in (given, own)]
        return "" if shapes[0] == shapes[1] else f"{shapes[0]}, not {shapes[1]}"

    def _check_patterns(self, section: CheckpointSection) -> None:
        names = [*self.own_names, *self.given_names]
        for key in ("include", "exclude"):
            for index, pattern in enumerate(getattr(section, key)):
                if not any(fnmatchcase(name, pattern) for name in names):
                    choices = {choice for name in names for choice in (name, *_parents(name))}
                    raise self._error(
                        f"the pattern {pattern!r} matches no weight of the model or of "
                        f"{self.source}{did_you_mean(pattern, choices)}",
                        f"{key}[{index}]",
                    )

    def _check_exact(self, report: LoadReport) -> None:
        if report.other_shape:
            name, both = next(iter(report.other_shape.items()))
            raise self._error(f"{self.source} does not fit: {name} has the shape {both}")
        parts = []
        if report.missing:
            parts.append(f"it lacks {listed(sorted(report.missing))}")
        if report.unexpected:
            parts.append(f"it has {listed(report.unexpected)}, which the model has not")
        if parts:
            raise self._error(f"{self.source} does not fit the model: {'; '.join(parts)}")

    def _error(self, message: str, key: str = "") -> CheckpointError:
        """Return an error that says which key, or which section, asks for what is not to be had."""
        where = ".".join(part for part in (self.section, key) if part)
        return CheckpointError(f"{where}: {message}" if where else message)


def _is_chosen(name: str, section: CheckpointSection) -> bool:
    included = not section.include or any(fnmatchcase(name, each) for each in section.include)
    return included and not any(fnmatchcase(name, each) for each in section.exclude)


def _parents(name: str) -> Iterator[str]:
    """Yield the patterns of the parts of a model that the weight `name` lies in."""
    parts = name.split(".")[:-1]
    for length in range(1, len(parts) + 1):
        yield ".".join([*parts[:length], "*"])


def _state(source: Source) -> dict[str, Any]:
    """Return the weights at `source`, without the prefixes of what a model is wrapped in.

    Raises:
        CheckpointError: It holds none.
    """
    found = source.load()
    state = found.get("state_dict", found)
    holds_weights = "state_dict" in found or any(map(torch.is_tensor, state.values()))
    if not isinstance(state, Mapping) or not holds_weights:
        keys = listed(found, 8) or "nothing"
        raise CheckpointError(f"{source} holds no weights", f"it holds: {keys}")
    bare = {_bare(str(name)): value for name, value in state.items()}
    if all(name.startswith(_DISTRIBUTED) for name in bare):
        return {name.removeprefix(_DISTRIBUTED): value for name, value in bare.items()}
    return bare


def _bare(name: str) -> str:
    """Return the name that a weight has in the model before `torch.compile`."""
    return name.replace(_COMPILED, "")


def _best_pair(
    module: torch.nn.Module, state: dict[str, Any]
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return `module` or its `model`, and `state` or its model's part: those most alike in names.

    A checkpoint of another LightningModule has the weights below `model.`, and others beside them.
    """
    targets = [_unwrapped(module)]
    inner = _unwrapped(getattr(targets[0], "model", None))
    if isinstance(inner, torch.nn.Module):
        targets.append(inner)
    model_part = {
        name.removeprefix(_MODEL): value for name, value in state.items() if name.startswith(_MODEL)
    }
    pairs = [(target, part) for part in (state, model_part) for target in targets]
    return max(pairs, key=lambda pair: len(set(map(_bare, pair[0].state_dict())) & set(pair[1])))


def _unwrapped(module: Any) -> Any:
    """Return the model that `torch.compile`, or a wrapper for several devices, was given."""
    module = getattr(module, "_orig_mod", module)
    is_wrapped = isinstance(module, (DataParallel, DistributedDataParallel))
    return _unwrapped(module.module) if is_wrapped else module
