"""The API server: who asks, for which endpoint, and the answer in its envelope."""

import base64
import binascii
import copy
import gzip
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from clearml_server import accounts, events, models, projects, queues, tasks, transitions
from clearml_server.faults import FaultKind
from clearml_server.listeners import Handler
from clearml_server.protocol import ApiError, envelope, parse_json
from clearml_server.state import Json, State

__all__ = ["ENDPOINTS", "ApiHandler"]

Endpoint = Callable[[State, Json], Json]

ENDPOINTS: dict[str, Endpoint] = {
    **accounts.ENDPOINTS,
    **events.ENDPOINTS,
    **models.ENDPOINTS,
    **projects.ENDPOINTS,
    **queues.ENDPOINTS,
    **tasks.ENDPOINTS,
    **transitions.ENDPOINTS,
}
PUBLIC = {"debug.ping", "server.info", "login.supported_modes"}


class ApiHandler(Handler):
    """Answers the requests of the API."""

    def name_of_request(self, body: bytes) -> str:
        return self._split_path()[1]

    def send_fault(self, kind: FaultKind) -> None:
        if kind is FaultKind.UNAUTHORIZED:
            self._send_error(_unauthorized())
        else:
            self._send_error(ApiError(500, 0, "General server error (a test asked for it)"))

    def answer(self, body: bytes) -> None:
        version, name, query = self._split_path()
        try:
            endpoint = self._endpoint(name, version)
            if name not in PUBLIC:
                self._authorize()
            data = self._request_data(name, body)
            with self.state.lock:
                result = copy.deepcopy(endpoint(self.state, {**query, **data}))
        except ApiError as error:
            self._send_error(error)
        except KeyError as error:
            self._send_error(ApiError(400, 11, f"Missing required fields: {error}"))
        else:
            self.send_json(200, envelope(name, version, result))

    def _split_path(self) -> tuple[str | None, str, Json]:
        parts = urlsplit(self.path)
        found = re.fullmatch(r"/(?:v(\d+(?:\.\d+)?)/)?(.*)", parts.path)
        version, name = found.groups() if found else (None, parts.path)
        return version, name, dict(parse_qsl(parts.query))

    def _endpoint(self, name: str, version: str | None) -> Endpoint:
        endpoint = ENDPOINTS.get(name)
        if endpoint is None:
            self.state.unknown.append(name)
            raise ApiError(400, 0, f"Unable to find endpoint for name {name} and version {version}")
        return endpoint

    def _authorize(self) -> None:
        scheme, _, secret = self.headers.get("Authorization", "").partition(" ")
        if scheme == "Basic" and _basic(secret) != self.state.credentials:
            raise _unauthorized()
        if scheme == "Bearer" and secret not in self.state.tokens:
            raise ApiError(401, 20, "Unauthorized (invalid token)")
        if scheme not in ("Basic", "Bearer"):
            raise ApiError(401, 20, "Unauthorized (missing credentials)")

    def _request_data(self, name: str, body: bytes) -> Json:
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if name == "events.add_batch":
            return {"events": _batch(body)}
        data = parse_json(body) if body.strip() else {}
        if not isinstance(data, dict):
            raise ApiError(400, 12, "Validation error (the body must be a JSON object)")
        return data

    def _send_error(self, error: ApiError) -> None:
        version, name, _ = self._split_path()
        self.send_json(error.status, envelope(name, version, {}, error))


def _unauthorized() -> ApiError:
    message = "Unauthorized (invalid credentials) (failed to locate provided credentials)"
    return ApiError(401, 22, message)


def _basic(secret: str) -> tuple[str, str]:
    try:
        user, _, password = base64.b64decode(secret).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return user, password


def _batch(body: bytes) -> list[Any]:
    """Return the events of a batch: a JSON object, or a list of them, on each line."""
    found: list[Any] = []
    for line in body.splitlines():
        if line.strip():
            item = parse_json(line)
            found.extend(item if isinstance(item, list) else [item])
    return found
