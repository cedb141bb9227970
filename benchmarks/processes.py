"""What a step costs two processes that train together, against plain Lightning's.

python benchmarks/processes.py [ROUNDS]
"""

from __future__ import annotations

from harness import ROUNDS, Figure, asked_rounds, in_turn, python, ratios, show, stretches

TRAININGS = {
    "Lightning": python("lightning_steps.py", processes=2),
    "ours": python("our_steps.py", processes=2),
}
REASONS = {"14": "It lies about 1: between 0.94 and 1.05 in different runs."}


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Return the goal of two processes."""
    with stretches(TRAININGS, steps=300) as measures:
        found = in_turn(measures, rounds)
    own = ratios(found, "ours", "Lightning")
    return [Figure("14", "DDP with two processes", "Lightning", own, at_most=1.05)]


if __name__ == "__main__":
    show(figures(asked_rounds(__doc__)))
