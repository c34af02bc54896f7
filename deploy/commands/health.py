"""`shared-encoder health`: what a service of this machine says of itself, for whoever starts it again. Imports nothing
that takes time."""

from __future__ import annotations

import json
import socket
from typing import NamedTuple

from common.errors import UserError
from common.http_address import HttpAddress, http_address

#: A service that does not answer within so many seconds is not ready.
_ANSWER_SECONDS = 3.0
#: Bytes of an answer that are read.
_LONGEST = 64 << 10


class Said(NamedTuple):
    """Whether it is ready (or alive), and that in one line."""

    good: bool
    line: str


def look(http: str, *, alive: bool = False) -> Said:
    """Ask a service of this machine whether it is ready, or only whether it is `alive`. Raises UserError for an address
    that is none."""
    try:
        address = http_address(http)
    except ValueError as error:
        raise UserError(f"--http: {error}") from None
    if address is None:
        raise UserError(f"--http {http}: there is nobody to ask")
    try:
        status, body = _asked(address.near, "/healthz" if alive else "/readyz")
    except OSError as error:
        return Said(False, f"nobody answers at {address.near}: {(error.strerror or str(error)).lower()}")
    good = status == 200
    if alive:
        return Said(good, "alive" if good else f"not alive: {body.strip()}")
    return _shown(body, good)


def _asked(address: HttpAddress, path: str) -> tuple[int, str]:
    """Status and body. By hand: the standard library's client takes longer to import than all of this. Raises
    OSError."""
    with socket.create_connection((address.host, address.port), _ANSWER_SECONDS) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            head, _, body = answer.read(_LONGEST).partition(b"\r\n\r\n")
    words = head.split(None, 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0, body.decode(errors="replace")


def _shown(body: str, good: bool) -> Said:
    try:
        said = json.loads(body)
        who = " ".join([said["role"], *([said["name"]] if "name" in said else [])])
        wrong = [f"{part}: {words}" for part, words in said["parts"].items() if words != "ok"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return Said(False, "what answers is no service of shared-encoder")
    return Said(good, f"{who} is ready" if good else f"{who} is not ready: {'; '.join(wrong)}")
