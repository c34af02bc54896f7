"""The shipped Master, stepped by hand under a virtual clock: slow lines, signs of life, and one story in its events."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
import structlog
import torch

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.numbers.encodings import encode_vector
from common.numbers.layout import Layout
from common.numbers.slicing import SLICE, slice_bytes
from common.wire.base import Message
from common.wire.broker import Publication
from common.wire.codec import encode
from common.wire.to_master import Get, InstructionAck, Join, UpdateManifest, Words
from common.wire.to_node import Answer, Pulse, Receipt, Resend
from common.wire.topology import MIB
from common.wire.transfer import payload_digest, update_chunk
from common.wire.update_rule import ReturnWhen, UpdateRule
from common.wire.versions import publish_version
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.log.message_log import MessageLog
from node_service.handover.reading import Reading, VersionRead
from tests.unit.stepped import (
    TOPOLOGY,
    SlowBroker,
    SteppedMaster,
    SteppedNode,
    chunk_bytes,
    connection,
    instruction,
    sent_to,
    together,
)

#: Bytes a second.
SLOW = 100_000
#: Eight chunks of 4 MiB: six minutes on the slow line, one chunk alone 42 s.
CHUNKS = 8
LARGE = Layout([("w", (CHUNKS, SLICE))])
TURN = 0.25


class Sender:
    """A member that sends one large update."""

    def __init__(self, server: MemoryServer, master: SteppedMaster, carry: Any) -> None:
        self.broker = connection(server, "a")
        self.broker.declare(TOPOLOGY.node("a", ("text",)))
        self.say(TOPOLOGY.request, "a.join", Join(node="a", incarnation="i", types=["text"]))
        carry(1.0)
        [self.encoder] = master.master.state.encoders
        ack = InstructionAck(node="a", incarnation="i", encoder=self.encoder, accepted=True, samples=5)
        self.say(TOPOLOGY.ack, "a", ack)
        carry(1.0)
        self.bodies = encode_vector(torch.ones(LARGE.size), "float32")
        self.manifest = UpdateManifest(
            node="a",
            incarnation="i",
            encoder=self.encoder,
            sequence=0,
            base_version=0,
            steps=1,
            samples=1,
            seconds=1.0,
            loss=1.0,
            encoding="float32",
            layout_digest=LARGE.digest,
            size=sum(map(len, self.bodies)),
            chunks=len(self.bodies),
            digest=payload_digest(self.bodies),
        )
        assert len(self.bodies) == CHUNKS and len(self.bodies[0]) == slice_bytes("float32") == 4 * MIB

    def say(self, exchange: str, key: str, message: Message) -> None:
        self.broker.publish(Publication(exchange, key, encode(message)))

    def send(self, chunks: int) -> None:
        """The first so many chunks, and the manifest as if all of them had been confirmed."""
        for index in range(chunks):
            self.say(TOPOLOGY.update, "a.chunk", update_chunk(self.manifest, index, self.bodies[index]))
        self.say(TOPOLOGY.update, "a.ready", self.manifest)


def slow_master(server: MemoryServer, clock: VirtualClock, **more: Any) -> tuple[SteppedMaster, Any]:
    broker = SlowBroker(server, "master", SLOW)
    master = SteppedMaster(server, clock, broker=broker, layout=LARGE, **more).start()

    def carry(seconds: float) -> None:
        until = clock.monotonic() + seconds
        while clock.monotonic() < until:
            broker.carry(TURN)
            master.turn()
            clock.wait(TURN)

    return master, carry


def test_f6_an_update_of_any_size_gets_through_on_a_slow_line(server: MemoryServer, clock: VirtualClock) -> None:
    inbox = sent_to(server, "a")
    master, carry = slow_master(server, clock)
    sender = Sender(server, master, carry)
    sender.send(CHUNKS)
    began, answers = clock.monotonic(), []
    while not answers:
        carry(5.0)
        answers = [each for each in inbox() if isinstance(each, Receipt | Resend)]
        assert clock.monotonic() - began < 600.0
    [receipt] = answers
    assert isinstance(receipt, Receipt) and receipt.accepted, "it was never asked for again"
    assert clock.monotonic() - began > CHUNKS * 4 * MIB / SLOW > 20 * master.master.config.chunk_timeout_seconds


@pytest.mark.parametrize("size", [1, 2])
def test_the_chunks_of_an_update_that_is_decided_on_are_gone(
    server: MemoryServer, clock: VirtualClock, size: int
) -> None:
    """Given back, they would come once more before those of the node's next update. `size`: updates of a version."""
    settings = Settings(
        rule=aggregation_rule("fedbuff", {"buffer": {"size": size}}),
        update_rule=UpdateRule(when=ReturnWhen(steps=4), encoding="float32"),
        stop=StopRule(versions=1000),
    )
    master, carry = slow_master(server, clock, settings=settings)
    sender = Sender(server, master, carry)
    sender.send(CHUNKS)
    encoder = master.master.state.encoders[sender.encoder]
    while not (encoder.buffer or encoder.version):
        carry(5.0)
    assert chunk_bytes(server, "a") == []


def test_f6_a_sender_whose_chunks_stay_away_is_told_how_many_came(server: MemoryServer, clock: VirtualClock) -> None:
    inbox = sent_to(server, "a")
    master, carry = slow_master(server, clock)
    sender = Sender(server, master, carry)
    sender.send(3)
    carry(3 * 43.0)
    assert not [each for each in inbox() if isinstance(each, Resend)], "as long as more comes, it is waited for"
    carry(50.0)
    assert not [each for each in inbox() if isinstance(each, Resend)], "the next one alone takes that long"
    carry(15.0)
    [resend] = [each for each in inbox() if isinstance(each, Resend)]
    assert (resend.sequence, resend.attempt) == (0, 1)
    assert resend.detail == "3 of 8 chunks came, and then none for a while"


def test_f6_a_version_of_any_size_is_read_on_a_slow_line(server: MemoryServer, clock: VirtualClock) -> None:
    master = connection(server, "master")
    write_version(master, clock, 1)
    line = SlowBroker(server, "a", SLOW)
    reading = Reading(line, TOPOLOGY, clock)
    reading.read(instruction("e", LARGE), 1, 0.0, exact=False)
    began = clock.monotonic()
    read = outcome(reading, line, clock)
    assert read.version is not None and read.version.version == 1 and len(read.version.payload) == CHUNKS * 4 * MIB
    assert clock.monotonic() - began > CHUNKS * 4 * MIB / SLOW


def test_f6_a_version_that_stops_coming_is_asked_for_soon_after_its_last_chunk(
    server: MemoryServer, clock: VirtualClock
) -> None:
    master = connection(server, "master")
    write_version(master, clock, 1, chunks=3)
    line = SlowBroker(server, "a", SLOW)
    reading = Reading(line, TOPOLOGY, clock)
    reading.read(instruction("e", LARGE), 1, 0.0, exact=False)
    began = clock.monotonic()
    read = outcome(reading, line, clock)
    assert read.version is None and "version 1 of e did not come" in read.problem
    last = 3 * 4 * MIB / SLOW
    assert last < clock.monotonic() - began < last + 60.0


def write_version(broker: Any, clock: VirtualClock, number: int, chunks: int = CHUNKS) -> None:
    """A version, or, with fewer chunks, what a master that died while it wrote leaves of it."""

    class Dying:
        """A broker that takes the first so many."""

        left = chunks

        def declare(self, declarations: Any) -> None:
            broker.declare(TOPOLOGY.exchanges())
            broker.declare(declarations)

        def publish(self, *publications: Publication) -> None:
            broker.publish(*publications[: self.left])
            self.left -= min(self.left, len(publications))

    publish_version(
        Dying(),  # type: ignore[arg-type]  # of a broker, only what is used to write
        TOPOLOGY,
        encoder="e",
        epoch=1,
        version=number,
        encoding="float32",
        layout_digest=LARGE.digest,
        bodies=encode_vector(torch.ones(LARGE.size), "float32"),
        progress=0.0,
        clock=clock,
    )


def outcome(reading: Reading, line: SlowBroker, clock: VirtualClock) -> VersionRead:
    for _ in range(10_000):
        if (read := reading.read_one()) is not None:
            return read
        line.carry(TURN)
        clock.wait(TURN)
    raise AssertionError("nothing came of it")


# --- signs of life ---------------------------------------------------------------------------------------------------


def test_f13_the_master_gives_a_sign_of_life_every_ten_seconds(server: MemoryServer, clock: VirtualClock) -> None:
    from common.wire.codec import decode

    broker = connection(server, "a")
    broker.declare(TOPOLOGY.node("a", ("text",)))
    heard: list[Message] = []
    broker.consume(TOPOLOGY.pulse_queue("a"), lambda each: heard.append(decode(each.body)), prefetch=100)
    master = SteppedMaster(server, clock).start()
    master.run(60.0)
    while broker.deliver():
        pass
    pulses = [each for each in heard if isinstance(each, Pulse)]
    assert [each.at - 1000.0 for each in pulses] == [pytest.approx(10.0 * number, abs=0.6) for number in range(6)]
    assert {each.epoch for each in pulses} == {master.master.state.epoch}


def test_f13_every_step_that_was_trained_while_the_master_was_away_is_counted_once(
    server: MemoryServer, clock: VirtualClock
) -> None:
    node = SteppedNode(server, clock, away_after_seconds=20.0)
    master = SteppedMaster(server, clock).start()
    node.start()
    together(20.0, master, node)
    [encoder] = master.master.state.encoders.values()
    assert encoder.updates > 2
    before = node.training.steps
    node.run(300.0)  # alone
    assert node.training.steps > before + 200
    returns = encoder.members["a"].returns
    together(10.0, master, node)
    node.node.goodbye()
    node.flush()
    master.run(1.0)
    assert encoder.members["a"].steps == node.training.steps, "every step, and each once"
    assert encoder.members["a"].returns - returns <= 10, "what it trained alone came as one update"
    largest = max(entry.body.steps for entry in master.journal.log.entries() if isinstance(entry.body, UpdateManifest))
    assert largest > 200


# --- the end of a stream ----------------------------------------------------------------------------------------------


def test_words_that_cannot_count_are_answered_without_a_row(server: MemoryServer, clock: VirtualClock) -> None:
    inbox, broker = sent_to(server, "a"), connection(server, "a")
    master = SteppedMaster(server, clock).start()
    [encoder] = master.master.state.encoders

    def say(message: Message, key: str) -> int:
        broker.publish(Publication(TOPOLOGY.request, f"a.{key}", encode(message), message_id=f"{key}-{len(inbox())}"))
        master.turn()
        return len([*master.journal.log.rows()])

    rows = len([*master.journal.log.rows()])
    words = Words(node="a", incarnation="i", encoder=encoder, documents=9, words=[("fever", 5)])
    assert say(words, "words") == rows
    assert [each.kind for each in inbox()] == ["introduce"], "a stranger says them again once it has joined"
    assert say(Join(node="a", incarnation="i", types=["text"]), "join") == rows + 1
    inbox()
    assert say(words, "words") == rows + 1 and inbox() == [], "no words are gathered"
    assert not server.queue(TOPOLOGY.master_inbox).ready and not server.queue(TOPOLOGY.dead_letters).ready


def test_f8_a_stream_goes_when_every_node_has_the_last_version_and_is_made_anew_for_who_comes_later(
    server: MemoryServer, clock: VirtualClock
) -> None:
    settings = Settings(
        rule=aggregation_rule("fedasync"),
        update_rule=UpdateRule(when=ReturnWhen(steps=4), encoding="float32"),
        stop=StopRule(updates=6),
    )
    master = SteppedMaster(server, clock, settings=settings).start()
    node = SteppedNode(server, clock).start()
    together(20.0, master, node)
    [encoder] = master.master.state.encoders.values()
    stream = TOPOLOGY.stream(encoder.encoder)
    assert encoder.status == "finished" and node.node.finished
    assert server.find(stream) is not None, "somebody may just be asking for what was published last"
    together(40.0, master, node)
    assert server.find(stream) is None
    # who comes later gets the encoder from the registry, over a fresh stream, which goes after an hour at the latest
    asker = sent_to(server, "late")
    connection(server, "late").publish(
        Publication(TOPOLOGY.request, "late.get", encode(Get(sender="late", encoder_type="text")), message_id="1")
    )
    together(5.0, master, node)
    [answer] = [message for message in asker() if isinstance(message, Answer)]
    assert answer.status == "finished" and answer.version == encoder.version
    assert server.find(stream) is not None
    clock.wait(3600.0)
    together(5.0, master, node)
    assert server.find(stream) is None


# --- events ----------------------------------------------------------------------------------------------------------


def test_f15_every_update_that_is_handed_in_is_heard_of_on_both_sides(
    server: MemoryServer, clock: VirtualClock
) -> None:
    node, master = SteppedNode(server, clock), SteppedMaster(server, clock).start()
    with structlog.testing.capture_logs() as logs:
        node.start()
        together(30.0, master, node)
        node.node.goodbye()
        node.flush()
        master.run(1.0)
        node.turn()
    handed_in = [each["update"] for each in logs if each["event"] == "update handed in"]
    assert len(handed_in) > 3
    for what, who in (("update received", 1), ("update counted", 2)):
        told = [each["update"] for each in logs if each["event"] == what]
        assert sorted(told) == sorted(handed_in * who), f"{what}: by the master, and its receipt by the node"


# --- a disk that fills up --------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_when_a_snapshot_is_due_makes_the_master_wait_and_go_on(
    server: MemoryServer, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of this look are not durable yet: there is nothing to write a snapshot of, and nothing to die of."""
    node, master = SteppedNode(server, clock).start(), SteppedMaster(server, clock).start()
    together(10.0, master, node)
    clock.wait(200.0)  # the node is missed, and a snapshot is due
    before, row = master.journal.fold.offset, master.journal.log.last_offset

    def full(log: MessageLog) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MessageLog, "commit", full)
        master.master.look()
    assert "full" in master.master.recorder.blocked and master.journal.fold.offset > before
    assert not master.master.state.nodes["a"].present, "it is known here"
    master.run(2.0)
    assert not master.master.recorder.blocked and master.journal.log.last_offset > row
    assert master.journal.log.uncommitted == 0 and master.journal.log.count("presence") == 1
