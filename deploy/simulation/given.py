"""A master's real arithmetic, but whoever drives the simulation makes version 0, and nothing is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.encoders.base import Architecture
from common.numbers.parameters import ParameterSet
from master_service.arithmetic.aggregator import Aggregator
from master_service.arithmetic.arithmetic import Outcome
from master_service.decisions.effects import Generate
from master_service.decisions.records import Generated
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState
from master_service.history.fold import Fold
from master_service.history.snapshot import SnapshotDirectory
from master_service.log.message_log import MessageLog
from master_service.log.payloads import Payloads

#: Architecture and version 0 of the encoder that is ordered.
Make = Callable[[Generate], tuple[Architecture, ParameterSet]]


class GivenAggregator(Aggregator):
    """The real arithmetic, so that a replay proves it; `make` gives version 0."""

    def __init__(self, payloads: Payloads, make: Make) -> None:
        super().__init__(payloads)
        self._make = make

    def generated(self, effect: Generate) -> list[Outcome]:
        architecture, parameters = self._make(effect)
        body = Generated(
            encoder=effect.encoder,
            architecture=architecture,
            layout=parameters.layout.plain(),
            layout_digest=parameters.layout.digest,
            digest=parameters.digest(),
        )
        return [Outcome(body, parameters.to_bytes())]

    def export(self, directory: Path, encoder: EncoderState, settings: Settings) -> None:
        """Whoever drives the simulation takes what it needs from the nodes."""


class GivenSnapshots(SnapshotDirectory):
    """Snapshots whose folds go on with a GivenAggregator."""

    def __init__(self, log: MessageLog, make: Make) -> None:
        super().__init__(log)
        self._given = make

    def read(self) -> Fold[Aggregator]:
        fold = super().read()
        arithmetic = GivenAggregator(self._log.payloads, self._given)
        arithmetic.targets = fold.arithmetic.targets
        return Fold(arithmetic, fold.coordinator.state, fold.offset)
