"""The embedded broker's bindings: what a publish costs does not grow with the queues that other keys lead to."""

from __future__ import annotations

import pytest

import common.brokers.memory
from common.brokers.memory import MemoryBroker, MemoryServer
from common.wire.broker import Publication
from common.wire.topology import Topology


def test_a_publish_looks_at_no_binding_of_another_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a federation of many nodes costs the broker their square."""
    topology, server, looked = Topology("t"), MemoryServer(), []
    broker = MemoryBroker(server, user="u", dead_letters=topology.dead_letters, threaded=False)
    for index in range(50):
        broker.declare(topology.node(f"n{index}", ("text",)))
    real = common.brokers.memory.matches
    monkeypatch.setattr(common.brokers.memory, "matches", lambda *words: looked.append(words) or real(*words))
    broker.publish(Publication(topology.receipt, "n7", b"for one"))
    broker.publish(Publication(topology.instruction, "text", b"for all"))
    assert len(looked) == 0
    ready = [index for index in range(50) if server.queue(topology.node_inbox(f"n{index}")).bytes > 7]
    assert ready == [7] and all(server.queue(topology.node_inbox(f"n{index}")).bytes >= 7 for index in range(50))
