"""Everything of the master that is on disk: lock, log, attempts, snapshots, and waiting for room when there is none."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from common.crash_points import reached
from common.errors import StorageFull
from common.locks import DirectoryLock
from master_service.config import MasterConfig
from master_service.decisions.records import Entry, Loggable, UpdateFacts
from master_service.history.retention import prune
from master_service.history.snapshot import read_snapshot, write_snapshot
from master_service.log.deadly import Attempts
from master_service.log.message_log import MessageLog
from master_service.log.room import Storage, is_full
from master_service.status import DiskReport, LogReport, SnapshotReport

log = structlog.get_logger()
T = TypeVar("T")


class Journal:
    """The state directory of one master.

    `wait_for_room` is called again and again while the disk is full; it waits a little, and says whether to go on.
    Raises LockHeld, which names the holder, or Damaged.
    """

    def __init__(self, config: MasterConfig, clock: Callable[[], float], wait_for_room: Callable[[], bool]) -> None:
        self._config = config
        self._clock = clock
        self._wait_for_room = wait_for_room
        self._lock = DirectoryLock(config.state_dir)
        try:
            self.log = MessageLog(config.state_dir)
            self.fold = read_snapshot(self._snapshots, self.log, set_aside=True)
            self.attempts = Attempts(config.state_dir, self.log)
        except sqlite3.OperationalError as error:
            self._lock.close()
            if is_full(error):
                raise StorageFull(f"{config.state_dir}: {error}; make room and start again") from None
            raise
        except BaseException:
            self._lock.close()  # whatever it was: who is not made must not keep the directory from the next
            raise
        self.storage = Storage(config.state_dir, config.min_free)
        #: The effects of all entries up to this offset have left.
        self.carried_out = max(self.log.carried_out, self.fold.offset)
        self._snapshot_offset, self._snapshot_at = self.fold.offset, time.monotonic()

    def append(
        self,
        body: Loggable,
        *,
        message_id: str | None = None,
        facts: UpdateFacts | None = None,
        payload: str | None = None,
    ) -> Entry | None:
        """Write an entry durably; None if this message id is in the log already. Raises StorageFull at the end."""
        reached("before append")
        entry = self.durably(
            lambda: self.log.append(
                body,
                message_id=message_id or uuid.uuid4().hex,
                at=self._clock(),
                facts=facts,
                payload=payload,
                carried_out=self.carried_out,
            )
        )
        reached("after append")
        return entry

    def write_payload(self, payload: bytes) -> str:
        return self.durably(lambda: self.log.write_payload(payload))

    def drop_refused(self, payload: str) -> None:
        """Forget the payload of an update that is refused, unless another entry with the same bytes needs it."""
        if self.log.uses(payload) <= 1:
            self.durably(lambda: self.log.drop([payload], "refused", self._clock()))

    def durably(self, write: Callable[[], T]) -> T:
        """Write, waiting for room on the disk if there is none. Raises StorageFull when the service is to end."""
        told = False
        while True:
            try:
                done = self.storage.write(write)
            except StorageFull as error:
                if not told:
                    log.error("the disk is full: accepting nothing until there is room", problem=str(error))
                told = True
                if not self._wait_for_room():
                    raise
                continue
            if told:
                log.info("there is room on the disk again")
            return done

    def snapshot(self, *, due_after: float = 0.0) -> None:
        """Write one if `due_after` seconds have passed since the last and anything was folded; then let the retention
        policy drop what no start needs."""
        now = time.monotonic()
        if now - self._snapshot_at < due_after or self.fold.offset == self._snapshot_offset:
            return
        self._snapshot_at = now
        reached("before snapshot")
        checksum = self.log.checksum(self.fold.offset) or ""
        try:
            self.storage.write(lambda: write_snapshot(self._snapshots, self.fold, checksum))
            freed = self.storage.write(lambda: prune(self.log, self._snapshots, self._config.retention, self._clock()))
        except StorageFull as error:
            log.warning("no room for a snapshot; a start folds more of the log", problem=str(error))
            return
        self._snapshot_offset = self.fold.offset
        if freed:
            log.info("payloads dropped", retention=str(self._config.retention), bytes=freed)

    def report(self) -> tuple[DiskReport, LogReport, SnapshotReport]:
        """What `status` shows."""
        age = time.monotonic() - self._snapshot_at
        entries = self.log.last_offset + 1
        snapshot = SnapshotReport(offset=self._snapshot_offset, age_seconds=age)
        return self.storage.report(), LogReport(entries=entries), snapshot

    def close(self) -> None:
        self.attempts.close()
        self.log.close()
        self._lock.close()

    @property
    def _snapshots(self) -> Path:
        return self._config.state_dir / "snapshots"
