"""What a node needs of the training of one encoder. `session` trains for real; simulations put a model in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from common.wire.messages import Instruction, Receipt, UpdateManifest, UpdateRule
from common.wire.transfer import CompleteVersion, payload_digest
from node_service.training.update_rule import SinceReturn


class Training(Protocol):
    """The training of `instruction`'s encoder. `version` is the one that it goes on from, -1 before any was adopted."""

    instruction: Instruction
    rule: UpdateRule
    version: int
    since: SinceReturn

    @property
    def steps(self) -> int:
        """Training steps from the beginning, earlier processes included."""

    @property
    def must_return(self) -> bool:
        """Whether the update rule wants an update now."""

    def retune(self, rule: UpdateRule, progress: float) -> None:
        """Train and return by this rule from now on; `progress` is that of the whole training, 0 to 1."""

    def adopt(self, read: CompleteVersion) -> None:
        """Continue from a version: steps taken since the last counted update are kept on top of it."""

    def step(self) -> float:
        """One training step; gives the seconds that it takes from now on: 0 once it is done. Only a model of training,
        under a virtual clock, gives more."""

    def hand_in(self, sequence: int) -> tuple[SinceReturn, list[bytes]]:
        """Hand in all steps since the last update, as the update of this number; they are the master's from here on.

        Gives what they were, and the encoded slices of their pseudo-gradient.
        """

    def answered(self, receipt: Receipt) -> None:
        """An update was counted, or is refused for good."""

    def save(self, incarnation: str, next_sequence: int) -> None:
        """Write a checkpoint. `next_sequence`: what was not handed in before that update is in it."""

    def finish(self, read: CompleteVersion, export: Path | None) -> Path:
        """Take the final version as it is, save the private parts pinned to it and export the whole model into `export`
        (default: beside them); gives where it is. The path ends here. Raises UserError for an export directory that
        holds something else, OSError."""


def update_manifest(
    training: Training,
    since: SinceReturn,
    bodies: Sequence[bytes],
    node: str,
    incarnation: str,
    sequence: int,
    *,
    wants_version: bool,
) -> UpdateManifest:
    """The manifest of what `hand_in` gave."""
    return UpdateManifest(
        node=node,
        incarnation=incarnation,
        encoder=training.instruction.encoder,
        sequence=sequence,
        base_version=training.version,
        steps=since.steps,
        samples=since.samples,
        seconds=since.seconds,
        loss=since.mean_loss,
        wants_version=wants_version,
        encoding=training.rule.encoding,
        layout_digest=training.instruction.layout_digest,
        size=sum(map(len, bodies)),
        chunks=len(bodies),
        digest=payload_digest(bodies),
    )
