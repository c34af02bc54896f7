"""What a node needs of the training of one encoder. `session` trains for real; simulations put a model in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from common.wire.to_master import UpdateManifest
from common.wire.to_node import Instruction, Receipt
from common.wire.transfer import CompleteVersion, payload_digest
from common.wire.update_rule import UpdateRule
from node_service.training.looks import HeldOut, Looks
from node_service.training.update_rule import SinceReturn


class Training(Protocol):
    """The training of `instruction`'s encoder. `version` is the one that it goes on from, -1 before any was adopted.

    After the last version there may be a finishing phase: `finish` begins it, `step` goes on with it, `save` keeps it,
    and `conclude` ends it. What is trained after that goes on from what `finish` left, as if there had been none.
    """

    instruction: Instruction
    rule: UpdateRule
    version: int
    since: SinceReturn
    #: The newest measurement of a version by the node's validation samples, if there is one.
    held_out: HeldOut | None

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

    def settle(self) -> None:
        """Wait until the steps that were begun are taken, on whatever device; what is done next is none of them."""

    def hand_in(self, sequence: int) -> tuple[SinceReturn, list[bytes]]:
        """Hand in all steps since the last update, as the update of this number; they are the master's from here on.

        Gives what they were, and the encoded slices of their pseudo-gradient.
        """

    def answered(self, receipt: Receipt) -> None:
        """An update was counted, or is refused for good."""

    def save(self, incarnation: str, next_sequence: int) -> None:
        """Write a checkpoint, of this moment. `next_sequence`: what was not handed in before that update is in it. It
        may get onto the disk later, by the Beside that the node waits for."""

    def finish(self, read: CompleteVersion, export: Path | None) -> Path | None:
        """Take the final version as it is and save the private parts pinned to it; the path ends here. Then begin the
        finishing phase, or where the rule has none export the whole model into `export` (default: beside them) and
        give where it is. Raises UserError for an export directory that holds something else, OSError."""

    @property
    def finishing(self) -> Looks | None:
        """The finishing phase while it goes on; it is to be concluded once it is over."""

    def finish_on(self) -> bool:
        """Go on with the finishing phase that an earlier process saved; False if none is there, as after its export.
        Raises UserError if it is damaged."""

    def conclude(self, export: Path | None) -> Path:
        """End the finishing phase: export its best moment as `finish` would, and forget it. Raises as `finish`."""


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
    measured = training.held_out if training.held_out is not None and training.held_out.finite else None
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
        digest=payload_digest(bodies, training.instruction.shards),
        held_out=measured.loss if measured is not None else None,
        held_out_version=measured.version if measured is not None else None,
        shards=training.instruction.shards,
    )
