"""One member that means ill, or is broken, and what the others notice of it: nothing. The shipped master in virtual
time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import structlog

from common.brokers.memory import MemoryBroker, MemoryServer, MemorySubscription
from common.clock import VirtualClock
from common.errors import Poison
from common.wire.base import Message
from common.wire.broker import Delivery, OnDelivery, Publication
from common.wire.codec import decode, encode, received
from common.wire.to_master import Alive, Fetch, InstructionAck, Join, Leave, UpdateManifest
from common.wire.to_node import Introduce, Receipt, Resend
from common.wire.topology import Topology
from common.wire.transfer import update_chunk
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.decisions.rates import Rates
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.decisions.turns import LINE_UPDATES
from master_service.wire.inbox import understood
from master_service.wire.pace import Pace, bounded
from tests.builders import update_manifest
from tests.unit.stepped import ACCOUNTS, LAYOUT, TOPOLOGY, SteppedMaster, chunk_bytes, connection

#: An update of the small layout in float32.
BODIES = [bytes(4 * LAYOUT.size)]


class Member:
    """Speaks a node's side by hand."""

    def __init__(self, server: MemoryServer, master: SteppedMaster, name: str) -> None:
        self.name, self.master = name, master
        self.broker = connection(server, name)
        self.broker.declare(TOPOLOGY.node(name, ("text",)))
        self._came: deque[Delivery] = deque()
        self.broker.consume(TOPOLOGY.node_inbox(name), self._came.append, prefetch=1 << 14)
        self.orders = 0
        self.say("join", Join(node=name, incarnation="first", types=["text"]))
        master.run(0.5)
        [self.encoder] = master.master.state.encoders
        self.acknowledge()
        master.run(0.5)

    def say(self, kind: str, message: Message) -> None:
        key, exchange = (f"{self.name}.{kind}", TOPOLOGY.request) if kind else (self.name, TOPOLOGY.ack)
        self.broker.publish(Publication(exchange, key, encode(message), message_id=f"{self.name}-{self.orders}"))
        self.orders += 1

    def acknowledge(self) -> None:
        ack = InstructionAck(node=self.name, incarnation="first", encoder=self.encoder, accepted=True, samples=5)
        self.say("", ack)

    def manifest(self, sequence: int, **changes: Any) -> UpdateManifest:
        self.orders += 1
        plain = {"encoder": self.encoder, "encoding": "float32", "order": self.orders, **changes}
        return update_manifest(self.name, sequence, of=LAYOUT, bodies=BODIES, **plain)

    def send(self, manifest: UpdateManifest, *, chunks: bool = True) -> None:
        for index, body in enumerate(BODIES if chunks else ()):
            chunk = encode(update_chunk(manifest, index, body))
            self.broker.publish(Publication(TOPOLOGY.update, f"{self.name}.chunk", chunk))
        body, name = encode(manifest), f"{manifest.update_id}/{manifest.attempt}"
        self.broker.publish(Publication(TOPOLOGY.update, f"{self.name}.ready", body, message_id=name))

    def heard(self) -> list[Message]:
        """Everything that has come since it was asked last."""
        while self.broker.deliver():
            pass
        found = [decode(delivery.body) for delivery in self._came]
        self.broker.ack(*self._came)
        self._came.clear()
        return found


def federation(
    server: MemoryServer, clock: VirtualClock, *names: str, **changes: Any
) -> tuple[SteppedMaster, list[Member]]:
    guards = {"norm_clip": None, "max_staleness": 10_000}
    rule = aggregation_rule(changes.pop("preset", "fedasync"), {"guards": guards, "buffer": changes.pop("buffer", {})})
    update_rule = UpdateRule(when=ReturnWhen(steps=10), encoding="float32")
    settings = Settings(rule=rule, update_rule=update_rule, stop=StopRule(versions=100_000))
    master = SteppedMaster(server, clock, settings=settings, **changes).start()
    return master, [Member(server, master, name) for name in names]


def longest_wait(
    master: SteppedMaster, good: Member, clock: VirtualClock, meanwhile: Callable[[], None] = lambda: None
) -> float:
    """The longest time to a receipt, seconds, of thirty updates, one a second."""
    longest = 0.0
    for sequence in range(30):
        good.send(good.manifest(sequence))
        sent_at = clock.monotonic()
        meanwhile()
        while not any(isinstance(each, Receipt) and each.accepted for each in good.heard()):
            clock.wait(min(master.turn(), 0.05) or 0.001)
            assert clock.monotonic() < sent_at + 100.0, "never answered"
        longest = max(longest, clock.monotonic() - sent_at)
        master.run(max(0.001, sent_at + 1.0 - clock.monotonic()))
    return longest


def test_manifests_without_chunks_keep_nobody_waiting(server: MemoryServer, clock: VirtualClock) -> None:
    master, [evil, good] = federation(server, clock, "evil", "good")
    for sequence in range(6):
        evil.send(evil.manifest(sequence), chunks=False)
    assert longest_wait(master, good, clock) <= 0.25
    assert any(isinstance(each, Resend) for each in evil.heard()), "it is asked for its own again"


def test_also_where_only_two_updates_fit_and_two_members_keep_theirs_back(
    server: MemoryServer, clock: VirtualClock
) -> None:
    """A stint of one second each, and from then on there is always room beside one of them."""
    master, [evil, worse, good] = federation(server, clock, "evil", "worse", "good", intake_bytes=1)
    for sequence in range(6):
        evil.send(evil.manifest(sequence), chunks=False)
        worse.send(worse.manifest(sequence), chunks=False)
    assert longest_wait(master, good, clock) <= 1.5


@pytest.mark.parametrize("chunks", [True, False])
def test_refused_manifests_keep_nobody_waiting_and_their_chunks_do_not_pile_up(
    server: MemoryServer, clock: VirtualClock, chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(delivery: Delivery, topology: Topology) -> Message:
        read.append(delivery.routing_key)
        return understood(delivery, topology)

    monkeypatch.setattr("master_service.master.understood", counted)
    master, [evil, good] = federation(server, clock, "evil", "good")
    for sequence in range(600):
        evil.send(evil.manifest(sequence, layout_digest="1" * 64), chunks=chunks)
    assert len(chunk_bytes(server, "evil")) == 600 * chunks
    assert longest_wait(master, good, clock) <= 0.25
    assert read.count("evil.ready") < 400, "what is beyond all bounds is not even read"
    evil.send(evil.manifest(600, layout_digest="1" * 64))
    master.run(5.0)
    assert len(chunk_bytes(server, "evil")) == 0
    receipts = [each for each in evil.heard() if isinstance(each, Receipt)]
    assert LINE_UPDATES <= len(receipts) < 600 and {each.reason for each in receipts} == {"layout"}


def test_refused_manifests_are_answered_at_a_rate_and_none_is_lost(server: MemoryServer, clock: VirtualClock) -> None:
    master, [evil, _] = federation(server, clock, "evil", "good", messages_per_second=5.0)
    for sequence in range(60):
        evil.send(evil.manifest(sequence, layout_digest="1" * 64), chunks=False)
    master.turn()
    answered = len(evil.heard())
    assert answered <= 25 + 3
    master.run(10.0)
    assert answered + len(evil.heard()) >= 60


def test_a_flood_of_requests_is_dropped_with_one_warning_and_makes_few_rows(
    server: MemoryServer, clock: VirtualClock
) -> None:
    master, [evil, good] = federation(server, clock, "evil", "good")
    before = master.journal.log.last_offset

    def flood() -> None:
        for _ in range(50):
            evil.say("fetch", Fetch(node="evil", incarnation="first", encoder=evil.encoder, have_version=-1))
            evil.say("alive", Alive(node="evil", incarnation="first"))

    with structlog.testing.capture_logs() as lines:
        assert longest_wait(master, good, clock, flood) <= 0.25
    rows = sum(isinstance(entry.body, Fetch) for entry in master.journal.log.entries(before))
    assert rows <= 100 + 32 * 20
    assert [line["sender"] for line in lines if "sends more than it may" in line["event"]] == ["evil"]
    assert not server.queue(TOPOLOGY.master_inbox).ready


def test_an_answer_and_a_leave_wait_behind_a_flood_and_are_not_lost(server: MemoryServer, clock: VirtualClock) -> None:
    master, [evil, _] = federation(server, clock, "evil", "good")
    for _ in range(500):
        evil.say("alive", Alive(node="evil", incarnation="first"))
    evil.say("leave", Leave(node="evil", incarnation="first"))
    evil.acknowledge()
    for _ in range(500):
        evil.say("alive", Alive(node="evil", incarnation="first"))
    master.turn()
    member = master.master.state.encoders[evil.encoder].members["evil"]
    assert member.accepted, "nothing of it is heard yet"
    master.run(5.0)
    kinds = [entry.body.kind for entry in master.journal.log.entries() if getattr(entry.body, "node", "") == "evil"]
    assert kinds == ["request.join", "ack", "request.leave", "ack"] and member.accepted
    assert not server.queue(TOPOLOGY.master_inbox).ready


def test_who_writes_under_anothers_name_uses_up_no_rate_but_its_own(clock: VirtualClock) -> None:
    pace = Pace(Rates(1.0, 2.0), ACCOUNTS, clock)

    def from_account(party: str, key: str) -> Delivery:
        user = ACCOUNTS.account(party)
        return Delivery("q", ACCOUNTS.request, key, b"", {}, None, user, False, None, None, None)

    forged = [from_account("evil", "a.leave") for _ in range(100)]
    admitted = [pace.admits(each) for each in forged]
    assert admitted == [True] * 2 + [False] * 98
    for each in forged[2:]:
        pace.too_many(each)
    assert pace.admits(from_account("a", "a.alive")) and pace.admits(from_account("a", "a.alive"))
    assert not pace.admits(from_account("a", "a.alive")), "its own rate it has"
    command = f"alice-{8 * 'f'}.get"
    assert pace.payer(from_account("alice", command)) == command.removesuffix(".get")
    assert pace.payer(from_account("", "a.get")) != "a"


def test_what_a_sender_says_later_does_not_overtake_its_leave_that_waits(clock: VirtualClock) -> None:
    pace = Pace(Rates(1.0, 1.0), TOPOLOGY, clock)

    def said(kind: str) -> Delivery:
        return Delivery("q", TOPOLOGY.request, f"a.{kind}", b"", {}, None, None, False, None, None, None)

    assert pace.admits(said("join")) and not pace.admits(said("leave"))
    assert pace.too_many(leave := said("leave")) is None
    clock.wait(1.0)
    assert not pace.admits(said("join")), "there is a token, and it is the leave's"
    assert list(pace.ready()) == [leave]
    clock.wait(1.0)
    assert pace.admits(said("join"))


def test_no_more_of_a_member_waits_for_a_version_than_its_rule_allows(
    server: MemoryServer, clock: VirtualClock
) -> None:
    buffer = {"size": 4, "grace_seconds": 1e6}
    master, [evil, good] = federation(server, clock, "evil", "good", preset="fedbuff", buffer=buffer)
    encoder = master.master.state.encoders[evil.encoder]
    most = master.master.state.settings.update_rule.max_unanswered
    for sequence in range(10):
        evil.send(evil.manifest(sequence))
    master.run(60.0)
    assert encoder.members["evil"].buffered == most == 2 and encoder.updates == most
    assert not evil.heard()[2:], "no receipt, and it is not asked for anything"
    for sequence in range(10):
        good.send(good.manifest(sequence))
        master.run(30.0)
        assert encoder.members["evil"].buffered <= most
    assert encoder.members["good"].returns == 10 and encoder.members["evil"].returns == 10, "what waited is not lost"


def test_of_more_than_fits_the_rest_is_asked_for_later(server: MemoryServer, clock: VirtualClock) -> None:
    master, [evil, _] = federation(server, clock, "evil", "good")
    many = LINE_UPDATES + 40
    sent = [evil.manifest(sequence) for sequence in range(many)]
    for manifest in sent:
        evil.send(manifest)
    while master.broker.deliver():  # all of it is there before the master looks
        pass
    for _ in range(20):
        master.run(1.0)
        for each in evil.heard():
            if isinstance(each, Resend):
                again = sent[each.sequence].model_copy(update={"attempt": each.attempt, "order": evil.orders})
                evil.orders += 1
                evil.send(again)
    assert master.master.state.encoders[evil.encoder].members["evil"].returns == many
    assert not server.queue(TOPOLOGY.master_updates).ready


def test_what_was_dropped_unread_under_a_full_line_is_asked_for_once_there_is_a_place(
    server: MemoryServer, clock: VirtualClock
) -> None:
    """Where accounts are open, others fill a node's line under its name; what it owes must not wait for the time after
    which it sends again by itself."""
    master, [good] = federation(server, clock, "good")
    for sequence in range(1000, 1000 + 5 * LINE_UPDATES):
        good.send(good.manifest(sequence, encoder="made-up"), chunks=False)
    owed = good.manifest(0)
    good.send(owed)
    while master.broker.deliver():
        pass
    asked = 0
    for _ in range(30):
        master.run(1.0)
        for each in good.heard():
            if isinstance(each, Introduce):
                asked += 1
                good.say("join", Join(node="good", incarnation="first", types=["text"]))
                good.send(owed.model_copy(update={"attempt": asked, "order": good.orders + asked}))
    assert master.master.state.encoders[good.encoder].members["good"].returns == 1
    assert asked == 1, "once for all of them"


def test_what_is_longer_than_any_message_waits_as_its_beginning_alone() -> None:
    def delivery(size: int) -> Delivery:
        text = Alive(node="a", incarnation="i", note="x").model_dump() | {"more": ["y" * 1000] * (size // 1000)}
        return Delivery("q", "e", "a.alive", msgpack.packb(text), {}, None, None, False, None, None, None)

    short, long = delivery(1000), delivery(14 << 20)
    assert bounded(short) is short
    assert len(bounded(long).body) < (1 << 20) + 2000
    with pytest.raises(Poison, match="oversize"):
        received(bounded(long))


def test_names_that_nobody_has_take_no_memory(server: MemoryServer, clock: VirtualClock) -> None:
    master, [good] = federation(server, clock, "good")
    for number in range(300):
        name = f"made-up-{number}"
        alive = Publication(TOPOLOGY.request, f"{name}.alive", encode(Alive(node=name, incarnation="first")))
        good.broker.publish(alive)
    master.run(1.0)
    assert set(master.master.live.last_seen) == {"good"} and not master.master.live.said


def test_what_is_set_aside_is_published_together_and_then_acked(server: MemoryServer, clock: VirtualClock) -> None:
    class Counting(MemoryBroker):
        """Counts what is published to the dead letters, and how often."""

        def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> MemorySubscription:
            consumers.append(super().consume(queue, on_delivery, prefetch=prefetch))
            return consumers[-1]

        def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
            if publications[0].exchange == TOPOLOGY.dead_letters:
                calls.append(len(publications))
                unacked.append(sum(len(each.unacked) for each in consumers))
            super().publish(*publications, timeout=timeout)

    consumers: list[MemorySubscription] = []
    calls: list[int] = []
    unacked: list[int] = []
    broker = Counting(server, user="master", dead_letters=TOPOLOGY.dead_letters, threaded=False)
    master, [good] = federation(server, clock, "good", broker=broker)
    for _ in range(150):
        good.broker.publish(Publication(TOPOLOGY.update, "evil.ready", b"\xc1"))
    master.run(1.0)
    assert calls == [64, 64, 22] and min(unacked) >= 22, "none was acked before"
    dead = server.queue(TOPOLOGY.dead_letters).ready
    assert len(dead) == 150 and {each.publication.headers["x-reason"] for each in dead} == {"not-msgpack"}
    assert master.master.live.poison == 150
    assert not any(each.unacked for each in consumers)
