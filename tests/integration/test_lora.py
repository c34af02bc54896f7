"""An update of a base, over the embedded broker: what leaves a node, who is refused, and that every export opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from common.brokers.memory import MemoryServer
from common.encoders import frozen_base, get_encoder_type
from common.encoders.shared_vocabulary import TOKENIZER
from common.numbers.slicing import payload_size
from common.wire.codec import decode
from common.wire.to_master import InstructionAck, UpdateChunk, UpdateManifest
from common.wire.update_rule import FinishRule, ReturnWhen, UpdateRule
from master_service.decisions.settings import Settings, StopRule
from master_service.decisions.state import EncoderState
from node_service.corpus.corpus import load_corpus
from node_service.evaluation.evaluate import Domain, score, shared_model
from tests.integration.harness import decided, eventually, running_master
from tests.integration.test_federation import Node, lines, nodes

TEXT = get_encoder_type("text")


def make_base(place: Path, seed: int) -> Path:
    """A public model, as it were."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    architecture, assets = TEXT.assets(TEXT.architecture({"model_type": "bert", **sizes}), {"tokenizer": "bytes"})
    TEXT.export_shared(place, architecture, TEXT.initial(architecture, seed), "", assets)
    return place


def on(base: Path, how: str) -> Settings:
    return decided(
        min_nodes=2,
        architecture={"shared": "lora", "lora_rank": 2, "sequence_length": 16, "lora_base": how},
        base=str(base),
        stop=StopRule(updates=6),
        update_rule=UpdateRule(when=ReturnWhen(steps=2), encoding="float32", finish=FinishRule(what="none")),
    )


def said(node: Node, kind: type[Any]) -> list[Any]:
    """Everything of one kind that has left a node."""
    return [message for each in node.broker.left if isinstance(message := decode(each.body), kind)]


def plain(directory: Path) -> Any:
    model, report = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("how", ["travels", "named"])
def test_the_update_alone_leaves_a_node_and_every_export_is_a_plain_model(tmp_path: Path, how: str) -> None:
    base, other = make_base(tmp_path / "base", 1), make_base(tmp_path / "other", 2)
    server = MemoryServer()
    with running_master(server, tmp_path / "master", on(base, how), export_dir=tmp_path / "encoder") as master:
        if how == "named":
            refused = Node(server, tmp_path, "c", lines(9), private={"base": str(other)})
            with nodes(refused):
                [ack] = eventually(lambda: said(refused, InstructionAck), 60)
            assert not ack.accepted and all(frozen_base.read(place).digest in ack.reason for place in (base, other))
        private = {"share_embeddings": False} | ({"base": str(base)} if how == "named" else {})
        members = [Node(server, tmp_path, name, lines(seed), private=private) for seed, name in enumerate("ab")]
        with nodes(*members):
            state = master.service.master.state
            encoder = eventually(lambda: next((e for e in state.encoders.values() if e.status == "finished"), None), 60)
            for node in members:
                eventually(lambda node=node: node.party.wait(0.0), 30)
    travelled = {frozen_base.ASSET} if how == "travels" else set()
    assert {entry.name for entry in encoder.assets} == {TOKENIZER, *travelled}
    assert str(tmp_path) not in encoder.model_dump_json(), "where the operator has the base is said to nobody"

    for node in members:
        check_what_left(node, base, encoder)
        check_its_export(node, tmp_path / node.service.name / "encoders" / encoder.encoder / "model", base)
    plain(tmp_path / "encoder")
    _, tensors = TEXT.architecture_of(tmp_path / "encoder")
    corpora = {"text": load_corpus(members[0].service.config.corpus[0])}
    domain = Domain.of("a", corpora, tmp_path / "a" / "encoders" / encoder.encoder)
    assert score(domain, shared_model(domain, tensors)).loss > 0, "it is evaluated like any other"


def check_what_left(node: Node, base: Path, encoder: EncoderState) -> None:
    """The numbers of B and nothing else, least of all those of the base."""
    assert node.service.node is not None and node.service.node.training is not None
    shared = node.service.node.training.model.shared_parameters()  # type: ignore[attr-defined]
    assert [name for name, _ in encoder.layout] == list(shared) and all(name.endswith(".lora_B") for name in shared)
    assert encoder.size == sum(parameter.numel() for parameter in shared.values())
    manifests = said(node, UpdateManifest)
    length = payload_size(encoder.size, "float32")
    assert manifests and not said(node, UpdateChunk), "small: each is one message"
    assert all(manifest.data is not None and len(manifest.data) == length for manifest in manifests)
    frozen = frozen_base.read(base).tensors
    assert encoder.size < sum(tensor.numel() for tensor in frozen.values()) / 10
    pieces = [tensor.numpy().tobytes()[:64] for tensor in frozen.values() if tensor.ndim > 1]
    assert not any(piece in publication.body for publication in node.broker.left for piece in pieces)


def check_its_export(node: Node, directory: Path, base: Path) -> None:
    """It says what the node's own model says, corrections merged, and no longer what the base says."""
    assert node.service.node is not None and node.service.node.training is not None
    network = node.service.node.training.model.network  # type: ignore[attr-defined]
    tokens = AutoTokenizer.from_pretrained(directory)("alpha beta gamma", return_tensors="pt")
    with torch.no_grad():
        expected = network(**tokens).logits
        assert torch.allclose(plain(directory)(**tokens).logits, expected, atol=1e-5)
        assert not torch.allclose(plain(base)(**tokens).logits, expected, atol=1e-3)
