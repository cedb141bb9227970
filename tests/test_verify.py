"""`torch-lab verify-resume` tells an experiment that goes on exactly from one that does not."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from conftest import Lab
from torch_lab import cli
from torch_lab.errors import UserError
from torch_lab.tracing import digests
from torch_lab.verify import (
    Hook,
    KillPoint,
    Kind,
    Outcome,
    Report,
    Trial,
    chosen,
    differences,
    reached,
)
from warm import Warm

NOISY = """
class Noisy(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
        self.noise = np.random.default_rng(0)

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return self.x[index] + float(self.noise.normal()), int(self.x[index].sum() > 0)


def train_config"""

TWO = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 2}


# Through the command.


def verified(lab: Lab, warm: Warm, *words: str) -> tuple[int, dict[str, Any], Path]:
    """Return the exit code, the record and the folder for temporary files."""
    folder = lab.root / "temporary"
    folder.mkdir()
    result = lab.command(
        "verify-resume", lab.path, "--json", *words, python=warm.python, TMPDIR=str(folder)
    )
    assert result.out, result.err
    return result.code, json.loads(result.out), folder


def test_an_exact_experiment_is_found_exact(lab: Lab, warm: Warm) -> None:
    """All is equal, and nothing is left: neither in the project nor among temporary files.

    The checkpoint lies halfway to the kill, whatever the hparams say.
    """
    own = {"every_n_steps": 1}
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 2}}, "checkpoint": own})
    code, record, folder = verified(lab, warm, "--kill-at", "7:optimizer")
    (trial,) = record["trials"]
    assert (code, record["exact"], record["whole"]) == (0, True, True)
    assert record["steps"] == [1, 8]
    assert trial == {
        "killed_at": 7,
        "in": "optimizer",
        "resumed_from": 6,
        "equal": True,
        "problem": None,
        "differs_at": None,
    }
    assert list(folder.glob("torch-lab-verify-*")) == []
    assert not (lab.root / "data").exists()


@pytest.mark.slow
def test_a_generator_in_the_data_is_found(lab: Lab) -> None:
    """Of a dataset with a generator of its own: the step, the quantity, the cause, the folder."""
    lab.config("def train_config", NOISY)
    text = (lab.folder / "__main__.py").read_text()
    text = text.replace("import functools", "import functools\nimport numpy as np")
    own = "DataLoader(Noisy(), batch_size=8, shuffle=True)"
    lab.write("__main__.py", text.replace("loader(32, 1, shuffle=True)", own))
    result = lab.command("verify-resume", lab.path, "--kill-at", "7", TMPDIR=str(lab.root))
    assert result.code == 1
    assert "1 of 2: the unbroken run" in result.err
    assert "step 7, end of the batch" in result.out
    assert "step 7: inputs [0]" in result.out
    assert "holds a generator or a counter of its own" in result.out
    assert f"verify-resume {lab.path} --steps 200 --kill-at 7" in result.out.replace(
        "toys/experiments", f"{lab.root}/toys/experiments"
    )
    (folder,) = lab.root.glob("torch-lab-verify-*")
    assert str(folder) in result.out
    assert sorted(item.name for item in folder.iterdir()) == ["again", "kill-1", "unbroken"]


def test_a_run_that_fails_anyway_ends_as_it_does(lab: Lab, warm: Warm) -> None:
    """The error of the unbroken run is shown, and its exit code kept."""
    lab.config("torch.nn.CrossEntropyLoss()", "lambda y_pred, y: y_pred.sum() * float('nan')")
    variables = {"TMPDIR": str(lab.root)}
    result = lab.command("verify-resume", lab.path, python=warm.python, **variables)
    assert result.code == 4
    assert "loss is NaN" in result.err
    assert "error: the run fails without being killed" in result.err
    assert list(lab.root.glob("torch-lab-verify-*")) == []


def test_an_interruption_leaves_nothing(lab: Lab) -> None:
    """Ctrl-C ends the training, too, and removes the folder."""
    lab.hparams("hparams", {"trainer": {"init": {"max_epochs": 1000}}})
    words = ("verify-resume", lab.path, "--steps", "100000")
    verifying = lab.start(*words, env=lab.environment(TMPDIR=str(lab.root)))
    while not list(lab.root.glob("torch-lab-verify-*/unbroken/trace.0")):
        assert verifying.poll() is None
        time.sleep(0.05)
    started = psutil.Process(verifying.pid).children(recursive=True)
    verifying.send_signal(signal.SIGINT)
    _, error = verifying.communicate(timeout=30)
    assert verifying.returncode == 130, error
    assert "stopped by SIGINT" in error
    assert not any(process.is_running() for process in started)
    assert list(lab.root.glob("torch-lab-verify-*")) == []


@pytest.mark.slow
def test_processes_that_train_together(lab: Lab, warm: Warm) -> None:
    """A run of two processes is killed as a whole, goes on, and is compared on both."""
    lab.hparams("hparams", {"trainer": {"init": TWO}})
    code, record, _ = verified(lab, warm, "--kill-at", "3")
    assert (code, record["exact"]) == (0, True), record
    assert record["trials"][0]["resumed_from"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kill-at", "0"], "--kill-at 0: expected a step from 1 on"),
        (["--kill-at", "7:lunch"], "places are batch-start, optimizer, batch-end, validation"),
        (["--kill-at", "31", "--steps", "30"], "--kill-at 31 is after the end: --steps 30"),
    ],
)
def test_a_place_that_is_none_is_refused(lab: Lab, words: list[str], message: str) -> None:
    """A kill that cannot be is a user's mistake, found before anything is trained."""
    result = lab._main(cli.verify_resume, lab.path, *words)
    assert result.code == 2
    assert message in result.err


def test_the_help_names_every_place(lab: Lab) -> None:
    """Also that at the end of the batch, which a step alone means; and the own checkpoints."""
    text = "".join(lab._main(cli.verify_resume, "--help").out.split())  # Lines break at hyphens.
    assert [hook for hook in Hook if f"7:{hook}" not in text] == []
    assert "whateverevery_minutesandevery_n_stepssay" in text


# What is compared.


def line(step: int, **changed: Any) -> dict[str, Any]:
    """Return the line of a batch; epochs have four."""
    epoch, batch = divmod(step - 1, 4)
    seen = {"inputs": {"[0]": f"crc{step}", "[1]": "y"}, "rates": {"0": 0.1}}
    made = {"loss": {"": 1.0 / step}, "weights": {"": f"w{step}"}}
    return {"epoch": epoch, "batch": batch, "step": step, **seen, **made, **changed}


def hooks(steps: int) -> list[KillPoint]:
    """Return what a run goes through that validates after each epoch."""
    each = (Hook.BATCH_START, Hook.OPTIMIZER, Hook.BATCH_END)
    last = (Hook.VALIDATION, Hook.EPOCH_END)
    return [
        KillPoint(step, hook)
        for step in range(1, steps + 1)
        for hook in (*each, *(last if step % 4 == 0 else ()))
    ]


def outcome(*lines: dict[str, Any], **rest: Any) -> Outcome:
    """Return what a run of eight steps wrote down; `lines` are in place of those of their steps."""
    own = {each["step"] for each in lines}
    others = [line(step) for step in range(1, 9) if step not in own]
    values = {
        "scalars": {"loss/validate": [[3, 0.5], [7, 0.25]]},
        "state": {"state_dict.weight": "crc", "global_step": 8},
        "hooks": hooks(8),
    }
    return Outcome({0: [*lines, *others]}, **{**values, **rest})


def told(found: Outcome, expected: Outcome | None = None) -> str:
    """Return the first difference in words."""
    return str(differences(expected or outcome(), found)[0])


def test_equal_trainings_do_not_differ() -> None:
    """Neither do steps that were made twice in the same way, nor what is not a number."""
    expected = outcome(line(5, loss={"": float("nan")}))
    found = outcome(line(5, loss={"": float("nan")}), line(6), line(6))
    assert differences(expected, found) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"inputs": {"[0]": "other", "[1]": "y"}}, "step 6: inputs [0]"),
        ({"inputs": {"[0]": "crc6"}}, "step 6: inputs [1]"),
        ({"loss": {"": 0.5}}, "step 6: loss 0.5 instead of 0.166666667"),
        ({"loss": {"": 1 / 6 + 1e-12}}, "step 6: loss 0.16666666666766666 instead of "),
        ({"rates": {"0": 0.01}}, "step 6: rates 0 0.01 instead of 0.1"),
        ({"weights": {"": "other"}}, "step 6: weights"),
    ],
)
def test_what_differs_in_a_step_is_named(changed: dict[str, Any], words: str) -> None:
    """With the step; also if the step was made twice, and was right the second time."""
    wrong = line(6, **changed)
    assert told(outcome(wrong)).startswith(words)
    assert told(outcome(wrong, line(6))).startswith(words)
    assert told(outcome(line(6), wrong)).startswith(words)


def test_the_first_difference_comes_first() -> None:
    """By step; within a step what is a cause before what comes of it."""
    late = line(7, inputs={"[0]": "other", "[1]": "y"})
    early = line(6, weights={"": "other"}, loss={"": 9.0})
    found = outcome(late, early, scalars={"loss/validate": [[3, 0.5], [7, 0.3]]})
    kinds = [(each.step, each.kind) for each in differences(outcome(), found)]
    assert kinds[:3] == [(6, Kind.LOSS), (6, Kind.WEIGHTS), (7, Kind.INPUTS)]
    assert kinds[3] == (8, Kind.LOGGED)


def test_steps_that_are_missing_or_too_many_are_named() -> None:
    """A batch that was left out is a difference, and so is one that should not be."""
    short = Outcome({0: [line(step) for step in range(1, 8)]})
    long = Outcome({0: [line(step) for step in range(1, 9)]})
    assert told(short, long) == "step 8 was not made"
    assert told(long, short) == "step 8 was not to be made"


def test_other_ranks_are_compared() -> None:
    """The process of every rank has a trace of its own."""
    expected = Outcome({0: [line(1)], 1: [line(1)]})
    found = Outcome({0: [line(1)], 1: [line(1, loss={"": 2.0})]})
    assert told(found, expected) == "step 1: loss on rank 1 2 instead of 1"


@pytest.mark.parametrize(
    ("logged", "words"),
    [
        ([[3, 0.5], [7, 0.3]], "logged loss/validate 0.3 at step 7 instead of 0.25 at step 7"),
        ([[3, 0.5]], "logged loss/validate nothing instead of 0.25 at step 7"),
        (
            [[3, 0.5], [3, 0.5], [7, 0.25]],
            "logged loss/validate 0.5 at step 3 instead of 0.25 at step 7",
        ),
    ],
)
def test_gaps_and_overlaps_in_what_is_logged(logged: list[list[float]], words: str) -> None:
    """Every value is logged once, at its step."""
    assert told(outcome(scalars={"loss/validate": logged})) == words


def test_the_last_checkpoint_is_compared() -> None:
    """What differs in it alone is named by its path."""
    found = outcome(state={"state_dict.weight": "other", "global_step": 8, "callbacks.x": 1})
    assert [str(each) for each in differences(outcome(), found)] == [
        "last checkpoint: state_dict.weight",
        "last checkpoint: callbacks.x",
    ]


def test_traces_are_read_from_their_files(tmp_path: Path) -> None:
    """Batches by rank, the hooks of rank 0 once each, and what was written at the end."""
    trace = tmp_path / "trace"
    lines = [{"hook": "batch-start", "step": 1}, line(1), *2 * [{"hook": "validation", "step": 1}]]
    text = "".join(json.dumps(each) + "\n" for each in lines)
    for rank in (0, 1):
        (tmp_path / f"trace.{rank}").write_text(text)
    (tmp_path / "trace.outcome").write_text('{"scalars": {"a": [[0, NaN]]}, "state": {"b": 1}}')
    found = Outcome.read(trace)
    assert found.trace == {0: [line(1)], 1: [line(1)]}
    assert found.hooks == [KillPoint(1, Hook.BATCH_START), KillPoint(1, Hook.VALIDATION)]
    assert found.state == {"b": 1}
    assert differences(found, found) == []


# Where to kill.


def test_places_are_drawn_from_where_the_run_was() -> None:
    """Different ones, behind the first step; as many as there are, if that is less."""
    points = hooks(8)
    found = chosen(points, 12, random.Random(0))
    assert len(set(found)) == 12
    assert set(found) < set(points)
    assert all(point.step > 1 for point in found)
    assert {point.hook for point in found} == set(Hook)
    assert sorted(map(str, chosen(points[:3], 9, random.Random(1)))) == sorted(map(str, points[:3]))


def test_a_kill_is_where_the_run_comes_next() -> None:
    """A step without a validation is killed in the next one; behind the last step there is none."""
    expected = outcome()
    assert reached(KillPoint.parse("5:validation"), expected) == KillPoint(8, Hook.VALIDATION)
    assert reached(KillPoint.parse("5"), expected) == KillPoint(5, Hook.BATCH_END)
    with pytest.raises(UserError, match="--kill-at 31: the run has only 8 steps"):
        reached(KillPoint(31), expected)
    with pytest.raises(UserError, match="comes to no epoch-end from that step on"):
        reached(KillPoint(5, Hook.EPOCH_END), outcome(hooks=hooks(3)))


# Causes.


def report(found: Outcome, again: Outcome | None = None, **rest: Any) -> Report:
    trial = Trial(KillPoint(7), 6, found)
    return Report(Path("hparams.py"), outcome(), 200, [trial], again=again, **rest)


OTHER_INPUTS = outcome(line(7, inputs={"[0]": "other", "[1]": "y"}))
OTHER_LOSS = outcome(line(7, loss={"": 9.0}))
OTHER_LOG = outcome(scalars={"loss/validate": [[3, 0.5], [7, 0.3]]})
OTHER_CALLBACK = outcome(
    state={"state_dict.weight": "crc", "global_step": 8, "callbacks.Own.count": 3}
)


@pytest.mark.parametrize(
    ("found", "again", "cause"),
    [
        (OTHER_INPUTS, outcome(), "holds a generator or a counter of its own"),
        (OTHER_LOSS, outcome(), "state that no checkpoint"),
        (OTHER_LOG, outcome(), "epoch_state_dict"),
        (OTHER_CALLBACK, outcome(), "load_state_dict does not set back"),
        (OTHER_INPUTS, OTHER_INPUTS, "seeded from the clock or the system"),
        (OTHER_LOSS, OTHER_LOSS, "a kernel that is not deterministic"),
        (OTHER_LOG, OTHER_CALLBACK, "the time in its state"),
    ],
)
def test_the_likely_cause_is_told(found: Outcome, again: Outcome, cause: str) -> None:
    """By what differs first, and by whether unbroken runs differ from each other."""
    made = report(found, again)
    assert not made.is_exact
    (told_cause,) = made.causes()
    assert cause in told_cause


def test_what_torch_lab_warned_of_is_the_cause() -> None:
    """The reasons that the run itself gave say more than a guess."""
    made = report(OTHER_INPUTS, outcome(), reasons=["train_dataloaders: its sampler, Own, …"])
    assert made.causes() == ["train_dataloaders: its sampler, Own, …"]


def test_times_that_are_logged_are_no_difference() -> None:
    """What alone differs between unbroken runs is not compared, and that is said."""
    logged = {"loss/validate": [[3, 0.5], [7, 0.25]], "seconds": [[3, 1.0]]}
    expected = outcome(scalars=logged)
    found, again = (outcome(scalars={**logged, "seconds": [[3, value]]}) for value in (1.5, 2.5))
    made = dataclasses.replace(report(found, again), expected=expected)
    assert made.is_exact
    assert made.not_compared == ["seconds"]
    assert ("not compared", "seconds\n(unbroken runs differ in it, and in nothing else)") in list(
        made.rows()
    )


# Digests.


def test_digests_tell_batches_apart() -> None:
    """Values, order, type and shape all count; so do the bits of NaN and of zero."""
    x = torch.arange(6.0).reshape(2, 3)
    others = [
        x.flip(0), x.reshape(3, 2), x.int(), x.half(), x.bfloat16(), x.numpy(), [x],
        torch.where(x == 0, -0.0, x), torch.where(x == 0, torch.nan, x),
        x.bool(), x.to(torch.complex64), np.array(["a", None], dtype=object), "word", 1, 1.0, None,
    ]  # fmt: skip
    found = [dict(digests((each, {"y": x}))) for each in (x, *others)]
    assert len({json.dumps(each) for each in found}) == len(found)
    assert dict(digests((x.clone(), {"y": x.clone()}))) == found[0]
    assert list(found[0]) == ["[0]", "[1]['y']"]
    assert list(found[7]) == ["[0][0]", "[1]['y']"]


def test_digests_take_all_sorts_of_values() -> None:
    """Nested tensors, records, long lists and foreign objects have one, too."""
    nested = torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)

    @dataclasses.dataclass
    class Record:
        x: torch.Tensor

    x = torch.eye(3)
    values = [
        nested,
        x.to_sparse(),
        Record(torch.ones(2)),
        ["name"] * 50,
        object(),
        torch.empty(0),
        {},
    ]
    assert len(list(digests(values))) == 6
    assert dict(digests(values)) == dict(digests(values))
    assert dict(digests(Record(torch.ones(2)))) != dict(digests(Record(torch.zeros(2))))
