"""Assets on their stream: whatever stands there, a reader gets the right bytes or none, and a whole copy is enough."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.brokers.memory import MemoryBroker, MemoryServer
from common.clock import VirtualClock
from common.errors import BrokerUnavailable, Poison
from common.wire.assets import AssetAssembly, AssetReader, asset_chunks, asset_entry, publish_asset, read_assets
from common.wire.broker import Publication
from common.wire.codec import encode
from common.wire.fields import ASSET_CHUNK_BYTES, MAX_ASSET_BYTES, AssetEntry
from common.wire.to_node import AssetChunk
from common.wire.topology import Topology
from common.wire.transfer import checksum

TOPOLOGY = Topology("assets")
#: Two assets of several chunks with an end of its own, one of exactly two, and an empty one.
CONTENTS = {
    "tokenizer.json": bytes(range(256)) * (ASSET_CHUNK_BYTES // 100),
    "vocab.txt": b"v" * (2 * ASSET_CHUNK_BYTES),
    "empty": b"",
}
ENTRIES = {name: asset_entry(name, content) for name, content in CONTENTS.items()}
CHUNKS = {name: list(asset_chunks("e", ENTRIES[name], content)) for name, content in CONTENTS.items()}
ALL = [chunk for chunks in CHUNKS.values() for chunk in chunks]


def damaged(chunk: AssetChunk, how: str) -> AssetChunk:
    """The chunk as somebody else might have written it."""
    wrong = chunk.data[:-1] + b"?" if chunk.data else b"?"
    changes: dict[str, dict[str, Any]] = {
        "flipped": {"data": wrong},
        "other bytes": {"data": wrong, "checksum": checksum(wrong)},
        "cut": {"data": chunk.data[:-1], "checksum": checksum(chunk.data[:-1])},
        "other place": {"index": chunk.index + 1},
        "far away": {"index": 1 << 40},
        "other size": {"size": 1, "chunks": 1},
        "other encoder": {"encoder": "f"},
        "other digest": {"digest": "0" * 64},
    }
    return chunk.model_copy(update=changes[how])


HOW = ("flipped", "other bytes", "cut", "other place", "far away", "other size", "other encoder", "other digest")
WRITTEN = st.lists(
    st.one_of(st.sampled_from(ALL), st.builds(damaged, st.sampled_from(ALL), st.sampled_from(HOW))), max_size=24
)


def given_by(assembly: AssetAssembly, chunks: list[AssetChunk]) -> list[tuple[AssetEntry, bytes]]:
    found = []
    for chunk in chunks:
        try:
            whole = assembly.add(chunk)
        except Poison:
            continue
        if whole is not None:
            found.append(whole)
    return found


@settings(max_examples=150, deadline=None)
@given(WRITTEN, st.permutations(list(CONTENTS)), st.booleans())
def test_any_order_duplicates_and_damage_never_give_wrong_bytes(
    written: list[AssetChunk], copy: list[str], whole: bool
) -> None:
    """And after a whole copy everything is there, whatever stood before it."""
    assembly = AssetAssembly("e", ENTRIES.values())
    after = [chunk for name in copy for chunk in CHUNKS[name]] if whole else []
    found = given_by(assembly, [*written, *after])
    names = [entry.name for entry, _ in found]
    assert len(names) == len(set(names)), "given twice"
    assert all(content == CONTENTS[entry.name] for entry, content in found)
    assert {entry.name for entry in assembly.missing} == set(CONTENTS) - set(names)
    assert not (whole and assembly.missing)


def test_a_damaged_chunk_does_not_take_the_place_of_a_whole_one() -> None:
    first, second = CHUNKS["vocab.txt"]
    written = [first, damaged(first, "flipped"), damaged(first, "cut"), second]
    found = given_by(AssetAssembly("e", ENTRIES.values()), written)
    assert found == [(ENTRIES["vocab.txt"], CONTENTS["vocab.txt"])]


def test_only_what_is_wanted_is_kept() -> None:
    """Memory is bounded by what is wanted: nothing of the rest, and of a wanted one not more than it has."""
    assembly = AssetAssembly("e", [ENTRIES["vocab.txt"]])
    [last, *_] = reversed(CHUNKS["vocab.txt"])
    for chunk in [*CHUNKS["tokenizer.json"], last, *(last.model_copy(update={"index": n}) for n in range(2, 50))]:
        given_by(assembly, [chunk])
    kept = [data for parts in assembly._parts.values() for data in parts.values()]  # private: what it holds in memory
    assert kept == [last.data]


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "a\n", "x" * 65, "ü"])
def test_a_name_is_a_file_name_without_a_folder(name: str) -> None:
    with pytest.raises(ValidationError):
        AssetEntry(name=name, digest="0" * 64, size=1)


def test_too_large_an_asset_is_refused_before_anything_is_gathered() -> None:
    AssetEntry(name="a", digest="0" * 64, size=MAX_ASSET_BYTES)
    with pytest.raises(ValidationError):
        AssetEntry(name="a", digest="0" * 64, size=MAX_ASSET_BYTES + 1)
    chunk = CHUNKS["vocab.txt"][0].model_dump()
    with pytest.raises(ValidationError):
        AssetChunk(**{**chunk, "data": b"v" * (ASSET_CHUNK_BYTES + 1)})


def stream(*, declared: bool = True) -> MemoryBroker:
    broker = MemoryBroker(MemoryServer(), user="master", dead_letters=TOPOLOGY.dead_letters, threaded=False)
    if declared:
        broker.declare(TOPOLOGY.exchanges() + TOPOLOGY.assets("e", 1))
    return broker


def stepped(broker: MemoryBroker, reader: AssetReader) -> list[str]:
    """The names of what came, until nothing more does."""
    names = []
    for _ in range(50):
        while broker.deliver():
            pass
        if (found := reader.step()) is not None:
            assert found[1] == CONTENTS[found[0].name]
            names.append(found[0].name)
    return names


def test_a_reader_goes_past_what_is_not_wanted_and_ends_when_all_is_here() -> None:
    broker = stream()
    broker.publish(Publication(TOPOLOGY.asset, "e", b"noise"))
    broker.publish(Publication(TOPOLOGY.asset, "e", encode(CHUNKS["vocab.txt"][0])))  # the master died while it wrote
    for name in ("tokenizer.json", "empty", "vocab.txt"):
        publish_asset(broker, TOPOLOGY, "e", ENTRIES[name], CONTENTS[name])
    reader = AssetReader(broker, TOPOLOGY, "e", [ENTRIES["empty"], ENTRIES["vocab.txt"]])
    assert stepped(broker, reader) == ["empty", "vocab.txt"] and reader.done
    reader.close()


def test_a_reader_gives_up_after_silence_and_not_while_something_comes() -> None:
    broker, clock = stream(declared=False), VirtualClock()
    reader = AssetReader(broker, TOPOLOGY, "e", ENTRIES.values(), patience=15.0, clock=clock)
    clock.wait(14.0)
    assert reader.step() is None
    broker.declare(TOPOLOGY.exchanges() + TOPOLOGY.assets("e", 1))
    for chunk in CHUNKS["vocab.txt"]:
        broker.publish(Publication(TOPOLOGY.asset, "e", encode(chunk)))
        assert stepped(broker, reader) == (["vocab.txt"] if chunk.index == 1 else [])
        clock.wait(14.0)
    clock.wait(1.0)
    with pytest.raises(BrokerUnavailable, match=r"tokenizer\.json, empty of e did not come"):
        reader.step()


def test_all_assets_by_name_also_two_of_the_same_bytes() -> None:
    broker = MemoryBroker(MemoryServer(), user="master", dead_letters=TOPOLOGY.dead_letters)
    broker.declare(TOPOLOGY.exchanges() + TOPOLOGY.assets("e", 1))
    publish_asset(broker, TOPOLOGY, "e", ENTRIES["empty"], b"")
    twin = ENTRIES["empty"].model_copy(update={"name": "twin"})
    assert read_assets(broker, TOPOLOGY, "e", [ENTRIES["empty"], twin]) == {"empty": b"", "twin": b""}
    assert read_assets(broker, TOPOLOGY, "e", []) == {}
    broker.close()
