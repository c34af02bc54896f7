"""Real nodes that are killed, restored, cut off and started twice, with a real master over the embedded broker."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.brokers.memory import MemoryServer
from common.errors import LockHeld
from common.numbers.encodings import encode_vector
from common.numbers.layout import Layout
from common.wire.update_rule import ReturnWhen, UpdateRule
from common.wire.versions import publish_version
from master_service.decisions.rules.model import GuardRule, aggregation_rule
from master_service.decisions.settings import StopRule
from master_service.decisions.state import EncoderState
from node_service.corpus.corpus import CorpusConfig
from node_service.handover.handover import Handover
from tests.integration.harness import TOPOLOGY, HandNode, Master, decided, eventually, numbers, running_master
from tests.integration.test_federation import Node, lines, nodes

UNANSWERED = 3
RULE = UpdateRule(when=ReturnWhen(steps=2), max_unanswered=UNANSWERED)


class Killed(BaseException):
    """kill -9: what the process would have done at its end is not done."""


def kill_at(patch: pytest.MonkeyPatch, node: Node, label: str, occurrence: int) -> None:
    """Let the node die at a labelled step; nodes that are started later have the same name and live."""
    seen: list[str] = []
    # its main thread, and the one that puts checkpoints in place
    names = (node.party.name, f"checkpoint-{node.service.name}")

    def reached(step: str) -> None:
        if threading.current_thread().name in names and step == label:
            seen.append(step)
            if len(seen) == occurrence:
                raise Killed

    for module in ("training.checkpoint", "handover.handover", "node"):
        patch.setattr(f"node_service.{module}.reached", reached)


def died(node: Node) -> None:
    with pytest.raises(Killed):
        eventually(lambda: node.party.wait(0.0), 30)
    node.broker.close()


def receipts(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "receipts.jsonl").read_text().splitlines()]


def training_encoder(master: Master, updates: int = 2) -> EncoderState:
    state = master.service.master.state
    found = eventually(lambda: next((e for e in state.encoders.values() if e.updates >= updates), None), 60)
    assert isinstance(found, EncoderState)
    return found


def trained_to_the_limit(node: Node) -> bool:
    """It has as many unanswered updates as it may, and a full one more to hand in."""
    inner = node.service.node
    return inner is not None and len(inner.state.owed) == UNANSWERED and inner.figures.waiting_since is not None


LABELS = [f"node {when} {what}" for what in ("owe", "checkpoint", "receipt", "ack") for when in ("before", "after")]


@pytest.mark.parametrize("label", [*LABELS, "node during checkpoint"])
def test_a_node_killed_at_a_step_goes_on_as_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    server, config = MemoryServer(), {"checkpoint_every_seconds": 0.02}
    settings = decided(stop=StopRule(updates=12), update_rule=RULE)
    with running_master(server, tmp_path / "master", settings) as master:
        with monkeypatch.context() as patch:
            node = Node(server, tmp_path, "a", lines(1), **config)
            kill_at(patch, node, label, 3)
            died(node)
        back = Node(server, tmp_path, "a", lines(1), **config)
        with nodes(back):
            encoder = training_encoder(master)
            eventually(lambda: encoder.status == "finished", 60)
            eventually(lambda: back.party.wait(0.0), 30)
        member = encoder.members["a"]
        assert member.incarnation == json.loads((tmp_path / "a" / "identity.json").read_text())["incarnation"]
        assert member.returns == encoder.updates == 12
        kept = receipts(tmp_path / "a")
        assert len({receipt["sequence"] for receipt in kept}) == len(kept), "each receipt is remembered once"
        assert {receipt["reason"] for receipt in kept} <= {"", "finished"}
        # what a killed node had handed in and was answered while it was away is remembered too
        counted = [receipt for receipt in kept if receipt["accepted"]]
        if label.endswith("owe"):
            # the third was sent by the next process if it was on disk, and else its number is not used
            assert (2 in {receipt["sequence"] for receipt in counted}) == (label == "node after owe")
        assert len(counted) == 12 and {receipt["incarnation"] for receipt in kept} == {member.incarnation}
        assert not (tmp_path / "a" / "current.json").exists()


def test_a_node_restored_from_an_old_backup_takes_a_new_incarnation(tmp_path: Path) -> None:
    server = MemoryServer()
    with running_master(server, tmp_path / "master") as master:
        node = Node(server, tmp_path, "a", lines(1))
        encoder = training_encoder(master)
        node.end()
        old = encoder.members["a"].incarnation
        shutil.copytree(tmp_path / "a", tmp_path / "backup")
        node = Node(server, tmp_path, "a", lines(1))
        returns = encoder.members["a"].returns
        eventually(lambda: encoder.members["a"].returns > returns + 3, 30)
        node.end()
        eventually(lambda: not encoder.members["a"].accepted)
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "backup").rename(tmp_path / "a")
        returns = encoder.members["a"].returns
        node = Node(server, tmp_path, "a", lines(1))
        with nodes(node):
            eventually(lambda: encoder.members["a"].incarnation != old, 30)
            eventually(lambda: encoder.members["a"].returns > returns, 30)
        assert [receipt["reason"] for receipt in receipts(tmp_path / "a")].count("conflict") >= 1
        assert node.service.node.state.identity.incarnation == encoder.members["a"].incarnation
        assert list(encoder.members) == ["a"] and encoder.members["a"].returns == encoder.updates


def test_a_node_that_lost_its_state_directory_joins_as_new(tmp_path: Path) -> None:
    server = MemoryServer()
    with running_master(server, tmp_path / "master") as master:
        node = Node(server, tmp_path, "a", lines(1))
        encoder = training_encoder(master)
        node.end()
        eventually(lambda: not encoder.members["a"].accepted)
        old, returns = encoder.members["a"].incarnation, encoder.members["a"].returns
        shutil.rmtree(tmp_path / "a")
        node = Node(server, tmp_path, "a", lines(1))
        with nodes(node):
            eventually(lambda: node.service.figures.accepted > 1, 30)
        assert encoder.members["a"].returns > returns
        assert encoder.members["a"].incarnation != old and list(encoder.members) == ["a"]
        # its numbers begin again at 0, and are counted: they are another incarnation's
        assert min(receipt["sequence"] for receipt in receipts(tmp_path / "a") if receipt["accepted"]) == 0
        assert encoder.members["a"].returns == encoder.updates


def test_a_node_trains_on_while_the_master_is_away(tmp_path: Path) -> None:
    server, settings = MemoryServer(), decided(update_rule=RULE)
    with running_master(server, tmp_path / "master", settings) as master:
        node = Node(server, tmp_path, "a", lines(1))
        training_encoder(master)
    eventually(lambda: trained_to_the_limit(node), 30)
    steps = node.service.figures.steps
    with running_master(server, tmp_path / "master", settings) as master:
        encoder = training_encoder(master)
        eventually(lambda: node.service.figures.steps > steps, 30)  # it goes on when it is answered
        node.end()
        steps = node.service.figures.steps
        eventually(lambda: encoder.members["a"].steps >= steps, what="that every step is handed in")
        assert encoder.members["a"].steps == steps, "once"


def test_f13_a_node_trains_beyond_its_limit_once_the_master_is_away_and_every_step_counts_once(tmp_path: Path) -> None:
    server, settings = MemoryServer(), decided(update_rule=RULE)
    with running_master(server, tmp_path / "master", settings) as master:
        node = Node(server, tmp_path, "a", lines(1), away_after_seconds=0.5)
        training_encoder(master)
    eventually(lambda: trained_to_the_limit(node), 30)
    since = node.service.figures.waiting_since
    training = node.service.node.training
    assert training is not None
    eventually(lambda: training.since.steps > 10 * 2, 30, "training on")
    assert node.service.figures.waiting_since == since, "it says since when it waits, while it trains"
    assert len(node.service.node.state.owed) == UNANSWERED
    steps = node.service.figures.steps
    with running_master(server, tmp_path / "master", settings) as master:
        encoder = training_encoder(master)
        eventually(lambda: node.service.figures.handed_in > 0 and node.service.figures.steps > steps, 30)
        node.end()
        steps = node.service.figures.steps
        eventually(lambda: encoder.members["a"].steps >= steps, what="that every step is handed in")
        assert encoder.members["a"].steps == steps, "once"
        rows = [entry.body for entry in master.service.master.journal.log.entries() if entry.body.kind == "update"]
        assert max(row.steps for row in rows) > 10 * 2, "what it trained meanwhile came as one update"


@pytest.mark.parametrize("killed", [False, True])
def test_a_node_restarted_while_the_master_is_away_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """After a clean stop from its own path; killed after a hand-in without a checkpoint, from what the stream holds."""
    server, settings = MemoryServer(), decided(update_rule=RULE)
    with running_master(server, tmp_path / "master", settings) as master, monkeypatch.context() as patch:
        node = Node(server, tmp_path, "a", lines(1))
        if killed:
            kill_at(patch, node, "node after owe", 4)
            died(node)
        else:
            training_encoder(master)
            node.end()
    back = Node(server, tmp_path, "a", lines(1))
    eventually(lambda: trained_to_the_limit(back), 30)
    training = back.service.node.training
    assert training is not None and training.version >= 0
    trained = training.steps
    assert trained > (0 if killed else node.service.figures.steps)
    with running_master(server, tmp_path / "master", settings) as master:
        encoder = training_encoder(master)
        eventually(lambda: back.service.figures.steps > trained, 30)
        assert back.service.node.training is training, "the master's answer to the join builds nothing again"
        back.end()
        # what was handed in before the kill is counted, and trained again behind another version
        steps = back.service.figures.steps + (4 * 2 if killed else 0)
        eventually(lambda: encoder.members["a"].steps >= steps, what="that every step is handed in")
        assert encoder.members["a"].steps == steps


def test_an_update_that_finds_no_room_on_disk_leaves_its_steps_to_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = MemoryServer()
    with running_master(server, tmp_path / "master") as master:
        node = Node(server, tmp_path, "a", lines(1))
        training_encoder(master)
        with monkeypatch.context() as patch:
            patch.setattr(Handover, "hand_over", _full)
            with pytest.raises(OSError, match="no space"):
                eventually(lambda: node.party.wait(0.0), 30)
        node.broker.close()
        assert not list(tmp_path.glob("a/encoders/*/checkpoint.safetensors")), "what was never owed is not saved as if"
        back = Node(server, tmp_path, "a", lines(1))
        with nodes(back):
            eventually(lambda: back.service.figures.accepted > 2, 30)


def _full(*arguments: Any) -> None:
    raise OSError(28, "no space")


def test_an_encoder_without_a_corpus_any_more_is_not_resumed(tmp_path: Path) -> None:
    server = MemoryServer()
    with running_master(server, tmp_path / "master") as master:
        node = Node(server, tmp_path, "a", lines(1))
        training_encoder(master)
        node.end()
    np.savez(tmp_path / "a.npz", x_train=np.random.default_rng(0).integers(0, 255, (20, 8, 8), np.uint8))
    images = CorpusConfig(type="image", path=(str(tmp_path / "a.npz"),))
    back = Node(server, tmp_path, "a", lines(1), corpus=[images], private={})
    with nodes(back):
        eventually(lambda: back.service.figures.note == "waiting for an instruction")
        eventually(lambda: any(b"request.alive" in publication.body for publication in back.broker.left))
        assert back.service.node.training is None and (tmp_path / "a" / "current.json").exists()


@pytest.mark.parametrize("room", [UNANSWERED, 64])
def test_a_version_that_nobody_announced_is_found_on_the_stream(tmp_path: Path, room: int) -> None:
    """The master published it and died. The node finds it whether it may train on or not."""
    server = MemoryServer()
    rule = RULE.model_copy(update={"max_unanswered": room})
    with running_master(server, tmp_path / "master", decided(update_rule=rule)) as master:
        node = Node(server, tmp_path, "a", lines(1), ask_after_seconds=0.3, max_steps_per_second=20.0)
        encoder = training_encoder(master)
    eventually(lambda: len(node.service.node.state.owed) >= 2, 20)  # all that the master said is long handled
    size = Layout(encoder.layout).size
    publish_version(
        node.broker,
        TOPOLOGY,
        encoder=encoder.encoder,
        epoch=1 << 40,
        version=encoder.version + 5,
        encoding="float32",
        layout_digest=encoder.layout_digest,
        bodies=encode_vector(torch.ones(size), "float32"),
        progress=0.5,
    )
    with nodes(node):
        eventually(lambda: node.service.figures.version == encoder.version + 5, 20)
        training = node.service.node.training
        assert training is not None and training.version == encoder.version + 5 and training.trainer.progress >= 0.5


def test_the_second_process_of_a_node_id_is_refused(tmp_path: Path) -> None:
    server = MemoryServer()
    with running_master(server, tmp_path / "master") as master:
        first = Node(server, tmp_path, "a", lines(1))
        with nodes(first):
            encoder = training_encoder(master)
            for directory, words in ("a", "is in use by process"), ("other", "is held by"):
                second = Node(server, tmp_path, "a", lines(1), state_dir=tmp_path / directory)
                with pytest.raises(LockHeld, match=words):  # the same state, and only the same id
                    eventually(lambda second=second: second.party.wait(0.0), 20)
                second.broker.close()
            returns = encoder.members["a"].returns
            eventually(lambda: encoder.members["a"].returns > returns, 30)
        # what the refused one had locked is free again
        third = Node(server, tmp_path, "a", lines(1), state_dir=tmp_path / "other")
        with nodes(third):
            eventually(lambda: third.service.figures.accepted > 0, 30)


def test_a_node_far_too_stale_fetches_and_goes_on(tmp_path: Path) -> None:
    server = MemoryServer()
    rule = aggregation_rule("fedasync").model_copy(update={"guards": GuardRule(max_staleness=2)})
    settings = decided(rule=rule, update_rule=UpdateRule(when=ReturnWhen(steps=10), max_unanswered=1))
    with running_master(server, tmp_path / "master", settings) as master:
        node = Node(server, tmp_path, "a", lines(1), max_steps_per_second=5.0)
        with nodes(node):
            encoder = training_encoder(master, updates=1)
            eventually(lambda: node.service.figures.version == 1)  # what it hears of, until an update is refused
            hand = HandNode(server, "fast")
            instruction = hand.enter()
            bodies = numbers(instruction)
            for sequence in range(6):  # within the two seconds in which the node makes one update
                hand.send(hand.manifest(instruction, sequence, bodies, base_version=encoder.version), bodies)
                eventually(lambda sequence=sequence: encoder.members["fast"].returns == sequence + 1)
            eventually(lambda: node.service.figures.refused == 1, 20)
            accepted = node.service.figures.accepted
            eventually(lambda: node.service.figures.accepted > accepted, 20)
            assert node.service.figures.version >= 7
        assert [receipt["reason"] for receipt in receipts(tmp_path / "a")].count("stale") == 1


def test_a_master_restored_from_a_backup_is_followed_back(tmp_path: Path) -> None:
    """It knows fewer versions than the node, and the stream still holds those that it lost."""
    server = MemoryServer()
    settings = decided(update_rule=RULE)
    with running_master(server, tmp_path / "master", settings) as master:
        node = Node(server, tmp_path, "a", lines(1), max_steps_per_second=40.0)
        training_encoder(master)
    with nodes(node):
        shutil.copytree(tmp_path / "master", tmp_path / "backup")
        with running_master(server, tmp_path / "master", settings) as master:
            encoder = training_encoder(master)
            start = encoder.version
            eventually(lambda: encoder.version > start + 15, 60)
            eventually(lambda: node.service.figures.version > start + 12, 20)
        shutil.rmtree(tmp_path / "master")
        (tmp_path / "backup").rename(tmp_path / "master")
        with running_master(server, tmp_path / "master", settings) as master:
            encoder = training_encoder(master)
            returns = encoder.members["a"].returns
            eventually(lambda: encoder.members["a"].returns > returns + 2, 60)
            assert encoder.version < start + 12
            assert node.service.figures.version <= encoder.version
    assert "future" in {receipt["reason"] for receipt in receipts(tmp_path / "a")}
