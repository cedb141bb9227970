"""The file server: files by their path, uploaded as multipart forms."""

import re
from email.parser import HeaderParser
from email.utils import collapse_rfc2231_value
from urllib.parse import unquote, urlsplit

from clearml_server.faults import FaultKind
from clearml_server.listeners import Handler

__all__ = ["FilesHandler", "multipart_files"]


def multipart_files(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the parts of a multipart form that are files, by the names of their fields."""
    boundary = HeaderParser().parsestr(f"Content-Type: {content_type}").get_param("boundary")
    if not isinstance(boundary, str):
        return {}
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())
    return dict(_part(part) for part in parts[1:] if not part.startswith(b"--"))


def _part(part: bytes) -> tuple[str, bytes]:
    head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
    name = HeaderParser().parsestr(head.decode()).get_param("name", "", "content-disposition")
    return collapse_rfc2231_value(name).lstrip("/"), content


class FilesHandler(Handler):
    """Stores what is posted and gives it back."""

    def name_of_request(self, body: bytes) -> str:
        return next(iter(self._uploaded(body)), "") if self.command == "POST" else self._target()

    def _target(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _uploaded(self, body: bytes) -> dict[str, bytes]:
        return multipart_files(self.headers.get("Content-Type", ""), body)

    def send_fault(self, kind: FaultKind) -> None:
        if kind is FaultKind.UNAUTHORIZED:
            self.send(401, b"Unauthorized", "text/html; charset=utf-8")
        else:
            self.send(500, b"Internal Server Error", "text/html; charset=utf-8")

    def answer(self, body: bytes) -> None:
        methods = {
            "POST": self._upload,
            "GET": self._download,
            "HEAD": self._download,
            "DELETE": self._delete,
        }
        method = methods.get(self.command)
        if method is None or (self.command == "POST") != (self._target() == ""):
            self.send(405, b"Method Not Allowed", "text/html; charset=utf-8")
        else:
            method(body)

    def _upload(self, body: bytes) -> None:
        files = self._uploaded(body)
        with self.state.lock:
            self.state.files.update(files)
        self.send_json(200, list(files))

    def _download(self, _: bytes) -> None:
        content = self.state.files.get(self._target())
        if content is None:
            self.send(404, b"Not Found", "text/html; charset=utf-8")
            return
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted and any(wanted.groups()):
            self._send_range(content, *wanted.groups())
        else:
            headers = {"Accept-Ranges": "bytes"}
            self.send(200, content, "application/octet-stream", headers)

    def _send_range(self, content: bytes, first: str, last: str) -> None:
        size = len(content)
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last), size - 1) if first and last else size - 1
        if start > end:
            self.send(416, b"", headers={"Content-Range": f"bytes */{size}"})
            return
        headers = {"Content-Range": f"bytes {start}-{end}/{size}", "Accept-Ranges": "bytes"}
        self.send(206, content[start : end + 1], "application/octet-stream", headers)

    def _delete(self, _: bytes) -> None:
        with self.state.lock:
            known = self.state.files.pop(self._target(), None) is not None
        self.send(200 if known else 404, b"" if known else b"Not Found", "text/html; charset=utf-8")
