"""What a start and a step cost, in what does not depend on the machine: modules, files, calls."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import device
from conftest import CONFIG, Lab
from device import OURS, Noting, Waits
from torch_lab.callbacks import progress
from warm import Warm

HEAVY = {"torch", "pytorch_lightning", "torchmetrics", "clearml", "numpy", "scipy", "matplotlib"}
FEW, MANY = 20, 200

ANSWER = """
import sys
from torch_lab import cli
try:
    cli.main(getattr(cli, sys.argv[1].replace("-", "_")), sys.argv[1], sys.argv[2:])
except SystemExit:  # Completion.
    pass
print("\\nloaded:", *sys.modules)
"""
COUNTING = """
import os, sys
from collections import Counter
from pathlib import Path

artifacts, looked_at = str(Path("data/artifacts").resolve()), Counter()

def note(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.stat"):
        path = os.path.realpath(os.fsdecode(arguments[0])) if type(arguments[0]) is not int else ""
        looked_at[event] += path.startswith(artifacts)

def noted(stat):  # Python itself does not say when it is called.
    def wrapper(path, *args, **kwargs):
        if not isinstance(path, int) and str(path).find("artifacts") >= 0:
            looked_at["os.stat"] += 1
        return stat(path, *args, **kwargs)
    return wrapper

os.stat = noted(os.stat)
sys.addaudithook(note)
from torch_lab import cli
code = cli.main(cli.torch_lab, "torch-lab", sys.argv[1:])
counted = sum(looked_at.values())
Path("counted").write_text(str(counted))
sys.exit(code)
"""
COMPLETING = {"_TRAIN_COMPLETE": "bash_complete", "COMP_WORDS": "train to", "COMP_CWORD": "1"}


@pytest.mark.parametrize(
    ("words", "variables", "most"),
    [
        (["train", "--help"], {}, 24),
        (["train"], COMPLETING, 25),
        (["torch-lab", "runs"], {}, 90),
        (["train", "nowhere.py"], {}, 45),
    ],
    ids=["help", "completion", "runs", "misspelt"],
)
def test_what_answers_loads_little(
    lab: Lab, words: list[str], variables: dict[str, str], most: int
) -> None:
    """Neither torch nor what is as large, and not many modules: each takes its time."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, *words],
        cwd=lab.root,
        env=lab.environment(**variables),
        capture_output=True,
        text=True,
        check=True,
    )
    found = set(done.stdout.rpartition("loaded: ")[2].split())
    assert not found & HEAVY
    others = {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}
    assert 10 < len(others) <= most, (len(others), sorted(others))


def files_looked_at(lab: Lab, warm: Warm, *words: str) -> int:
    """Return how often a command opens, lists or asks for something of the artifacts folder."""
    script = lab.root / "counting.py"
    script.write_text(COUNTING)
    done = subprocess.run(
        [warm.python, script, *words],
        cwd=lab.root,
        env=lab.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int((lab.root / "counted").read_text())


def add_runs(lab: Lab, versions: range) -> None:
    """Make runs as the first one is, which is trained already."""
    first = lab.root / "data" / "artifacts" / "00_toy-hparams-v1"
    for version in versions:
        folder = first.with_name(f"00_toy-hparams-v{version}")
        shutil.copytree(first, folder)
        record = json.loads((first / "run.json").read_text())
        record |= {"version": version, "name": folder.name}
        (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "words",
    [["--offline"], ["--offline", "--resume"], ["--offline", "--resume", "00_toy-hparams"]],
    ids=["new", "resumed", "resumed by name"],
)
def test_starting_does_not_grow_with_runs(lab: Lab, warm: Warm, words: list[str]) -> None:
    """Of the runs that are there a training looks at the names, and at those that it needs."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1}}})
    assert files_looked_at(lab, warm, "train", lab.path) > 20
    counts = []
    for versions in (range(2, FEW), range(FEW + 10, MANY)):
        add_runs(lab, versions)
        newest = lab.root / "data" / "artifacts" / f"00_toy-hparams-v{versions[-1]}" / "run.json"
        newest.write_text(json.dumps(json.loads(newest.read_text()) | {"state": "stopped"}))
        counts.append(files_looked_at(lab, warm, "train", lab.path, *words))
    few, many = counts
    assert few > 5
    assert many <= few + 5


IMPORTING = """
import gc, sys
from torch_lab.importing import heavy_imports
collections = []
with heavy_imports():
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    import torch_lab.runner
    gc.callbacks.clear()
scipy = sys.modules["scipy.signal"]
print(len(collections), gc.isenabled(), gc.get_freeze_count() > 100_000)
print("windows" in vars(scipy), "scipy.stats" in sys.modules, type(scipy).__name__)
before = gc.get_freeze_count()
with heavy_imports():
    assert gc.isenabled()
print(gc.get_freeze_count() == before)
import scipy.signal
print(scipy.signal.hamming(3).round(2).tolist(), scipy.signal.get_window.__name__)
print(type(scipy.signal).__name__, "windows" in vars(scipy.signal))
try:
    scipy.signal.nothing
except AttributeError as error:
    print(error)
"""


def test_large_imports_look_for_no_garbage_and_leave_out_what_nobody_uses() -> None:
    """Nothing is collected meanwhile; later all of it is left alone; scipy comes when it is used.

    A process that has torch already is not touched.
    """
    pytest.importorskip("scipy")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "0 True True",
        "False False _Deferred",
        "True",
        "[0.08, 1.0, 0.08] get_window",
        "module True",
        "module 'scipy.signal' has no attribute 'nothing'",
    ]


def test_a_broken_import_leaves_the_collection_on() -> None:
    """Whatever goes wrong meanwhile."""
    code = (
        "import gc\nfrom torch_lab.importing import heavy_imports\n"
        "try:\n    with heavy_imports():\n        assert not gc.isenabled()\n"
        "        import torch_lab.nothing\nexcept ImportError:\n"
        "    print(gc.isenabled(), gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True 0\n"


@pytest.mark.parametrize(("words", "freezes"), [(["runs"], True), (["explain", "PATH"], False)])
def test_what_scripts_left_open_is_written_at_the_end(
    lab: Lab, words: list[str], freezes: bool
) -> None:
    """An ending command goes through what is left only if a script has run: it may be its file."""
    lab.write(
        "hparams.py",
        """
        hparams = {}
        class Notes:
            def __init__(self):
                self.me, self.file = self, open("notes.txt", "w")
                self.file.write("kept")
        notes = Notes()
        """,
    )
    code = (
        "import atexit, gc\nfrom torch_lab import cli\n"
        "atexit.register(lambda: print('frozen:', gc.get_freeze_count() > 0))\n"
        "cli.torch_lab_entry()"
    )
    given = [lab.path if word == "PATH" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        cwd=lab.root,
        env=lab.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"frozen: {freezes}"
    if not freezes:
        assert (lab.root / "notes.txt").read_text() == "kept"


# What waits for a device.

WATCHED = """
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import device

METRICS = {
    "accuracy": MulticlassAccuracy(2, validate_args=False),
    "f1": MulticlassF1Score(2, validate_args=False),
}
"""


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a terminal that shows every step."""
    monkeypatch.setattr(progress, "_is_terminal", lambda stream: True)
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0)


class Plain(pl.LightningModule):
    """What plain Lightning's users write: the loss and the metrics of each batch are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(4, 2)
        self.accuracy = MulticlassAccuracy(2, validate_args=False)
        self.f1 = MulticlassF1Score(2, validate_args=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        y_pred = self.model(x)
        loss = torch.nn.functional.cross_entropy(y_pred, y)
        self.log("loss", loss)
        for metric in (self.accuracy, self.f1):
            metric(y_pred.detach(), y)
        self.log_dict({"accuracy": self.accuracy, "f1": self.f1}, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


DUE = [1, 33, 50, 65, 70]
"""Steps at which metrics are (every 32), the logger (every 50), or the end of the epoch."""
BETWEEN = [number for number in range(1, 71) if number not in DUE]


def of_plain_lightning() -> Waits:
    """Return who waits in a training with plain Lightning."""
    x = torch.randn(560, 4)
    data = DataLoader(TensorDataset(x, (x.sum(dim=1) > 0).long()), batch_size=8)
    trainer = pl.Trainer(
        max_epochs=1,
        strategy=device.strategy(),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with Waits() as waits:
        trainer.callbacks.append(Noting())  # type: ignore[attr-defined]
        trainer.fit(Plain(), data)
    return waits


@pytest.mark.filterwarnings("ignore:Total length")  # A number that is made up.
@pytest.mark.usefixtures("live")
def test_no_step_waits_for_the_device(lab: Lab) -> None:
    """A whole run, with metrics, checkpoints and progress: it waits when something is due alone."""
    main = CONFIG.replace(
        """hparams["config"].get("lr", 0.1)),""",
        """hparams["config"].get("lr", 0.1)), metrics=METRICS,""",
    )
    main = main.replace('"module": module', '"callbacks": [device.Noting()], "module": module')
    main = main.replace("loader(32,", "loader(560,").replace("loader(16,", "loader(80,")
    lab.write("__main__.py", main + WATCHED)
    init = "{'max_epochs': 1, 'inference_mode': False, 'strategy': device.strategy()}"
    lab.write("hparams.py", f"import device\n\nhparams = {{'trainer': {{'init': {init}}}}}\n")
    with Waits() as waits:
        result = lab.train(lab.path)
    assert result.code == 0, result.err
    assert "loss 0.0200\x1b[2K" in result.err.replace("\r", "")  # 1 of 50, at step 50.
    assert [waits.at("train", number) for number in BETWEEN] == [[]] * len(BETWEEN)
    assert [waits.at("validate", number) for number in range(2, 10)] == [[]] * 8
    assert [number for number in range(1, 71) if waits.at("train", number, OURS)] == DUE
    assert len(waits.at("train", 33, OURS)) == 1
    # Plain Lightning: torchmetrics asks twice in each step, as it counts classes for each metric.
    plain = of_plain_lightning()
    assert {len(plain.at("train", number)) for number in BETWEEN} == {2}
