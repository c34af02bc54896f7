"""Chunks up and versions down: whole or not at all, in whatever order, however often, whoever died in between."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.brokers.memory import MemoryBroker, MemoryServer
from common.clock import SYSTEM, VirtualClock
from common.errors import BrokerUnavailable, Poison
from common.numbers import memory
from common.numbers.encodings import decode_vector, encode_vector
from common.numbers.layout import Layout
from common.numbers.slicing import SLICE, encoded_size, shard_of, shard_slices, slice_length
from common.wire.broker import Delivery, OnDelivery, Publication, StreamPosition, Subscription
from common.wire.codec import encode
from common.wire.to_master import UpdateChunk
from common.wire.to_node import ParameterChunk
from common.wire.topology import Topology
from common.wire.transfer import UpdateAssembly, VersionAssembly, checksum, combined, payload_digest
from common.wire.versions import REST_SECONDS, VersionReader, publish_version
from master_service.decisions.effects import Publish
from master_service.wire.publisher import Publisher
from tests.builders import encoded, update_chunks, update_manifest
from tests.integration.harness import eventually
from tests.unit.scenario import DIGEST

BODIES = [b"first", b"second", b"", b"4"]
MANIFEST = update_manifest("a", 7, bodies=BODIES, attempt=2)


@given(st.data())
def test_an_update_is_put_together_from_its_own_chunks_in_any_order(data: st.DataObject) -> None:
    mine = update_chunks(MANIFEST, BODIES)
    others = [
        mine[0].model_copy(update={**change, "data": b"other", "checksum": checksum(b"other")})
        for change in (
            {"sequence": 6},
            {"sequence": 8},
            {"attempt": 1},
            {"attempt": 3},
            {"incarnation": "second"},
            {"node": "b"},
            {"encoder": "text-2"},
        )
    ]
    taken: list[bytes] = []
    assembly, seen = UpdateAssembly(MANIFEST), set()
    for chunk in data.draw(st.permutations([*mine, *mine, *others])):
        ours = chunk in mine
        found = assembly.add(chunk)
        assert (found is not None) is ours
        taken += found or []
        seen |= {chunk.index} if ours else set()
        assert assembly.complete is (len(seen) == len(BODIES))
        assert taken == BODIES[: len(taken)], "each once, in order, as soon as all before it are here"
        assert len(taken) == next(index for index in range(len(BODIES) + 1) if index not in seen)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": b"firsT"}, "checksum"),
        ({"checksum": "0" * 16}, "checksum"),
        ({"data": bytes(2 * SLICE), "checksum": checksum(bytes(2 * SLICE))}, "oversize"),
    ],
)
def test_a_damaged_or_swollen_chunk_is_poison(change: dict[str, object], reason: str) -> None:
    assembly = UpdateAssembly(MANIFEST)
    with pytest.raises(Poison) as poison:
        assembly.add(update_chunks(MANIFEST, BODIES)[0].model_copy(update=change))
    assert poison.value.reason == reason
    assert isinstance(update_chunks(MANIFEST, BODIES)[0], UpdateChunk) and not assembly.complete


def version_chunks(epoch: int, version: int, encoder: str = "text-1") -> list[ParameterChunk]:
    bodies = [f"{epoch}.{version}.{index}".encode() for index in range(3)]
    size, digest = sum(map(len, bodies)), payload_digest(bodies)
    return [
        ParameterChunk(
            encoder=encoder,
            epoch=epoch,
            version=version,
            index=index,
            chunks=3,
            encoding="int8",
            layout_digest=DIGEST,
            size=size,
            digest=digest,
            checksum=checksum(body),
            data=body,
        )
        for index, body in enumerate(bodies)
    ]


def test_a_large_version_is_put_together_in_memory_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """In huge pages where there are any, and in any order of its chunks."""
    monkeypatch.setattr(memory, "LARGE", 1)
    size = SLICE + 3
    bodies = encode_vector(torch.arange(size).float(), "float32")
    plain = version_chunks(1, 1)[0].model_dump()
    plain |= {"encoding": "float32", "chunks": 2, "size": 4 * size, "digest": payload_digest(bodies)}
    chunks = [
        ParameterChunk(**{**plain, "index": index, "checksum": checksum(body), "data": body})
        for index, body in enumerate(bodies)
    ]
    for order in (chunks, [chunks[1], chunks[0], chunks[0]]):
        assembly = VersionAssembly("text-1", DIGEST, elements=size)
        [found] = [version for chunk in order if (version := assembly.add(chunk)) is not None]
        assert bytes(found.payload) == b"".join(bodies) and len(found.payload) == 4 * size
        assert torch.equal(decode_vector(found.payload, size, "float32"), torch.arange(size).float())


# each entry: a version whose writer died after so many chunks (3: whole), and whether it then wrote it again
WRITTEN = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=8)


@given(WRITTEN)
def test_only_whole_versions_come_off_a_stream(written: list[tuple[int, int, bool]]) -> None:
    assembly, found, whole = VersionAssembly("text-1", DIGEST), [], []
    for epoch, (version, cut, again) in enumerate(written):
        stream = version_chunks(epoch, version)[:cut]
        if again:
            stream += version_chunks(epoch, version)
        if cut == 3 or again:
            whole.append((epoch, version))
        for chunk in stream:
            done = assembly.add(chunk)
            if done is not None:
                assert done.payload == b"".join(part.data for part in version_chunks(done.epoch, done.version))
                found.append((done.epoch, done.version))
    assert list(dict.fromkeys(found)) == whole


@given(st.permutations([*range(3)] * 2))
def test_a_version_is_put_together_in_whatever_order_its_chunks_come(order: list[int]) -> None:
    assembly, chunks, seen = VersionAssembly("text-1", DIGEST), version_chunks(1, 4), set[int]()
    for index in order:
        done = assembly.add(chunks[index])
        seen.add(index)
        if done is not None:
            break
        assert assembly.lacks(chunks[index]) == 3 - len(seen) > 0
    assert done is not None and done.payload == b"1.4.01.4.11.4.2"


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 6), st.randoms(use_true_random=False))
def test_what_several_shards_write_at_the_same_time_is_one_version(count: int, shards: int, chance: Random) -> None:
    """Each in its own order, or not even that; and it is what one would have written. Some shards may have nothing."""
    size = (count - 1) * SLICE + 5
    bodies = [bytes([index]) * encoded_size(slice_length(size, index), "int8") for index in range(count)]
    parts = shard_slices(count, shards)
    assert [index for part in parts for index in part] == list(range(count))
    if shards > 1:
        assert [shard_of(index, count, shards) for index in range(count)] == [
            shard for shard, part in enumerate(parts) for _ in part
        ]
    digest = payload_digest(bodies, shards)
    assert digest == combined([payload_digest(bodies[part.start : part.stop]) for part in parts])
    plain = version_chunks(1, 1)[0].model_dump()
    plain |= {"encoding": "int8", "chunks": count, "size": sum(map(len, bodies)), "digest": digest}
    chunks = [
        ParameterChunk(**{**plain, "index": index, "checksum": checksum(body), "data": body})
        for index, body in enumerate(bodies)
    ]
    chance.shuffle(chunks)
    assembly = VersionAssembly("text-1", DIGEST, elements=size, shards=shards)
    *before, found = [assembly.add(chunk) for chunk in chunks]
    assert before == [None] * (count - 1) and found is not None and bytes(found.payload) == b"".join(bodies)
    wrong = [chunk.model_copy(update={"digest": "0" * 64}) for chunk in chunks]
    with pytest.raises(Poison, match="does not match its digest"):
        [assembly.add(chunk) for chunk in wrong]


def test_three_unfinished_versions_are_kept_and_those_that_anybody_begins_do_not_hide_one_that_comes() -> None:
    """Memory does not grow with what writers left unfinished."""
    assembly, good = VersionAssembly("text-1", DIGEST), version_chunks(1, 4)
    begun = [version_chunks(2**40 + number, 2**40) for number in range(5)]
    for chunk in good:
        done = assembly.add(chunk)
        assert [assembly.add(chunks[0]) for chunks in begun] == [None] * len(begun)
    assert done is not None and (done.epoch, done.version) == (1, 4)
    assert [assembly.add(chunk) for chunk in begun[2][1:]] == [None, None], "its first chunk is gone"


def test_f1_two_broken_versions_of_its_number_do_not_mix_with_a_good_one() -> None:
    assembly, good = VersionAssembly("text-1", DIGEST), version_chunks(1, 4)
    other = {"data": b"other", "checksum": checksum(b"other")}
    forged = [[chunk.model_copy(update={"digest": mark * 64, **other}) for chunk in good] for mark in "01"]
    for index, chunk in enumerate(good):
        done = assembly.add(chunk)
        for chunks in forged:
            if index < 2:
                assembly.add(chunks[index])
    assert done is not None and done.digest == good[0].digest


def test_f1_a_version_of_whole_chunks_that_is_not_what_its_digest_says_is_poison() -> None:
    assembly, good = VersionAssembly("text-1", DIGEST), version_chunks(1, 4)
    for chunk in good[:-1]:
        assembly.add(chunk)
    data = bytes(len(good[-1].data))
    with pytest.raises(Poison, match="does not match its digest") as poison:
        assembly.add(good[-1].model_copy(update={"data": data, "checksum": checksum(data)}))
    assert poison.value.reason == "digest"


@pytest.mark.parametrize(
    "change",
    [{"chunks": 2}, {"size": 5}, {"size": 1 << 50}, {"data": b"", "checksum": checksum(b"")}, {"encoding": "float32"}],
)
def test_f1_a_chunk_that_is_no_slice_of_a_version_is_poison(change: dict[str, object]) -> None:
    body = bytes(5 + 4)
    plain = {"chunks": 1, "data": body, "checksum": checksum(body), "size": len(body), "digest": payload_digest([body])}
    chunk = version_chunks(1, 1)[0].model_copy(update=plain)
    assembly = VersionAssembly("text-1", DIGEST, elements=5)
    with pytest.raises(Poison, match="size: chunk 0 of version 1 of text-1 is no slice of it"):
        assembly.add(chunk.model_copy(update=change))
    assert assembly.add(chunk) is not None


def test_f1_only_what_the_master_named_is_read_and_whole_forgeries_are_passed_over(broker: MemoryBroker) -> None:
    write(broker, 1, 4)
    write(broker, 2**40, 4)  # of the same number
    write(broker, 2**40, 2**40)
    good = payload_digest([b"1.4", b"!"])
    named = {4: good}
    reader = VersionReader(broker, TOPOLOGY, "text-1", DIGEST, named=named)
    found = reader.read(4, 0.0, timeout=5.0, patience=0.1)
    assert (found.epoch, found.version, found.digest) == (1, 4, good)
    write(broker, 1, 5)
    named[5] = payload_digest([b"1.5", b"!"])
    assert reader.read(4, 0.0, timeout=5.0, patience=0.1).version == 5, "newer, and named"


def test_a_master_that_did_not_know_it_was_replaced_disturbs_nobody() -> None:
    assembly, both = VersionAssembly("text-1", DIGEST), zip(version_chunks(1, 9), version_chunks(2, 9), strict=True)
    found = [assembly.add(chunk) for pair in both for chunk in pair]
    assert [(done.epoch, done.payload) for done in found if done] == [(1, b"1.9.01.9.11.9.2"), (2, b"2.9.02.9.12.9.2")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layout_digest": "0" * 64}, "layout"),
        ({"encoder": "text-2"}, "layout"),
        ({"index": 3}, "invalid"),
        ({"size": 1}, "digest"),
        ({"data": b"x"}, "checksum"),
    ],
)
def test_a_wrong_parameter_chunk_is_poison(change: dict[str, object], reason: str) -> None:
    assembly, chunks = VersionAssembly("text-1", DIGEST), version_chunks(1, 1)
    for chunk in chunks[:2]:
        assembly.add(chunk)
    with pytest.raises(Poison) as poison:
        assembly.add(chunks[2].model_copy(update=change))
    assert poison.value.reason == reason


TOPOLOGY = Topology("t")


@pytest.fixture
def broker() -> Iterator[MemoryBroker]:
    broker = MemoryBroker(MemoryServer(), user="master", dead_letters=TOPOLOGY.dead_letters)
    broker.declare(TOPOLOGY.master())
    yield broker
    broker.close()


def write(broker: MemoryBroker, epoch: int, version: int) -> float:
    return publish_version(
        broker,
        TOPOLOGY,
        encoder="text-1",
        epoch=epoch,
        version=version,
        encoding="float32",
        layout_digest=DIGEST,
        bodies=[f"{epoch}.{version}".encode(), b"!"],
        progress=0.5,
    )


def test_the_newest_version_is_read_though_the_hint_is_wrong(broker: MemoryBroker) -> None:
    for epoch, version in ((1, 3), (1, 9), (2, 4), (2, 5)):  # the second master had lost what the first made last
        hint = write(broker, epoch, version)
    broker.publish(Publication(TOPOLOGY.parameter, "text-1", b"noise"))
    broker.publish(Publication(TOPOLOGY.parameter, "text-1", encode(version_chunks(3, 6)[0])))  # died while writing
    reader = VersionReader(broker, TOPOLOGY, "text-1", DIGEST)
    for start in (0.0, hint, time.time() + 1000):
        read = reader.read(4, start, timeout=20.0, patience=0.1)
        assert (read.epoch, read.version, read.payload, read.progress) == (2, 5, b"2.5!", 0.5)
    assert reader.read(9, hint, patience=0.1).version == 9


def test_what_was_read_is_not_read_again_because_of_the_margin_of_a_hint(broker: MemoryBroker) -> None:
    """The hint of a version is some seconds early; where many are made, those before it are most of what it points
    at."""
    hint, reader = write(broker, 1, 0), VersionReader(broker, TOPOLOGY, "text-1", DIGEST)
    for version in range(1, 20):
        write(broker, 1, version)
    assert reader.read(19, hint).version == 19
    before = broker.status().bytes_in
    write(broker, 1, 20)
    assert reader.read(20, hint).version == 20
    assert broker.status().bytes_in - before < 3 * len(encode(version_chunks(1, 20)[0]))
    # what was read already is found again, and so is what stands on a stream that is another one by now
    assert reader.read(20, hint).version == 20
    broker.delete_queue(TOPOLOGY.stream("text-1"))
    again = write(broker, 2, 21)
    assert reader.read(21, min(hint, again), patience=0.1).version == 21


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(1, 12_000))
def test_a_reader_keeps_its_consumer_over_what_costs_less_to_read(gaps: list[int], elements: int) -> None:
    """By how many versions each read passes over; an element of theirs has four bytes."""
    broker, clock = MemoryBroker(MemoryServer(), user="master", dead_letters=None), VirtualClock()
    broker.declare(TOPOLOGY.master())
    named: dict[int, str] = {}
    reader = VersionReader(broker, TOPOLOGY, "text-1", DIGEST, elements=elements, named=named, clock=clock)
    begun: list[StreamPosition] = []
    offsets: list[int | None] = []
    read_stream = broker.read_stream

    def looked_at(stream: str, on_delivery: OnDelivery, *, start: StreamPosition, prefetch: int = 16) -> Subscription:
        begun.append(start)

        def came(delivery: Delivery) -> None:
            offsets.append(delivery.offset)
            on_delivery(delivery)

        return read_stream(stream, came, start=start, prefetch=prefetch)

    broker.read_stream = looked_at  # type: ignore[method-assign]
    version, expected = -1, 0
    for gap in gaps:
        for number in range(version + 1, version + gap + 2):
            bodies = encode_vector(torch.full((elements,), float(number)), "float32")
            plain = {"encoding": "float32", "layout_digest": DIGEST, "bodies": bodies, "progress": 0.0}
            publish_version(broker, TOPOLOGY, encoder="text-1", epoch=1, version=number, **plain)  # type: ignore[arg-type]
            named[number] = payload_digest(bodies)
        expected += version == -1 or gap * 4 * elements > 64 * 1024
        version += gap + 1
        found = reader.read(version, offset=version, timeout=5.0)
        assert found.version == version and found.payload == b"".join(bodies)
        assert len(begun) == expected
    assert len(offsets) == len(set(offsets)), "nothing comes twice"
    clock.time += REST_SECONDS
    reader.tire()
    publish_version(broker, TOPOLOGY, encoder="text-1", epoch=1, version=version + 1, **plain)  # type: ignore[arg-type]
    named[version + 1] = named[version]
    assert reader.read(version + 1, offset=version + 1).version == version + 1
    assert len(begun) == expected + 1, "it did not rest for ever"
    broker.close()


def test_a_very_version_that_is_lost_is_not_waited_for_as_long_as_others_come(broker: MemoryBroker) -> None:
    write(broker, 1, 3)
    problems: list[Exception] = []

    def read() -> None:
        try:
            VersionReader(broker, TOPOLOGY, "text-1", DIGEST).read(4, 0.0, exact=True, timeout=0.5, patience=0.2)
        except BrokerUnavailable as error:
            problems.append(error)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    version = 4
    while reading.is_alive() and version < 500:  # 25 s
        version += 1
        write(broker, 1, version)
        reading.join(0.05)
    assert len(problems) == 1


def test_a_version_is_read_from_a_line_slower_than_the_first_patience(broker: MemoryBroker) -> None:
    chunks = [encode(chunk) for chunk in version_chunks(1, 4)]
    write(broker, 1, 3)  # the stream is there

    def drip() -> None:
        for body in chunks:
            time.sleep(0.4)
            broker.publish(Publication(TOPOLOGY.parameter, "text-1", body))

    threading.Thread(target=drip, daemon=True).start()
    assert VersionReader(broker, TOPOLOGY, "text-1", DIGEST).read(4, 0.0, timeout=5.0, patience=0.1).version == 4


def test_a_version_that_was_missed_is_not_written_again_a_moment_later(broker: MemoryBroker) -> None:
    layout = Layout([("weight", (3,))])
    master = Publisher(
        broker, TOPOLOGY, "float32", clock=SYSTEM, ending=threading.Event(), new_id=lambda: secrets.token_hex(8)
    )
    for effect, there in (
        (Publish("text-1", 1, progress=1.0), 1),
        (Publish("text-1", 1, progress=1.0, again=True), 1),  # many asked for it while it was written
        (Publish("text-1", 1, progress=0.0), 2),  # a training that goes on: with another progress
    ):
        if master.is_due(effect, 1):
            master.version(effect, 1, layout.digest, encoded([b"0" * 12]))
        arrived: list[Delivery] = []
        reader = broker.read_stream(TOPOLOGY.stream("text-1"), arrived.append, start="first", prefetch=10)
        eventually(lambda arrived=arrived, there=there: len(arrived) >= there)
        reader.close()
        assert len(arrived) == there


def test_a_version_that_does_not_come_is_waited_for_only_so_long(broker: MemoryBroker) -> None:
    write(broker, 1, 3)
    with pytest.raises(BrokerUnavailable, match="version 4 of text-1 did not come"):
        VersionReader(broker, TOPOLOGY, "text-1", DIGEST).read(4, 0.0, timeout=0.3, patience=0.1)
