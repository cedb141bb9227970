"""What every answer of the API server has in common: its envelope, its errors, ids and times."""

import base64
import hashlib
import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "COMPANY",
    "SERVER_API",
    "USER",
    "ApiError",
    "check_name",
    "envelope",
    "exact_time",
    "field_hash",
    "make_token",
    "new_id",
    "now",
    "parse_json",
    "stored_time",
]

COMPANY = "d1bd92a3b039400cbafc60a7a5b1e52b"
USER = "__tests__"
SERVER_API = "2.34"

# The version that the real server names as the one that answered; "1.0" where none stands here.
ACTUAL_VERSIONS = {
    "tasks.add_or_update_artifacts": "2.10",
    "tasks.add_or_update_model": "2.13",
    "tasks.completed": "2.2",
    "queues": "2.4",
}


@dataclass
class ApiError(Exception):
    """An answer that is an error: the HTTP status, the server's own code, the message."""

    status: int
    subcode: int
    message: str


def new_id() -> str:
    """Return an id as the server makes them: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


def exact_time(moment: datetime) -> str:
    """Return a time as answers to a change of status write it."""
    return moment.isoformat(timespec="microseconds")


def stored_time(moment: datetime) -> str:
    """Return a time as it is read back: the database keeps milliseconds."""
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000).isoformat(
        timespec="microseconds"
    )


def field_hash(name: str) -> str:
    """Return the key under which a metric's or a variant's values are kept."""
    return hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as the server does, to which NaN and infinity are no numbers.

    Raises:
        ApiError: If the text is no JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ApiError(400, 12, f"Validation error (failed parsing JSON: {error})") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def check_name(data: dict[str, Any]) -> None:
    """Refuse a name that is too short, where a request has one."""
    if "name" in data and len((data["name"] or "").strip()) < 3:
        raise ApiError(400, 12, "Validation error (name must have at least 3 characters)")


def envelope(
    endpoint: str, version: str | None, data: Any, error: ApiError | None = None
) -> dict[str, Any]:
    """Wrap an answer as the server does, errors included."""
    request_id = new_id()
    service = endpoint.partition(".")[0]
    actual = ACTUAL_VERSIONS.get(endpoint) or ACTUAL_VERSIONS.get(service) or "1.0"
    return {
        "meta": {
            "id": request_id,
            "trx": request_id,
            "endpoint": {
                "name": endpoint,
                "requested_version": version or SERVER_API,
                "actual_version": actual,
            },
            "result_code": error.status if error else 200,
            "result_subcode": error.subcode if error else 0,
            "result_msg": error.message if error else "OK",
            "error_stack": None,
            "error_data": {},
        },
        "data": {} if error else data,
    }


def make_token(access_key: str, lifetime: int = 30 * 24 * 3600) -> str:
    """Return a token that a client can decode; the server knows its own by heart."""
    issued = int(now().timestamp())
    claims = {
        "exp": issued + lifetime,
        "iat": issued,
        "auth_type": "Bearer",
        "identity": {"company": COMPANY, "user": USER, "role": "user", "key": access_key},
        "api_version": SERVER_API,
        "server_version": "2.3.0",
        "server_build": "test",
        "feature_set": "basic",
        "nonce": new_id(),
    }
    parts = [{"alg": "HS256", "typ": "JWT"}, claims]
    encoded = [_base64(json.dumps(part).encode()) for part in parts]
    return ".".join([*encoded, _base64(b"not verified by clients")])


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
