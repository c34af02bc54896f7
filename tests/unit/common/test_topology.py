"""The names, keys and bounds that every party must agree on: the table of the design, spelt out."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from common.brokers.amqp.arguments import queue_arguments
from common.wire.to_master import Get
from common.wire.topology import Declarations, Queue, Topology, note_of

TOPOLOGY = Topology("ns")


def bound(declarations: Declarations) -> set[tuple[str, str, str]]:
    return {(binding.exchange, binding.routing_key, binding.queue) for binding in declarations.bindings}


def test_who_gets_what() -> None:
    dead = {("ns.dead-letters", "#", "ns.dead-letters")}
    assert bound(TOPOLOGY.master()) - dead == {
        ("ns.ack", "*", "ns.master.inbox"),
        ("ns.request", "*.*", "ns.master.inbox"),
        ("ns.update", "*.ready", "ns.master.updates"),
    }
    assert bound(TOPOLOGY.node("n", ("text", "image"))) - dead == {
        ("ns.instruction", "text", "ns.node.n.inbox"),
        ("ns.instruction", "image", "ns.node.n.inbox"),
        ("ns.rule", "n", "ns.node.n.inbox"),
        ("ns.receipt", "n", "ns.node.n.inbox"),
        ("ns.update", "n.chunk", "ns.update.n"),
        ("ns.instruction", "_pulse", "ns.node.n.pulse"),
    }
    assert bound(TOPOLOGY.observer("o")) - dead == {("ns.receipt", "o", "ns.node.o.inbox")}
    assert bound(TOPOLOGY.parameters("text-1", 5)) == {("ns.parameter", "text-1", "ns.parameters.text-1")}
    assert bound(TOPOLOGY.assets("text-1", 5)) == {("ns.asset", "text-1", "ns.assets.text-1")}
    assert {exchange.kind for exchange in TOPOLOGY.exchanges().exchanges} == {"topic"}
    everything = (TOPOLOGY.master(), TOPOLOGY.node("n", ("text",)), TOPOLOGY.observer("o"))
    for declarations in everything:  # nobody binds what it has not declared
        queues, exchanges = ({item.name for item in items} for items in (declarations.queues, declarations.exchanges))
        assert all(b.queue in queues and b.exchange in exchanges for b in declarations.bindings)


def test_each_queue_loses_nothing_that_it_must_not_lose() -> None:
    queues = {queue.name: queue for queue in (TOPOLOGY.master() + TOPOLOGY.node("n", ())).queues}
    for fifo in ("ns.master.inbox", "ns.master.updates"):
        assert (queues[fifo].kind, queues[fifo].max_bytes, queues[fifo].expires) == ("quorum", None, None)
    inbox = queues["ns.node.n.inbox"]
    assert inbox.kind == "quorum" and inbox.expires, "an inbox may expire: a join makes the master restate everything"
    chunks = queues["ns.update.n"]
    assert (chunks.kind, chunks.overflow, chunks.expires) == ("classic", "reject-publish", None) and chunks.max_bytes
    pulses = queues[TOPOLOGY.pulse_queue("n")]  # F13: signs of life, which nothing else may be held up by
    assert (pulses.kind, pulses.max_bytes, pulses.overflow) == ("classic", 4096, "drop-head") and pulses.expires
    with pytest.raises(ValidationError):
        Get(sender="x", encoder_type=TOPOLOGY.pulse_key)  # so that no encoder type is heard as the master's life
    dead = queues["ns.dead-letters"]
    assert (dead.kind, dead.overflow) == ("classic", "drop-head") and dead.max_bytes
    for size in (1, 100 << 20):  # at least four versions, in segments of about one and never below 16 MiB
        [stream] = TOPOLOGY.parameters("e", size).queues
        assert stream.kind == "stream" and stream.segment_bytes == max(size, 16 << 20)
        assert stream.max_bytes is not None and stream.max_bytes >= 4 * stream.segment_bytes


def test_with_accounts_of_their_own_parties_declare_what_is_theirs() -> None:
    topology = Topology("ns", own_accounts=True)
    node = topology.node("n", ("text",))
    assert node.made and not node.exchanges and not node.bindings
    names = ["ns.node.n.inbox", "ns.update.n", "ns.node.n.pulse"]
    assert [queue.name for queue in node.queues] == names == [queue.name for queue in TOPOLOGY.node("n", ()).queues][1:]
    made = topology.node_queues("n", ("text",))
    assert not any(queue.expires for queue in made.queues), "their node could not make them again"
    assert bound(made) == bound(TOPOLOGY.node("n", ("text",))) - {("ns.dead-letters", "#", "ns.dead-letters")}
    assert topology.observer("o").exchanges == () and bound(topology.observer("o")) == {
        ("ns.receipt", "o", "ns.node.o.inbox")
    }
    assert topology.master() == TOPOLOGY.master()
    note = note_of(topology.node_lock("n"), topology.lock)
    assert bound(note) == {("ns.lock", "ns.node.n.lock", "ns.node.n.lock.holder")} and note.queues[0].max_length == 1


def test_over_a_cluster_nothing_is_kept_on_one_server_alone() -> None:
    alone, kept = everything(TOPOLOGY), everything(Topology("ns", replicas=3))
    for queue in kept:
        arguments = queue_arguments(queue, (3, 10, 8))
        stream = queue.name.startswith(("ns.parameters", "ns.assets"))
        assert arguments["x-queue-type"] == ("stream" if stream else "quorum"), queue
        assert arguments["x-initial-cluster-size" if stream else "x-quorum-initial-group-size"] == 3
    limits = [[(each.name, each.max_bytes, each.overflow, each.expires) for each in queues] for queues in (alone, kept)]
    assert limits[0] == limits[1]
    # queues that are there already are declared as ever: RabbitMQ refuses other arguments
    given = {name for queue in alone for name in queue_arguments(queue, ())}
    assert not given & {"x-initial-cluster-size", "x-quorum-initial-group-size"}


def everything(topology: Topology) -> tuple[Queue, ...]:
    declared = topology.master() + topology.node("n", ("text",))
    return (declared + topology.parameters("e", 100) + topology.assets("e", 100)).queues
