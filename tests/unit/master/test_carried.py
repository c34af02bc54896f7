"""Small updates, which travel in their manifests: decided on, logged and answered like those that come in chunks."""

from __future__ import annotations

from typing import Any

import pytest

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.wire.fields import INLINE_BYTES
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt, Resend
from node_service.handover.local_state import LocalState
from node_service.handover.outbox import Outbox
from node_service.handover.store import MemoryStore
from tests.builders import update_manifest
from tests.unit.master.test_one_member import BODIES, federation
from tests.unit.stepped import TOPOLOGY, chunk_bytes, connection

#: What a member sends one after the other: sequence, and what is unusual of it.
SENT: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (1, {"digest": "0" * 64}),
    (2, {"layout_digest": "0" * 64, "layout": [("w", [3])]}),
    (3, {"encoder": "text-77"}),
    (4, {"base_version": 99}),
    (5, {"size": 127}),
    (0, {"attempt": 1}),  # a duplicate
    (6, {"incarnation": "another"}),
    (7, {}),
]


def told(server: MemoryServer, clock: VirtualClock, *, whole: bool) -> tuple[list[Any], list[Any], int]:
    """What the member hears, the rows of its updates, and how many bytes are left in its chunk queue."""
    master, [member] = federation(server, clock, "a")
    for sequence, changes in SENT:
        manifest = member.manifest(sequence, **changes)
        if whole:
            member.send(manifest.model_copy(update={"data": BODIES[0]}), chunks=False)
        else:
            member.send(manifest)
        master.run(3.0)
    heard = [each for each in member.heard() if isinstance(each, Receipt | Resend)]
    rows = [
        (entry.body, entry.payload, entry.facts)
        for entry in master.journal.log.entries(-1)
        if isinstance(entry.body, UpdateManifest)
    ]
    return heard, rows, len(chunk_bytes(server, "a"))


def test_the_log_does_not_tell_how_an_update_came(clock: VirtualClock) -> None:
    chunked = told(MemoryServer(clock.now), VirtualClock(1000.0), whole=False)
    carried = told(MemoryServer(clock.now), VirtualClock(1000.0), whole=True)
    assert carried[:2] == chunked[:2]
    assert carried[2] == 0
    reasons = [each.reason for each in carried[0] if isinstance(each, Receipt)]
    assert {"", "digest", "layout", "future", "size"} <= set(reasons)
    assert sum(each.accepted for each in carried[0] if isinstance(each, Receipt)) == 3
    assert all(body.data is None for body, _, _ in carried[1])


def test_more_than_a_manifest_may_carry_is_set_aside(server: MemoryServer, clock: VirtualClock) -> None:
    master, [member] = federation(server, clock, "a")
    for size, poison in ((INLINE_BYTES, 0), (INLINE_BYTES + 1, 1)):
        member.send(member.manifest(0, size=size).model_copy(update={"data": bytes(size)}), chunks=False)
        master.run(1.0)
        assert master.master.live.poison == poison


@pytest.mark.parametrize(("size", "messages"), [(1, 1), (INLINE_BYTES, 1), (INLINE_BYTES + 1, 2)])
def test_a_small_update_is_one_message(server: MemoryServer, size: int, messages: int) -> None:
    state = LocalState(MemoryStore(), "n")
    broker, master = connection(server, "n"), connection(server, "master")
    master.declare(TOPOLOGY.master())
    broker.declare(TOPOLOGY.node("n", ("text",)))
    outbox = Outbox(broker, TOPOLOGY, "n", state.chunk)
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    manifest = update_manifest("n", 0, bodies=[payload], encoding="float32", incarnation=state.identity.incarnation)
    state.owe(manifest, payload)
    outbox.update(manifest)
    assert sum(iter(outbox.flush_one, False)) == messages
    assert chunk_bytes(server, "n") == ([size] if messages == 2 else [])
    came: list[Any] = []
    master.consume(TOPOLOGY.master_updates, came.append, prefetch=5)
    while master.deliver():
        pass
    [delivery] = came
    assert (payload in delivery.body) is (messages == 1)


def test_nothing_is_sent_of_an_update_that_is_answered_meanwhile(server: MemoryServer) -> None:
    state = LocalState(MemoryStore(), "n")
    broker = connection(server, "n")
    broker.declare(TOPOLOGY.master())
    outbox = Outbox(broker, TOPOLOGY, "n", state.chunk)
    manifest = update_manifest("n", 0, bodies=[b"1234"], incarnation=state.identity.incarnation)
    state.owe(manifest, b"1234")
    outbox.update(manifest)
    state.answered(0)
    assert outbox.flush_one() and outbox.empty
    queue = server.find(TOPOLOGY.master_updates)
    assert queue is not None and not queue.ready
