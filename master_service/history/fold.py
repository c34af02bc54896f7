"""Coordinator and arithmetic together: the fold over the log that the running master, recovery and replay share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from common.errors import Damaged
from common.numbers.layout import Layout
from master_service.arithmetic.arithmetic import Arithmetic, PayloadsLost
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Effect, Step
from master_service.decisions.records import Entry, Generated, Repaired, StepFailed, Versioned
from master_service.decisions.state import State

A = TypeVar("A", bound=Arithmetic)


@dataclass(frozen=True, slots=True)
class Check:
    """A version that the log names, and whether the fold came to the same bits."""

    encoder: str
    version: int
    logged: str
    computed: str

    @property
    def identical(self) -> bool:
        return self.logged == self.computed


class Fold(Generic[A]):
    """Applies entries, each once and without a gap. `offset` is that of the newest that was applied.

    `pending` holds the steps that were decided and have no outcome in the log yet.
    """

    def __init__(self, arithmetic: A, state: State | None = None, offset: int = -1) -> None:
        self.offset = offset
        self.coordinator = Coordinator(state)
        self.arithmetic = arithmetic
        self.pending: dict[str, Step] = {}
        self._computed: dict[str, Versioned] = {}

    def apply(self, entry: Entry) -> list[Effect]:
        """Fold one entry; the effects are for the shell. Raises Damaged if entries are missing before this one."""
        body = entry.body
        resumed = isinstance(body, Repaired) and body.resumed_at == self.offset
        if entry.offset != self.offset + 1 and not resumed:
            raise Damaged(f"the log has no rows {self.offset + 1} to {entry.offset - 1}: {_why(entry)}")
        if isinstance(body, Generated) and not entry.skipped:
            self.arithmetic.begin(body.encoder, Layout(body.layout), body.digest)
        if isinstance(body, Versioned | StepFailed):
            step = self.pending.pop(body.encoder, None)
            computed = self._computed.pop(body.encoder, None)
            if isinstance(body, Versioned) and step is not None and computed is None:
                self.arithmetic.step(step)
        self.offset = entry.offset
        effects = self.coordinator.handle(entry)
        self.pending |= {effect.encoder: effect for effect in effects if isinstance(effect, Step)}
        return effects

    def compute(self, encoder: str) -> Versioned | StepFailed:
        """The outcome of an encoder's pending step, to be logged. Computed once; if it fails nothing is changed."""
        step = self.pending[encoder]
        if encoder not in self._computed:
            try:
                made = self.arithmetic.step(step)
            except PayloadsLost as error:
                return StepFailed(encoder=encoder, version=step.version, lost=error.lost)
            self._computed[encoder] = Versioned(
                encoder=encoder, version=step.version, digest=made.digest, norm=made.norm
            )
        return self._computed[encoder]

    def check(self, body: Versioned) -> Check:
        """Compute the version that the log names next, and compare. Raises PayloadsLost."""
        outcome = self.compute(body.encoder) if body.encoder in self.pending else None
        if isinstance(outcome, StepFailed):
            raise PayloadsLost(dict.fromkeys(outcome.lost, "damaged or missing"))
        same = outcome is not None and outcome.version == body.version
        return Check(body.encoder, body.version, body.digest, outcome.digest if outcome is not None and same else "")


def _why(entry: Entry) -> str:
    if isinstance(entry.body, Repaired):
        return f"they were lost when the ledger was repaired ({entry.body.problem})"
    return "the ledger is damaged"
