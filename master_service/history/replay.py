"""The message log folded again: to prove every version, to rebuild one, or to see what another rule would have made.

`verify` and `rebuild` fold what was logged. `Refold` decides anew: it takes the messages and leaves out the outcomes;
with unchanged settings that is what an uninterrupted master makes of the log, with others it is a counterfactual.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import Damaged
from common.numbers.parameters import ParameterSet
from common.wire.base import Message, NodeMessage
from common.wire.to_master import Change, Stop, UpdateManifest
from master_service.arithmetic.aggregator import Aggregator
from master_service.arithmetic.arithmetic import PayloadsLost
from master_service.decisions import operating
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Conclude
from master_service.decisions.records import (
    Configured,
    Entry,
    Generated,
    Loggable,
    Repaired,
    Skipped,
    StepFailed,
    Tick,
    Versioned,
)
from master_service.decisions.settings import Settings, StopRule
from master_service.decisions.state import EncoderState, State
from master_service.decisions.weighing import grace_ends
from master_service.history.fold import Check, Fold
from master_service.history.snapshot import read_snapshot
from master_service.log.message_log import MessageLog, logged_shards

#: The reason of a dropped payload that nobody needs: its update was refused.
REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a replay begins. `left_out` says what it cannot show, and why; empty if it shows everything."""

    fold: Fold[Aggregator]
    left_out: str = ""


def origin(log: MessageLog) -> Origin:
    """The first row, unless payloads were dropped or rows lost: then the oldest whole snapshot after those.

    Raises Damaged if there is no snapshot to begin from, or if the log is a part without its beginning.
    """
    reasons = [f"{count} payloads were dropped ({reason})" for reason, count in missing_payloads(log).items()]
    gap = -1
    for each in log.repairs():
        if each.resumed_at > each.last_whole:
            gap = max(gap, each.resumed_at)
            reasons.append(f"rows after {each.last_whole}, up to {each.resumed_at}, were lost ({each.problem})")
    first = next((row.offset for row in log.rows()), 0)
    if first > 0 and gap < 0:
        raise Damaged(f"this log begins with row {first}: a replay needs all rows before it too")
    tails = [
        f"rows after {each.last_whole} were lost ({each.problem})"
        for each in log.repairs()
        if each.resumed_at == each.last_whole
    ]
    if not reasons:
        return Origin(Fold(Aggregator(log.payloads, log.updates)), "; ".join(tails))
    if (logged_shards(log) or 1) > 1:
        raise Damaged(
            f"{'; '.join(reasons)}, and the snapshots of several aggregators are of no one moment to begin from"
        )
    fold = read_snapshot(log.directory / "snapshots", log, oldest=True, at_least=gap)
    if fold.offset < 0:
        raise Damaged(f"{'; '.join(reasons)}, and there is no whole snapshot to begin from")
    versions = ", ".join(
        f"{name} before version {encoder.version}" for name, encoder in fold.coordinator.state.encoders.items()
    )
    return Origin(
        fold,
        f"not shown: {versions or 'nothing'} (rows 0 to {fold.offset}), because {'; '.join(reasons + tails)}; "
        "the replay begins with a snapshot",
    )


def missing_payloads(log: MessageLog) -> Counter[str]:
    """How many payloads that a replay from the first row needs were dropped, by reason."""
    return Counter(reason for reason in log.dropped().values() if reason != REFUSED)


def verify(log: MessageLog, fold: Fold[Any]) -> Iterator[tuple[Entry, Check | None]]:
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
            target = fold.arithmetic.digest(body.encoder)
            check = Check(body.encoder, 0, body.digest, target)
        yield entry, check


def rebuild(
    log: MessageLog, encoder: str, version: int | None = None, on_row: Callable[[Entry], None] = lambda entry: None
) -> tuple[EncoderState, ParameterSet]:
    """A version (the newest by default) from the log, with the encoder's state at that moment. Raises as `reach`."""
    fold = reach(log, encoder, version, on_row)
    return fold.coordinator.state.encoders[encoder], fold.arithmetic.targets[encoder].parameters


def reach(
    log: MessageLog, encoder: str, version: int | None = None, on_row: Callable[[Entry], None] = lambda entry: None
) -> Fold[Aggregator]:
    """The log folded up to a version of an encoder, or all of it.

    Raises KeyError with the reason if the log does not hold it, Damaged at the first version that is not what was
    published.
    """
    start = origin(log)
    fold = start.fold
    if (begun := fold.coordinator.state.encoders.get(encoder)) is not None and begun.version == version:
        return fold
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
    return fold


@dataclass
class Refold:
    """Decides a log anew. `change` maps the logged settings; what nodes in `without` said is left out.

    The nodes trained on what was really published: an update's base version is translated to the version that the
    refold had reached when that one was made. A counterfactual ends the training of an encoder where the log ended it
    (stop rules count versions of another numbering), and its grace times run out by its own buffers. `logged` decides
    as the master did, for comparison. `uncounted`: updates whose payload is not there any more.
    """

    log: MessageLog
    change: Callable[[Settings], Settings] | None = None
    without: frozenset[str] = frozenset()
    fold: Fold[Any] = None  # type: ignore[assignment]  # made of the log's payloads
    logged: Coordinator = field(default_factory=Coordinator)
    uncounted: int = 0

    def __post_init__(self) -> None:
        if self.fold is None:
            self.fold = Fold(Aggregator(self.log.payloads, self.log.updates))
        self._at = 0.0
        self._reached: dict[tuple[str, int], int] = {}
        self._dropped = self.log.dropped()
        self._lost = {
            lost for body in self.log.bodies("step-failed") if isinstance(body, StepFailed) for lost in body.lost
        }

    @property
    def counterfactual(self) -> bool:
        return self.change is not None or bool(self.without)

    def run(self) -> Iterator[Entry]:
        """Yields every row once it is folded, to show progress. Raises Damaged."""
        if missing := missing_payloads(self.log):
            raise Damaged(
                f"{missing.total()} payloads were dropped ({', '.join(missing)}): another rule needs all of them; "
                'set master.retention = "all" before a run that is to be replayed under other rules'
            )
        if repairs := self.log.repairs():
            raise Damaged(f"rows of the ledger were lost ({repairs[0].problem}): the log cannot be decided anew")
        for entry in self.log.entries():
            self._take_steps(entry)
            if self.counterfactual:
                self._let_grace_run_out(entry.at)
            body = self._changed(entry)
            if body is not None:
                self._apply(replace(entry, body=body) if body is not entry.body else entry)
            self._at = entry.at
            if self.counterfactual:
                self._follow(entry)
            yield entry
        self._compute()

    def _changed(self, entry: Entry) -> Loggable | None:
        """What of an entry is folded; None for outcomes, which are decided anew, and for those who are left out."""
        body = entry.body
        if isinstance(body, Versioned):
            state = self.fold.coordinator.state.encoders.get(body.encoder)
            self._reached[body.encoder, body.version] = state.version if state else 0
            return None
        if isinstance(body, StepFailed | Skipped | Repaired):
            return None
        if _who(body) in self.without:
            return None
        if isinstance(body, Configured) and self.counterfactual:
            return self._changed_settings(body.settings, body)
        if isinstance(body, Change) and self.counterfactual and body.member is None:
            # of the logged settings, whatever a counterfactual has made of them
            settings = operating.changed_settings(self.logged.state, body)
            return None if settings is None else self._changed_settings(settings, self.logged.state)
        if isinstance(body, UpdateManifest) and self.counterfactual:
            base = self._reached.get((body.encoder, body.base_version), 0)
            return body.model_copy(update={"base_version": base})
        return body

    def _changed_settings(self, settings: Settings, of: Configured | State) -> Configured:
        changed = self.change(settings) if self.change else settings
        decided = changed.model_copy(update={"stop": StopRule()})
        return Configured(settings=decided, claims=of.claims, kept_failed=of.kept_failed)

    def _follow(self, entry: Entry) -> None:
        """Decide as the master did. Where that ended an encoder's training, what is at hand is the last version."""
        for effect in self.logged.handle(entry):
            if isinstance(effect, Conclude):
                self._compute(entry.at)
                self._apply(Entry(0, "", entry.at, Stop(sender="replay", encoder=effect.encoder)))
                self._compute(entry.at)

    def _let_grace_run_out(self, until: float) -> None:
        """Fire what is due before `until`, unless the very same buffer waited then: the log says what became of it."""
        then = _grace(self.logged)
        while due := [
            at for encoder, at in _grace(self.fold.coordinator).items() if at <= until and then.get(encoder) != at
        ]:
            self._at = max(self._at, min(due))
            self._apply(Entry(0, "", self._at, Tick()))
            self._compute(self._at)

    def _apply(self, entry: Entry) -> None:
        if isinstance(entry.body, UpdateManifest) and entry.payload in self._dropped:
            # it was refused then; were it counted now, its payload would be missing
            self.uncounted += self.counterfactual
            entry = replace(entry, payload=None)
        self.fold.apply(replace(entry, offset=self.fold.offset + 1))

    def _take_steps(self, upcoming: Entry) -> None:
        """Compute what is pending, unless the log says that this failed then for want of payloads."""
        body = upcoming.body
        if isinstance(body, StepFailed):
            step = self.fold.pending.get(body.encoder)
            lost = [each.payload for each in step.contributions if each.payload in body.lost] if step else []
            if step is not None and lost:
                self._apply(
                    Entry(0, "", upcoming.at, StepFailed(encoder=body.encoder, version=step.version, lost=lost))
                )
        self._compute(upcoming.at)

    def _compute(self, at: float | None = None) -> None:
        while self.fold.pending:
            encoder = next(iter(self.fold.pending))
            outcome = self.fold.compute(encoder)
            if isinstance(outcome, StepFailed):
                if not set(outcome.lost) <= self._lost:
                    raise Damaged(
                        f"version {outcome.version} of {encoder} cannot be computed: "
                        f"damaged or missing: payload {', '.join(outcome.lost)}"
                    )
                self.uncounted += len(outcome.lost)
            self._apply(Entry(0, "", self._at if at is None else at, outcome))


def _grace(coordinator: Coordinator) -> dict[str, float]:
    """When the updates at hand of each encoder become a version, however few they are."""
    state = coordinator.state
    return {
        name: ends
        for name, encoder in state.encoders.items()
        if encoder.status == "running"
        and encoder.paused_at is None
        and (ends := grace_ends(encoder, state.settings)) is not None
    }


def _who(body: Message) -> str | None:
    return body.node if isinstance(body, NodeMessage) else getattr(body, "node", None)
