"""Whoever mistypes a key is told the one that was meant."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

import pytest

from torch_lab import suggestions
from torch_lab.suggestions import nearest_key

TEXT = """
    seed loader_timeout
    task.project_name task.task_name task.tags task.output_uri
    checkpoint.checkpoint_task_id checkpoint.checkpoint_name checkpoint.weights_only
    checkpoint.strict checkpoint.include checkpoint.exclude checkpoint.every_minutes
    checkpoint.every_n_steps checkpoint.keep checkpoint.give_up_after
    trainer.init.max_epochs trainer.init.min_epochs trainer.init.max_steps trainer.init.max_time
    trainer.init.accelerator trainer.init.devices trainer.init.strategy trainer.init.precision
    trainer.init.accumulate_grad_batches trainer.init.gradient_clip_val
    trainer.init.check_val_every_n_epoch trainer.init.limit_train_batches
    trainer.init.limit_val_batches trainer.init.log_every_n_steps
    trainer.init.num_sanity_val_steps trainer.init.deterministic
    trainer.init.enable_progress_bar trainer.validate.verbose
    config.dataset config.dataset_id config.learning_rate config.weight_decay config.batch_size
    config.num_workers config.monitor config.monitor_mode config.warmup_steps
    config.label_smoothing config.epochs config.milestones config.image_size
    config.model.name config.model.dim config.model.depth config.model.num_heads
    config.model.dropout config.model.mlp_ratio config.model.patch_size
    config.optimizer.name config.optimizer.betas config.optimizer.eps
    config.scheduler.name config.scheduler.gamma config.scheduler.patience
    config.augmentation.crop config.augmentation.flip config.augmentation.mixup
    config.loss.gamma config.loss.temperature config.ema.decay
    config.heads[0].name config.heads[0].num_classes
    config.heads[1].name config.heads[1].num_classes
"""
KEYS = TEXT.split()
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def letter_in(key: str, draw: random.Random) -> int:
    return draw.choice([place for place, letter in enumerate(key) if letter.isalpha()])


def omission(key: str, draw: random.Random) -> str:
    place = letter_in(key, draw)
    return key[:place] + key[place + 1 :]


def doubling(key: str, draw: random.Random) -> str:
    place = letter_in(key, draw)
    return key[:place] + key[place] + key[place:]


def transposition(key: str, draw: random.Random) -> str:
    place = draw.choice([match.start() for match in re.finditer(r"(?=([a-z])(?!\1)[a-z])", key)])
    return key[:place] + key[place + 1] + key[place] + key[place + 2 :]


def neighbour(key: str, draw: random.Random) -> str:
    """Replace a letter by one beside it on the keyboard."""
    place = letter_in(key, draw)
    row = next(row for row in KEYBOARD if key[place] in row)
    column = row.index(key[place])
    near = [row[at] for at in (column - 1, column + 1) if 0 <= at < len(row)]
    return key[:place] + draw.choice(near) + key[place + 1 :]


def separator(key: str, draw: random.Random) -> str:
    return key.replace("_", draw.choice(["-", "", " "]))


def case(key: str, draw: random.Random) -> str:
    camel = re.sub(r"_([a-z])", lambda match: match[1].upper(), key)
    return draw.choice([camel, key.upper(), key.title()])


def wrong_section(key: str, draw: random.Random) -> str:
    section, _, name = key.partition(".")
    others = {"task", "checkpoint", "trainer", "config"} - {section}
    return f"{draw.choice(sorted(others))}.{name}" if name else key


def missing_section(key: str, draw: random.Random) -> str:
    parts = key.split(".")
    return ".".join(parts[draw.randrange(1, len(parts)) :]) if len(parts) > 1 else key


KINDS: tuple[Callable[[str, random.Random], str], ...] = (
    omission,
    doubling,
    transposition,
    neighbour,
    separator,
    case,
    wrong_section,
    missing_section,
)


def typos(seed: int) -> Iterator[tuple[str, str]]:
    """Yield 200 keys that are none, as many of each kind, with those that were meant."""
    draw = random.Random(seed)
    for kind in KINDS:
        for _ in range(200 // len(KINDS)):
            typed = meant = ""
            while typed in (*KEYS, ""):
                meant = draw.choice(KEYS)
                typed = kind(meant, draw)
            yield typed, meant


def test_the_key_that_was_meant_is_suggested() -> None:
    """Of 200 typos in 95 % at the least; what is left has a name that several sections have."""
    pairs = list(typos(seed=0))
    wrong = [(typed, meant) for typed, meant in pairs if nearest_key(typed, KEYS) != meant]
    print(f"{1 - len(wrong) / len(pairs):.1%} of {len(pairs)} right; wrong: {wrong}")
    assert len(pairs) == 200 and len(wrong) <= 10


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("config.learning_rte", "config.learning_rate"),
        ("learning_rate", "config.learning_rate"),
        ("trainer.learning-rate", "config.learning_rate"),
        ("config.learningRate", "config.learning_rate"),
        ("LR", "config.optimizer.lr"),
        ("config.optimizer.lt", "config.optimizer.lr"),
        ("lt", "config.optimizer.lr"),
        ("config_learning_rate", "config.learning_rate"),
        ("config.optimizers[2].lr", "config.optimizers[1].lr"),
        ("config.optimizers.1.momentum", "config.optimizers[1].momentum"),
        ("trainer.max_epochs", "trainer.init.max_epochs"),
        ("trainer.init.max_epoch", "trainer.init.max_epochs"),
    ],
)
def test_suggestions(typed: str, meant: str) -> None:
    """A slip of a letter, another spelling, and the wrong section."""
    keys = [
        "config.learning_rate",
        "config.optimizer.lr",
        "config.optimizers[1].lr",
        "config.optimizers[1].momentum",
        "trainer.init.max_epochs",
        "trainer.init.min_epochs",
    ]
    assert nearest_key(typed, keys) == meant


@pytest.mark.parametrize("typed", ["banana", "config.banana", "config", "", ".", "config.x", "[0]"])
def test_nothing_is_suggested_for_what_is_near_to_nothing(typed: str) -> None:
    """A wrong guess would send people the wrong way."""
    assert nearest_key(typed, KEYS) is None
    assert nearest_key(typed, []) is None


def test_the_first_of_equals() -> None:
    """Which of two sections was meant, nobody can tell."""
    keys = ["config.loss.gamma", "config.noise.gamma"]
    assert nearest_key("gamma", keys) == "config.loss.gamma"
    assert nearest_key("gamma", reversed(keys)) == "config.noise.gamma"


@pytest.mark.parametrize(
    ("typed", "other"),
    [
        ("config.optimizer.lr", "config.optimizer.wd"),
        ("config.optimizer.betas", "config.optimizer.eps"),
        ("config.augmentation.crop", "config.augmentation.flip"),
        ("config.b", "config.m"),
        ("config.model.x", "config.model.y"),
    ],
)
def test_a_section_in_common_makes_no_name_near(typed: str, other: str) -> None:
    """However long it is: who is right about the section has not mistyped that name."""
    assert nearest_key(typed, [other]) is None


def calls(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Return a list of the arguments of all calls of a function from now on."""
    found: list[tuple[object, ...]] = []
    original = getattr(suggestions, name)
    monkeypatch.setattr(suggestions, name, lambda *args: found.append(args) or original(*args))
    return found


def test_sections_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for each way through them, nor for each of the keys that share them."""
    compared = calls("_difference", monkeypatch)
    typed = ".".join(f"inner{number}" for number in range(7)) + ".learning_rate"
    keys = [".".join("section" + "x" * number for number in range(7)) + f".lr{n}" for n in range(9)]
    assert nearest_key(typed, keys) is None
    assert nearest_key(typed.replace("rate", "rat"), [*keys, *[f"{keys[0]}.learning_rate"]])
    assert len(compared) <= 2 * (7 * 8 + len(keys) + 2)


def test_names_of_other_letters_are_not_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of keys are compared with each other: most of them are far from each other."""
    edited = calls("_edits", monkeypatch)
    assert nearest_key("config.learning_rat", ["config.momentum_of", "config.learning_rate"])
    assert {wanted for _, wanted in edited} == {"learningrate", "configlearningrate"}
