"""One node that means ill, or is unluckily broken, over the embedded broker: the master and the others go on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common.brokers.memory import MemoryServer
from common.errors import UserError
from common.wire.base import Message
from common.wire.broker import Delivery, Publication
from common.wire.codec import encode
from common.wire.to_master import Get, UpdateChunk
from common.wire.to_node import Answer, Receipt
from common.wire.topology import Topology
from common.wire.transfer import checksum
from master_service import master as master_module
from master_service.config import MasterConfig
from master_service.decisions.rules.model import aggregation_rule
from master_service.service import MasterService
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
from tests.integration.test_master_recovery import dying_master


class Bang(BaseException):
    """Dies as of a lack of memory."""


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


def test_the_largest_losses_are_averaged(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path, decided(rule=aggregation_rule("fedbuff"))):
        evil, good = HandNode(server, "evil"), HandNode(server, "good")
        instruction = evil.enter()
        good.enter()
        bodies = numbers(instruction)
        for sequence in range(2):
            evil.send(evil.manifest(instruction, sequence, bodies, loss=3.4e38, seconds=1e12), bodies)
        good.send(good.manifest(instruction, 0, bodies), bodies)
        assert good.hear(Receipt).accepted
    with running_master(server, tmp_path):
        pass  # and what is in the log is folded again


def test_an_attempt_has_a_next(server: MemoryServer, tmp_path: Path) -> None:
    with running_master(server, tmp_path, chunk_timeout_seconds=0.2):
        node = HandNode(server, "a")
        instruction = node.enter()
        bodies = numbers(instruction)
        manifest = node.manifest(instruction, 0, bodies).model_copy(update={"attempt": 1 << 31})
        node.say(".ready", manifest, TOPOLOGY.update)
        eventually(lambda: drained(server, TOPOLOGY.dead_letters), 10)
        node.send(node.manifest(instruction, 0, bodies), bodies)
        assert node.hear(Receipt).accepted


def test_a_flood_of_chunks_holds_nobody_up(server: MemoryServer, tmp_path: Path) -> None:
    # the first update waits for a second node's, which never comes: for the grace time, and no longer
    rule = aggregation_rule("fedasync", {"buffer": {"grace_seconds": 0.5}})
    with running_master(server, tmp_path, decided(rule=rule)):
        evil, good = HandNode(server, "evil"), HandNode(server, "good")
        instruction = evil.enter()
        good.enter()
        bodies = numbers(instruction)
        wrong = evil.manifest(instruction, 0, bodies, layout_digest="1" * 64)
        junk = UpdateChunk(
            node="evil", incarnation="first", encoder=instruction.encoder, sequence=9, attempt=0, index=0,
            checksum=checksum(b"x"), data=b"x",
        )  # fmt: skip
        stop = threading.Event()

        def flood() -> None:
            while not stop.wait(0.03):
                evil.say(".chunk", junk, TOPOLOGY.update)

        evil.say(".ready", wrong, TOPOLOGY.update)
        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        try:
            time.sleep(0.2)
            good.send(good.manifest(instruction, 0, bodies), bodies)
            assert good.hear(Receipt, 15.0).accepted
        finally:
            stop.set()
            thread.join()


def test_an_update_that_kills_before_it_is_a_row_is_refused_in_the_end(
    server: MemoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any) -> Any:
        raise Bang

    node = HandNode(server, "a")
    with monkeypatch.context() as patch:
        patch.setattr("master_service.arithmetic.measuring.Measurement.add", measure)
        with dying_master(server, tmp_path, dies_of=Bang):
            instruction = node.enter()
            bodies = numbers(instruction)
            node.send(node.manifest(instruction, 0, bodies), bodies)
        with dying_master(server, tmp_path, dies_of=Bang):
            pass
        with running_master(server, tmp_path) as master:
            assert node.hear(Receipt).reason == "set-aside"
            # sent again it is answered alike, and kills nobody
            node.send(node.manifest(instruction, 0, bodies, attempt=1), bodies)
            assert node.hear(Receipt).reason == "set-aside"
            assert master.service.master.state.encoders[instruction.encoder].updates == 0


def test_however_a_message_is_named_it_kills_twice_at_most(
    server: MemoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = master_module.understood

    def understood(delivery: Delivery, topology: Topology) -> Message:
        if delivery.message_id and delivery.message_id.startswith("killer"):
            raise Bang
        return original(delivery, topology)

    monkeypatch.setattr("master_service.master.understood", understood)
    node = HandNode(server, "a")
    with dying_master(server, tmp_path, dies_of=Bang):
        get = encode(Get(sender="a", encoder_type="text"))
        node.broker.publish(Publication(TOPOLOGY.request, "a.get", get, message_id="killer\n" + "x" * 250))
    with dying_master(server, tmp_path, dies_of=Bang):
        pass
    with running_master(server, tmp_path):
        assert node.enter()


@pytest.mark.parametrize("size", [1 << 40, 1 << 20])
def test_an_encoder_that_is_too_large_is_not_made(server: MemoryServer, tmp_path: Path, size: int) -> None:
    with running_master(server, tmp_path):
        node = HandNode(server, "a")
        architecture = {"hidden_size": size, "intermediate_size": size, "num_attention_heads": 1}
        node.say(".get", Get(sender="a", encoder_type="text", architecture=architecture, fresh=True))
        answer = node.hear(Answer)
        assert not answer.accepted and answer.status == "failed"
        assert node.enter(), "and the master is there"


def test_an_export_never_replaces_what_is_none(server: MemoryServer, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("not to be lost")
    config = MasterConfig(state_dir=tmp_path / "m", export_dir=mine)
    with pytest.raises(UserError, match="holds something else than an exported encoder"):
        MasterService(config, decided(), connection(server, "master"), TOPOLOGY)
    assert (mine / "notes.txt").read_text() == "not to be lost"
