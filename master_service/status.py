"""What `status` shows of a running federation: the state that the log led to, and what nodes last said of themselves.

`report` makes a `Report`; it travels as plain values in `StatusReport.report`, and every viewer (the tables, `--json`,
the demo, metrics) reads it back as a `Report`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from common.wire.broker import BrokerStatus
from common.wire.to_master import Alive
from master_service.decisions.state import EncoderState, Measured, Member, State
from master_service.decisions.stopping import progress

#: Nodes whose figures are kept, and encoders per node: whoever made up more names would only push out his own.
KEPT_NODES = 10_000
KEPT_ENCODERS = 8


class _Part(BaseModel):
    # a viewer reads reports of older and newer masters: what is missing has a default, what is unknown is ignored
    model_config = ConfigDict(frozen=True, extra="ignore")


class BrokerReport(_Part):
    """The master's connection to the broker."""

    connected: bool = True
    blocked: str | None = Field(None, description="the broker's reason while an alarm stops publishers")
    problem: str = Field("", description="what does not work now, in the broker's words; empty: nothing")
    reconnects: int = Field(0, description="connections opened again since the master started")


class DiskReport(_Part):
    """The disk that the master's state directory is on."""

    short: bool = Field(False, description="the last write found too little room")
    free_bytes: int = 0
    needed_bytes: int = Field(0, description="bytes that must be free before the master writes")


class LogReport(_Part):
    """The message log."""

    entries: int = Field(0, description="rows in the log")
    blocked: str = Field("", description="why nothing can be written to it right now; empty if it can")
    bytes_per_day: float | None = Field(None, description="of updates and rows, as they came within the last hours")
    keeps_bytes: int | None = Field(None, description="of updates, to replay; older ones are dropped; None: no bound")
    replays_from: dict[str, int] = Field(
        default_factory=dict, description="by encoder: the first version that can be rebuilt, where it is not version 0"
    )


class SnapshotReport(_Part):
    """The newest snapshot."""

    offset: int = Field(-1, description="log offset of the last row in it; -1: there is none")
    age_seconds: float | None = Field(None, description="since it was written or the master started")


class MemberReport(_Part):
    """One node in the training of one encoder."""

    active: bool = Field(True, description="it takes part and gives signs of life")
    takes_part: bool = Field(True, description="it has accepted and not left since")
    present: bool = Field(True, description="it gives signs of life")
    kicked: bool = Field(False, description="an operator has taken it out")
    samples: int = Field(0, description="training samples that it has, as it said")
    returns: int = Field(0, description="updates accepted")
    refused: int = Field(0, description="updates refused")
    duplicates: int = Field(0, description="updates that came again after they were settled")
    weight: float = Field(0.0, description="sum of the weights of its accepted updates")
    last_weight: float | None = Field(None, description="weight of the update accepted last")
    staleness: int = Field(0, description="versions that the update accepted last was behind")
    version: int = Field(0, description="newest version that it is known to have")
    steps: int = Field(0, description="training steps on this encoder")
    steps_per_second: float = Field(0.0, description="0 while it does not train this encoder, or this rests")
    loss: float | None = Field(None, description="mean training loss (text: nats); may be NaN")
    held_out: float | None = Field(None, description="newest loss of its validation samples under a version as it came")
    held_out_version: int | None = Field(None, description="the version that this was measured with")
    note: str = Field("", description="what it does now, in its own words; empty: not heard by this master")
    waiting_seconds: float = Field(0.0, description="spent without training for want of the master, since it began")
    step_seconds: float = Field(0.0, description="spent in training steps, since it began")
    lost_seconds: dict[str, float] = Field(
        default_factory=dict, description="in which no step ran though one could have, by what was done instead"
    )
    bytes_sent: int = Field(0, description="by the node since it began; at least what its updates had")
    silent_seconds: float | None = Field(None, description="since its last message; None: not heard by this master")

    @property
    def lost_share(self) -> float | None:
        """What share of the time in which steps could run was lost; None if no such time is known."""
        lost = sum(self.lost_seconds.values())
        return lost / (lost + self.step_seconds) if lost + self.step_seconds > 0 else None


class EncoderReport(_Part):
    """One shared encoder being made."""

    type: str = ""
    status: str = Field("", description="generating, gathering (words of nodes), running, finished or failed")
    reason: str = Field("", description="why the training ended")
    version: int = Field(0, description="the current version")
    digest: str = Field("", description="SHA-256 of the current version, hexadecimal")
    parameters: int = Field(0, description="number of shared parameters")
    paused: bool = Field(False, description="an operator has paused it: no version is made until it is resumed")
    updates: int = Field(0, description="updates accepted")
    buffered: int = Field(0, description="accepted updates that wait for the next version")
    progress: float = Field(0.0, description="share of the nearest limit of the stop rule, 0 to 1")
    waiting_for_nodes: int = Field(0, description="nodes that are missing before the training starts")
    held_out: float | None = Field(None, description="mean held-out loss of the members that measured about last")
    held_out_version: int | None = Field(None, description="the newest version in that")
    best_held_out: float | None = Field(None, description="the lowest such mean of this run")
    best_version: int | None = Field(None, description="the newest version in that")
    members: dict[str, MemberReport] = Field(default_factory=dict, description="by node, in the order of joining")


class Report(_Part):
    """The running federation as its master knows it."""

    epoch: int = Field(0, description="number of this start of the master; later starts have greater ones")
    rule: str = Field("", description="preset of the aggregation rule")
    dead_letters: int = Field(0, description="messages set aside since the master started")
    bytes_published: int = Field(0, description="bytes of versions published since the master started")
    broker: BrokerReport = BrokerReport()
    disk: DiskReport = DiskReport()
    log: LogReport = LogReport()
    snapshot: SnapshotReport = SnapshotReport()
    nodes: tuple[str, ...] = Field((), description="all nodes that ever joined, sorted")
    encoders: dict[str, EncoderReport] = Field(default_factory=dict, description="by encoder id")


@dataclass
class Said:
    """What one node said of itself: the encoder that it trains now, and its last figures for each that it trained."""

    encoder: str | None = None
    figures: dict[str, Alive] = field(default_factory=dict)


@dataclass
class Live:
    """What this master has heard since it started and the log does not hold. It is shown; only presence is acted upon.

    `poison` counts messages set aside. Times are seconds since 1970.
    """

    last_seen: dict[str, float] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    #: Nobody who is present was seen before.
    _oldest: float = float("inf")
    said: dict[str, Said] = field(default_factory=dict)
    poison: int = 0

    def seen(self, node: str, at: float) -> None:
        """Note that a node sent something."""
        self.last_seen[node] = at
        self._oldest = min(self._oldest, at)

    def begin(self, node: str, present: bool, at: float) -> None:
        """Take over a node's presence from the log when the master starts; its silence counts from `at`."""
        if present:
            self.seen(node, at)
        else:
            self.absent.add(node)

    def alive(self, message: Alive) -> None:
        """Note a node's figures under the encoder that it trains. What it said of others stays as it was."""
        said = self.said.pop(message.node, None) or Said()
        self.said[message.node] = said
        said.encoder = message.encoder
        if message.encoder is not None:
            said.figures.pop(message.encoder, None)
            said.figures[message.encoder] = message
        _drop_oldest(said.figures, KEPT_ENCODERS)
        _drop_oldest(self.said, KEPT_NODES)

    def figures(self, node: str, encoder: str) -> Alive | None:
        """The last figures that a node gave while it trained this encoder."""
        said = self.said.get(node)
        return said.figures.get(encoder) if said is not None else None

    def trains(self, node: str, encoder: str) -> bool:
        """Whether a node trains this encoder now, by its last sign of life."""
        said = self.said.get(node)
        return said is not None and said.encoder == encoder

    def transitions(self, now: float, timeout: float) -> Iterator[tuple[str, bool]]:
        """(node, present) for every node that has fallen silent for `timeout` seconds, or spoke again."""
        if not self.absent and not now - self._oldest > timeout:
            return  # with a thousand nodes this is asked more often than anything happens
        self._oldest = min(self.last_seen.values(), default=float("inf"))
        for node, at in self.last_seen.items():
            silent = now - at > timeout
            if silent and node not in self.absent:
                self.absent.add(node)
                yield node, False
            elif not silent and node in self.absent:
                self.absent.discard(node)
                yield node, True


def report(
    state: State,
    live: Live,
    broker: BrokerStatus,
    *,
    now: float,
    bytes_published: int,
    disk: DiskReport,
    log: LogReport,
    snapshot: SnapshotReport,
) -> Report:
    """The federation at `now` (seconds since 1970)."""
    return Report(
        epoch=state.epoch,
        rule=state.settings.rule.preset,
        dead_letters=live.poison,
        bytes_published=bytes_published,
        broker=BrokerReport(
            connected=broker.connected, blocked=broker.blocked, problem=broker.problem, reconnects=broker.reconnects
        ),
        disk=disk,
        log=log,
        snapshot=snapshot,
        nodes=tuple(sorted(state.nodes)),
        encoders={name: _encoder(state, live, encoder, now) for name, encoder in state.encoders.items()},
    )


def _encoder(state: State, live: Live, encoder: EncoderState, now: float) -> EncoderReport:
    return EncoderReport(
        type=encoder.encoder_type,
        status=encoder.status,
        paused=encoder.paused_at is not None,
        reason=encoder.reason,
        version=encoder.version,
        digest=encoder.digest,
        parameters=encoder.size,
        updates=encoder.updates,
        buffered=len(encoder.buffer),
        progress=progress(encoder, state.settings.stop, now),
        waiting_for_nodes=0 if encoder.started else max(0, state.settings.min_nodes - len(encoder.active())),
        held_out=encoder.held_out,
        held_out_version=encoder.held_out_version,
        best_held_out=encoder.best_held_out,
        best_version=encoder.best_version,
        members={
            node: _member(live, encoder, member, now, kicked=node in state.kicked)
            for node, member in encoder.members.items()
        },
    )


def _member(live: Live, of: EncoderState, member: Member, now: float, *, kicked: bool) -> MemberReport:
    """What the log says, and what the node said of this encoder where that is newer."""
    node, encoder = member.node, of.encoder
    said = live.figures(node, encoder)
    trains = live.trains(node, encoder) and member.active
    held_out = _held_out(member, said)
    return MemberReport(
        active=member.active,
        takes_part=member.accepted,
        present=member.present,
        kicked=kicked,
        samples=member.samples,
        returns=member.returns,
        refused=member.refused,
        duplicates=member.duplicates,
        weight=member.weight,
        last_weight=member.last_weight,
        staleness=member.last_staleness,
        version=max(said.version, member.version) if said else member.version,
        steps=max(said.steps, member.steps) if said else member.steps,
        steps_per_second=said.steps_per_second if said and trains and of.paused_at is None else 0.0,
        loss=said.loss if said and said.loss is not None else member.loss,
        held_out=held_out.loss if held_out else None,
        held_out_version=held_out.version if held_out else None,
        note=said.note if said and live.trains(node, encoder) else "",
        waiting_seconds=said.waiting_seconds if said else 0.0,
        step_seconds=said.step_seconds if said else 0.0,
        lost_seconds=_lost(said) if said else {},
        bytes_sent=max(said.bytes_sent, member.payload_bytes) if said else member.payload_bytes,
        silent_seconds=now - live.last_seen[node] if node in live.last_seen else None,
    )


def _lost(said: Alive) -> dict[str, float]:
    return {
        "hand-in": said.hand_in_seconds,
        "adoption": said.adoption_seconds,
        "checkpoint": said.checkpoint_seconds,
        "other": said.other_seconds,
    }


def _held_out(member: Member, said: Alive | None) -> Measured | None:
    """The newer of what it said in an update and in a sign of life."""
    known = member.held_out
    if said is None or said.held_out is None or said.held_out_version is None:
        return known
    return (
        Measured(said.held_out_version, said.held_out)
        if known is None or said.held_out_version >= known.version
        else known
    )


def _drop_oldest(kept: dict[str, Any], most: int) -> None:
    """Forget what was put in first, down to `most`."""
    while len(kept) > most:
        del kept[next(iter(kept))]
