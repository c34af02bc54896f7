"""A federation that strangers write to: a master and two nodes as they are shipped, stepped by hand over the memory
broker, with the ledger in a file. Where each party has an account of its own, the strangers are one member with one.

Also what is looked at meanwhile: that nobody dies, what is set aside and why, what of it stays in memory and on the
disk."""

from __future__ import annotations

import gc
import os
import sqlite3
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.errors import AccessRefused, PoisonReason, PublishRejected, Unroutable
from common.wire.broker import Delivery, Publication
from common.wire.codec import encode
from common.wire.to_master import Get
from common.wire.topology import Binding, Declarations, Queue
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.log.payload_files import FilePayloads
from tests.unit.stepped import ACCOUNTS, TOPOLOGY, SteppedMaster, SteppedNode, account, connection

#: Time that passes between two batches, seconds, and messages of strangers in one.
_TURN_SECONDS = 0.5
_AT_ONCE = 40
#: In which a federation has to be itself again.
_MINUTES = 10

MEMBERS = ("master", "a", "b")
#: Whose account strangers write with, where they need one; and who asks for encoders.
HOSTILE, OPERATOR = "c", "alice"
#: A copy of everything that is sent.
PASSING = Queue("passing", "classic", max_bytes=1 << 20, overflow="drop-head")


def _everything() -> Iterable[Binding]:
    topology = TOPOLOGY
    for exchange in (topology.request, topology.ack, topology.update, topology.rule, topology.receipt):
        yield Binding(exchange, PASSING.name, "#")
    for exchange in (topology.instruction, topology.parameter):
        yield Binding(exchange, PASSING.name, "#")


class World:
    """`feed` lets strangers send, and everybody take it in. Whatever is raised there is a death."""

    def __init__(self, directory: Path, *, accounts: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        topology = ACCOUNTS if accounts else TOPOLOGY
        self.clock = VirtualClock(1000.0)
        self.server = MemoryServer(self.clock.now)
        self._ledger = directory / "ledger.sqlite"
        db = sqlite3.connect(self._ledger, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        settings = Settings(
            rule=aggregation_rule("fedasync"),
            update_rule=UpdateRule(when=ReturnWhen(steps=4), encoding="float32"),
            stop=StopRule(versions=1 << 40),
        )
        payloads = FilePayloads(directory / "payloads", lasting=False)
        self._looker = connection(self.server, "looker")
        self._letters: deque[Delivery] = deque()
        self._passing: deque[Delivery] = deque()
        self._unread: deque[Delivery] = deque()
        for name in (*MEMBERS[1:], HOSTILE, OPERATOR):  # as whoever gives them accounts does
            self._looker.declare(TOPOLOGY.master() + TOPOLOGY.node(name, ("text",)))
        for name in (HOSTILE, OPERATOR):
            for queue in (TOPOLOGY.node_inbox(name), TOPOLOGY.pulse_queue(name)):
                self._looker.consume(queue, self._unread.append, prefetch=1000)
        masters = account(self.server, "master") if accounts else connection(self.server, "master")
        self._strangers = account(self.server, HOSTILE) if accounts else connection(self.server, HOSTILE)
        self._operator = account(self.server, OPERATOR) if accounts else connection(self.server, OPERATOR)
        self.master = SteppedMaster(
            self.server,
            self.clock,
            payloads=payloads,
            db=db,
            settings=settings,
            broker=masters,
            topology=topology,
            operators=(OPERATOR,),
        ).start()
        self.nodes = [SteppedNode(self.server, self.clock, name, topology=topology).start() for name in MEMBERS[1:]]
        self._looker.consume(TOPOLOGY.dead_letters, self._letters.append, prefetch=1000)
        self._looker.declare(Declarations(queues=(PASSING,), bindings=tuple(_everything())))
        self._looker.consume(PASSING.name, self._passing.append, prefetch=1000)
        self.set_aside: Counter[str] = Counter()
        self.together(10.0)

    def feed(self, publications: Iterable[Publication]) -> None:
        """Each goes where it is sent, if that is anywhere; then everybody has a turn."""
        for publication in publications:
            try:
                self._strangers.publish(publication)
            except (Unroutable, PublishRejected, AccessRefused):
                continue
        if not self.is_training:
            self.ask_for_another()
        self.together(_TURN_SECONDS)

    @property
    def is_training(self) -> bool:
        """Whether the master has an encoder that its nodes can train; strangers may stop one, as anybody may."""
        encoders = self.master.master.state.encoders.values()
        return any(each.encoder_type == "text" and each.status == "running" for each in encoders)

    def ask_for_another(self) -> None:
        """As an operator does."""
        key, get = f"{OPERATOR}.get", Get(sender=OPERATOR, encoder_type="text", fresh=True)
        self._operator.publish(Publication(TOPOLOGY.request, key, encode(get), message_id=f"operator {self.rows}"))

    def goes_on(self) -> int | None:
        """After how many minutes without strangers there is another version; None if there is none in the first few.

        Where accounts are open, nodes take anybody's instructions, and the master anybody's requests: nodes may have to
        put off an encoder or two, half a minute each, until they meet at one.
        """
        before = self.versions
        for minute in range(1, _MINUTES + 1):
            if not self.is_training:
                self.ask_for_another()
            self.together(60.0)
            if self.versions > before:
                return minute
        return None

    def together(self, seconds: float) -> None:
        until = self.clock.monotonic() + seconds
        while self.clock.monotonic() < until:
            self.master.turn()
            for node in self.nodes:
                node.turn()
            self._read_letters()
            self.clock.wait(0.25)

    def passing(self) -> list[Delivery]:
        """What the master and its nodes have sent since this was asked last."""
        while self._looker.deliver():
            pass
        came = list(self._passing)
        self._looker.ack(*came, *self._unread)
        self._passing.clear()
        self._unread.clear()
        return [delivery for delivery in came if (delivery.user_id or "").rpartition(".")[2] in MEMBERS]

    @property
    def encoders(self) -> list[str]:
        return list(self.master.master.state.encoders)

    @property
    def versions(self) -> int:
        """Versions of all encoders so far."""
        return sum(encoder.version for encoder in self.master.master.state.encoders.values())

    @property
    def rows(self) -> int:
        return self.master.journal.log.last_offset + 1

    @property
    def held_bytes(self) -> int:
        """What lies at the broker, which is in this process: streams hold versions up to a bound of their own, and the
        hostile member's chunks wait for manifests that do not come."""
        names = [PASSING.name, *TOPOLOGY.queue_names((*MEMBERS[1:], HOSTILE, OPERATOR), self.encoders)]
        return sum(queue.bytes for name in names if (queue := self.server.find(name)) is not None)

    @property
    def ledger_bytes(self) -> int:
        return self._ledger.stat().st_size

    def _read_letters(self) -> None:
        while self._looker.deliver():
            pass
        reasons = get_args(PoisonReason)
        while self._letters:
            letter = self._letters.popleft()
            assert letter.routing_key in reasons and letter.headers["x-detail"], letter
            assert len(str(letter.headers["x-detail"])) <= 500
            self.set_aside[letter.routing_key] += 1
            self._looker.ack(letter)

    def close(self) -> None:
        self.master.journal.close()


def batches(publications: Iterable[Publication]) -> Iterable[list[Publication]]:
    batch: list[Publication] = []
    for publication in publications:
        batch.append(publication)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def resident_bytes() -> int:
    """Of this process, after a collection."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
