"""Hparams: one plain dictionary, checked and completed once, so that nobody below asks again.

The sections `task`, `checkpoint`, `trainer` and `config`, and what is beside them, are optional.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch_lab.errors import HparamsError, UserError, did_you_mean
from torch_lab.layering import SECTIONS, parsed_key, place_of
from torch_lab.provenance import Histories, Key, copied
from torch_lab.utils import parameters_of, shown

__all__ = [
    "CheckpointSection",
    "DevRun",
    "Hparams",
    "TrainerArguments",
    "check_goes_with_dev_run",
    "known_names",
]

_TRAINER = ("pytorch_lightning.trainer.trainer", "Trainer")
_OF_COMPILE: Mapping[str, tuple[tuple[type, ...], str]] = {
    "fullgraph": ((bool,), "True or False"),
    "dynamic": ((bool, type(None)), "True, False or None"),
    "mode": ((str, type(None)), "a string"),
    "options": ((dict, type(None)), "a dictionary"),
    "disable": ((bool,), "True or False"),
}
"""Types of what `torch.compile` takes; it finds out itself when it compiles, if at all."""
_OF_OPTIMIZER = ("fused", "foreach")
"""Arguments of optimizers that change how they compute, and not what."""
_COMPONENTS = "it comes from what the config function returns"
_CHECKPOINT = 'set hparams["checkpoint"] instead'
_OWNED = {
    "init": {
        "logger": "metrics always go to the run folder; add callbacks for anything else",
        "default_root_dir": "the run folder is used; TORCH_LAB_ROOT moves it",
        "barebones": "it would leave nothing of a run to record",
    },
    "fit": {
        "model": _COMPONENTS,
        "train_dataloaders": _COMPONENTS,
        "val_dataloaders": _COMPONENTS,
        "datamodule": _COMPONENTS,
        "ckpt_path": _CHECKPOINT,
        "weights_only": "checkpoints are always read with weights_only=True",
    },
}
_LOADER_TIMEOUT = 600.0
_COUNTS = {"max_epochs", "min_epochs", "max_steps", "min_steps", "accumulate_grad_batches"}
_WORDS_OF_PYTHON = {"in_background": "async"}
"""What is a key, and cannot be the name of a field."""
_OWNED_IN_OTHERS = {**_OWNED["fit"], "dataloaders": _COMPONENTS}


@dataclass(frozen=True)
class CheckpointSection:
    """Where a run starts from, and when it writes checkpoints of its own."""

    checkpoint_task_id: str | None = None
    """A run's name, a ClearML task id, or a path; None for none."""
    checkpoint_name: str = "last"
    """Name of the checkpoint in that run, with or without `.ckpt`."""
    weights_only: bool = False
    """Whether to take the weights alone, and start at step 0."""
    strict: bool = True
    """Whether weights must have the model's names and shapes; if not, those that do are loaded."""
    include: tuple[str, ...] = ()
    """Patterns (`"encoder.*"`) of the weights to load; none for all."""
    exclude: tuple[str, ...] = ()
    """Patterns of the weights not to load."""
    every_minutes: float | None = 5.0
    """How often `last` is written within an epoch; None for not by the clock."""
    every_n_steps: int | None = None
    """After how many steps `last` is written; None for not by steps."""
    keep: int = 1
    """How many of the best checkpoints are kept."""
    give_up_after: int = 3
    """How many checkpoints in a row may fail to be written before the run stops."""
    in_background: bool = False
    """Whether they are written while training goes on; `async` in the dictionary."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as a script would hold it."""
        return {_WORDS_OF_PYTHON.get(name, name): value for name, value in vars(self).items()}


@dataclass(frozen=True)
class TrainerArguments:
    """Keyword arguments for Lightning's `Trainer` and its calls."""

    init: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    validate: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    predict: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DevRun:
    """How much of the data a development run overfits on: a number of batches, or a fraction."""

    size: int | float

    @classmethod
    def parse(cls, given: str | int | float) -> DevRun:
        """Return what `given` means: an int counts batches (-1 is one), a float is a fraction.

        Raises:
            UserError: Neither of them.
        """
        try:
            size: int | float = _number(given)
        except ValueError:
            raise _not_a_dev_run(given) from None
        if size == -1 and isinstance(size, int):
            size = 1
        if size <= 0 or (isinstance(size, float) and not size <= 1):
            raise _not_a_dev_run(given)
        return cls(size)

    def __str__(self) -> str:
        if isinstance(self.size, float):
            return "all batches" if self.size == 1 else f"{self.size:.4g} of the batches"
        return f"{self.size} batch{'es' if self.size > 1 else ''}"


def check_goes_with_dev_run(*, resumes: bool, online: bool) -> None:
    """Refuse what a dev run, which leaves nothing, cannot be asked for.

    Raises:
        UserError: It shall go on with a run, or be tracked.
    """
    for option, is_given in (("--resume", resumes), ("--online", online)):
        if is_given:
            raise UserError(
                f"--dev-run and {option} contradict each other: a dev run leaves nothing"
            )


def _number(given: str | int | float) -> int | float:
    if isinstance(given, bool):
        raise ValueError
    if not isinstance(given, str):
        return given
    try:
        return int(given)
    except ValueError:
        return float(given)


def _not_a_dev_run(given: object) -> UserError:
    return UserError(
        f"--dev-run {given}: expected a number of batches (like 8; -1 is one), "
        "or a fraction of them (like 0.5; 1.0 is all)"
    )


@dataclass(frozen=True)
class Hparams:
    """The hparams of one experiment, checked, with their defaults filled in."""

    path: Path
    task: dict[str, Any]
    checkpoint: CheckpointSection
    trainer: TrainerArguments
    config: dict[str, Any]
    seed: int
    loader_timeout: float | None
    """Seconds that the workers of a loader may take for a batch; None for any time."""
    strict: bool = False
    """Whether keys of `config` that no base has, or that nobody reads, are errors."""
    compile: bool | dict[str, Any] = False
    """Whether the network is compiled, or with which arguments of `torch.compile`."""
    channels_last: bool = False
    """Whether images, and the weights for them, lie in memory with their channels last."""
    optimizer: dict[str, bool] = field(default_factory=dict)
    """What holds for the optimizers where `train_config` has not chosen."""
    pin_memory: bool = False
    """Whether batches are copied into pinned memory on their way to a device."""
    added: frozenset[str] = frozenset()
    """The keys of `config` that no script has set."""

    @classmethod
    def parse(
        cls, given: object, path: Path, project_name: str, histories: Histories | None = None
    ) -> Hparams:
        """Return `given`, which the script at `path` calls `hparams`, checked and completed.

        Args:
            given: What the script holds.
            path: The script; errors name it.
            project_name: The value of `task.project_name` when the script gives none.
            histories: What has set the values; errors name the lines.

        Raises:
            HparamsError: An unknown key, or a value of the wrong type.
        """
        check = _Check(path, histories)
        sections = check.is_dict(given, "hparams")
        check.are_known(sections, SECTIONS, "hparams")
        return cls(
            path=path,
            task={"project_name": project_name} | check.task(sections.get("task", {})),
            checkpoint=check.checkpoint(sections.get("checkpoint", {})),
            trainer=check.trainer(sections.get("trainer", {})),
            config=check.config(sections.get("config", {})),
            seed=check.seed(sections.get("seed", 0)),
            loader_timeout=check.positive(
                sections.get("loader_timeout", _LOADER_TIMEOUT), "loader_timeout", "of seconds"
            ),
            strict=check.yes_or_no(sections.get("strict", False), "strict"),
            compile=check.compile(sections.get("compile", False)),
            channels_last=check.yes_or_no(sections.get("channels_last", False), "channels_last"),
            optimizer=check.optimizer(sections.get("optimizer", {})),
            pin_memory=check.yes_or_no(sections.get("pin_memory", False), "pin_memory"),
        )

    @property
    def monitor(self) -> str:
        """The metric that says which checkpoint is the best."""
        return str(self.config.get("monitor", "loss/validate"))

    @property
    def monitor_mode(self) -> str:
        """Whether the best is the lowest (`"min"`) or the highest (`"max"`)."""
        return str(self.config.get("monitor_mode", "min"))

    def as_dict(self) -> dict[str, Any]:
        """Return the whole dictionary, defaults included: a copy, for a config function to use."""
        plain = {
            "task": self.task,
            "checkpoint": self.checkpoint.as_dict(),
            "trainer": dict(vars(self.trainer)),
            "config": self.config,
            "seed": self.seed,
            "loader_timeout": self.loader_timeout,
            "strict": self.strict,
            "compile": self.compile,
            "channels_last": self.channels_last,
            "optimizer": self.optimizer,
            "pin_memory": self.pin_memory,
        }
        result: dict[str, Any] = copied(plain)
        return result

    def as_used(self, dev_run: DevRun | None = None, *, debug: bool = False) -> Hparams:
        """Return the hparams of a dev run, and those for debugging, if they are wanted."""
        hparams = self.for_dev_run(dev_run) if dev_run else self
        return hparams.for_debug() if debug else hparams

    def for_dev_run(self, dev_run: DevRun) -> Hparams:
        """Return the hparams that overfit on a few batches, and leave no checkpoint."""
        init = {
            **self.trainer.init,
            "overfit_batches": dev_run.size,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
        }
        if not {"max_epochs", "max_steps", "max_time"} & set(self.trainer.init):
            init["max_epochs"] = 100
        return replace(
            self,
            task={**self.task, "project_name": "test"},
            trainer=replace(self.trainer, init=init),
            **self._without_workers(),
        )

    def for_debug(self) -> Hparams:
        """Return the hparams that find anomalies in the backward pass, without worker processes.

        Nothing is compiled, as a debugger does not reach into what is.
        """
        return replace(
            self,
            compile=False,
            trainer=replace(self.trainer, init={**self.trainer.init, "detect_anomaly": True}),
            **self._without_workers(),
        )

    def _without_workers(self) -> dict[str, Any]:
        added = {"num_workers"} - self.config.keys()
        return {"config": {**self.config, "num_workers": 0}, "added": self.added | added}


def known_names(section: Key) -> tuple[str, ...]:
    """Return the names that a section may hold; none of those that may hold any, and of values."""
    match section:
        case ():
            return SECTIONS
        case ("task",):
            return parameters_of("clearml.task", "Task.init")
        case ("checkpoint",):
            return tuple(CheckpointSection().as_dict())
        case ("trainer",):
            return tuple(vars(TrainerArguments()))
        case ("trainer", call) if call in vars(TrainerArguments()):
            return _parameters_of_trainer(call)
        case ("compile",):
            return tuple(name for name in parameters_of("torch", "compile") if name != "model")
        case ("optimizer",):
            return _OF_OPTIMIZER
    return ()


def _parameters_of_trainer(call: str) -> tuple[str, ...]:
    module, trainer = _TRAINER
    return parameters_of(module, f"{trainer}.{'__init__' if call == 'init' else call}")


class _Check:
    """Checks values, with the path of their script at hand for the errors."""

    def __init__(self, path: Path, histories: Histories | None = None) -> None:
        self.path = path
        self.histories = histories or {}

    def error(self, at: str, message: str, hint: str | None = None) -> HparamsError:
        """Return an error about the key `at`, with the line that set it or what is below it."""
        key = parsed_key(at) or ()
        below = next((each for each in self.histories if each[: len(key)] == key), ())
        place = place_of(key, self.histories) or place_of(below, self.histories)
        return HparamsError(f"{place or shown(self.path)}: {message}", hint)

    def is_dict(self, value: object, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            mend = (
                "; leave it out to have its defaults" if value is None and name != "hparams" else ""
            )
            raise self.error(name, f"{name} must be a dictionary, not {_described(value)}{mend}")
        for key in value:
            if not isinstance(key, str) and name != "config":
                raise self.error(name, f"{name} has the key {key!r}; keys are strings")
        return value

    def are_known(self, given: Iterable[str], known: Iterable[str], name: str) -> None:
        choices = list(known)
        for key in given:
            if key not in choices:
                suggestion = did_you_mean(key, choices)
                hint = None if suggestion else f"it may have: {', '.join(choices) or 'nothing'}"
                at = key if name == "hparams" else f"{name}.{key}"
                raise self.error(at, f"{name} has the unknown key {key!r}{suggestion}", hint)

    def is_type(
        self, value: object, kind: type | tuple[type, ...], name: str, expected: str
    ) -> None:
        if not isinstance(value, kind):
            raise self.error(name, f"{name} must be {expected}, not {_described(value)}")

    def yes_or_no(self, value: object, name: str) -> bool:
        self.is_type(value, bool, name, "True or False")
        return bool(value)

    def task(self, given: object) -> dict[str, Any]:
        task = self.is_dict(given, "task")
        if task:
            self.are_known(task, known_names(("task",)), "task")
        for name in ("project_name", "task_name"):
            self.is_type(task.get(name), (str, type(None)), f"task.{name}", "a string")
        return {key: value for key, value in task.items() if value is not None}

    def checkpoint(self, given: object) -> CheckpointSection:
        checkpoint = self.is_dict(given, "checkpoint")
        defaults = CheckpointSection().as_dict()
        self.are_known(checkpoint, defaults, "checkpoint")
        given = {**defaults, **checkpoint}
        source, name = given["checkpoint_task_id"], given["checkpoint_name"]
        kinds = (str, Path, type(None))
        self.is_type(
            source, kinds, "checkpoint.checkpoint_task_id", "a run, a task id, a path or None"
        )
        self.is_type(name, str, "checkpoint.checkpoint_name", "a string")
        for key in ("weights_only", "strict", "async"):
            self.yes_or_no(given[key], f"checkpoint.{key}")
        section = CheckpointSection(
            checkpoint_task_id=str(source) if source else None,
            checkpoint_name=name.removesuffix(".ckpt"),
            weights_only=given["weights_only"],
            strict=given["strict"],
            include=self.patterns(given["include"], "checkpoint.include"),
            exclude=self.patterns(given["exclude"], "checkpoint.exclude"),
            every_minutes=self.positive(
                given["every_minutes"], "checkpoint.every_minutes", "of minutes"
            ),
            every_n_steps=self.at_least_one(
                given["every_n_steps"], "checkpoint.every_n_steps", or_none=True
            ),
            keep=self.at_least_one(given["keep"], "checkpoint.keep"),
            give_up_after=self.at_least_one(given["give_up_after"], "checkpoint.give_up_after"),
            in_background=given["async"],
        )
        self.weights_are_meant(section)
        return section

    def weights_are_meant(self, section: CheckpointSection) -> None:
        """Refuse keys about weights where none are to be taken alone: they would do nothing."""
        if section.weights_only and section.checkpoint_task_id is None:
            raise self.error(
                "checkpoint.weights_only",
                "checkpoint.weights_only is True, but there is no checkpoint.checkpoint_task_id to "
                "take weights from",
                "set checkpoint_task_id to a run's name or to the path of a file, or leave out "
                "weights_only",
            )
        partial = not section.strict or section.include or section.exclude
        if partial and not section.weights_only:
            raise self.error(
                "checkpoint",
                "checkpoint.strict, include and exclude choose among weights: training goes on "
                "from a whole checkpoint",
                "set checkpoint.weights_only to True to start from some of its weights",
            )

    def patterns(self, given: object, name: str) -> tuple[str, ...]:
        listed = [given] if isinstance(given, str) else given
        self.is_type(listed, (list, tuple), name, 'a list of patterns, like ["encoder.*"]')
        assert isinstance(listed, (list, tuple))
        for pattern in listed:
            self.is_type(pattern, str, f"{name}[{listed.index(pattern)}]", "a pattern, a string")
        return tuple(listed)

    def positive(self, given: object, name: str, unit: str) -> float | None:
        if given is None:
            return None
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if not number or not given > 0:  # type: ignore[operator]
            raise self.error(
                name, f"{name} must be a positive number {unit}, or None, not {_described(given)}"
            )
        return float(given)  # type: ignore[arg-type]

    def at_least_one(self, given: object, name: str, *, or_none: bool = False) -> Any:
        if given is None and or_none:
            return None
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            none = " or None" if or_none else ""
            raise self.error(
                name, f"{name} must be a whole number from 1 on{none}, not {_described(given)}"
            )
        return given

    def trainer(self, given: object) -> TrainerArguments:
        trainer = self.is_dict(given, "trainer")
        self.are_known(trainer, vars(TrainerArguments()), "trainer")
        calls = {call: self.trainer_call(call, trainer[call]) for call in trainer}
        return TrainerArguments(**calls)

    def trainer_call(self, call: str, given: object) -> dict[str, Any]:
        name = f"trainer.{call}"
        arguments = self.is_dict(given, name)
        owned: Mapping[str, str] = _OWNED.get(call, _OWNED_IN_OTHERS)
        for key in arguments:
            if key in owned:
                raise self.error(f"{name}.{key}", f"{name}.{key} is not yours to set: {owned[key]}")
        if arguments:
            parameters = _parameters_of_trainer(call)
            self.are_known(arguments, [key for key in parameters if key not in owned], name)
        for key in _COUNTS & set(arguments):
            self.is_count(arguments[key], f"{name}.{key}")
        return arguments

    def is_count(self, value: object, name: str) -> None:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.error(name, f"{name} must be a whole number, not {_described(value)}")

    def config(self, given: object) -> dict[str, Any]:
        config = self.is_dict(given, "config")
        self.is_type(config.get("monitor", ""), str, "config.monitor", "the name of a metric")
        mode = config.get("monitor_mode", "min")
        if mode not in ("min", "max"):
            raise self.error(
                "config.monitor_mode", f'config.monitor_mode must be "min" or "max", not {mode!r}'
            )
        return config

    def compile(self, given: object) -> bool | dict[str, Any]:
        if isinstance(given, bool):
            return given
        if not isinstance(given, dict):
            expected = "True, False or a dictionary of arguments of torch.compile"
            raise self.error("compile", f"compile must be {expected}, not {_described(given)}")
        options = self.is_dict(given, "compile")
        self.are_known(options, known_names(("compile",)), "compile")
        for key in options.keys() & _OF_COMPILE.keys():
            self.is_type(options[key], _OF_COMPILE[key][0], f"compile.{key}", _OF_COMPILE[key][1])
        return options

    def optimizer(self, given: object) -> dict[str, bool]:
        defaults = self.is_dict(given, "optimizer")
        self.are_known(defaults, _OF_OPTIMIZER, "optimizer")
        for key, value in defaults.items():
            self.yes_or_no(value, f"optimizer.{key}")
        if all(defaults.get(key) for key in _OF_OPTIMIZER):
            raise self.error(
                "optimizer",
                "optimizer.fused and optimizer.foreach are both True; an optimizer is one of them",
                "leave out foreach: fused kernels are the faster ones where there are both",
            )
        return defaults

    def seed(self, given: object) -> int:
        if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given < 2**32:
            raise self.error(
                "seed",
                f"seed must be a whole number from 0 to {2**32 - 1}, not {_described(given)}",
            )
        return given


def _described(value: object) -> str:
    if value is None:
        return "None"
    return f"{value!r} ({type(value).__name__})" if len(repr(value)) <= 40 else type(value).__name__
