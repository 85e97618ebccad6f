"""A Hub on the loopback interface, to push to and pull from with the real `huggingface_hub` client.

    hub = Hub()
    hub.add_account("hf_token", "user")
    with running(hub):
        subprocess.run([...], env=client_environment(hub.url, home, "hf_token"))

It knows models, branches, tags, pull requests, LFS in one part, private, gated and disabled repositories; not Xet.
Paths for faults and in the log: `/api/…`, `/<id>.git/info/lfs/…`, `/storage/<sha256>` (LFS uploads),
`/<id>/resolve/<revision>/<file>` and, on another origin as a CDN is, `/cdn/<sha256>` (LFS downloads).
"""

import contextlib
import functools
import os
import re
import secrets
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

from hub_api import Answer, answer, refusal
from hub_store import Store

PIECE = 1 << 16


def client_environment(url: str, home: Path, token: str | None = None) -> dict[str, str]:
    """The environment of a process whose client knows the Hub at `url`, and of all else only what is in `home`.

    The client reads it when it is imported: it is of no use to a process that has done so.
    """
    left = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    switches = dict.fromkeys(("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS"), "1")
    settings = {f"HF_HUB_{name}": value for name, value in switches.items()}
    settings |= {"HF_ENDPOINT": url, "HF_HOME": str(home)} | ({"HF_TOKEN": token} if token is not None else {})
    return left | settings


@dataclass
class Record:
    """A request, and what became of it; `status` is 0 as long as it has not been answered."""

    method: str
    path: str
    range: str | None
    had_token: bool
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What happens to requests of a kind, `times` times (`None`: always); `struck` counts."""

    method: str | None
    path: str
    times: int | None
    status: int | None
    headers: Mapping[str, str]
    code: str | None
    message: str
    at: Literal["arrival", "answer", "cut"]
    call: Callable[[], object] | None
    sleep: float
    cut: int | None
    how: Literal["fin", "rst"]
    flip: bool
    struck: int = 0


class Hub(Store):
    """The Hub's state, its log and its faults.

    Attributes:
        log: all requests, in the order of their arrival.
        errors: the server's own, which `running` raises at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Record] = []
        self.faults: list[Fault] = []
        self.errors: list[BaseException] = []

    def fault(
        self,
        *,
        method: str | None = None,
        path: str = "",
        times: int | None = 1,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
        message: str = "injected",
        at: Literal["arrival", "answer", "cut"] = "arrival",
        call: Callable[[], object] | None = None,
        sleep: float = 0,
        cut: int | None = None,
        how: Literal["fin", "rst"] = "fin",
        flip: bool = False,
    ) -> Fault:
        """Disturb the requests with this method (`None`: any) whose path has the regular expression `path` in it.

        With `status` the request is not carried out. With `cut` the connection ends after that many bytes of the body;
        `flip` turns over a bit in the middle of it. `call` is called, then `sleep` seconds pass: on the request's
        "arrival", when all is done but the "answer", or at the "cut". A `call` that raises a ConnectionError hangs up.
        """
        fault = Fault(method, path, times, status, headers or {}, code, message, at, call, sleep, cut, how, flip)
        self.faults.append(fault)
        return fault

    def strike(self, record: Record) -> Fault | None:
        """The first fault that is due for a request."""
        with self.lock:
            for fault in self.faults:
                if fault.method in (None, record.method) and re.search(fault.path, record.path):
                    if fault.times is None or fault.struck < fault.times:
                        fault.struck += 1
                        return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """Reads requests, lets faults happen, sends answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: Hub, stopping: threading.Event, *arguments: Any) -> None:
        self.hub = hub
        self.stopping = stopping
        super().__init__(*arguments)

    def serve(self) -> None:
        """Answer one request."""
        record = Record(self.command, self.path, self.headers.get("Range"), "Authorization" in self.headers)
        with self.hub.lock:
            self.hub.log.append(record)
        fault = self.hub.strike(record)
        self._reach("arrival", fault)
        body = self._read()
        if fault is not None and fault.status is not None:
            code = {"X-Error-Code": fault.code} if fault.code else {}
            told = refusal(fault.status, fault.message, {**code, **fault.headers})
        else:
            told = answer(self.hub, self.command, self.path, self.headers, body)
        self._reach("answer", fault)
        self._send(record, told, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: there is `Hub.log`."""

    def _reach(self, point: str, fault: Fault | None) -> None:
        """Do what a fault is to do at this point."""
        if fault is None or fault.at != point:
            return
        if fault.call is not None:
            fault.call()
        if self.stopping.wait(fault.sleep):
            raise ConnectionAbortedError("the Hub stops")

    def _read(self) -> bytes:
        """The request's body, to its end: the next request on this connection begins there."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces: list[bytes] = []
            while size := int(self._line(), 16):
                pieces.append(self._exactly(size))
                self._line()
            self._line()
            return b"".join(pieces)
        return self._exactly(int(self.headers.get("Content-Length") or 0))

    def _line(self) -> bytes:
        line = self.rfile.readline()
        if not line:
            raise ConnectionAbortedError("the client went away")
        return line

    def _exactly(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionAbortedError("the client went away")
        return content

    def _send(self, record: Record, told: Answer, fault: Fault | None) -> None:
        body = told.body
        if fault is not None and fault.flip and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        record.status = told.status
        self.send_response(told.status)
        headers = {"Content-Length": str(len(body)), "X-Request-Id": secrets.token_hex(8)}
        for name, value in {**headers, **told.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        end = len(body) if fault is None or fault.cut is None else min(fault.cut, len(body))
        for start in range(0, end, PIECE):
            piece = body[start : min(start + PIECE, end)]
            record.sent += len(piece)
            self.wfile.write(piece)
        if fault is not None and fault.cut is not None:
            self._reach("cut", fault)
            self._hang_up(reset=fault.how == "rst")

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # Closed by its number: the server would shut the socket down first, which says goodbye
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())


class _Server(socketserver.ThreadingTCPServer):
    """Keeps its connections, so as to be able to end them."""

    request_queue_size = 64

    def __init__(self, hub: Hub) -> None:
        self.stopping = threading.Event()
        self.hub = hub
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, hub, self.stopping))

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.errors.append(error)

    def stop(self) -> None:
        """Take no more connections and end those there are, with the threads that serve them."""
        self.stopping.set()
        self.shutdown()
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` at `hub.url`, a port of its own, until the end of the block."""
    server = _Server(hub)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.stop()
        thread.join()
    if hub.errors:
        raise hub.errors[0]
