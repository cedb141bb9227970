"""The commands themselves: light to load, the same under every name."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import clearml
import pexpect
import pytest
import pytorch_lightning as pl

from conftest import CONFIG, Lab
from torch_lab import __version__
from torch_lab.errors import ExitCode
from torch_lab.utils import parameters_of

HEAVY = ("torch", "pytorch_lightning", "clearml", "torchmetrics", "numpy", "rich", "matplotlib")


@pytest.mark.parametrize("words", [["train"], ["infer"], []], ids=str)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    """Neither torch nor clearml nor Lightning are imported for `--help`."""
    code = (
        "import sys\nfrom torch_lab.cli import main, torch_lab\n"
        f"assert main(torch_lab, 'torch-lab', {[*words, '--help']!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: torch-lab")
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_mistake_in_the_hparams_is_found_without_torch(lab: Lab) -> None:
    """A wrong key costs no import of torch."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epoch": 1}}, "task": {"tags": []}})
    code = (
        "import sys\nfrom torch_lab.cli import main, train\n"
        f"assert main(train, 'train', [{lab.path!r}]) == 2\n"
        "print([name for name in ('torch', 'pytorch_lightning', 'clearml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import torch_lab` is free; its functions come when they are used."""
    code = f"import sys, torch_lab; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        import torch_lab

        torch_lab.trian  # noqa: B018


@pytest.mark.parametrize("name", ["train", "infer", "torch-lab"])
def test_console_scripts_help(name: str) -> None:
    """Each console script answers under its own name."""
    script = Path(sys.executable).with_name(name)
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: {name} ")


def test_the_umbrella_has_the_same_commands(lab: Lab) -> None:
    """`torch-lab train` is `train`, `torch-lab infer` is `infer`; the version is known."""
    version = lab.command("--version")
    assert version.out == f"torch-lab {__version__}\n"
    assert "00_toy-hparams-v1 completed" in lab.command("train", lab.path).out
    assert "arguments: ('--x',)" in lab.command("infer", lab.path, "--x").out
    unknown = lab.command("tran")
    assert unknown.code == ExitCode.USAGE
    assert unknown.err.startswith("error: no such command 'tran'")


def test_packages_in_the_working_directory_are_importable(lab: Lab) -> None:
    """As for `python -m`, also through the console script."""
    (lab.root / "toys" / "__init__.py").touch()
    (lab.root / "toys" / "numbers.py").write_text("RATE = 0.25\n")
    lab.write("hparams.py", "from toys.numbers import RATE\nhparams = {'config': {'lr': RATE}}\n")
    script = Path(sys.executable).with_name("train")
    done = subprocess.run(
        [script, lab.path, "--dev-run", "1", "--json"],
        cwd=lab.root,
        env=lab.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "completed"


SIGNATURES: list[tuple[str, str, Callable[..., object]]] = [
    ("pytorch_lightning.trainer.trainer", "Trainer.__init__", pl.Trainer.__init__),
    ("pytorch_lightning.trainer.trainer", "Trainer.fit", pl.Trainer.fit),
    ("pytorch_lightning.trainer.trainer", "Trainer.validate", pl.Trainer.validate),
    ("pytorch_lightning.trainer.trainer", "Trainer.test", pl.Trainer.test),
    ("pytorch_lightning.trainer.trainer", "Trainer.predict", pl.Trainer.predict),
    ("clearml.task", "Task.init", clearml.Task.init),
]


@pytest.mark.parametrize(
    ("module", "name", "function"), SIGNATURES, ids=[name for _, name, _ in SIGNATURES]
)
def test_parameters_read_from_source_are_the_real_ones(
    module: str, name: str, function: Callable[..., object]
) -> None:
    """What is read without an import agrees with what an import would say."""
    real = [each for each in inspect.signature(function).parameters if each not in ("self", "cls")]
    assert list(parameters_of(module, name)) == real


def in_terminal(lab: Lab, *words: str, **variables: str) -> pexpect.spawn:
    """Start a command in a terminal of 120 columns."""
    return pexpect.spawn(
        sys.executable,
        ["-m", "torch_lab", *words],
        cwd=str(lab.root),
        env=lab.environment(TERM="xterm-256color", **variables),  # type: ignore[arg-type]
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 120),
    )


SLOW = CONFIG.replace(
    "def train_config",
    "import time\nimport pytorch_lightning as pl\n\n"
    "class Slow(pl.Callback):\n"
    "    def on_train_batch_end(self, *args):\n        time.sleep(0.15)\n        print('word')\n\n"
    "def train_config",
).replace('"module": module', '"callbacks": [Slow()], "module": module')


def test_a_terminal_has_one_live_line(lab: Lab) -> None:
    """It is drawn over and over, others print above it, and the log has none of its states."""
    lab.write("__main__.py", SLOW)
    terminal = in_terminal(lab, "train", lab.path)
    output = terminal.read()
    terminal.close()
    assert terminal.exitstatus == 0, output
    drawn = [line for line in output.split("\r\x1b[2K") if "steps/s" in line]
    assert len(drawn) >= 3
    assert re.search(r"epoch 1/2 .* 1/4", drawn[0])
    assert all("word" not in line.split("\n")[0] for line in drawn)
    assert output.count("\nword\r\n") + output.count("\x1b[2Kword\r\n") == 8
    log = lab.run().console_log.read_text()
    assert log.count("word\n") == 8
    assert "\x1b" not in log and "steps/s" not in log


def test_no_color_is_honoured(lab: Lab) -> None:
    """With NO_COLOR there is no colour, though the line is still live."""
    lab.write("__main__.py", SLOW)
    terminal = in_terminal(lab, "train", lab.path, NO_COLOR="1")
    output = terminal.read()
    terminal.close()
    assert "steps/s" in output
    assert not re.search(r"\x1b\[[0-9;]*[1-9][0-9]*m", output.replace("\x1b[2m", ""))


def test_debug_opens_a_debugger_in_the_users_frame(lab: Lab) -> None:
    """In a terminal, `--pdb` stops where the user's code failed, below which only torch is."""
    lab.config(
        "    module = TrainLabModule(",
        "    secret = 41 + 1\n    torch.zeros(2) @ torch.zeros(3)\n    module = TrainLabModule(",
    )
    terminal = in_terminal(lab, "train", lab.path, "--pdb")
    terminal.expect_exact("(Pdb) ")
    terminal.sendline("p secret")
    terminal.expect_exact("42")
    terminal.sendline("q")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == ExitCode.CODE_FAILED


def test_debug_takes_no_workers_and_finds_anomalies(lab: Lab) -> None:
    """Loaders work in this process, `num_workers` is 0, and anomaly detection is on."""
    lab.config(
        "batch_size=8, **kwargs)", "batch_size=8, num_workers=2, persistent_workers=True, **kwargs)"
    )
    lab.hparams("hparams", {"config": {"num_workers": 3}})
    result = lab.train(lab.path, "--debug", "--dev-run", "1")
    assert result.code == 0, result.err
    hparams = lab.run().hparams
    assert hparams["trainer"]["init"]["detect_anomaly"] is True
    assert hparams["config"]["num_workers"] == 0
    assert lab.infer("--debug", lab.path).code == 0
