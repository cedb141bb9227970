"""A port on loopback that can be closed and opened again, and what requests have in common."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from clearml_server.faults import Fault, FaultKind, FaultSwitch
from clearml_server.state import Request, State

__all__ = ["Handler", "Listener"]


class _Server(ThreadingHTTPServer):
    """A server that remembers its connections, so that closing it closes them too."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type["Handler"]) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are what the tests are about."""

    def drop_connections(self) -> None:
        """Cut every open connection."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """One connection. Subclasses say what a request is about and answer it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    state: ClassVar[State]
    faults: ClassVar[FaultSwitch]

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def name_of_request(self, body: bytes) -> str:
        """Return the endpoint or the path that faults and the record of requests go by."""
        raise NotImplementedError

    def answer(self, body: bytes) -> None:
        """Answer the request."""
        raise NotImplementedError

    def send_fault(self, kind: FaultKind) -> None:
        """Answer with an error 500 or 401."""
        raise NotImplementedError

    def handle_request(self) -> None:
        """Read a request, note it, let the fault happen, answer."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = self.name_of_request(body)
        self.state.requests.append(Request(self.command, name, len(body), time.time()))
        fault = self.faults.wait(name)
        if fault is None:
            self.answer(body)
        elif fault in (FaultKind.ERROR500, FaultKind.UNAUTHORIZED):
            self.send_fault(fault)
        else:
            self.close_connection = True

    do_GET = do_POST = do_HEAD = do_DELETE = do_PUT = handle_request  # noqa: N815

    def send(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Send an answer; for HEAD, without its body."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def send_json(self, status: int, data: Any) -> None:
        """Send an answer that is JSON."""
        self.send(status, json.dumps(data).encode())


class Listener:
    """One port: open while no fault closes it."""

    def __init__(self, handler: type[Handler], state: State, port: int = 0) -> None:
        self._switch = FaultSwitch()
        self._handler = type(handler.__name__, (handler,), {"state": state, "faults": self._switch})
        self._server: _Server | None = None
        self.port = port
        self._open()

    @property
    def url(self) -> str:
        """The address, which stays the same when the port is closed and opened again."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def fault(self) -> Fault | None:
        return self._switch.current

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self._switch.set(fault)
        if fault is not None and fault.kind is FaultKind.REFUSE:
            self._close()
        elif self._server is None:
            self._open()

    def stop(self) -> None:
        """Close the port for good; requests that hang are let go."""
        self._switch.set(None)
        self._close()

    def _open(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), self._handler)
        self.port = self._server.server_address[1]
        serve = threading.Thread(
            target=self._server.serve_forever,
            args=(0.02,),
            name=f"clearml_server:{self.port}",
            daemon=True,
        )
        serve.start()

    def _close(self) -> None:
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        server.drop_connections()
