"""What nodes must not send, sent: each is answered or set aside, nothing is lost, and the master goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import msgpack
import pytest

from common.brokers.memory import MemoryServer
from common.errors import LockHeld
from common.numbers.layout import Layout
from common.wire.broker import Publication
from common.wire.codec import encode
from common.wire.to_master import Join
from common.wire.to_node import Instruction, Receipt, Resend
from tests.builders import update_chunks
from tests.integration.harness import (
    TOPOLOGY,
    HandNode,
    connection,
    decided,
    drained,
    eventually,
    numbers,
    running_master,
)


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


def test_malformed_messages_are_set_aside_with_the_reason(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path) as master:
        node = HandNode(server, "a")
        eventually(lambda: server.find(TOPOLOGY.master_inbox))
        join = Join(node="a", incarnation="i", types=["text"])
        bad = {
            "not-msgpack": b"\xc1garbage",
            "unknown-kind": msgpack.packb({"kind": "brew", "schema_version": 1}),
            "schema-version": msgpack.packb({**msgpack.unpackb(encode(join)), "schema_version": 9}),
            "invalid": msgpack.packb({**msgpack.unpackb(encode(join)), "types": 5}),
            "sender": encode(Join(node="b", incarnation="i", types=["text"])),
            "unexpected-kind": encode(
                Receipt(encoder="e", node="a", incarnation="i", sequence=0, digest="0" * 64, accepted=True, version=1)
            ),
        }
        for body in bad.values():
            node.say(".join", body)
        instruction = node.enter()  # after all of that the master still serves
        assert instruction.encoder_type == "text"
        eventually(lambda: master.service.master.live.poison == len(bad))
        letters = drained(server, TOPOLOGY.dead_letters)
        assert {letter.headers["x-reason"]: letter.body for letter in letters} == bad
        assert all(letter.headers["x-detail"] for letter in letters)


def test_nan_wrong_layout_and_wrong_size_are_refused_and_leave_the_encoder_as_it_was(
    server: MemoryServer, tmp_path: Path
) -> None:
    with running_master(server, tmp_path) as master:
        node = HandNode(server, "a")
        instruction = node.enter()
        encoder = master.service.master.state.encoders[instruction.encoder]
        before = encoder.digest
        nan = numbers(instruction, float("nan"))
        node.send(node.manifest(instruction, 0, nan), nan)
        assert node.hear(Receipt).reason == "not-finite"

        good = numbers(instruction)
        name, shape = instruction.layout[1]
        other = [instruction.layout[0], (name, [*shape, 2]), *instruction.layout[2:]]
        wrong = node.manifest(instruction, 1, good, layout_digest=Layout(other).digest, layout=other)
        node.send(wrong, good)
        refusal = node.hear(Receipt)
        assert refusal.reason == "layout" and f"tensor {name!r} has shape {[*shape, 2]}" in refusal.detail

        node.send(node.manifest(instruction, 2, [good[0][:-4]]), [good[0][:-4]])
        assert node.hear(Receipt).reason == "size"
        lied = node.manifest(instruction, 3, good, digest="0" * 64)
        node.send(lied, good)
        assert node.hear(Receipt).reason == "digest"
        assert encoder.digest == before and encoder.version == 0

        node.send(node.manifest(instruction, 4, good), good)
        receipt = node.hear(Receipt)
        assert receipt.accepted and receipt.version == 1
        eventually(lambda: encoder.digest != before)
        # chunks of refused updates do not stay and fill the node's queue
        eventually(lambda: not server.queue(TOPOLOGY.chunk_queue("a")).ready)


def test_damaged_and_missing_chunks_are_asked_for_again(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path, chunk_timeout_seconds=0.5):
        node = HandNode(server, "a")
        instruction = node.enter()
        bodies = numbers(instruction)
        manifest = node.manifest(instruction, 0, bodies)
        [chunk] = update_chunks(manifest, bodies)
        node.say(".chunk", chunk.model_copy(update={"data": bytes(len(chunk.data))}), TOPOLOGY.update)
        node.say(".ready", manifest, TOPOLOGY.update)
        resend = node.hear(Resend)
        assert (resend.sequence, resend.attempt) == (0, 1)
        assert [letter.headers["x-reason"] for letter in drained(server, TOPOLOGY.dead_letters)] == ["checksum"]
        node.send(manifest.model_copy(update={"attempt": 1}), bodies)
        assert node.hear(Receipt).accepted
        # a receipt that was lost: the same update once more, the same answer, counted once
        node.send(manifest.model_copy(update={"attempt": 2}), bodies)
        again = node.hear(Receipt)
        assert again.accepted and again.return_count == 1


def test_a_second_master_is_refused(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path / "one") as first:
        eventually(lambda: TOPOLOGY.master_lock in server.locks)
        from master_service.config import MasterConfig
        from master_service.service import MasterService

        broker = connection(server, "second")
        second = MasterService(MasterConfig(state_dir=tmp_path / "two"), decided(), broker, TOPOLOGY)
        with pytest.raises(LockHeld, match=r"master\.lock is held by another"):
            second.run(threading.Event())
        broker.close()
        assert not first.party.wait(0.0)


def test_a_master_that_starts_again_goes_on_where_it_was(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path) as first:
        node = HandNode(server, "a")
        instruction = node.enter()
        bodies = numbers(instruction)
        node.send(node.manifest(instruction, 0, bodies), bodies)
        assert node.hear(Receipt).accepted
        epoch = first.service.master.state.epoch
    # while it is away an update is handed in, and garbage
    node.send(node.manifest(instruction, 1, bodies, base_version=1), bodies)
    node.broker.publish(Publication(TOPOLOGY.request, "a.join", b"garbage"))
    with running_master(server, tmp_path) as master:
        receipt = node.hear(Receipt)
        assert (receipt.sequence, receipt.accepted, receipt.version, receipt.return_count) == (1, True, 2, 2)
        assert list(master.service.master.state.encoders) == [instruction.encoder]
        assert master.service.master.state.epoch > epoch


def test_nobody_takes_the_place_of_anothers_update(server: MemoryServer, tmp_path: Path) -> None:
    """A message id is the sender's to choose; the id of another's update, used first, must not displace it."""
    with running_master(server, tmp_path):
        victim, rogue = HandNode(server, "a"), HandNode(server, "b")
        instruction = victim.enter()
        bodies = numbers(instruction)
        manifest = victim.manifest(instruction, 0, bodies)
        join = encode(Join(node="b", incarnation="i", types=["text"]))
        taken = f"{manifest.update_id}/{manifest.attempt}"
        rogue.broker.publish(Publication(TOPOLOGY.request, "b.join", join, message_id=taken))
        rogue.hear(Instruction)
        victim.send(manifest, bodies)
        assert victim.hear(Receipt).accepted
