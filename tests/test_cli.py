"""The commands themselves: light to load, the same under every name."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import clearml
import pexpect
import pytest
import pytorch_lightning as pl

from conftest import CONFIG, Lab
from torch_lab import __version__
from torch_lab import errors as errors_
from torch_lab.errors import ExitCode, Interrupted, TorchLabError, listed
from torch_lab.listing import seconds_trained
from torch_lab.report import last_words
from torch_lab.runs import Run
from torch_lab.signals import StopRequest
from torch_lab.utils import parameters_of
from warm import Warm

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


def test_the_umbrella_has_the_same_commands(lab: Lab, warm: Warm) -> None:
    """`torch-lab train` is `train`, `torch-lab infer` is `infer`; the version is known."""
    version = lab.command("--version")
    assert version.out == f"torch-lab {__version__}\n"
    assert "00_toy-hparams-v1 completed" in lab.command("train", lab.path).out
    inferred = lab.command("infer", lab.path, "--x", python=warm.python)
    assert "arguments: ('--x',)" in inferred.out
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


def in_terminal(lab: Lab, python: str, *words: str, **variables: str) -> pexpect.spawn:
    """Start a command in a terminal of 120 columns."""
    return pexpect.spawn(
        python,
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


def test_a_terminal_has_one_live_line(lab: Lab, warm: Warm) -> None:
    """It is drawn over and over, others print above it, and the log has none of its states."""
    lab.write("__main__.py", SLOW)
    terminal = in_terminal(lab, warm.python, "train", lab.path)
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


def test_no_color_is_honoured(lab: Lab, warm: Warm) -> None:
    """With NO_COLOR there is no colour, though the line is still live."""
    lab.write("__main__.py", SLOW)
    terminal = in_terminal(lab, warm.python, "train", lab.path, NO_COLOR="1")
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
    terminal = in_terminal(lab, sys.executable, "train", lab.path, "--pdb")
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


# Signals.

SLOW_START = "import time\nprint('starts', flush=True)\ntime.sleep(60)\nhparams = {}\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_at_the_start_is_answered(lab: Lab, signum: signal.Signals) -> None:
    """Also where nothing but the scripts runs yet: it is heard, and the exit code is its own."""
    lab.write("hparams.py", SLOW_START)
    with lab.start("train", lab.path) as process:
        assert process.stdout is not None and process.stdout.readline() == "starts\n"
        process.send_signal(signum)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, err
    heard, stopped = err.split("\n")[1:-1]
    assert heard == "stopping; a second signal ends the process at once"
    assert stopped == f"stopped by {signum.name}"


def test_who_follows_says_nothing(lab: Lab) -> None:
    """Of processes that train together, one answers."""
    lab.write("hparams.py", SLOW_START)
    with lab.start("train", lab.path, env=lab.environment(RANK="1")) as process:
        assert process.stdout is not None and process.stdout.readline() == "starts\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


class Left(BaseException):
    """The process would be gone."""


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what ends the process raise instead."""

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)


@pytest.mark.usefixtures("leaving")
def test_the_last_words_come_before_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    """Each signal is answered with a line; whatever comes to pass, the second one ends it."""
    stop = StopRequest()
    with pytest.raises(Left, match="143"):
        with pytest.raises(Interrupted):
            stop.take(signal.SIGINT, None)
        stop.take(signal.SIGTERM, None)
    assert capfd.readouterr().err.split("\n")[3] == "ended at once"
    stop.last_words = lambda: "word"
    with pytest.raises(Left):
        stop.take(signal.SIGTERM, None)
    assert capfd.readouterr().err == "\nword\n"
    stop.last_words = lambda: str(1 // 0)
    with pytest.raises(Left):
        stop.take(signal.SIGTERM, None)
    quiet = StopRequest(quiet=True)
    quiet.deferred = True
    quiet.take(signal.SIGTERM, None)
    with pytest.raises(Left):
        quiet.take(signal.SIGTERM, None)
    assert capfd.readouterr().err == ""


def test_the_last_words_name_the_checkpoint_and_the_command(lab: Lab) -> None:
    """Or that none was written; a dev run cannot go on."""
    assert lab.train(lab.path).code == 0
    goes_on = f"go on: train toys/experiments/00_toy/hparams.py --resume {lab.run().name}"
    stands = "ended at once; last.ckpt stands: epoch 2, step 8; "
    assert last_words(lab.run()) == stands + goes_on
    lab.run().checkpoint("last").with_suffix(".json").unlink()
    assert last_words(lab.run()) == f"ended at once; no checkpoint was written; {goes_on}"
    assert lab.train(lab.path, "--dev-run", "1").code == 0
    (dev,) = (run for run in lab.runs if run.name.startswith("dev_"))
    assert last_words(dev) == "ended at once; no checkpoint was written"


STUBBORN = """
import time
import pytorch_lightning as pl
class Stubborn(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == STEP:
            print("trained", flush=True)
            time.sleep(60)
"""


@pytest.mark.parametrize(
    ("step", "stands"),
    [
        pytest.param(2, "no checkpoint was written", marks=pytest.mark.slow),
        (6, "last.ckpt stands: epoch 1, step 4"),
    ],
)
def test_a_second_signal_says_what_stands(lab: Lab, step: int, stands: str) -> None:
    """And its end counts: what went by until the run was resumed was no training."""
    main = CONFIG.replace('"module": module', '"callbacks": [Stubborn()], "module": module')
    lab.write("__main__.py", main + STUBBORN.replace("STEP", str(step)))
    with lab.start("train", lab.path) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "trained\n"
        process.send_signal(signal.SIGTERM)
        while "stopping after this batch" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert process.returncode == ExitCode.TERMINATED
    command = "train toys/experiments/00_toy/hparams.py --resume 00_toy-hparams-v1"
    assert err.splitlines()[-1] == f"ended at once; {stands}; go on: {command}"
    lab.write("__main__.py", CONFIG)
    assert lab.train(lab.path, "--resume").code == 0
    record = lab.run().record
    (resumed,) = record.resumed
    times = [record.started, resumed["ended_before"], resumed["when"], record.ended or ""]
    began, ended, went_on, done = map(datetime.fromisoformat, times)
    assert began < ended < went_on < done
    assert seconds_trained(lab.run()) == pytest.approx(
        (ended - began + (done - went_on)).total_seconds()
    )


def test_a_dev_run_that_fails_names_no_command_that_would_be_refused(lab: Lab) -> None:
    """It cannot be resumed."""
    lab.config("torch.nn.CrossEntropyLoss()", "lambda y_pred, y: y_pred.sum() * float('nan')")
    result = lab.train(lab.path, "--dev-run", "1", "--no-validate")
    assert result.code == ExitCode.NON_FINITE
    assert "folder" in result.err and "--resume" not in result.err


# How long a run was trained.


def with_times(run: Run, ended: str | None, *resumed: dict[str, str]) -> None:
    """Let `run` have begun at noon."""
    file = run.folder / "run.json"
    times = {"started": "2026-01-01T12:00:00+00:00", "ended": ended, "resumed": list(resumed)}
    file.write_text(json.dumps({**json.loads(file.read_text()), **times}))


def test_pauses_are_not_training(lab: Lab) -> None:
    """Of a run that was resumed, the times count in which a process trained it."""
    assert lab.train(lab.path).code == 0
    first = {"when": "2026-01-01T14:00:00+00:00", "ended_before": "2026-01-01T12:01:00+00:00"}
    again = {"when": "2026-01-02T14:00:00+00:00", "ended_before": "2026-01-01T14:00:30+00:00"}
    with_times(lab.run(), "2026-01-02T14:02:00+00:00", first, again)
    assert "completed in 0:03:30" in lab.train(lab.path, "--resume").out
    assert json.loads(lab.train(lab.path, "--resume", "--json").out)["duration_s"] == 210
    (row,) = json.loads(lab.command("runs", "--json").out)
    assert row["duration_s"] == 210
    assert "0:03:30" in lab.command("runs").out


def test_an_end_that_nobody_noted_hides_a_pause(lab: Lab) -> None:
    """Nothing better is known then than the whole time."""
    assert lab.train(lab.path).code == 0
    with_times(lab.run(), "2026-01-01T13:00:00+00:00", {"when": "2026-01-01T12:30:00+00:00"})
    assert "completed in 1:00:00" in lab.train(lab.path, "--resume").out


# What a resumed run says of its start.


def test_the_header_names_the_checkpoint_and_the_epoch(lab: Lab) -> None:
    """That from which it goes on: `previous`, if it must be."""
    stopping = "import os, signal\nimport pytorch_lightning as pl\n\nclass Stops(pl.Callback):\n"
    stopping += "    def on_train_batch_end(self, trainer, *args):\n"
    stopping += "        if trainer.global_step == 6 and 'STOP' in os.environ:\n"
    stopping += "            os.kill(os.getpid(), signal.SIGTERM)\n\ndef train_config"
    main = CONFIG.replace("def train_config", stopping)
    lab.write(
        "__main__.py", main.replace('"module": module', '"callbacks": [Stops()], "module": module')
    )
    assert lab.forked(lab.path, STOP="").code == ExitCode.TERMINATED
    result = lab.train(lab.path, "--resume")
    assert "resumes  last.ckpt, epoch 2: goes on at step 6, after it was stopped" in result.err


# Errors.


def test_every_error_is_in_the_tree() -> None:
    """The one that the reference shows; with its place and its exit code."""
    tree = errors_.__doc__ or ""
    for name in errors_.__all__:
        kind = getattr(errors_, name)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            (line,) = re.findall(rf"^.*\b{name}\b.*$", tree, re.MULTILINE)
            code = kind.__dict__.get("exit_code")
            assert code is None or isinstance(code, property) or f" {int(code)} " in line


def test_no_error_is_defined_elsewhere() -> None:
    """So the tree is whole."""
    sources = (Path(errors_.__file__).parent).rglob("*.py")
    texts = {path.name: path.read_text(encoding="utf-8") for path in sources}
    found = [
        name for name, text in texts.items() if re.search(r"^class \w+\(\w*Error\):", text, re.M)
    ]
    assert found == ["errors.py"]
    assert issubclass(errors_.UnbrokenRunError, TorchLabError)
    assert errors_.UnbrokenRunError("fails", -9).exit_code == 137


def test_long_lists_are_shortened() -> None:
    """To some names, and the number of the others."""
    assert listed([]) == ""
    assert listed(["a", 2, "c"]) == "a, 2, c"
    assert listed("abcde") == "a, b, c and 2 more"
    assert listed("abc", 2) == "a, b and 1 more"


@pytest.mark.parametrize("command", ["train", "infer"])
def test_a_wrong_pattern_is_named_with_file_and_key(lab: Lab, command: str) -> None:
    """Patterns can be checked only when the model is there."""
    assert lab.train(lab.path).code == 0
    section = {"checkpoint_task_id": "00_toy-hparams", "weights_only": True, "exclude": ["haed"]}
    lab.hparams("hparams", {"checkpoint": section})
    result = getattr(lab, command)(lab.path)
    assert result.code == ExitCode.USAGE
    assert "00_toy/hparams.py: checkpoint.exclude[0]: the pattern 'haed' matches" in result.err


def test_an_interruption_that_is_swallowed_counts(lab: Lab) -> None:
    """As by an import that was broken off, and fails when it is made again."""
    lab.write(
        "hparams.py",
        """
import os, signal

try:
    os.kill(os.getpid(), signal.SIGHUP)
except BaseException:
    pass
raise ImportError("half of it is there")
""",
    )
    result = lab.command("train", lab.path)
    assert result.code == 128 + signal.SIGHUP, result.err
    assert "Traceback" not in result.err and "stopped by SIGHUP" in result.err
