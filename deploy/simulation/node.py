"""A node of a simulation: a real Node, stepped by events. What a service does in threads is a chain of events here: the
node works, its line up flushes the outbox, its line down brings deliveries and versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common.wire.broker import Delivery
from common.wire.to_node import Receipt
from deploy.simulation.world import Connection, Ids, World
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.handover.local_state import LocalState
from node_service.handover.outbox import Outbox
from node_service.handover.reading import AssetRead, VersionRead
from node_service.handover.receipt_book import RECEIPTS
from node_service.handover.sent import noting
from node_service.handover.store import MemoryStore
from node_service.node import Node
from node_service.trials import Build

#: As the threads of a node have it, seconds: between two attempts to send, and between two looks for a version.
_RETRY_SECONDS = 1.0
_READ_SECONDS = 0.25
#: What comes over the line within so long is taken together, seconds: how long a reader waits for a newer version.
_BATCH_SECONDS = 0.02


class SimulatedNode:
    """One node: its store, checkpoints and ids outlive it. `returning`: it is away and comes back."""

    def __init__(
        self,
        world: World,
        name: str,
        config: NodeConfig,
        corpora: Mapping[str, Corpus],
        build: Build,
        *,
        speed: float,
    ) -> None:
        """`build` makes its training; `speed`, in steps a second, is for whoever looks at it."""
        self.name = name
        self.speed = speed
        self.returning = False
        #: How often it was killed and how often it left.
        self.killed = self.left = 0
        #: Versions that it read, and bytes that it sent and received, over all its connections.
        self.versions_read = self.bytes_up = self.bytes_down = 0
        self._world = world
        self._config = config
        self._corpora = corpora
        self._build = build
        self._store = MemoryStore()
        self._ids = Ids(world.seed, self.name)
        self._process: _Process | None = None

    @property
    def up(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """As it was when it was last there. What it could not send before it left is sent now."""
        self.stop()
        self.returning = False
        state = LocalState(self._store, self.name, new_incarnation=self._ids.incarnation)
        self._process = _Process(self, self._world, self._config, state, self._corpora, self._build, self._ids)

    def kill(self) -> None:
        """Without goodbye: what is in memory is gone. Nothing happens to one that is not there."""
        if self._process is not None:
            self.killed, self.returning = self.killed + 1, True
            self._process.close()

    def leave(self) -> None:
        """Hand in, say goodbye, and go once that has left."""
        if self._process is not None:
            self.left, self.returning = self.left + 1, True
            self._process.leave()

    def gone(self, bytes_up: int, bytes_down: int) -> None:
        """Its process has ended."""
        self.bytes_up, self.bytes_down = self.bytes_up + bytes_up, self.bytes_down + bytes_down
        self._process = None

    def stop(self) -> None:
        """End its process, if there is one, wherever it is."""
        if self._process is not None:
            self._process.close()

    @property
    def at_rest(self) -> bool:
        """Whether nothing more happens to it once the training has ended."""
        if self._process is None:
            return not self.returning
        return self._process.at_rest

    def receipts(self) -> list[Receipt]:
        """Every receipt that it has had, in order."""
        lines = (self._store.read(RECEIPTS) or b"").splitlines()
        return [Receipt.model_validate_json(line) for line in lines]

    def owed(self) -> int:
        """How many of its updates have no answer."""
        return sum(name.endswith(".json") for name in self._store.names("owed"))


class _Process:
    """A node's process, from its start to its end: events of it that come later find it closed."""

    def __init__(
        self,
        owner: SimulatedNode,
        world: World,
        config: NodeConfig,
        state: LocalState,
        corpora: Mapping[str, Corpus],
        build: Build,
        ids: Ids,
    ) -> None:
        self._owner = owner
        self._world = world
        self._broker = Connection(world, owner.name)
        outbox = Outbox(
            self._broker,
            world.topology,
            owner.name,
            state.chunk,
            new_id=ids.message,
            on_leaving=noting(config.sent_file, world.clock),
        )
        self._node = Node(
            owner.name,
            config,
            corpora,
            self._broker,
            world.topology,
            state,
            build,
            outbox,
            clock=world.clock,
        )
        #: On the line down, and here but not looked at.
        self._coming: list[Delivery] = []
        self._here: list[Delivery | VersionRead | AssetRead] = []
        self._closed = self._leaving = self._idle = False
        self._line_up = self._line_down = False
        self._due = world.clock.now()
        self._node.start()
        for queue in (world.topology.node_inbox(owner.name), world.topology.pulse_queue(owner.name)):
            self._broker.consume(queue, self._coming.append, prefetch=32)
        self._work_at(self._due)

    @property
    def at_rest(self) -> bool:
        node = self._node
        done = node.finished or node.training is None
        return done and not node.state.owed and node.outbox.empty and not self._leaving

    def leave(self) -> None:
        self._leaving = True
        self._hear()
        self._node.goodbye()
        self._begin_lines()

    def close(self) -> None:
        self._closed = True
        self._broker.close()
        self._owner.gone(self._broker.bytes_out, self._broker.bytes_in)

    # --- working -----------------------------------------------------------------------------------------------------

    def _work_at(self, due: float) -> None:
        self._due = due
        self._world.at(due, self._work)

    def _work(self) -> None:
        """What has come is heard between two steps of training, as in a service."""
        now = self._world.clock.now()
        if self._closed or self._leaving or now < self._due:
            return
        self._hear()
        before = self._steps
        wait = self._node.work()
        self._idle = self._steps == before
        self._begin_lines()
        self._work_at(now + wait)

    def _hear(self) -> None:
        here, self._here = self._here, []
        for event in here:
            if isinstance(event, Delivery):
                self._node.hear(event)
            else:
                self._node.was_read(event)

    @property
    def _steps(self) -> int:
        return self._node.training.steps if self._node.training is not None else 0

    # --- the line ----------------------------------------------------------------------------------------------------

    def _begin_lines(self) -> None:
        """Go on with what there is to send and to receive."""
        if not self._line_up and not self._node.outbox.empty:
            self._up()
        if not self._line_down and not self._leaving:
            self._down()

    def _up(self) -> None:
        """Publish the next part of what waits; the one after it leaves when this one is over the line."""
        self._line_up = False
        if self._closed:
            return
        outbox, before = self._node.outbox, self._broker.bytes_out
        sent = outbox.flush_one()
        size = self._broker.bytes_out - before
        if size:
            self._world.master_has_mail()
        if sent or outbox.problem:
            self._line_up = True
            self._after(size / self._world.link if sent else _RETRY_SECONDS, self._up)
        elif self._leaving:
            self.close()

    def _down(self) -> None:
        """Take what has come over the line since the last time; then what the broker has for it is on its way."""
        self._line_down = False
        if self._closed or self._leaving:
            return
        self._here += self._coming
        self._coming.clear()
        reading, link = self._node.reading, self._world.link
        if reading.busy and (read := reading.read_one()) is not None:
            self._here.append(read)
            self._owner.versions_read += isinstance(read, VersionRead) and read.version is not None
        before = self._broker.bytes_in
        while self._broker.deliver() and self._broker.bytes_in - before < _BATCH_SECONDS * link:
            pass
        size = self._broker.bytes_in - before
        if size or reading.busy:
            self._line_down = True
            self._after(size / link if size else _READ_SECONDS, self._down)
        if self._here and self._idle and self._due > self._world.clock.now():
            self._work_at(self._world.clock.now())

    def _after(self, seconds: float, what: Callable[[], None]) -> None:
        self._world.at(self._world.clock.now() + seconds, what)
