"""The keys that say how it is computed: compiled, channels last, with which kernels, pinned."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import signal
from collections.abc import Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CUDAAccelerator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from conftest import Lab
from test_check import checked
from test_resume import STRUCK, strike
from torch_lab import load
from torch_lab.errors import ExitCode, HparamsError
from torch_lab.exact import ExactResume, changed_conditions
from torch_lab.experiment import Experiment
from torch_lab.hparams import known_names
from torch_lab.loaders import Loaders
from torch_lab.modules import LabModule
from torch_lab.samplers import Position
from torch_lab.signals import StopRequest
from torch_lab.training import pin_if_of_use
from torch_lab.tuning import Tuning, laid_out_as, lay_out_states

CONFIG = '''
"""A small convolutional network, whose optimizer is named in the hparams."""

import functools

import torch
from torch.utils.data import DataLoader, TensorDataset

from torch_lab.modules import LabModule, TrainLabModule


def loader(count, seed, **kwargs):
    x = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x.sum(dim=(1, 2, 3)) > 0).long()), batch_size=8, **kwargs)


def network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 2)
    )


def train_config(hparams):
    kind, given = hparams["config"].get("optimizer", ("AdamW", {}))
    made = network()
    if "compiled" in hparams["config"]:
        made = torch.compile(made, backend="eager")
    module = TrainLabModule(
        made,
        torch.nn.CrossEntropyLoss(),
        functools.partial(getattr(torch.optim, kind), lr=0.01, **given),
    )
    return {
        "module": module,
        "train_dataloaders": loader(36, 1, shuffle=True),
        "val_dataloaders": loader(16, 2),
    }


def infer_config(hparams, *arguments):
    return {"module": LabModule(network()), "predict_dataloaders": loader(16, 2)}
'''
OWN = '''
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader


class Net(pl.LightningModule):
    """A module that knows nothing of torch_lab."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def predict_step(self, batch, batch_idx):
        return self.net(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def train_config(hparams):
    return {"module": Net(), "train_dataloaders": DataLoader(torch.ones(16, 4), batch_size=4)}


def infer_config(hparams):
    return {"module": Net(), "predict_dataloaders": DataLoader(torch.ones(16, 4), batch_size=4)}
'''
BASE: dict[str, Any] = {"trainer": {"init": {"max_epochs": 2, "accelerator": "cpu"}}}
EAGER = {"backend": "eager"}
"""It goes through all of `torch.compile` but the making of kernels, which takes half a minute."""
IS_LAST = {"memory_format": torch.channels_last}


@pytest.fixture
def images(lab: Lab) -> Lab:
    """A project with images and a convolutional network."""
    lab.write("__main__.py", CONFIG)
    lab.hparams("hparams", BASE)
    return lab


def trained(lab: Lab, **keys: Any) -> dict[str, Any]:
    """Train with `keys` in the hparams, and return the last checkpoint."""
    lab.hparams("hparams", {**BASE, **keys})
    result = lab.train(lab.path)
    assert result.code == 0, result.err
    checkpoint: dict[str, Any] = torch.load(lab.runs[-1].checkpoint("last"), weights_only=True)
    return checkpoint


def group_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = checkpoint["optimizer_states"][0]["param_groups"][0]
    return group


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two checkpoints hold nearly the same weights."""
    pairs = zip(one["state_dict"].values(), other["state_dict"].values(), strict=True)
    return all(torch.allclose(mine, its, atol=1e-5) for mine, its in pairs)


# The hparams.


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "compile a word": (
        {"compile": "yes"},
        ["compile must be True, False or a dictionary", "'yes'"],
    ),
    "compile a number": ({"compile": 1}, ["compile must be True, False or a", "not 1 (int)"]),
    "compile None": ({"compile": None}, ["compile must be True, False or a dictionary of argu"]),
    "compile misspelt": (
        {"compile": {"dynamc": True}},
        ["compile has the unknown key 'dynamc'; did you mean dynamic?"],
    ),
    "compile a model": ({"compile": {"model": 3}}, ["compile has the unknown key 'model'"]),
    "compile type": ({"compile": {"mode": 3}}, ["compile.mode must be a string, not 3 (int)"]),
    "compile mode": ({"compile": {"mode": "fast"}}, ["compile: Unrecognized mode=fast", "default"]),
    "compile backend": ({"compile": {"backend": "inductr"}}, ["compile: Invalid backend"]),
    "compile option": ({"compile": {"options": {"x": 1}}}, ["compile: Unexpected optimization op"]),
    "channels_last": ({"channels_last": 1}, ["channels_last must be True or False, not 1 (int)"]),
    "pin_memory": ({"pin_memory": "gpu"}, ["pin_memory must be True or False, not 'gpu'"]),
    "optimizer a name": ({"optimizer": "AdamW"}, ["optimizer must be a dictionary, not 'AdamW'"]),
    "optimizer misspelt": (
        {"optimizer": {"fussed": True}},
        ["optimizer has the unknown key 'fussed'; did you mean fused?"],
    ),
    "optimizer other": ({"optimizer": {"lr": 0.1}}, ["unknown key 'lr'", "have: fused, foreach"]),
    "optimizer type": ({"optimizer": {"fused": 1}}, ["optimizer.fused must be True or False"]),
    "optimizer both": (
        {"optimizer": {"fused": True, "foreach": True}},
        ["optimizer.fused and optimizer.foreach are both True"],
    ),
    "top level misspelt": ({"chanels_last": True}, ["key 'chanels_last'; did you mean channels_l"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_keys_are_refused(images: Lab, name: str) -> None:
    """Before a run exists, with the file, the line and the key."""
    hparams, parts = WRONG[name]
    images.write("hparams.py", f"hparams = {{}}\nhparams |= {hparams!r}\n")
    result = images.train(images.path)
    assert result.code == ExitCode.USAGE and "Traceback" not in result.err
    assert "hparams.py:2: " in result.err and not images.runs
    assert all(part in result.err for part in parts), result.err


def test_names_of_arguments_are_those_of_the_installed_torch() -> None:
    """Read from its source, before it is imported."""
    names = known_names(("compile",))
    parameters = inspect.signature(torch.compile).parameters
    assert names == tuple(name for name in parameters if name != "model")


def test_keys_are_recorded_traced_and_set(images: Lab) -> None:
    """As all others are; a dictionary may take the place of True, and False that of it."""
    keys = {"compile": EAGER, "channels_last": True, "optimizer": {"fused": True}}
    path = images.hparams("hparams", {**BASE, **keys})
    experiment = Experiment.load(path)
    assert {key: experiment.hparams.as_dict()[key] for key in keys} == keys
    assert ("optimizer", "fused") in experiment.histories
    given = {"compile": False, "pin_memory": True, "optimizer.foreach": False}
    over = Experiment.load(path, given).hparams
    assert (over.compile, over.pin_memory) == (False, True)
    assert over.optimizer == {"fused": True, "foreach": False}
    assert Experiment.load(path, {"compile": True}).hparams.compile is True
    images.hparams("hparams", {**BASE, "compile": True})
    assert Experiment.load(path, {"compile": EAGER}).hparams.compile == EAGER
    layered = images.write(
        "over.py",
        "from torch_lab.utils import layer\n"
        "hparams = layer('hparams.py', compile={'backend': 'eager'}, pin_memory=True)\n",
    )
    assert Experiment.load(layered).hparams.compile == EAGER
    assert trained(images, channels_last=True) and images.run().hparams["channels_last"] is True
    assert images.run().hparams["compile"] is False


# Channels last.


class Looks(nn.Conv2d):
    """A layer that notes how its inputs lie."""

    def forward(self, parts: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        self.seen = [_is_last(each) for each in parts]
        return super().forward(parts[0])


def _is_last(value: Tensor) -> bool:
    return value.dim() == 4 and value.is_contiguous(**IS_LAST)


def test_a_network_lies_channels_last_with_its_images() -> None:
    """Weights and inputs of four dimensions; others stay as they are, and all values."""
    network = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    network.add_module("volume", nn.Conv3d(3, 4, 2))
    before = {name: each.clone() for name, each in network.state_dict().items()}
    module = LabModule(network)
    Tuning(channels_last=True).tune(module)
    assert network[0].weight.is_contiguous(**IS_LAST)
    assert network.get_submodule("volume").weight.is_contiguous()  # type: ignore[operator]
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())

    looks = Looks(3, 4, 2)
    module = LabModule(looks)
    Tuning(channels_last=True).tune(module)
    image = torch.randn(2, 3, 4, 4)
    for made in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        made([image, torch.ones(2, 3)])
        assert made.model.seen == [True, False]


def test_checkpoints_load_either_way(images: Lab) -> None:
    """They hold the same names and nearly the same values, and each goes on from the other."""
    fused = {"optimizer": {"fused": True}}
    plain, last = trained(images, **fused), trained(images, **fused, channels_last=True)
    assert alike(plain, last)
    assert last["state_dict"]["0.weight"].is_contiguous(**IS_LAST)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    network.load_state_dict(last["state_dict"])
    assert network[0].weight.is_contiguous()
    ends = []
    for name in ("00_toy-hparams-v1", "00_toy-hparams-v2"):
        for is_last in (False, True):
            keys = {"checkpoint": {"checkpoint_task_id": name}, "channels_last": is_last}
            trainer = {"init": {"max_epochs": 4, "accelerator": "cpu"}}
            ends.append(trained(images, **keys, trainer=trainer))
            assert group_of(ends[-1])["fused"] is True
    assert all(alike(ends[0], each) for each in ends)


def test_what_fused_kernels_go_through_lies_alike() -> None:
    """States of weights that lay otherwise are put in order; else they would be mixed up."""

    def stepped(state_format: torch.memory_format) -> Tensor:
        weight = nn.Parameter(torch.arange(48.0).view(2, 3, 4, 2).contiguous(**IS_LAST))
        optimizer = AdamW([weight], lr=0.1, fused=True)
        for factor in (1, 2):
            weight.grad = torch.sin(torch.arange(48.0) * factor).view(2, 3, 4, 2)
            weight.grad = laid_out_as(weight.grad, weight)
            optimizer.step()
            state = optimizer.state[weight]
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].contiguous(memory_format=state_format)
            lay_out_states([optimizer])
            assert state["exp_avg"].stride() == weight.stride()
        return weight.detach()

    ends = [stepped(each) for each in (torch.channels_last, torch.contiguous_format)]
    assert torch.equal(*ends)
    value = torch.ones(3)
    assert laid_out_as(value, torch.ones(4)) is value


# Optimizers.


def chosen(optimizer: Optimizer, **keys: bool) -> list[tuple[Any, Any]]:
    """Return what each group of `optimizer` has after `keys` were offered to it."""
    module = nn.Module()
    module.weights = nn.ParameterList(  # type: ignore[assignment]
        [each for group in optimizer.param_groups for each in group["params"]]
    )
    places = {"optimizer": "hparams.py:3"}
    Tuning(optimizer=keys, places=places).choose_kernels([optimizer], module)
    return [(group.get("fused"), group.get("foreach")) for group in optimizer.param_groups]


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


def test_what_was_chosen_stays() -> None:
    """Group by group; what is added later has the default too."""
    assert chosen(AdamW(weights()), fused=True) == [(True, None)]
    assert chosen(SGD(weights(), lr=0.1), fused=True, foreach=False) == [(True, False)]
    assert chosen(Adam(weights(), foreach=False), fused=True) == [(None, False)]
    assert chosen(Adam(weights(), fused=False), fused=True) == [(False, None)]
    assert chosen(Adam(weights(), differentiable=True), fused=True) == [(None, None)]
    groups = [{"params": weights()}, {"params": weights(), "fused": False}]
    optimizer = AdamW(groups)  # type: ignore[arg-type]
    assert chosen(optimizer, fused=True) == [(True, None), (False, None)]
    optimizer.add_param_group({"params": weights()})
    assert optimizer.param_groups[-1]["fused"] is True
    assert chosen(RMSprop(weights()), foreach=True) == [(None, True)]


def test_fused_by_the_key_is_fused_by_the_factory(images: Lab) -> None:
    """To the bit."""
    by_key = trained(images, optimizer={"fused": True})
    by_factory = trained(images, config={"optimizer": ("AdamW", {"fused": True})})
    assert group_of(by_key)["fused"] is group_of(by_factory)["fused"] is True
    for name, weight in by_key["state_dict"].items():
        assert torch.equal(weight, by_factory["state_dict"][name])
    given = {"optimizer": {"fused": True}, "config": {"optimizer": ("SGD", {"foreach": True})}}
    assert group_of(trained(images, **given))["fused"] is None


@pytest.mark.parametrize("command", ["train", "check"])
def test_an_optimizer_without_the_key_is_refused(images: Lab, command: str) -> None:
    """In a line that names it; no run is left."""
    given = {"optimizer": {"fused": True}, "config": {"optimizer": ("LBFGS", {})}}
    images.hparams("hparams", {**BASE, **given})
    if command == "train":
        result = images.train(images.path)
        assert result.code == ExitCode.USAGE and "Traceback" not in result.err
        told = result.err
    else:
        told = checked(images, "--json", images.path).out
    assert "hparams.py:1: optimizer.fused: LBFGS has no such argument" in told
    assert not images.runs


class Odd(nn.Module):
    """A weight that fused kernels cannot step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "sparse":
            self.odd: Any = nn.Embedding(4, 2, sparse=True)
        else:
            self.odd = nn.ParameterDict({"weight": torch.ones(2, dtype=torch.complex64)})


ODD = {"sparse": "has sparse gradients", "complex": "is of torch.complex64"}


@pytest.mark.parametrize("kind", ODD)
def test_weights_without_fused_kernels_are_named(kind: str) -> None:
    """And those that the config script has decided about are its own."""
    module = Odd(kind)
    tuning = Tuning(optimizer={"fused": True}, places={"optimizer": "hparams.py:3"})
    told = f"hparams.py:3: optimizer.fused: odd.weight {ODD[kind]}"
    with pytest.raises(HparamsError, match=told):
        tuning.choose_kernels([SGD(module.parameters(), lr=0.1)], module)
    tuning.choose_kernels([SGD(module.parameters(), lr=0.1, foreach=False)], module)
    Tuning(optimizer={"foreach": True}).choose_kernels([SGD(module.parameters(), lr=0.1)], module)


# Compiling.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `torch.compile` gets; it compiles nothing."""
    found: list[dict[str, Any]] = []

    def compile(function: Any, **options: Any) -> Any:
        found.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return found


def test_a_network_is_compiled_in_place(images: Lab, calls: list[dict[str, Any]]) -> None:
    """For one size each, if nothing else is asked for; names in checkpoints stay."""
    checkpoint = trained(images, compile=True)
    assert calls == [{"dynamic": False}]
    assert "0.weight" in checkpoint["state_dict"]
    trained(images, compile={"mode": "max-autotune", "dynamic": None})
    assert calls[1:] == [{"dynamic": None, "mode": "max-autotune"}]
    module = LabModule(nn.Linear(2, 2))
    Tuning(compile={"dynamic": False}).tune(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert vars(other.model)["_compiled_call_impl"] is not None
    assert len(calls) == 5


class Scaled(nn.Module):
    """A network of the user's own, with an argument by name."""

    def forward(self, x: Tensor, *, factor: float = 2.0) -> Tensor:
        return x * factor


@pytest.mark.parametrize("network", [nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3), Scaled()])
def test_any_network_is_really_compiled(network: nn.Module) -> None:
    """Also one whose class is torch's own, of which `nn.Module.compile` compiles nothing."""
    graphs = []

    def backend(graph: Any, *_: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    expected = network(torch.ones(2, 3))
    module = LabModule(network)
    Tuning(compile={"dynamic": False, "backend": backend}).tune(module)
    assert torch.equal(module(torch.ones(2, 3)), expected) and len(graphs) == 1
    module.model(torch.ones(2, 3))
    assert len(graphs) == 1
    assert [*module.state_dict()] == [f"model.{name}" for name in network.state_dict()]


def test_each_network_has_compiled_code_of_its_own() -> None:
    """Of one code torch compiles eight forms at most, and runs others as they are."""
    graphs = []

    def backend(graph: Any, *_: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for width in range(1, 11):
        module = LabModule(nn.Sequential(nn.Linear(width, 1)))
        Tuning(compile={"dynamic": False, "backend": backend}).tune(module)
        module(torch.ones(1, width))
    assert len(graphs) == 10


@pytest.mark.parametrize("given", [{"disable": True}, {}])
def test_what_is_not_compiled_is_exact(given: dict[str, Any]) -> None:
    """And what is, with torch to choose the sizes, may not be."""
    module = LabModule(nn.Linear(3, 3))
    module.compile_network(**given, backend="eager")
    loaders = Loaders(Position(0))
    loaders.prepare(DataLoader(torch.ones(5, 3), batch_size=2), "train")
    exact = ExactResume(0, Position(0), loaders, StopRequest())
    assert len([*exact.reasons(module)]) == (0 if given else 1)


def test_compiled_trains_alike(images: Lab) -> None:
    """Through the command, with what makes no kernels."""
    assert alike(trained(images, compile=EAGER), trained(images))
    assert images.runs[0].hparams["compile"] == EAGER


def test_debugging_compiles_nothing(images: Lab, calls: list[dict[str, Any]]) -> None:
    """Nor does a check run what is compiled, but it looks at the arguments."""
    images.hparams("hparams", {**BASE, "compile": True})
    assert images.train(images.path, "--debug").code == 0
    assert images.infer("--debug", images.path).code == 0
    assert calls == []


def test_checks_look_at_the_arguments(images: Lab) -> None:
    """They run nothing that is compiled."""
    images.hparams("hparams", {**BASE, "compile": True})
    assert checked(images, images.path).code == 0
    images.hparams("hparams", {**BASE, "compile": {"mode": "fast"}})
    assert "Unrecognized mode=fast" in checked(images, images.path).out


def test_a_network_that_is_compiled_already(images: Lab) -> None:
    """It is left as it is; arguments that it would not get are refused."""
    images.hparams("hparams", {**BASE, "compile": True, "config": {"compiled": True}})
    _, module, _ = load(images.path).build()
    assert hasattr(module.model, "_orig_mod")
    assert vars(module.model).get("_compiled_call_impl") is None
    images.hparams("hparams", {**BASE, "compile": EAGER, "config": {"compiled": True}})
    result = images.train(images.path)
    assert result.code == ExitCode.USAGE
    assert "hparams.py:1: compile has arguments for a network that the config" in result.err


@pytest.mark.parametrize("key", ["compile", "channels_last"])
@pytest.mark.parametrize("command", ["train", "infer"])
def test_networks_of_other_modules_are_their_own(lab: Lab, key: str, command: str) -> None:
    """A line says what to do instead; the other keys are for them too."""
    lab.write("__main__.py", OWN)
    lab.hparams("hparams", {**BASE, key: True})
    result = getattr(lab, command)(lab.path)
    assert result.code == ExitCode.USAGE and not lab.runs
    assert f"hparams.py:1: {key} is for the network of a LabModule, and the module" in result.err
    assert re.search(r"is a Net\n  (compile its|have it convert its) network", result.err)
    checkpoint = trained(lab, optimizer={"fused": True}, pin_memory=True)
    assert group_of(checkpoint)["fused"] is True


def test_predictions_are_made_alike(images: Lab, calls: list[dict[str, Any]]) -> None:
    """`infer` compiles and lays out as training does; `--set` has it otherwise."""
    images.hparams("hparams", {**BASE, "compile": True, "channels_last": True})
    script = (images.folder / "__main__.py").read_text()
    hook = "\n    made = LabModule(Told(3, 2, 4))\n    return {'module': made,"
    told = (
        "\n\nclass Told(torch.nn.Conv2d):\n    def forward(self, x):\n"
        "        print('last:', x.is_contiguous(memory_format=torch.channels_last))\n"
        "        return super().forward(x)\n"
    )
    images.write(
        "__main__.py", script.replace('\n    return {"module": LabModule(network()),', hook) + told
    )
    result = images.infer(images.path)
    assert result.code == 0 and "last: True" in result.out, result.err
    assert len(calls) == 1
    eager = ("--set", "compile=False", "--set", "channels_last=False")
    result = images.infer(*eager, images.path)
    assert result.code == 0 and "last: False" in result.out, result.err
    assert len(calls) == 1


@pytest.mark.parametrize("by", ["wrapping", "in place", "key"])
@pytest.mark.parametrize(("dynamic", "tells"), [(None, 1), (False, 0), (True, 0)])
def test_kernels_for_any_size_may_not_be_exact(by: str, dynamic: bool | None, tells: int) -> None:
    """If they come with the second size: told before the run is interrupted."""
    network: Any = nn.Linear(2, 2)
    if by == "in place":
        network.compile(dynamic=dynamic, **EAGER)  # Which exact resume knows as well.
    elif by == "wrapping":
        network = torch.compile(network, dynamic=dynamic, **EAGER)
    module = LabModule(network)
    if by == "key":
        Tuning(compile={"dynamic": dynamic, **EAGER}).tune(module)
    position = Position(0)
    loaders = Loaders(position)
    loaders.prepare(DataLoader(TensorDataset(torch.ones(5, 2)), batch_size=2), "train")
    exact = ExactResume(0, position, loaders, StopRequest())
    assert len([*exact.reasons(module)]) == tells


# Going on.


def test_conditions_are_plain_and_the_same_in_other_processes() -> None:
    """A callable is its name; what compiles alike is alike."""

    def conditions(**keys: Any) -> dict[str, Any]:
        return Tuning(**keys).conditions()

    assert conditions(compile={"dynamic": False}) == {"compile": True, "channels_last": False}
    made = conditions(compile={"dynamic": False, "backend": len, "options": {"a": 1}})
    assert made["compile"] == {"dynamic": False, "backend": "len", "options": {"a": 1}}
    before = {"seed": 0, "processes": 1, "loaders": {}, "tuning": conditions(), "draws": 2}
    assert [*changed_conditions(before, before)] == []
    now = {**before, "tuning": conditions(compile={"dynamic": False}, channels_last=True)}
    assert [*changed_conditions(before, now)] == [
        "compile was False and is True",
        "channels_last was False and is True",
    ]
    older = {key: value for key, value in before.items() if key != "tuning"}
    assert [*changed_conditions(older, now)] == [*changed_conditions(before, now)]


CHANGES = {"channels_last": (False, True), "compile": (EAGER, False)}


@pytest.mark.parametrize("key", CHANGES)
def test_what_changes_the_bits_is_refused(images: Lab, key: str) -> None:
    """`--not-exact` goes on all the same, with what the hparams say now."""
    main = CONFIG.replace('"module": module', '"callbacks": [Strike()], "module": module')
    images.write("__main__.py", main + STRUCK)
    before, now = CHANGES[key]
    images.hparams("hparams", {**BASE, key: before})
    strike(images, signal.SIGTERM)
    assert images.run().state == "stopped"
    images.hparams("hparams", {**BASE, key: now})
    result = images.train(images.path, "--resume")
    assert result.code == ExitCode.USAGE, result.err
    assert f"{key} was" in result.err and f"and is {now}" in result.err
    result = images.train(images.path, "--resume", "--not-exact")
    assert result.code == 0, result.err


def test_optimizers_go_on_as_the_checkpoint_has_them(images: Lab) -> None:
    """The bits stay, so the change is listed and not refused."""
    main = CONFIG.replace('"module": module', '"callbacks": [Strike()], "module": module')
    images.write("__main__.py", main + STRUCK)
    images.hparams("hparams", {**BASE, "optimizer": {"fused": True}})
    strike(images, signal.SIGTERM)
    images.hparams("hparams", BASE)
    result = images.train(images.path, "--resume")
    assert result.code == 0 and "optimizer.fused True -> nothing" in result.err, result.err
    last = torch.load(images.run().checkpoint("last"), weights_only=True)
    assert group_of(last)["fused"] is True
    unbroken = trained(images, optimizer={"fused": True})
    assert all(torch.equal(last["state_dict"][k], v) for k, v in unbroken["state_dict"].items())


def test_a_notebook_trains_as_a_run_does(images: Lab) -> None:
    """`build` tunes too, to the bit."""
    keys = {"channels_last": True, "optimizer": {"fused": True}}
    weights = trained(images, **keys)["state_dict"]
    trainer, module, data = load(images.path, set={"checkpoint.every_minutes": None}).build()
    trainer.fit(module, data)
    assert isinstance(module, LabModule)
    assert all(torch.equal(weights[k], v) for k, v in module.model.state_dict().items())


# Pinned memory.


class Data(pl.LightningDataModule):
    """Makes its loader when it is asked for."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)


@pytest.mark.parametrize("first", [True, False])
def test_all_loaders_pin(first: bool) -> None:
    """Those of a datamodule too; what a loader had before it has after it."""
    loaders = Loaders(Position(0))
    given = [DataLoader(TensorDataset(torch.ones(8, 2)), pin_memory=each) for each in (False, True)]
    data = Data()
    loaders.prepare_datamodule(data)
    if first:
        loaders.pin_batches()
    loaders.prepare(given, "validate")
    if not first:
        assert [each.pin_memory for each in given] == [False, True]
        loaders.pin_batches()
    assert [each.pin_memory for each in [*given, data.train_dataloader()]] == [True] * 3
    Loaders(Position(0)).prepare(given, "validate")
    assert [each.pin_memory for each in given] == [False, True]


@pytest.mark.parametrize(("device", "pins"), [("gpu", True), ("cpu", False)])
def test_batches_are_pinned_for_a_device(images: Lab, device: str, pins: bool) -> None:
    """For others than the CPU, if that is asked for."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    if device == "gpu":
        trainer.strategy.accelerator = CUDAAccelerator()
    for asked in (True, False):
        images.hparams("hparams", {**BASE, "pin_memory": asked})
        hparams = Experiment.load(images.path).hparams
        loaders, loader = Loaders(Position(0)), DataLoader(TensorDataset(torch.ones(8, 2)))
        loaders.prepare(loader, "train")
        pin_if_of_use(loaders, trainer, hparams)
        assert loader.pin_memory is (asked and pins)
