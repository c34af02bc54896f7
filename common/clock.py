"""Time: the only module of `common`, `master_service` and `node_service` that reads it. All else is given a Clock.

Two clocks in one: `now` is the time of day, which people see and the message log keeps; `monotonic` never goes back,
and is what waiting and deadlines are measured by.
"""

from __future__ import annotations

import time
from typing import Protocol


class Signal(Protocol):
    """Something that happens once, as a threading.Event does."""

    def is_set(self) -> bool:
        """Whether it has happened."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it up to `timeout` seconds; whether it has happened."""


class Clock(Protocol):
    """What a party needs to know of time. All of it in seconds."""

    def now(self) -> float:
        """Seconds since 1970."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back, whatever becomes of the time of day."""

    def wait(self, seconds: float, event: Signal | None = None) -> bool:
        """Let so many seconds pass, or fewer if `event` is set meanwhile; whether it is set."""


class SystemClock:
    """The clock of this machine."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float, event: Signal | None = None) -> bool:
        if event is not None:
            return event.wait(seconds)
        time.sleep(max(0.0, seconds))
        return False


class VirtualClock:
    """A clock that stands still until it is moved: for simulations and tests. Whoever waits moves it."""

    def __init__(self, start: float = 0.0) -> None:
        self.time = start

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def wait(self, seconds: float, event: Signal | None = None) -> bool:
        if event is not None and event.is_set():
            return True
        self.time += max(0.0, seconds)
        return event is not None and event.is_set()


def minute_of_day(at: float) -> int:
    """Minutes since midnight in local time, at so many seconds since 1970."""
    local = time.localtime(at)
    return local.tm_hour * 60 + local.tm_min


#: For what talks to real sockets and files, and the default of services.
SYSTEM = SystemClock()
