"""What happens in a federation, as structured events: for machines that read the log, not for the lines on a terminal.

Each bears what it is about: node, encoder, update, version. `deploy.logging` shows them in JSON logs.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import structlog

from common.clock import Clock
from common.wire.broker import BrokerStatus

#: The key that marks an event; taken out before anybody sees it.
MARK = "happened"

_log = structlog.get_logger()


def happened(what: str, **facts: Any) -> None:
    """Tell that something happened: `what` in a few fixed words, and the facts by name. Numbers carry their unit in the
    name (`seconds`, `bytes`) unless they are counts."""
    processors = structlog.get_config()["processors"]
    if processors and processors[0] is no_events:
        return  # there are several for each update: nothing is put together that nobody sees
    _log.info(what, **{MARK: True}, **facts)


def no_events(logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The processor, the first one, where events are not shown."""
    if MARK in line:
        raise structlog.DropEvent
    return line


class BrokerWatch:
    """Tells of one party's connection to the broker: that it is away or blocked, and that it is back, and after how
    long. To be shown the status now and then."""

    def __init__(self, clock: Clock, **who: Any) -> None:
        """`who` stands in every event."""
        self._clock = clock
        self._who = who
        self._reconnects = 0
        self._away_since: float | None = None
        self._blocked_since: float | None = None

    def look(self, status: BrokerStatus) -> None:
        """Compare with what was seen last. A connection that was lost and made again in between is told of too."""
        now = self._clock.monotonic()
        lost = not status.connected or status.reconnects > self._reconnects
        if lost and self._away_since is None:
            self._away_since = now
            happened("broker away", **self._who, problem=status.problem)
        if status.connected and self._away_since is not None:
            seconds, self._away_since = now - self._away_since, None
            happened("broker reconnected", **self._who, reconnects=status.reconnects, seconds=seconds)
        self._reconnects = status.reconnects
        if status.blocked and self._blocked_since is None:
            self._blocked_since = now
            happened("broker blocked", **self._who, problem=status.blocked)
        elif not status.blocked and self._blocked_since is not None:
            seconds, self._blocked_since = now - self._blocked_since, None
            happened("broker unblocked", **self._who, seconds=seconds)
