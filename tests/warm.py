"""A Python that starts at once: what it is to run, it runs in a fork of a process that waits.

That process is a fresh interpreter, which has imported torch, Lightning and torch_lab, and done
nothing else. To import them takes seconds, and to fork it milliseconds. `Warm.python` takes the
place of `sys.executable`, for `-m MODULE` and for scripts: arguments, environment, directory,
streams and signals, the exit code and a death by a signal are those of a process of its own. What
is imported at the start, the variables that Python reads then, the process group and the keys of a
terminal are not: of these, a test with it says nothing. Nor is the number of the process: a parent
knows that of the one that hands on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
IMPORTED = (
    *("torch_lab.cli", "torch_lab.jobs", "torch_lab.listing", "torch_lab.runner"),
    *("torch_lab.tracing", "torch_lab.verify", "torch_lab.modules", "torch_lab.metrics"),
    *("torch_lab.callbacks", "torch_lab.datasets", "torch_lab.transforms"),
    *("pytorch_lightning", "torch.utils.tensorboard", "torchmetrics.classification"),
    *("matplotlib.pyplot", "sklearn.datasets", "sklearn.model_selection"),
)


class Warm:
    """The process that waits.

    Attributes:
        python: Takes the place of `sys.executable`.
        scripts: A folder with `train`, `infer` and `torch-lab`, for `PATH`.
    """

    def __init__(self, folder: Path) -> None:
        self.scripts = folder / "bin"
        self.scripts.mkdir()
        self.python = str(self._script("python"))
        for name in ("train", "infer", "torch-lab"):
            self._script(name, str(Path(sys.executable).with_name(name)))
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--wait", folder / "socket", self.python],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def _script(self, name: str, *words: str) -> Path:
        """Write a script that has `words` and its arguments run by the process that waits."""
        path = self.scripts / name
        command = [sys.executable, "-IS", __file__, str(self.scripts.parent / "socket"), *words]
        path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        path.chmod(0o700)
        return path

    def end(self) -> None:
        """End the process; what it has started goes on."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# In the place of the process of its own.


def ask(address: str, words: list[str]) -> int:
    """Have `words` run with our streams; return the exit code, or die as it has died."""
    words = words[1:] if words[0] == "-u" else words  # It is torchrun's, for all that it starts.
    if not (words[0] == "-m" or Path(words[0]).is_file()):
        os.execv(sys.executable, [sys.executable, *words])
    with socket.socket(socket.AF_UNIX) as there:
        there.connect(address)
        told = json.dumps({"words": words, "cwd": str(Path.cwd()), "environ": dict(os.environ)})
        socket.send_fds(there, [len(told.encode()).to_bytes(4, "big")], [0, 1, 2])
        there.sendall(told.encode())
        for signum in SIGNALS:
            signal.signal(signum, lambda number, _: there.sendall(bytes([number])))
        code = int.from_bytes(there.recv(4), "big", signed=True)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# In the process that waits.


def wait(address: str, python: str) -> None:
    """Import everything, then run what is asked for, each in a fork, until stdin is closed."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # Otherwise each fork copies what it does not use.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, 0], [], [])[0]:
            here, _ = listener.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # Attendants that have ended.
                    pass
            if not os.fork():
                listener.close()
                attend(here, python)
                return
            here.close()


def attend(here: socket.socket, python: str) -> None:
    """Run what `here` asks for in a fork; hand on its signals, and say how it ended."""
    size, streams, _, _ = socket.recv_fds(here, 4, 3)
    with here.makefile("rb") as file:
        told = json.loads(file.read(int.from_bytes(size, "big")))
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    child = os.fork()
    if not child:
        here.close()
        become(told, streams, python)
        run(told["words"])
        return
    for stream in streams:
        os.close(stream)
    ended = threading.Event()
    threading.Thread(target=hand_on, args=(here, child, ended), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended.set()
    with contextlib.suppress(OSError):
        here.sendall(code.to_bytes(4, "big", signed=True))
    os._exit(0)


def hand_on(here: socket.socket, child: int, ended: threading.Event) -> None:
    """Send the signals that come; kill the child and what it started if whoever asked is gone."""
    while signum := here.recv(1):
        os.kill(child, signum[0])
    if not ended.is_set():
        os.killpg(child, signal.SIGKILL)


def become(told: dict[str, Any], streams: list[int], python: str) -> None:
    """Make this process what a fresh one would be."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in SIGNALS[1:]:
        signal.signal(signum, signal.SIG_DFL)
    for stream, number in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(told["cwd"])
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(told["environ"])
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, theirs), *(path for path in sys.path[1:] if path not in ours)]
    sys.executable = python
    sys.modules["numpy"].random.seed()


def run(words: list[str]) -> None:
    """Run a module or a script, as Python would with these arguments."""
    if words[0] == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--wait":
        wait(*sys.argv[2:])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
