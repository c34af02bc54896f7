"""Ctrl-C and SIGTERM ask a service to end cleanly; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Within this block the first SIGINT or SIGTERM sets `stop`, the next has its default effect. Main thread only."""

    def first(signum: int, frame: FrameType | None) -> None:
        stop.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_once(insisted: Callable[[], None]) -> Iterator[None]:
    """Within this block the first SIGINT is a KeyboardInterrupt, and each further one does `insisted`: it does not
    disturb how what was stopped is put in order. In another thread than the main one the block has no effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda signum, frame: insisted())
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
