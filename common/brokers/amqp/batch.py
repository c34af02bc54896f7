"""The publications of one `publish` call, and which of them the broker has not confirmed yet."""

from __future__ import annotations

import threading
import time

from common.errors import SharedEncoderError
from common.wire.broker import Publication


class Batch:
    """`left` holds what is unconfirmed, in order; `done` is set when nothing is left.

    `progress_at`, `sent_at`: when something of it was last settled, and when it was last given to a channel, both in
    seconds of the monotonic clock. `bytes_left`: of what is unconfirmed, kept because another thread reads it.
    """

    def __init__(self, publications: tuple[Publication, ...]) -> None:
        self.left = dict(enumerate(publications))
        self.bytes_left = sum(len(each.body) for each in publications)
        self.done = threading.Event()
        self.error: SharedEncoderError | None = None
        self.progress_at = self.sent_at = time.monotonic()
        self._given: dict[int, Publication] = {}

    def give(self) -> list[tuple[int, Publication]]:
        """What is to be published on a channel now."""
        self.sent_at, self._given = time.monotonic(), dict(self.left)
        return list(self.left.items())

    def restart(self) -> None:
        """What the channel has said of what it was given is not believed."""
        if self._given and not self.done.is_set():
            self.left, self.error = dict(self._given), None
            self.bytes_left = sum(len(each.body) for each in self.left.values())

    def settle(self, index: int, error: SharedEncoderError | None = None) -> None:
        publication = self.left.pop(index, None)
        self.bytes_left -= len(publication.body) if publication is not None else 0
        self.error = self.error or error
        self.progress_at = time.monotonic()
        if not self.left:
            self.done.set()

    def fail(self, error: SharedEncoderError) -> None:
        self.error = self.error or error
        self.left.clear()
        self.done.set()
