"""Weights loaded from checkpoints: all, or those that fit, or those that are chosen."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torch_lab.checkpoints import AtomicCheckpointIO, Source, find_source
from torch_lab.errors import CheckpointError
from torch_lab.hparams import CheckpointSection
from torch_lab.modules import LabModule
from torch_lab.weights import LoadReport, load_source, load_weights, loaded_from


def network(classes: int = 2) -> nn.Module:
    """Return an encoder, with buffers, and a head."""
    module = nn.Module()
    module.add_module("encoder", nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    module.add_module("head", nn.Linear(3, classes))
    return module


def filled(module: nn.Module, value: float) -> nn.Module:
    """Return `module` with `value` in all of its weights."""
    for tensor in module.state_dict().values():
        tensor.fill_(value)
    return module


def values(module: nn.Module) -> dict[str, set[float]]:
    """Return what stands in the weights of `module`, by name."""
    return {name: set(w.flatten().tolist()) for name, w in module.state_dict().items()}


ENCODER = [
    "encoder.0.weight",
    "encoder.0.bias",
    "encoder.1.weight",
    "encoder.1.bias",
    "encoder.1.running_mean",
    "encoder.1.running_var",
    "encoder.1.num_batches_tracked",
]


def source(folder: Path, state: Any) -> Source:
    """Return a checkpoint that holds `state`."""
    path = folder / "some.ckpt"
    AtomicCheckpointIO().save_checkpoint(state, path)
    return find_source(str(path), "last", folder)


@pytest.fixture
def ones(tmp_path: Path) -> Source:
    """A checkpoint of the network with two classes, all of it ones."""
    return source(tmp_path, {"state_dict": filled(network(), 1).state_dict()})


def test_what_has_the_same_name_and_shape_is_loaded(ones: Source) -> None:
    """`strict=False` leaves the rest as it is, and the report names it."""
    module = filled(network(classes=5), 0)
    module.add_module("neck", filled(nn.Linear(1, 1), 0))
    report = load_source(module, ones, CheckpointSection(strict=False))
    assert sorted(report.loaded) == sorted(ENCODER)
    assert report.missing == ("neck.weight", "neck.bias")
    assert report.unexpected == report.skipped == ()
    assert str(report) == (
        "loaded 7 of 11 tensors; not in the checkpoint: neck.weight, neck.bias; "
        "other shape: head.weight ((2, 3), not (5, 3)), head.bias ((2,), not (5,))"
    )
    assert {name for name, found in values(module).items() if found == {1.0}} == set(ENCODER)


def test_what_the_model_does_not_have_is_told(ones: Source) -> None:
    """It is no reason to refuse, if that is asked for."""
    module = network()
    del module.head
    with pytest.raises(CheckpointError, match=r"it has head\.bias, head\.weight, which"):
        load_source(module, ones)
    report = load_source(module, ones, CheckpointSection(strict=False))
    assert str(report) == "loaded 7 of 7 tensors; not in the model: head.bias, head.weight"


@pytest.mark.parametrize(
    "patterns",
    [
        {"include": ("encoder.*",)},
        {"exclude": ("head.*",)},
        {"include": ("*",), "exclude": ("h*",)},
    ],
)
def test_patterns_choose(ones: Source, patterns: dict[str, tuple[str, ...]]) -> None:
    """What they leave out may have another shape, also when the rest must fit exactly."""
    module = filled(network(classes=5), 0)
    report = load_source(module, ones, CheckpointSection(**patterns))
    assert sorted(report.loaded) == sorted(ENCODER)
    assert report.skipped == ("head.weight", "head.bias")
    assert values(module)["head.weight"] == {0.0}
    assert values(module)["encoder.0.weight"] == {1.0}


def test_what_is_chosen_must_fit_exactly(ones: Source) -> None:
    """`strict` holds for what the patterns choose."""
    module = network(classes=5)
    with pytest.raises(CheckpointError, match=r"head\.weight has the shape \(2, 3\), not \(5, 3\)"):
        load_source(module, ones, CheckpointSection(include=("head.*",)))


def test_nothing_loaded_is_refused(ones: Source) -> None:
    """A model that has none of the names would start from chance, in silence."""
    module = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(CheckpointError, match="nothing of .*some.ckpt fits the model: loaded 0 of"):  # noqa: RUF043
        load_source(module, ones, CheckpointSection(strict=False))
    with pytest.raises(CheckpointError, match="left out by the patterns"):
        load_source(network(), ones, CheckpointSection(exclude=("*",)))
    assert loaded_from(module) is None


def test_a_pattern_that_matches_nothing_is_refused(ones: Source) -> None:
    """It is a typo, or a part that was meant as a whole."""
    for pattern, mend in (("encodr.*", "encoder.*"), ("head", "head.*")):
        with pytest.raises(CheckpointError) as caught:
            load_source(network(), ones, CheckpointSection(include=("*", pattern)))
        assert caught.value.message.startswith(
            f"include[1]: the pattern {pattern!r} matches no weight"
        )
        assert caught.value.message.endswith(f"did you mean {mend}?")


def test_what_hparams_ask_for_is_named_with_file_and_key(ones: Source) -> None:
    """A pattern by its key, weights that do not fit by the section."""
    script = Path("toys/hparams.py")
    wrong = CheckpointSection(exclude=("head.*", "haed.*"))
    with pytest.raises(
        CheckpointError, match=r"^toys/hparams\.py: checkpoint\.exclude\[1\]: the p"
    ):
        load_source(network(), ones, wrong, script=script)
    with pytest.raises(CheckpointError, match=r"^toys/hparams\.py: checkpoint: .* the shape"):
        load_source(network(classes=5), ones, CheckpointSection(), script=script)


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapped", ["bare", "compiled", "lab", "compiled in lab", "compiled lab"])
def test_names_are_those_of_the_bare_model(tmp_path: Path, prefix: str, wrapped: str) -> None:
    """Neither compilers nor several devices, when saving or when loading, change what fits."""
    state = filled(network(), 1).state_dict()
    given = source(tmp_path, {prefix + name: value for name, value in state.items()})
    bare = filled(network(), 0)
    module: Any = {
        "bare": lambda: bare,
        "compiled": lambda: torch.compile(bare, backend="eager"),
        "lab": lambda: LabModule(bare),
        "compiled in lab": lambda: LabModule(torch.compile(bare, backend="eager")),
        "compiled lab": lambda: torch.compile(LabModule(bare), backend="eager"),
    }[wrapped]()
    report = load_source(module, given, CheckpointSection(include=("encoder.*", "head.bias")))
    assert len(report.loaded) == 8
    assert values(bare)["encoder.1.running_var"] == values(bare)["head.bias"] == {1.0}
    assert values(bare)["head.weight"] == {0.0}
    assert str(loaded_from(module)).endswith("some.ckpt")


def test_weights_of_another_lightning_module_fit_the_bare_model(tmp_path: Path) -> None:
    """They lie below `model.`, beside those of the loss."""
    state = {f"model.{name}": w for name, w in filled(network(), 1).state_dict().items()}
    given = source(tmp_path, {"state_dict": {**state, "loss.weight": torch.ones(2)}})
    bare = filled(network(), 0)
    assert len(load_source(bare, given).loaded) == 9
    assert values(bare)["head.weight"] == {1.0}


def test_a_module_with_a_loss_takes_the_rest_too(tmp_path: Path) -> None:
    """In Lightning's own form names are matched as a whole, and patterns mean the model's."""
    module = LabModule(filled(network(), 0))
    module.add_module("loss", nn.CrossEntropyLoss(weight=torch.zeros(2)))
    ones = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
    given = source(tmp_path, {"state_dict": ones})
    report = load_source(module, given, CheckpointSection(exclude=("head.*",)))
    assert "loss.weight" in report.loaded and report.skipped == ("head.weight", "head.bias")
    assert values(module)["loss.weight"] == {1.0}


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    """The error says what it holds instead."""
    given = source(tmp_path, {"epoch": 3, "model": {"weight": torch.ones(1)}})
    with pytest.raises(CheckpointError, match="some.ckpt holds no weights") as caught:  # noqa: RUF043
        load_source(network(), given)
    assert caught.value.hint == "it holds: epoch, model"


def test_lazy_layers_take_their_shape_from_the_checkpoint(tmp_path: Path) -> None:
    """A layer that was not called yet has no shape to compare."""
    given = source(tmp_path, filled(nn.Linear(4, 3), 1).state_dict())
    lazy = nn.LazyLinear(3)
    assert len(load_source(lazy, given).loaded) == 2
    assert lazy.weight.shape == (3, 4)


def test_load_weights_tells_what_was_left_out(
    ones: Source, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says how much was loaded, and what was not."""
    caplog.set_level(logging.INFO, logger="torch_lab")
    module = network()
    assert load_weights(module, ones.path) is module
    assert caplog.text.endswith("loaded 9 of 9 tensors\n")
    load_weights(network(classes=5), ones.path, strict=False, exclude="encoder.1.*")
    assert "weights from" in caplog.text and "loaded 2 of 9 tensors" in caplog.text


def test_a_report_shortens_long_lists() -> None:
    """Three names are enough to see what is meant."""
    report = LoadReport(loaded=("a",), missing=("b", "c", "d", "e", "f"))
    assert str(report) == "loaded 1 of 6 tensors; not in the checkpoint: b, c, d and 2 more"
