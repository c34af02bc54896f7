"""What a node's metrics say: pure, from its figures and what it owes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deploy.monitoring.table import Sample
from node_service.figures import NodeFigures


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """`figures` is a copy; `samples`: by encoder type; `owed` updates of `owed_bytes` are on disk without an answer."""

    figures: NodeFigures
    samples: Mapping[str, int]
    sending_seconds: float
    owed: int
    owed_bytes: int


def samples(seen: NodeSeen) -> Iterator[Sample]:
    """What belongs to one training bears its encoder, and begins anew with the next."""
    figures = seen.figures
    about = {"encoder": figures.encoder or ""}
    for encoder_type, count in seen.samples.items():
        yield Sample("node_samples", count, {"type": encoder_type})
    yield Sample("node_version", figures.version, about)
    yield Sample("node_staleness_versions", figures.staleness, about)
    yield Sample("node_last_weight", figures.last_weight, about)
    yield Sample("node_steps", figures.steps, about)
    yield Sample("node_steps_per_second", figures.steps_per_second, about)
    if figures.loss is not None:
        yield Sample("node_loss", figures.loss, about)
    if figures.held_out is not None:
        yield Sample("node_held_out_loss", figures.held_out, about)
    yield Sample("node_training_seconds_total", figures.training_seconds, about)
    yield Sample("node_step_seconds_total", figures.step_seconds, about)
    yield Sample("node_waiting_seconds_total", figures.waiting_seconds, about)
    for work, seconds in figures.lost_seconds.items():
        yield Sample("node_lost_seconds_total", seconds, {**about, "work": work.replace("_", "-")})
    yield Sample("node_sending_seconds_total", seen.sending_seconds)
    outcomes = {"handed_in": figures.handed_in, "counted": figures.accepted, "refused": figures.refused}
    for outcome, count in outcomes.items():
        yield Sample("node_updates_total", count, {**about, "outcome": outcome})
    yield Sample("node_pending_updates", seen.owed)
    yield Sample("node_pending_bytes", seen.owed_bytes)
    yield Sample("node_waiting_for_master", figures.waiting_since is not None)
    yield Sample("node_paused", bool(figures.paused_until))
    yield Sample("node_turned_away_messages_total", figures.turned_away)
