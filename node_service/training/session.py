"""One encoder on one node, trained for real: model, trainer and the trajectory of the shared parameters together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
import torch

from common import cards
from common.encoders import get_encoder_type
from common.errors import UserError
from common.exports import replacing
from common.numbers.encodings import EncodedVector
from common.numbers.layout import Layout
from common.wire.to_node import Instruction, Receipt
from common.wire.transfer import CompleteVersion
from common.wire.update_rule import UpdateRule
from common.workers import Beside
from node_service.config import Precision
from node_service.handover.receipt_book import Ledger
from node_service.training.checkpoint import AT_ONCE, Checkpoint, Facts, PathFacts, write_checkpoint
from node_service.training.finishing import FinishingPhase, keep_finished
from node_service.training.following import build
from node_service.training.looks import HeldOut, Looks, must_evaluate
from node_service.training.private_parts import load_private, load_spec, save_spec
from node_service.training.ranks import Ranks
from node_service.training.together import Together
from node_service.training.trainer import Trainer
from node_service.training.trajectory import Trajectory
from node_service.training.update_rule import SinceReturn, must_return

log = structlog.get_logger()

#: Drift needs a pass over all shared parameters, so it is looked at every so many steps.
_DRIFT_EVERY = 10


class Session:
    """Made from an instruction and the owner's samples; trains once a version was adopted, or a path was restored.

    `ledger` says what became of the updates that earlier processes of this incarnation handed in. `assets` are the
    instruction's, by name; private parts are fitted with them. By the loss of the `validation` samples training is
    steered; there may be none. `beside` gets checkpoints onto the disk. `ranks`: other processes of this node train
    too, each with batches of its own.
    Raises UserError if this node cannot build what the instruction asks for.
    """

    def __init__(
        self,
        instruction: Instruction,
        samples: Any,
        directory: Path,
        *,
        private: dict[str, Any],
        seed: int,
        device: str,
        precision: Precision = "float32",
        compiled: bool = False,
        micro_batch: int | None = None,
        ranks: Ranks | None = None,
        ledger: Ledger,
        assets: Mapping[str, bytes],
        validation: Any = (),
        beside: Beside = AT_ONCE,
    ) -> None:
        self.instruction = instruction
        self.directory = directory
        self._beside = beside
        beside.wait()  # an earlier session may have written here
        encoder_type = get_encoder_type(instruction.encoder_type)
        spec = load_spec(directory)
        if spec is None:
            spec = encoder_type.fit_private(samples, instruction.architecture, private, assets)
            save_spec(directory, spec)
        self.model = encoder_type.build(instruction.architecture, spec, seed)
        saved = load_private(directory, self.model)
        encoded = self.model.encode(samples)
        self._processes = ranks.size if ranks is not None else 1
        if ranks is not None:
            build(ranks, instruction, spec, seed)
        self.trainer = Trainer(
            self.model,
            encoded,
            UpdateRule().inner,
            seed=seed,
            device=device,
            precision=precision,
            compiled=compiled,
            micro_batch=micro_batch,
            together=Together(ranks, seed) if ranks is not None else None,
        )
        difference = Layout(instruction.layout).difference(self.trainer.layout)
        if difference is not None:
            raise UserError(f"this node builds another encoder than the instruction says: {difference}")
        self.rule = UpdateRule()
        self.since = SinceReturn()
        self.version = -1
        self.held_out: HeldOut | None = None
        self._validation = self.model.encode(validation) if len(validation) else None
        self._phase: FinishingPhase | None = None
        self._trajectory: Trajectory | None = None
        if saved is not None:
            self.trainer.load_state(saved.trainer)
            self._restore_path(saved, ledger)

    @property
    def steps(self) -> int:
        return self.trainer.steps

    def retune(self, rule: UpdateRule, progress: float) -> None:
        if rule.inner != self.trainer.inner:
            self.trainer.set_inner(rule.inner)
        self.rule = rule
        self.trainer.progress = max(self.trainer.progress, progress)

    def adopt(self, read: CompleteVersion) -> None:
        target = self._decoded(read)
        local = self.trainer.vector()
        every = self.rule.evaluate_every if self._validation is not None else 0
        measured = must_evaluate(every, self.held_out, read.version, self.steps)
        if measured or self._trajectory is None:
            ahead = local if self._trajectory is None else local.clone()
            self.trainer.set_shared(
                target.decode(local)
            )  # as it came: what this node is ahead of it by comes back below
            local = ahead
        if measured:
            self._measure(read.version)
        if self._trajectory is None:
            self._trajectory = Trajectory(target, local.device)
        else:
            self.trainer.set_shared(self._trajectory.adopt(target, local))
        self.version = read.version
        self.trainer.progress = max(self.trainer.progress, read.progress)

    def finish(self, read: CompleteVersion, export: Path | None) -> Path | None:
        self.settle()
        self.trainer.set_shared(self._decoded(read).decode(self.trainer.vector()))
        self.version = read.version
        self._trajectory, self.since, self.trainer.progress = None, SinceReturn(), 0.0
        if self.rule.evaluate_every > 0:
            self._measure(read.version)
        self._write(None)
        self._beside.wait()
        self._phase = FinishingPhase.begin(self.trainer, self._validation, self.rule.finish, read.version)
        if self._phase is None:
            return self._export(export)
        self._phase.save(self.directory)
        return None

    @property
    def finishing(self) -> Looks | None:
        return self._phase.looks if self._phase is not None else None

    def finish_on(self) -> bool:
        self._phase = FinishingPhase.restored(self.directory, self.trainer, self._validation)
        if self._phase is not None:
            self.version = self._phase.version
        return self._phase is not None

    def conclude(self, export: Path | None) -> Path:
        assert self._phase is not None
        self.settle()
        self._beside.wait()  # a file that is being put in place would come back after it was forgotten
        phase, self._phase, self.since = self._phase, None, SinceReturn()
        phase.end()
        keep_finished(self.directory, self.model, phase.version)
        model = self._export(export, _finished(phase.looks))
        phase.forget(self.directory)
        # whoever trains on goes on from what fits the shared version
        saved = load_private(self.directory, self.model)
        self.trainer.reset_optimizer()
        if saved is not None:
            self.trainer.load_state(saved.trainer)
        return model

    def step(self) -> float:
        losses = self.trainer.step() if self._phase is None else self._phase.step()
        self.since.took(self.trainer.inner.batch_size * self._processes)
        self._saw(losses)
        return 0.0

    def settle(self) -> None:
        self._saw(self.trainer.settle())

    def _saw(self, losses: list[float]) -> None:
        for loss in losses:
            self.since.saw(loss)

    @property
    def must_return(self) -> bool:
        if self.rule.when.loss_change is not None:
            self.settle()  # this rule needs the newest loss, and is worth waiting for
        drift = None
        if self.rule.when.drift is not None and self.since.steps % _DRIFT_EVERY == 0 and self._trajectory is not None:
            drift = self._trajectory.drift(self.trainer.vector())
        return must_return(self.rule.when, self.since, drift)

    def hand_in(self, sequence: int) -> tuple[SinceReturn, list[bytes]]:
        assert self._trajectory is not None
        self.settle()
        since, self.since = self.since, self.since.returned()
        bodies = self._trajectory.hand_in(sequence, self.trainer.vector(), self.rule.encoding)
        return since, bodies

    def answered(self, receipt: Receipt) -> None:
        if self._trajectory is None:
            return
        if receipt.reason == "not-finite":
            self.settle()
            # what was trained is lost anyway: start over from the newest version, with a fresh optimiser
            log.warning("training diverged, starting again from the shared encoder", encoder=self.instruction.encoder)
            self.trainer.set_shared(self._trajectory.restart(self._trajectory.origin))
            self.trainer.reset_optimizer()
            self.since = SinceReturn()
        elif receipt.accepted:
            self._trajectory.count(receipt.sequence)
        else:
            self._trajectory.discard(receipt.sequence)

    def save(self, incarnation: str, next_sequence: int) -> None:
        self.settle()
        if self._phase is not None:
            self._phase.save(self.directory, self._beside)
            return
        trajectory = self._trajectory
        path = None
        if trajectory is not None:
            path = PathFacts(
                incarnation=incarnation,
                next_sequence=next_sequence,
                last_settled=trajectory.last_answered,
                progress=self.trainer.progress,
                since=self.since,
                held_out=self.held_out,
            )
        self._write(path)

    def _decoded(self, read: CompleteVersion) -> EncodedVector:
        return EncodedVector.of_payload(read.payload, self.trainer.layout.size, read.encoding)

    def _measure(self, version: int) -> None:
        """The loss of the validation samples, if there are any, with the shared parameters of a version."""
        if self._validation is not None:
            self.held_out = HeldOut(version, self.trainer.held_out_loss(self._validation), self.steps)

    def _write(self, path: PathFacts | None) -> None:
        """A checkpoint: private parts, trainer state, and what was trained and not handed in yet."""
        facts = Facts(
            encoder=self.instruction.encoder,
            version=self.version,
            steps=self.trainer.steps,
            type=self.instruction.encoder_type,
            architecture=self.instruction.architecture,
            path=path,
        )
        trajectory = self._trajectory
        tensors = {} if trajectory is None else {"local": self.trainer.vector(), **trajectory.state()}
        private = {name: parameter.data for name, parameter in self.model.private_parameters().items()}
        write_checkpoint(self.directory, Checkpoint(facts, private, self.trainer.state(), tensors), self._beside)

    def _export(self, directory: Path | None, note: str = "") -> Path:
        """Stem + shared encoder + head for transformers' Auto classes, in the place of an earlier export. A failure
        leaves what was there."""
        model = directory or self.directory / "model"
        kind = self.instruction.encoder_type
        card = (
            f"{cards.front_matter(kind, whole=True)}"
            f"{cards.TITLE}{self.instruction.encoder} with the private parts of one node\n\n"
            f"Type `{kind}`, version {self.version}. Its private parts were fitted to this node's own samples: they "
            f"have never left it, and are its owner's to hand on or to keep.{note}\n\n"
            f"{cards.loading(kind, whole=True)}{cards.architecture(self.instruction.architecture)}"
        )
        with torch.no_grad(), replacing(model, card, ours=directory is None) as beside:
            self.model.eval()
            self.model.export(beside)
        return model

    def _restore_path(self, saved: Checkpoint, ledger: Ledger) -> None:
        """Go on exactly where the checkpoint was made, if nothing was handed in after it.

        Otherwise its steps since the hand-in before are in that later update already, and handing them in again would
        count them twice: then training starts from the version that is read, and what an encoding left over is lost.
        """
        facts = saved.facts.path
        if facts is None or facts.incarnation != ledger.incarnation or facts.next_sequence < ledger.next_sequence:
            return
        local = self.trainer.vector()
        trajectory = Trajectory.restored(self.trainer.layout, saved.path, facts.last_settled, str(local.device))
        if not trajectory.pending.keys() <= {*ledger.answered, *ledger.owed}:
            return  # the parts of a backup are of different moments
        self._trajectory = trajectory
        self.trainer.set_shared(saved.path["local"])
        self.trainer.progress = facts.progress
        self.version, self.since, self.held_out = saved.facts.version, facts.since, facts.held_out
        for sequence in sorted(trajectory.pending.keys() & ledger.answered.keys()):
            self.answered(ledger.answered[sequence])


def _finished(looks: Looks) -> str:
    """What a card says of a finishing phase."""
    words = f" After the last shared version it was tuned here alone for {looks.steps} steps"
    if looks.before is None or looks.best is None:
        return f"{words}."
    return f"{words}: held-out loss {looks.before:.3f} before, and {looks.best:.3f} at the best moment, which this is."
