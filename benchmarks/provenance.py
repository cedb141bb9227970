"""What it costs to know which line has set which value of the hparams.

    python benchmarks/provenance.py [ROUNDS]

Scripts of a thousand keys are run as they are, and with what records them, in turn. What is
measured is the time of the processor. The table shows the medians, and the median of what a round
takes longer with the recorder.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from harness import asked_rounds

from torch_lab import provenance, scripts
from torch_lab.afresh import imported_afresh

KEYS = 1000
IMPORT = "from torch_lab.utils import import_script_as_module\n"
LAYER = IMPORT + 'hparams = import_script_as_module("{}.py").hparams\n'


def literal(base: int = 0) -> str:
    """Return a dictionary of a thousand keys, in sections of ten."""
    sections = [
        f'    "section{section}": {{\n'
        + "".join(f'        "key{key}": {base + section * 10 + key},\n' for key in range(10))
        + "    },\n"
        for section in range(KEYS // 10)
    ]
    return 'hparams = {"config": {\n' + "".join(sections) + "}}\n"


def statements(factor: int) -> str:
    """Return a thousand statements, each of which sets a key."""
    return "".join(
        f'hparams["config"]["section{key // 10}"]["key{key % 10}"] = {factor * key}\n'
        for key in range(KEYS)
    )


PROJECTS = {
    "one dictionary": {"hparams": literal()},
    "a statement for each key": {
        "hparams": 'hparams = {"config": {}}\n'
        + "".join(
            f'hparams["config"]["section{section}"] = {{}}\n' for section in range(KEYS // 10)
        )
        + statements(1)
    },
    "three layers, ten changes each": {
        "base": literal(),
        "middle": LAYER.format("base") + "".join(statements(2).splitlines(keepends=True)[:10]),
        "hparams": LAYER.format("middle") + "".join(statements(3).splitlines(keepends=True)[:10]),
    },
    "three layers, all keys changed": {
        "base": literal(),
        "middle": LAYER.format("base") + statements(2),
        "hparams": LAYER.format("middle") + statements(3),
    },
}


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Run scripts as they are."""

    def plain(source: bytes, file: Path) -> tuple[bytes, list[provenance._Statement]]:
        return source, []

    with mock.patch.object(scripts, "instrumented", plain):
        yield


def seconds(script: Path) -> float:
    """Return how long the processor takes to run a script, with its layers."""
    with imported_afresh(script.parent):
        start = time.process_time()
        scripts.import_script_as_module(script)
        return time.process_time() - start


def main(rounds: int) -> None:
    """Print the table."""
    print(f"{'':34}{'plain':>10}{'recorded':>10}{'more':>10}   ms")
    for name, files in PROJECTS.items():
        with tempfile.TemporaryDirectory() as folder:
            for stem, text in files.items():
                (Path(folder) / f"{stem}.py").write_text(text)
            script = Path(folder).resolve() / "hparams.py"
            pairs = []
            for _ in range(rounds):
                with unrecorded():
                    plain = seconds(script)
                recorded = seconds(script)
                pairs.append((plain, recorded, recorded - plain))
        medians = [statistics.median(column) * 1000 for column in zip(*pairs, strict=True)]
        print(f"{name:34}" + "".join(f"{median:10.1f}" for median in medians))


if __name__ == "__main__":
    main(asked_rounds(__doc__, 25))
