"""An experiment at hand: its hparams and its parts to look at, and its runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_lab.errors import HparamsError, ScriptError, listed
from torch_lab.experiment import Experiment
from torch_lab.runs import project_root
from torch_lab.scripts import edited_since_they_ran
from torch_lab.utils import flattened, shown

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from torch_lab.runner import Inference
    from torch_lab.runs import Run

__all__ = ["LoadedExperiment", "load"]

_NOTHING = object()


def load(
    path: str | Path, set: Mapping[str, Any] | None = None, unset: Sequence[str] = ()
) -> LoadedExperiment:
    """Run the hparams script at `path`, and return its experiment.

    Its layers, and what they import from beside them, run afresh at each call. Packages in the
    project, or in its `src`, can be imported; they are imported once, as in any Python.

    Args:
        path: The hparams script.
        set: What `--set` does: values by their keys, `{"config.learning_rate": 3e-3}`.
        unset: Keys to remove.

    Raises:
        UserError: The script or its hparams are wrong, or what is set does not fit.
    """
    _make_importable(project_root(Path(path).expanduser().resolve()))
    return LoadedExperiment(Experiment.load(path, set=set, unset=unset), set or {}, unset)


class LoadedExperiment:
    """An experiment whose hparams script has run, to look at and to train.

    Args:
        experiment: The experiment.
        set: What was set when it was loaded.
        unset: What was removed then.
    """

    def __init__(
        self, experiment: Experiment, set: Mapping[str, Any], unset: Sequence[str]
    ) -> None:
        self._experiment = experiment
        self._set = dict(set)
        self._unset = tuple(unset)
        self.hparams: dict[str, Any] = experiment.hparams.as_dict()
        """The whole dictionary, defaults included, as `train_config` gets it; to read only."""

    def __repr__(self) -> str:
        return self._call(self._set)

    def _call(self, set: Mapping[str, Any]) -> str:
        """Return the call that loads this experiment with other values."""
        words = [repr(shown(self._experiment.script))]
        words += [f"set={set!r}"] if set else []
        words += [f"unset={self._unset!r}"] if self._unset else []
        return f"torch_lab.load({', '.join(words)})"

    def build(self) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
        """Return the trainer, the module and the data, ready for `trainer.fit(module, data)`.

        `train_config` is called, and checked what it returns. That training is the same as that of
        `train`, to the bit, as long as nothing else was done with the module and the data; but it
        leaves nothing behind: no folder, no checkpoints, no logs, no task. Weights that the hparams
        name are loaded.

        Raises:
            UserError: A script, the hparams, the components or the checkpoint are wrong.
        """
        experiment = self._as_loaded()
        from torch_lab.building import built

        return built(experiment)

    def train(self, **options: Any) -> Run:
        """Train as the command does, and return the run, which has a folder of its own.

        Args:
            options: Keyword arguments of `torch_lab.train`.

        Raises:
            UserError: A script, the hparams or the components are wrong; nothing was created.
            TorchLabError: What else `torch_lab.train` raises.
        """
        experiment = self._as_loaded()
        from torch_lab.runner import train

        return train(experiment, **options)

    def infer(self, *arguments: str, **options: Any) -> Inference:
        """Predict as the command does, and return what came out.

        Args:
            arguments: What `infer_config` gets after the hparams.
            options: Keyword arguments of `torch_lab.infer`.

        Raises:
            UserError: A script, the hparams, the arguments or the components are wrong.
        """
        experiment = self._as_loaded()
        from torch_lab.runner import infer

        return infer(experiment, *arguments, **options)

    def _as_loaded(self) -> Experiment:
        """Return the experiment, if its scripts and its hparams still are what was loaded.

        A run would keep the scripts as they are now, and not those that made its hparams.
        """
        experiment = self._experiment
        # The config script runs afresh each time.
        edited = [
            path
            for path in edited_since_they_ran(experiment.generation)
            if path != experiment.config_script
        ]
        if edited:
            have = "has" if len(edited) == 1 else "have"
            raise ScriptError(
                f"{listed(map(shown, edited))} {have} changed since the experiment was loaded",
                f"load it again: experiment = {self!r}",
            )
        self._check_hparams()
        return experiment

    def _check_hparams(self) -> None:
        before, now = flattened(self._experiment.hparams.as_dict()), flattened(self.hparams)
        changed = [
            key
            for key in dict.fromkeys([*before, *now])
            if before.get(key, _NOTHING) is not now.get(key, _NOTHING)
            and repr(before.get(key, _NOTHING)) != repr(now.get(key, _NOTHING))
        ]
        if changed:
            wanted = {**self._set, **{key: now[key] for key in changed if key in now}}
            raise HparamsError(
                f"experiment.hparams was changed ({listed(changed)}), which no run would record",
                f"load it so: {self._call(wanted)}",
            )


def _make_importable(root: Path) -> None:
    """Let scripts import the packages of a project, as those of the working directory."""
    # At the end, so that nothing there hides what is installed.
    folders = [str(folder) for folder in (root, root / "src")]
    sys.path.extend(folder for folder in folders if folder not in sys.path)
