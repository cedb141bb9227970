"""What a step costs: ours, against plain PyTorch, plain Lightning and the design that we come from.

    python benchmarks/steps.py [ROUNDS]

Each training is a process; they run in turn, a stretch of steps at a time, so that whatever else
the machine does meets all of them. The perceptron has batches of 64 of 60,000 images of 28 x 28.
The plots show how a step grows with what there is: images, metrics, scalars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from harness import (
    ROUNDS,
    Curve,
    Figure,
    asked_rounds,
    in_turn,
    python,
    ratios,
    show,
    stretches,
)

MLP = {
    "raw loop": python("raw_steps.py"),
    "Lightning": python("lightning_steps.py"),
    "bare Lightning": python("lightning_steps.py", scalars=0),
    "Lightning by samples": python("lightning_steps.py", data="samples"),
    "original design": python("original_steps.py"),
    "arrays": python("our_steps.py"),
    "arrays and AUROC": python("our_steps.py", metrics="Accuracy,F1Score,AUROC"),
    "arrays and fused AdamW": python("our_steps.py", keys="fused"),
    "samples": python("our_steps.py", data="samples"),
}
IMAGES = (1_000, 6_000, 60_000)
METRICS = (
    *("Accuracy", "F1Score", "Precision", "Recall"),
    *("Specificity", "CohenKappa", "JaccardIndex", "MatthewsCorrCoef"),
)
NUMBERS = (0, 1, 2, 4, 8)
"""Of metrics."""
SCALARS = (1, 8, 64)
FEW = 6_000
"""Images where their number does not matter, as ten trainings have them at once."""
CURVE_ROUNDS = 7
LEAST_STEPS = 94
"""Of a stretch: an epoch of so few images."""
REASONS = {
    "4": "Lightning that logs and writes nothing takes 1.5 times as long as a raw loop, of some "
    "1,700 calls in our step a tenth is ours, and the figure was 1.7 to 2.0 in different runs."
}


def conv(size: int) -> dict[str, list[str]]:
    """Return the trainings of the convolutional network."""
    return {
        "raw loop": python("raw_steps.py", net="conv", batch_size=size),
        "Lightning": python("lightning_steps.py", net="conv", batch_size=size),
        "arrays": python("our_steps.py", net="conv", batch_size=size),
    }


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Return the goals of every step."""
    with stretches(MLP, steps=200) as measures:
        mlp = in_turn(measures, rounds)
    found = [
        _figure("4", "arrays, accuracy and F1", mlp, "arrays", "Lightning", at_most=1.0),
        _figure("4", "arrays, accuracy and F1", mlp, "arrays", "raw loop", at_most=1.8),
        _figure("4", "the original design", mlp, "original design", "arrays", at_least=2.2),
        _figure("5", "the same with AUROC", mlp, "arrays and AUROC", "arrays", at_most=1.1),
        _figure("", "the same with fused AdamW", mlp, "arrays and fused AdamW", "arrays"),
        _figure("6", "samples one by one", mlp, "samples", "Lightning by samples", at_most=1.15),
        _figure("", "Lightning itself", mlp, "Lightning", "raw loop"),
        _figure("", "Lightning without logs and checkpoints", mlp, "bare Lightning", "raw loop"),
    ]
    for size, steps, most in ((64, 40, 1.08), (2048, 4, 1.02)):
        with stretches(conv(size), steps=steps) as measures:
            of_size = in_turn(measures, rounds)
        name = f"conv net, batches of {size:,}"
        found.append(_figure("7", name, of_size, "arrays", "raw loop", at_most=most))
        found.append(_figure("", f"{name}, Lightning itself", of_size, "Lightning", "raw loop"))
    return found


def short_figures() -> list[Figure]:
    """Return what is shown beside every change."""
    commands = {name: MLP[name] for name in ("Lightning", "arrays")}
    with stretches(commands, steps=100) as measures:
        mlp = in_turn(measures, 5)
    return [_figure("4", "arrays, accuracy and F1", mlp, "arrays", "Lightning", at_most=1.0)]


# The plots.


def curves(rounds: int) -> list[Curve]:
    """Return what a step costs against what grows, as lines of plots."""
    rounds = min(rounds, CURVE_ROUNDS)
    of_metrics = {number: ",".join(METRICS[:number]) for number in NUMBERS}
    return [
        _of_images(rounds),
        _of(
            "metrics", {number: {"metrics": names} for number, names in of_metrics.items()}, rounds
        ),
        _of("scalars", {number: {"scalars": number, "metrics": ""} for number in SCALARS}, rounds),
    ]


def _of_images(rounds: int) -> Curve:
    """Compare whole epochs, as much of what they cost is at their ends."""
    ours = {
        "torch-lab, accuracy and F1": "Accuracy,F1Score",
        "torch-lab, the same with AUROC": "Accuracy,F1Score,AUROC",
    }
    lines: dict[str, dict[int, list[float]]] = {name: {} for name in ours}
    for images in IMAGES:
        commands = {
            name: python("our_steps.py", images=images, metrics=names)
            for name, names in ours.items()
        }
        commands["Lightning"] = python("lightning_steps.py", images=images)
        epoch = math.ceil(images / 64)
        with stretches(commands, steps=epoch * math.ceil(LEAST_STEPS / epoch)) as measures:
            found = in_turn(measures, rounds)
        for name, line in lines.items():
            line[images] = ratios(found, name, "Lightning")
    return Curve("A step, with images in the dataset", "images", "plain Lightning", lines)


def _of(what: str, settings: Mapping[int, Mapping[str, str | int]], rounds: int) -> Curve:
    """Compare ours and Lightning's of so many, all with Lightning's of the fewest."""
    scripts = {"torch-lab": "our_steps.py", "plain Lightning": "lightning_steps.py"}
    commands = {
        f"{name}, {number}": python(script, images=FEW, **asked)
        for name, script in scripts.items()
        for number, asked in settings.items()
    }
    with stretches(commands, steps=LEAST_STEPS) as measures:
        found = in_turn(measures, rounds)
    fewest = min(settings)
    peer = f"plain Lightning, {fewest}"
    lines = {
        name: {number: ratios(found, f"{name}, {number}", peer) for number in settings}
        for name in scripts
    }
    against = f"plain Lightning with {fewest or 'none'}"
    return Curve(f"A step, with {what} that are logged", what, against, lines)


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
    show(figures(asked_rounds(__doc__)))
