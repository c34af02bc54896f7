"""Where a service is looked at over HTTP: health, readiness, metrics. Imports nothing: a health check is quick."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Where a master is looked at if nothing is said.
DEFAULT_HTTP = "127.0.0.1:9464"
#: The word for nowhere.
OFF = "off"

_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")
_FORM = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]*)):(?P<port>\d{1,5})")


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """A host, as a name or in numbers, and a port."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether this machine alone reaches it."""
        return _LOOPBACK.fullmatch(self.host) is not None

    @property
    def near(self) -> HttpAddress:
        """Where a process of the same machine reaches it: who listens everywhere is here, too."""
        return HttpAddress({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def http_address(text: str) -> HttpAddress | None:
    """HOST:PORT, [IPv6]:PORT, or :PORT for this machine alone; None for `off`. Raises ValueError with one line."""
    if text.strip().lower() == OFF:
        return None
    found = _FORM.fullmatch(text.strip())
    port = int(found["port"]) if found else 0
    if found is None or not 1 <= port <= 65535:
        raise ValueError(f"{text!r} is no address to listen at: take HOST:PORT such as {DEFAULT_HTTP}, or {OFF}")
    return HttpAddress(found["six"] or found["host"] or "127.0.0.1", port)
