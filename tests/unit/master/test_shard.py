"""One aggregator, stepped by hand over a broker in memory: orders that come twice, late, or after it has died.

Its part of an encoder is small: of two slices the last has eight numbers, and of two shards the second has that.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.errors import Damaged, Unroutable
from common.numbers.encodings import encode_vector
from common.numbers.layout import Layout
from common.numbers.slicing import SLICE
from common.wire.broker import Delivery, Publication
from common.wire.codec import encode
from common.wire.to_master import Join, UpdateManifest
from common.wire.transfer import payload_digest, update_chunk
from master_service.arithmetic.aggregator import Aggregator
from master_service.arithmetic.arithmetic import Head, PayloadsLost
from master_service.decisions.effects import Contribution, Step
from master_service.decisions.rules.model import CombineRule, OuterOptimizer
from master_service.log.deadly import Attempts, MemoryMark
from master_service.log.parts import PartedPayloads, digests_of
from master_service.log.payloads import MemoryPayloads
from master_service.shards.remote import RemoteArithmetic
from master_service.shards.shard import Shard
from master_service.shards.store import ShardStore
from master_service.wire import orders
from master_service.wire.intake import Intake
from master_service.wire.shards import Asked, Shards
from tests.builders import update_manifest
from tests.unit.stepped import TOPOLOGY, Never, SteppedMaster, connection

SHARDS = 2
ENCODER = "text-1"
SMALL = 8
LAYOUT = Layout([("w", (SLICE + SMALL,))])


class Bench:
    """The second of two aggregators, or the first, and who orders it."""

    def __init__(self, directory: Path, server: MemoryServer, clock: VirtualClock, number: int = 1) -> None:
        self.directory, self.clock, self.number = directory, clock, number
        self._server = server
        self.master = connection(server, "master")
        self.master.declare(TOPOLOGY.master() + TOPOLOGY.shards(SHARDS))
        self.master.declare(TOPOLOGY.shard_chunks("a", SHARDS))
        self._requests = 0
        self._mark = MemoryMark()
        self._begin()

    def _begin(self) -> None:
        self._broker = connection(self._server, f"shard-{self.number}")
        self._came: list[Delivery] = []
        self.store = ShardStore(self.directory, self.number, SHARDS)
        self.shard = Shard(
            self.number,
            SHARDS,
            self._broker,
            TOPOLOGY,
            self.store,
            Attempts(self._mark, self.store),
            clock=self.clock,
            ending=Never(),
            on_delivery=self._came.append,
            beside=lambda work: work(),
        )
        self.shard.start()
        self._broker.consume(TOPOLOGY.shard_queue(self.number), self._came.append, prefetch=100)

    def die(self) -> None:
        """kill -9, and a start."""
        self._broker.close()
        self.store.close()  # the lock alone would outlive it here
        self._begin()

    def turn(self, *, slowly: bool = False) -> list[orders.AnyReport]:
        """Let it do what there is to do, or `slowly` one thing of that; what it says."""
        while self._broker.deliver() or self._came:
            while self._came:
                self.shard.hear(self._came.pop(0))
            if slowly:
                break
        said: list[Delivery] = []
        with closing(self.master.consume(TOPOLOGY.master_shards, said.append, prefetch=1000)):
            while self.master.deliver():
                pass
            self.master.ack(*said)
        return [orders.report(delivery, TOPOLOGY) for delivery in said]

    def give(self, kind: type[orders.Order], **fields: Any) -> list[orders.AnyReport]:
        self._requests += 1
        body = encode(kind(request=f"r-{self._requests}", shards=SHARDS, **fields))
        self.master.publish(Publication(TOPOLOGY.shard, TOPOLOGY.shard_key(self.number), body))
        return self.turn()

    def ask(self, kind: type[orders.Order], **fields: Any) -> orders.Done:
        answers = [each for each in self.give(kind, **fields) if isinstance(each, orders.Done)]
        return next(each for each in answers if each.request == f"r-{self._requests}")

    def begun(self, value: float = 0.5) -> Bench:
        """With an encoder whose numbers here are all this one."""
        assert self.ask(orders.Begin, encoder=ENCODER, size=LAYOUT.size).version == -1
        data = torch.full((SMALL,), value).numpy().tobytes()
        self.ask(orders.Place, encoder=ENCODER, size=LAYOUT.size, index=1, data=data)
        assert self.ask(orders.Begin, encoder=ENCODER, size=LAYOUT.size).version == 0
        return self

    def send(self, sequence: int, value: float, **changes: Any) -> UpdateManifest:
        """The part of an update that is for here, in the node's queue."""
        manifest = manifest_of(sequence, value, **changes)
        chunk = encode(update_chunk(manifest, self.number, bodies_of(value)[self.number]))
        self.master.publish(Publication(TOPOLOGY.update, TOPOLOGY.chunk_key("a", self.number), chunk))
        return manifest

    def take(self, sequence: int, value: float, **changes: Any) -> str:
        """An update as it comes: the digest of what is kept of it here."""
        said = self.give(orders.Take, manifest=self.send(sequence, value, **changes))
        return next(each.digest for each in said if isinstance(each, orders.Arriving) and each.digest is not None)

    def step(self, version: int, *parts: str) -> orders.Done:
        contributions = [
            orders.Part(payload=part, encoding="float32", coefficient=1.0 / len(parts), part=0) for part in parts
        ]
        return self.ask(
            orders.Compute,
            encoder=ENCODER,
            version=version,
            contributions=contributions,
            outer=OuterOptimizer(optimizer="nesterov", momentum=0.9),
            combine=CombineRule(),
        )

    def chunks(self) -> int:
        """How many wait in the node's queue."""
        came: list[Delivery] = []
        with closing(self.master.consume(TOPOLOGY.chunk_queue("a", 1), came.append, prefetch=1000)):
            while self.master.deliver():
                pass
        return len(came)


def bodies_of(value: float) -> list[bytes]:
    return encode_vector(torch.full((LAYOUT.size,), value), "float32")


def manifest_of(sequence: int, value: float, **changes: Any) -> UpdateManifest:
    """Of an update whose numbers are all this one."""
    bodies = bodies_of(value)
    digest = payload_digest(bodies, SHARDS)
    plain = {"encoding": "float32", "shards": SHARDS, "order": sequence, "digest": digest, **changes}
    return update_manifest("a", sequence, of=LAYOUT, bodies=bodies, **plain)


@pytest.fixture
def bench(tmp_path: Path, server: MemoryServer, clock: VirtualClock) -> Bench:
    return Bench(tmp_path / "shard", server, clock)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_written", [False, True])
def test_a_version_that_another_aggregator_could_not_compute_is_computed_of_what_is_left(
    bench: Bench, tmp_path: Path, clock: VirtualClock, is_written: bool
) -> None:
    """It was computed here, and there an update was lost: the master orders the same version without that."""
    undisturbed = Bench(tmp_path / "undisturbed", MemoryServer(clock.now), clock)
    for each in (undisturbed, bench):
        each.begun()
        one, two, three = (each.take(sequence, float(sequence + 2)) for sequence in range(3))
        each.step(1, one)
    bench.step(2, two, three)
    if is_written:
        bench.shard.holding.snapshot()
    wanted = undisturbed.step(2, two).digest
    assert bench.step(2, two).digest == wanted
    bench.die()
    assert bench.step(2, two).digest == wanted
    assert bench.step(3, three).digest == undisturbed.step(3, three).digest
    assert bench.step(2, two, three).differs, "nodes have the older ones"


def test_what_a_version_may_be_taken_back_to_stays(bench: Bench) -> None:
    """A snapshot of the newest version alone is nothing to go back from."""
    bench.begun()
    parts = [bench.take(sequence, float(sequence + 2)) for sequence in range(3)]
    bench.step(1, parts[0])
    bench.step(2, parts[1])
    bench.shard.holding.snapshot()
    bench.give(orders.Drop, digest=manifest_of(0, 2.0).digest)
    assert bench.step(2, parts[2]).digest is not None
    bench.shard.holding.snapshot()
    bench.step(3, parts[2])
    bench.give(orders.Drop, digest=manifest_of(1, 3.0).digest)
    assert not (bench.store.payloads.stored() & {parts[0], parts[1]}), "no start needs these any more"
    bench.die()
    assert bench.shard.holding.versions == {ENCODER: 3}


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_an_update_of_the_log_stays_though_it_was_never_said_that_it_is_there(bench: Bench) -> None:
    """An order to keep it may be lost. It is announced once more, and does not count once more."""
    bench.begun()
    part = bench.take(0, 1.0)
    bench.give(orders.Discard, manifest=manifest_of(0, 1.0, attempt=1), incarnation="first", logged=True)
    bench.give(orders.Discard, manifest=manifest_of(0, 5.0, attempt=2), incarnation="first", logged=False)
    assert bench.step(1, part).lost == []
    other = bench.take(1, 2.0)
    bench.give(orders.Discard, manifest=manifest_of(1, 2.0), incarnation="first", logged=False)
    assert bench.step(2, other).lost == [other], "that one was not in the log"


@pytest.mark.parametrize("is_kept", [False, True])
def test_what_the_log_has_dropped_is_gone(bench: Bench, is_kept: bool) -> None:
    bench.begun()
    manifest = manifest_of(0, 1.0)
    part = bench.take(0, 1.0)
    if is_kept:
        bench.give(orders.Keep, update=manifest.update_id, digest=manifest.digest)
    bench.give(orders.Drop, digest=manifest.digest)
    assert bench.store.taken(manifest.update_id) is None and part not in bench.store.payloads.stored()


def test_a_version_0_of_the_same_bytes_as_a_refused_update_stays(bench: Bench) -> None:
    bench.begun(0.0)
    bench.take(0, 0.0)
    bench.give(orders.Discard, manifest=manifest_of(0, 0.0), incarnation="first", logged=False)
    bench.die()
    assert bench.shard.holding.versions == {ENCODER: 0}


def test_who_has_lost_what_a_start_needs_says_so(bench: Bench) -> None:
    bench.begun()
    part = bench.take(0, 1.0)
    bench.step(1, part)
    bench.store.payloads.remove(part)
    with pytest.raises(Damaged, match="restore it from a backup"):
        bench.die()


# --- chunks ----------------------------------------------------------------------------------------------------------


def test_chunks_of_an_update_that_was_here_already_are_thrown_away(bench: Bench, clock: VirtualClock) -> None:
    """A node sends it again because its answer is late: its queue is not to fill with that."""
    bench.begun()
    bench.take(0, 1.0)
    again = bench.send(0, 1.0, attempt=1, order=1)
    later = bench.send(1, 2.0, order=2)
    bench.give(orders.Take, manifest=again)
    bench.shard.look()
    bench.turn()
    clock.wait(1.0)
    bench.shard.look()
    assert bench.chunks() == 1
    assert any(isinstance(each, orders.Arriving) and each.digest for each in bench.give(orders.Take, manifest=later))


def test_however_much_of_a_refused_update_there_is_all_of_it_goes(bench: Bench, clock: VirtualClock) -> None:
    bench.begun()
    for _ in range(30):
        refused = bench.send(0, 1.0)
    bench.give(orders.Discard, manifest=refused, incarnation="first", logged=False)
    for _ in range(200):
        bench.shard.look()
        bench.turn(slowly=True)
        clock.wait(0.06)
    assert bench.chunks() == 0


# --- versions --------------------------------------------------------------------------------------------------------


def test_an_update_that_has_killed_an_aggregator_twice_is_given_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is told of it then the master sees that it is not what its manifest says; the next is taken as ever."""
    bench.begun()

    def dies(self: Intake, delivery: Delivery) -> None:
        raise RuntimeError("whatever a slice can do to a process")

    with monkeypatch.context() as patch:
        patch.setattr(Intake, "add", dies)
        manifest = bench.send(0, 0.25)
        for turn in range(2):
            with pytest.raises(RuntimeError, match="whatever"):
                bench.give(orders.Take, manifest=manifest) if turn == 0 else bench.turn()
            bench.die()
        [told] = [each for each in bench.turn() if isinstance(each, orders.Arriving)]
    assert told.update == manifest.update_id and (told.size, told.fits) == (0, False) and told.digest is not None
    assert bench.take(1, 0.75) is not None


def test_a_version_that_cannot_be_written_is_no_version_that_was(bench: Bench) -> None:
    """Its stream was deleted, or the shard died after it had encoded it: nothing is waited for for ever."""
    bench.begun()
    digest = bench.ask(orders.Encode, encoder=ENCODER, version=0, encoding="float32").digest
    fields: dict[str, Any] = {
        "encoder": ENCODER,
        "version": 0,
        "epoch": 1,
        "encoding": "float32",
        "layout_digest": LAYOUT.digest,
        "digest": digest,
        "elements": LAYOUT.size,
        "progress": 0.0,
    }
    assert bench.ask(orders.Issue, **fields).unroutable
    bench.master.declare(TOPOLOGY.parameters(ENCODER, 4 * LAYOUT.size))
    written = bench.ask(orders.Issue, **fields)
    assert (written.unroutable, written.gone) == (False, False)
    # its answer may have been lost: it is there, and is not written once more; what was encoded is not kept
    end = bench.master.stream_end(TOPOLOGY.stream(ENCODER))
    assert not bench.ask(orders.Issue, **fields).gone
    assert bench.master.stream_end(TOPOLOGY.stream(ENCODER)) == end == 1
    assert bench.ask(orders.Issue, **fields | {"epoch": 2}).gone
    bench.die()
    assert bench.ask(orders.Issue, **fields).gone


class HandShards(Shards):
    """Two aggregators by hand, of which one dies when it is told for the `dies`-th time to do something."""

    def __init__(self, benches: Sequence[Bench], dies: int) -> None:
        self.count, self.patient, self._benches, self._left = SHARDS, True, benches, dies

    def ask(
        self,
        kind: type[Any],
        fields: Callable[[int], dict[str, Any] | None],
        shards: Sequence[int] | None = None,
    ) -> Asked:
        asked = Asked({})
        for shard, bench in enumerate(self._benches):
            if (given := fields(shard)) is not None:
                self._left -= 1
                if self._left == 0:
                    bench.die()
                asked.answers[shard] = bench.ask(kind, **given)
        return asked

    def answers(self, asked: Asked, patience: float | None = None) -> dict[int, orders.Done]:
        return asked.answers


@pytest.mark.parametrize("dies", range(8))
def test_who_dies_while_it_is_given_version_0_is_given_all_of_it(
    tmp_path: Path, server: MemoryServer, clock: VirtualClock, dies: int
) -> None:
    benches = [Bench(tmp_path / str(number), server, clock, number) for number in range(SHARDS)]
    layout, payloads = Layout([("w", (2 * SLICE + SMALL,))]), MemoryPayloads()
    digest = payloads.write(torch.arange(layout.size, dtype=torch.float32).numpy().tobytes())
    arithmetic = RemoteArithmetic(payloads, HandShards(benches, dies))
    arithmetic.begin(ENCODER, layout, digest)
    assert [bench.shard.holding.versions for bench in benches] == [{ENCODER: 0}] * SHARDS
    holdings = [benches[shard].shard.holding for shard in (0, 1, 1)]
    slices = [holding.slice(ENCODER, index) for index, holding in enumerate(holdings)]
    assert b"".join(slices) == payloads.read(digest)


def test_a_version_of_which_one_lost_an_update_has_the_bits_of_a_replay_without_that(
    tmp_path: Path, server: MemoryServer, clock: VirtualClock
) -> None:
    benches = [Bench(tmp_path / str(number), server, clock, number) for number in range(SHARDS)]
    payloads = MemoryPayloads()
    first = payloads.write(torch.full((LAYOUT.size,), 0.5).numpy().tobytes())
    arithmetic = RemoteArithmetic(payloads, HandShards(benches, 0))
    arithmetic.begin(ENCODER, LAYOUT, first)
    wholes = []
    for sequence in range(3):
        parts = [bench.take(sequence, float(sequence + 2)) for bench in benches]
        wholes.append(payloads.write(bytes.fromhex("".join(parts))))
    outer = OuterOptimizer(optimizer="nesterov", momentum=0.9)

    def step(version: int, *counted: str) -> Step:
        contributions = tuple(Contribution(whole, "float32", 1.0 / len(counted)) for whole in counted)
        return Step(ENCODER, version, contributions, outer, shards=SHARDS)

    made = [arithmetic.step(step(1, wholes[0])).digest]
    lost = digests_of(payloads.read(wholes[2]))[1]
    benches[1].store.payloads.remove(lost)
    with pytest.raises(PayloadsLost) as error:
        arithmetic.step(step(2, wholes[1], wholes[2]))
    assert error.value.lost == [wholes[2]]
    made.append(arithmetic.step(step(2, wholes[1])).digest)
    made.append(arithmetic.step(step(3, wholes[0])).digest)
    replayed = Aggregator(payloads, PartedPayloads(payloads, [bench.store.payloads for bench in benches]))
    replayed.begin(ENCODER, LAYOUT, first)
    steps = [step(1, wholes[0]), step(2, wholes[1]), step(3, wholes[0])]
    assert [replayed.step(each).digest for each in steps] == made


def test_a_version_is_published_once_its_stream_is_there_and_by_nobody_who_has_it_not(
    tmp_path: Path, server: MemoryServer, clock: VirtualClock
) -> None:
    benches = [Bench(tmp_path / str(number), server, clock, number) for number in range(SHARDS)]
    payloads = MemoryPayloads()
    digest = payloads.write(bytes(4 * LAYOUT.size))
    arithmetic = RemoteArithmetic(payloads, HandShards(benches, 0))
    arithmetic.begin(ENCODER, LAYOUT, digest)
    head = Head(ENCODER, 0, 1, LAYOUT.digest, 0.0)
    encoded = arithmetic.encoded(ENCODER, "float32")
    with pytest.raises(Unroutable):
        encoded.publish(head)
    benches[0].master.declare(TOPOLOGY.parameters(ENCODER, encoded.size))
    assert encoded.publish(head) == payload_digest([bytes(4 * SLICE), bytes(4 * SMALL)], SHARDS)
    benches[1].die()
    assert encoded.publish(replace(head, epoch=2)) is None


@pytest.mark.parametrize("is_away", [False, True])
def test_who_owes_something_can_send_it_over_a_broker_with_a_new_disk(
    server: MemoryServer, clock: VirtualClock, is_away: bool
) -> None:
    """Of an encoder that has ended no rule is sent any more, with which its chunk queues would be there."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    join = Publication(TOPOLOGY.request, "a.join", encode(Join(node="a", incarnation="first", types=["text"])))
    before = SteppedMaster(server, clock, db=db).start()
    before.broker.publish(join)
    before.turn()
    if is_away:
        before.run(3600.0)
    assert before.master.state.nodes["a"].present != is_away
    renewed = MemoryServer(clock.now)
    master = SteppedMaster(renewed, clock, db=db, payloads=before.journal.log.payloads, shards=SHARDS).start()
    queues = [TOPOLOGY.chunk_queue("a", shard) for shard in range(SHARDS)]
    assert all((renewed.find(queue) is None) == is_away for queue in queues)
    master.broker.publish(join)
    master.turn()
    assert all(renewed.find(queue) is not None for queue in queues)


def test_two_threads_of_a_master_may_order_at_the_same_time(server: MemoryServer, clock: VirtualClock) -> None:
    """One drops payloads, another decides."""
    broker, answers = connection(server, "master"), list[Delivery]()
    numbers = iter(range(10))

    def new_id() -> str:
        """The second thread comes while the first is in here."""
        if (number := next(numbers)) == 0:
            second = threading.Thread(target=drop)
            second.start()
            second.join()
        return f"id-{number}"

    shards = Shards(SHARDS, broker, TOPOLOGY, clock=clock, ending=Never(), new_id=new_id, on_report=answers.append)
    shards.start()

    def drop() -> None:
        shards.tell(orders.Drop, 1, digest="0" * 64)

    drop()
    told: list[Delivery] = []
    broker.consume(TOPOLOGY.shard_queue(1), told.append, prefetch=10)
    while broker.deliver():
        pass
    names = {order.request for each in told if (order := orders.order(each, TOPOLOGY))}
    assert len(told) == len(names) == 2
