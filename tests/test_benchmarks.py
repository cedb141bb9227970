"""What the benchmarks say of what they measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TRAINING = """
import sys

for number in range(3):
    print("stretch:", 2.0 + number, 1.0, flush=True)
    if not sys.stdin.readline():
        sys.exit("nobody asks for more")
"""


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import harness

    return harness


@pytest.fixture
def report(harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module that writes the page, with a page of its own."""
    import report

    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(report, "PLOTS", tmp_path / "performance")
    report.PAGE.write_text("", encoding="utf-8")
    return report


def test_a_single_round_is_a_row(harness: Any) -> None:
    """A figure of a single round says it as median and quartiles."""
    figure = harness.Figure("1", "ours", "theirs", [0.5], at_most=1.0)

    assert figure.row() == (
        *("1", "ours", "theirs", "0.500", "0.500 to 0.500", "at most 1", "reached"),
    )


def test_peers_take_turns(harness: Any) -> None:
    """Each round measures all, and every other one goes backwards."""
    order: list[str] = []
    measures = {name: lambda name=name: float(order.append(name) or 1) for name in "ab"}

    assert harness.in_turn(measures, 2) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert order == ["a", "b", "b", "a"]


def test_trainings_stand_still_between_stretches(harness: Any, tmp_path: Path) -> None:
    """A training goes on when it is asked to, and says how long a step of the stretch took."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING, encoding="utf-8")

    with harness.stretches({"ours": [sys.executable, script]}, steps=2) as measures:
        assert [measures["ours"](), measures["ours"]()] == [1.5, 2.0]


def test_a_training_that_fails_says_why(harness: Any) -> None:
    """What a training wrote to its standard error is in the message."""
    command = [sys.executable, "-c", "import sys; sys.exit('no data')"]

    with pytest.raises(RuntimeError, match="no data"), harness.stretches({"ours": command}, 1):
        pass


def test_the_page_keeps_its_part_on_a_million_steps(
    report: Any, harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page and its last part are written by two commands, each of which keeps the other's."""
    import scale

    million = harness.Figure("12", "a million steps", "the beginning", [1.0], at_most=1.05)
    monkeypatch.setattr(scale, "figures", lambda *_: [million])
    figure = harness.Figure("4", "a step", "a raw loop", [1.7, 1.9], at_most=1.8)
    found = report.Report([report.Measured(harness, [figure])])

    report.write(found, "make bench")
    report.write_million(11, "make bench-million")
    report.write(found, "make bench, again")

    text = report.PAGE.read_text(encoding="utf-8")
    assert text.count("| 4 | a step | a raw loop |") == 1
    assert text.count("| 12 | a million steps | the beginning |") == 1
    assert "`make bench, again` wrote" in text
    assert "`make bench-million` wrote" in text
    assert "`make bench` wrote" not in text


def test_the_same_points_are_the_same_plot(report: Any, harness: Any) -> None:
    """A plot that is drawn again differs in nothing."""
    lines = {"ours": {1: [1.0, 1.1], 10: [1.2, 1.3]}}
    curve = harness.Curve("A step, with images", "images", "plain Lightning", lines)
    path = report.PLOTS / "a-step-with-images.svg"

    report.draw(curve)
    first = path.read_bytes()
    report.draw(curve)

    assert path.read_bytes() == first
    assert b"ratio to plain Lightning" in first
