"""The tracked dictionary knows what nobody has read, and is a dictionary to everybody else."""

from __future__ import annotations

import ast
import collections
import copy
import dataclasses
import functools
import gc
import io
import json
import operator
import pickle
import pprint
import random
import string
import timeit
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from torch_lab.provenance import spelt
from torch_lab.tracked import Reads, Tracked, tracked

try:
    from test import mapping_tests, test_dict
except ImportError:  # Some distributions leave the tests of the standard library out.
    mapping_tests = test_dict = None

GIVEN = {"a": 1, "b": "two", "n": {"c": 3}, "l": [{"d": 4}, 5]}
NOTHING, ALL_HERE, ALL = {"a", "b", "n.c", "l"}, {"n.c", "l[0].d"}, set[str]()
"""What is left when nothing was read, all values of one dictionary, or all of all."""
ONLY_A = {"b", "n.c", "l"}


def unread(reads: Reads) -> list[str]:
    return [spelt(key) for key in reads.unread()]


def made(*arguments: Any, **named: Any) -> Tracked:
    """Return what `dict` returns, tracked."""
    return tracked(dict(*arguments, **named))[0]


def keywords(**given: Any) -> dict[str, Any]:
    return given


def matched(config: Any) -> Any:
    match config:
        case {"a": int(found)}:
            return found


def with_the_rest(config: Any) -> Any:
    match config:
        case {"a": 1, **rest}:
            return rest


class Attributes:
    """An object whose attributes are the keys of a dictionary."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)


READING: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "config[key]": (lambda c: c["a"], ONLY_A),
    "get": (lambda c: c.get("a"), ONLY_A),
    "get, with a default": (lambda c: c.get("a", 0), ONLY_A),
    "get of another key": (lambda c: c.get("z"), NOTHING),
    "pop": (lambda c: c.pop("a"), ONLY_A),
    "pop, with a default": (lambda c: c.pop("a", 0), ONLY_A),
    "setdefault": (lambda c: c.setdefault("a", 0), ONLY_A),
    "in": (lambda c: "a" in c, ONLY_A),
    "not in": (lambda c: "z" not in c, NOTHING),
    "popitem": (lambda c: c.popitem(), {"a", "b", "n.c", "l[0].d"}),
    "itemgetter": (operator.itemgetter("a"), ONLY_A),
    "match": (matched, ONLY_A),
    "match, with the rest": (with_the_rest, ALL_HERE),
    "%": (lambda c: operator.mod("%(a)s", c), ONLY_A),
    "format_map": ("{a}".format_map, ONLY_A),
    "format": ("{[a]}".format, ONLY_A),
    "Template": (lambda c: string.Template("$a").substitute(c), ONLY_A),
    "eval": (lambda c: eval("a", {}, c), ONLY_A),
    "mappingproxy": (lambda c: types.MappingProxyType(c)["a"], ONLY_A),
    "ChainMap": (lambda c: collections.ChainMap(c, {"z": 1})["a"], ONLY_A),
    "a dictionary inside": (lambda c: c["n"], NOTHING),
    "a key inside": (lambda c: c["n"]["c"], {"a", "b", "l"}),
    "a list": (lambda c: c["l"], {"a", "b", "n.c", "l[0].d"}),
    "a key in a list": (lambda c: c["l"][0]["d"], {"a", "b", "n.c"}),
    "iteration": (lambda c: [key for key in c], ALL_HERE),  # noqa: C416
    "list": (list, ALL_HERE),
    "sorted": (sorted, ALL_HERE),
    "set": (set, ALL_HERE),
    "[*config]": (lambda c: [*c], ALL_HERE),
    "reversed": (lambda c: list(reversed(c)), ALL_HERE),
    "keys": (lambda c: list(c.keys()), ALL_HERE),
    "keys as a set": (lambda c: c.keys() - {"a"}, ALL_HERE),
    "values": (lambda c: list(c.values()), ALL_HERE),
    "items": (lambda c: list(c.items()), ALL_HERE),
    "**config of a call": (lambda c: keywords(**c), ALL_HERE),
    "**config among others": (lambda c: keywords(x=1, **c), ALL_HERE),
    "{**config}": (lambda c: {**c}, ALL_HERE),
    "dict": (dict, ALL_HERE),
    "dict with keywords": (lambda c: dict(c, x=1), ALL_HERE),
    "dict.copy": (dict.copy, ALL_HERE),
    "OrderedDict": (collections.OrderedDict, ALL_HERE),
    "defaultdict": (lambda c: collections.defaultdict(int, c), ALL_HERE),
    "UserDict": (collections.UserDict, ALL_HERE),
    "SimpleNamespace": (lambda c: types.SimpleNamespace(**c), ALL_HERE),
    "attributes": (Attributes, ALL_HERE),
    "fromkeys": (dict.fromkeys, ALL_HERE),
    "type": (lambda c: type("Made", (), c), ALL_HERE),
    "its own type": (lambda c: type(c)(c), ALL_HERE),
    "update of another": ({}.update, ALL_HERE),
    "|= of another": (lambda c: operator.ior({}, c), ALL_HERE),
    "config | other": (lambda c: c | {}, ALL_HERE),
    "other | config": (lambda c: {} | c, ALL_HERE),
    "copy": (lambda c: c.copy(), ALL_HERE),
    "copy.copy": (copy.copy, ALL_HERE),
    "==": (lambda c: c == GIVEN, ALL),
    "== the other way round": (lambda c: operator.eq(GIVEN, c), ALL),
    "!=": (lambda c: c != GIVEN, ALL),
    "== another tracked one": (lambda c: made(GIVEN) == c, ALL),
    "== something else": (lambda c: c == 1, NOTHING),
    "copy.deepcopy": (copy.deepcopy, ALL),
    "pickle": (pickle.dumps, ALL),
    "pickle in Python": (pickle._dumps, ALL),  # type: ignore[attr-defined]
    "json": (json.dumps, ALL),
    "json in Python": (lambda c: json.dumps(c, indent=1), ALL),
    "json, sorted": (lambda c: json.dumps(c, sort_keys=True), ALL),
    "pprint": (pprint.pformat, ALL),
    "len": (len, NOTHING),
    "bool": (bool, NOTHING),
    "repr": (repr, NOTHING),
    "str": (str, NOTHING),
    "f-string": (lambda c: f"{c}", NOTHING),
    "isinstance": (lambda c: isinstance(c, Mapping), NOTHING),
    "another key": (lambda c: c.__setitem__("z", 1), NOTHING),
    "the key": (lambda c: c.__setitem__("a", 1), ONLY_A),
    "del": (lambda c: c.__delitem__("a"), ONLY_A),
    "del of a dictionary": (lambda c: c.__delitem__("n"), {"a", "b", "l"}),
    "set over a dictionary": (lambda c: c.__setitem__("n", {"c": 3}), {"a", "b", "l"}),
    "update": (lambda c: c.update({"a": 1}), ONLY_A),
    "update with keywords": (lambda c: c.update(a=1, n=2), {"b", "l"}),
    "update with pairs": (lambda c: c.update(iter([("a", 1)])), ONLY_A),
    "|=": (lambda c: operator.ior(c, {"a": 1}), ONLY_A),
    "clear": (lambda c: c.clear(), ALL),
}


@pytest.mark.parametrize(("act", "left"), READING.values(), ids=READING)
def test_what_counts_as_reading(act: Callable[[Any], Any], left: set[str]) -> None:
    """Every way to read a dictionary is noted, also those of CPython's own code; and it is right.

    The same is done with an ordinary dictionary, for the result.
    """
    config, reads = tracked(GIVEN)
    plain = copy.deepcopy(GIVEN)
    found, expected = act(config), act(plain)
    assert set(unread(reads)) == left
    assert list(config) == list(plain) and config == plain
    if not isinstance(expected, (Attributes, types.SimpleNamespace, type, bytes)):
        assert found == expected
    else:
        assert type(found) is type(expected)


def test_unread_keys_are_in_order() -> None:
    """In that of the dictionary, with those of dictionaries inside at their places."""
    given = {"z": 1, "m": {"y": {"x": 2}, "b": 3}, "a": [[{"k": 4}], ({"k": 5}, 6)], "e": {}}
    config, reads = tracked(given)
    assert reads.unread() == [("z",), ("m", "y", "x"), ("m", "b"), ("a",), ("e",)]
    assert config["a"] == given["a"] and type(config["a"][1]) is tuple
    config["e"]
    assert reads.unread() == [("z",), ("m", "y", "x"), ("m", "b")]
    config, reads = tracked(given)
    config["a"], config["z"]
    assert unread(reads) == ["m.y.x", "m.b", "a[0][0].k", "a[1][0].k", "e"]


def test_keys_of_any_kind() -> None:
    """All that a dictionary takes."""
    config, reads = tracked({0: "a", None: "b", (1, 2): "c", True: "d", "": "e"})
    assert (config[0], config[False], config[1], config[(1, 2)]) == ("a", "a", "d", "c")
    assert reads.unread() == [(None,), ("",)]


def test_what_the_code_sets_is_its_own() -> None:
    """It is not reported, and is the very same object; the rest is reported still."""
    config, reads = tracked({"a": 1, "n": {"c": 3, "d": 4}})
    own = {"x": [{"y": 1}]}
    config["own"], config["a"] = own, 2
    config["n"].update(c=own)
    config["n"].setdefault("e", 5)
    assert config["own"] is own and config["n"]["c"] is own
    assert (type(config["own"]), type(own["x"][0])) == (dict, dict)
    assert unread(reads) == ["n.d"]


def test_what_was_taken_out_is_followed_still() -> None:
    """`pop` hands over a dictionary, and its keys are still to be read."""
    config, reads = tracked({"n": {"c": 3, "d": 4}, "l": [{"e": 5}]})
    taken, items = config.pop("n"), config.pop("l")
    assert not config and unread(reads) == ["n.c", "n.d", "l[0].e"]
    taken["c"], items[0]["e"]
    assert unread(reads) == ["n.d"]


def test_the_given_dictionary_stays_as_it_is() -> None:
    """What is tracked is a copy, of dictionaries and lists alone."""
    value, given = object(), {"n": {"c": 3}, "l": [1], "t": ({"d": 4},)}
    config, _ = tracked(given | {"v": value})
    config["n"]["c"] = config["t"][0]["d"] = 0
    config["l"].append(2)
    assert given == {"n": {"c": 3}, "l": [1], "t": ({"d": 4},)}
    assert type(given["n"]) is dict and config["v"] is value


def test_what_is_held_may_be_read_later() -> None:
    """A key is forgotten when nobody has read it and nobody holds its dictionary."""

    def config_function(hparams: dict[str, Any]) -> Callable[[], Any]:
        model, items = hparams["config"]["model"], hparams["config"]["items"]
        return lambda: (model["dim"], items[0]["x"])

    config, reads = tracked({"lr": 1, "model": {"dim": 2}, "data": {"x": 3}, "items": [{"x": 4}]})
    later = config_function({"config": config})
    assert unread(reads) == ["lr", "model.dim", "data.x", "items[0].x"]
    assert reads.forgotten() == []
    del config
    assert [spelt(key) for key in reads.forgotten()] == ["lr", "data.x"]
    assert later() == (2, 4) and unread(reads) == ["lr", "data.x"]
    del later
    assert [spelt(key) for key in reads.forgotten()] == ["lr", "data.x"]


def test_whoever_holds_the_whole_may_read_all_of_it() -> None:
    """Also by the dictionary around it."""
    config, reads = tracked({"lr": 1, "model": {"dim": 2}})
    holder = functools.partial(operator.getitem, {"config": config}, "config")
    del config
    assert reads.forgotten() == [] and len(reads.unread()) == 2
    assert holder()["model"]["dim"] == 2 and unread(reads) == ["lr"]


def test_the_end_of_tracking() -> None:
    """Whoever holds the dictionary has one that notes nothing, and is as good as any."""
    config, reads = tracked(GIVEN)
    inner, items = config["n"], config["l"]
    reads.end()
    for each in (config, inner, items[0]):
        assert not isinstance(each, Tracked) and isinstance(each, dict)
        assert type(each).__getitem__ is dict.__getitem__
        assert type(each).__iter__ is dict.__iter__
        assert is_plain(copy.deepcopy(each)) and is_plain(pickle.loads(pickle.dumps(each)))
        assert type(each.copy()) is type(copy.copy(each)) is type(type(each)(each)) is dict
    assert config == GIVEN and dict(config) == GIVEN and repr(config) == repr(GIVEN)


def is_plain(value: Any) -> bool:
    """Return whether nested dictionaries and lists are of no class of ours."""
    if isinstance(value, dict):
        return type(value) is dict and all(map(is_plain, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(is_plain, value))


PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy.deepcopy": copy.deepcopy,
    "json": lambda config: json.loads(json.dumps(config)),
    **{
        f"pickle, protocol {protocol}": lambda config, protocol=protocol: pickle.loads(
            pickle.dumps(config, protocol)
        )
        for protocol in PROTOCOLS
    },
    "pickle in Python": lambda config: pickle.loads(pickle._dumps(config)),  # type: ignore[attr-defined]
    "repr": lambda config: ast.literal_eval(repr(config)),
    "asdict": lambda config: dataclasses.asdict(Holder(config))["config"],
    "a copy in a list": lambda config: copy.deepcopy([config])[0],
}


@dataclasses.dataclass(frozen=True)
class Holder:
    """What a user may keep a configuration in."""

    config: dict[str, Any]
    other: int = 0


@pytest.mark.parametrize("act", COPIES.values(), ids=COPIES)
def test_copies_are_plain(act: Callable[[Any], Any]) -> None:
    """All of it, so that workers and checkpoints never see the class."""
    given = {"a": 1, "n": {"c": {"d": [{"e": {}}]}}, "l": [[{"f": 2}]]}
    config, _ = tracked(given)
    found = act(config)
    assert is_plain(found) and found == given
    assert list(found) == list(given)
    assert found["n"] is not config["n"]


SHALLOW: dict[str, Callable[[Any], Any]] = {
    "copy": lambda config: config.copy(),
    "copy.copy": copy.copy,
    "dict": dict,
    "its own type": lambda config: type(config)(config),
    "{**config}": lambda config: {**config},
    "config | other": lambda config: config | {},
    "other | config": lambda config: {} | config,
}


@pytest.mark.parametrize("act", SHALLOW.values(), ids=SHALLOW)
def test_shallow_copies_share_what_is_inside(act: Callable[[Any], Any]) -> None:
    """As those of ordinary dictionaries do; to read there still counts."""
    config, reads = tracked(GIVEN)
    found = act(config)
    assert type(found) is dict and found == GIVEN and found is not config
    assert found["n"] is config["n"] and found["l"] is config["l"]
    config, reads = tracked(GIVEN)
    act(config)["n"]["c"]
    assert unread(reads) == ["l[0].d"]


def test_a_dictionary_that_holds_itself() -> None:
    """It is shown, copied and pickled as any other."""
    config, reads = tracked({"a": 1})
    config["self"] = config
    assert repr(config) == "{'a': 1, 'self': {...}}"
    assert reads.unread() == [("a",)]
    for found in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(found) is dict and found["self"] is found and found["a"] == 1


def test_in_dataclasses() -> None:
    """As a field, replaced, compared and taken apart."""
    config, _ = tracked(GIVEN)
    holder = Holder(config)
    assert holder == Holder(copy.deepcopy(GIVEN)) and holder.config is config
    changed = dataclasses.replace(holder, other=1)
    assert changed.config is config and changed != holder
    assert is_plain(dataclasses.asdict(holder)) and dataclasses.astuple(holder)[0] == GIVEN


def test_kinds_of_dictionary_in_merges() -> None:
    """What comes of two kinds is what comes of an ordinary one and the other."""
    config, _ = tracked({"a": 1})
    other = collections.OrderedDict(b=2)
    assert type(config | other) is type({"a": 1} | other) is collections.OrderedDict
    assert type(other | config) is collections.OrderedDict
    counted = collections.defaultdict(int, b=2)
    assert type(config | counted) is type({} | counted)
    assert type(counted | config) is collections.defaultdict
    assert (config | {"a": 2}, {"a": 2} | config) == ({"a": 2}, {"a": 1})
    before = config
    config |= {"b": 3}
    assert config is before and config == {"a": 1, "b": 3}


def outcome(act: Callable[[], Any]) -> Any:
    """Return what comes of an act, or the error that it raises; some words name the class."""
    try:
        found = act()
    except (AttributeError, TypeError) as error:
        return type(error)
    except Exception as error:
        return type(error), error.args
    return list(found) if isinstance(found, (type({}.keys()), type({}.items()))) else found


ACTS: tuple[Callable[[Any, Any, Any], Any], ...] = (
    lambda d, k, v: d[k],
    lambda d, k, v: d.get(k, v),
    lambda d, k, v: d.pop(k),
    lambda d, k, v: d.pop(k, v),
    lambda d, k, v: d.pop(k, v, v),
    lambda d, k, v: d.popitem(),
    lambda d, k, v: d.setdefault(k, v),
    lambda d, k, v: d.setdefault(k),
    lambda d, k, v: d.__setitem__(k, v),
    lambda d, k, v: d.__setitem__(k, v),
    lambda d, k, v: d.__setitem__(k, v),
    lambda d, k, v: d.__delitem__(k),
    lambda d, k, v: d.update([(k, v)]),
    lambda d, k, v: d.update({k: v}, x=v),
    lambda d, k, v: d.update({k: v}, {}),
    lambda d, k, v: d.update([(1, v), (2,)]),
    lambda d, k, v: d.update(v),
    lambda d, k, v: operator.ior(d, v),
    lambda d, k, v: operator.or_(d, v),
    lambda d, k, v: operator.or_(v, d),
    lambda d, k, v: k in d,
    lambda d, k, v: (len(d), bool(d), repr(d), list(d), list(reversed(d))),
    lambda d, k, v: d.keys() ^ {"x"},
    lambda d, k, v: d.items(),
    lambda d, k, v: (d == v, d != v, v == d, v != d),
    lambda d, k, v: d < {},
    lambda d, k, v: d.get(),
    lambda d, k, v: d.get(key=k),
    lambda d, k, v: d.missing,
    lambda d, k, v: setattr(d, "missing", v),
    lambda d, k, v: vars(d),
    lambda d, k, v: [d.__setitem__(each, 1) or d.pop(each) or d.pop(each) for each in d],
)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_done_an_ordinary_dictionary_does_the_same(seed: int) -> None:
    """Of long chains of acts, every result, every error, and what is left."""
    draw = random.Random(seed)
    keys = ["a", "b", "n", "x", 1, True, None, (1, 2), [], set()]
    values = [0, "v", None, {"a": 5}, {}, [1], {"y": {}}]
    plain = copy.deepcopy(GIVEN)
    config, _ = tracked(plain)
    for _ in range(300):
        act, key, value = draw.choice(ACTS), draw.choice(keys), draw.choice(values)
        found, expected = (
            outcome(functools.partial(act, each, key, value)) for each in (config, plain)
        )
        assert found == expected, (act, key, value)
        assert list(dict.items(config)) == list(plain.items())


def test_an_empty_dictionary_and_what_has_no_hash() -> None:
    """Whether one asks for a hash where there is nothing to find is the version's own affair."""
    config, _ = tracked({"a": 1})
    config.pop("a")
    for act in (lambda d: d.pop([], 1), lambda d: d.get([], 1), lambda d: [] in d):
        assert outcome(functools.partial(act, config)) == outcome(functools.partial(act, {}))


def test_it_is_no_key() -> None:
    """As no dictionary is."""
    with pytest.raises(TypeError, match="unhashable type"):
        hash(made(a=1))


def test_reading_is_cheap() -> None:
    """A key costs well under a microsecond, also of code that reads it all the time."""
    config, reads = tracked(GIVEN)
    for act in (lambda: config["a"], lambda: config.get("a"), lambda: "a" in config):
        best = min(timeit.repeat(act, number=2000, repeat=20)) / 2000
        assert best < 1e-6
    assert unread(reads) == ["b", "n.c", "l"]


# With torch and Lightning.

MODULE = """
import copy

import torch
from torch.utils.data import DataLoader, TensorDataset

from torch_lab.modules import TrainLabModule
from torch_lab.tracked import tracked


class Module(TrainLabModule):
    def __init__(self, config):
        super().__init__(
            torch.nn.Linear(4, 2),
            torch.nn.CrossEntropyLoss(),
            lambda parameters: torch.optim.SGD(parameters, lr=config["lr"]),
        )
        self.save_hyperparameters(config)


def train_config(hparams):
    config, reads = tracked(copy.deepcopy(hparams["config"]))
    data = TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
    module = Module(config)
    assert reads.unread() == []
    return {"module": module, "train_dataloaders": DataLoader(data, batch_size=8)}
"""


def test_save_hyperparameters(lab: Any) -> None:
    """The checkpoint of a run holds plain dictionaries, and loads with `weights_only=True`."""
    torch = pytest.importorskip("torch")
    config = {"lr": 0.1, "model": {"dim": 4, "layers": [{"kind": "a"}, {"kind": "b"}]}}
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1}}, "config": config})
    lab.write("__main__.py", MODULE)
    result = lab.train(lab.path, "--offline")
    assert result.code == 0, result.err
    checkpoint = lab.run().folder / "checkpoints/last.ckpt"
    found = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert found == config and is_plain(dict(found))


def test_torch_save_and_load() -> None:
    """It is loaded as a plain dictionary."""
    torch = pytest.importorskip("torch")
    config, _ = tracked({**GIVEN, "weights": torch.ones(2)})
    buffer = io.BytesIO()
    torch.save({"config": config}, buffer)
    buffer.seek(0)
    found = torch.load(buffer, weights_only=False)["config"]
    assert is_plain(found) and {**found, "weights": 0} == {**GIVEN, "weights": 0}
    assert torch.equal(found["weights"], torch.ones(2))


def test_batches_and_devices() -> None:
    """What torch and Lightning make of dictionaries, they make of it."""
    data = pytest.importorskip("torch.utils.data")
    apply = pytest.importorskip("lightning_utilities.core.apply_func").apply_to_collection
    config, _ = tracked({"a": 1, "n": {"c": 3}})
    collated = data.default_collate([config, config])
    assert collated["n"]["c"].tolist() == [3, 3] and type(collated) is dict
    assert apply(config, int, lambda value: value + 1) == {"a": 2, "n": {"c": 4}}


def test_yaml() -> None:
    """It is written as any dictionary, while it is tracked and after."""
    yaml = pytest.importorskip("yaml")
    config, reads = tracked(GIVEN)
    for dump in (yaml.safe_dump, yaml.dump):
        assert dump({"config": config}) == dump({"config": GIVEN})
    assert unread(reads) == []
    reads.end()
    assert yaml.safe_dump(config) == yaml.safe_dump(GIVEN)


def test_hparams_of_other_loggers(tmp_path: Path) -> None:
    """Lightning's loggers write hyperparameters as YAML that they can read."""
    loggers = pytest.importorskip("pytorch_lightning.loggers")
    saving = pytest.importorskip("pytorch_lightning.core.saving")
    config, _ = tracked(GIVEN)
    logger = loggers.CSVLogger(str(tmp_path))
    logger.log_hyperparams({"config": config})
    logger.save()
    (file,) = tmp_path.rglob("hparams.yaml")
    assert saving.load_hparams_from_yaml(str(file)) == {"config": GIVEN}


# The tests of the standard library.


class Rewritten(ast.NodeTransformer):
    """Replaces every dictionary that a text makes by a tracked one."""

    def made(self, node: ast.expr) -> ast.expr:
        self.generic_visit(node)
        return ast.copy_location(ast.Call(ast.Name("made", ast.Load()), [node], []), node)

    visit_Dict = visit_DictComp = made  # noqa: N815

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "dict":
            node.func = ast.copy_location(ast.Name("made", ast.Load()), node.func)
        return node


def rewritten(module: types.ModuleType) -> types.ModuleType:
    """Return a module whose every `{…}` and `dict(…)` is tracked."""
    assert module.__file__ is not None
    tree = Rewritten().visit(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
    copied = types.ModuleType("test_dict_rewritten")
    vars(copied).update(made=made, __file__=module.__file__)
    exec(compile(ast.fix_missing_locations(tree), module.__file__, "exec"), vars(copied))
    return copied


if mapping_tests is not None:

    class TestTheStandardLibrarysDict(rewritten(test_dict).DictTest):  # type: ignore[misc]
        """What the standard library tests of `dict` holds for a tracked one."""

        @classmethod
        def setUpClass(cls) -> None:
            gc.freeze()  # Some collect garbage dozens of times: not that of torch.
            cls.addClassCleanup(gc.unfreeze)

        # How often a key is hashed and compared, and what of it the garbage collector knows, is
        # said of `dict` alone.
        test_setdefault_atomic = test_setitem_atomic_at_resize = None
        test_copy_maintains_tracking = test_track_dynamic = test_track_literals = None
        # An update goes through a dictionary in between, so nothing changes while it is read.
        test_merge_and_mutate = None

    class TestTheStandardLibrarysMappings(
        mapping_tests.TestHashMappingProtocol  # type: ignore[misc, name-defined]
    ):
        """What the standard library tests of mappings holds for a tracked one."""

        type2test: ClassVar = Tracked

        def _empty_mapping(self) -> Tracked:
            return made()

        def _full_mapping(self, data: Any) -> Tracked:
            return made(data)

        def test_copy(self) -> None:
            """A copy is an ordinary dictionary."""
            config = made({1: 1, 2: 2, 3: 3})
            assert config.copy() == {1: 1, 2: 2, 3: 3} and type(config.copy()) is dict
            assert made().copy() == made()
            with pytest.raises(TypeError):
                config.copy(None)  # type: ignore[call-arg]

        def test_fromkeys(self) -> None:
            """So is what is made by its type."""
            assert type(Tracked.fromkeys("abc")) is type(Tracked(a=1)) is dict
            assert made().fromkeys("ab", 0) == {"a": 0, "b": 0}
            assert Tracked([("a", 1)], b=2) == {"a": 1, "b": 2}
