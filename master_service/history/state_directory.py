"""Everything of the master that is durable: log, snapshots, the mark of what it works on, and the room for them."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import uuid
from collections import deque
from collections.abc import Callable
from functools import partial

import structlog

from common.clock import Clock
from common.crash_points import reached
from common.errors import StorageBlocked, StorageFull
from common.events import happened
from common.growth import WINDOW_SECONDS, Measured, bytes_a_day, within
from common.locks import DirectoryLock
from master_service.config import MasterConfig
from master_service.decisions.records import Entry, Loggable, UpdateFacts
from master_service.history.retention import Budget, first_versions, prune
from master_service.history.snapshot import SnapshotDirectory, Snapshots, Taken
from master_service.log.deadly import Attempts, FileMark, Mark, MemoryMark
from master_service.log.message_log import MessageLog, open_log
from master_service.log.payloads import Incoming
from master_service.log.room import Room, free_bytes, is_full
from master_service.status import DiskReport, LogReport, SnapshotReport

log = structlog.get_logger()

#: How long the end of a master waits for payloads that are being dropped, seconds.
_PRUNE_SECONDS = 30.0
#: Between two snapshots, in times of what it took to write the one before: they take a fiftieth of the time at most.
_APART = 50.0
#: What comes is measured no more often, seconds.
_MEASURED_SECONDS = 10.0
#: Runs something that may take long beside the thread that decides; the name is for errors.
Background = Callable[[str, Callable[[], None]], None]


def random_id() -> str:
    """An id that nothing else has."""
    return uuid.uuid4().hex


def inline(name: str, work: Callable[[], None]) -> None:
    """The Background where there is no other thread: does the work at once."""
    work()


class Journal:
    """What one master keeps, put together. `fold` is where it stands: at first that of the newest snapshot.

    Nothing waits in here: StorageBlocked is raised to whoever can wait.
    """

    def __init__(
        self,
        log: MessageLog,
        snapshots: Snapshots,
        mark: Mark,
        room: Room,
        config: MasterConfig,
        *,
        clock: Clock,
        new_id: Callable[[], str] = random_id,
        making: Mark | None = None,
        background: Background = inline,
        on_close: Callable[[], None] = lambda: None,
        disk_bytes: int | None = None,
    ) -> None:
        """`making`: for the encoder that is being made, which may be beside what `mark` is for; None where that is
        inline. `disk_bytes`: of the whole disk, of which retention may be a share. Raises Damaged if the log does not
        hold what the newest whole snapshot was made of."""
        self.log = log
        self.fold = snapshots.read()
        self.attempts = Attempts(mark, log)
        self.making = Attempts(making or MemoryMark(), log)
        self._snapshots = snapshots
        self._room = room
        self.retention = config.keeps(disk_bytes)
        self._budget = Budget(self.retention)
        self._clock = clock
        self._new_id = new_id
        self.background = background
        self._on_close = on_close
        self._refused: list[str] = []
        #: Set while no snapshot is being written, and while nothing is dropped after one.
        self._written, self._pruned = threading.Event(), threading.Event()
        self._written.set()
        self._pruned.set()
        self._writing_seconds = 0.0
        #: For the report: (seconds, bytes that had come), the oldest first; and where a replay can begin.
        self._measured: deque[Measured] = deque(maxlen=round(WINDOW_SECONDS / _MEASURED_SECONDS))
        self._replays_from = first_versions(log, snapshots.kept())
        #: The effects of all entries up to this offset have left.
        self.carried_out = max(self.log.carried_out, self.fold.offset)
        self._snapshot_offset, self._snapshot_at = self.fold.offset, clock.monotonic()

    def append(
        self,
        body: Loggable,
        *,
        message_id: str | None = None,
        facts: UpdateFacts | None = None,
        payload: str | None = None,
        together: bool = False,
    ) -> Entry | None:
        """Write an entry durably; None if this message id is in the log already. `together`: durable with the next
        `commit`. Raises StorageBlocked."""
        reached("before append")
        entry = self._room.write(
            lambda: self.log.append(
                body,
                message_id=message_id or self._new_id(),
                at=self._clock.now(),
                facts=facts,
                payload=payload,
                carried_out=self.carried_out,
                together=together,
            )
        )
        reached("after append")
        return entry

    def commit(self) -> None:
        """Make durable what was appended together. Raises StorageBlocked; then it may be tried again."""
        if self.log.uncommitted:
            reached("before commit")
            self._room.write(self.log.commit)
            reached("after commit")

    def write_payload(self, payload: bytes) -> str:
        """Store a payload durably; gives its digest. Raises StorageBlocked."""
        self._keep_within_budget(len(payload))
        return self._room.write(lambda: self.log.write_payload(payload))

    def receive_payload(self, size: int) -> Incoming:
        """A payload of so many bytes will come. Raises StorageBlocked if there is no room for all of it."""
        self._keep_within_budget(size)
        return self._room.write(lambda: self.log.payloads.receive(size))

    def keep_payload(self, incoming: Incoming) -> str:
        """All of it has come: gives its digest. Durable with the next `commit`. Raises StorageBlocked."""
        return self._room.write(lambda: self.log.keep_payload(incoming))

    def drop_refused(self, payload: str) -> None:
        """Forget the payload of an update that is refused, unless another entry with the same bytes needs it. While the
        disk is full even that cannot be noted, and is done later."""
        self._refused.append(payload)
        try:
            while self._refused:
                if self.log.uses(self._refused[0]) <= 1:
                    self._room.write(lambda: self.log.drop([self._refused[0]], "refused", self._clock.now()))
                self._refused.pop(0)
        except StorageBlocked:
            return

    def snapshot_due(self, after: float = 0.0) -> bool:
        """Whether `after` seconds have passed since the last one, and far more than it took to write it; whether
        anything was folded since; and none is being written. Sooner where only a snapshot lets go of payloads that are
        over the budget."""
        if not self._written.is_set() or self.fold.offset == self._snapshot_offset:
            return False
        wanted = 0.0 if self._budget.over else after
        wait = max(wanted, _APART * self._writing_seconds) if after > 0 else 0.0
        return self._clock.monotonic() - self._snapshot_at >= wait

    def snapshot(self) -> None:
        """Take one, if anything was folded, and write it in the background; then the retention policy drops there what
        no start needs. All that the rows up to here lead to must have left: whoever starts from it does not send it
        again."""
        assert not self.log.uncommitted, "a snapshot of what may not have happened"
        if not self.snapshot_due():
            return
        self._snapshot_at = self._clock.monotonic()
        reached("before snapshot")
        offset = self.fold.offset
        taken = self._snapshots.take(self.fold, self.log.checksum(offset) or "")
        self._written.clear()
        self.background("snapshot", partial(self._write_snapshot, taken, offset))

    def wait_for_snapshot(self) -> None:
        """Until the one that is being written, if any, is written, or cannot be."""
        self._written.wait()

    def _write_snapshot(self, taken: Taken, offset: int) -> None:
        begun, prunes = self._clock.monotonic(), False
        try:
            self._room.write(taken.write)
            self._snapshot_offset = offset
            happened("snapshot", offset=offset)
            prunes = self.retention != "all" and self._pruned.is_set()
            if prunes:
                self._pruned.clear()  # before anybody may take it that all is done
        except StorageBlocked as error:
            log.warning("a snapshot cannot be written; a start folds more of the log", problem=str(error))
        finally:
            taken.let_go()  # where there was no room, nothing of it was written
            self._writing_seconds = self._clock.monotonic() - begun
            self._written.set()
        if prunes:
            self._prune()

    def report(self, blocked: str) -> tuple[DiskReport, LogReport, SnapshotReport]:
        """What `status` shows; `blocked` is why nothing can be written, if so."""
        age = self._clock.monotonic() - self._snapshot_at
        snapshot = SnapshotReport(offset=self._snapshot_offset, age_seconds=age)
        rows = LogReport(
            entries=self.log.last_offset + 1,
            blocked=blocked,
            bytes_per_day=self._bytes_a_day(),
            keeps_bytes=self._budget.bytes,
            replays_from=self._replays_from,
        )
        return self._room.report(), rows, snapshot

    def close(self) -> None:
        """Close it, so that another master can open it."""
        self._written.wait()
        self._pruned.wait(_PRUNE_SECONDS)
        self.attempts.close()
        self.making.close()
        self.log.close()
        self._on_close()

    def _bytes_a_day(self) -> float | None:
        """Of what comes, by what was measured whenever somebody asked."""
        now = self._clock.monotonic()
        if not self._measured or now - self._measured[-1][0] >= _MEASURED_SECONDS:
            self._measured.append((now, self._budget.came + self.log.ledger_bytes()))
        return bytes_a_day(within(list(self._measured)))

    def _keep_within_budget(self, coming: int) -> None:
        """A payload of so many bytes comes: drop old ones meanwhile, if it is time to."""
        self._budget.comes(coming)
        if self._budget.due and self._written.is_set() and self._pruned.is_set():
            self._pruned.clear()
            self.background("retention", self._prune)

    def _prune(self) -> None:
        """Beside the thread that decides: every payload is looked at."""
        try:
            policy, kept = self.retention, self._snapshots.kept()
            freed = self._room.write(lambda: prune(self.log, kept, policy, self._clock.now()))
            self._budget.looked(self.log)
            self._replays_from = first_versions(self.log, kept)
            if freed:
                log.info("payloads dropped", retention=str(policy), bytes=freed)
        except StorageBlocked as error:
            log.warning("which payloads are dropped cannot be noted", problem=str(error))
        finally:
            self._pruned.set()


def open_journal(
    config: MasterConfig,
    *,
    clock: Clock,
    background: Background = inline,
    snapshots: Callable[[MessageLog], Snapshots] = SnapshotDirectory,
    on_removed: Callable[[str], None] | None = None,
) -> Journal:
    """The journal of a state directory, locked until it is closed. `snapshots`: those of its log; `on_removed` is told
    the digest of each payload that is removed, in whatever thread.

    Raises LockHeld, which names the holder, Damaged, or StorageBlocked.
    """
    lock = DirectoryLock(config.state_dir)
    try:
        ledger = open_log(config.state_dir, on_removed=on_removed)
        return Journal(
            ledger,
            snapshots(ledger),
            FileMark(config.state_dir / "handling"),
            Room(config.state_dir, free_bytes(config.state_dir), config.min_free),
            config,
            clock=clock,
            making=FileMark(config.state_dir / "making"),
            background=background,
            on_close=lock.close,
            disk_bytes=shutil.disk_usage(config.state_dir).total,
        )
    except sqlite3.OperationalError as error:
        lock.close()
        if is_full(error):
            raise StorageFull(f"{config.state_dir}: {error}; make room and start again") from None
        raise
    except BaseException:
        lock.close()  # whatever it was: who is not made must not keep the directory from the next
        raise
