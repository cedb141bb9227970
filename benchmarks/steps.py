"""What a step costs: ours, against plain PyTorch, plain Lightning and the design that we come from.

    python benchmarks/steps.py [ROUNDS]

Each training is a process; they run in turn, a stretch of steps at a time, so that whatever else
the machine does meets all of them. The perceptron has batches of 64 of 60,000 images of 28 x 28.
"""

from __future__ import annotations

import sys

from harness import ROUNDS, Figure, in_turn, python, ratios, show, stretches

MLP = {
    "raw loop": python("raw_steps.py", "mlp", 64),
    "Lightning": python("lightning_steps.py", "mlp", 64, "memory"),
    "Lightning by samples": python("lightning_steps.py", "mlp", 64, "samples"),
    "original design": python("original_steps.py"),
    "arrays": python("our_steps.py", "mlp", 64, "arrays"),
    "arrays and AUROC": python("our_steps.py", "mlp", 64, "arrays", "auroc"),
    "samples": python("our_steps.py", "mlp", 64, "samples"),
}


def conv(size: int) -> dict[str, list[str]]:
    """Return the trainings of the convolutional network."""
    return {
        "raw loop": python("raw_steps.py", "conv", size),
        "Lightning": python("lightning_steps.py", "conv", size, "memory"),
        "arrays": python("our_steps.py", "conv", size, "arrays"),
    }


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Return the goals of every step."""
    with stretches(MLP, steps=200) as measures:
        mlp = in_turn(measures, rounds)
    found = [
        _figure("4", "arrays, accuracy and F1", mlp, "arrays", "Lightning", at_most=1.0),
        _figure("4", "arrays, accuracy and F1", mlp, "arrays", "raw loop", at_most=1.8),
        _figure("4", "steps a second", mlp, "original design", "arrays", at_least=2.2),
        _figure("5", "the same with AUROC", mlp, "arrays and AUROC", "arrays", at_most=1.1),
        _figure("6", "samples one by one", mlp, "samples", "Lightning by samples", at_most=1.15),
        _figure("", "Lightning itself", mlp, "Lightning", "raw loop"),
    ]
    for size, steps, most in ((64, 40, 1.08), (2048, 4, 1.02)):
        with stretches(conv(size), steps=steps) as measures:
            of_size = in_turn(measures, rounds)
        name = f"conv net, batches of {size:,}"
        found.append(_figure("7", name, of_size, "arrays", "raw loop", at_most=most))
        found.append(_figure("", name, of_size, "Lightning", "raw loop"))
    return found


def short_figures() -> list[Figure]:
    """Return what is shown beside every change."""
    commands = {name: MLP[name] for name in ("Lightning", "arrays")}
    with stretches(commands, steps=100) as measures:
        mlp = in_turn(measures, 5)
    return [_figure("4", "arrays, accuracy and F1", mlp, "arrays", "Lightning", at_most=1.0)]


def _figure(
    number: str,
    name: str,
    found: dict[str, list[float]],
    own: str,
    peer: str,
    **goal: float,
) -> Figure:
    told = {"raw loop": "a raw loop", "arrays": "ours"}.get(peer, peer)
    return Figure(number, name, told, ratios(found, own, peer), **goal)


if __name__ == "__main__":
    show(figures(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS))
