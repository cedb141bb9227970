"""How long the commands take to answer, as ratios to a peer that is measured in the same run.

    python benchmarks/start.py [ROUNDS]

Each round runs every command once, in turn, so that a busy moment of the machine meets all of
them. The table shows medians, and the quartiles of the ratio to the peer of the same round.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PEER = "import click"
BIN = Path(sys.executable).parent
COMMANDS: dict[str, Sequence[str | Path]] = {
    f'python -c "{PEER}"': [sys.executable, "-c", PEER],
    "train --help": [BIN / "train", "--help"],
    "infer --help": [BIN / "infer", "--help"],
    "torch-lab --help": [BIN / "torch-lab", "--help"],
    "train with a misspelt path": [BIN / "train", "nowhere.py"],
}


def seconds(command: Sequence[str | Path]) -> float:
    """Return how long `command` takes, its output left unread."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - started


def main(rounds: int) -> None:
    """Measure, and print a table."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    peer, *_ = times.values()
    print(f"{'command':<30} {'median, ms':>10}  {'ratio':>5}  quartiles of the ratio")
    for name, own in times.items():
        ratios = [mine / others for mine, others in zip(own, peer, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds, spread = statistics.median(own) * 1e3, f"{low:.2f} to {high:.2f}"
        print(f"{name:<30} {milliseconds:>10.1f}  {middle:>5.2f}  {spread}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
