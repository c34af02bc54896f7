"""Master and real nodes in one process over the embedded broker: real training, real text, and what leaves a node."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from common.brokers.memory import MemoryBroker, MemoryServer
from common.numbers.slicing import EncodingName, payload_size
from common.wire.broker import Publication
from common.wire.codec import decode
from common.wire.to_master import Stop, UpdateManifest
from common.wire.update_rule import FinishRule, ReturnWhen, UpdateRule
from deploy.commands.observe import Observer
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import StopRule
from master_service.history.replay import rebuild
from master_service.log.message_log import open_log
from node_service.config import NodeConfig
from node_service.corpus.corpus import CorpusConfig, load_corpus
from node_service.service import NodeService
from node_service.training.session import Session
from tests.integration.harness import (
    TOPOLOGY,
    HandNode,
    ThreadParty,
    connection,
    decided,
    eventually,
    numbers,
    running_master,
)

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


class RecordingBroker(MemoryBroker):
    """Keeps every publication that leaves."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.left: list[Publication] = []
        super().__init__(*arguments, **named)

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        self.left += publications
        super().publish(*publications, timeout=timeout)


class Node:
    """A real node in a thread."""

    def __init__(self, server: MemoryServer, directory: Path, name: str, lines: list[str], **config: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        corpus_file = directory / f"{name}.txt"
        corpus_file.write_text("\n".join(lines))
        corpus = CorpusConfig(path=(str(corpus_file),), documents="line")
        plain: dict[str, Any] = {
            "corpus": [corpus],
            "state_dir": directory / name,
            "private": {"vocabulary": 300},
            "alive_every_seconds": 0.2,
            "exit_when_finished": True,
        }
        node_config = NodeConfig(**{**plain, **config})
        self.broker = RecordingBroker(server, user=name, dead_letters=TOPOLOGY.dead_letters)
        [chosen] = node_config.corpus
        self.service = NodeService(name, node_config, {chosen.type: load_corpus(chosen)}, self.broker, TOPOLOGY)
        self.party = ThreadParty(name, self.service.run)

    def end(self) -> None:
        self.party.stop()
        assert self.party.wait(30.0)
        self.broker.close()


@contextmanager
def nodes(*made: Node) -> Iterator[None]:
    try:
        yield
    finally:
        for node in made:
            node.party.stop()  # all at once: each takes a second to say goodbye
        for node in made:
            node.end()


def lines(seed: int, extra: str = "") -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (150, 12), generator=generator)
    return [" ".join(WORDS[i] for i in row) + extra for row in picks.tolist()]


@pytest.mark.parametrize("preset", ["return-count", "fedavg"])
def test_a_whole_training_from_get_to_export(tmp_path: Path, preset: str) -> None:
    server = MemoryServer()
    # a phase that leaves the trunk alone, so that it is the same in everybody's export
    update = UpdateRule(when=ReturnWhen(steps=2), finish=FinishRule(what="private"))
    settings = decided(rule=aggregation_rule(preset), min_nodes=2, update_rule=update)
    with running_master(server, tmp_path / "master", settings, export_dir=tmp_path / "encoder") as master:
        state = master.service.master.state
        first = [Node(server, tmp_path, name, lines(seed)) for seed, name in enumerate("ab")]
        encoder = eventually(lambda: next((e for e in state.encoders.values() if e.version >= 3), None), 60)
        # without corrections, which its export would have in the matrices: its private part is the decoder's bias
        late = Node(server, tmp_path, "late", lines(9), private={"adapter_rank": 0})
        with nodes(*first, late):
            # however long it takes the late one to build its model, and then some more of all together
            eventually(lambda: "late" in encoder.members and encoder.members["late"].returns > 0, 60)
            enough = encoder.updates + 10
            eventually(lambda: encoder.updates >= enough, 60)
            operator = connection(server, "operator")
            observer = Observer(operator, TOPOLOGY)
            observer.say(Stop(sender=observer.name))
            eventually(lambda: encoder.status == "finished", 60)
            for node in (*first, late):
                eventually(lambda node=node: node.party.wait(0.0), 30)  # they end by themselves
            observer.close()
            operator.close()
        assert encoder.members["late"].version >= 3
        assert {node.service.figures.version for node in first} == {encoder.version}
        assert sum(member.returns for member in encoder.members.values()) == encoder.updates >= enough
        digest = encoder.digest
    # the log alone makes the same encoder, and the export opens with what everybody uses
    assert rebuild(open_log(tmp_path / "master", read_only=True), encoder.encoder)[1].digest() == digest
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

    shared, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model = AutoModel.from_pretrained(tmp_path / "encoder")
    private = tmp_path / "late" / "encoders" / encoder.encoder
    whole, report = AutoModelForMaskedLM.from_pretrained(private / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(private / "model")("alpha beta", return_tensors="pt")
    assert whole(**tokens).logits.shape[-1] == shared.config.vocab_size
    # what is shared is the same in both exports but for the rounding of bfloat16 on the way down
    ours, theirs = model.state_dict(), whole.base_model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=2**-8, atol=1e-6)
    assert not shared.decoder.bias.any() and whole.decoder.bias.any()
    assert json.loads((private / "pinned.json").read_text())["version"] == encoder.version


def test_what_leaves_a_node_holds_no_private_parameter_and_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = " patient" + secrets.token_hex(12)
    server, private_bytes = MemoryServer(), []
    original = Session.hand_in

    def hand_in(self: Session, *arguments: Any, **named: Any) -> Any:
        for parameter in self.model.private_parameters().values():
            raw = parameter.detach().numpy().tobytes()
            private_bytes.append(raw[:64])
            private_bytes.append(parameter.detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes()[:32])
        return original(self, *arguments, **named)

    monkeypatch.setattr(Session, "hand_in", hand_in)
    for encoding in get_args(EncodingName):
        settings = decided(stop=StopRule(updates=4), update_rule=UpdateRule(encoding=encoding))
        with running_master(server := MemoryServer(), tmp_path / encoding / "m", settings) as master:
            state = master.service.master.state
            node = Node(server, tmp_path / encoding, "hospital", lines(1, canary))
            with nodes(node):
                eventually(lambda state=state: any(e.status == "finished" for e in state.encoders.values()), 60)
            [encoder] = state.encoders.values()
        training = node.service.node.training
        assert training is not None
        shared, own = training.model.shared_parameters(), training.model.private_parameters()
        assert own and not {id(p) for p in shared.values()} & {id(p) for p in own.values()}
        assert [name for name, _ in encoder.layout] == list(shared)
        assert sum(p.numel() for p in shared.values()) == encoder.size

        payload = 0
        for publication in node.broker.left:
            body = publication.body
            assert canary.strip().encode() not in body
            assert not any(piece in body for piece in private_bytes)
            message = decode(body)
            numbers = getattr(message, "data", None) or b""
            payload += len(numbers)
            # words are cut out of everything that is not numbers: ids and digests are all that is left
            rest = body.replace(numbers, b"") if numbers else body
            assert len(rest) == len(body) - len(numbers) < 1000
            assert not {word.encode() for word in WORDS if len(word) > 4} & set(re.findall(rb"[a-z]+", rest))
        manifests = [m for p in node.broker.left if isinstance(m := decode(p.body), UpdateManifest)]
        # nothing but the shared encoder's numbers fits into what was sent
        assert manifests and payload == len(manifests) * payload_size(encoder.size, encoding)
        assert len(private_bytes) > 4


def test_a_node_that_leaves_hands_in_and_comes_back_as_the_same(tmp_path: Path) -> None:
    server = MemoryServer()
    with running_master(server, tmp_path / "master") as master:
        state = master.service.master.state
        node = Node(server, tmp_path, "a", lines(1))
        encoder = eventually(lambda: next((e for e in state.encoders.values() if e.updates >= 3), None), 60)
        node.end()
        eventually(lambda: not encoder.members["a"].accepted)
        steps, returns = node.service.figures.steps, encoder.members["a"].returns
        assert encoder.members["a"].steps == steps, "every step it took was handed in"
        back = Node(server, tmp_path, "a", lines(1))
        with nodes(back):
            eventually(lambda: encoder.members["a"].returns > returns, 30)
        assert back.service.figures.steps > steps  # the optimiser and the data position went on
        assert len(encoder.members) == 1


def test_a_node_without_samples_of_the_type_refuses_with_the_reason(tmp_path: Path) -> None:
    server = MemoryServer()
    settings = decided(architecture={"hidden_size": 16, "num_attention_heads": 2, "sequence_length": 16})
    with running_master(server, tmp_path / "master", settings) as master:
        node = Node(server, tmp_path, "a", lines(1), private={"vocabulary": 10})
        with nodes(node):
            entry = eventually(
                lambda: next(
                    (e.body for e in master.service.master.journal.log.entries() if e.body.kind == "ack"), None
                ),
                30,
            )
        assert not entry.accepted and "vocabulary" in entry.reason
        hand = HandNode(server, "b")
        instruction = hand.enter()
        bodies = numbers(instruction)
        hand.send(hand.manifest(instruction, 0, bodies), bodies)  # the others are served
        eventually(lambda: master.service.master.state.encoders[instruction.encoder].version == 1)


def test_images_are_trained_the_same_way(tmp_path: Path) -> None:
    """Two owners whose pictures differ in size and channels share one trunk."""
    server = MemoryServer()
    architecture = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    settings = decided(architecture=architecture, stop=StopRule(updates=6), min_nodes=2)
    shapes = {"grey": (60, 8, 8), "colour": (60, 12, 12, 3)}
    with running_master(server, tmp_path / "m", settings, get="image", export_dir=tmp_path / "encoder") as master:
        made = []
        for name, shape in shapes.items():
            np.savez(tmp_path / f"{name}.npz", x_train=np.random.default_rng(0).integers(0, 255, shape, np.uint8))
            corpus = CorpusConfig(type="image", path=(str(tmp_path / f"{name}.npz"),))
            config = {"corpus": [corpus], "private": {}}
            made.append(Node(server, tmp_path, name, [], **config))
        with nodes(*made):
            state = master.service.master.state
            encoder = eventually(lambda: next((e for e in state.encoders.values() if e.status == "finished"), None), 60)
            for node in made:
                eventually(lambda node=node: node.party.wait(0.0), 30)
    assert {name: member.returns > 0 for name, member in encoder.members.items()} == dict.fromkeys(shapes, True)
    from transformers import AutoModel, ViTMAEForPreTraining

    assert AutoModel.from_pretrained(tmp_path / "encoder").config.model_type == "vit_mae"
    for name in shapes:
        directory = tmp_path / name / "encoders" / encoder.encoder / "model"
        _, report = ViTMAEForPreTraining.from_pretrained(directory, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
