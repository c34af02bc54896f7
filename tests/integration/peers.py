"""What stands between a party and its broker in tests: a relay, an HTTP proxy, a SOCKS proxy, in this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.integration.test_strangers import listening

#: Deals with the greeting of a client, and says where it is to be connected to; None: it has been turned away.
Greet = Callable[[socket.socket], tuple[str, int] | None]


@dataclass
class Between:
    """`to`: whom clients asked for, in turn. `gone`: nobody new is let through."""

    port: int = 0
    to: list[tuple[str, int]] = field(default_factory=list)
    gone: bool = False


def straight_to(port: int) -> Greet:
    return lambda client: ("127.0.0.1", port)


def http_proxy(password: str = "", *, answer: bytes = b"200 Connection established") -> Greet:
    """`password`: in base64, `user:password`."""

    def greet(client: socket.socket) -> tuple[str, int] | None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += client.recv(1)
        method, to, _ = request.split(b" ", 2)
        assert method == b"CONNECT"
        allowed = not password or f"\r\nProxy-Authorization: Basic {password}\r\n".encode() in request
        said = answer if allowed else b"407 Proxy Authentication Required"
        client.sendall(b"HTTP/1.1 " + said + b"\r\n")
        client.sendall(b"Via: a test\r\n\r\n")  # apart: what follows the first line must not be taken for the broker's
        host, _, port = to.decode().rpartition(":")
        return (host, int(port)) if said.startswith(b"200") else None

    return greet


def socks_proxy(password: str = "", *, answer: int = 0) -> Greet:
    """SOCKS5, RFC 1928 and 1929; names are looked up here. `password`: `user:password`. `answer`: 0 is success."""

    def greet(client: socket.socket) -> tuple[str, int] | None:
        version, methods = client.recv(2)
        method = 2 if password else 0
        offered = client.recv(methods)
        client.sendall(bytes((version, method if method in offered else 0xFF)))
        if password:
            _, length = client.recv(2)
            user = client.recv(length).decode()
            allowed = f"{user}:{client.recv(client.recv(1)[0]).decode()}" == password
            client.sendall(bytes((1, not allowed)))
            if not allowed:
                return None
        _, command, _, kind = client.recv(4)
        assert (version, command) == (5, 1)
        host = client.recv(client.recv(1)[0]).decode() if kind == 3 else socket.inet_ntoa(client.recv(4))
        port = int.from_bytes(client.recv(2), "big")
        client.sendall(bytes((5, answer, 0, 1)) + bytes(6))
        return (host, port) if not answer else None

    return greet


def says_nothing(client: socket.socket) -> None:
    while client.recv(100):
        pass


@contextmanager
def between(greet: Greet) -> Iterator[Between]:
    """Something on a port of its own that connects its clients on."""
    made = Between()

    def serve(client: socket.socket) -> None:
        if made.gone or (to := greet(client)) is None:
            return
        made.to.append(to)
        with socket.create_connection(to) as server:
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join(30.0)

    with listening(serve) as port:
        made.port = port
        yield made


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        target.close()
