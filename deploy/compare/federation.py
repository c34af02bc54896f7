"""A federated arm: the real master and the real nodes over the embedded broker, under a virtual clock, and real
training. A step takes the virtual time that the node's speed says, and as long as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.encoders.base import Architecture, PrivateSpec
from common.errors import SharedEncoderError
from common.numbers.parameters import ParameterSet
from common.wire.to_node import Instruction
from deploy.compare.hostile import HostileSession
from deploy.compare_settings import Attack
from deploy.simulation.federation import SteppedFederation
from deploy.simulation.given import GivenSnapshots
from deploy.simulation.master import SimulatedMaster
from deploy.simulation.node import SimulatedNode
from deploy.simulation.timed import TimedSession
from master_service.config import MasterConfig
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState
from node_service.config import NodeConfig, Precision
from node_service.corpus.corpus import Corpus
from node_service.handover.receipt_book import Ledger
from node_service.training.private_parts import save_spec
from node_service.training.trainer import Trainer
from node_service.trials import Build

#: How long a training may go on after its last step would end if no node ever waited, virtual seconds: the first
#: version and the last updates are on their way for some of it. It counts as progress: the rate of a run of a few
#: seconds falls less far than that of one of minutes.
GRACE_SECONDS = 2.0
#: Snapshots in one training: what is older than two is dropped, so that the updates of a run need not all lie on disk.
_SNAPSHOTS = 20


@dataclass(frozen=True)
class Member:
    """A node of the arm: its training samples, what its private parts depend on, its speed (steps a second), and how
    many steps it takes at most. With an `attack` it is hostile."""

    encoder_type: str
    train: Any
    spec: PrivateSpec
    speed: float
    steps: int
    attack: Attack | None = None


@dataclass(frozen=True)
class Trained:
    """What came of it: each honest node's trainer, which holds the final version within its private parts, and the
    master's books."""

    trainers: dict[str, Trainer]
    encoder: EncoderState
    virtual_seconds: float


class TrainedFederation(SteppedFederation):
    """One federation that trains `members` by `settings` from `initial` in a folder that it fills and leaves.

    The same arguments give the same parameters, bit for bit, with one torch thread. `seed` makes the ids, each node's
    private parts and its batches: the same for every node, so that nodes of one spec begin alike.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        settings: Settings,
        initial: tuple[Architecture, ParameterSet],
        directory: Path,
        *,
        seed: int,
        link: float,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        estimated = max(member.steps / member.speed for member in members.values())
        super().__init__(seed=seed, link=link, estimated=estimated)
        self._sessions: dict[str, TimedSession] = {}
        self._device, self._precision = device, precision
        kinds = {member.encoder_type for member in members.values()}
        assert len(kinds) == 1, "one federation, one encoder type"
        config = MasterConfig(
            state_dir=directory / "master",
            retention="since-snapshot",
            snapshot_every_seconds=max(estimated / _SNAPSHOTS, 1e-3),
        )
        self.master = SimulatedMaster(
            self,
            config,
            settings,
            encoder_type=kinds.pop(),
            snapshots=lambda log: GivenSnapshots(log, lambda effect: initial),
        )
        self.nodes = [self._node(name, member, directory / name) for name, member in members.items()]

    def train(self, on_event: Callable[[], None] = lambda: None) -> Trained:
        """From the first step to the final version; `on_event` is called often, and may raise.

        Raises SharedEncoderError for a training that comes to no end or a node that did not get the final version.
        """
        self.at(0.0, self.master.start)
        for node in self.nodes:
            self.at(0.0, node.start)
        self.run(lambda updates: on_event())
        encoder = self.master.result
        if encoder is None or encoder.status != "finished" or self.given_up or self.ended_at is None:
            why = encoder.reason if encoder is not None else "no encoder was made"
            raise SharedEncoderError(f"the federated training came to no good end: {why or 'it made no headway'}")
        honest = {name: session for name, session in self._sessions.items() if not isinstance(session, HostileSession)}
        late = [name for name, session in honest.items() if session.version != encoder.version]
        if late:
            raise SharedEncoderError(f"node {late[0]} did not read the final version, {encoder.version}")
        trainers = {name: session.trainer for name, session in honest.items()}
        return Trained(trainers, encoder, self.ended_at)

    def _node(self, name: str, member: Member, directory: Path) -> SimulatedNode:
        corpora = {member.encoder_type: Corpus(member.encoder_type, member.train, None, (), None)}
        # its checkpoints would be for a kill, and nobody is killed here
        config = NodeConfig(checkpoint_every_seconds=1e9)
        return SimulatedNode(self, name, config, corpora, self._build(name, member, directory), speed=member.speed)

    def _build(self, name: str, member: Member, directory: Path) -> Build:
        def build(
            instruction: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]
        ) -> TimedSession:
            place = directory / instruction.encoder
            save_spec(place, member.spec)
            kind = TimedSession if member.attack is None else partial(HostileSession, attack=member.attack)
            self._sessions[name] = kind(
                instruction,
                corpus.train,
                place,
                private={},  # the spec is there already
                seed=self.seed,
                device=self._device,
                precision=self._precision,
                ledger=ledger,
                assets=assets,
                speed=member.speed,
                most=member.steps,
            )
            return self._sessions[name]

        return build
