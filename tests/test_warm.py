"""What runs in a fork of the process that waits is as in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from warm import Warm

TELLING = """
import json, os, sys
import beside
print(json.dumps({
    "words": sys.argv, "name": __name__, "cwd": os.getcwd(), "said": sys.stdin.read(),
    "own": os.environ.get("OWN"), "home": os.environ.get("HOME"), "beside": beside.__file__,
    "torch": "torch" in sys.modules,
}))
print("error", file=sys.stderr)
sys.exit(7)
"""
SLEEPING = """
import signal, sys, time
if sys.argv[1:]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("sleeps", flush=True)
time.sleep(60)
"""


@pytest.fixture
def telling(tmp_path: Path) -> Path:
    """A script that says where it is."""
    script = tmp_path / "telling.py"
    script.write_text(TELLING)
    (tmp_path / "beside.py").touch()
    return script


def told(python: str, *words: str | Path, cwd: Path) -> tuple[int, dict[str, Any], str]:
    """Return the exit code, what a script says, and its standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run(
        [python, *words],
        cwd=cwd,
        env={**environment, "OWN": "value"},
        input="said",
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("module", [True, False])
def test_a_script_finds_what_python_would_give_it(
    telling: Path, warm: Warm, tmp_path: Path, module: bool
) -> None:
    """Words, directory, variables, streams, siblings and exit code; imported is torch alone."""
    words = ("-m", "telling") if module else (telling,)
    cwd = tmp_path if module else Path("/")
    code, found, err = told(warm.python, *words, "--word", "two words", cwd=cwd)
    expected = told(sys.executable, *words, "--word", "two words", cwd=cwd)
    assert found["torch"] and not expected[1]["torch"]
    assert (code, {**found, "torch": False}, err) == expected


def test_what_is_no_script_is_run_as_ever(warm: Warm) -> None:
    """By the interpreter itself."""
    code = "import sys; print(sys.argv, 'torch' in sys.modules)"
    done = subprocess.run([warm.python, "-c", code, "a"], capture_output=True, check=True)
    assert done.stdout == b"['-c', 'a'] False\n"


def sleeping(warm: Warm, tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    script = tmp_path / "sleeping.py"
    script.write_text(SLEEPING)
    process = subprocess.Popen([warm.python, script, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "sleeps\n"
    return process


@pytest.mark.parametrize(("words", "code"), [([], -signal.SIGTERM), (["answers"], 5)])
def test_a_signal_reaches_it(warm: Warm, tmp_path: Path, words: list[str], code: int) -> None:
    """It may answer, or die of it."""
    with sleeping(warm, tmp_path, *words) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code


def test_a_kill_ends_it(warm: Warm, tmp_path: Path) -> None:
    """Though not in the same instant."""
    with sleeping(warm, tmp_path) as process:
        process.kill()
        assert process.stdout is not None
        began = time.monotonic()
        assert process.stdout.read() == ""  # It comes to its end when nobody has it open.
        assert time.monotonic() - began < 10
