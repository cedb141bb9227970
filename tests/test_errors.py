"""What messages name: the choice that was probably meant."""

from __future__ import annotations

import inspect

import pytest
import pytorch_lightning as pl

from torch_lab.errors import did_you_mean

ARGUMENTS = list(inspect.signature(pl.Trainer.__init__).parameters)[1:]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("MAX_EPOCHS", "max_epochs"),
        ("Max-Epochs", "max_epochs"),
        ("maxEpochs", "max_epochs"),
        ("max_epoch", "max_epochs"),
        ("epochs", "max_epochs"),
        ("steps", "max_steps"),
        ("PRECISON", "precision"),
    ],
)
def test_names_are_suggested_whatever_their_case(typed: str, meant: str) -> None:
    """Of those that are as near, the first; sets have no order, so that the alphabet's counts."""
    for choices in (ARGUMENTS, set(ARGUMENTS), frozenset(ARGUMENTS)):
        assert did_you_mean(typed, choices) == f"; did you mean {meant}?"


def test_the_first_of_equals() -> None:
    """Whoever lists the choices may list the likelier ones first."""
    choices = {"eeg": 1, "ecg": 2}
    assert did_you_mean("egg", choices) == did_you_mean("egg", choices.keys())
    assert did_you_mean("egg", choices) == "; did you mean eeg?"
    assert did_you_mean("egg", reversed(choices)) == "; did you mean ecg?"
    assert did_you_mean("egg", set(choices)) == "; did you mean ecg?"


@pytest.mark.parametrize("typed", ["banana", "banana.py", "", "XYZ", "_"])
def test_no_name_is_suggested_for_what_is_near_to_none(typed: str) -> None:
    """A wrong guess would send people the wrong way."""
    assert did_you_mean(typed, [*ARGUMENTS, "__main__.py", "hparams.py"]) == ""
    assert did_you_mean(typed, []) == ""


def test_the_choice_is_named_as_it_is() -> None:
    """Its case does not count either, but is kept."""
    assert did_you_mean("adamw", ["SGD", "AdamW"]) == "; did you mean AdamW?"
