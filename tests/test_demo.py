"""The demo through its commands: it learns, predicts, goes on, and starts from its weights."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from test_train import scalars
from torch_lab.runs import Run
from warm import Warm

DEMO = Path(__file__).parent.parent / "src/example_project/experiments/00_mnist_demo"
EPOCHS = {"hparams_checkpoint": 22, "hparams_weights_only": 3}
"""Of the scripts that show how to go on, which would train longer."""


class Demo:
    """The demo's commands, with their runs and data in a folder of their own."""

    def __init__(self, root: Path, python: str) -> None:
        self.root = root
        self.python = python
        self.folder = shutil.copytree(DEMO, root / "experiments" / DEMO.name)
        for name, epochs in EPOCHS.items():
            with (self.folder / f"{name}.py").open("a") as script:
                script.write(f'hparams["trainer"]["init"]["max_epochs"] = {epochs}\n')

    def run(self, *words: str | Path) -> str:
        """Run `torch-lab` with `words`, and return what it printed."""
        done = subprocess.run(
            [self.python, "-m", "torch_lab", *map(str, words)],
            cwd=self.root,
            env={**os.environ, "TORCH_LAB_ROOT": str(self.root)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def train(self, name: str) -> Run:
        """Train with the hparams script `name`, and return its run."""
        record = json.loads(self.run("train", self.folder / f"{name}.py", "--offline", "--json"))
        return Run.read(Path(record["folder"]))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> tuple[Demo, Run]:
    """The demo, trained once."""
    demo = Demo(tmp_path_factory.mktemp("demo"), warm.python)
    return demo, demo.train("hparams")


def best_metrics(run: Run) -> dict[str, Any]:
    """Return the metrics that the sidecar of `best` holds."""
    assert run.best is not None
    metrics: dict[str, Any] = run.best["metrics"]
    return metrics


def test_the_demo_reads_more_than_97_percent(demo: tuple[Demo, Run]) -> None:
    """With the last weights and with the best ones."""
    _, run = demo
    assert run.metrics["accuracy/validate"] > 0.97
    assert best_metrics(run)["accuracy/validate"] > 0.97
    assert (run.plots_folder / "confusion-validate-epoch_20.png").is_file()


def test_inference_agrees_with_validation(demo: tuple[Demo, Run]) -> None:
    """The held-out digits are read by `infer` as well as in validation."""
    demo_, run = demo
    out = demo_.run("infer", demo_.folder / "hparams.py", run.name, "predictions.csv")
    with (demo_.root / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    accuracy = sum(row["y"] == row["out"] for row in rows) / len(rows)
    assert accuracy == pytest.approx(best_metrics(run)["accuracy/validate"])
    assert f"accuracy {accuracy:.4f}" in out


def test_a_run_goes_on_from_the_demo(demo: tuple[Demo, Run]) -> None:
    """Steps count on from where the demo stood, and so does its loss."""
    demo_, run = demo
    more = demo_.train("hparams_checkpoint")
    losses = scalars(more)["loss/validate"]
    assert losses[0] == (460, pytest.approx(run.metrics["loss/validate"], rel=1e-4))
    assert min(step for step, _ in scalars(more)["loss/train"]) >= 460
    assert losses[-1][0] == 505
    assert losses[1][1] < 3 * losses[0][1]
    assert more.record.parent is not None and more.record.parent["run"] == run.name


def test_a_run_starts_from_the_weights_of_the_demo(demo: tuple[Demo, Run]) -> None:
    """Steps count from 0, the loss goes on from where the demo stood."""
    demo_, run = demo
    fresh = demo_.train("hparams_weights_only")
    losses = scalars(fresh)["loss/validate"]
    assert losses[0] == (0, pytest.approx(run.metrics["loss/validate"], rel=1e-4))
    assert losses[1][0] == 22
    assert all(loss < 3 * losses[0][1] for _, loss in losses)
