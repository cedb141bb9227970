"""An experiment at hand: its hparams and its parts to look at, and its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_lab.errors import HparamsError, ScriptError, listed
from torch_lab.experiment import Experiment
from torch_lab.provenance import leaves, spelt
from torch_lab.scripts import edited_since_they_ran
from torch_lab.utils import new, shown

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from torch_lab.runner import Inference
    from torch_lab.runs import Run

__all__ = ["LoadedExperiment", "load"]

_NOTHING = object()


def load(
    path: str | Path, *, set: Mapping[str, Any] | None = None, unset: Sequence[str] = ()
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
        return self._words_to_load(self._set, self._unset)

    def _words_to_load(self, set: Mapping[str, Any], unset: Sequence[str]) -> str:
        """Return the call that loads this experiment with such overrides."""
        words = [repr(shown(self._experiment.script))]
        words += [f"set={set!r}"] if set else []
        words += [f"unset={list(unset)!r}"] if unset else []
        return f"torch_lab.load({', '.join(words)})"

    def build(
        self, *, tracking: str = "auto", trust_checkpoint: bool = False
    ) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
        """Return the trainer, the module and the data, ready for `trainer.fit(module, data)`.

        `train_config` is called, and checked what it returns. That training is the same as that of
        `train`, to the bit, as long as nothing else was done with the module and the data; but it
        leaves nothing behind: no folder, no checkpoints, no logs, no task. Weights that the hparams
        name are loaded; of a checkpoint that they go on from in full, the weights alone.

        Args:
            tracking: `auto` to ask ClearML, if it is there, for what is not here; `offline` not to.
            trust_checkpoint: Read a checkpoint that holds code, which can do anything that you can.

        Raises:
            UserError: A script, the hparams, the components or the checkpoint are wrong.
        """
        experiment = self._unchanged()
        from torch_lab.building import built

        return built(experiment, tracking=tracking, trust=trust_checkpoint)

    def train(self, **options: Any) -> Run:
        """Train as the command does, and return the run, which has a folder of its own.

        Args:
            options: Keyword arguments of `torch_lab.train`.

        Raises:
            UserError: A script, the hparams or the components are wrong; nothing was created.
            TorchLabError: What else `torch_lab.train` raises.
        """
        experiment = self._unchanged()
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
        experiment = self._unchanged()
        from torch_lab.runner import infer

        return infer(experiment, *arguments, **options)

    def _unchanged(self) -> Experiment:
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
        before, now = dict(leaves(self._experiment.hparams.as_dict())), dict(leaves(self.hparams))
        changed = [
            key
            for key in dict.fromkeys([*before, *now])
            if before.get(key, _NOTHING) is not now.get(key, _NOTHING)
            and repr(before.get(key, _NOTHING)) != repr(now.get(key, _NOTHING))
        ]
        if changed:
            given = {
                spelt(key): now[key] if key in before else new(now[key])
                for key in changed
                if key in now
            }
            removed = [spelt(key) for key in changed if key not in now]
            call = self._words_to_load({**self._set, **given}, [*self._unset, *removed])
            names = listed(map(spelt, changed))
            raise HparamsError(
                f"experiment.hparams was changed ({names}), which no run would record",
                f"load it so: {call}",
            )
