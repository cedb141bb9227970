"""Metrics on disk: readable at any moment, and cut back to what a checkpoint knows."""

from __future__ import annotations

import copy
import logging
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from torch_lab import event_files
from torch_lab.errors import CheckpointError
from torch_lab.recording import MetricsLogger, cut_back
from torch_lab.runs import Run


def new_run(artifacts: Path) -> Run:
    """Return a new run on disk."""
    run = Run.plan(artifacts, "00-h", experiment="00", script="h.py", hparams={}, seed=0)
    run.reserve()
    return run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = new_run(tmp_path)
    yield run
    run.discard()


def logged(logger: MetricsLogger, steps: range, name: str = "loss") -> MetricsLogger:
    """Log the number of each step."""
    for step in steps:
        logger.log_metrics({name: float(step)}, step)
    return logger


def steps_of(folder: Path, name: str = "loss") -> list[int]:
    """Return the steps that TensorBoard sees of a metric in all files of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if name not in events.Tags()["scalars"]:
        return []
    scalars = events.Scalars(name)
    assert all(scalar.value == scalar.step for scalar in scalars)
    return [scalar.step for scalar in scalars]


def files_of(run: Run) -> list[Path]:
    return sorted(run.metrics_folder.rglob("*tfevents*"))


def test_tensorboard_reads_what_is_logged(run: Run) -> None:
    """Numbers of any kind, NaN and infinities as they are, at the step that is meant."""
    logger = MetricsLogger(run)
    logger.first_step = 10
    values = {"a": torch.tensor(0.5), "b": 2, "nan": math.nan, "inf": -math.inf}
    logger.log_metrics(values, step=3)
    logger.log_metrics({}, step=4)
    logger.finalize("success")
    events = EventAccumulator(str(run.metrics_folder)).Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert {name: [each.step for each in at] for name, at in found.items()} == {
        name: [13] for name in values
    }
    assert (found["a"][0].value, found["b"][0].value) == (0.5, 2.0)
    assert math.isnan(found["nan"][0].value) and found["inf"][0].value == -math.inf
    assert abs(found["a"][0].wall_time - time.time()) < 60


def test_the_writer_is_tensorboards(run: Run) -> None:
    """Text, images, histograms and scalars in folders of their own can be written with it."""
    logger = MetricsLogger(run)
    logger.experiment.add_text("text", "words", 1)
    logger.experiment.add_image("image", torch.zeros(3, 4, 4), 1)
    logger.experiment.add_histogram("histogram", torch.arange(3.0), 1)
    logger.experiment.add_scalar("loss", 1.0, 1)
    for step in range(2):
        logger.experiment.add_scalars("several", {"a": step, "b/c": step}, step)
    logger.experiment.add_hparams({"lr": 0.1}, {"loss": 2.0}, run_name="hparams", global_step=2)
    marks = logger.mark()
    assert marks is not None and len(marks) == 4
    assert marks == {
        path.relative_to(run.metrics_folder).as_posix(): path.stat().st_size
        for path in files_of(run)
    }
    events = EventAccumulator(str(run.metrics_folder)).Reload()
    assert events.Tags()["images"] == ["image"] and events.Tags()["histograms"] == ["histogram"]
    assert events.Tags()["tensors"] == ["text/text_summary"]
    assert steps_of(run.metrics_folder) == [1]
    assert steps_of(run.metrics_folder / "several_b" / "c", "several") == [0, 1]
    assert steps_of(run.metrics_folder / "hparams") == [2]
    logger.close()


def test_events_are_written_while_they_come(run: Run) -> None:
    """At the latest with the first event after some seconds, without a flush."""
    logger = logged(MetricsLogger(run), range(1))
    assert not files_of(run)
    until = time.monotonic() + 30
    step = 0
    while not files_of(run) and time.monotonic() < until:
        time.sleep(0.05)
        step += 1
        logged(logger, range(step, step + 1))
    assert steps_of(run.metrics_folder) == list(range(step + 1))


@pytest.mark.slow
def test_a_killed_process_leaves_a_readable_file(tmp_path: Path) -> None:
    """What was logged before the last seconds is in it."""
    code = (
        "import itertools, sys, time\nfrom pathlib import Path\n"
        "from torch_lab.recording import MetricsLogger\nfrom torch_lab.runs import Run\n"
        "logger = MetricsLogger(Run.read(Path(sys.argv[1])))\n"
        "for step in itertools.count():\n"
        "    logger.log_metrics({'loss': float(step)}, step)\n"
        "    if step % 1000 == 0: print(step, flush=True)\n"
    )
    run = new_run(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code, run.folder], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        seen = 0
        while not files_of(run) or not files_of(run)[0].stat().st_size:
            seen = int(process.stdout.readline())
        process.kill()
        process.wait()
    steps = steps_of(run.metrics_folder)
    assert steps == list(range(len(steps))) and len(steps) > seen / 2
    run.discard()


def test_going_on_leaves_neither_gap_nor_overlap(run: Run) -> None:
    """Lines after the checkpoint go, files begun after it too, and the rest is appended to."""
    first = logged(MetricsLogger(run), range(5))
    first.experiment.add_scalars("kept", {"a": 0}, 0)
    marks = first.mark()
    assert marks is not None
    logged(first, range(5, 9)).experiment.add_scalars("late", {"a": 5}, 5)
    first.experiment.add_scalars("kept", {"a": 1}, 1)
    first.close()
    for _ in range(2):  # The second time, nothing of the first attempt is left.
        cut_back(run.metrics_folder, marks)
        second = logged(MetricsLogger(run), range(5, 7))
        again = second.mark()
        second.close()
        assert again is not None and again.keys() > marks.keys()
        assert steps_of(run.metrics_folder) == list(range(7))
    cut_back(run.metrics_folder, again)
    logged(MetricsLogger(run), range(7, 8)).close()
    assert steps_of(run.metrics_folder) == list(range(8))
    assert steps_of(run.metrics_folder / "kept_a", "kept") == [0]
    assert not list((run.metrics_folder / "late_a").iterdir())
    cut_back(run.metrics_folder, {})
    assert not files_of(run)


def test_a_mark_counts_only_event_files_of_the_run(run: Run) -> None:
    """Before anything is logged there are none, and other files stay when it is cut back."""
    logger = MetricsLogger(run)
    assert logger.mark() == {}
    cut_back(run.metrics_folder, {})
    run.metrics_folder.mkdir()
    (run.metrics_folder / "notes.txt").touch()
    outside = run.folder / "events.out.tfevents.1.host.1.0"
    outside.touch()
    (run.metrics_folder / outside.name).symlink_to(outside)
    assert logger.mark() == {}
    cut_back(run.metrics_folder, {})
    assert outside.exists() and (run.metrics_folder / "notes.txt").exists()


@pytest.mark.parametrize("harm", ["cut", "removed", "escaping"])
def test_files_that_do_not_fit_a_checkpoint_are_left_alone(run: Run, harm: str) -> None:
    """A file that is shorter, gone or elsewhere is named, before anything is changed."""
    logger = logged(MetricsLogger(run), range(3))
    marks = logger.mark()
    assert marks is not None
    logged(logger, range(3, 5)).close()
    (file,) = files_of(run)
    if harm == "cut":
        os.truncate(file, marks[file.name] - 1)
    elif harm == "removed":
        file.unlink()
    else:
        marks["../run.json"] = 0
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"run\.json" if harm == "escaping" else file.name):
        cut_back(run.metrics_folder, marks)
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Limit the size of files: the disk ends in the midst of a record, as a full one does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = sum(path.stat().st_size for path in folder.rglob("*tfevents*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_nothing(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, the file stays readable, and all is written when there is room again."""
    logger = logged(MetricsLogger(run), range(3))
    assert logger.mark() is not None
    with full_disk(run.metrics_folder):
        for step in range(3, 9):
            logged(logger, range(step, step + 1))
            assert logger.mark() is None
        logger.finalize("success")
        assert steps_of(run.metrics_folder) == [0, 1, 2]
    (told,) = caplog.records
    assert told.levelno == logging.ERROR and "File too large" in told.message
    assert logger.mark() is not None
    assert "are written now" in caplog.records[-1].message and len(caplog.records) == 2
    assert steps_of(run.metrics_folder) == list(range(9))
    for event_file in files_of(run):
        assert len(list(EventFileLoader(str(event_file)).Load())) == 10


def test_a_disk_that_is_full_from_the_start(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """A file without its first record would not be read."""
    logger = logged(MetricsLogger(run), range(3))
    with full_disk(run.metrics_folder):
        assert logger.mark() is None
    logged(logger, range(3, 4)).close()
    assert steps_of(run.metrics_folder) == [0, 1, 2, 3]


def test_what_cannot_be_written_at_the_end_is_said_to_be_lost(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what waits in memory is bounded: the newest stay."""
    monkeypatch.setattr(event_files, "_KEEP_BYTES", 2**20)
    logger = logged(MetricsLogger(run), range(2))
    with full_disk(run.metrics_folder):
        logger.finalize("success")
        for _ in range(5):
            logger.experiment.add_text("text", "x" * 250_000)
        logged(logger, range(2, 4))
        logger.close()
    assert "6 records of metrics are lost" in caplog.records[-1].message


def test_a_folder_that_is_gone_stops_nothing(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Without `metrics/` a new file begins; without its run, none is made again."""
    logger = logged(MetricsLogger(run), range(2))
    assert logger.mark()
    shutil.rmtree(run.metrics_folder)
    assert logged(logger, range(2, 4)).mark()
    assert steps_of(run.metrics_folder) == [2, 3]
    run.discard()
    assert logged(logger, range(4, 5)).mark() is None
    assert len(caplog.records) == 1
    logger.close()
    assert not run.folder.exists() and len(caplog.records) == 1


def test_an_interrupted_write_is_repeated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's exception in the midst of it leaves no record twice, and none in part."""
    logger = logged(MetricsLogger(run), range(2))
    assert logger.mark()
    logged(logger, range(2, 4))
    written, place = os.pwrite, []

    def interrupted(descriptor: int, data: memoryview, offset: int) -> int:
        place.append(written(descriptor, data[: len(data) - 7], offset))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logger.mark()
    assert place
    assert logger.mark()
    assert steps_of(run.metrics_folder) == [0, 1, 2, 3]


def _log_in_fork(logger: MetricsLogger, held: object) -> None:
    held.add_scalar("loss", 7.0, 7)  # type: ignore[attr-defined]
    held.flush()  # type: ignore[attr-defined]
    logged(logger, range(4, 6)).close()


def test_forks_and_copies_have_files_of_their_own(run: Run) -> None:
    """What a process has in memory is written by it alone."""
    logger = logged(MetricsLogger(run), range(4))
    fork = multiprocessing.get_context("fork").Process(
        target=_log_in_fork, args=(logger, logger.experiment)
    )
    fork.start()
    fork.join()
    assert fork.exitcode == 0
    assert steps_of(run.metrics_folder) == [4, 5]
    logged(pickle.loads(pickle.dumps(logger)), range(6, 7)).close()
    copy.deepcopy(logger).close()
    assert steps_of(run.metrics_folder) == [4, 5, 6]
    logger.close()
    assert len(files_of(run)) == 3
    assert sorted(steps_of(run.metrics_folder)) == [0, 1, 2, 3, 4, 5, 6]


def test_a_killed_fork_writes_nothing_of_its_parents(run: Run) -> None:
    """Nor does one that ends by itself, like a worker of a `DataLoader`."""
    logger = logged(MetricsLogger(run), range(2))
    loader = torch.utils.data.DataLoader(torch.arange(4), num_workers=1)
    assert len(list(loader)) == 4
    if not (child := os.fork()):
        os.kill(os.getpid(), signal.SIGTERM)
    os.waitpid(child, 0)
    assert not files_of(run)
    logger.close()
    assert steps_of(run.metrics_folder) == [0, 1]
