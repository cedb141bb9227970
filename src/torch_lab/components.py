"""Components: what a config function returns, checked.

A mistake here would otherwise show minutes later, deep inside Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch_lab.errors import ComponentsError, did_you_mean
from torch_lab.utils import length_of

if TYPE_CHECKING:
    import pytorch_lightning as pl

__all__ = ["InferComponents", "TrainComponents", "each_loader"]

_T = TypeVar("_T")
_LOADERS = ("train_dataloaders", "val_dataloaders", "test_dataloaders")
_STEPS = {
    "train_dataloader": "training_step",
    "val_dataloader": "validation_step",
    "test_dataloader": "test_step",
}


@dataclass(frozen=True)
class TrainComponents:
    """What `train_config` returned: a module, and either loaders or a datamodule."""

    module: pl.LightningModule
    train_dataloaders: Any = None
    val_dataloaders: Any = None
    test_dataloaders: Any = None
    datamodule: pl.LightningDataModule | None = None
    callbacks: Sequence[pl.Callback] = ()
    hooks: frozenset[str] = frozenset()
    """What there is data for: `train_dataloader`, `val_dataloader`, `test_dataloader`."""

    @classmethod
    def parse(cls, value: object, function: str) -> TrainComponents:
        """Return `value`, which `function` returned, checked.

        Raises:
            ComponentsError: A wrong or missing key, a wrong type, or no data.
        """
        returned = _Returned(value, function)
        if returned.has("datamodule"):
            for key in filter(returned.has, _LOADERS):
                raise returned.error(f"returned a datamodule and {key}; return one of them")
            returned.check_keys(["module"], ["datamodule", *_LOADERS, "callbacks"])
            data: dict[str, Any] = {"datamodule": returned.datamodule()}
            hooks = returned.hooks_of_datamodule()
        else:
            returned.check_keys(
                ["module", "train_dataloaders"], [*_LOADERS[1:], "datamodule", "callbacks"]
            )
            data = {key: returned.loaders(key) for key in _LOADERS}
            hooks = {hook for hook in _STEPS if data[f"{hook}s"] is not None}
        steps = [step for hook, step in _STEPS.items() if hook in hooks]
        module = returned.module_with("configure_optimizers", *steps)
        return cls(module, callbacks=returned.callbacks(), hooks=frozenset(hooks), **data)


@dataclass(frozen=True)
class InferComponents:
    """What `infer_config` returned."""

    module: pl.LightningModule
    predict_dataloaders: Any
    callbacks: Sequence[pl.Callback] = ()

    @classmethod
    def parse(cls, value: object, function: str) -> InferComponents:
        """Return `value`, which `function` returned, checked.

        Raises:
            ComponentsError: A wrong or missing key, a wrong type, or no data.
        """
        returned = _Returned(value, function)
        returned.check_keys(["module", "predict_dataloaders"], ["callbacks"])
        return cls(returned.module(), returned.loaders("predict_dataloaders"), returned.callbacks())


class _Returned:
    """What a config function returned, with the place to name in errors."""

    def __init__(self, value: object, function: str) -> None:
        self.function = function
        if not isinstance(value, Mapping):
            raise self.error(f"must return a dictionary, not {type(value).__name__}")
        self.values = value

    def error(self, message: str, hint: str | None = None) -> ComponentsError:
        return ComponentsError(f"{self.function} {message}", hint)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def check_keys(self, required: Iterable[str], optional: Iterable[str]) -> None:
        known = [*required, *optional]
        for key in self.values:
            if key not in known:
                raise self.error(
                    f"returned the unknown key {key!r}{did_you_mean(str(key), known)}",
                    f"it may return: {', '.join(known)}",
                )
        for key in required:
            if not self.has(key):
                raise self.error(f"returned no {key!r}")

    def module(self) -> pl.LightningModule:
        import pytorch_lightning as pl

        return self._instance("module", pl.LightningModule)

    def module_with(self, *hooks: str) -> pl.LightningModule:
        """Return the module, after a look that its class defines `hooks`."""
        import pytorch_lightning as pl
        from pytorch_lightning.utilities.model_helpers import is_overridden

        module = self.module()
        own = getattr(module, "_orig_mod", module)
        for hook in hooks:
            if not is_overridden(hook, own, pl.LightningModule):
                raise self.error(f"returned a {_kind(module)} as module, which defines no {hook}")
        return module

    def datamodule(self) -> pl.LightningDataModule:
        import pytorch_lightning as pl

        return self._instance("datamodule", pl.LightningDataModule)

    def hooks_of_datamodule(self) -> set[str]:
        """Return the hooks by which the datamodule gives data."""
        import pytorch_lightning as pl
        from pytorch_lightning.utilities.model_helpers import is_overridden

        own = self.datamodule()
        return {hook for hook in _STEPS if is_overridden(hook, own, pl.LightningDataModule)}

    def callbacks(self) -> Sequence[pl.Callback]:
        import pytorch_lightning as pl

        given = self.values.get("callbacks") or []
        if not isinstance(given, (list, tuple)):
            raise self.error(f"returned callbacks as {_kind(given)}; expected a list")
        for index, callback in enumerate(given):
            if not isinstance(callback, pl.Callback):
                raise self.error(
                    f"returned callbacks[{index}] as {_kind(callback)}; expected a Callback"
                )
        return list(given)

    def loaders(self, key: str) -> Any:
        """Return the loaders under `key`, after a look that there is something in them."""
        from torch.utils.data import Dataset

        given = self.values.get(key)
        if given is None:
            return None
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise self.error(f"returned {key} as {_kind(given)}; expected a DataLoader, or several")
        for name, loader in each_loader(key, given):
            if isinstance(loader, Dataset) or not isinstance(loader, Iterable):
                raise self.error(f"returned {name} as {_kind(loader)}; expected a DataLoader")
            self._check_not_empty(name, loader)
        return given

    def _instance(self, key: str, kind: type[_T]) -> _T:
        value = self.values[key]
        # What torch.compile makes of a module is no LightningModule; Lightning unwraps it too.
        if isinstance(getattr(value, "_orig_mod", value), kind):
            return value  # type: ignore[no-any-return]
        hint = None
        if type(value).__module__.startswith("lightning."):
            hint = "it comes from the package lightning; import pytorch_lightning instead"
        elif any(base.__module__.startswith("lightning.") for base in type(value).__mro__):
            hint = "its base comes from the package lightning; import pytorch_lightning instead"
        raise self.error(f"returned {key} as {_kind(value)}; expected a {kind.__name__}", hint)

    def _check_not_empty(self, name: str, loader: object) -> None:
        dataset = getattr(loader, "dataset", None)
        if length_of(dataset) == 0:
            raise self.error(f"returned {name} over an empty dataset ({type(dataset).__name__})")
        if length_of(loader) == 0:
            raise self.error(
                f"returned {name} without a single batch",
                "is drop_last set, with fewer samples than a batch?",
            )


def each_loader(name: str, given: object) -> Iterator[tuple[str, object]]:
    """Yield every loader in lists, dictionaries and Lightning's `CombinedLoader`.

    Args:
        name: The name of `given`, to name its parts by.
        given: A loader, or several.
    """
    given = getattr(given, "iterables", given)
    if isinstance(given, Mapping):
        for key, value in given.items():
            yield from each_loader(f"{name}[{key!r}]", value)
    elif isinstance(given, (list, tuple)):
        for index, value in enumerate(given):
            yield from each_loader(f"{name}[{index}]", value)
    else:
        yield name, given


def _kind(value: object) -> str:
    return value.__name__ + " itself" if isinstance(value, type) else type(value).__name__
