"""A proxy before an object store that loses, breaks, delays and forges what it is told to."""

from __future__ import annotations

import contextlib
import enum
import http.client
import http.server
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

_RESET = struct.pack("ii", 1, 0)  # closing sends RST instead of FIN
_BLOCK = 4096


class Fault(enum.Enum):
    """What happens to one request."""

    NONE = "it is answered"
    RESET_REQUEST = "the connection is reset, and the store never sees the request"
    DROP_RESPONSE = "the store does it, and the connection is reset instead of the answer"
    TRUNCATE = "the store does it, and the connection is reset in the middle of the answer"
    ERROR = "500, and the store never sees the request"
    ERROR_AFTER = "the store does it, and the answer is 500"
    CONFLICT = "412, and the store never sees the request"
    STALL = "the request reaches the store after the stall, whoever still waits for it"
    STALL_AFTER = "the store does it at once, the answer comes after the stall"
    SLOW = "request and answer pass at a limited rate"


Choice = Callable[[str, str], Fault]
"""From method and path of a request to its fault."""


class FaultProxy:
    """Listens on 127.0.0.1 until it is closed; `fired` counts the faults."""

    def __init__(self, port: int, stall_s: float = 10.0, bytes_per_s: int = 1 << 16) -> None:
        self.upstream_port, self.stall_s, self.bytes_per_s = port, stall_s, bytes_per_s
        self.choose: Choice = lambda *_: Fault.NONE
        self.fired: Counter[Fault] = Counter()
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @contextlib.contextmanager
    def once(self, fault: Fault, method: str, name: str, times: int = 1) -> Iterator[None]:
        """The next requests of a method for an object of that name meet a fault."""
        left, lock = [times], threading.Lock()

        def choose(asked: str, path: str) -> Fault:
            with lock:
                if asked != method or name not in path or not left[0]:
                    return Fault.NONE
                left[0] -= 1
                return fault

        before, self.choose = self.choose, choose
        try:
            yield
        finally:
            self.choose = before

    def close(self) -> None:
        """Stop listening; requests that are stalled end at once."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what this is for."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _relay(self) -> None:
        proxy = self.server.proxy
        fault = proxy.choose(self.command, self.path)
        proxy.fired[fault] += 1
        body = self._paced_read(int(self.headers.get("Content-Length") or 0), fault)
        if fault is Fault.RESET_REQUEST:
            return self._reset()
        if fault in (Fault.ERROR, Fault.CONFLICT):
            return self._refuse(500 if fault is Fault.ERROR else 412)
        if fault is Fault.STALL:
            proxy.closing.wait(proxy.stall_s)
        try:
            status, headers, data = self._ask(body)
        except (OSError, http.client.HTTPException):
            return self._reset()  # the store itself is gone
        if fault is Fault.DROP_RESPONSE:
            return self._reset()
        if fault is Fault.ERROR_AFTER:
            return self._refuse(500)
        if fault is Fault.STALL_AFTER:
            proxy.closing.wait(proxy.stall_s)
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault is Fault.TRUNCATE:
            self.wfile.write(data[: len(data) // 2])
            return self._reset()
        return self._paced_write(data, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _relay  # noqa: N815 (names of the base class)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of the store's own answer."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.proxy.upstream_port, 30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
            kept = ("connection", "transfer-encoding") + (
                () if self.command == "HEAD" else ("content-length",)
            )
            headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in kept]
            return answer.status, headers, data
        finally:
            upstream.close()

    def _refuse(self, status: int) -> None:
        code = {412: "PreconditionFailed", 500: "InternalError"}[status]
        data = f"<Error><Code>{code}</Code><Message>forged</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close_connection = True
        self.wfile.close()
        self.rfile.close()
        self.connection.close()

    def _paced_read(self, size: int, fault: Fault) -> bytes:
        if fault is not Fault.SLOW:
            return self.rfile.read(size)
        blocks = []
        while size > 0 and (block := self.rfile.read(min(size, _BLOCK))):
            blocks.append(block)
            size -= len(block)
            time.sleep(len(block) / self.server.proxy.bytes_per_s)
        return b"".join(blocks)

    def _paced_write(self, data: bytes, fault: Fault) -> None:
        if fault is not Fault.SLOW:
            self.wfile.write(data)
            return
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            self.wfile.write(block)
            time.sleep(len(block) / self.server.proxy.bytes_per_s)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single requests."""
