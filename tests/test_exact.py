"""Exact resume as a whole: sweeps of kills and signals, and what is needed of Lightning for it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import clearml
import pytest
import pytorch_lightning as pl
import torch
from clearml.backend_api import Session
from clearml.backend_interface.base import InterfaceBase
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy

import torch_lab
from conftest import Lab
from warm import Warm

SWEEP = Path(__file__).with_name("sweep.py")
SOURCES = Path(torch_lab.__file__).parent
STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
CONFIGURATIONS = (
    *("plain", "foreign", "arrays", "workers", "persistent", "plateau", "plateau_step"),
    *("epochs_only", "val_check_interval", "val_check_foreign", "accumulation", "partial"),
    *("combined", "stops", "stream", "stream_workers", "datamodule", "bf16", "max_steps"),
    *("every_other", "ddp", "ddp_foreign", "channels_last", "fused", "tuned"),
)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is one: on a disk most of the time goes into `fsync`."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir=shared))
    yield folder
    shutil.rmtree(folder)


def swept(
    folder: Path, points: int, *words: str, python: str = sys.executable
) -> list[dict[str, Any]]:
    """Sweep, and return what was found at each point."""
    command = [python, str(SWEEP), str(folder), str(points), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wrong = [point for point in found if point["wrong"]]
    assert (done.returncode, wrong) == (0, []), done.stderr
    return found


def test_a_killed_run_ends_with_the_same_bits(memory: Path, warm: Warm) -> None:
    """A sample of the sweep: weights, states, metrics, log lines; no process is left behind."""
    names = ("plain", "val_check_foreign", "workers", "partial", "ddp", "tuned")
    assert len(swept(memory, 1, *names, python=warm.python)) == 6


def test_a_stopped_run_ends_with_the_same_bits(memory: Path, warm: Warm) -> None:
    """A sample for each signal: the exit code is that of the signal, the stop is quick."""
    words = ("val_check_interval", "--by", *STOPS)
    assert len(swept(memory, 1, *words, python=warm.python)) == 4


@pytest.mark.slow
def test_all_killed_runs_end_with_the_same_bits(memory: Path) -> None:
    """At more than 300 points, a quarter of them chains of three kills."""
    found = swept(memory, 14, *CONFIGURATIONS)
    assert len(found) >= 300 and len({point["configuration"] for point in found}) >= 12


@pytest.mark.slow
def test_a_compiled_network_ends_with_the_same_bits(memory: Path) -> None:
    """Also with a last, smaller batch, if kernels are for one size each, or all for any size."""
    names = ("compiled", "compiled_dynamic", "compiled_static", "compiled_by_key", "compiled_ddp")
    assert len(swept(memory, 2, *names)) == 10


@pytest.mark.slow
def test_all_stopped_runs_end_with_the_same_bits(memory: Path) -> None:
    """Each signal at 30 moments, some of them twice within 50 ms."""
    assert len(swept(memory, 10, "plain", "workers", "val_check_interval", "--by", *STOPS)) == 120


@pytest.mark.slow
def test_no_process_is_left_of_a_killed_run(memory: Path) -> None:
    """Of 50 that had two workers."""
    assert len(swept(memory, 25, "workers", "persistent", "--seed", "1")) == 50


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("part", [0.03, 0.3, 0.5, 0.7])
def test_a_signal_while_a_command_starts(lab: Lab, name: str, part: float) -> None:
    """Whatever is imported or made then: its exit code, and what it leaves can be gone on from."""
    began = time.monotonic()
    assert lab.command("train", lab.path).code == 0
    with lab.start("train", lab.path) as process:
        time.sleep(part * (time.monotonic() - began))
        process.send_signal(signal.Signals[name])
        _, err = process.communicate(timeout=60)
    number = signal.Signals[name].value
    assert process.returncode in (128 + number, -number), err
    newest = lab.runs[-1]
    assert newest.state in ("completed", "stopped")
    assert lab.train(lab.path, "--resume", newest.name).code == 0
    assert lab.runs[-1].metrics == lab.runs[0].metrics


# What is used of Lightning, torchmetrics and torch that they do not promise to keep.


STANDS_FOR = {
    "connector": "trainer._logger_connector",
    "fit": "trainer.fit_loop",
    "epoch": "trainer.fit_loop.epoch_loop",
    "loop": "trainer.fit_loop.epoch_loop",
    "val_loop": "trainer.fit_loop.epoch_loop.val_loop",
    "meta": "item.meta",
}
"""Names in `exact.py`, as which the same thing is found from those of `known`."""
OURS = ("self", "cls", "super()", "os", "sys", "feed", "dictionary", "each", "reads")
"""What is looked at elsewhere, and what is of Python or ours."""
IN_STRINGS = (
    "trainer.fit_loop.epoch_loop.advance",
    "trainer.fit_loop.epoch_loop._should_check_val_fx",
    "trainer.fit_loop.epoch_loop.automatic_optimization._restarting",
    "trainer.fit_loop.epoch_loop.val_loop._restarting",
    "item.cumulated_batch_size",
    *(f"item.meta.{name}" for name in ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch")),
    *(f"item.meta.{name}" for name in ("enable_graph", "reduce_fx", "sync.rank_zero_only")),
)
"""What is used without being an attribute in the source: by its name, or in a loop."""
PARAMETERS = {
    "results.log": (
        *("fx", "name", "value", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph"),
        *("reduce_fx", "sync_dist", "rank_zero_only", "metric_attribute", "sync_dist_fn"),
        "batch_size",
    ),
    "trainer.fit_loop.epoch_loop.advance": ("data_fetcher",),
    "trainer.fit_loop.epoch_loop._should_check_val_fx": ("data_fetcher",),
    "trainer._checkpoint_connector.dump_checkpoint": ("weights_only",),
    "InterfaceBase._send": ("session", "req"),
}
COUNTERS = ("epoch_loop.batch_progress", "epoch_progress")


class Look(pl.Callback):
    """Has a look at a training of Lightning's own, in the midst of it."""

    known: Mapping[str, Any]
    loops: Mapping[str, Any]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        results = trainer.fit_loop.epoch_loop._results
        item = next(iter(results.values()))
        self.known = {
            "trainer": trainer,
            "results": results,
            "item": item,
            "metric": BinaryAccuracy(),
            "tensor": torch.ones(1),
            "storage": torch.ones(1).untyped_storage(),
            "typed_storage": torch.TypedStorage([1], dtype=torch.float32, _internal=True),
            "DataLoader": DataLoader,
            "Task": clearml.Task,
            "made": clearml.Task,
            "Session": Session,
            "InterfaceBase": InterfaceBase,
        }
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self.loops = checkpoint["loops"]["fit_loop"]


class Line(pl.LightningModule):
    """The least that trains, validates and logs a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(batch).mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def look() -> Look:
    """A training of Lightning's own, without anything of ours."""
    look = Look()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, enable_checkpointing=False, callbacks=[look], **quiet
    )
    data = DataLoader(torch.ones(2, 1))
    trainer.fit(Line(), data, data)
    return look


def moved(expression: str, known: Mapping[str, Any]) -> str | None:
    """Return the part of a dotted `expression` that is not there any more."""
    root, *names = expression.split(".")
    if root in STANDS_FOR:
        return moved(".".join([STANDS_FOR[root], *names]), known)
    here, path = known[root], root
    for name in names:
        if here is None:
            return None  # Such as a trainer's `logger`.
        path = f"{path}.{name}"
        if not hasattr(here, name):
            return path
        here = getattr(here, name)
    return None


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def chains(tree: ast.AST) -> Iterator[list[str]]:
    """Yield the attributes in a source, after all that they are attributes of."""
    for node in ast.walk(tree):
        owner, path = node, []
        while isinstance(owner, ast.Attribute):
            path.append(owner.attr)
            owner = owner.value
        if path:
            yield [ast.unparse(owner), *reversed(path)]


def foreign_uses(source: str, is_exact: bool) -> Iterator[str]:
    """Yield the attributes of Lightning's objects, and all private ones of others than `self`."""
    roots = {"trainer", *(STANDS_FOR if is_exact else ())}
    for root, *names in chains(ast.parse(source)):
        is_known = root in roots and "lightning_module" not in names
        if is_known or (root not in OURS and is_private(names[-1])):
            yield ".".join([root.replace("type(loader)", "DataLoader"), *names])


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: path.name)
def test_lightning_still_has_what_we_use(path: Path, look: Look) -> None:
    """All that our source touches of a trainer, and everything private of whatever it is."""
    uses = set(foreign_uses(path.read_text(), path.name == "exact.py"))
    unknown = {use for use in uses if use.split(".")[0] not in look.known.keys() | STANDS_FOR}
    assert not unknown, "tell STANDS_FOR, or Look.known, where these are to be found"
    assert [gone for use in sorted(uses) if (gone := moved(use, look.known))] == []


def test_lightning_still_has_what_is_named_in_strings(look: Look) -> None:
    """Methods that are replaced, fields that are copied, parameters, counters in checkpoints."""
    assert [gone for name in IN_STRINGS if (gone := moved(name, look.known))] == []
    for function, names in PARAMETERS.items():
        root, *path = function.split(".")
        found: Any = look.known[root]
        for name in path:
            found = getattr(found, name)
        missing = set(names) - inspect.signature(found).parameters.keys()
        assert not missing, f"{function} has other parameters"
    for name in COUNTERS:
        counts = look.loops[name]
        for total in ("total", "current"):
            assert {"ready", "completed"} <= counts[total].keys(), name
    assert "is_last_batch" in look.loops["epoch_loop.batch_progress"]


def classes() -> Iterator[tuple[ModuleType, ast.ClassDef]]:
    """Yield our classes, with their modules."""
    for path in sorted(SOURCES.rglob("*.py")):
        name = ".".join(["torch_lab", *path.relative_to(SOURCES).with_suffix("").parts])
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not name.endswith("__"):
                yield importlib.import_module(name), node


def has(kind: type, name: str) -> bool:
    """Return whether a class has an attribute, or gives it to its objects."""
    if hasattr(kind, name):
        return True
    sources = [inspect.getsource(base) for base in kind.__mro__ if is_python(base)]
    given = re.compile(rf"self\.{name}(:| =|,)|vars\(self\)\.update\(.*\b{name}=")
    return any(given.search(source) for source in sources)


def is_python(kind: type) -> bool:
    """Return whether a class is written in Python, not in C, where it says that it is."""
    if kind.__module__ == "collections.abc":
        return False
    return bool(getattr(sys.modules[kind.__module__], "__file__", "").endswith(".py"))


def inherited(node: ast.ClassDef) -> Iterator[str]:
    """Yield the private names that a class uses of itself, or has methods for and never calls."""
    used = [names[0] for root, *names in chains(node) if root in ("self", "super()")]
    yield from filter(is_private, used)
    methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
    yield from (f"super {name}" for name in methods if is_private(name))


def test_our_classes_still_inherit_what_they_use() -> None:
    """From loaders and modules of torch and Lightning, also what is only overridden there."""
    gone = []
    for module, node in classes():
        kind = getattr(module, node.name, None)
        if kind is None or all(
            base.__module__.startswith("torch_lab") for base in kind.__mro__[:-1]
        ):
            continue
        text = inspect.getsource(module)
        for name in set(inherited(node)):
            bare = name.removeprefix("super ")
            is_called = f".{bare}(" in text.replace(f"super().{bare}(", "")
            if name != bare and is_called:
                continue  # A method of ours.
            bases = kind.__mro__[1:] if name != bare else kind.__mro__
            if not any(has(base, bare) for base in bases):
                gone.append(f"{node.name}.{bare}")
    assert gone == []


def test_what_moved_is_named(look: Look) -> None:
    """The checks above can fail, and say by what."""
    uses = foreign_uses("x = trainer.fit_loop._gone\ny = value._odd", is_exact=False)
    assert {*uses} == {"trainer.fit_loop._gone", "trainer.fit_loop", "value._odd"}
    assert moved("epoch.val_loop._gone.other", look.known) == (
        "trainer.fit_loop.epoch_loop.val_loop._gone"
    )
    assert not has(Metric, "_gone") and has(Metric, "_update_count")
