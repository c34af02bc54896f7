"""Several aggregators over the embedded broker: the bits of one, whoever starts again in between, and what a replay
needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from common.brokers.memory import MemoryBroker, MemoryServer
from common.errors import Damaged, UserError
from common.numbers.encodings import encode_vector
from common.numbers.layout import Layout
from common.numbers.slicing import EncodingName, shard_of
from common.wire.to_node import Instruction, Notice, Receipt, Resend
from common.wire.transfer import payload_digest
from common.wire.versions import VersionReader
from deploy.commands.replay import run_replay
from master_service.decisions.records import Versioned
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings
from master_service.log.message_log import open_log
from master_service.shards.service import ShardService
from master_service.shards.shard import Shard
from master_service.wire.orders import Compute, Done
from shared_encoder import Log
from tests.builders import update_chunks
from tests.integration.harness import (
    TOPOLOGY,
    HandNode,
    ThreadParty,
    connection,
    decided,
    eventually,
    running_master,
)

#: Three slices, the last of which is short.
WIDTH = 1500


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest encoder type, by its entry point."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "faults/plugin"))


@dataclass
class World:
    """A master of so many shards, its aggregators, and a node that is spoken by hand."""

    directory: Path
    shards: int
    server: MemoryServer = field(default_factory=MemoryServer)
    parties: list[tuple[ThreadParty, MemoryBroker]] = field(default_factory=list)
    sent: int = 0

    def directories(self) -> list[Path]:
        return [self.directory / f"shard-{number}" for number in range(self.shards)] if self.shards > 1 else []

    def settings(self, **changes: Any) -> Settings:
        outer = {"outer": {"optimizer": "nesterov", "lr": 0.5, "momentum": 0.9}}
        rule = aggregation_rule("fedasync", outer)
        return decided(rule=rule, architecture={"width": WIDTH}, seed=1, shards=self.shards, **changes)

    @contextmanager
    def aggregators(self) -> Iterator[None]:
        for number, directory in enumerate(self.directories()):
            broker = connection(self.server, "master")
            service = ShardService(number, self.shards, directory, broker, TOPOLOGY)
            self.parties.append((ThreadParty(f"aggregator {number}", service.run), broker))
        try:
            yield
        finally:
            while self.parties:
                party, broker = self.parties.pop()
                party.stop()
                assert party.wait(20.0)
                broker.close()

    def send(self, node: HandNode, instruction: Instruction, vector: torch.Tensor, encoding: EncodingName) -> None:
        bodies = encode_vector(vector, encoding)
        plain = {"encoding": encoding, "shards": self.shards, "digest": payload_digest(bodies, self.shards)}
        manifest = node.manifest(instruction, self.sent, bodies, base_version=self.sent, order=self.sent + 1, **plain)
        self.sent += 1
        for chunk in update_chunks(manifest, bodies):
            shard = shard_of(chunk.index, manifest.chunks, self.shards)
            node.say(TOPOLOGY.chunk_key("", shard), chunk, TOPOLOGY.update)
        node.say(".ready", manifest, TOPOLOGY.update)

    def version(self, node: HandNode, instruction: Instruction) -> bytes:
        """As its notice says where it is."""
        notice, size = node.hear(Notice), Layout(instruction.layout).size
        reader = VersionReader(
            node.broker, TOPOLOGY, notice.encoder, instruction.layout_digest, elements=size, shards=self.shards
        )
        found = reader.read(notice.version, notice.published_at, offset=notice.stream_offset, exact=True)
        reader.close()
        assert found.digest == notice.stream_digest
        return bytes(found.payload)

    def log(self) -> list[Any]:
        with closing(open_log(self.directory / "master", read_only=True)) as log:
            return list(log.entries())


def updates(size: int) -> list[tuple[torch.Tensor, EncodingName]]:
    generator = torch.Generator().manual_seed(0)
    encodings: Sequence[EncodingName] = ("int8", "bfloat16", "float32")
    return [(torch.randn(size, generator=generator) * 0.01, encoding) for encoding in encodings]


def run(world: World, *, again: bool = False) -> tuple[list[bytes], list[Receipt]]:
    """Three updates, a version of each. `again`: master and aggregators start again after each."""
    versions, receipts = [], []
    node: HandNode | None = None
    instruction: Instruction | None = None
    turns = [1, 1, 1] if again else [3]
    done = 0
    for turn in turns:
        with (
            world.aggregators(),
            running_master(world.server, world.directory / "master", world.settings(), get="tiny"),
        ):
            if node is None or instruction is None:
                node = HandNode(world.server, "a", encoder_type="tiny")
                instruction = node.enter()
            for vector, encoding in updates(Layout(instruction.layout).size)[done : done + turn]:
                world.send(node, instruction, vector, encoding)
                receipts.append(node.hear(Receipt))
                versions.append(world.version(node, instruction))
            done += turn
    assert node is not None
    node.broker.close()
    return versions, receipts


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bytes], list[Any]]:
    """What one aggregator, the master itself, makes of the updates; and its log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "faults/plugin"))
        world = World(tmp_path_factory.mktemp("one"), 1)
        return run(world)[0], world.log()


@pytest.mark.parametrize(("shards", "again"), [(2, False), (3, False), (5, False), (2, True)])
def test_aggregators_make_the_bits_of_one_and_a_replay_by_one_makes_theirs(
    tmp_path: Path,
    of_one: tuple[list[bytes], list[Any]],
    capsys: pytest.CaptureFixture[str],
    shards: int,
    again: bool,
) -> None:
    """With five, two have nothing to hold."""
    world = World(tmp_path, shards)
    versions, receipts = run(world, again=again)
    assert versions == of_one[0]
    assert [(receipt.accepted, receipt.version) for receipt in receipts] == [(True, 1), (True, 2), (True, 3)]
    mine, ones = world.log(), of_one[1]
    facts = [[(e.facts.norm, e.facts.size, e.facts.finite) for e in log if e.facts is not None] for log in (mine, ones)]
    norms = [[e.body.norm for e in log if isinstance(e.body, Versioned)] for log in (mine, ones)]
    assert facts[0] == facts[1] and norms[0] == norms[1] and len(norms[0]) == 3
    run_replay(
        tmp_path / "master",
        encoder=None,
        version=None,
        out=None,
        rule=None,
        changes=(),
        without=(),
        every=True,
        aggregators=world.directories(),
    )
    assert capsys.readouterr().out.count("identical\n") == 4
    with Log.open(tmp_path / "master", aggregators=world.directories()) as log:
        assert log.replay().identical and len(log.replay().checks) == 4


def test_what_is_damaged_where_an_aggregator_keeps_it_is_sent_again(tmp_path: Path) -> None:
    """The part of an update that waits for another's is gone when both are to be a version."""
    world = World(tmp_path, 2)
    settings = world.settings().model_copy(update={"rule": aggregation_rule("fedbuff", {"buffer": {"size": 2}})})
    with world.aggregators(), running_master(world.server, tmp_path / "master", settings, get="tiny"):
        first, other = (HandNode(world.server, name, encoder_type="tiny") for name in "ab")
        instruction = first.enter()
        other.enter()
        vector = torch.full((Layout(instruction.layout).size,), 0.001)
        world.send(first, instruction, vector, "int8")
        parts = tmp_path / "shard-1/payloads"
        [path] = eventually(lambda: [each for each in parts.glob("??/*") if each.stat().st_size < 2 << 20])
        eventually(lambda: any(entry.facts for entry in world.log()))
        path.write_bytes(bytes(path.stat().st_size))
        world.sent = 0
        world.send(other, instruction, 2 * vector, "int8")
        assert first.hear(Resend).sequence == 0


@pytest.mark.parametrize(
    ("chosen", "words"),
    [((), "missing: 1/2, 2/2"), ((1,), "missing: 1/2"), ((0, 0), "missing: 2/2"), ((0, 1, 1), "one is too many")],
)
def test_a_replay_says_which_aggregators_it_lacks(tmp_path: Path, chosen: tuple[int, ...], words: str) -> None:
    world = World(tmp_path, 2)
    with world.aggregators(), running_master(world.server, tmp_path / "master", world.settings(), get="tiny"):
        HandNode(world.server, "a", encoder_type="tiny").enter()
    plain: dict[str, Any] = {"encoder": None, "version": None, "out": None, "rule": None}
    plain |= {"changes": (), "without": (), "every": False}
    with pytest.raises(UserError, match=words):
        run_replay(tmp_path / "master", **plain, aggregators=[world.directories()[each] for each in chosen])


def test_an_aggregator_that_lacks_what_was_published_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its directory was lost, or is an old backup: the master ends, and names it."""
    world = World(tmp_path, 2)
    run(world)
    (tmp_path / "shard-1").rename(tmp_path / "lost")
    with (
        pytest.raises(Damaged, match=r"aggregator 2/2 has not computed what the message log says was published"),
        world.aggregators(),
        running_master(world.server, tmp_path / "master", world.settings(), get="tiny") as master,
    ):
        node = HandNode(world.server, "a", encoder_type="tiny")
        instruction = node.enter()
        world.send(node, instruction, torch.zeros(Layout(instruction.layout).size), "int8")
        master.party.wait(20.0)


def test_a_master_that_waits_for_an_aggregator_says_so_and_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has decided is in the log: at the next start the version is computed."""
    world = World(tmp_path, 2)
    compute = Shard._compute  # private: all others answer

    def silent(self: Shard, order: Compute) -> Done | None:
        return None if self.number == 1 else compute(self, order)

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "_compute", silent)  # private: an order that is lost every time
        with (
            world.aggregators(),
            running_master(world.server, tmp_path / "master", world.settings(), get="tiny") as master,
        ):
            node = HandNode(world.server, "a", encoder_type="tiny")
            instruction = node.enter()
            world.send(node, instruction, torch.zeros(Layout(instruction.layout).size), "int8")
            eventually(lambda: "aggregator 2/2" in master.service.report().log.blocked)
    assert not any(isinstance(entry.body, Versioned) for entry in world.log())
    with world.aggregators(), running_master(world.server, tmp_path / "master", world.settings(), get="tiny"):
        assert node.hear(Receipt).version == 1
