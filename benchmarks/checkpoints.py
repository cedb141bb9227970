"""What it costs that a checkpoint is whole, verified and safe on the disk.

    python benchmarks/checkpoints.py [ROUNDS]

A checkpoint of 100 MB: a model of 8.7 million parameters and its optimizer. The peer is
`torch.save` to a file in the same folder, and `fsync` of that: without it nothing would be on the
disk yet. Ours adds a sha256, a sidecar, the move to its name, and the one of before as `previous`.
Of a checkpoint that is written in the background, the pause of the training is measured: against
copies of the same tensors, into memory that is kept for them as ours is, and into new memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import ROUNDS, Figure, asked_rounds, in_turn, ratios, show, timed

from torch_lab.checkpoints import AtomicCheckpointIO
from torch_lab.files import sync

MEGABYTES = 100
WIDTH = 2_048
REASONS = {"11": "It is the copy, and 4 % for the walk through the checkpoint."}


def checkpoint() -> dict[str, Any]:
    """Return what a training holds, of so many megabytes: weights, and two moments of each."""
    torch.manual_seed(0)
    layers = round(MEGABYTES * 1e6 / (WIDTH * WIDTH * 4) / 3)
    names = [f"layer_{number}.weight" for number in range(layers)]
    weights = {name: torch.randn(WIDTH, WIDTH) for name in names}
    moments = {
        number: {"exp_avg": torch.randn(WIDTH, WIDTH), "exp_avg_sq": torch.rand(WIDTH, WIDTH)}
        for number in range(layers)
    }
    return {"state_dict": weights, "optimizer_states": [{"state": moments}], "global_step": 1}


def plainly(content: dict[str, Any], path: Path) -> None:
    """Save as `torch.save` does, and wait until it is on the disk."""
    torch.save(content, path)
    sync(path)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in a checkpoint."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list):
        for item in value:
            yield from tensors(item)


def pauses(content: dict[str, Any], files: AtomicCheckpointIO) -> dict[str, Callable[[], float]]:
    """Return what is done while a training pauses, and what its best user would do by hand."""
    kept = [tensor.clone() for tensor in tensors(content)]

    def copies() -> None:
        for own, tensor in zip(kept, tensors(content), strict=True):
            own.copy_(tensor)

    return {
        "ours": lambda: timed(lambda: files.snapshot(content)),
        "copies": lambda: timed(copies),
        "clones": lambda: timed(lambda: [tensor.clone() for tensor in tensors(content)]),
    }


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Measure."""
    torch.set_num_threads(1)
    content = checkpoint()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        root = Path(folder)
        (root / "run.json").touch()  # As in a run's folder, where `previous` is kept.
        files, last = AtomicCheckpointIO(), root / "checkpoints" / "last.ckpt"
        measures = {
            "ours": lambda: timed(lambda: files.save_checkpoint(content, last)),
            "torch": lambda: timed(lambda: plainly(content, root / "plain.ckpt")),
        }
        in_turn(measures, 2)  # The first ones have no `previous`.
        found = in_turn(measures, rounds)
        paused = in_turn(pauses(content, files), rounds)
        size = last.stat().st_size / 1e6
    name = f"checkpoint of {size:.0f} MB, written whole and verified"
    peer = "torch.save and fsync"
    pause = "the pause for one that is written in the background"
    return [
        Figure("11", name, peer, ratios(found, "ours", "torch"), at_most=1.3),
        Figure("11", pause, "clones of its tensors", ratios(paused, "ours", "clones"), at_most=1.0),
        Figure("", pause, "copies to kept memory", ratios(paused, "ours", "copies")),
    ]


if __name__ == "__main__":
    show(figures(asked_rounds(__doc__)))
