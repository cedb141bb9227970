"""The 70,000 digits of MNIST, downloaded from their public mirrors.

    python -m example_project.preprocess.mnist

Result: `data/processed/mnist/`, four gzipped files (11.6 MB). A download that was cut goes on where
it stopped. `train_config` of the demo runs it when `config["dataset"]` is `"mnist"`.

Source: LeCun, Cortes and Burges 1998, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from example_project.preprocess import processed_folder, run_as_script
from example_project.preprocess.idx import is_complete
from torch_lab.errors import UserError

__all__ = ["MD5", "MIRRORS", "prepare"]

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
TIMEOUT = 30.0  # Seconds without a byte.
CHUNK = 1 << 16


def prepare(
    folder: Path | None = None,
    mirrors: Sequence[str] = MIRRORS,
    checksums: Mapping[str, str] = MD5,
) -> Path:
    """Return the folder of MNIST, its missing files downloaded first.

    Args:
        folder: By default `data/processed/mnist` of the project.
        mirrors: Addresses of folders that have the files, tried in this order.
        checksums: MD5 of each file, by its name.

    Raises:
        UserError: No mirror gave a file whole; what arrived is kept for the next attempt.
    """
    folder = folder or processed_folder("mnist")
    if is_complete(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        for name, md5 in checksums.items():
            if not (folder / name).exists():
                _fetch(folder / name, mirrors, md5)
    return folder


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time download: two that append to one file would spoil it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _fetch(target: Path, mirrors: Sequence[str], md5: str) -> None:
    part = target.with_name(f"{target.name}.part")
    failures = []
    for mirror in mirrors:
        try:
            _download(f"{mirror}/{target.name}", part)
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{mirror} ({getattr(error, 'reason', None) or error})")
            continue  # What arrived stays: the next mirror, or the next attempt, goes on from it.
        if hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() == md5:
            part.replace(target)
            return
        part.unlink()
        failures.append(f"{mirror} (its file has another checksum)")
    raise UserError(
        f"{target.name} is not to be had from any mirror: {', '.join(failures)}",
        f"look at the network and start again, or put the file into {target.parent} yourself; "
        'config["dataset"] = "digits" needs no network',
    )


def _download(url: str, part: Path) -> None:
    """Bring `part` to the whole file at `url`, going on from what it has already."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # Nothing is left to fetch. Whether it is the right file, its checksum tells.
        raise
    with response:
        # A server that ignores Range sends all of it again, with status 200.
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        with part.open("ab" if resumed else "wb") as file:
            _copy(response, file, name=url.rpartition("/")[2])


def _copy(response: http.client.HTTPResponse, file: BinaryIO, name: str) -> None:
    """Append the response to `file`, with its progress on stderr."""
    total = file.tell() + (response.length or 0)
    live = sys.stderr.isatty()
    try:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            if live:
                _say(f"\r\x1b[2K{name}: {file.tell() / 1e6:.1f} of {total / 1e6:.1f} MB")
    finally:
        _say("\n" if live else f"{name}: {file.tell() / 1e6:.1f} of {total / 1e6:.1f} MB\n")
    if file.tell() < total:
        # `read(n)` gives a short answer, not an error, when the connection is cut.
        raise ConnectionError(f"cut after {file.tell():,} of {total:,} bytes")


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(run_as_script(prepare, sys.argv[1:]))
