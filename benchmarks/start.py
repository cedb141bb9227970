"""How long commands take to answer, and trainings to begin and to end.

    python benchmarks/start.py [ROUNDS]

The first step has ended when its `on_train_batch_end` is called, or in a plain loop after the
optimizer's step; it is counted from just before the process is started. All train the same network
on as many images, with a loss, an accuracy, a validation and a checkpoint; `train` validates once
more before it begins, and keeps its record. By how much starting grows with the runs that are there
is told from the processor's time until the trainer is set up, in forks of a process that has
imported all: the rest of starting varies by more.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness import (
    ENVIRONMENT,
    PEERS,
    ROUNDS,
    Curve,
    Figure,
    asked_rounds,
    in_turn,
    python,
    ratios,
    show,
    wall,
)

__all__ = ["curves", "figures", "short_figures"]

AUTHOR = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
BIN = Path(sys.executable).parent
SCRIPT = Path("experiments") / "00_one_batch" / "hparams.py"
TRAIN = [BIN / "train", SCRIPT, "--offline"]
PASS, PLAIN, OURS = "python -c pass", "plain Lightning", "train"
MOST_SLOWER = 13.6
"""0.15 s for a command where `python -c pass` takes 0.011 s."""
FEW, MANY = 20, 2_000
SHORT = 3
"""Rounds of the short form."""
NEEDED = {"hydra": "hydra-core", "jsonargparse": "jsonargparse"}
"""Modules of peers, and the packages that they are in."""


class Project:
    """A project with an experiment of one batch, and with runs of it.

    Args:
        root: An empty folder for it.
        like: A finished run, from which others are made.
        runs: How many.
    """

    def __init__(self, root: Path, like: Path | None = None, runs: int = 0) -> None:
        self.root = root
        self.environment = {**ENVIRONMENT, "FOLDER": str(root)}
        self.environment.pop("TORCH_LAB_ROOT", None)
        root.mkdir(exist_ok=True)
        shutil.copytree(PEERS / "experiments", root / "experiments")
        (root / "pyproject.toml").touch()
        (root / ".gitignore").write_text("data/\n", encoding="utf-8")
        for words in (["init"], ["add", "."], [*AUTHOR, "commit", "-m", "one batch"]):
            wall(["git", *words], cwd=root)
        for number in range(runs):
            self._add(like, number + 1)

    @property
    def artifacts(self) -> Path:
        return self.root / "data" / "artifacts"

    def _add(self, like: Path | None, version: int) -> None:
        assert like is not None
        record = json.loads((like / "run.json").read_text(encoding="utf-8"))
        record["version"], record["name"] = version, f"{like.name.rpartition('-')[0]}-v{version}"
        folder = self.artifacts / record["name"]
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        for sidecar in like.glob("checkpoints/*.json"):
            shutil.copy(sidecar, folder / "checkpoints")

    def answer(
        self, command: Sequence[str | Path], code: int = 0, **more: str
    ) -> Callable[[], float]:
        """Return what measures a command in this project."""
        environment = {**self.environment, **more}
        return lambda: wall(command, code, cwd=self.root, env=environment)


@contextlib.contextmanager
def projects(*runs: int) -> Iterator[list[Project]]:
    """Yield projects that have so many runs, each with a real record."""
    with tempfile.TemporaryDirectory() as folder:
        first = Project(Path(folder) / "first")
        wall(TRAIN, cwd=first.root, env={**first.environment, "BEGAN": "0"})
        (like,) = first.artifacts.iterdir()
        yield [Project(Path(folder) / str(number), like, number) for number in runs]


def completing(line: str) -> dict[str, str]:
    """Return the variables with which a shell asks for what may follow `line`."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return {"_TRAIN_COMPLETE": "bash_complete", **words}


# Goal 1: commands that answer.


def answers(rounds: int) -> list[Figure]:
    """Return what commands take that train nothing."""
    with projects(FEW) as [project]:
        measures = {
            PASS: project.answer([sys.executable, "-c", "pass"]),
            "train --help": project.answer([BIN / "train", "--help"]),
            "one Tab, of a path": project.answer([BIN / "train"], **completing("train exp")),
            "one Tab, of a run": project.answer(
                [BIN / "train"], **completing(f"train {SCRIPT} --resume ")
            ),
            f"torch-lab runs, of {FEW}": project.answer([BIN / "torch-lab", "runs"]),
            "train with a misspelt path": project.answer([BIN / "train", "nowhere.py"], code=2),
        }
        for measure in measures.values():
            measure()
        found = in_turn(measures, rounds)
    return [
        Figure("1", name, PASS, ratios(found, name, PASS), at_most=MOST_SLOWER)
        for name in found
        if name != PASS
    ]


# Goal 2: the first step, and all of a short process.


class Beginning:
    """Measures a process that trains one batch.

    Args:
        command: What trains.
        folder: For its files, and its working directory.
    """

    def __init__(self, command: Sequence[str | Path], folder: Path) -> None:
        self.command, self.folder = command, folder
        self.first_steps: list[float] = []

    def __call__(self) -> float:
        """Return how many seconds all of it takes; keep when its first step had ended."""
        variables = {**ENVIRONMENT, "FOLDER": str(self.folder), "BEGAN": str(time.time())}
        took = wall(self.command, cwd=self.folder, env=variables)
        told = (self.folder / "first_step").read_text(encoding="utf-8")
        self.first_steps.append(float(told))
        return took


def peers(folder: Path) -> dict[str, list[str]]:
    """Return the commands that do the same work as plain Lightning.

    Raises:
        SystemExit: A package of theirs is missing.
    """
    missing = [package for name, package in NEEDED.items() if not importlib.util.find_spec(name)]
    if missing:
        sys.exit(f"error: peers need {' and '.join(missing)}: pip install -e '.[bench]'")
    limits = {"max_epochs": 1, "limit_train_batches": 1, "default_root_dir": folder}
    words = [f"--trainer.{name}={value}" for name, value in limits.items()]
    return {
        "raw PyTorch": python("start_raw.py"),
        "LightningCLI": python("start_lightning_cli.py", "fit", *words),
        "a Hydra application": python("start_hydra.py"),
    }


def beginnings(rounds: int, *, is_short: bool = False) -> list[Figure]:
    """Return what trainings of one batch take, against plain Lightning.

    Before the first round nothing is compiled, and the disk not read: that one is left out. In the
    short form it is not, and the peers without a goal are.
    """
    extra = int(not is_short)
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder) / "project")
        measures = {OURS: Beginning(TRAIN, project.root)}
        others = {} if is_short else peers(Path(folder))
        for name, command in {PLAIN: python("start_lightning.py"), **others}.items():
            own = Path(folder) / name.replace(" ", "-")
            own.mkdir()
            measures[name] = Beginning(command, own)
        found = in_turn(measures, rounds + extra)
    found = {name: times[extra:] for name, times in found.items()}
    first = {name: measure.first_steps[extra:] for name, measure in measures.items()}
    return [
        Figure("2" if is_ours else "", f"{name}: {what}", PLAIN, ratios(times, name, PLAIN), goal)
        for what, times, most in (("first step", first, 0.85), ("whole process", found, 0.75))
        for name, is_ours in ((name, name == OURS) for name in times if name != PLAIN)
        for goal in [most if is_ours else None]
    ]


# Goal 3: what runs cost that are there already.


@contextlib.contextmanager
def forked(project: Project) -> Iterator[Callable[[Project], float]]:
    """Yield what gives the processor's seconds until the trainer is set up, without the imports."""
    process = subprocess.Popen(
        python("start_forked.py", SCRIPT, "--offline"),
        env=project.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def seconds(where: Project) -> float:
        print(where.root, file=process.stdin, flush=True)
        took = float(process.stdout.readline())
        # It leaves a run behind; there shall be as many the next time.
        newest = max(where.artifacts.iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
        shutil.rmtree(newest)
        return took

    try:
        yield seconds
    finally:
        process.communicate()


def growth(rounds: int) -> list[Figure]:
    """Return by how much starting grows with runs in the artifacts folder."""
    with projects(FEW, MANY) as each, forked(each[0]) as seconds:
        few, many = (lambda where=where: seconds(where) for where in each)
        few(), many()
        found = in_turn({"few": few, "many": many}, 3 * rounds)
    grown = [(many - few) * 1000 for few, many in zip(found["few"], found["many"], strict=True)]
    name = f"train: set up, with {MANY:,} runs"
    return [Figure("3", name, f"the same with {FEW} runs", grown, at_most=20, unit="ms")]


def curves(rounds: int) -> list[Curve]:
    """Return the cost of starting against the number of runs that are there, as lines of a plot."""
    numbers = (0, 200, 1_000, MANY)
    lines: dict[str, dict[int, list[float]]] = {}
    with projects(*numbers) as each, forked(each[0]) as seconds:
        words = completing(f"train {SCRIPT} --resume ")
        for name, measured in {
            "train: set up (without the imports)": [
                lambda where=where: seconds(where) for where in each
            ],
            "one Tab, of a run": [where.answer([BIN / "train"], **words) for where in each],
        }.items():
            found = in_turn(dict(zip(map(str, numbers), measured, strict=True)), rounds)
            lines[name] = {number: ratios(found, str(number), "0") for number in numbers}
    title = "Starting, with runs in the artifacts folder"
    return [Curve(title, "runs", "the same with none", lines)]


def figures(rounds: int = ROUNDS) -> list[Figure]:
    """Return what starting costs."""
    return [*answers(rounds), *beginnings(rounds), *growth(rounds)]


def short_figures() -> list[Figure]:
    """Return what is shown beside every change; that starting does not grow, the tests say."""
    return [*answers(SHORT), *beginnings(SHORT - 1, is_short=True)]


if __name__ == "__main__":
    show(figures(asked_rounds(__doc__)))
