"""The publications of one `publish` call, and which of them the broker has not confirmed yet."""

from __future__ import annotations

import threading
import time

from common.broker import Publication
from common.errors import SharedEncoderError


class Batch:
    """`left` holds what is unconfirmed, in order; `done` is set when nothing is left.

    `progress_at`, `sent_at`: when something of it was last settled, and when it was last given to a channel, both in
    seconds of the monotonic clock.
    """

    def __init__(self, publications: tuple[Publication, ...]) -> None:
        self._all = publications
        self.left = dict(enumerate(publications))
        self.done = threading.Event()
        self.error: SharedEncoderError | None = None
        self.progress_at = self.sent_at = time.monotonic()

    def restart(self) -> None:
        """Its confirms so far are not believed."""
        self.left = dict(enumerate(self._all))

    def settle(self, index: int, error: SharedEncoderError | None = None) -> None:
        self.left.pop(index, None)
        self.error = self.error or error
        self.progress_at = time.monotonic()
        if not self.left:
            self.done.set()

    def fail(self, error: SharedEncoderError) -> None:
        self.error = self.error or error
        self.left.clear()
        self.done.set()
