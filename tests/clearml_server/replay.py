"""Replays recorded exchanges of the SDK with a real server, and says where answers differ.

The recordings are of clearml 2.1.12 and a ClearML server 2.3.0, one file a scenario, in the order
of their names: later ones read what earlier ones made. Long texts in them are shortened.
"""

import base64
import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clearml_server.server import ClearMLServer

__all__ = ["NOT_COMPARED", "RECORDINGS", "Replay"]

RECORDINGS = sorted((Path(__file__).parent / "recorded").glob("*.jsonl"))

# What is not compared by its value, and why. Everything else is, types included.
NOT_COMPARED = {
    "meta.id, meta.trx": "a random id of each request; left out of the recordings",
    "token": "made by each login",
    "id and other ids": "random; compared after mapping recorded ids to those given here",
    "times": "of the recording; only that both are times in the same format is compared",
    "active_duration": "how long the recorded task ran; only that both are whole numbers",
}
ID = re.compile(r"[0-9a-f]{32}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")


class Replay:
    """Sends what was recorded to a server, and collects what it answers otherwise."""

    def __init__(self, server: ClearMLServer) -> None:
        self._server = server
        self._ids: dict[str, str] = {}
        self._connection = http.client.HTTPConnection(urlsplit(server.api_url).netloc, timeout=10)

    def run(self, recording: Path) -> list[str]:
        """Replay a recording and return the differences, one a line."""
        found = []
        for number, line in enumerate(recording.read_text(encoding="utf-8").splitlines(), 1):
            exchange = json.loads(line)
            endpoint = exchange["path"].rpartition("/")[2]
            differences = self._replay(exchange)
            found += [f"{recording.name}:{number} {endpoint} {text}" for text in differences]
        return found

    def close(self) -> None:
        self._connection.close()

    def _replay(self, exchange: dict[str, Any]) -> list[str]:
        status, answer = self._send(exchange)
        meta = {name: answer["meta"][name] for name in exchange["meta"]}
        self._learn(exchange["data"], answer["data"])
        recorded = {name: exchange[name] for name in ("status", "meta", "data")}
        return list(
            self._compare(recorded, {"status": status, "meta": meta, "data": answer["data"]})
        )

    def _send(self, exchange: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        request = exchange["request"]
        lines = request if isinstance(request, list) else [] if request is None else [request]
        body = self._mapped("\n".join(json.dumps(line) for line in lines))
        secret = "wrong" if exchange["status"] == 401 else self._server.secret_key
        login = base64.b64encode(f"{self._server.access_key}:{secret}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        self._connection.request(exchange["method"], exchange["path"], body, headers)
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())

    def _mapped(self, text: str) -> str:
        return ID.sub(lambda found: self._ids.get(found[0], found[0]), text)

    def _learn(self, recorded: Any, answered: Any) -> None:
        """Note which id stands here for a recorded one, where both answers have one."""
        if isinstance(recorded, dict) and isinstance(answered, dict):
            for name in recorded.keys() & answered.keys():
                self._learn(recorded[name], answered[name])
        elif isinstance(recorded, list) and isinstance(answered, list):
            for ours, theirs in zip(recorded, answered, strict=False):
                self._learn(ours, theirs)
        elif all(isinstance(x, str) and ID.fullmatch(x) for x in (recorded, answered)):
            self._ids.setdefault(recorded, answered)

    def _compare(self, recorded: Any, answered: Any, where: str = "") -> Iterator[str]:
        if isinstance(recorded, dict) and isinstance(answered, dict):
            for key in sorted(recorded.keys() | answered.keys()):
                place = f"{where}.{key}".lstrip(".")
                if key not in recorded or key not in answered:
                    yield f"{place}: only in {'the recording' if key in recorded else 'the answer'}"
                else:
                    yield from self._compare(recorded[key], answered[key], place)
        elif isinstance(recorded, list) and isinstance(answered, list):
            if len(recorded) != len(answered):
                yield f"{where}: {len(recorded)} items recorded, {len(answered)} answered"
            for index, pair in enumerate(zip(recorded, answered, strict=False)):
                yield from self._compare(*pair, f"{where}[{index}]")
        elif not self._same(recorded, answered, where.rpartition(".")[2]):
            yield f"{where}: recorded {recorded!r}, answered {answered!r}"

    def _same(self, recorded: Any, answered: Any, name: str) -> bool:
        if type(recorded) is not type(answered) or name in ("token", "active_duration"):
            return type(recorded) is type(answered)
        if not isinstance(recorded, str):
            return bool(recorded == answered)
        if TIME.fullmatch(recorded):
            return TIME.fullmatch(answered) is not None
        return self._mapped(recorded) == str(answered)
