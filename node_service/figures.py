"""What is shown of a running node, here and in its signs of life."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from common.wire.to_master import Alive
from common.wire.to_node import Receipt

#: What keeps a node from steps that could run. Other: reading messages, deciding, saying how it is.
Lost = Literal["hand_in", "adoption", "checkpoint", "other"]


@dataclass
class NodeFigures:
    """Of the training of one `encoder`: nothing of another one is shown under it.

    Seconds in which it could not train for want of the master count as waiting. Of the others `step_seconds` went into
    steps, pauses of a throttled node into nothing, and `lost_seconds` are the rest: a version is adopted with the
    measurement that the rule wants of it. `training_seconds`: all but waiting, by the rule's clock. `waiting_since`, in
    seconds since 1970, is when it began to wait for the master, while that lasts; away for long, it is trained on
    meanwhile. `bytes_before` were sent before this training. `held_out` is the newest measurement of a version by the
    validation samples. `turned_away`: messages that were not the master's, since the node started.
    `paused_until`: when its owner's hours let it train again ("22:00"); empty while they do.
    """

    steps: int = 0
    steps_per_second: float = 0.0
    loss: float | None = None
    version: int = -1
    staleness: int = 0
    handed_in: int = 0
    accepted: int = 0
    refused: int = 0
    last_weight: float = 0.0
    waiting_seconds: float = 0.0
    training_seconds: float = 0.0
    step_seconds: float = 0.0
    lost_seconds: dict[Lost, float] = field(default_factory=lambda: dict.fromkeys(get_args(Lost), 0.0))
    note: str = "starting"
    waiting_since: float | None = None
    encoder: str | None = None
    bytes_before: int = 0
    held_out: float | None = None
    held_out_version: int | None = None
    turned_away: int = 0
    paused_until: str = ""

    @property
    def lost_share(self) -> float | None:
        """What share of the time in which steps could run was lost; None before any passed."""
        lost = sum(self.lost_seconds.values())
        return lost / (lost + self.step_seconds) if lost + self.step_seconds > 0 else None

    @property
    def doing(self) -> str:
        """What it does now, in words."""
        return f"{self.note}, paused until {self.paused_until} (accept.hours)" if self.paused_until else self.note

    def begin(self, encoder: str, bytes_out: int) -> None:
        """The training of an encoder begins, when this connection has sent so many bytes; nothing happens if it is the
        same one as before."""
        if encoder != self.encoder:
            vars(self).update(vars(NodeFigures(note=self.note, encoder=encoder, bytes_before=bytes_out)))

    def trained(self, steps: int, loss: float, seconds: float) -> None:
        """A step was taken: the count of all of them, the running mean loss, and how long this one took."""
        self.steps, self.loss = steps, loss
        rate = 1.0 / max(seconds, 1e-9)
        self.steps_per_second += 0.1 * (rate - self.steps_per_second) if self.steps_per_second else rate

    def answered(self, receipt: Receipt) -> None:
        """An update has its receipt."""
        if receipt.accepted:
            self.accepted += 1
            self.last_weight, self.staleness = receipt.weight, receipt.staleness
        else:
            self.refused += 1

    def alive(self, node: str, incarnation: str, encoder: str | None, bytes_out: int) -> Alive:
        """As it travels; `bytes_out` were sent over this connection."""
        return Alive(
            node=node,
            incarnation=incarnation,
            encoder=encoder,
            version=self.version,
            steps=self.steps,
            steps_per_second=self.steps_per_second,
            loss=self.loss if self.loss is not None and math.isfinite(self.loss) else None,
            waiting_seconds=self.waiting_seconds,
            step_seconds=self.step_seconds,
            hand_in_seconds=self.lost_seconds["hand_in"],
            adoption_seconds=self.lost_seconds["adoption"],
            checkpoint_seconds=self.lost_seconds["checkpoint"],
            other_seconds=self.lost_seconds["other"],
            bytes_sent=max(0, bytes_out - self.bytes_before),
            note=self.doing,
            held_out=self.held_out,
            held_out_version=self.held_out_version,
        )
