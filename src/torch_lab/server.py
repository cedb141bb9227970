"""A ClearML server, spoken to over HTTP: every answer within a time limit, every refusal in words.

The SDK waits for a server that is away for ever, and takes over a millisecond for each scalar. What
mirrors a run is therefore sent from here, with the calls that the SDK makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import urlsplit

import requests

from torch_lab.errors import ServerError, UnreachableError
from torch_lab.files import beside, publish, sha256_of

__all__ = ["Address", "Server", "file_url"]

_VERSION: Final = "v2.23"
_PAGE: Final = 500
_CHUNK: Final = 2**20
_JSON_LINES: Final = "application/json-lines"
_AS_JSON: Final = json.JSONEncoder(allow_nan=False).encode
"""As `json.dumps`, which makes an encoder each time."""
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")
_STATUSES_OF_TOKENS: Final = (401, 403)


@dataclass(frozen=True)
class Address:
    """Where a ClearML server is, and who asks it."""

    api: str
    files: str
    web: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    token: str = field(default="", repr=False)
    """Used instead of the keys, as on a machine of the server's own."""


class Server:
    """A ClearML server; not for several threads at once.

    Args:
        address: Where it is.
        limit_s: How long to wait for an answer, in seconds.
    """

    def __init__(self, address: Address, limit_s: float = 5.0) -> None:
        self.address = address
        self.limit_s = limit_s
        self._form: _Form | None = None
        self._session = requests.Session()
        self._token = address.token

    def log_in(self) -> None:
        """Get a token from the server.

        Raises:
            UnreachableError: It does not answer.
            ServerError: It does not know the keys.
        """
        if self.address.token:
            self._token = self.address.token
            self.call("users.get_current_user")
            return
        keys = (self.address.access_key, self.address.secret_key)
        answer = self._request("POST", f"{self.address.api}/auth.login", auth=keys)
        self._token = self._data(answer, "auth.login")["token"]

    def call(self, endpoint: str, **arguments: Any) -> dict[str, Any]:
        """Return what the server answers.

        Args:
            endpoint: Such as `tasks.get_all`.
            arguments: What it gets.

        Raises:
            UnreachableError: It does not answer, or cannot now.
            ServerError: It refuses.
        """
        return self._asked(endpoint, json.dumps(arguments), "application/json")

    def add_events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Send events; those of scalars and plots that it has already are replaced.

        Raises:
            UnreachableError: It does not answer, or cannot now.
            ServerError: It refuses, or has not taken all.
        """
        if not events:
            return
        told = self._asked("events.add_batch", "\n".join(map(_AS_JSON, events)), _JSON_LINES)
        if told.get("errors"):
            raise ServerError(f"ClearML refused {told['errors']} events: {told.get('errors_info')}")

    def every(self, endpoint: str, key: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Yield all items that an endpoint would tell page by page, under `key` in its answer."""
        for page in range(10_000):
            found = self.call(endpoint, page=page, page_size=_PAGE, **arguments).get(key, [])
            yield from found
            if len(found) < _PAGE:
                return

    def project(self, name: str, *, create: bool = True) -> str | None:
        """Return the id of the project `name`, made if it is not there and shall be."""
        pattern = f"^{re.escape(name)}$"
        for each in self.every("projects.get_all", "projects", name=pattern, search_hidden=True):
            return str(each["id"])
        if not create:
            return None
        try:
            return str(self.call("projects.create", name=name, description="")["id"])
        except ServerError:
            # Another machine may have made it in this moment.
            if found := self.project(name, create=False):
                return found
            raise

    def task(self, task: str) -> dict[str, Any]:
        """Return all that the server tells of the task of an id; errors are those of `call`."""
        told: dict[str, Any] = self.call("tasks.get_by_id", task=task)["task"]
        return told

    def has_task(self, task: str) -> bool:
        """Return whether there is a task of that id."""
        return any(self.every("tasks.get_all", "tasks", id=[task], only_fields=["id"]))

    def add_artifact(
        self, task: str, key: str, url: str, size: int, sha256: str, **other: str
    ) -> None:
        """Tell a task of a file that belongs to it.

        Args:
            task: The task's id.
            key: The name of the artifact, which takes the place of another of that name.
            url: Where the file is.
            size: How many bytes it has.
            sha256: Of its bytes.
            other: `type` (custom) and `mode` (output), if they are others.
        """
        artifact = {
            "key": key,
            "type": "custom",
            "mode": "output",
            "uri": url,
            "content_size": size,
            "hash": sha256,
            "timestamp": int(time.time()),
            **other,
        }
        self.call("tasks.add_or_update_artifacts", task=task, artifacts=[artifact], force=True)

    # Files.

    def upload(self, file: BinaryIO, size: int, url: str) -> str:
        """Send a file to the file server, and return the sha256 of what was sent.

        Args:
            file: Read from where it stands.
            size: How many bytes there are.
            url: Where it goes, below the file server's.

        Raises:
            UnreachableError: The file server does not answer.
            ServerError: It refuses, or has another number of bytes afterwards.
        """
        parts = urlsplit(url)
        form = self._form = _Form(parts.path.lstrip("/"), file, size)
        headers = {"Content-Type": form.content_type, "Content-Length": str(form.length)}
        target = f"{parts.scheme}://{parts.netloc}/"
        try:
            answer = self._request("POST", target, data=form, headers=headers | self._bearer())
        finally:
            self._form = None
        if not answer.ok:
            raise _refusal(answer, f"the upload of {parts.path}")
        stored = self._request("HEAD", url, headers=self._bearer())
        length = stored.headers.get("Content-Length")
        if not stored.ok or (length is not None and int(length) != size):
            raise ServerError(f"{url} has {length} bytes after an upload of {size}")
        return form.sha256.hexdigest()

    @property
    def in_flight(self) -> int:
        """How many bytes were sent of the file that another thread is uploading."""
        form = self._form
        return form.sent if form else 0

    def read(self, url: str, start: int = 0) -> Iterator[bytes]:
        """Yield the content of a file on the file server, from the byte `start` on.

        Raises:
            UnreachableError: The file server does not answer.
            ServerError: It has no such file.
        """
        headers = self._bearer() | ({"Range": f"bytes={start}-"} if start else {})
        answer = self._request("GET", url, headers=headers, stream=True)
        if not answer.ok:
            raise _refusal(answer, url)
        if start and answer.status_code != requests.codes.partial_content:
            raise ServerError(f"{url} cannot be read from its middle", code=answer.status_code)
        try:
            yield from answer.iter_content(_CHUNK)
        except requests.RequestException as error:
            raise _no_answer(url, error) from error

    def sha256(self, url: str) -> str:
        """Return the sha256 of a file on the file server; errors are those of `read`."""
        digest = hashlib.sha256()
        for chunk in self.read(url):
            digest.update(chunk)
        return digest.hexdigest()

    def download(self, url: str, path: Path) -> str:
        """Read a file into `path`, going on with what an earlier download has left.

        Returns:
            Its sha256.

        Raises:
            UnreachableError: The file server does not answer; what has come stays.
            ServerError: It has no such file.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(path, "part")
        with partial.open("ab") as file:
            start = file.tell()
            try:
                for chunk in self.read(url, start):
                    file.write(chunk)
            except UnreachableError:
                raise
            except ServerError:
                # All of it may be there already, or the server cannot begin in the middle.
                file.truncate(0)
                for chunk in self.read(url):
                    file.write(chunk)
        digest = sha256_of(partial)
        publish(partial, path)
        return digest

    def remove(self, url: str) -> None:
        """Remove a file from the file server, if it is there."""
        with contextlib.suppress(ServerError):
            self._request("DELETE", url, headers=self._bearer())

    # Requests.

    def _asked(self, endpoint: str, body: str, kind: str) -> dict[str, Any]:
        answer = self._posted(endpoint, body, kind)
        if answer.status_code in _STATUSES_OF_TOKENS and not self.address.token:
            # Tokens grow old.
            self.log_in()
            answer = self._posted(endpoint, body, kind)
        return self._data(answer, endpoint)

    def _posted(self, endpoint: str, body: str, kind: str) -> requests.Response:
        url = f"{self.address.api}/{_VERSION}/{endpoint}"
        headers = self._bearer() | {"Content-Type": kind}
        return self._request("POST", url, data=body.encode(), headers=headers)

    def _bearer(self) -> dict[str, str]:
        if not self._token and self.address.access_key:
            self.log_in()
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _request(self, method: str, url: str, **options: Any) -> requests.Response:
        try:
            return self._session.request(method, url, timeout=self.limit_s, **options)
        except (requests.RequestException, OSError) as error:
            raise _no_answer(url, error) from error

    def _data(self, answer: requests.Response, endpoint: str) -> dict[str, Any]:
        if not answer.ok:
            raise _refusal(answer, endpoint)
        try:
            found = answer.json()["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.address.api} is no ClearML server: {endpoint}") from error
        return found if isinstance(found, dict) else {}


def _host(url: str) -> str:
    """Return the host and port in an address, without the credentials that may stand there."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _no_answer(url: str, error: Exception) -> UnreachableError:
    where = _host(url)
    if isinstance(error, requests.Timeout):
        return UnreachableError(f"{where} does not answer")
    if isinstance(error, requests.exceptions.SSLError):
        return UnreachableError(f"{where} has a certificate that is not trusted")
    if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema)):
        return UnreachableError(f"{_host(url) or url} is no address of a server")
    return UnreachableError(f"{where} cannot be reached")


def _refusal(answer: requests.Response, what: str) -> ServerError:
    where, code = _host(answer.url), answer.status_code
    try:
        message = answer.json()["meta"]["result_msg"]
    except (ValueError, KeyError, TypeError):
        message = answer.reason or "no reason given"
    if code in _STATUSES_OF_TOKENS:
        return ServerError(f"{where} does not accept the credentials ({message})", code=code)
    kind = UnreachableError if code >= 500 or code == 429 else ServerError
    return kind(f"{where} refuses {what} ({code}): {message}", code=code)


class _Form:
    """A form with one file, made while it is sent: a checkpoint need not fit into memory twice."""

    def __init__(self, name: str, file: BinaryIO, size: int) -> None:
        boundary = os.urandom(16).hex()
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self._head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"'
            "\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode()
        self._tail = f"\r\n--{boundary}--\r\n".encode()
        self._file = file
        self._size = size
        self.length = len(self._head) + size + len(self._tail)
        self.sha256 = hashlib.sha256()
        self.sent = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        while chunk := self._file.read(min(_CHUNK, self._size - self.sent)):
            self.sha256.update(chunk)
            self.sent += len(chunk)
            yield chunk
        yield self._tail


def file_url(files: str, *parts: str) -> str:
    """Return the address of a file on the file server `files`, in characters that need no quoting.

    Args:
        files: The address of the file server.
        parts: Folders and names; a slash in them parts folders, and none leads upwards.
    """
    steps = (step for part in parts for step in part.split("/"))
    plain = (_UNSAFE.sub("_", step) for step in steps if step not in ("", ".", ".."))
    return "/".join([files.rstrip("/"), *plain])
