"""Training without a model: a node is pulled from wherever it is towards an optimum of its own, and version 0 is drawn.

The path of the shared parameters, the encoding and its error feedback are those of a real session.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.numbers.encodings import decode_vector
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.wire.to_node import Instruction, Receipt
from common.wire.transfer import CompleteVersion
from common.wire.update_rule import UpdateRule
from master_service.decisions.effects import Generate
from node_service.handover.receipt_book import Ledger
from node_service.training.looks import HeldOut, Looks, must_evaluate
from node_service.training.trajectory import Trajectory
from node_service.training.update_rule import SinceReturn, must_return

#: The share of the way to the optimum that a step goes, and how far noise takes it off it.
_RATE = 0.02
_NOISE = 0.5
#: How far the optima of the nodes are from the one that they have in common, by coordinate.
_SPREAD = 0.5
#: Steps that a measurement takes as long as.
_MEASURING = 5
_NOWHERE = Path("nowhere")


@dataclass(frozen=True)
class Saved:
    """A checkpoint. `tensors`: `local` and those of the trajectory, which is this incarnation's and holds what was not
    handed in before the update numbered `next_sequence`."""

    version: int
    steps: int
    since: dict[str, Any]
    incarnation: str
    next_sequence: int
    last_answered: int
    tensors: dict[str, Tensor]


class ModelledTraining:
    """The Training of a simulated node: a vector instead of a model, a step as long as the node's speed says.

    Its validation loss is the distance to the optimum of the node. `checkpoints`, by encoder, outlive a kill; `speed`
    is in steps a second; `seeds` make the optimum and the noise.
    """

    def __init__(
        self,
        instruction: Instruction,
        ledger: Ledger,
        checkpoints: dict[str, Saved],
        *,
        speed: float,
        seeds: tuple[int, int],
        noise: np.random.Generator,
    ) -> None:
        self.instruction = instruction
        self.rule = UpdateRule()
        self.version = -1
        self.since = SinceReturn()
        self.held_out: HeldOut | None = None
        self._layout = Layout(instruction.layout)
        self._checkpoints = checkpoints
        self._seconds = 1.0 / speed
        self._noise = noise
        self._optimum = optimum(self._layout.size, *seeds)
        self._steps = 0
        #: Seconds of measuring, which the next step takes longer.
        self._measured = 0.0
        self._looks: Looks | None = None
        self._best: Tensor | None = None
        self._trajectory: Trajectory | None = None
        self._local = torch.zeros(self._layout.size)
        if (saved := checkpoints.get(instruction.encoder)) is not None:
            self._restore(saved, ledger)

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def must_return(self) -> bool:
        drift = self._trajectory.drift(self._local) if self.rule.when.drift and self._trajectory else None
        return must_return(self.rule.when, self.since, drift)

    def retune(self, rule: UpdateRule, progress: float) -> None:
        self.rule = rule

    def adopt(self, read: CompleteVersion) -> None:
        target = decode_vector(read.payload, self._layout.size, read.encoding)
        if must_evaluate(self.rule.evaluate_every, self.held_out, read.version, self._steps):
            self.held_out = HeldOut(read.version, self._loss(target), self._steps)
        if self._trajectory is None:
            self._local = target
            self._trajectory = Trajectory(ParameterSet(self._layout, target.clone()))
        else:
            self._local = self._trajectory.adopt(target, self._local)
        self.version = read.version

    def step(self) -> float:
        local = self._local.numpy()
        apart = local - self._optimum
        loss = _half_mean_square(apart)
        noise = self._noise.standard_normal(len(local), dtype=np.float32)
        local -= np.float32(_RATE) * (apart + np.float32(_NOISE) * noise)
        self._steps += 1
        self.since.step(self.rule.inner.batch_size, loss)
        if (looks := self._looks) is not None:
            looks.steps += 1
            if looks.due and looks.look(self._loss(self._local)):
                self._best = self._local.clone()
        took, self._measured = self._seconds + self._measured, 0.0
        return took

    def settle(self) -> None:
        """A step is taken at once; it is its time that passes later."""

    def hand_in(self, sequence: int) -> tuple[SinceReturn, list[bytes]]:
        assert self._trajectory is not None, "a node trains from a version"
        since, self.since = self.since, self.since.returned()
        bodies = self._trajectory.hand_in(sequence, self._local, self.rule.encoding)
        return since, bodies

    def answered(self, receipt: Receipt) -> None:
        trajectory = self._trajectory
        if trajectory is None:
            return
        if receipt.reason == "not-finite":
            self._local = trajectory.restart(trajectory.origin)
            self.since = SinceReturn()
        elif receipt.accepted:
            trajectory.count(receipt.sequence)
        else:
            trajectory.discard(receipt.sequence)

    def save(self, incarnation: str, next_sequence: int) -> None:
        if (trajectory := self._trajectory) is None:
            return
        tensors = {"local": self._local, **trajectory.state()}
        self._checkpoints[self.instruction.encoder] = Saved(
            version=self.version,
            steps=self._steps,
            since=vars(self.since).copy(),
            incarnation=incarnation,
            next_sequence=next_sequence,
            last_answered=trajectory.last_answered,
            tensors={name: tensor.clone() for name, tensor in tensors.items()},
        )

    def finish(self, read: CompleteVersion, export: Path | None) -> Path | None:
        """There is no model to export, but the phase takes its time and is as good as its best moment."""
        self._local = decode_vector(read.payload, self._layout.size, read.encoding)
        self.version = read.version
        self._trajectory, self.since = None, SinceReturn()
        self._checkpoints.pop(self.instruction.encoder, None)
        self.held_out = HeldOut(read.version, self._loss(self._local), self._steps)
        self._looks, self._best = Looks.planned(self.rule.finish, self._steps), self._local.clone()
        if self._looks is None:
            return _NOWHERE
        self._looks.first(self.held_out.loss)
        return None

    @property
    def finishing(self) -> Looks | None:
        return self._looks

    def finish_on(self) -> bool:
        """Nobody is killed once the training has ended, so nothing is kept of a phase."""
        return False

    def conclude(self, export: Path | None) -> Path:
        assert self._best is not None
        self._local, self._looks, self.since = self._best, None, SinceReturn()
        return _NOWHERE

    def _loss(self, point: Tensor) -> float:
        """What this node's validation samples would say of these parameters; it takes as long as five steps."""
        self._measured += _MEASURING * self._seconds
        return _half_mean_square(point.numpy() - self._optimum)

    def _restore(self, saved: Saved, ledger: Ledger) -> None:
        """As a real session does: not if something was handed in after the checkpoint, which would count twice."""
        self._steps = saved.steps
        if saved.incarnation != ledger.incarnation or saved.next_sequence < ledger.next_sequence:
            return
        tensors = {name: tensor.clone() for name, tensor in saved.tensors.items()}
        self._local = tensors.pop("local")
        self._trajectory = Trajectory.restored(self._layout, tensors, saved.last_answered)
        self.version, self.since = saved.version, SinceReturn(**saved.since)
        for sequence in sorted(self._trajectory.pending.keys() & ledger.answered.keys()):
            self.answered(ledger.answered[sequence])


def _half_mean_square(values: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    """½·mean(v²): at every step of every node, so without what `np.mean` does beside adding up."""
    return 0.5 * float(np.add.reduce(np.square(values)) / len(values))


def optimum(size: int, seed: int, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Where a node's loss is least, float32 of shape (size,): near what all nodes have in common."""
    common = np.random.default_rng([seed, 0]).standard_normal(size, dtype=np.float32)
    own = np.random.default_rng([seed, 1, index]).standard_normal(size, dtype=np.float32)
    return common + np.float32(_SPREAD) * own


def drawn(effect: Generate) -> tuple[dict[str, Any], ParameterSet]:
    """Version 0 from the seed, of as many parameters as the architecture says; there is no model."""
    size = int(effect.architecture["parameters"])
    random = torch.Generator().manual_seed(effect.seed & 0xFFFF_FFFF_FFFF_FFFF)
    return effect.architecture, ParameterSet(Layout([("parameters", (size,))]), torch.randn(size, generator=random))
