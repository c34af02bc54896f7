"""The run of a plan: who joins, leaves and dies when, in a federation whose training is modelled."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from common.numbers.compiled import take_for_all
from common.wire.to_node import Instruction
from deploy.simulation.federation import SteppedFederation
from deploy.simulation.given import GivenSnapshots
from deploy.simulation.master import SimulatedMaster
from deploy.simulation.node import SimulatedNode
from deploy.simulation.plan import ENCODER_TYPE, Absence, Plan, fates, master_fate, node_name
from deploy.simulation.training import ModelledTraining, Saved, drawn
from master_service.config import MasterConfig
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.handover.receipt_book import Ledger
from node_service.trials import Build

#: Updates for which it is worth a second at the start that each is handed in, and added up, faster.
_MANY = 20_000


class Simulation(SteppedFederation):
    """One federation under a virtual clock, in one thread. The same plan gives the same log, bit for bit."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        """`directory` becomes the master's state directory."""
        super().__init__(seed=plan.seed, link=plan.link, estimated=plan.estimated_seconds)
        self.plan = plan
        self._fates = fates(plan)
        on_time = sum(fate.joins == 0.0 for fate in self._fates)
        self.nodes = [self._node(index) for index in range(plan.nodes)]
        self.master = SimulatedMaster(
            self,
            MasterConfig(state_dir=directory),
            plan.settings(on_time),
            encoder_type=ENCODER_TYPE,
            snapshots=lambda log: GivenSnapshots(log, drawn),
        )

    def run(self, on_progress: Callable[[int], None] = lambda updates: None) -> None:
        """From the first node to the last answer; `on_progress` is given the number of counted updates, often."""
        if self.plan.updates >= _MANY:
            take_for_all()
        self.at(0.0, self.master.start)
        for node, fate in zip(self.nodes, self._fates, strict=True):
            self.at(fate.joins, lambda node=node: self._join(node))  # type: ignore[misc]
            if fate.absence is not None:
                self._order(fate.absence, node.kill if fate.absence.killed else node.leave, node.start)
        if (absence := master_fate(self.plan)) is not None:
            self._order(absence, self.master.kill, self.master.start)
        super().run(on_progress)

    def _node(self, index: int) -> SimulatedNode:
        """A node whose samples and training come from the seed."""
        seed, name = self.plan.seed, node_name(index)
        samples = random.Random(f"{seed}/samples/{index}").randint(100, 1000)
        corpora = {ENCODER_TYPE: Corpus(ENCODER_TYPE, range(samples), None, (), None)}
        return SimulatedNode(self, name, NodeConfig(), corpora, self._build(index), speed=self.plan.speed(index))

    def _build(self, index: int) -> Build:
        """What makes the node's training. Its checkpoints and its noise outlive a kill."""
        seed = self.plan.seed
        checkpoints: dict[str, Saved] = {}
        noise = np.random.default_rng([seed, 2, index])

        def build(
            instruction: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]
        ) -> ModelledTraining:
            return ModelledTraining(
                instruction,
                ledger,
                checkpoints,
                speed=self.plan.speed(index),
                seeds=(seed, index),
                noise=noise,
            )

        return build

    def _order(self, absence: Absence, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Somebody goes, and is back later; nobody goes once the training has ended."""

        def go() -> None:
            if self.ended_at is None:
                begin()
                self.at(absence.ends, end)

        self.at(absence.begins, go)

    def _join(self, node: SimulatedNode) -> None:
        if self.ended_at is None:
            node.start()
