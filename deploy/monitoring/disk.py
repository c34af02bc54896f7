"""What lies in a state directory, measured now and then in a thread of its own: with a million payloads it takes a
while, and nobody who serves or scrapes waits for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from common.clock import SYSTEM, Clock
from common.growth import Measured, bytes_a_day, seconds_left, within
from deploy.monitoring.common import Disk

#: Between two measurements, seconds; and at least so many times of what one took: a fiftieth of a processor at most.
_EVERY_SECONDS, _APART = 10.0, 50.0
#: Parts of a log's state directory that have a name of their own, by how their entries begin.
LOG_PARTS = {"ledger": "ledger", "shard.sqlite": "ledger", "payloads": "payloads", "snapshots": "snapshots"}
#: What updates make grow.
_GROWS = ("ledger", "payloads")


class DiskWatch:
    """What is known of a state directory; nothing before `start` or `measure`."""

    def __init__(
        self, directory: Path, needed_bytes: int, clock: Clock = SYSTEM, *, parts: Mapping[str, str] = LOG_PARTS
    ) -> None:
        """`parts`: what is told apart; where nothing is, nothing is said of growth either."""
        self._directory = directory
        self._needed = needed_bytes
        self._apart = parts
        self._clock = clock
        self._parts: dict[str, int] | None = None
        self._samples: deque[Measured] = deque(maxlen=5_000)
        self._closing = threading.Event()

    def start(self) -> None:
        """Measure now and then, in a thread."""
        threading.Thread(target=self._serve, name="disk-watch", daemon=True).start()

    def close(self) -> None:
        """Measure no more."""
        self._closing.set()

    def measure(self) -> None:
        """Once, now."""
        parts = stored_bytes(self._directory, self._apart)
        if self._apart:
            self._samples.append((self._clock.monotonic(), sum(parts[part] for part in _GROWS)))
        self._parts = parts

    def look(self) -> Disk:
        """As it was measured last, with the room that is free now."""
        free: int | None = None
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(_existing(self._directory)).free
        growth = bytes_a_day(within(list(self._samples))) if self._samples else None
        left = seconds_left(free, self._needed, growth) if self._samples and free is not None else None
        return Disk(free, self._needed, self._parts, growth, left)

    def _serve(self) -> None:
        while True:
            begun = self._clock.monotonic()
            self.measure()
            took = self._clock.monotonic() - begun
            if self._clock.wait(max(_EVERY_SECONDS, _APART * took), self._closing):
                return


def _existing(directory: Path) -> Path:
    """It, or where it will be made."""
    return next((each for each in (directory, *directory.absolute().parents) if each.exists()), directory)


def stored_bytes(directory: Path, parts: Mapping[str, str] = LOG_PARTS) -> dict[str, int]:
    """Bytes of the files below, by part. What goes while it is looked at is not counted."""
    sizes = dict.fromkeys((*parts.values(), "other"), 0)
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            part = next((name for start, name in parts.items() if entry.name.startswith(start)), "other")
            sizes[part] += _size(entry)
    return sizes


def _size(entry: os.DirEntry[str]) -> int:
    size = 0
    with contextlib.suppress(OSError):
        if not entry.is_dir(follow_symlinks=False):
            return entry.stat(follow_symlinks=False).st_size
        with os.scandir(entry.path) as entries:
            for each in entries:
                size += _size(each)
    return size
