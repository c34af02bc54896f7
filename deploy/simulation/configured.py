"""Master and nodes of a configuration in one thread under a virtual clock: the same seed leads to the same encoder.

Everything is real but time: the message log, the embedded broker's bytes, training, exports. Somebody who is slow takes
as many steps as he would, and the order of events is the same whatever the machine does meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.errors import UserError
from common.wire.to_node import Instruction
from deploy.config import Config
from deploy.simulation.federation import SteppedFederation
from deploy.simulation.master import SimulatedMaster
from deploy.simulation.node import SimulatedNode
from deploy.simulation.timed import TimedSession
from master_service.status import Report
from node_service.corpus.corpus import Corpus
from node_service.handover.receipt_book import Ledger
from node_service.trials import Build

#: Bytes a second of each node's line, each way.
_LINK = 2e7


@dataclass(frozen=True)
class Absence:
    """A node that is not there from the beginning, or goes and comes back; shares of the training's time."""

    node: str
    begins: float
    ends: float


class KeptSession(TimedSession):
    """Keeps what it exports, because a node itself goes back to the parts that fit the shared version."""

    #: All parameters of what was exported, and the steps that led to it, the finishing phase included.
    finished: dict[str, Tensor] | None = None
    steps_in_all = 0

    def _export(self, directory: Path | None, *notes: str) -> Path:
        self.steps_in_all = self.trainer.steps
        self.finished = {name: each.detach().clone() for name, each in self.model.named_parameters()}
        return super()._export(directory, *notes)


class ConfiguredFederation(SteppedFederation):
    """One training of `seconds` virtual seconds by a configuration. `speeds`: steps a second, by node."""

    def __init__(
        self, config: Config, corpora: Mapping[str, Corpus], speeds: Mapping[str, float], *, seconds: float
    ) -> None:
        super().__init__(seed=config.encoder.seed, link=_LINK, estimated=seconds)
        assert config.encoder.get is not None
        self._config = config
        self._seconds = seconds
        self.sessions: dict[str, KeptSession] = {}
        self.master = SimulatedMaster(self, config.master, config.settings(), encoder_type=config.encoder.get)
        self.nodes = [
            SimulatedNode(
                self,
                name,
                config.nodes[name],
                {corpus.type: corpus},
                self._build(name, speeds[name]),
                speed=speeds[name],
            )
            for name, corpus in corpora.items()
        ]

    def train(self, absences: Mapping[str, Absence], on_report: Callable[[Callable[[], Report]], None]) -> Report:
        """From the first message to the end of the last finishing phase; gives the report of the end.

        `on_report` is called often, with what gives a report; it may raise. Raises UserError if the encoder could not
        be made.
        """
        reports: list[Report] = []

        def report() -> Report:
            return self.master.report()

        def progress(updates: int) -> None:
            if self.ended_at is not None and not reports:
                reports.append(report())
            on_report(report)

        self.at(0.0, self.master.start)
        for node in self.nodes:
            absence = absences.get(node.name)
            if absence is None or absence.begins > 0:
                self.at(0.0, node.start)
            if absence is not None:
                if absence.begins > 0:
                    self.at(absence.begins * self._seconds, node.leave)
                self.at(absence.ends * self._seconds, node.start)
        self.run(progress)
        encoder = self.master.result
        if encoder is None or encoder.status != "finished" or not reports:
            raise UserError(f"the encoder could not be made: {encoder.reason if encoder is not None else 'no master'}")
        return reports[0]

    def _build(self, name: str, speed: float) -> Build:
        node = self._config.nodes[name]
        assert node.state_dir is not None
        place = node.state_dir / "encoders"

        def build(instruction: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]) -> KeptSession:
            self.sessions[name] = KeptSession(
                instruction,
                corpus.train,
                place / instruction.encoder,
                private=node.private,
                seed=node.seed,
                device="cpu",
                ledger=ledger,
                assets=assets,
                validation=corpus.validation,
                speed=speed,
            )
            return self.sessions[name]

        return build
