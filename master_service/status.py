"""The running federation for people and for `--json`: what the log led to, and what nodes said of themselves last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from common.wire.broker import BrokerStatus
from common.wire.messages import Alive
from master_service.decisions.state import State
from master_service.decisions.stopping import progress


@dataclass
class Live:
    """What is shown and not decided upon, except that silence makes a node absent."""

    last_seen: dict[str, float] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    said: dict[str, Alive] = field(default_factory=dict)
    poison: int = 0

    def seen(self, node: str, at: float) -> None:
        self.last_seen[node] = at

    def begin(self, node: str, present: bool, at: float) -> None:
        """What the log knew of a node when this master started."""
        if present:
            self.last_seen[node] = at
        else:
            self.absent.add(node)

    def alive(self, message: Alive) -> None:
        self.said[message.node] = message

    def transitions(self, now: float, timeout: float) -> Iterator[tuple[str, bool]]:
        """(node, present) for every node that has fallen silent for `timeout` seconds, or spoke again."""
        for node, at in self.last_seen.items():
            silent = now - at > timeout
            if silent and node not in self.absent:
                self.absent.add(node)
                yield node, False
            elif not silent and node in self.absent:
                self.absent.discard(node)
                yield node, True


def report(state: State, live: Live, broker: BrokerStatus, now: float) -> dict[str, Any]:
    """Plain values only. Times in seconds, sizes in bytes."""
    return {
        "epoch": state.epoch,
        "rule": state.settings.rule.preset,
        "dead_letters": live.poison,
        "broker": {"connected": broker.connected, "blocked": broker.blocked, "reconnects": broker.reconnects},
        "nodes": sorted(state.nodes),
        "encoders": {name: _encoder(state, live, name, now) for name in state.encoders},
    }


def _encoder(state: State, live: Live, name: str, now: float) -> dict[str, Any]:
    encoder = state.encoders[name]
    members = {}
    for node, member in encoder.members.items():
        said = live.said.get(node)
        members[node] = {
            "active": member.active,
            "samples": member.samples,
            "returns": member.returns,
            "refused": member.refused,
            "duplicates": member.duplicates,
            "weight": member.weight,
            "last_weight": member.last_weight,
            "staleness": member.last_staleness,
            "version": max(said.version, member.version) if said else member.version,
            "steps": max(member.steps, said.steps if said else 0),
            "steps_per_second": said.steps_per_second if said else 0.0,
            "loss": said.loss if said and said.loss is not None else member.loss,
            "waiting_seconds": said.waiting_seconds if said else 0.0,
            "bytes_sent": said.bytes_sent if said else member.payload_bytes,
            "silent_seconds": now - live.last_seen[node] if node in live.last_seen else None,
        }
    return {
        "type": encoder.encoder_type,
        "status": encoder.status,
        "reason": encoder.reason,
        "version": encoder.version,
        "digest": encoder.digest,
        "parameters": encoder.size,
        "updates": encoder.updates,
        "buffered": len(encoder.buffer),
        "progress": progress(encoder, state.settings.stop, now),
        "waiting_for_nodes": 0 if encoder.started else state.settings.min_nodes - len(encoder.active()),
        "members": members,
    }
