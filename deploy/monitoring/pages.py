"""What a monitor says at /healthz, /readyz and /metrics, and the port that says it."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import structlog

from common.errors import UserError
from common.http_address import OFF, HttpAddress, http_address
from deploy.monitoring.exposition import exposed
from deploy.monitoring.health import OK
from deploy.monitoring.monitor import Monitor
from deploy.monitoring.port import Answer, Page, Port
from deploy.monitoring.table import of

log = structlog.get_logger()


@contextmanager
def watched(monitor: Monitor[Any, Any], http: str | None, *, by_default: str = OFF) -> Iterator[None]:
    """Inside, the monitor is looked at over HTTP. `http`: as it was configured; None: at `by_default`, if that place is
    free. Raises UserError where one was asked for and cannot be had."""
    address = http_address(http or by_default)
    if address is None:
        yield
        return
    port = _port(address, monitor, asked=http is not None)
    if port is None:
        yield
        return
    if not address.is_loopback:
        log.warning(
            "whoever reaches this port can read metrics without a password, with names of nodes and encoders in them",
            http=str(address),
        )
    monitor.disk.start()
    try:
        yield
    finally:
        monitor.disk.close()
        port.close()


def _port(address: HttpAddress, monitor: Monitor[Any, Any], *, asked: bool) -> Port | None:
    try:
        return Port(address, pages(monitor))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "somebody else listens there" if taken else error.strerror or str(error)
        if asked:
            raise UserError(f"cannot be looked at over HTTP at {address}: {why}; give another --http, or off") from None
        log.warning(f"no health and metrics over HTTP at {address}: {why}; --http takes another address, or off")
        return None


def pages(monitor: Monitor[Any, Any]) -> dict[str, Page]:
    """By path."""
    return {
        "/healthz": lambda accept: health(monitor),
        "/readyz": lambda accept: readiness(monitor),
        "/metrics": lambda accept: metrics(monitor, accept),
    }


def health(monitor: Monitor[Any, Any]) -> Answer:
    """200 as long as the process is worth keeping."""
    if why := monitor.hung():
        return Answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{why}\n".encode())
    return Answer(HTTPStatus.OK, b"ok\n")


def readiness(monitor: Monitor[Any, Any]) -> Answer:
    """200 if it does its work, 503 if something keeps it from that, with what in JSON. The last error is shown by its
    fixed words alone: what else a log line says may be its owner's."""
    parts = monitor.parts()
    ready = all(words == OK for words in parts.values())
    shown: dict[str, Any] = {"ready": ready, "role": monitor.role}
    if monitor.name:
        shown["name"] = monitor.name
    shown |= {"version": monitor.version, "parts": parts}
    if monitor.noticed.error_at is not None:
        at = datetime.fromtimestamp(monitor.noticed.error_at, UTC).isoformat(timespec="seconds")
        shown["last_error"] = {"at": at, "what": monitor.noticed.error}
    body = json.dumps(shown, ensure_ascii=False, indent=1) + "\n"
    status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
    return Answer(status, body.encode(), "application/json")


def metrics(monitor: Monitor[Any, Any], accept: str) -> Answer:
    """All that there is of it now."""
    return Answer(HTTPStatus.OK, *exposed(of(monitor.role), monitor.samples(), accept))
