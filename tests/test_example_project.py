"""The worked example: its data, its parts, and that they learn."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import pickle
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import example_project
from example_project.callbacks import PrintAccuracy
from example_project.datasets import digit_images
from example_project.models import MLP, ConvNet
from example_project.preprocess import digits, mnist, processed_folder, run_as_script
from example_project.preprocess.idx import is_complete, read_idx, read_split, write_idx, write_split
from example_project.transforms import PredictedDigit, RandomAffine, Standardise
from torch_lab.errors import ExitCode, HparamsError, UserError
from torch_lab.modules import LabModule
from torch_lab.utils import import_script_as_module

DEMO = Path(example_project.__file__).parent / "experiments" / "00_mnist_demo"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def digits_folder(root: Path) -> Path:
    return digits.prepare(root / "data" / "processed" / "digits")


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5)])
def test_an_idx_file_holds_an_array(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """An array comes back from an IDX file as it was written, whatever its shape."""
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    write_idx(tmp_path / "file", array)
    np.testing.assert_array_equal(read_idx(tmp_path / "file"), array)


def test_a_gzipped_idx_file_is_read(tmp_path: Path) -> None:
    """MNIST's own header, byte for byte: two labels, 5 and 9."""
    content = bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 9])
    (tmp_path / "plain").write_bytes(content)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(content))
    assert read_idx(tmp_path / "plain").tolist() == [5, 9]
    assert read_idx(tmp_path / "packed.gz").tolist() == [5, 9]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("file", b"", id="empty"),
        pytest.param("file", bytes([0, 0, 8, 1, 0, 0, 0, 2, 5]), id="too short"),
        pytest.param("file", bytes([0, 0, 8, 3, 0, 0]), id="cut in its header"),
        pytest.param("file", bytes([0, 0, 13, 1, 0, 0, 0, 1, 5]), id="floats"),
        pytest.param("file", b"<html><body>not found</body></html>", id="a web page"),
        pytest.param("file.gz", b"not gzipped", id="not gzipped"),
        pytest.param("file.gz", gzip.compress(bytes(99))[:-9], id="cut gzip"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    """A file that is cut, or is none of the format, is a user's error that names it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
        read_idx(path)


def test_each_image_has_a_label(tmp_path: Path) -> None:
    """Labels that are not as many as the images are refused."""
    write_split(tmp_path, "train", np.zeros((3, 2, 2), np.uint8), np.zeros(2, np.uint8))
    with pytest.raises(UserError, match="3 train images, but 2 labels"):
        read_split(tmp_path, "train")


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    """The error says which file of a data set is missing."""
    with pytest.raises(UserError, match="has no t10k-images-idx3-ubyte"):
        read_split(tmp_path, "held_out")


def test_the_environment_says_where_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TORCH_LAB_ROOT decides before anything else."""
    monkeypatch.setenv("TORCH_LAB_ROOT", str(tmp_path))
    assert processed_folder("digits") == tmp_path / "data" / "processed" / "digits"


@pytest.mark.parametrize("marker", ["pyproject.toml", ".git"])
def test_the_project_says_where_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str
) -> None:
    """Data is below the nearest folder that is the root of a project."""
    (tmp_path / marker).mkdir()
    (tmp_path / "src" / "deep").mkdir(parents=True)
    monkeypatch.delenv("TORCH_LAB_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / "src" / "deep")
    assert processed_folder("digits") == tmp_path / "data" / "processed" / "digits"


def test_digits_have_the_form_of_mnist(digits_folder: Path) -> None:
    """1,797 images of 28x28 bytes, dark to bright, their labels with them, a fifth held out."""
    train, held_out = read_split(digits_folder, "train"), read_split(digits_folder, "held_out")
    assert (len(train[0]), len(held_out[0])) == (1438, 359)
    for images, labels in (train, held_out):
        assert images.shape[1:] == (28, 28)
        assert (images.min(), images.max()) == (0, 255)
        assert set(labels) == set(range(10))


def test_the_split_is_stratified(digits_folder: Path) -> None:
    """Each digit is held out as often as the others, but for rounding."""
    _, labels = read_split(digits_folder, "held_out")
    assert set(np.bincount(labels)) <= {35, 36, 37}


def test_the_last_images_are_held_out() -> None:
    """Of each digit, the last fifth is held out."""
    labels = np.array([0, 0, 1, 0, 1, 0, 1, 1, 0, 1], dtype=np.uint8)
    assert np.nonzero(digits.is_held_out(labels))[0].tolist() == [8, 9]


def test_digits_are_centred() -> None:
    """A blot in a corner comes to the middle, as far as the margin lets it, and stays whole."""
    blot = np.zeros((1, 8, 8))
    blot[0, 1:6, 3:8] = 16.0
    image = digits.like_mnist(blot)[0].astype(float)
    places = np.arange(28) - 13.5
    assert abs(image.sum(axis=1) @ places / image.sum()) <= 0.5
    assert abs(image.sum(axis=0) @ places / image.sum()) <= 0.5
    assert image.mean() * 28**2 / 20**2 == pytest.approx(blot.mean() * 255 / 16, rel=0.05)


def test_a_missing_file_is_made_again(tmp_path: Path) -> None:
    """A data set that lost a file is made again, to the same bytes."""
    folder = digits.prepare(tmp_path / "digits")
    lost = folder / "t10k-labels-idx1-ubyte"
    content = lost.read_bytes()
    lost.unlink()
    assert not is_complete(folder)
    digits.prepare(folder)
    assert lost.read_bytes() == content


def test_preparing_leaves_nothing_behind(tmp_path: Path) -> None:
    """The four files are there, and no temporary ones."""
    digits.prepare(tmp_path / "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert len(list((tmp_path / "digits").iterdir())) == 4


def test_a_complete_data_set_is_left_alone(digits_folder: Path) -> None:
    """Files that are there are not written again."""
    before = {path: path.stat().st_mtime_ns for path in digits_folder.iterdir()}
    digits.prepare(digits_folder)
    assert {path: path.stat().st_mtime_ns for path in digits_folder.iterdir()} == before


def test_missing_scikit_learn_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scikit-learn the error says what to install, and nothing is created."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="scikit-learn") as caught:
        digits.prepare(tmp_path / "digits")
    assert "torch-lab[example]" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


IMAGES = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
LABELS = np.arange(50, dtype=np.uint8) % 10


class Mirror:
    """A server on this machine that has small MNIST files, and a way to misbehave."""

    def __init__(self, files: dict[str, bytes], behaviour: str = "") -> None:
        self.files = files
        self.behaviour = behaviour
        self.requests: list[tuple[str, str | None, int]] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/mnist"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Send the file asked for, or misbehave."""
        name = request.path.rpartition("/")[2]
        asked = request.headers["Range"]
        content = self.files[name]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if self.behaviour == "ignores Range":
            start = 0
        status = 206 if start else 200
        if self.behaviour == "refuses":
            status, content = 503, b""
        elif start >= len(content):
            status, content = 416, b""
        self.requests.append((name, asked, status))
        request.send_response(status)
        request.send_header("Content-Length", str(len(content[start:])))
        request.end_headers()
        end = len(content) // 2 if self.behaviour == "cuts" else len(content)
        request.wfile.write(content[start:end])

    def close(self) -> None:
        """Answer no more."""
        self.server.shutdown()
        self.server.server_close()


class Mirrors:
    """Starts mirrors of the same files."""

    def __init__(self, folder: Path) -> None:
        write_split(folder, "train", IMAGES, LABELS)
        write_split(folder, "held_out", IMAGES[:20], LABELS[:20])
        self.files = {
            f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in sorted(folder.iterdir())
        }
        self.checksums = {
            name: hashlib.md5(content, usedforsecurity=False).hexdigest()
            for name, content in self.files.items()
        }
        self.started: list[Mirror] = []

    def start(self, behaviour: str = "", files: dict[str, bytes] | None = None) -> Mirror:
        """Return a new mirror, which runs until the test ends."""
        self.started.append(Mirror(files or self.files, behaviour))
        return self.started[-1]

    def prepare(self, folder: Path, *mirrors: Mirror) -> Path:
        """Download the small files from `mirrors` into `folder`."""
        return mnist.prepare(folder, [mirror.url for mirror in mirrors], self.checksums)


@pytest.fixture
def mirrors(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Mirrors]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirrors = Mirrors(tmp_path_factory.mktemp("mirrored"))
    yield mirrors
    for mirror in mirrors.started:
        mirror.close()


def test_mnist_arrives(tmp_path: Path, mirrors: Mirrors) -> None:
    """All files arrive, and are read as they are."""
    folder = mirrors.prepare(tmp_path / "mnist", mirrors.start())
    images, labels = read_split(folder, "train")
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert sorted(path.name for path in folder.iterdir()) == sorted(mirrors.files)


def test_only_missing_files_are_fetched(tmp_path: Path, mirrors: Mirrors) -> None:
    """Only what is missing is fetched, and nothing when nothing is."""
    mirror = mirrors.start()
    folder = mirrors.prepare(tmp_path, mirror)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    mirror.requests.clear()
    mirrors.prepare(tmp_path, mirror)
    mirrors.prepare(tmp_path, mirror)
    assert [name for name, _, _ in mirror.requests] == ["t10k-labels-idx1-ubyte.gz"]


def test_a_cut_download_goes_on(tmp_path: Path, mirrors: Mirrors) -> None:
    """A download that was cut goes on where it stopped."""
    with pytest.raises(UserError, match="cut after"):
        mirrors.prepare(tmp_path, mirrors.start("cuts"))
    assert not is_complete(tmp_path)
    mirror = mirrors.start()
    mirrors.prepare(tmp_path, mirror)
    name, asked, status = mirror.requests[0]
    half = len(mirrors.files[name]) // 2
    assert (asked, status) == (f"bytes={half}-", 206)
    np.testing.assert_array_equal(read_split(tmp_path, "train")[0], IMAGES)


def test_the_next_mirror_goes_on(tmp_path: Path, mirrors: Mirrors) -> None:
    """A mirror goes on from what the one before it gave."""
    second = mirrors.start()
    mirrors.prepare(tmp_path, mirrors.start("cuts"), second)
    assert [status for _, _, status in second.requests] == [206] * 4
    assert is_complete(tmp_path)


def test_a_mirror_may_ignore_the_range(tmp_path: Path, mirrors: Mirrors) -> None:
    """A mirror that sends all of a file again is read from the start."""
    mirror = mirrors.start("ignores Range")
    mirrors.prepare(tmp_path, mirrors.start("cuts"), mirror)
    assert all(asked and status == 200 for _, asked, status in mirror.requests)
    np.testing.assert_array_equal(read_split(tmp_path, "train")[0], IMAGES)


def test_a_whole_part_is_taken_as_it_is(tmp_path: Path, mirrors: Mirrors) -> None:
    """A part that lacks nothing, because the process ended before its check, is taken as it is."""
    name = "train-images-idx3-ubyte.gz"
    (tmp_path / f"{name}.part").write_bytes(mirrors.files[name])
    mirror = mirrors.start()
    mirrors.prepare(tmp_path, mirror)
    assert [status for file, _, status in mirror.requests if file == name] == [416]
    assert is_complete(tmp_path)


def test_a_spoilt_file_is_fetched_elsewhere(tmp_path: Path, mirrors: Mirrors) -> None:
    """A file with another checksum is fetched from the next mirror, from its start."""
    spoilt = mirrors.start(files=dict.fromkeys(mirrors.files, b"spoilt" * 99))
    mirrors.prepare(tmp_path, spoilt, mirrors.start())
    np.testing.assert_array_equal(read_split(tmp_path, "held_out")[1], LABELS[:20])


def test_a_spoilt_file_is_never_kept(tmp_path: Path, mirrors: Mirrors) -> None:
    """Nothing stays of a file with another checksum."""
    spoilt = mirrors.start(files=dict.fromkeys(mirrors.files, b"spoilt" * 99))
    with pytest.raises(UserError, match="another checksum"):
        mirrors.prepare(tmp_path, spoilt)
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_refuses_is_passed_over(tmp_path: Path, mirrors: Mirrors) -> None:
    """The next mirror serves when one refuses."""
    mirrors.prepare(tmp_path, mirrors.start("refuses"), mirrors.start())
    assert is_complete(tmp_path)


def test_a_missing_network_is_explained(tmp_path: Path, mirrors: Mirrors) -> None:
    """When no mirror answers, one line says of each why, and the command exits with 2."""
    refusing, gone = mirrors.start("refuses"), mirrors.start()
    gone.close()
    mirrors.started.remove(gone)
    with pytest.raises(UserError) as caught:
        mirrors.prepare(tmp_path, refusing, gone)
    assert "\n" not in caught.value.message
    assert f"{refusing.url} (Service Unavailable)" in caught.value.message
    assert gone.url in caught.value.message
    assert caught.value.exit_code is ExitCode.USAGE


def test_downloads_at_the_same_time_share_files(tmp_path: Path, mirrors: Mirrors) -> None:
    """Of several downloads into one folder one fetches, and the others find its files."""
    mirror = mirrors.start()
    threads = [threading.Thread(target=mirrors.prepare, args=(tmp_path, mirror)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for name, _, _ in mirror.requests) == sorted(mirrors.files)


def test_progress_is_plain_without_a_terminal(
    tmp_path: Path, mirrors: Mirrors, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal there is one line for each file, without control characters."""
    mirrors.prepare(tmp_path, mirrors.start())
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(mirrors.checksums)
    assert all(line.isprintable() for line in lines)


def test_a_script_prints_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """A preprocess script prints where its data is."""
    assert run_as_script(lambda: Path("here")) == 0
    assert capsys.readouterr().out == "here\n"


def test_a_script_explains_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A preprocess script that fails says why on stderr, and nothing on stdout."""

    def prepare() -> Path:
        raise UserError("no network", "plug it in")

    assert run_as_script(prepare) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: no network\n  plug it in\n")


def test_a_batch_has_images_and_labels(digits_folder: Path) -> None:
    """A plain DataLoader gives batches of transformed images, with their labels."""
    dataset = digit_images(digits_folder, "held_out", transform=Standardise())
    x, md = next(iter(DataLoader(dataset, batch_size=16)))
    assert x.shape == (16, 1, 28, 28)
    assert md["y"].tolist() == read_split(digits_folder, "held_out")[1][:16].tolist()
    assert md["y"].dtype == torch.int64


def test_the_dataset_reaches_spawned_workers(digits_folder: Path) -> None:
    """The dataset can be pickled, its transforms included."""
    dataset = digit_images(digits_folder, "train", Standardise(), RandomAffine())
    assert len(pickle.loads(pickle.dumps(dataset))) == 1438


def test_standardised_images_are_standard(digits_folder: Path) -> None:
    """Of the training images, the mean is about 0 and the deviation about 1."""
    images, _ = read_split(digits_folder, "train")
    x, _ = Standardise()(torch.from_numpy(images), {})
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.05


def test_no_movement_changes_nothing() -> None:
    """With all ranges at 0, images stay as they are."""
    images = torch.from_numpy(IMAGES)
    moved, _ = RandomAffine(degrees=0, scale=0, pixels=0)(images, {})
    torch.testing.assert_close(moved, images.float(), atol=1e-2, rtol=0)


def test_each_image_moves_in_its_own_way() -> None:
    """The images of a batch move independently."""
    same = torch.from_numpy(IMAGES[:1]).repeat(8, 1, 1)
    moved, _ = RandomAffine()(same, {})
    assert moved.shape == same.shape
    assert len(torch.unique(moved, dim=0)) == 8


def test_shifts_keep_to_their_range() -> None:
    """A bright dot in the middle stays within the pixels asked for, and uses them."""
    dots = torch.zeros(200, 29, 29)
    dots[:, 14, 14] = 1
    moved, _ = RandomAffine(degrees=0, scale=0, pixels=3)(dots, {})
    rows, columns = moved.sum(dim=(0, 2)).nonzero().flatten(), moved.sum(dim=(0, 1)).nonzero()
    assert (rows.min(), rows.max()) == (11, 17)
    assert (columns.min(), columns.max()) == (11, 17)


def test_augmentation_follows_the_seed() -> None:
    """The same seed moves images in the same way, another in another."""
    images = torch.from_numpy(IMAGES)
    batches = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        batches.append(RandomAffine()(images, {})[0])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


@pytest.mark.parametrize("model", [ConvNet, MLP])
def test_a_model_learns_a_batch_by_heart(digits_folder: Path, model: type[nn.Module]) -> None:
    """Each network can learn forty images by heart."""
    torch.manual_seed(0)
    dataset = digit_images(digits_folder, "train", transform=Standardise())
    x, md = next(iter(DataLoader(dataset, batch_size=40)))
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(x), md["y"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network.eval()(x).argmax(dim=1) == md["y"]).all()


def quiet_trainer(**how: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **how,
    )


class ReadsLabels(nn.Module):
    """Scores that speak for the digit that the first pixel says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of the digits, 1 for the one that is read."""
        return nn.functional.one_hot(x[:, 0, 0, 0].round().long(), 10).float()


def test_accuracy_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After prediction, the number of right predictions is on stdout."""
    images = np.zeros((20, 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(20) % 10
    labels = images[:, 0, 0].copy()
    labels[[3, 11, 19]] = 4  # three that the network gets wrong
    write_split(tmp_path, "held_out", images, labels)
    dataset = digit_images(tmp_path, "held_out", transform=Standardise(mean=0, std=1 / 255))
    module = LabModule(ReadsLabels(), transform=PredictedDigit())
    trainer = quiet_trainer(callbacks=[PrintAccuracy()])
    trainer.predict(module, DataLoader(dataset, batch_size=8), return_predictions=False)
    assert "accuracy 0.8500 (17 of 20)" in capsys.readouterr().out.splitlines()


@pytest.fixture
def config_script(monkeypatch: pytest.MonkeyPatch, root: Path, digits_folder: Path) -> ModuleType:
    monkeypatch.setenv("TORCH_LAB_ROOT", str(root))
    return import_script_as_module(DEMO / "__main__.py")


@pytest.mark.parametrize("key", ["dataset", "model"])
def test_a_wrong_choice_names_the_right_ones(config_script: ModuleType, key: str) -> None:
    """A data set or a model that is none of the demo's is a user's error that names them."""
    hparams = import_script_as_module(DEMO / "hparams.py").hparams
    right, hparams["config"][key] = hparams["config"][key], "nonesuch"
    with pytest.raises(HparamsError, match=f"config.{key} is 'nonesuch'; it must be '{right}' or"):
        config_script.train_config(hparams)


@pytest.mark.parametrize("path", sorted(DEMO.glob("hparams*.py")), ids=lambda path: path.stem)
def test_every_hparams_script_serves(config_script: ModuleType, path: Path) -> None:
    """The config script makes something that trains of each hparams script of the demo."""
    components = config_script.train_config(import_script_as_module(path).hparams)
    module = components.pop("module")
    before = [parameter.detach().clone() for parameter in module.model.parameters()]
    quiet_trainer(max_steps=2, limit_val_batches=1).fit(module, **components)
    pairs = zip(before, module.model.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)


def test_the_learning_rate_rises_and_falls(config_script: ModuleType) -> None:
    """It is highest after a tenth of the steps, never 0 while training, and almost 0 at the end."""
    factors = [config_script.warm_cosine_factor(step, n_steps=100) for step in range(100)]
    assert max(factors) == factors[10] == 1
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01


def test_the_learning_rate_finds_its_place_in_a_longer_run(config_script: ModuleType) -> None:
    """A schedule that goes on to more steps has the rates that the longer run would have had."""
    parameter = nn.Parameter(torch.zeros(1))

    def rates(n_steps: int, until: int, state: dict[str, Any] | None = None) -> Any:
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = config_script.warm_cosine(optimizer, n_steps)["scheduler"]
        if state:
            schedule.load_state_dict(state)
        seen = []
        while schedule.last_epoch < until:
            optimizer.step()
            schedule.step()
            seen.append(schedule.get_last_lr()[0])
        return seen, schedule.state_dict()

    _, state = rates(20, until=20)
    continued, _ = rates(30, until=30, state=state)
    whole, _ = rates(30, until=30)
    assert continued == whole[20:]
