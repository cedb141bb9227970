"""`train`, from the path of a script to a run on disk."""

from __future__ import annotations

import json
import logging
import math
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torch_lab
from conftest import CONFIG, Lab
from torch_lab.errors import ExitCode
from torch_lab.runs import Run
from warm import Warm


def scalars(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Return what the event files of a run say: steps and values by name."""
    events = EventAccumulator(str(run.metrics_folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def weights(run: Run, name: str = "last") -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint."""
    found: dict[str, torch.Tensor] = torch.load(run.checkpoint(name), weights_only=True)[
        "state_dict"
    ]
    return found


def test_a_run_leaves_a_whole_folder(lab: Lab) -> None:
    """Record, sources, metrics, checkpoints with sidecars and console.log are there after a run."""
    result = lab.train(lab.path)

    assert result.code == ExitCode.DONE, result.err
    run = lab.run()
    assert (run.name, run.state, run.record.version) == ("00_toy-hparams-v1", "completed", 1)
    assert run.record.experiment == "00_toy"
    assert run.record.packages["torch"].startswith("2.")
    assert {"loss/train", "loss/validate"} <= set(run.metrics)
    sources = {str(path.relative_to(run.folder / "sources")) for path in run.folder.rglob("*.py")}
    assert sources == {f"toys/experiments/00_toy/{name}" for name in ("__main__.py", "hparams.py")}
    files = {path.name for path in run.checkpoints_folder.iterdir()}
    names = ("last", "previous", "best")
    assert files == {f"{name}.{kind}" for name in names for kind in ("ckpt", "json")}
    log = run.console_log.read_text()
    assert "epoch 2/2" in log and "tensorboard --logdir" in log
    assert "\x1b" not in log + result.out + result.err


def test_header_and_table_say_what_is_worth_knowing(lab: Lab) -> None:
    """The header goes to stderr, the closing table to stdout."""
    lab.write(
        "faster.py",
        """
        from torch_lab.utils import import_script_as_module

        hparams = import_script_as_module("hparams.py").hparams
        hparams["config"] = {"lr": 0.3}
        """,
    )
    result = lab.train(lab.folder / "faster.py")

    for part in (
        "00_toy-faster-v1, offline",
        "hparams.py > faster.py",
        "config.lr nothing -> 0.3",
        "no git commit",
        "CPU x 1, precision 32-true, seed 0",
        "after 2 epochs",
        "data/artifacts/00_toy-faster-v1",
        "baseline",
    ):
        assert part in result.err
    for part in ("00_toy-faster-v1 completed in", "best.ckpt", "last.ckpt", "tensorboard --logdir"):
        assert part in result.out


STOPS = {
    "nothing given": ({}, "after 1,000 epochs (Lightning's default: nothing was given)"),
    "epochs": ({"max_epochs": 3}, "after 3 epochs"),
    "steps": ({"max_steps": 4}, "after 4 steps"),
    "time": ({"max_time": "00:00:01:00", "max_epochs": 1}, "after 1 epoch or after 00:00:01:00"),
    "never": ({"max_epochs": -1, "limit_train_batches": 1}, "only when you stop it"),
}


@pytest.mark.parametrize("name", STOPS)
def test_the_header_says_what_stops_the_run(lab: Lab, name: str) -> None:
    """Whatever ends the run is said before it starts."""
    init, said = STOPS[name]
    lab.write(
        "__main__.py",
        CONFIG.replace(
            "def train_config",
            "import pytorch_lightning as pl\n"
            "class Enough(pl.Callback):\n"
            "    def on_train_batch_end(self, trainer, *args):\n"
            "        trainer.should_stop = True\n\n"
            "def train_config",
        ).replace('"module": module', '"callbacks": [Enough()], "module": module'),
    )
    lab.hparams("hparams", {"trainer": {"init": init}})
    result = lab.train(lab.path)
    assert result.code == 0, result.err
    assert f"stops   {said}\n" in result.err


def test_early_stopping_is_among_what_stops_the_run(lab: Lab) -> None:
    """EarlyStopping is named with what it monitors, and a wrong monitor is found at once."""
    lab.config(
        '"module": module',
        '"callbacks": [__import__("pytorch_lightning").callbacks.EarlyStopping('
        'hparams["config"]["stop"])], "module": module',
    )
    lab.hparams(
        "right", {"config": {"stop": "loss/validate"}, "trainer": {"init": {"max_epochs": 1}}}
    )
    assert "1 epoch or when loss/validate stops improving" in lab.train(lab.folder / "right.py").err
    lab.hparams("wrong", {"config": {"stop": "loss/val"}})
    wrong = lab.train(lab.folder / "wrong.py")
    assert wrong.code == ExitCode.USAGE
    assert "EarlyStopping.monitor is 'loss/val', which nothing logs" in wrong.err


def test_the_baseline_comes_before_the_first_step(lab: Lab) -> None:
    """Validation runs once at step 0, on the weights as built, and changes nothing that follows."""
    lab.train(lab.path)
    lab.train(lab.path, "--no-validate")
    with_baseline, without = lab.runs
    steps = [[step for step, _ in scalars(run)["loss/validate"]] for run in lab.runs]
    assert steps == [[0, 3, 7], [3, 7]]
    for name, tensor in weights(with_baseline).items():
        assert torch.equal(tensor, weights(without)[name])


def test_without_validation_data_there_is_no_baseline_and_no_best(lab: Lab) -> None:
    """`val_dataloaders` may be None."""
    lab.config('"val_dataloaders": loader(16, 2)', '"val_dataloaders": None')
    result = lab.train(lab.path)
    assert result.code == 0, result.err
    assert "baseline" not in result.err
    names = {path.stem for path in lab.run().checkpoints_folder.glob("*.ckpt")}
    assert names == {"last", "previous"}


def test_the_same_seed_gives_the_same_weights(lab: Lab) -> None:
    """Seed 0 is a seed, also when none is given; another seed gives other weights."""
    for name, seed in (("none", {}), ("zero", {"seed": 0}), ("one", {"seed": 1})):
        lab.hparams(name, {"trainer": {"init": {"max_epochs": 1}}, **seed})
        torch.manual_seed(99), random.seed(99), np.random.seed(99)
        lab.train(lab.folder / f"{name}.py")
    none, one, zero = (weights(run)["weight"] for run in lab.runs)
    assert torch.equal(none, zero)
    assert not torch.equal(none, one)


def test_last_is_the_last_although_nothing_improves(lab: Lab) -> None:
    """After four epochs without improvement `last` is of epoch 4, and `best` of epoch 1."""
    lab.hparams("hparams", {"config": {"lr": 0.0}, "trainer": {"init": {"max_epochs": 4}}})
    lab.train(lab.path)
    run = lab.run()
    assert run.sidecar("last")["epoch"] == 3
    assert run.sidecar("best")["epoch"] == 0


def test_last_is_written_when_training_ends_within_an_epoch(lab: Lab) -> None:
    """`max_steps` in mid-epoch leaves a `last` of that very step."""
    lab.hparams("hparams", {"trainer": {"init": {"max_steps": 6}}})
    lab.train(lab.path)
    assert lab.run().sidecar("last")["step"] == 6


@pytest.mark.parametrize(("mode", "pick"), [("min", min), ("max", max)])
def test_best_follows_the_monitored_metric(lab: Lab, mode: str, pick: Any) -> None:
    """`config.monitor` and `config.monitor_mode` choose the best."""
    config = {"monitor": "loss/validate", "monitor_mode": mode, "lr": 0.5}
    lab.hparams("hparams", {"config": config, "trainer": {"init": {"max_epochs": 3}}})
    lab.train(lab.path)
    run = lab.run()
    values = [value for step, value in scalars(run)["loss/validate"] if step > 0]
    assert run.best_score == pytest.approx(pick(values))
    assert weights(run, "best").keys() == weights(run).keys()


def test_a_training_metric_can_be_monitored(lab: Lab) -> None:
    """A name with `train` in it is not demanded of the baseline validation."""
    lab.hparams(
        "hparams", {"config": {"monitor": "loss/train"}, "trainer": {"init": {"max_epochs": 1}}}
    )
    assert lab.train(lab.path).code == 0
    assert lab.run().sidecar("best")["monitor"] == "loss/train"


def test_checkpoints_can_be_turned_off(lab: Lab) -> None:
    """`enable_checkpointing: False` is honoured."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1, "enable_checkpointing": False}}})
    assert lab.train(lab.path).code == 0
    assert not lab.run().checkpoints_folder.exists()


def test_config_gets_the_whole_dictionary_with_its_defaults(lab: Lab) -> None:
    """`train_config` sees every section; what it does to its copy reaches nobody."""
    lab.config(
        "    module = TrainLabModule(",
        "    import json; print(json.dumps(hparams))\n"
        "    hparams['trainer']['init']['max_epochs'] = 50\n"
        "    module = TrainLabModule(",
    )
    result = lab.train(lab.path)
    seen = json.loads(result.out.splitlines()[0])
    assert seen == {
        "task": {"project_name": "toys"},
        "checkpoint": {
            "checkpoint_task_id": None,
            "checkpoint_name": "last",
            "weights_only": False,
            "strict": True,
            "include": [],
            "exclude": [],
            "every_minutes": 5.0,
            "every_n_steps": None,
            "keep": 1,
            "give_up_after": 3,
            "async": False,
        },
        "trainer": {
            "init": {"max_epochs": 2},
            "fit": {},
            "validate": {},
            "test": {},
            "predict": {},
        },
        "config": {},
        "seed": 0,
        "loader_timeout": 600.0,
        "strict": False,
        "compile": False,
        "channels_last": False,
        "optimizer": {},
        "pin_memory": False,
    }
    assert "after 2 epochs" in result.err


def test_the_record_keeps_types(lab: Lab) -> None:
    """True stays True and None stays None in `run.json`, and a tuple comes back as one."""
    config = {
        "flag": True,
        "none": None,
        "pair": (1, 2.0),
        "inf": math.inf,
        "n": {1: "a"},
        "s": {3},
    }
    lab.write("hparams.py", f"inf = float('inf')\nhparams = {{'config': {config!r}}}\n")
    assert lab.train(lab.path, "--dev-run", "1").code == 0
    config["num_workers"] = 0
    assert lab.run().hparams["config"] == config
    record = json.loads((lab.run().folder / "run.json").read_text())
    assert record["hparams"]["config"]["flag"] is True


def test_a_datamodule_and_a_module_of_ones_own_serve(lab: Lab) -> None:
    """Any LightningModule and LightningDataModule train; what is missing in monitoring is said."""
    lab.write(
        "__main__.py",
        """
        import pytorch_lightning as pl
        import torch
        from torch.utils.data import DataLoader

        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(2, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).square().mean()

            def validation_step(self, batch, batch_idx):
                self.log("val_loss", self.layer(batch).square().mean())

            def test_step(self, batch, batch_idx):
                self.log("test_loss", self.layer(batch).square().mean())

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        class Data(pl.LightningDataModule):
            def train_dataloader(self):
                return DataLoader(torch.ones(4, 2))

            val_dataloader = test_dataloader = train_dataloader

        def train_config(hparams):
            return {"module": Net(), "datamodule": Data()}
        """,
    )
    result = lab.train(lab.path)
    assert result.code == 0, result.err
    assert "nothing logs loss/validate" in result.err
    assert "set config.monitor to one of: val_loss" in result.err
    assert {"val_loss", "test_loss"} <= set(lab.run().metrics)


def test_the_test_data_is_tested_with_the_best_weights(lab: Lab) -> None:
    """`test_dataloaders` are run after fitting, on `best`."""
    lab.config('"val_dataloaders"', '"test_dataloaders": loader(16, 2),\n        "val_dataloaders"')
    config = {"monitor_mode": "max"}
    lab.hparams("hparams", {"config": config, "trainer": {"init": {"max_epochs": 3}}})
    assert lab.train(lab.path).code == 0
    run = lab.run()
    assert run.metrics["loss/test"] == pytest.approx(run.best_score)


def test_user_callbacks_of_both_places_run(lab: Lab) -> None:
    """Callbacks in `trainer.init` are added to those that `train_config` returns."""
    lab.config(
        "def train_config",
        "import pytorch_lightning as pl\n"
        "class Say(pl.Callback):\n"
        "    def __init__(self, word): self.word = word\n"
        "    def on_fit_start(self, *args): print('said', self.word)\n"
        "def train_config",
    )
    main = (lab.folder / "__main__.py").read_text()
    lab.write(
        "__main__.py", main.replace('"module": module', '"callbacks": [Say("a")], "module": module')
    )
    lab.write(
        "words.py",
        "import pytorch_lightning as pl\nclass Say(pl.Callback):\n"
        "    def on_fit_start(self, *args): print('said b')\n",
    )
    lab.write(
        "hparams.py",
        "from words import Say\n"
        "hparams = {'trainer': {'init': {'max_epochs': 1, 'callbacks': Say()}}}\n",
    )
    out = lab.train(lab.path).out
    assert "said a\n" in out and "said b\n" in out


DEV_RUNS = {
    "1": (1, "1 batch"),
    "2": (2, "2 batches"),
    "-1": (1, "1 batch"),
    "1.0": (4, "all batches"),
    "0.5": (2, "0.5 of the batches"),
}


@pytest.mark.parametrize("size", DEV_RUNS)
def test_a_dev_run_overfits(lab: Lab, size: str) -> None:
    """An int counts batches, a float is a fraction; no checkpoints, and a name of its own."""
    batches, said = DEV_RUNS[size]
    result = lab.train(lab.path, "--dev-run", size)
    assert result.code == 0, result.err
    assert f"overfits on {said}, writes no checkpoints" in result.err
    run = lab.run()
    assert run.name == "dev_00_toy-hparams-v1"
    assert not run.checkpoints_folder.exists()
    assert run.hparams["task"]["project_name"] == "test"
    assert run.hparams["config"]["num_workers"] == 0
    assert [step for step, _ in scalars(run)["loss/train_step"]] == list(range(2 * batches))


def test_a_dev_run_ends_after_100_epochs_unless_told(lab: Lab) -> None:
    """Nothing given means 100 epochs for a dev run, not Lightning's 1,000."""
    lab.hparams("hparams", {})
    assert "after 100 epochs\n" in lab.train(lab.path, "--dev-run", "1").err
    lab.hparams("hparams", {"trainer": {"init": {"max_steps": 3}}})
    assert "stops    after 3 steps\n" in lab.train(lab.path, "--dev-run", "1").err


def test_json_is_the_only_line_on_stdout(lab: Lab) -> None:
    """`--json` replaces the closing table by a record for machines."""
    result = lab.train(lab.path, "--json")
    record = json.loads(result.out)
    assert record["run"] == "00_toy-hparams-v1"
    assert record["state"] == "completed"
    assert record["best"]["score"] <= record["metrics"]["loss/validate"] + 1e-6
    assert Path(record["folder"]) == lab.run().folder


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_from_python_the_run_is_returned(lab: Lab) -> None:
    """`torch_lab.train` returns the run: folder, metrics, best score."""
    run = torch_lab.train(lab.path, dev_run=None, validate=False)
    assert run.folder.is_dir()
    assert run.best_score is not None
    assert run.metrics["loss/validate"] > 0
    assert torch_lab.train(lab.path, dev_run=1.0).name == "dev_00_toy-hparams-v1"


def test_the_terminal_is_given_back(lab: Lab) -> None:
    """Streams, loggers, signal handlers and showwarning are what they were after a run."""

    def state() -> list[object]:
        return [
            sys.stdout,
            sys.stderr,
            sys.path[:],
            logging.getLogger().level,
            list(logging.getLogger().handlers),
            signal.getsignal(signal.SIGTERM),
            signal.getsignal(signal.SIGINT),
        ]

    torch_lab.load(lab.path)  # From now on the project's packages can be imported.
    before = state()
    torch_lab.train(lab.path)
    assert state() == before


FAILING = CONFIG.replace(
    "def train_config",
    "class Failing(torch.utils.data.Dataset):\n"
    "    def __len__(self): return 32\n"
    "    def __getitem__(self, index):\n"
    "        if index == 13: raise KeyError('no such file')\n"
    "        return torch.zeros(4), 0\n\n"
    "def train_config",
)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_sample_is_named(lab: Lab, workers: int) -> None:
    """The user's exception keeps its traceback from the user's frame on, and names the sample."""
    loader = f'"train_dataloaders": DataLoader(Failing(), batch_size=8, num_workers={workers})'
    lab.write(
        "__main__.py", FAILING.replace('"train_dataloaders": loader(32, 1, shuffle=True)', loader)
    )
    result = lab.train(lab.path)
    assert result.code == ExitCode.CODE_FAILED
    assert "sample 13 of Failing" in result.err
    assert "no such file" in result.err
    assert "raise KeyError" in result.err
    assert lab.run().state == "failed"
    assert "sample 13" in lab.run().console_log.read_text()
    if not workers:
        assert "pytorch_lightning" not in result.err and "torch_lab/" not in result.err
        debug = lab.train(lab.path, "--debug").err
        assert "pytorch_lightning" in debug


def test_an_exception_in_the_config_script_creates_nothing(lab: Lab) -> None:
    """The user's own exception keeps its traceback, exit 1, and there is no run."""
    lab.config("    module = TrainLabModule(", "    1 / 0\n    module = TrainLabModule(")
    result = lab.train(lab.path)
    assert result.code == ExitCode.CODE_FAILED
    assert "ZeroDivisionError" in result.err
    assert result.err.splitlines()[1].strip().startswith('File "') and "__main__.py" in result.err
    assert "torch_lab/runner" not in result.err
    assert not lab.runs


def test_a_nan_stops_the_run_before_it_spoils_the_weights(lab: Lab) -> None:
    """Exit 4; step and sample are named; what `last` and `best` hold is finite."""
    lab.config(
        "torch.nn.CrossEntropyLoss()",
        "lambda y_pred, y: torch.nn.functional.cross_entropy(y_pred, y) * seen(y_pred)",
    )
    main = (lab.folder / "__main__.py").read_text()
    lab.write(
        "__main__.py",
        main
        + """
steps = []
def seen(y_pred):
    steps.append(y_pred.requires_grad)
    return float("nan") if sum(steps) == 6 else 1.0
""",
    )
    result = lab.train(lab.path)
    assert result.code == ExitCode.NON_FINITE
    assert "error: " in result.err and "Traceback" not in result.err
    assert "in step 6" in result.err
    run = lab.run()
    assert run.state == "failed"
    for name in ("last", "best"):
        assert run.sidecar(name)["step"] == 4
        assert all(tensor.isfinite().all() for tensor in weights(run, name).values())


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_stops_the_run(lab: Lab, warm: Warm, name: str, code: int) -> None:
    """The exit code is that of the signal, and the run is recorded as stopped."""
    lab.config('"module": module', '"callbacks": [Slow()], "module": module')
    main = (lab.folder / "__main__.py").read_text()
    lab.write(
        "__main__.py",
        main
        + """
import time
import pytorch_lightning as pl
class Slow(pl.Callback):
    def on_train_batch_end(self, *args):
        print("trained", flush=True)
        time.sleep(0.2)
""",
    )
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 100}}})
    process = lab.start("train", lab.path, python=warm.python)
    assert process.stdout is not None
    assert process.stdout.readline() == "trained\n"
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"stopped by {name}" in err and "Traceback" not in err
    assert lab.run().state == "stopped"


def test_a_second_signal_leaves_at_once(lab: Lab, warm: Warm) -> None:
    """Whatever the first one waits for."""
    lab.config('"module": module', '"callbacks": [Stubborn()], "module": module')
    main = (lab.folder / "__main__.py").read_text()
    lab.write(
        "__main__.py",
        main
        + """
import time
import pytorch_lightning as pl
class Stubborn(pl.Callback):
    def on_train_batch_end(self, *args):
        print("trained", flush=True)
        time.sleep(60)
""",
    )
    with lab.start("train", lab.path, python=warm.python) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "trained\n"
        process.send_signal(signal.SIGTERM)
        while "stopping after this batch" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == ExitCode.TERMINATED


def test_code_state_and_changes_are_kept(lab: Lab) -> None:
    """Commit and branch are recorded, uncommitted changes are kept as a patch."""

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words],
            cwd=lab.root,
            check=True,
            capture_output=True,
        )

    git("init", "--initial-branch", "trunk")
    git("add", ".")
    git("commit", "-m", "start")
    clean = lab.train(lab.path, "--dev-run", "1")
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1}}})
    changed = lab.train(lab.path)
    assert "code     trunk " in clean.err and "uncommitted" not in clean.err
    assert "with uncommitted changes" in changed.err
    run, dev = lab.runs
    assert run.record.branch == "trunk" and run.record.changed and not dev.record.changed
    assert "max_epochs" in (run.folder / "sources" / "changes.diff").read_text()


def test_torch_lab_root_moves_the_runs(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`TORCH_LAB_ROOT` overrides the project's root."""
    monkeypatch.setenv("TORCH_LAB_ROOT", str(tmp_path / "elsewhere"))
    assert lab.train(lab.path, "--dev-run", "1").code == 0
    assert (tmp_path / "elsewhere" / "data" / "artifacts" / "dev_00_toy-hparams-v1").is_dir()


def test_odd_directory_names_work(lab: Lab) -> None:
    """Spaces, dashes, dots and unicode in the path are no matter."""
    folder = lab.folder.with_name("07 größer-als.v2")
    lab.folder.rename(folder)
    result = lab.train(folder / "hparams.py")
    assert result.code == 0, result.err
    assert lab.run().name == "07 größer-als.v2-hparams-v1"
    assert "--logdir 'data/artifacts/07 größer-als.v2-hparams-v1/metrics'" in result.out


LAUNCHES = """
import os, sys
from torch_lab import cli, runner

count, path = int(sys.argv[1]), sys.argv[2]
reader, writer = os.pipe()
for _ in range(count):
    if not os.fork():
        os.close(writer)
        os.read(reader, 1)  # Returns for all at once, when the pipe is closed.
        os._exit(cli.main(cli.train, "train", [path, "--no-validate"]))
os.close(writer)
print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(count)])
"""


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_launches_in_the_same_instant_are_runs_of_their_own(
    lab: Lab, warm: Warm, count: int
) -> None:
    """Each has its own version, and all are whole."""
    script = lab.write("launches.py", LAUNCHES)
    done = subprocess.run(
        [warm.python, script, str(count), lab.path],
        cwd=lab.root,
        env=lab.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == str([0] * count), done.stderr
    assert sorted(run.record.version for run in lab.runs) == list(range(1, count + 1))
    assert all(run.state == "completed" and run.sidecar("last") for run in lab.runs)


def test_third_parties_are_only_in_the_log(lab: Lab) -> None:
    """Lightning's remarks and warnings go to console.log alone; the user's go to the terminal."""
    lab.config(
        "    module = TrainLabModule(",
        "    import logging, warnings\n"
        "    logging.getLogger('mine').info('my remark')\n"
        "    warnings.warn('my warning')\n"
        "    module = TrainLabModule(",
    )
    result = lab.train(lab.path)
    log = lab.run().console_log.read_text()
    assert "my remark" in result.err and "my warning" in result.err
    assert "pytorch_lightning" not in result.err
    assert "pytorch_lightning.callbacks.model_summary" in log
    assert "my remark" in log


PACED = """
import time

import torch
from torch.utils.data import DataLoader

from torch_lab.datasets import ArrayDataset, BaseDataset
from torch_lab.modules import TrainLabModule


class Samples(BaseDataset):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def __len__(self):
        return 60

    def get_raw_data(self, i):
        time.sleep(self.seconds)
        return torch.ones(3)

    def get_raw_label(self, i):
        return 1.0


class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep(self.seconds)
        return super().forward(x)


def train_config(hparams):
    config = hparams["config"]
    network = Slow(3, 1)
    network.seconds = config["step"]
    data = ArrayDataset(torch.ones(60, 3), torch.ones(60)) if config["arrays"] else None
    return {
        "module": TrainLabModule(
            network,
            lambda y_pred, y: ((y_pred[:, 0] - y) ** 2).mean().float(),
            lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ),
        "train_dataloaders": DataLoader(data or Samples(config["sample"]), batch_size=1),
    }
"""


@pytest.mark.parametrize(
    ("sample", "step", "arrays", "times"),
    [(0.01, 0.0, False, 1), (0.0, 0.02, False, 0), (0.0, 0.0, True, 0)],
    ids=["slow data", "slow network", "arrays"],
)
def test_data_that_is_slow_sample_by_sample_is_told(
    lab: Lab, sample: float, step: float, arrays: bool, times: int
) -> None:
    """Once, after fifty steps, with what whole batches would bring."""
    lab.write("__main__.py", PACED)
    config = {"sample": sample, "step": step, "arrays": arrays, "monitor": "loss/train"}
    lab.hparams("hparams", {"config": config, "trainer": {"init": {"max_epochs": 2}}})
    done = lab.train(lab.path)
    assert done.code == ExitCode.DONE, done.err
    found = re.findall(
        r"which is (\d+) % of a step \((\S+) of (\S+) ms.* about (\S+) times", done.err
    )
    assert len(found) == times
    for share, waiting, whole, gain in found:
        assert 10 <= int(share) <= 100
        assert 10 <= float(waiting) <= float(whole)
        assert 1 < float(gain) <= 8
