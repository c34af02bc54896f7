"""What a node keeps, over both stores: the same files, the same owner, and no payload in memory that need not be."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock
from common.errors import UserError
from common.numbers.slicing import slice_bytes
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt
from node_service.handover.handover import Handover
from node_service.handover.local_state import LocalState
from node_service.handover.outbox import Outbox
from node_service.handover.receipt_book import RECEIPTS
from node_service.handover.store import DirectoryStore, MemoryStore, Store
from tests.unit.stepped import DIGEST, TOPOLOGY, chunk_bytes, connection

MIB = 1 << 20


class StoreCases:
    """What every Store must do. `again` is what a process that starts later finds."""

    def store(self, directory: Path) -> Store:
        raise NotImplementedError

    def again(self, store: Store) -> Store:
        raise NotImplementedError

    def test_what_is_written_is_read_whole_and_in_parts(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        assert store.read("a") is None and store.read("folder/a") is None
        for name in "a", "folder/a":
            store.write(name, b"before")
            store.write(name, b"0123456789")
            assert store.read(name) == b"0123456789"
            assert store.read(name, 3) == b"3456789" and store.read(name, 3, 4) == b"3456"
            assert store.read(name, 8, 4) == b"89" and store.read(name, 10, 4) == b"" and store.read(name, 0, 0) == b""
        assert self.again(store).read("folder/a") == b"0123456789"

    def test_lines_are_added_and_cut(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        for name in "lines", "folder/lines":
            store.append(name, b"one\n")
            store.append(name, b"two\n")
            assert self.again(store).read(name) == b"one\ntwo\n"
            store.cut(name, 4)
            store.append(name, b"three\n")
            assert self.again(store).read(name) == b"one\nthree\n"

    def test_names_are_those_of_a_folder_in_order(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        assert store.names("folder") == []
        for name in "folder/b", "folder/a", "folders", "b":
            store.write(name, b"")
        assert store.names("folder") == ["folder/a", "folder/b"]
        store.remove("folder/a")
        store.remove("folder/a")
        store.remove("nowhere/a")
        assert self.again(store).names("folder") == ["folder/b"] and store.read("folder/a") is None


class LocalStateCases:
    """What a node keeps in whatever Store."""

    def store(self, directory: Path) -> Store:
        raise NotImplementedError

    def again(self, store: Store) -> Store:
        raise NotImplementedError

    def test_identity_numbers_and_what_is_owed_outlive_the_process(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        state = LocalState(store, "n")
        owed = [manifest(state.next_sequence(), state.identity.incarnation) for _ in range(3)]
        for each in owed:
            state.owe(each, b"%04d" % each.sequence)
        assert state.remember(receipt(owed[1])) and not state.remember(receipt(owed[1]))
        state = LocalState(self.again(store), "n")  # killed before number 1 was forgotten
        assert list(state.owed.values()) == [owed[0], owed[2]] and state.next_sequence() == 3
        assert state.chunk(owed[2], 0) == b"0002" and state.chunk(owed[1], 0) is None
        assert state.ledger("e").answered == {1: receipt(owed[1])}
        with pytest.raises(UserError, match="belongs to node 'n', not 'other'"):
            LocalState(self.again(store), "other")

    def test_a_torn_receipt_is_cut_and_a_damaged_one_is_said(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        state = LocalState(store, "n")
        made = [manifest(number, state.identity.incarnation) for number in range(2)]
        state.remember(receipt(made[0]))
        whole = store.read(RECEIPTS)
        store.append(RECEIPTS, b'{"kind": "rec')
        state = LocalState(self.again(store), "n")
        assert store.read(RECEIPTS) == whole and state.ledger("e").answered == {0: receipt(made[0])}
        store.append(RECEIPTS, b"nonsense\n")
        with pytest.raises(UserError, match=r"receipts\.jsonl: line 2 is damaged"):
            LocalState(self.again(store), "n")

    def test_another_incarnation_owes_nothing_of_the_one_before(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        state = LocalState(store, "n", new_incarnation=iter(("first", "second")).__next__)
        state.owe(manifest(state.next_sequence(), "first"), b"1234")
        state.reincarnate()
        assert state.identity.incarnation == "second" and not state.owed and store.names("owed") == []
        again = LocalState(self.again(store), "n")
        assert again.identity.incarnation == "second" and again.next_sequence() == 0

    def test_f19_what_is_owed_is_listed_without_its_payloads(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        state = LocalState(store, "n")
        for _ in range(5):
            state.owe(manifest(state.next_sequence(), state.identity.incarnation, size=MIB), bytes(MIB))
        counting = Counting(self.again(store))
        state = LocalState(counting, "n")
        assert len(state.owed) == 5 and len(state.ledger("e").owed) == 5
        outbox = Outbox(connection(MemoryServer(), "n"), TOPOLOGY, "n", state.chunk)
        Handover(state, outbox, VirtualClock()).send_owed()
        assert len(state.owed) == 5 and not outbox.empty
        assert sum(counting.read_bytes.values()) < 20_000
        assert not [name for name in counting.read_bytes if name.endswith(".payload")]


class InDirectory:
    def store(self, directory: Path) -> Store:
        return DirectoryStore(directory / "state")

    def again(self, store: Store) -> Store:
        return DirectoryStore(store.place)


class InMemory:
    def store(self, directory: Path) -> Store:
        return MemoryStore()

    def again(self, store: Store) -> Store:
        assert isinstance(store, MemoryStore)
        return MemoryStore(store.files)


class TestDirectoryStore(InDirectory, StoreCases):
    pass


class TestMemoryStore(InMemory, StoreCases):
    pass


class TestLocalStateInADirectory(InDirectory, LocalStateCases):
    pass


class TestLocalStateInMemory(InMemory, LocalStateCases):
    pass


# --- a large update on its way ---------------------------------------------------------------------------------------


class Counting:
    """A store that says how many bytes of what were read, and how many in the last call."""

    def __init__(self, inner: Store) -> None:
        self.place = inner.place
        self.read_bytes: dict[str, int] = {}
        self._inner = inner

    def read(self, name: str, start: int = 0, length: int = -1) -> bytes | None:
        content = self._inner.read(name, start, length)
        self.read_bytes[name] = self.read_bytes.get(name, 0) + len(content or b"")
        return content

    def write(self, name: str, content: bytes) -> None:
        self._inner.write(name, content)

    def append(self, name: str, line: bytes) -> None:
        self._inner.append(name, line)

    def cut(self, name: str, size: int) -> None:
        self._inner.cut(name, size)

    def remove(self, name: str) -> None:
        self._inner.remove(name)

    def names(self, folder: str) -> list[str]:
        return self._inner.names(folder)


def test_f19_the_outbox_holds_no_chunks_while_the_broker_is_away_and_reads_them_in_windows(tmp_path: Path) -> None:
    """Twenty updates of 24 MiB wait: a window of 16 MiB is read at a time, and only when it may leave."""
    chunk, chunks, updates = slice_bytes("float32"), 6, 20
    assert chunk == 4 * MIB
    store = Counting(MemoryStore())
    state = LocalState(store, "n")
    server = MemoryServer()
    broker = connection(server, "n")
    outbox = Outbox(broker, TOPOLOGY, "n", state.chunk)
    payload = bytes(chunk * chunks)  # one object, however often it is owed
    for number in range(updates):
        made = manifest(number, state.identity.incarnation, encoding="float32", size=len(payload), chunks=chunks)
        state.owe(made, payload)
        outbox.update(made)
    assert not store.read_bytes.get("owed/000000000000.payload"), "nothing is read to wait"
    tries = 0
    while tries < 5:  # nobody has declared anything: as if no master had ever been there
        tries += 1
        assert not outbox.flush_one() and outbox.problem
    payloads = {name: count for name, count in store.read_bytes.items() if name.endswith(".payload")}
    assert payloads == {"owed/000000000000.payload": tries * 16 * MIB}, "the first window of the first, each time"

    broker.declare(TOPOLOGY.node("n", ("text",)))
    broker.declare(TOPOLOGY.master())
    store.read_bytes.clear()
    windows = []
    for _ in range(3):  # two windows and the manifest
        before = sum(store.read_bytes.values())
        assert outbox.flush_one()
        windows.append(sum(store.read_bytes.values()) - before)
    assert windows == [16 * MIB, 8 * MIB, 0]
    assert chunk_bytes(server, "n") == [chunk] * chunks


def manifest(
    sequence: int, incarnation: str, *, encoding: str = "float32", size: int = 4, chunks: int = 1
) -> UpdateManifest:
    return UpdateManifest(
        node="n",
        incarnation=incarnation,
        encoder="e",
        sequence=sequence,
        base_version=0,
        steps=1,
        samples=1,
        seconds=1.0,
        loss=1.0,
        encoding=encoding,  # type: ignore[arg-type]
        layout_digest=DIGEST,
        size=size,
        chunks=chunks,
        digest=DIGEST,
    )


def receipt(update: UpdateManifest) -> Receipt:
    return Receipt(
        encoder=update.encoder,
        node=update.node,
        incarnation=update.incarnation,
        sequence=update.sequence,
        digest=update.digest,
        accepted=True,
        version=1,
    )
