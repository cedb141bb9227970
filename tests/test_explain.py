"""`torch-lab explain` names the file and line of everything that has set a value."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import Lab, Result
from torch_lab import cli
from torch_lab.afresh import imported_afresh
from torch_lab.errors import HparamsError
from torch_lab.experiment import Experiment
from torch_lab.explaining import explained, layer_warnings
from torch_lab.provenance import DELETED, Key
from torch_lab.scripts import import_script_as_module, layers_of


def explain(lab: Lab, *words: str | Path) -> Result:
    """Run `torch-lab explain`."""
    return lab._main(cli.explain, *words)


def warnings_of(lab: Lab) -> str:
    """Return what is said of the layers of `hparams.py`."""
    return "\n".join(layer_warnings(Experiment.load(lab.path)))


# Three layers. A comment marks each line that is looked for.

LAYERS = {
    "base": """
        \"\"\"The base.\"\"\"

        from torch_lab.utils import ref

        hparams = {
            "seed": 3,  # seed
            "trainer": {"init": {"max_epochs": 30}},  # epochs
            "config": {
                "lr": 0.1,  # lr
                "momentum": 0.9,  # momentum
                "milestones": [10],  # milestones
                "warmup": {
                    "steps": 500,  # steps
                    "factor": 0.1,  # factor
                },
                "name": "base",  # name
                "folder": ref("runs/{config.name}-{config.lr}"),  # folder
                "rest": ref("trainer.init.max_epochs"),  # rest
                "parts": [{"dim": 2}, {"dim": 3}],  # parts
            },
        }
    """,
    "longer": """
        from torch_lab.utils import import_script_as_module

        hparams = import_script_as_module("base.py").hparams

        init = hparams["trainer"]["init"]
        init["max_epochs"] = 3 * init["max_epochs"]  # epochs
        for share in (0.5, 0.75):
            hparams["config"]["milestones"].append(int(share * init["max_epochs"]))  # milestones
        hparams["config"].update(
            momentum=0.8,  # momentum
            name=f"longer-{init['max_epochs']}",  # name
        )
        del hparams["config"]["warmup"]["factor"]  # factor
    """,
    "hparams": """
        from torch_lab.utils import import_script_as_module

        hparams = import_script_as_module("longer.py").hparams

        config = hparams["config"]
        if hparams["seed"] == 3:
            config["lr"] = 0.3  # lr
        config["milestones"].append(80)  # milestones
        config["parts"][1]["dim"] = 5  # parts
        config.pop("warmup")  # steps
        config |= {
            "decay": 1e-4,  # decay
        }
    """,
}
CHAINS: dict[str, list[tuple[str, Any]]] = {
    "seed": [("base", 3)],
    "trainer.init.max_epochs": [("longer", 90), ("base", 30)],
    "config.lr": [("hparams", 0.3), ("base", 0.1)],
    "config.momentum": [("longer", 0.8), ("base", 0.9)],
    "config.milestones": [
        ("hparams", [10, 45, 67, 80]),
        ("longer", [10, 45, 67]),
        ("base", [10]),
    ],
    "config.warmup.steps": [("hparams", DELETED), ("base", 500)],
    "config.warmup.factor": [("longer", DELETED), ("base", 0.1)],
    "config.name": [("longer", "longer-90"), ("base", "base")],
    "config.folder": [("base", "runs/longer-90-0.3")],
    "config.rest": [("base", 90)],
    "config.parts": [("hparams", [{"dim": 2}, {"dim": 5}]), ("base", [{"dim": 2}, {"dim": 3}])],
    "config.decay": [("hparams", 1e-4)],
}


@pytest.fixture
def layered(lab: Lab) -> Lab:
    for name, text in LAYERS.items():
        lab.write(f"{name}.py", text)
    return lab


def place_of(lab: Lab, name: str, mark: str) -> tuple[str, int]:
    """Return the file, and the line in it that ends with the comment `mark`."""
    path = lab.folder / f"{name}.py"
    lines = path.read_text().splitlines()
    return str(path), lines.index(next(line for line in lines if line.endswith(f"# {mark}"))) + 1


@pytest.mark.parametrize("key", CHAINS)
def test_each_value_of_three_layers_has_its_files_and_lines(layered: Lab, key: str) -> None:
    """Computed, appended, deleted, overridden and interpolated ones, the newest first."""
    result = explain(layered, layered.path, key, "--json")
    (found,) = json.loads(result.out)["keys"]
    mark = key.rpartition(".")[2].removeprefix("max_")
    wanted = [(*place_of(layered, name, mark), repr(value)) for name, value in CHAINS[key]]
    assert [(each["file"], each["line"], each["value"]) for each in found["changes"]] == wanted
    assert found["key"] == key and found["is_deleted"] == (CHAINS[key][0][1] is DELETED)


def test_all_that_there_is_is_explained(layered: Lab) -> None:
    """Without keys every value is named, once, with the line that holds marked."""
    result = explain(layered, layered.path)
    lines = result.out.splitlines()
    named = [line.split() for line in lines if line[0] not in "> "]
    assert sorted(name for name, *_ in named) == sorted(CHAINS)
    gone = [key for key, chain in CHAINS.items() if chain[0][1] is DELETED]
    assert sorted(name for name, *_ in named[-len(gone) :]) == sorted(gone)
    assert sum(line.startswith("> ") for line in lines) == len(CHAINS)
    file, line = place_of(layered, "hparams", "lr")
    at = lines.index(next(line for line in lines if line.startswith("config.lr ")))
    assert lines[at + 1].split() == [">", f"{Path(file).relative_to(layered.root)}:{line}", "0.3"]


def test_sections_are_explained_with_all_in_them(layered: Lab) -> None:
    """Also those that were removed."""
    experiment = Experiment.load(layered.path)
    names = [each.name for each in explained(experiment, ["config.warmup", "seed"])]
    assert sorted(names) == ["config.warmup.factor", "config.warmup.steps", "seed"]


def test_a_key_that_never_was_is_an_error_with_the_nearest(layered: Lab) -> None:
    with pytest.raises(HparamsError, match=r"has no config\.momentun; did you mean config\.mom"):
        explained(Experiment.load(layered.path), ["config.momentun"])
    assert explain(layered, layered.path, "config.momentun").code == 2


def test_to_load_again_is_to_begin_again(layered: Lab) -> None:
    """What a script did when it ran before, in the same process, is none of its history."""
    first, again = (Experiment.load(layered.path).histories for _ in range(2))
    assert first == again


def test_what_a_script_prints_is_no_part_of_it(lab: Lab) -> None:
    lab.write("hparams.py", 'print("printed")\nhparams = {"seed": 1}\n')
    result = explain(lab, lab.path, "--json")
    assert [each["key"] for each in json.loads(result.out)["keys"]] == ["seed"]
    assert "printed" in result.err


def test_secrets_are_masked(lab: Lab) -> None:
    lab.hparams("hparams", {"config": {"api_key": "hunter2hunter2"}})
    result = explain(lab, lab.path)
    assert "config.api_key" in result.out and "hunter2" not in result.out + result.err


def test_empty_hparams_have_nothing_to_explain(lab: Lab) -> None:
    lab.write("hparams.py", "hparams = {}\n")
    result = explain(lab, lab.path)
    assert (result.code, result.out, result.err) == (0, "", "")


# A project with mistakes in its layers.


@pytest.fixture
def wrong_base(lab: Lab) -> Lab:
    """A copied experiment, whose layer still stands on the base of the one it was copied from."""
    other = "../01_other"
    lab.write(f"{other}/__main__.py", (lab.folder / "__main__.py").read_text())
    config = {"lr": 0.1, "warmup": 500, "decay": 1e-4}
    lab.write(f"{other}/hparams.py", f"hparams = {{'config': {config | {'lr': 1.0}}}}\n")
    lab.write("base.py", f"hparams = {{'config': {config | {'epochs_of_rest': 3}}}}\n")
    lab.write(
        "hparams.py",
        """
        from torch_lab.utils import import_script_as_module

        hparams = import_script_as_module("../01_other/hparams.py").hparams

        hparams["config"]["decay"] = 1e-4
        hparams["config"]["warm_up"] = 100
        """,
    )
    return lab


MISTAKES = [
    "hparams.py is layered on toys/experiments/01_other/hparams.py, which is of another experiment",
    "hparams.py:6 sets config.decay to 0.0001, which it was already (toys/experiments/01_other/",
    "hparams.py:7 adds config.warm_up, which no layer before it has; did you mean config.warmup (",
]


@pytest.mark.parametrize("command", ["explain", "check"])
def test_a_wrong_base_is_said(wrong_base: Lab, command: str) -> None:
    """And what comes of it: both commands say so, and the other experiment has nothing to hear."""
    options = {"explain": [], "check": ["--no-batch"]}[command]
    lab = wrong_base
    result = lab._main(getattr(cli, command), lab.path, *options)
    told = " ".join((result.out + result.err).split())
    for mistake in MISTAKES:
        assert f"toys/experiments/00_toy/{mistake}" in told
    other = lab.folder.parent / "01_other" / "hparams.py"
    result = lab._main(getattr(cli, command), other, *options)
    assert result.code == 0 and "warning" not in result.out + result.err


def test_a_folder_of_bases_is_no_experiment(lab: Lab) -> None:
    lab.write("../bases/base.py", 'hparams = {"seed": 1}\n')
    script = "from torch_lab.utils import import_script_as_module as base\n"
    lab.write("hparams.py", script + 'hparams = base("../bases/base.py").hparams\n')
    assert warnings_of(lab) == ""


def test_sound_layers_have_no_warnings(lab: Lab) -> None:
    """A computed value that comes out as it was has been set in vain, too; others have not."""
    lab.write("base.py", 'hparams = {"config": {"lr": 0.1, "dims": [1]}}\n')
    script = "from torch_lab.utils import import_script_as_module as base\n"
    script += 'hparams = base("base.py").hparams\n'
    lab.write("hparams.py", script + 'hparams["config"].update(lr=0.2, dims=[2])\n')
    assert warnings_of(lab) == ""
    lab.write("hparams.py", script + 'hparams["config"]["lr"] = 0.2 / 2\n')
    assert "hparams.py:3 sets config.lr to 0.1, which it was already" in warnings_of(lab)


# Layers that nobody has thought of.


@dataclass
class Statement:
    """A statement of a generated script, and the lines of it that set what it sets."""

    lines: list[str]
    line: int = 0
    """The line that sets all but what `lines_of` has, from 0."""
    lines_of: dict[Key, int] = field(default_factory=dict)
    """The lines of keys that it spells out, for what is below them too."""

    def line_of(self, key: Key) -> int:
        ends = range(len(key), 0, -1)
        return next(
            (self.lines_of[key[:end]] for end in ends if key[:end] in self.lines_of), self.line
        )


NESTED: dict[Key, int] = {("a",): 1, ("b",): 2, ("b", "c"): 3}
"""The lines of what `Author.nested` writes."""


class Author:
    """Writes statements that change `hparams`, whatever is in them; no value comes twice."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.count = 0

    def statement(self, hparams: dict[str, Any]) -> Statement:
        """Return a statement that runs, and changes something."""
        at, held = self.draw.choice(list(sections(hparams)))
        kinds = [self.stored, self.nested, self.updated, self.looped, self.called, self.rebound]
        kinds += [self.unpacked, self.computed]
        if held:
            kinds += [self.removed, self.popped, self.shared]
        if any(type(value) is list for value in held.values()):
            kinds += [self.listed] * 3
        return self.draw.choice(kinds)(at, held)

    def name(self, held: dict[str, Any]) -> str:
        """Return a key, a new one or not; `config` stays, so that there is always a section."""
        names = [f"k{number}" for number in range(6)] + [key for key in held if key != "config"]
        return self.draw.choice(names)

    def value(self) -> str:
        self.count += 1
        number = self.count
        return self.draw.choice(
            [f"{number}", f"{number}.5", f"'v{number}'", f"[{number}]", f"[{{'x': {number}}}]"]
        )

    def place(self, at: Key) -> str:
        """Return how a script gets at the dictionary at a key."""
        return "hparams" + "".join(f"[{part!r}]" for part in at)

    def stored(self, at: Key, held: dict[str, Any]) -> Statement:
        return Statement([f"{self.place(at)}[{self.name(held)!r}] = {self.value()}"])

    def computed(self, at: Key, held: dict[str, Any]) -> Statement:
        name = self.name(held)
        self.count += 1
        return Statement(
            [
                f"number = len(repr(hparams)) + 10_000 * {self.count}",
                f"{self.place(at)}[{name!r}] = number",
            ],
            1,
        )

    def nested(self, at: Key, held: dict[str, Any]) -> Statement:
        name = self.name(held)
        lines = [f"{self.place(at)}[{name!r}] = {{"]
        lines += [f"    'a': {self.value()},", "    'b': {", f"        'c': {self.value()},"]
        return Statement(
            [*lines, "    },", "}"], 0, {(*at, name, *key): line for key, line in NESTED.items()}
        )

    def updated(self, at: Key, held: dict[str, Any]) -> Statement:
        one, other = self.draw.sample([f"u{number}" for number in range(4)], 2)
        lines = [
            f"{self.place(at)}.update(",
            f"    {one}={self.value()},",
            f"    {other}={self.value()},",
        ]
        return Statement([*lines, ")"], 0, {(*at, one): 1, (*at, other): 2})

    def unpacked(self, at: Key, held: dict[str, Any]) -> Statement:
        self.count += 1
        dictionary = f"dict.fromkeys(['p1', 'p2'], {self.count})"
        return Statement([f"{self.place(at)}.update({dictionary})"])

    def looped(self, at: Key, held: dict[str, Any]) -> Statement:
        self.count += 1
        lines = ["for name in ('l1', 'l2'):", f"    {self.place(at)}[name] = name + '{self.count}'"]
        return Statement(lines, 1)

    def called(self, at: Key, held: dict[str, Any]) -> Statement:
        lines = ["def change(section):", f"    section[{self.name(held)!r}] = {self.value()}"]
        return Statement([*lines, f"change({self.place(at)})"], 1)

    def rebound(self, at: Key, held: dict[str, Any]) -> Statement:
        lines = ["import copy", "hparams = copy.deepcopy(hparams)"]
        return Statement([*lines, f"{self.place(at)}[{self.name(held)!r}] = {self.value()}"], 2)

    def removed(self, at: Key, held: dict[str, Any]) -> Statement:
        name = self.draw.choice(list(held))
        if name == "config":
            return Statement([f"{self.place(at)}['config'] = {{'k0': {self.value()}}}"])
        return Statement([f"del {self.place(at)}[{name!r}]"])

    def popped(self, at: Key, held: dict[str, Any]) -> Statement:
        return Statement([f"{self.place(at)}.pop({self.name(held)!r}, None)"])

    def shared(self, at: Key, held: dict[str, Any]) -> Statement:
        """Put a value, maybe a dictionary, where another one is."""
        self.count += 1
        name = self.draw.choice(list(held))
        return Statement(
            [f"hparams['config']['s{self.count}'] = copied({self.place(at)}[{name!r}])"]
        )

    def listed(self, at: Key, held: dict[str, Any]) -> Statement:
        name = self.draw.choice([key for key, value in held.items() if type(value) is list])
        value = self.value()
        edits = [f".append({value})", f".insert(0, {value})", f"[:] = [{value}]"]
        if held[name]:
            edits += [f"[0] = {value}", f"[-1] = {{'x': {value}}}"]
            if type(held[name][0]) is dict:
                edits += [f"[0]['x'] = {value}", f"[0].update(y={value})"] * 2
        return Statement([f"{self.place(at)}[{name!r}]{self.draw.choice(edits)}"])


def sections(value: Any, at: Key = ()) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Yield the dictionaries in nested ones, and where they are."""
    yield at, value
    for key, part in value.items():
        if type(part) is dict:
            yield from sections(part, (*at, key))


def leaves(value: Any, path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield the values of nested dictionaries; an empty one is a value."""
    if type(value) is dict and (value or not path):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    else:
        yield path, value


def write_layers(lab: Lab, seed: int) -> tuple[dict[str, Any], dict[Key, tuple[str, int, Any]]]:
    """Write three layers, and run them in the plain way while they are written.

    Returns:
        What the hparams are in the end; and the file, the line and the value of the last change of
        each key, as seen from one statement to the next.
    """
    author = Author(seed)
    hparams: dict[str, Any] = {}
    last: dict[Key, tuple[str, int, Any]] = {}
    for number, name in enumerate(["base", "middle", "hparams"]):
        start = f'hparams = import_script_as_module("{["", "base", "middle"][number]}.py").hparams'
        lines = ["from copy import deepcopy as copied"]
        lines += ["from torch_lab.utils import import_script_as_module"]
        lines += [start if number else 'hparams = {"config": {}}']
        below = SimpleNamespace(hparams=hparams)
        names: dict[str, Any] = {"import_script_as_module": lambda path, below=below: below}
        exec("\n".join([*lines[:1], lines[2]]), names)
        before = dict(leaves(copy.deepcopy(names["hparams"])))
        if not number:
            last = {("config",): (name, 3, {})}
        for _ in range(author.draw.randint(2, 8)):
            statement = author.statement(names["hparams"])
            exec("\n".join(statement.lines), names)
            after = dict(leaves(copy.deepcopy(names["hparams"])))
            for key in {**before, **after}:
                is_section = any(each[: len(key)] == key for each in after if each != key)
                if before.get(key) == {} and is_section:
                    last.pop(key)
                elif repr(before.get(key, DELETED)) != repr(after.get(key, DELETED)):
                    line = len(lines) + 1 + statement.line_of(key)
                    last[key] = name, line, after.get(key, DELETED)
            lines += statement.lines
            before = after
        hparams = names["hparams"]
        lab.write(f"{name}.py", "\n".join(lines) + "\n")
    return hparams, last


def check_layering(lab: Lab, seed: int) -> None:
    """Check that recorded layers are those of a plain execution, with the line of each value."""
    hparams, last = write_layers(lab, seed)
    with imported_afresh(lab.root):
        layer = layers_of(import_script_as_module(lab.path))[-1]
    assert repr(layer.hparams) == repr(hparams), seed
    newest = {key: changes[-1] for key, changes in layer.recorder.histories.items()}
    there = {key: change.value for key, change in newest.items() if change.value is not DELETED}
    assert {key: repr(value) for key, value in there.items()} == {
        key: repr(value) for key, value in leaves(hparams)
    }, seed
    for key, (name, line, value) in last.items():
        assert key in newest, (seed, key)
        change = newest[key]
        found = change.file.stem, change.line, repr(change.value)
        assert found == (name, line, repr(value)), (seed, key)


@pytest.mark.parametrize("part", range(4))
def test_generated_layerings_agree_with_a_plain_execution(lab: Lab, part: int) -> None:
    """A hundred of them, value by value, in their order, with the line of the last change."""
    for seed in range(25 * part, 25 * (part + 1)):
        check_layering(lab, seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_generated_layerings(lab: Lab, part: int) -> None:
    """As above."""
    for seed in range(100 * part, 100 * (part + 1)):
        check_layering(lab, seed)
