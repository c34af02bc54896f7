"""An encoder type of another package fails in a running node: what ends, what is said here, and what travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.brokers.memory import MemoryBroker, MemoryServer
from common.errors import OwnersCodeError
from common.wire.broker import Publication
from common.wire.codec import decode
from common.wire.to_master import Alive, InstructionAck
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.service import NodeService
from tests.faults.tiny import TinyModel, samples
from tests.integration.harness import TOPOLOGY, ThreadParty, decided, eventually, running_master

PLUGIN = Path(__file__).parents[1] / "faults" / "plugin"


class Recording(MemoryBroker):
    """Keeps every publication that leaves."""

    def __init__(self, server: MemoryServer) -> None:
        self.left: list[Publication] = []
        super().__init__(server, user="clinic", dead_letters=TOPOLOGY.dead_letters)

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        self.left += publications
        super().publish(*publications, timeout=timeout)


def secret(*_: Any) -> Any:
    raise ValueError("cannot read 'patient Jones'")


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


@pytest.fixture
def node(server: MemoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeService:
    monkeypatch.syspath_prepend(PLUGIN)
    config = NodeConfig(state_dir=tmp_path / "clinic", alive_every_seconds=0.05)
    corpus = Corpus("tiny", samples(0), None, [], None)  # type: ignore[arg-type]
    return NodeService("clinic", config, {"tiny": corpus}, Recording(server), TOPOLOGY)


def said(node: NodeService, kind: type[Any]) -> list[Any]:
    assert isinstance(node.broker, Recording)
    control = [each for each in node.broker.left if each.exchange in (TOPOLOGY.ack, TOPOLOGY.request)]
    return [message for message in (decode(each.body) for each in control) if isinstance(message, kind)]


def test_f18_a_refusal_names_the_kind_of_error_and_none_of_its_words(
    server: MemoryServer, node: NodeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an error quotes may be a sample, and a refusal travels."""
    monkeypatch.setattr(TinyModel, "encode", secret)
    with running_master(server, tmp_path / "m", decided(architecture={}), get="tiny"):
        party = ThreadParty("clinic", node.run)
        ack, *_ = eventually(lambda: said(node, InstructionAck))  # it is asked again when it has joined
        eventually(lambda: any("refused" in alive.note for alive in said(node, Alive)))
        party.stop()
        assert party.wait(30.0)
    assert not ack.accepted
    assert ack.reason == "encoder type 'tiny' (package tiny-encoder) raised ValueError in its encode"
    assert isinstance(node.broker, Recording)
    assert not any(b"Jones" in each.body for each in node.broker.left)


def test_f18_a_training_step_that_fails_ends_the_service_as_theirs(
    server: MemoryServer, node: NodeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_master(server, tmp_path / "m", decided(architecture={}), get="tiny"):
        party = ThreadParty("clinic", node.run)
        eventually(lambda: node.figures.steps > 3)
        monkeypatch.setattr(torch.nn.functional, "mse_loss", secret)  # deep in what their loss calls
        with pytest.raises(OwnersCodeError, match=r"package .*\) raised ValueError: cannot read .*in its loss"):
            eventually(lambda: party.wait(0.1))
