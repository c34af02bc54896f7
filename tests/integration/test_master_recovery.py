"""The master's promises, one by one, over the embedded broker: what dies is taken up, what is damaged is named."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.brokers.memory import MemoryServer
from common.errors import BrokerUnavailable, Damaged, LockHeld
from common.wire.base import Message
from common.wire.broker import Delivery, Publication
from common.wire.codec import decode, encode
from common.wire.to_master import AskStatus, Get, Join
from common.wire.to_node import Receipt, Resend, StatusReport, receipt_hash
from master_service import master as master_module
from master_service.config import MasterConfig
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.records import Entry, Tick
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import StopRule
from master_service.history.replay import origin, rebuild, verify
from master_service.log.message_log import open_log
from master_service.log.payload_files import payload_path
from master_service.record import Recorder
from master_service.service import MasterService
from master_service.wire.publisher import Publisher
from tests.integration.harness import (
    TOPOLOGY,
    HandNode,
    Master,
    connection,
    decided,
    drained,
    eventually,
    numbers,
    running_master,
)

COHORT = decided(rule=aggregation_rule("fedavg"))


class Bang(RuntimeError):
    """Dies as a bug would."""


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


@contextmanager
def dying_master(
    server: MemoryServer, directory: Path, settings: Any = None, *, dies_of: type[BaseException] = Bang, **config: Any
) -> Iterator[Master]:
    """A master that is expected to die while the block runs."""
    master = Master(server, directory, settings or decided(), **config)
    yield master
    with pytest.raises(dies_of):
        master.party.wait(20.0)
    master.broker.close()


def answered(node: HandNode) -> bool:
    """Whether a receipt is among what has come so far."""
    found = False
    while not node.inbox.empty():
        delivery = node.inbox.get()
        node.broker.ack(delivery)
        found |= isinstance(decode(delivery.body), Receipt)
    return found


def test_a_second_master_on_the_same_state_directory_is_told_who_has_it(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path):
        broker = connection(MemoryServer(), "second")  # another broker does not help
        with pytest.raises(LockHeld, match=rf"{tmp_path} is in use by process {os.getpid()} on .* since .* UTC"):
            MasterService(MasterConfig(state_dir=tmp_path), decided(), broker, TOPOLOGY)
    with running_master(server, tmp_path):
        pass  # and free again when the first has ended
    broker.close()


def test_a_master_that_loses_its_lock_stops_and_decides_nothing_more(server: MemoryServer, tmp_path: Path) -> None:
    master = Master(server, tmp_path, decided())
    node = HandNode(server, "a")
    instruction = node.enter()
    master.broker.lose_locks()
    with pytest.raises(BrokerUnavailable, match="lock of this namespace was lost"):
        master.party.wait(20.0)
    master.broker.close()
    bodies = numbers(instruction)
    node.send(node.manifest(instruction, 0, bodies), bodies)
    with running_master(server, tmp_path):
        assert node.hear(Receipt).accepted, "the next one takes what the first left"


def test_sends_that_did_not_leave_are_repeated_at_the_next_start(
    server: MemoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Publisher._publication  # private: called in the thread that sends

    def publication(self: Publisher, exchange: str, key: str, message: Message, *rest: Any) -> Publication:
        if isinstance(message, Receipt):
            raise Bang
        return original(self, exchange, key, message, *rest)

    node = HandNode(server, "a")
    with monkeypatch.context() as patch, dying_master(server, tmp_path):
        patch.setattr(Publisher, "_publication", publication)  # private: as above
        instruction = node.enter()
        bodies = numbers(instruction)
        node.send(node.manifest(instruction, 0, bodies), bodies)
    with running_master(server, tmp_path) as master:
        receipt = node.hear(Receipt)  # the node did not ask again
        assert receipt.accepted and receipt.version == 1
        member = master.service.master.state.encoders[instruction.encoder].members["a"]
        assert member.returns == 1
        # should its answer be lost all the same, the update is sent again and answered by the same receipt
        node.send(node.manifest(instruction, 0, bodies).model_copy(update={"attempt": 1}), bodies)
        assert node.hear(Receipt) == receipt and member.returns == 1


def test_a_master_that_dies_before_the_export_exports_at_the_next_start(
    server: MemoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bang(*_: Any) -> None:
        raise Bang

    settings = decided(stop=StopRule(updates=1))
    node = HandNode(server, "a")
    with monkeypatch.context() as patch, dying_master(server, tmp_path / "m", settings):
        patch.setattr("master_service.arithmetic.aggregator.export_encoder", bang)
        instruction = node.enter()
        bodies = numbers(instruction)
        node.send(node.manifest(instruction, 0, bodies), bodies)
    with running_master(server, tmp_path / "m", settings, export_dir=tmp_path / "encoder"):
        eventually(lambda: (tmp_path / "encoder" / "model.safetensors").exists())


def test_a_message_that_kills_the_master_twice_is_skipped_and_set_aside(
    server: MemoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is durable, whose fold then kills every start."""
    original = Coordinator.handle
    killer, node = HandNode(server, "killer"), HandNode(server, "a")

    def release(self: Recorder) -> None:
        if any(isinstance(held.todo.body, Join) for held in self._held):
            raise Bang
        real(self)

    real = Recorder._release  # private: the moment after the commit
    with monkeypatch.context() as patch, dying_master(server, tmp_path):
        patch.setattr(Recorder, "_release", release)  # private: as above
        killer.say(".join", Join(node="killer", incarnation="i", types=["text"]))
    monkeypatch.setattr(Coordinator, "handle", _deadly(original))
    for _ in range(2):
        with dying_master(server, tmp_path):
            pass
    with running_master(server, tmp_path) as master:
        assert node.enter().encoder_type == "text"
        assert master.service.master.live.poison == 1
        [letter] = drained(server, TOPOLOGY.dead_letters)
        assert letter.headers["x-reason"] == "kills" and b"killer" in letter.body
    monkeypatch.setattr(Coordinator, "handle", original)
    log = open_log(tmp_path, read_only=True)
    [skipped] = [entry for entry in log.entries() if entry.skipped]
    assert isinstance(skipped.body, Join) and skipped.body.node == "killer"
    fold = origin(log).fold
    assert all(check is None or check.identical for _, check in verify(log, fold))
    assert "killer" not in fold.coordinator.state.nodes, "replay honours the skip"


def _deadly(original: Callable[[Coordinator, Entry], Any]) -> Callable[[Coordinator, Entry], Any]:
    """Folds nothing of the killer's."""

    def handle(self: Coordinator, entry: Entry) -> Any:
        if isinstance(entry.body, Join) and entry.body.node == "killer" and not entry.skipped:
            raise Bang
        return original(self, entry)

    return handle


def test_a_message_that_kills_the_master_before_its_row_is_durable_never_gets_one(
    server: MemoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Coordinator, "handle", _deadly(Coordinator.handle))
    killer, node = HandNode(server, "killer"), HandNode(server, "a")
    with dying_master(server, tmp_path):
        killer.say(".join", Join(node="killer", incarnation="i", types=["text"]))
    with dying_master(server, tmp_path):
        pass
    with running_master(server, tmp_path):
        assert node.enter().encoder_type == "text"
        [letter] = drained(server, TOPOLOGY.dead_letters)
        assert letter.headers["x-reason"] == "kills" and b"killer" in letter.body
    log = open_log(tmp_path, read_only=True)
    assert {entry.body.node for entry in log.entries() if isinstance(entry.body, Join)} == {"a"}


def test_bytes_that_kill_the_master_before_they_are_a_row_are_set_aside_too(
    server: MemoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = master_module.understood

    def understood(delivery: Delivery, topology: Any) -> Message:
        if b"killer" in delivery.body:
            raise Bang
        return original(delivery, topology)

    monkeypatch.setattr("master_service.master.understood", understood)
    killer = HandNode(server, "killer")
    with dying_master(server, tmp_path):
        killer.say(".join", Join(node="killer", incarnation="i", types=["text"]))
    with dying_master(server, tmp_path):
        pass
    with running_master(server, tmp_path):
        assert HandNode(server, "a").enter()
        [letter] = drained(server, TOPOLOGY.dead_letters)
        assert letter.headers["x-reason"] == "kills"


def test_an_update_whose_payload_is_damaged_before_it_counts_is_asked_for_again(
    server: MemoryServer, tmp_path: Path
) -> None:
    with running_master(server, tmp_path, COHORT) as master:
        a, b = HandNode(server, "a"), HandNode(server, "b")
        instruction = a.enter()
        b.enter()
        good, other = numbers(instruction, 0.001), numbers(instruction, 0.002)
        manifest = a.manifest(instruction, 0, good)
        a.send(manifest, good)
        state = master.service.master.state.encoders[instruction.encoder]
        [waiting] = eventually(lambda: list(state.buffer))
        file = payload_path(master.service.master.journal.log.directory / "payloads", waiting.payload)
        torn = file.read_bytes()[:-100]
        file.write_bytes(torn)
        b.send(b.manifest(instruction, 0, other), other)
        resend = a.hear(Resend)
        assert (resend.sequence, resend.attempt, state.version, state.updates) == (0, 1, 0, 1)
        a.send(manifest.model_copy(update={"attempt": 1}), good)
        receipts = [b.hear(Receipt), a.hear(Receipt)]  # in the order in which they count
        assert [(r.accepted, r.version, r.return_count) for r in receipts] == [(True, 1, 1)] * 2
        assert receipts[1].previous == receipt_hash(receipts[0]) and receipts[0].previous == ""
        digest = eventually(lambda: state.digest)
    _, parameters = rebuild(open_log(tmp_path, read_only=True), instruction.encoder)
    assert parameters.digest() == digest


def test_damage_of_what_a_published_version_was_made_of_is_named(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path):
        node = HandNode(server, "a")
        instruction = node.enter()
        bodies = numbers(instruction)
        manifest = node.manifest(instruction, 0, bodies)
        node.send(manifest, bodies)
        assert node.hear(Receipt).accepted
    log = open_log(tmp_path, read_only=True)
    payload_path(log.directory / "payloads", manifest.digest).write_bytes(b"torn")
    with running_master(server, tmp_path):
        pass  # the snapshot does not need it any more
    for snapshot in (tmp_path / "snapshots").iterdir():
        (snapshot / "state.json").write_text("{}")
    master = Master(server, tmp_path, decided())
    with pytest.raises(Damaged, match=rf"payload {manifest.digest} is damaged.* restore it from a backup"):
        master.party.wait(20.0)
    master.broker.close()


# private: SQLite counts the limit by connection, and it is the master's own that must be full
@pytest.mark.parametrize("how", ["no room", "sqlite says full"])
def test_a_full_disk_stops_acceptance_and_goes_on_when_there_is_room(
    server: MemoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with running_master(server, tmp_path) as master:
        node = HandNode(server, "a")
        instruction = node.enter()
        bodies = numbers(instruction)
        journal = master.service.master.journal
        rows = eventually(lambda: journal.log.last_offset)
        if how == "no room":
            monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
        else:
            # the limit is of a connection: the master's own, which nobody else in production has business with
            journal.log._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            [(pages,)] = journal.log._db.execute("PRAGMA page_count")
            journal.log._db.execute(f"PRAGMA max_page_count = {pages}")
            with pytest.raises(sqlite3.OperationalError, match="full"):
                journal.log._db.execute("INSERT INTO deaths VALUES (hex(zeroblob(100000)), 1)")
        count = 40 if how == "sqlite says full" else 1
        for sequence in range(count):  # enough to fill what is left of the last page
            node.send(node.manifest(instruction, sequence, bodies), bodies)
        eventually(lambda: master.service.report().disk.short)
        # it says so to who asks, and nothing that is not durable is acked
        observer = HandNode(server, "observer")
        observer.say(".status", AskStatus(sender="observer"))
        disk = observer.hear(StatusReport).report["disk"]
        assert disk["short"] and disk["needed_bytes"] > 0
        if how == "no room":
            assert journal.log.last_offset == rows and not answered(node)
            monkeypatch.undo()
        else:
            journal.log._db.execute("PRAGMA max_page_count = 1000000")
        heard = [node.hear(Receipt) for _ in range(count)]
        assert all(receipt.accepted for receipt in heard)
        assert [receipt.sequence for receipt in heard] == list(range(count))
        eventually(lambda: not master.service.report().disk.short)


def test_a_disk_that_is_really_full(server: MemoryServer, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with running_master(server, place / "m", min_free=0) as master:
            node = HandNode(server, "a")
            instruction = node.enter()
            filler = place / "filler"
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
            bodies = numbers(instruction)
            node.send(node.manifest(instruction, 0, bodies), bodies)
            eventually(lambda: master.service.report().disk.short)
            assert not answered(node)
            filler.unlink()
            assert node.hear(Receipt).accepted
            # nor does a snapshot that finds no room end it
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
            master.service.master.config = master.service.config.model_copy(update={"snapshot_every_seconds": 0.01})
            time.sleep(1.0)
            assert not master.party.wait(0.0)
            filler.unlink()
            eventually(lambda: list((place / "m" / "snapshots").glob("*[0-9]")))
        log = open_log(place / "m", read_only=True)
        assert all(check is None or check.identical for _, check in verify(log, origin(log).fold))
        log.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


HOLDS = {
    "a person's sqlite3": """
import sqlite3
db = sqlite3.connect(path, isolation_level=None)
db.execute("BEGIN IMMEDIATE")
""",
    "a tool that locks whole files to read them": """
import fcntl
held = [open(path + name, "rb") for name in ("", "-wal", "-shm")]
for file in held:
    fcntl.lockf(file, fcntl.LOCK_SH)
""",
}


@pytest.mark.parametrize("how", HOLDS)
def test_another_process_that_holds_the_ledger_does_not_end_the_master(
    server: MemoryServer, tmp_path: Path, how: str
) -> None:
    with running_master(server, tmp_path) as master:
        node = HandNode(server, "a")
        instruction = node.enter()
        bodies = numbers(instruction)
        words = f"path = {str(tmp_path / 'ledger.sqlite')!r}\n{HOLDS[how]}\nprint('held', flush=True)\ninput()"
        with subprocess.Popen(
            [sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdin is not None and holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            node.send(node.manifest(instruction, 0, bodies), bodies)
            eventually(lambda: master.service.report().log.blocked)
            assert "another process holds a lock" in master.service.report().log.blocked
            assert not answered(node)
            holder.stdin.write("\n")
        assert node.hear(Receipt).accepted
        eventually(lambda: not master.service.report().log.blocked)
        update = f"update {node.manifest(instruction, 0, bodies).update_id}"
        assert master.service.master.journal.log.deaths(update) == 0


@pytest.mark.parametrize(
    "beside", [(), ("-wal",), ("-shm",), ("-wal", "-shm")], ids=lambda names: "".join(names) or "-"
)
def test_a_copy_that_nobody_may_write_beside_is_read_whatever_lies_there(
    tmp_path: Path, beside: tuple[str, ...]
) -> None:
    """A copy of a ledger that a master was writing to, on a file system that is mounted to be read."""
    log, place = open_log(tmp_path / "written"), tmp_path / "copy"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        for number in range(3):
            log.append(Tick(), message_id=str(number), at=float(number))
            if number == 1:  # what is read without the write-ahead log
                with closing(sqlite3.connect(tmp_path / "written" / "ledger.sqlite")) as other:
                    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for name in ("", *beside):
            shutil.copy(tmp_path / "written" / f"ledger.sqlite{name}", place)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with closing(open_log(place, read_only=True)) as copy:
            assert [entry.offset for entry in copy.entries()] == list(range(3 if "-wal" in beside else 2))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        log.close()


def test_snapshots_are_written_while_serving_and_retention_drops_what_no_start_needs(
    server: MemoryServer, tmp_path: Path
) -> None:
    with running_master(server, tmp_path, retention="since-snapshot", snapshot_every_seconds=0.05) as master:
        node = HandNode(server, "a")
        instruction = node.enter()
        digests = []
        for sequence in range(6):
            bodies = numbers(instruction, 0.001 * (sequence + 1))
            manifest = node.manifest(instruction, sequence, bodies, base_version=sequence)
            node.send(manifest, bodies)
            digests.append(manifest.digest)
            assert node.hear(Receipt).accepted
            log = master.service.master.journal.log
            eventually(lambda log=log: (tmp_path / "snapshots" / f"{log.last_offset:012d}").exists())
        eventually(lambda: log.payloads.damage(digests[3]) is not None)
        assert log.payloads.damage(digests[5]) is None, "what came after the older snapshot stays"
        state = master.service.master.state.encoders[instruction.encoder]
        digest = state.digest
    # the newest snapshot is damaged: the older one and the log after it are enough
    newest = max((tmp_path / "snapshots").iterdir())
    (newest / "tensors.safetensors").write_bytes(b"damaged")
    with running_master(server, tmp_path, retention="since-snapshot") as master:
        eventually(lambda: master.service.master.journal.fold.offset > int(newest.name))
        assert master.service.master.state.encoders[instruction.encoder].digest == digest
    kept = {path.name for path in (tmp_path / "snapshots").iterdir()}
    assert len(kept) == 2 and newest.name not in kept, "a damaged one does not push out one that is whole"
    reader = open_log(tmp_path, read_only=True)
    begin = origin(reader)
    assert begin.fold.offset > 0 and "payloads were dropped (retention since-snapshot)" in begin.left_out
    with pytest.raises(KeyError, match=r"version 1 of .* is not in the log.*dropped"):
        rebuild(reader, instruction.encoder, 1)
    assert rebuild(reader, instruction.encoder)[1].digest() == digest


def test_rows_that_a_snapshot_was_made_of_are_missed(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path):
        HandNode(server, "a").enter()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        ledger.execute("DELETE FROM entries WHERE offset >= (SELECT max(offset) FROM entries)")
    with pytest.raises(Damaged, match=r"rows are lost; .*`shared-encoder log repair"):
        MasterService(MasterConfig(state_dir=tmp_path), decided(), connection(server, "master"), TOPOLOGY)


def test_a_request_twice_is_one(server: MemoryServer, tmp_path: Path) -> None:
    """The broker delivers again what was appended and not acked: the row is there, nothing follows a second time."""
    with running_master(server, tmp_path) as master:
        node = HandNode(server, "a")
        instruction = node.enter()
        state = master.service.master.state
        body = Get(sender="a", encoder_type="text", fresh=True)
        for _ in range(2):
            node.broker.publish(Publication(TOPOLOGY.request, "a.get", encode(body), message_id="the-same"))
        node.enter()
        assert list(state.encoders) == [instruction.encoder]
        rows = [entry for entry in master.service.master.journal.log.entries() if entry.body == body]
        assert len(rows) == 1
