"""What users do that is not in any tutorial: none of it may hang, lie, or lose a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import torch_lab
from conftest import CONFIG, Lab
from torch_lab.errors import ExitCode
from warm import Warm

OWN = """
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((2,), float(index))


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).square().mean() * (1 + self.global_rank))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Numbers(), batch_size=2, num_workers=WORKERS)

    def val_dataloader(self):
        return DataLoader(Numbers(), batch_size=2)


WORKERS = 0


def train_config(hparams):
    return {"module": Net(), "datamodule": Data()}
"""


STEP = "return self.layer(batch).square().mean()\n\n    def val"


def own(lab: Lab, *changes: tuple[str, str], **init: object) -> None:
    """Write an experiment with a module and a datamodule of the user's own."""
    text = OWN
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    lab.write("__main__.py", text)
    lab.hparams(
        "hparams",
        {"config": {"monitor": "val_loss"}, "trainer": {"init": {"max_epochs": 2, **init}}},
    )


def test_a_mistake_after_training_loses_nothing(lab: Lab) -> None:
    """What Lightning refuses once steps were made is recorded; the run folder stays."""
    late = "if batch_idx == 3: raise MisconfigurationException('late')\n        return"
    own(
        lab,
        (STEP, STEP.replace("return", late)),
        ("import torch\n", "import torch\nfrom lightning_fabric.utilities.exceptions import *\n"),
        enable_checkpointing=False,
    )
    result = lab.train(lab.path)
    assert result.code == ExitCode.CODE_FAILED
    assert lab.run().state == "failed"


def test_the_steps_for_a_datamodules_data_are_demanded_before(lab: Lab) -> None:
    """A datamodule with test data and a module without `test_step` is refused at once."""
    own(
        lab, ("    def val_dataloader", "    test_dataloader = train_dataloader\n\n    def val_dat")
    )
    text = (lab.folder / "__main__.py").read_text().replace("def val_dataloader", "def val_x")
    lab.write("__main__.py", text)
    result = lab.train(lab.path)
    assert result.code == ExitCode.USAGE
    assert "defines no test_step" in result.err
    assert not lab.runs


def test_a_datamodules_samples_are_named_too(lab: Lab) -> None:
    """Whatever loaders it returns; and `--debug` takes their workers away."""
    own(
        lab,
        ("return torch.full", "if index == 5: raise OSError('gone')\n        return torch.full"),
        ("WORKERS = 0", "WORKERS = 2"),
    )
    result = lab.train(lab.path, "--no-validate", "--debug")
    assert result.code == ExitCode.CODE_FAILED
    assert "in sample 5 of Numbers" in result.err
    assert "worker process" not in result.err


def test_ranks_that_disagree_on_the_score_do_not_hang(lab: Lab, warm: Warm) -> None:
    """A value logged without `sync_dist` differs between ranks: that of rank zero decides."""
    own(lab, accelerator="cpu", devices=2, strategy="ddp")
    result = lab.command("train", lab.path, python=warm.python)
    assert result.code == 0, result.err
    assert lab.run().sidecar("best")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_a_nan_on_another_rank_is_told(lab: Lab, warm: Warm, strategy: str) -> None:
    """Exit 4 and the reason, though rank zero itself saw none."""
    own(
        lab,
        (
            STEP,
            STEP.replace(
                "\n\n", " * (float('nan') if (self.global_rank, batch_idx) == (1, 1) else 1)\n\n"
            ),
        ),
        accelerator="cpu",
        devices=2,
        strategy=strategy,
    )
    result = lab.command("train", lab.path, python=warm.python)
    assert result.code == ExitCode.NON_FINITE, result.err
    assert "error: the training loss is NaN in step 2" in result.err
    assert lab.run().state == "failed"
    assert "NaN" in (lab.run().record.reason or "")


@pytest.mark.slow
def test_a_nan_on_another_rank_is_told_later(lab: Lab, warm: Warm) -> None:
    """Of a device that is waited for; nobody saves what it has made of the weights of the others.

    Who comes first tells of its own: rank 1 of its step, or rank 0 of what that has left.
    """
    bad = " * (float('nan') if (self.global_rank, self.global_step) == (1, 1) else 1)\n\n"
    later = (
        "from torch_lab.callbacks import nan_monitor\nnan_monitor.waits_for = lambda device: True"
    )
    saving = (
        "class Saving(pl.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n"
        "        if trainer.global_step == 2:\n"
        "            trainer.save_checkpoint('bad.ckpt', weights_only=True)\n\n\n"
    )
    own(
        lab,
        (STEP, STEP.replace("\n\n", bad)),
        ("import torch\n", f"import torch\n{later}\n"),
        ("def train_config", f"{saving}def train_config"),
        ('"datamodule": Data()', '"datamodule": Data(), "callbacks": [Saving()]'),
        accelerator="cpu",
        devices=2,
        strategy="ddp",
    )
    result = lab.command("train", lab.path, python=warm.python)
    assert result.code == ExitCode.NON_FINITE, result.err
    own_loss = "loss is NaN in step 2, epoch 1 (samples 5, 7): noticed after step 2, so the "
    assert own_loss in result.err or "the weights are not finite after step 2" in result.err
    assert not lab.run().checkpoint("last").exists() and not (lab.root / "bad.ckpt").exists()


SLOW = (
    CONFIG.replace("batch_size=8, **kwargs)", "batch_size=8, num_workers=2, **kwargs)")
    .replace(
        "def train_config",
        "import time\nimport pytorch_lightning as pl\n\n"
        "class Slow(pl.Callback):\n"
        "    def on_train_batch_end(self, *args):\n"
        "        print('trained', flush=True)\n        time.sleep(0.2)\n\n"
        "def train_config",
    )
    .replace('"module": module', '"callbacks": [Slow()], "module": module')
)


def started(lab: Lab, **kwargs: object) -> subprocess.Popen[str]:
    """Start a slow training, and wait until it has trained a batch."""
    lab.write("__main__.py", SLOW)
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 3}}})
    process = lab.start("train", lab.path, **kwargs)
    assert process.stdout is not None
    assert process.stdout.readline() == "trained\n"
    return process


def test_ctrl_c_reaches_workers_and_stops_the_run_once(lab: Lab) -> None:
    """A terminal signals the whole group: no traceback of a worker, and what was logged is kept."""
    process = started(lab, process_group=0)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPT, err
    assert err.count("stopped by SIGINT") == 1 and "Traceback" not in err
    run = lab.run()
    assert run.state == "stopped"
    assert run.metrics.keys() <= {"loss/train", "loss/validate"}


def test_sigterm_ends_all_processes_of_a_run(lab: Lab) -> None:
    """Told to rank zero alone, it reaches the others; nothing hangs, nothing is left."""
    lab.write("__main__.py", SLOW)
    init = {"max_epochs": 50, "accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    lab.hparams("hparams", {"trainer": {"init": init}})
    process = lab.start("train", lab.path, process_group=0)
    assert process.stdout is not None
    said = ""
    while said.count("trained") < 4:  # The lines of two processes may mix.
        letter = process.stdout.read(1)
        assert letter, said
        said += letter
    process.send_signal(signal.SIGTERM)
    # It reads to the end of the pipes, which every process of the run holds open.
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.TERMINATED, err
    assert lab.run().state == "stopped"


def test_a_rank_without_a_strategy_is_told_so(lab: Lab, warm: Warm) -> None:
    """Several processes of one launcher that each train alone would write the same things."""
    result = lab.command(
        "train", lab.path, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", python=warm.python
    )
    assert result.code == ExitCode.USAGE
    assert "this is process 1 of several that were started together" in result.err
    assert not (lab.root / "data").exists()


def test_a_folder_that_cannot_be_written_is_said(lab: Lab) -> None:
    """One line, before anything is trained."""
    (lab.root / "data").write_text("a file, not a folder")
    result = lab.train(lab.path)
    assert result.code == ExitCode.USAGE
    assert "cannot create a run in data/artifacts: " in result.err
    assert "TORCH_LAB_ROOT moves it" in result.err


def test_a_folder_of_the_users_is_never_removed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that is named like the runs, without a version, when a run cannot be made."""
    mine = lab.root / "data" / "artifacts" / "00_toy-hparams"
    mine.mkdir(parents=True)
    (mine / "notes.txt").touch()
    # Permissions do not bind a superuser, so that the test refuses in their place.
    monkeypatch.setattr(Path, "mkdir", _refuse)
    result = lab.train(lab.path)
    assert result.code == ExitCode.USAGE
    assert (mine / "notes.txt").is_file()


def _refuse(*args: object, **kwargs: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_checkpoint_that_does_not_fit_is_refused_before(lab: Lab) -> None:
    """Also when training would go on in full."""
    lab.train(lab.path)
    lab.config(
        "torch.nn.Linear(4, 2),\n        torch.nn.Cross",
        "torch.nn.Linear(4, 3),\n        torch.nn.Cross",
    )
    checkpoint = {"checkpoint_task_id": "00_toy-hparams"}
    lab.hparams("more", {"checkpoint": checkpoint, "trainer": {"init": {"max_epochs": 9}}})
    result = lab.train(lab.folder / "more.py")
    assert result.code == ExitCode.USAGE
    assert "weight has the shape (2, 4), not (3, 4)" in result.err
    assert len(lab.runs) == 1


def test_the_best_of_the_last_epoch_leaves_nothing_to_train(lab: Lab) -> None:
    """It was written before the epoch's end, but all of the epoch was trained."""
    lab.train(lab.path)
    checkpoint = {"checkpoint_task_id": "00_toy-hparams", "checkpoint_name": "best"}
    lab.hparams("more", {"checkpoint": checkpoint, "trainer": {"init": {"max_epochs": 2}}})
    result = lab.train(lab.folder / "more.py")
    assert result.code == ExitCode.USAGE
    assert "has trained 2 epochs" in result.err


def test_json_is_alone_on_stdout(lab: Lab) -> None:
    """What the user's code prints goes to stderr, so that a program can read the record."""
    lab.config("    module = TrainLabModule(", "    print('hello')\n    module = TrainLabModule(")
    result = lab.train(lab.path, "--json")
    assert json.loads(result.out)["state"] == "completed"
    assert "hello" in result.err


@pytest.mark.slow
def test_nohup_is_honoured(lab: Lab) -> None:
    """A signal that the process was started to ignore stays ignored."""
    process = started(lab, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert lab.run().state == "completed"


def test_misuse_of_lightning_in_user_code_keeps_its_traceback(lab: Lab) -> None:
    """What Lightning raises in the user's own step is no mistake in the hparams."""
    own(
        lab,
        (
            STEP,
            STEP.replace("return", "self.log('x', torch.ones(3))\n        return"),
        ),
    )
    result = lab.train(lab.path)
    assert result.code == ExitCode.CODE_FAILED
    assert "self.log('x', torch.ones(3))" in result.err


def test_a_combined_loader_trains(lab: Lab) -> None:
    """Lightning's CombinedLoader serves, and an empty one in it is named."""
    lab.write(
        "__main__.py",
        OWN.replace(
            '{"module": Net(), "datamodule": Data()}',
            '{"module": Net(), "train_dataloaders": CombinedLoader([DataLoader('
            'Numbers() if hparams["config"]["full"] else [])])}',
        )
        .replace("import torch\n", "import torch\nfrom pytorch_lightning.utilities import *\n")
        .replace("self.layer(batch)", "self.layer(batch[0])"),
    )
    trainer = {"init": {"max_epochs": 1}}
    full = lab.hparams("full", {"config": {"full": True}, "trainer": trainer})
    empty = lab.hparams("empty", {"config": {"full": False}, "trainer": trainer})
    assert lab.train(full).code == 0
    assert "train_dataloaders[0] over an empty dataset" in lab.train(empty).err


def test_a_monitor_is_looked_for_without_a_baseline_too(lab: Lab) -> None:
    """What nothing logs in the first epoch is said after it."""
    own(lab)
    lab.hparams("typo", {"config": {"monitor": "zzz"}, "trainer": {"init": {"max_epochs": 2}}})
    result = lab.train(lab.folder / "typo.py", "--no-validate")
    assert result.err.count("nothing has logged zzz so far: there is no best") == 1


def test_a_metric_of_training_alone_may_have_any_name(lab: Lab) -> None:
    """A module of the user's own may log it as it likes."""
    own(
        lab,
        (
            STEP,
            STEP.replace("return", "self.log('energy', self.layer(batch).mean())\n        return"),
        ),
    )
    lab.hparams("energy", {"config": {"monitor": "energy"}, "trainer": {"init": {"max_epochs": 1}}})
    assert lab.train(lab.folder / "energy.py").code == 0
    assert lab.run().sidecar("best")


def test_an_infinite_score_is_never_the_best(lab: Lab) -> None:
    """Nor does it spoil the JSON of the closing record."""
    own(lab, ("* (1 + self.global_rank))", "* float('inf'))"))
    result = lab.train(lab.path, "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out, parse_constant=pytest.fail)
    assert record["best"] is None and record["metrics"]["val_loss"] is None
    assert lab.run().metrics["val_loss"] == float("inf")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_networks_take_weights(lab: Lab) -> None:
    """The names of the bare network are found behind those of `torch.compile`."""
    lab.train(lab.path)
    compiled = torch.compile(torch.nn.Linear(4, 2))
    torch_lab.load_weights(compiled, "00_toy-hparams")
    saved = torch.load(lab.run().checkpoint("last"), weights_only=True)["state_dict"]
    assert torch.equal(compiled._orig_mod.weight, saved["weight"])


def test_weights_in_torchs_old_format_are_read(lab: Lab) -> None:
    """They are no archive, and cannot be mapped into memory."""
    saved = torch.nn.Linear(4, 2)
    torch.save(saved.state_dict(), "old.pt", _use_new_zipfile_serialization=False)
    loaded = torch_lab.load_weights(torch.nn.Linear(4, 2), "old.pt")
    assert torch.equal(loaded.state_dict()["weight"], saved.weight)


def test_checkpoints_written_in_the_background_are_whole_too(lab: Lab) -> None:
    """Lightning's `AsyncCheckpointIO` writes through our plugin, sidecars and all."""
    lab.write(
        "hparams.py",
        """
        from pytorch_lightning.plugins import AsyncCheckpointIO

        hparams = {"trainer": {"init": {"max_epochs": 1, "plugins": [AsyncCheckpointIO()]}}}
        """,
    )
    assert lab.train(lab.path).code == 0
    assert lab.run().sidecar("last") and lab.run().sidecar("best")


def test_a_bad_log_call_ends_no_training(lab: Lab) -> None:
    """As in the standard library, it is complained of and passed over."""
    lab.config(
        "    module = TrainLabModule(",
        "    import logging; logging.getLogger('mine').info('%d', 'three')\n"
        "    module = TrainLabModule(",
    )
    result = lab.train(lab.path)
    assert result.code == 0, result.err
    assert "--- Logging error ---" in result.err


def test_weights_are_found_from_any_directory(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_weights` in `infer_config` means runs of the script's own project."""
    lab.train(lab.path)
    lab.config(
        '"module": LabModule(torch.nn.Linear(4, 2)),',
        '"module": LabModule(__import__("torch_lab").load_weights('
        "torch.nn.Linear(4, 2), arguments[0])),",
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    result = lab.infer(lab.path, "00_toy-hparams")
    assert result.code == 0, result.err


def test_files_of_lightnings_own_requeueing_are_left_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a job left in the artifacts is not taken for a state of every later run."""
    lab.train(lab.path)
    foreign = lab.root / "data" / "artifacts" / "hpc_ckpt_1.ckpt"
    foreign.write_bytes(lab.run().checkpoint("last").read_bytes())
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "1" if name == "SLURM_NTASKS" else "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    lab.hparams("more", {"trainer": {"init": {"max_epochs": 1}}})
    assert lab.train(lab.folder / "more.py").code == 0
    (run,) = (run for run in map(torch_lab.runs.Run.read, _folders(lab)) if "more" in run.name)
    assert run.sidecar("last")["step"] == 4


def _folders(lab: Lab) -> list[Path]:
    return [path for path in (lab.root / "data" / "artifacts").iterdir() if path.is_dir()]


def test_a_closed_pipe_does_not_fail_a_run(lab: Lab, warm: Warm) -> None:
    """`train … | head` completes."""
    command = f"{warm.python} -m torch_lab train {lab.path} | true"
    subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=lab.root, check=True)
    assert lab.run().state == "completed"


def test_a_terminal_without_unicode_shows_what_it_can(lab: Lab) -> None:
    """Letters that it has not are escaped."""
    folder = lab.folder.with_name("01_größer")
    lab.folder.rename(folder)
    result = lab.command("train", folder / "hparams.py", PYTHONIOENCODING="ascii")
    assert result.code == 0, result.err
    assert "01_gr\\xf6\\xdfer-hparams-v1 completed" in result.out


def test_imported_siblings_are_among_the_sources(lab: Lab) -> None:
    """What the scripts import from beside them is kept with them."""
    lab.write("rates.py", "RATE = 0.5")
    lab.write("hparams.py", "from rates import RATE\nhparams = {'config': {'lr': RATE}}")
    assert lab.train(lab.path, "--dev-run", "1").code == 0
    sources = {path.name for path in (lab.run().folder / "sources").rglob("*.py")}
    assert sources == {"__main__.py", "hparams.py", "rates.py"}


def test_a_dev_run_drops_the_users_checkpoints_too(lab: Lab) -> None:
    """`enable_checkpointing: False` holds for every callback that writes checkpoints."""
    own(
        lab,
        (
            '"datamodule": Data()',
            '"datamodule": Data(), "callbacks": [pl.callbacks.ModelCheckpoint()]',
        ),
    )
    assert lab.train(lab.path, "--dev-run", "1").code == 0
    assert not list(lab.run().folder.rglob("*.ckpt"))


INIT = {
    "text": ({"max_epochs": "3"}, "trainer.init.max_epochs must be a whole number, not '3' (str)"),
    "float": ({"max_steps": 1.5}, "trainer.init.max_steps must be a whole number"),
    "accumulate": ({"accumulate_grad_batches": "a"}, "accumulate_grad_batches must be a whole"),
    "callback": ({"callbacks": [3]}, "trainer.init.callbacks has a int"),
    "barebones": ({"barebones": True}, "trainer.init.barebones is not yours to set"),
}


@pytest.mark.parametrize("name", INIT)
def test_odd_values_for_the_trainer_are_refused(lab: Lab, name: str) -> None:
    """Before anything is created."""
    init, part = INIT[name]
    lab.hparams("hparams", {"trainer": {"init": init}})
    result = lab.train(lab.path)
    assert result.code == ExitCode.USAGE
    assert part in result.err
    assert not lab.runs


def test_scripts_with_odd_names_are_themselves(lab: Lab) -> None:
    """`a#1.py` is not the second run of `a.py`, and a module comes before a package."""
    lab.write("a.py", "hparams = {'config': {'lr': 1.0}}")
    lab.write("a#1.py", "hparams = {'config': {'lr': 2.0}}")
    lab.write("a/__init__.py", "hparams = {'config': {'lr': 3.0}}")
    from torch_lab.utils import import_script_as_module

    for name, rate in (("a.py", 1.0), ("a#1.py", 2.0), ("a.py", 1.0)):
        module = import_script_as_module(lab.folder / name)
        assert module.hparams["config"]["lr"] == rate
