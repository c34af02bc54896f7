"""The message log folded again: to prove every version, to rebuild one, or to see what another rule would have made.

`verify` and `rebuild` fold what was logged. `Refold` decides anew: it takes the messages and leaves out the outcomes;
with unchanged settings that is what an uninterrupted master makes of the log, with others it is a counterfactual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from common.errors import Damaged
from common.messages import Message, NodeMessage, Stop, UpdateManifest
from common.parameters import ParameterSet
from master_service.aggregator import PayloadsLost
from master_service.entries import (
    Configured,
    Entry,
    Generated,
    Loggable,
    Repaired,
    Settings,
    Skipped,
    StepFailed,
    StopRule,
    Versioned,
)
from master_service.fold import Check, Fold
from master_service.message_log import MessageLog
from master_service.snapshot import read_snapshot
from master_service.state import EncoderState


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a replay begins. `left_out` says what it cannot show, and why; empty if it begins with the first row."""

    fold: Fold
    left_out: str = ""


def origin(log: MessageLog) -> Origin:
    """The first row, unless payloads were dropped or rows lost: then the oldest whole snapshot.

    Raises Damaged if payloads are gone that nobody dropped, or if there is no snapshot to begin from.
    """
    dropped = log.dropped()
    by_retention = [payload for payload, reason in dropped.items() if reason != "refused"]
    repairs = log.repairs()
    if not by_retention and not repairs:
        return Origin(Fold(log.payloads))
    fold = read_snapshot(log.directory / "snapshots", log, oldest=True)
    reasons = [f"{len(by_retention)} payloads were dropped by retention"] if by_retention else []
    reasons += [f"rows after {each.last_whole} were lost ({each.problem})" for each in repairs]
    if fold.offset < 0:
        raise Damaged(f"{'; '.join(reasons)}, and there is no snapshot to begin from")
    versions = ", ".join(
        f"{name} up to version {encoder.version}" for name, encoder in fold.coordinator.state.encoders.items()
    )
    return Origin(
        fold,
        f"not shown: {versions or 'nothing'} (rows 0 to {fold.offset}), because {'; '.join(reasons)}; "
        "the replay begins with a snapshot",
    )


def verify(log: MessageLog, fold: Fold) -> Iterator[tuple[Entry, Check | None]]:
    """Every row after the fold's, and the check of the version that it names, if it names one.

    Raises Damaged at a row or payload that is not what was written.
    """
    for entry in log.entries(fold.offset):
        body = entry.body
        try:
            check = fold.check(body) if isinstance(body, Versioned) else None
            fold.apply(entry)
        except PayloadsLost as error:
            raise Damaged(f"row {entry.offset} cannot be replayed: {error}") from None
        if isinstance(body, Generated) and not entry.skipped:
            target = fold.aggregator.targets[body.encoder]
            check = Check(body.encoder, 0, body.digest, target.parameters.digest())
        yield entry, check


def rebuild(
    log: MessageLog, encoder: str, version: int | None = None, on_row: Callable[[Entry], None] = lambda entry: None
) -> tuple[EncoderState, ParameterSet]:
    """A version (the newest by default) from the log, with the encoder's state at that moment.

    Raises KeyError with the reason if the log does not hold it, Damaged at the first version that is not what was
    published.
    """
    start = origin(log)
    fold = start.fold
    if (begun := fold.coordinator.state.encoders.get(encoder)) is not None and begun.version == version:
        return begun, fold.aggregator.targets[encoder].parameters
    found = begun is not None
    for entry, check in verify(log, fold):
        on_row(entry)
        if check is not None and not check.identical:
            raise Damaged(f"version {check.version} of {check.encoder} is not what the log says")
        if check is not None and check.encoder == encoder:
            found = True
            if check.version == version:
                break
    state = fold.coordinator.state.encoders.get(encoder)
    if not found or state is None or (version is not None and state.version != version):
        known = ", ".join(fold.coordinator.state.encoders) or "none"
        newest = f", whose newest is {state.version}" if state is not None else f"; encoders there: {known}"
        why = f" ({start.left_out})" if start.left_out else ""
        raise KeyError(f"version {0 if version is None else version} of {encoder} is not in the log{newest}{why}")
    return state, fold.aggregator.targets[encoder].parameters


@dataclass
class Refold:
    """Decides a log anew. `change` maps the logged settings; what nodes in `without` said is left out.

    The nodes trained on what was really published: an update's base version is translated to the version that the
    refold had reached when that one was made. Stop rules are left out of a counterfactual (they count versions of
    another numbering): it ends with the log. `uncounted`: updates whose payload is not there any more.
    """

    log: MessageLog
    change: Callable[[Settings], Settings] | None = None
    without: frozenset[str] = frozenset()
    fold: Fold = field(init=False)
    uncounted: int = 0

    def __post_init__(self) -> None:
        self.fold = Fold(self.log.payloads)
        self._reached: dict[tuple[str, int], int] = {}
        self._dropped = self.log.dropped()

    @property
    def counterfactual(self) -> bool:
        return self.change is not None or bool(self.without)

    def run(self) -> Iterator[Entry]:
        """Yields every row once it is folded, to show progress. Raises Damaged."""
        if retention := [payload for payload, reason in self._dropped.items() if reason != "refused"]:
            raise Damaged(
                f"{len(retention)} payloads were dropped by retention: another rule needs all of them; "
                'set master.retention = "all" before a run that is to be replayed under other rules'
            )
        if repairs := self.log.repairs():
            raise Damaged(f"rows of the ledger were lost ({repairs[0].problem}): the log cannot be decided anew")
        at = 0.0
        for entry in self.log.entries():
            at = entry.at
            self._settle_steps(entry)
            body = self._changed(entry)
            if body is not None:
                self._apply(replace(entry, body=body) if body is not entry.body else entry)
            yield entry
        if self.counterfactual:
            self._compute()
            # what is at hand becomes the last version, as when an operator stops
            self._apply(Entry(0, "", at, Stop(sender="replay")))
        self._compute()

    def _changed(self, entry: Entry) -> Loggable | None:
        """What of an entry is folded; None for outcomes, which are decided anew, and for those who are left out."""
        body = entry.body
        if isinstance(body, Versioned):
            state = self.fold.coordinator.state.encoders.get(body.encoder)
            self._reached[body.encoder, body.version] = state.version if state else 0
            return None
        if isinstance(body, StepFailed | Skipped | Repaired) or entry.skipped:
            return None
        if _who(body) in self.without:
            return None
        if isinstance(body, Configured) and self.counterfactual:
            changed = self.change(body.settings) if self.change else body.settings
            return Configured(settings=changed.model_copy(update={"stop": StopRule()}))
        if isinstance(body, UpdateManifest) and self.counterfactual:
            base = self._reached.get((body.encoder, body.base_version), 0)
            return body.model_copy(update={"base_version": base})
        return body

    def _apply(self, entry: Entry) -> None:
        if isinstance(entry.body, UpdateManifest) and entry.payload in self._dropped:
            # it was refused then; were it counted now, its payload would be missing
            self.uncounted += self.counterfactual
            entry = replace(entry, payload=None)
        self.fold.apply(replace(entry, offset=self.fold.offset + 1))

    def _settle_steps(self, upcoming: Entry) -> None:
        """Compute what is pending, unless the log says that this failed then for want of payloads."""
        body = upcoming.body
        step = self.fold.pending.get(body.encoder) if isinstance(body, StepFailed) else None
        if isinstance(body, StepFailed) and step is not None:
            lost = [each.payload for each in step.contributions if each.payload in body.lost]
            if lost:
                failed = StepFailed(encoder=body.encoder, version=step.version, lost=lost)
                self._apply(Entry(0, "", upcoming.at, failed))
        self._compute(upcoming.at)

    def _compute(self, at: float | None = None) -> None:
        while self.fold.pending:
            encoder = next(iter(self.fold.pending))
            outcome = self.fold.compute(encoder)
            if isinstance(outcome, StepFailed):
                raise Damaged(
                    f"version {outcome.version} of {encoder} cannot be computed: "
                    f"damaged or missing: payload {', '.join(outcome.lost)}"
                )
            self._apply(Entry(0, "", at or 0.0, outcome))


def _who(body: Message) -> str | None:
    return body.node if isinstance(body, NodeMessage) else getattr(body, "node", None)
