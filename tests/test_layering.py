"""What scripts are layered with: `layer`, `new`, `DELETE`, `ref` and `env`."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from conftest import Lab
from torch_lab.errors import HparamsError
from torch_lab.experiment import Experiment
from torch_lab.layering import cleared, parsed_key
from torch_lab.provenance import Change, spelt
from torch_lab.utils import DELETE, env, import_script_as_module, layer, new, ref

BASE = """
    hparams = {
        "config": {
            "name": "toy",
            "learning_rate": 0.1,
            "epochs": 10,
            "warmup": 2,
            "milestones": [3, 6],
            "scheduler": None,
            "model": {
                "kind": "mlp",
                "layers": [{"width": 8}, {"width": 16}],
            },
        },
    }
"""
LAYER = "from torch_lab.utils import DELETE, env, layer, new, ref\n"


@pytest.fixture
def base(lab: Lab) -> Lab:
    """The project with a base script."""
    lab.write("hparams.py", BASE)
    return lab


def top(lab: Lab, text: str, name: str = "top.py") -> Path:
    """Write a script that layers."""
    path = lab.write(name, text)
    path.write_text(LAYER + path.read_text(), encoding="utf-8")
    return path


def hparams_of(path: Path) -> dict[str, Any]:
    """Return what a script holds when it has run."""
    found: dict[str, Any] = import_script_as_module(path).hparams
    return found


def config_of(path: Path, **overrides: Any) -> dict[str, Any]:
    """Return the section `config` as `train_config` gets it."""
    return Experiment.load(path, **overrides).hparams.config


def chain(path: Path, key: str, **overrides: Any) -> list[tuple[str, int, Any]]:
    """Return the files, lines and values of all changes of a key."""
    found = parsed_key(key)
    assert found is not None
    changes: tuple[Change, ...] = Experiment.load(path, **overrides).histories[found]
    return [
        (each.file.name if each.file else each.source, each.line, each.value) for each in changes
    ]


def following(lab: Lab, config: str) -> Path:
    """Write a script with a `config` of its own."""
    return top(lab, f"hparams = {{'config': {{{config}}}}}", "following.py")


# Layers.


def test_dictionaries_are_merged_at_any_depth_and_all_else_is_replaced(base: Lab) -> None:
    path = top(
        base,
        """
        hparams = layer(
            "hparams.py",
            config={"learning_rate": 3e-3, "milestones": [9], "model": {"kind": "conv"}},
        )
        """,
    )
    assert hparams_of(path) == {
        "config": {
            "name": "toy",
            "learning_rate": 3e-3,
            "epochs": 10,
            "warmup": 2,
            "milestones": [9],
            "scheduler": None,
            "model": {"kind": "conv", "layers": [{"width": 8}, {"width": 16}]},
        },
    }


def test_a_layer_without_changes_is_the_base(base: Lab) -> None:
    path = top(base, 'hparams = layer("hparams.py")')
    assert hparams_of(path) == hparams_of(base.folder / "hparams.py")


def test_scripts_get_ordinary_dictionaries(base: Lab) -> None:
    """Also where keys were marked as new."""
    path = top(
        base, 'hparams = layer("hparams.py", config={"a": new({"b": new(1)}), "model": {}})\n'
    )
    hparams = hparams_of(path)
    dictionaries = [hparams, hparams["config"], hparams["config"]["model"], hparams["config"]["a"]]
    assert {type(each) for each in dictionaries} == {dict}
    assert hparams["config"]["a"] == {"b": 1}


def test_paths_are_relative_to_the_calling_script(
    base: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the command is given."""
    other = base.root / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    middle = base.write("deep/middle.py", LAYER + 'hparams = layer("../hparams.py")\n')
    path = top(base, 'hparams = layer("deep/middle.py", config={"warmup": 3})')
    assert hparams_of(path)["config"]["warmup"] == 3
    assert hparams_of(middle)["config"]["warmup"] == 2


def test_what_is_merged_is_not_shared(base: Lab) -> None:
    """A preset stays as it is, whatever a layer does with what it got of it."""
    base.write("presets.py", "conv = {'kind': 'conv', 'layers': [{'width': 1}]}")
    path = top(
        base,
        """
        import presets

        hparams = layer("hparams.py", config={"model": presets.conv})
        hparams["config"]["model"]["kind"] = "changed"
        hparams["config"]["model"]["layers"][0]["width"] = 99
        preset = presets.conv
        """,
    )
    module = import_script_as_module(path)
    assert module.preset == {"kind": "conv", "layers": [{"width": 1}]}


@pytest.mark.parametrize(
    ("changes", "line", "message"),
    [
        ('"learning_rte": 1', 6, "unknown key config.learning_rte; did you mean"),
        ('"learning_rte": 1', 6, "config.learning_rate (toys/experiments/00_toy/hparams.py:5)?"),
        ('"model": {\n"knid": 1}', 7, "config.model.knid; did you mean config.model.kind"),
        ('"model": {"kind":\n1,\n"depht":\n2}', 8, "unknown key config.model.depht"),
        ('"layers": [1]', 6, "did you mean config.model.layers"),
        ('"wramup": DELETE', 6, "config.wramup; did you mean config.warmup"),
        ('"gamma": 0.1', 6, "unknown key config.gamma"),
        ('"model": "conv"', 6, "config.model is a dictionary in"),
        ('"epochs": {"a": 1}', 6, "is no dictionary in toys/experiments/00_toy/hparams.py:6"),
    ],
)
def test_a_mistake_is_found_at_its_own_line(
    base: Lab, changes: str, line: int, message: str
) -> None:
    """File and line are those of the key in a call of several lines."""
    text = "\n".join(["", "hparams = layer(", '"hparams.py",', "config={", changes, "},", ")"])
    path = top(base, text)
    with pytest.raises(HparamsError) as caught:
        import_script_as_module(path)
    told = str(caught.value)
    assert told.startswith(f"toys/experiments/00_toy/top.py:{line}: ")
    assert message in told


def test_a_mistake_in_changes_that_are_made_elsewhere_is_at_the_call(base: Lab) -> None:
    path = top(base, 'config = {"wramup": 1}\n\nhparams = layer("hparams.py", config=config)')
    with pytest.raises(HparamsError, match=r"^toys/experiments/00_toy/top\.py:4: "):
        import_script_as_module(path)


def test_a_misspelt_section_is_refused(base: Lab) -> None:
    path = top(base, 'hparams = layer("hparams.py", confg={"warmup": 1})')
    with pytest.raises(HparamsError, match="unknown key confg; did you mean config"):
        import_script_as_module(path)


def test_train_shows_a_mistake_and_creates_nothing(base: Lab) -> None:
    path = top(base, 'hparams = layer("hparams.py", config={"wramup": 1})')
    result = base.train(path, "--offline")
    assert result.code == 2
    assert result.err.startswith("error: toys/experiments/00_toy/top.py:2: unknown key")
    assert base.runs == []


def test_new_marks_values_and_whole_dictionaries(base: Lab) -> None:
    """In a dictionary that the base has, new keys stand beside the others."""
    path = top(
        base,
        """
        hparams = layer(
            "hparams.py",
            config={
                "gamma": new(3),
                "optimizer": new({"name": "adam", "betas": [0.9, 0.99]}),
                "model": new({"depth": 2, "extra": {"x": 1}}),
            },
        )
        """,
    )
    config = hparams_of(path)["config"]
    assert config["gamma"] == 3
    assert config["optimizer"] == {"name": "adam", "betas": [0.9, 0.99]}
    model = {"kind": "mlp", "layers": [{"width": 8}, {"width": 16}], "depth": 2, "extra": {"x": 1}}
    assert config["model"] == model


def test_new_takes_the_place_of_another_kind(base: Lab) -> None:
    """A dictionary that of a number, and the other way round."""
    path = top(
        base,
        'hparams = layer("hparams.py", config={"epochs": new({"a": 1}), "model": new("conv")})',
    )
    config = hparams_of(path)["config"]
    assert (config["epochs"], config["model"]) == ({"a": 1}, "conv")


def test_none_gives_way_to_a_dictionary_and_the_other_way_round(base: Lab) -> None:
    """To switch a part on, or off, needs no mark."""
    path = top(
        base,
        'hparams = layer("hparams.py", config={"scheduler": {"name": "cos"}, "model": None})',
    )
    config = hparams_of(path)["config"]
    assert (config["scheduler"], config["model"]) == ({"name": "cos"}, None)


def test_delete_removes(base: Lab) -> None:
    path = top(
        base, 'hparams = layer("hparams.py", config={"warmup": DELETE, "model": {"kind": DELETE}})'
    )
    config = hparams_of(path)["config"]
    assert "warmup" not in config
    assert config["model"] == {"layers": [{"width": 8}, {"width": 16}]}


def test_names_that_torch_lab_and_lightning_have_need_no_mark(base: Lab) -> None:
    path = top(
        base,
        'hparams = layer("hparams.py", trainer={"init": {"max_epochs": 1}}, '
        'checkpoint={"keep": 2}, seed=5)',
    )
    hparams = Experiment.load(path).hparams
    assert (hparams.trainer.init, hparams.checkpoint.keep, hparams.seed) == (
        {"max_epochs": 1},
        2,
        5,
    )


def test_a_misspelt_name_of_lightning_is_refused_all_the_same(base: Lab) -> None:
    path = top(base, 'hparams = layer("hparams.py", trainer={"init": {"max_epoch": 1}})')
    with pytest.raises(HparamsError, match=r"max_epoch.*did you mean max_epochs"):
        Experiment.load(path)


@pytest.mark.parametrize("text", ["x = 1", "hparams = [1]"])
def test_a_base_without_hparams_is_refused(base: Lab, text: str) -> None:
    base.write("other.py", text)
    path = top(base, 'hparams = layer("other.py")')
    with pytest.raises(HparamsError, match=r"top\.py:2: other\.py defines no "):
        import_script_as_module(path)


def test_marks_work_in_plain_assignments_too(base: Lab) -> None:
    """They are gone when `train_config` gets the dictionary."""
    path = top(
        base,
        """
        from torch_lab.utils import import_script_as_module

        hparams = import_script_as_module("hparams.py").hparams
        hparams["config"]["gamma"] = new(3)
        hparams["config"]["extra"] = new({"a": {"b": new(1)}})
        hparams["config"]["warmup"] = DELETE
        """,
    )
    config = config_of(path)
    assert (config["gamma"], config["extra"]) == (3, {"a": {"b": 1}})
    assert "warmup" not in config


def random_tree(draw: random.Random, depth: int = 3) -> Any:
    """Return nested dictionaries with few names, so that two of them have some in common."""
    if depth == 0 or draw.random() < 0.4:
        return draw.choice([None, draw.randrange(9), [draw.randrange(9)], "text"])
    return {draw.choice("abcd"): random_tree(draw, depth - 1) for _ in range(draw.randrange(4))}


def merged(base: Any, changes: Any) -> Any:
    """Return what merging means."""
    if isinstance(base, dict) and isinstance(changes, dict):
        both = {key: merged(base.get(key), changes[key]) for key in changes}
        return {**base, **both}
    return changes


@pytest.mark.parametrize("seed", range(60))
def test_layers_do_what_a_plain_merge_does_and_every_history_ends_so(lab: Lab, seed: int) -> None:
    """With generated dictionaries, in three layers."""
    draw = random.Random(seed)
    trees = [{"config": {"x": random_tree(draw), "y": random_tree(draw)}} for _ in range(3)]
    lab.hparams("hparams", trees[0])
    top(lab, f"hparams = layer('hparams.py', config=new({trees[1]['config']!r}))", "middle.py")
    path = top(lab, f"hparams = layer('middle.py', config=new({trees[2]['config']!r}))")
    expected = merged(merged(trees[0], trees[1]), trees[2])
    found = Experiment.load(path).effective
    assert found.hparams == expected
    for key, changes in found.histories.items():
        value: Any = expected
        try:
            for part in key:
                value = value[part]
        except (KeyError, TypeError):
            value = DELETE
        is_dictionary = isinstance(value, dict) and value
        assert is_dictionary or changes[-1].value == value, spelt(key)


# Provenance.


def test_each_key_of_a_call_is_set_by_its_own_line(base: Lab) -> None:
    """What is inherited keeps the line of the base."""
    path = top(
        base,
        """
        hparams = layer(
            "hparams.py",
            config={
                "learning_rate": 0.2,
                "epochs": 10,
                "model": {
                    "kind": "conv",
                },
                "gamma": new(
                    0.5
                ),
                "warmup": DELETE,
                "optimizer": new({
                    "name": "adam",
                }),
            },
            trainer=dict(
                init={"max_epochs": 1},
            ),
        )
        """,
    )
    assert chain(path, "config.learning_rate") == [("hparams.py", 5, 0.1), ("top.py", 6, 0.2)]
    assert chain(path, "config.epochs") == [("hparams.py", 6, 10), ("top.py", 7, 10)]
    assert chain(path, "config.model.kind") == [("hparams.py", 11, "mlp"), ("top.py", 9, "conv")]
    assert chain(path, "config.warmup") == [("hparams.py", 7, 2), ("top.py", 14, DELETE)]
    assert chain(path, "config.gamma") == [("top.py", 11, 0.5)]
    assert chain(path, "config.optimizer.name") == [("top.py", 16, "adam")]
    assert chain(path, "trainer.init.max_epochs") == [("top.py", 20, 1)]
    assert chain(path, "config.name") == [("hparams.py", 4, "toy")]
    assert chain(path, "config.model.layers") == [("hparams.py", 12, [{"width": 8}, {"width": 16}])]


def test_a_dictionary_that_is_removed_is_gone_with_all_its_keys(base: Lab) -> None:
    path = top(base, 'hparams = layer("hparams.py", config={\n"model": DELETE})')
    assert chain(path, "config.model.kind") == [("hparams.py", 11, "mlp"), ("top.py", 3, DELETE)]
    assert chain(path, "config.model.layers")[-1] == ("top.py", 3, DELETE)


def test_what_is_marked_as_new_is_told_from_what_only_is(base: Lab) -> None:
    """In calls of `layer` and in assignments; all is new in a script that stands on none."""
    path = top(
        base,
        """
        hparams = layer("hparams.py", config={"warmup": 5, "gamma": new(0.5)})
        hparams["config"]["marked"] = new({"a": 1})
        hparams["config"]["unmarked"] = 1
        """,
    )
    histories = Experiment.load(path).histories
    found = {spelt(key): changes[-1].is_new for key, changes in histories.items()}
    expected = {"gamma": True, "marked.a": True, "unmarked": False, "warmup": False, "name": True}
    assert {key: found[f"config.{key}"] for key in expected} == expected


def test_a_second_base_is_no_layer_on_the_script_that_calls(base: Lab) -> None:
    """What a script has set so far is not below what it takes from elsewhere."""
    base.write("other.py", 'hparams = {"config": {"epochs": 5}}')
    path = top(
        base,
        """
        hparams = layer("hparams.py")
        hparams["config"]["epochs"] = layer("other.py")["config"]["epochs"]
        """,
    )
    other = next(each for each in Experiment.load(path).layers if each.path.name == "other.py")
    (change,) = other.recorder.histories["config", "epochs"]
    assert (change.file and change.file.name, change.value) == ("other.py", 5)


# Values that follow others.


@pytest.mark.parametrize(
    "value",
    [10, 0.1, "text", True, None, [1, [2]], (1, "a"), {"a": {"b": 1}}, {}, []],
    ids=repr,
)
def test_a_ref_has_the_value_and_its_type(lab: Lab, value: Any) -> None:
    """By itself, in lists, in tuples and in dictionaries."""
    config = config_of(
        following(
            lab,
            f"'x': {value!r}, 'y': ref('config.x'), 'many': [0, ref('config.x')],"
            "'both': (ref('config.x'), 1), 'deep': {'z': [{'w': ref('config.x')}]}",
        )
    )
    found = [config["y"], config["many"][1], config["both"][0], config["deep"]["z"][0]["w"]]
    assert found == [value] * 4
    assert {type(each) for each in found} == {type(value)}


def test_a_ref_follows_what_layers_and_overrides_say(base: Lab) -> None:
    base.write("hparams.py", LAYER + 'hparams = {"config": {"a": 1, "b": ref("config.a")}}')
    path = top(base, 'hparams = layer("hparams.py", config={"a": 2})')
    assert config_of(base.folder / "hparams.py") == {"a": 1, "b": 1}
    assert config_of(path) == {"a": 2, "b": 2}
    assert config_of(path, set={"config.a": 3}) == {"a": 3, "b": 3}
    assert config_of(path, set={"config.b": 4}) == {"a": 2, "b": 4}


def test_a_ref_of_a_dictionary_is_a_copy(lab: Lab) -> None:
    config = config_of(following(lab, "'x': {'a': [1]}, 'y': ref('config.x')"))
    config["y"]["a"].append(2)
    assert config["x"] == {"a": [1]}


def test_refs_follow_refs_and_lead_into_lists(lab: Lab) -> None:
    config = config_of(
        following(
            lab,
            "'a': ref('config.b.c[1].d'), 'b': ref('config.e'), 'e': {'c': [0, {'d': 7}]},"
            "'last': ref('config.e.c[-1]'), 'odd': {'x-y': 1, 2: 3},"
            "'f': [ref('config.odd.x-y'), ref('config.odd[2]'), ref(\"config['odd']['x-y']\")]",
        )
    )
    assert (config["a"], config["last"], config["f"]) == (7, {"d": 7}, [1, 3, 1])


def test_a_ref_may_follow_a_default(lab: Lab) -> None:
    """Of what torch-lab has a default for, although no script says it."""
    config = config_of(following(lab, "'x': ref('seed'), 'y': ref('checkpoint.keep')"))
    assert config == {"x": 0, "y": 1}


def test_strings_are_filled_with_values(lab: Lab) -> None:
    config = config_of(
        following(
            lab,
            "'name': 'toy', 'lr': 0.003, 'sizes': [8, 16], 'folder': ref('runs/{config.name}'),"
            "'more': ref('{{{config.name!r}}} {config.lr:.0e} {config.sizes[1]:>4} {seed}'),"
            "'whole': ref('{config.lr}'), 'inside': [ref('{config.folder}/x')]",
        )
    )
    assert config["folder"] == "runs/toy"
    assert config["more"] == "{'toy'} 3e-03   16 0"
    assert config["whole"] == "0.003"
    assert config["inside"] == ["runs/toy/x"]


@pytest.mark.parametrize(
    "text",
    [
        "runs/{config.name}",
        "{epoch:02d}-{step}.ckpt",
        "{",
        "}{",
        "{{x}}",
        r"\d{1,3}",
        "{config.nothing}",
        "config.name",
        "ref('config.name')",
        "$HOME ${HOME} ~",
        "{}",
    ],
)
def test_plain_strings_stay_as_they_are(lab: Lab, text: str) -> None:
    """Braces mean something in `ref(…)` alone: file names and patterns have some too."""
    assert config_of(following(lab, f"'name': 'toy', 'x': {text!r}"))["x"] == text


@pytest.mark.parametrize(
    ("config", "circle"),
    [
        ("'a': ref('config.a')", "config.a -> config.a"),
        (
            "'a': ref('config.b'), 'b': [ref('config.c')], 'c': ref('x{config.a}')",
            "config.a -> config.b -> config.b[0] -> config.c -> config.a",
        ),
        ("'a': ref('config')", "config.a -> config -> config.a"),
        ("'a': {'b': ref('config.a')}", "config.a.b -> config.a -> config.a.b"),
        (
            "'x': ref('config.a'), 'a': ref('config.b'), 'b': ref('config.a.c')",
            "config.a -> config.b",
        ),
    ],
)
def test_a_circle_is_shown(lab: Lab, config: str, circle: str) -> None:
    with pytest.raises(HparamsError) as caught:
        config_of(following(lab, config))
    assert str(caught.value).startswith("toys/experiments/00_toy/following.py:2: refs follow each")
    assert circle in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config.epohcs", "unknown key config.epohcs; did you mean config.epochs (toys/exper"),
        ("epochs", "unknown key epochs; did you mean config.epochs"),
        ("config.epochs.x", "unknown key config.epochs.x"),
        ("config.list[2]", r"unknown key config.list[2]"),
        ("runs/{config.nmae}", "unknown key config.nmae; did you mean config.name"),
        ("{config.name:d}", "config.name is 'toy' (str): Unknown format code 'd'"),
    ],
)
def test_a_ref_that_leads_nowhere_says_where_it_is(lab: Lab, text: str, message: str) -> None:
    """With the line of the ref itself, its key, and the nearest key there is."""
    path = top(
        lab,
        f"""
        hparams = {{
            "config": {{
                "epochs": 10, "name": "toy", "list": [0, 1],
                "follows": [
                    ref({text!r}),
                ],
            }},
        }}
        """,
    )
    with pytest.raises(HparamsError) as caught:
        Experiment.load(path)
    place = f"toys/experiments/00_toy/top.py:7: config.follows[0] = ref({text!r}): "
    assert str(caught.value).startswith(place)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "config.", ".config", "config..x", "a b", "config[x]", "{config.x", "{}", "{0 1}"]
)
def test_a_ref_of_no_key_is_refused_at_its_line(lab: Lab, text: str) -> None:
    path = following(lab, f"'x': ref({text!r})")
    with pytest.raises(HparamsError, match=r"following\.py:2: ref\(.*\): expected a key"):
        import_script_as_module(path)


@pytest.mark.parametrize(
    "use", ["x = 1 if hparams['config']['b'] else 2", "x = f\"{hparams['config']['b']}\""]
)
def test_a_script_that_asks_for_the_value_of_a_ref_is_told(lab: Lab, use: str) -> None:
    """It would get a wrong answer without a word."""
    path = top(lab, f'hparams = {{"config": {{"a": 0, "b": ref("config.a")}}}}\n{use}')
    with pytest.raises(HparamsError, match=r"top\.py:2: no script can know .* ref\('config\.a'\)"):
        import_script_as_module(path)


def test_the_history_of_a_ref_says_what_it_follows(base: Lab) -> None:
    """The value is the one that it has in the end."""
    path = top(
        base,
        """
        hparams = layer("hparams.py", config={
            "warmup": ref("config.epochs"),
            "name": ref("{config.epochs}-{config.learning_rate}"),
            "milestones": [1, ref("config.epochs")],
            "scheduler": ref("config.model"),
        })
        """,
    )
    assert chain(path, "config.warmup") == [("hparams.py", 7, 2), ("top.py", 4, 10)]
    assert chain(path, "config.milestones") == [("hparams.py", 8, [3, 6]), ("top.py", 6, [1, 10])]
    assert chain(path, "config.scheduler.kind") == [("hparams.py", 9, None), ("top.py", 7, "mlp")]
    histories = Experiment.load(path, {"config.epochs": 30}).histories
    sources = {spelt(key): changes[-1].source for key, changes in histories.items()}
    assert sources["config.warmup"] == "follows config.epochs"
    assert sources["config.name"] == "follows config.epochs, config.learning_rate"
    assert sources["config.scheduler.kind"] == "follows config.model"
    assert histories["config", "warmup"][-1].value == 30


def test_a_dictionary_that_gives_way_to_a_ref_keeps_its_history(base: Lab) -> None:
    """Also where what it follows has the same keys."""
    path = top(
        base,
        """
        hparams = layer("hparams.py", config={"other": new({"kind": "conv"})})
        hparams["config"]["model"] = ref("config.other")
        """,
    )
    found = chain(path, "config.model.kind")
    assert found[0] == ("hparams.py", 11, "mlp")
    assert found[-1] == ("top.py", 4, "conv")
    assert chain(path, "config.model.layers")[-1] == ("top.py", 4, DELETE)


# The environment.


def test_the_environment_is_read_when_the_hparams_are_loaded(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = following(lab, "'data': env('DATA_DIR'), 'train': ref('{config.data}/train')")
    monkeypatch.setenv("DATA_DIR", "/one")
    assert config_of(path) == {"data": "/one", "train": "/one/train"}
    monkeypatch.setenv("DATA_DIR", "/other")
    assert config_of(path)["data"] == "/other"


@pytest.mark.parametrize(
    ("default", "text", "expected"),
    [
        ("'data'", None, "data"),
        ("None", None, None),
        ("None", "5", "5"),
        ("'data'", "5", "5"),
        ("'data'", "", ""),
        ("4", "8", 8),
        ("0.1", "3", 3.0),
        ("0.1", "3e-3", 3e-3),
        ("False", "True", True),
        ("[1]", "[2, 3]", [2, 3]),
        ("ref('config.other')", None, 7),
        ("ref('config.other')", "9", 9),
    ],
)
def test_a_variable_is_read_in_the_type_of_its_default(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, default: str, text: str | None, expected: Any
) -> None:
    monkeypatch.delenv("LAB_VALUE", raising=False)
    if text is not None:
        monkeypatch.setenv("LAB_VALUE", text)
    path = following(lab, f"'other': 7, 'x': env('LAB_VALUE', default={default})")
    found = config_of(path)["x"]
    assert (found, type(found)) == (expected, type(expected))


def test_a_variable_of_another_type_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_VALUE", "many")
    with pytest.raises(HparamsError, match=r"config\.x = env.*LAB_VALUE=many.* 4 \(int\)"):
        config_of(following(lab, "'x': env('LAB_VALUE', default=4)"))


def test_a_missing_variable_is_named_with_its_key(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless nobody needs it, as something else is set in its place."""
    monkeypatch.delenv("DATA_DIR", raising=False)
    path = following(lab, "'data': {'root': env('DATA_DIR')}")
    result = lab.train(path, "--offline")
    assert result.code == 2
    assert (
        "following.py:2: config.data.root = env('DATA_DIR'): the environment has no DATA_DIR"
        in (result.err)
    )
    assert lab.runs == []
    assert config_of(path, set={"config.data.root": "here"}) == {"data": {"root": "here"}}


def test_the_history_of_a_variable_names_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    path = following(lab, "'data': env('DATA_DIR', default='data')")
    for text, source in (("/one", "env DATA_DIR"), (None, "env DATA_DIR, not set: its default")):
        monkeypatch.setenv("DATA_DIR", text) if text else monkeypatch.delenv("DATA_DIR")
        (change,) = Experiment.load(path).histories["config", "data"]
        assert (change.value, change.source) == (text or "data", source)
        assert (change.file and change.file.name, change.line) == ("following.py", 2)


# The marks by themselves.


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_marks_survive_copies(copied: Any) -> None:
    """A preset may be copied before it is used."""
    given = {"a": ref("config.x"), "b": env("X", default=[1]), "c": DELETE, "d": new(1)}
    found = copied(given)
    assert found["c"] is DELETE
    assert {**found, "c": None} == {**given, "c": None}


def test_clearing_keeps_what_has_no_marks() -> None:
    value = {"a": [1, {"b": (2, None)}], 3: {}}
    assert cleared(value) == value


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("config", ("config",)),
        ("config.a.b", ("config", "a", "b")),
        ("config.a[0].b[-1]", ("config", "a", 0, "b", -1)),
        ("config['x.y'][\"z\"]", ("config", "x.y", "z")),
        ("config.data-dir", ("config", "data-dir")),
        ("config.7", ("config", "7")),
        ("", None),
        ("a.", None),
        (".a", None),
        ("a..b", None),
        ("a[b]", None),
        ("a[0", None),
        ("a b", None),
    ],
)
def test_keys_are_read_as_they_are_shown(text: str, key: tuple[Any, ...] | None) -> None:
    assert parsed_key(text) == key
    if key is not None:
        assert parsed_key(spelt(key)) == key


def test_layer_works_outside_of_scripts(base: Lab) -> None:
    """As in a notebook: relative to the working directory."""
    hparams = layer("toys/experiments/00_toy/hparams.py", config={"warmup": 9})
    assert hparams["config"]["warmup"] == 9
    with pytest.raises(HparamsError, match=r"test_layering\.py:\d+: unknown key config\.wramup"):
        layer("toys/experiments/00_toy/hparams.py", config={"wramup": 9})
