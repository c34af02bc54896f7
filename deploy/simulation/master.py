"""The master of a simulation: a real Master that is given a turn when something has come and when time has passed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from common.wire.broker import Delivery
from deploy.simulation.world import Connection, Ids, World
from master_service.config import MasterConfig
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState
from master_service.history.snapshot import SnapshotDirectory
from master_service.history.state_directory import Journal
from master_service.log.deadly import MemoryMark
from master_service.log.message_log import MessageLog, open_log
from master_service.log.room import Room, free_bytes
from master_service.master import INBOX_PREFETCH, UPDATES_PREFETCH, Master
from master_service.status import Report


class SimulatedMaster:
    """The master: its state directory and ids outlive it. `snapshots` say with what arithmetic a fold goes on."""

    def __init__(
        self,
        world: World,
        config: MasterConfig,
        settings: Settings,
        *,
        encoder_type: str,
        snapshots: Callable[[MessageLog], SnapshotDirectory] = SnapshotDirectory,
    ) -> None:
        self.killed = 0
        #: How often it had something to do.
        self.turns = 0
        #: Chunks of versions that it published, and at the end of the run what became of the encoder.
        self.stream_chunks = 0
        self.result: EncoderState | None = None
        self._world = world
        self._config = config
        self._settings = settings
        self._encoder_type = encoder_type
        self._snapshots = snapshots
        self._ids = Ids(world.seed, "master")
        self._mark = MemoryMark()
        self._arrived: deque[Delivery] = deque()
        self._master: Master | None = None
        self._broker: Connection | None = None
        self._due = 0.0

    def start(self) -> None:
        """From nothing, or from the log that the one before has left."""
        world, directory = self._world, self._config.state_dir
        self._arrived.clear()
        self._broker = Connection(world, "master")
        log = open_log(directory, lasting=False)
        room = Room(directory, free_bytes(directory), self._config.min_free)
        journal = Journal(
            log,
            self._snapshots(log),
            self._mark,
            room,
            self._config,
            clock=world.clock,
            new_id=self._ids.message,
        )
        self._master = Master(
            self._config,
            lambda logged: self._settings,
            self._broker,
            world.topology,
            journal,
            get=self._encoder_type,
            clock=world.clock,
            ending=threading.Event(),
            on_delivery=self._arrived.append,
            new_id=self._ids.message,
        )
        self._master.start()
        self.turns += 1
        self._broker.consume(world.topology.master_inbox, self._arrived.append, prefetch=INBOX_PREFETCH)
        self._broker.consume(world.topology.master_updates, self._arrived.append, prefetch=UPDATES_PREFETCH)
        self._next(world.clock.now())

    def kill(self) -> None:
        """Without goodbye: what is not in the log is gone, what was not acked goes back to the broker."""
        self.killed += 1
        self._close()

    def stop(self) -> None:
        """At the end of the run."""
        self.result = self.encoder
        if self._master is not None:
            self._master.close()
            self._close()

    def has_mail(self) -> None:
        """Something was published for it."""
        now = self._world.clock.now()
        if self._master is not None and self._due > now:
            self._next(now)

    @property
    def encoder(self) -> EncoderState | None:
        """The one encoder that is trained, as the log has it; None while the master is away or has none yet."""
        master = self._master
        return next(iter(master.state.encoders.values()), None) if master is not None else None

    def report(self) -> Report:
        """What `status` would show. Only while it is there."""
        assert self._master is not None
        return self._master.report()

    def _turn(self) -> None:
        master, broker = self._master, self._broker
        if master is None or broker is None or self._world.clock.now() < self._due:
            return  # killed meanwhile, or it had this turn already
        self.turns += 1
        wait = master.look()
        while broker.deliver():
            while self._arrived:
                delivery = self._arrived.popleft()
                master.hear(delivery, more=bool(self._arrived))
            wait = master.look()
        self._next(self._world.clock.now() + wait)

    def _next(self, due: float) -> None:
        self._due = due
        self._world.at(due, self._turn)

    def _close(self) -> None:
        assert self._master is not None and self._broker is not None
        self.stream_chunks += self._broker.stream_chunks
        self._broker.close()
        self._master.journal.close()
        self._master = self._broker = None
