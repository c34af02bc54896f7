"""The HTTP port: /healthz, /readyz and /metrics, each from what a `Page` gives at that moment. Reads nothing but the
path, answers nothing but GET and HEAD, and holds up nobody: its threads are its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import structlog

from common.http_address import HttpAddress

log = structlog.get_logger()

#: How long a client may take for its request, seconds, and how many are answered at the same time.
_REQUEST_SECONDS, _TOGETHER = 5.0, 16
_PLAIN = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    """What goes back."""

    status: HTTPStatus
    body: bytes
    content_type: str = _PLAIN


#: What a path answers, given the `Accept` header.
Page = Callable[[str], Answer]


class Port:
    """Serves `pages` at an address until closed. Raises OSError where it cannot listen."""

    def __init__(self, address: HttpAddress, pages: Mapping[str, Page]) -> None:
        self._server = _Server(address, pages)
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="http", daemon=True).start()

    def close(self) -> None:
        """Listen no more. An answer that is on its way ends by itself."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: HttpAddress, pages: Mapping[str, Page]) -> None:
        family, *_, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self.pages = pages
        self.places = threading.BoundedSemaphore(_TOGETHER)
        super().__init__(place[:2], _Handler)  # type: ignore[arg-type]  # an address has a host and a port

    def server_bind(self) -> None:
        """Without asking for this machine's name, which may take a name server's time."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: object, client_address: object) -> None:
        if not self.places.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[arg-type]  # a socket
            return
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self.places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is nobody's concern."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_SECONDS
    server_version, sys_version = "shared-encoder", ""
    server: _Server

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            there = "\n".join(sorted(self.server.pages))
            answer = Answer(HTTPStatus.NOT_FOUND, f"there are:\n{there}\n".encode())
        else:
            answer = self._given(page)
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(answer.body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            if with_body:
                self.wfile.write(answer.body)

    def _given(self, page: Page) -> Answer:
        try:
            return page(self.headers.get("Accept", ""))
        except Exception:  # a bug of ours: whoever scrapes is told, and the service goes on
            log.exception("a page cannot be shown, which is a bug", path=self.path)
            return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, b"a bug: the log has the trace\n")

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is nothing to tell of."""
