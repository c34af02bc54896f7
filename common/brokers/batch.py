"""The publications of one `publish` call, and which of them the broker has not confirmed yet."""

from __future__ import annotations

import threading
import time

from common.broker import Publication
from common.errors import SharedEncoderError


class Batch:
    """`left` holds what is unconfirmed, in order; `done` is set when nothing is left."""

    def __init__(self, publications: tuple[Publication, ...]) -> None:
        self.left = dict(enumerate(publications))
        self.done = threading.Event()
        self.error: SharedEncoderError | None = None
        self.progress_at = time.monotonic()

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
