"""One training by all processes of a node: each takes a batch of its own, and all take the same step. The gradients are
averaged by torch's DistributedDataParallel while they are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.encoders.base import Batch, EncoderModel
from common.wire.update_rule import InnerOptimizer
from node_service.training.ranks import Ranks, one_line

if TYPE_CHECKING:
    from node_service.training.trainer import Trainer


class _Loss(nn.Module):
    """What DistributedDataParallel wraps: a module that is called, and all parameters."""

    def __init__(self, model: EncoderModel, loss_of: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss_of = loss_of

    def forward(self, batch: Batch) -> Tensor:
        return self._loss_of(batch)


class Together:
    """The processes' part in a trainer. What was changed of the first one's trainer goes to the others with its next
    step: its shared parameters alone, or (`everything`) all parameters, the optimiser's state and the inner rule."""

    def __init__(self, ranks: Ranks, seed: int) -> None:
        self.ranks = ranks
        self._seed = seed
        self._shared = False
        self._everything = True
        self._wrapped: DistributedDataParallel | None = None

    def changed(self, *, everything: bool) -> None:
        """The parameters, or everything, were changed by something else than a step."""
        self._shared = True
        self._everything = self._everything or everything

    def begin(self, trainer: Trainer, rate: float) -> None:
        """A step is taken at this rate: the first process tells all others."""
        if self.ranks.rank > 0:
            return
        order: dict[str, Any] = {"do": "step", "rate": rate, "shared": self._shared}
        if self._everything:
            order["everything"] = {
                "inner": trainer.inner.model_dump(mode="json"),
                "steps": trainer.steps,
                "moving": [parameter.requires_grad for parameter in trainer.model.parameters()],
                "moments": sorted(name for name in trainer.state() if name.startswith("optimizer/")),
            }
        self.ranks.tell(order)
        self._spread(trainer, order)

    def follow(self, trainer: Trainer, order: dict[str, Any]) -> None:
        """By another: take the step that was told."""
        if (everything := order.get("everything")) is not None:
            for parameter, moves in zip(trainer.model.parameters(), everything["moving"], strict=True):
                parameter.requires_grad_(moves)
            trainer.set_inner(InnerOptimizer.model_validate(everything["inner"]))
            trainer.go_on_from(everything["steps"], seed_of(self._seed, self.ranks.rank, everything["steps"]))
        self._spread(trainer, order)
        trainer.step(order["rate"])

    def wrapped(self, model: EncoderModel, loss_of: Callable[[Batch], Tensor]) -> DistributedDataParallel:
        """The loss whose gradients are averaged. To make it anew is to give everybody the first one's parameters."""
        if self._wrapped is None:
            # a batch may be trained without the private parts, and by some of the processes alone
            with one_line():
                self._wrapped = DistributedDataParallel(_Loss(model, loss_of), find_unused_parameters=True)
        return self._wrapped

    def share(self, count: int) -> Tensor:
        """What this process's loss is to be multiplied by, so that the average of all is the mean over all of their
        positions: of shape (), on the device, where it is not waited for."""
        own = torch.full((), float(count), device=self.ranks.device)
        return own * self.ranks.size / self.ranks.summed(own.clone()).clamp(min=1.0)

    def _spread(self, trainer: Trainer, order: dict[str, Any]) -> None:
        everything = order.get("everything")
        if everything is not None:
            self._wrapped = None  # made anew with this step
            self._spread_moments(trainer, everything["moments"])
        elif order["shared"]:
            vector = trainer.vector()
            self.ranks.spread(vector)
            trainer.set_shared(vector)
        self._shared = self._everything = False

    def _spread_moments(self, trainer: Trainer, names: list[str]) -> None:
        parameters, state = dict(trainer.model.named_parameters()), trainer.state()
        found = {}
        for name in names:
            _, moment, parameter = name.split("/", 2)
            if self.ranks.rank == 0:
                found[name] = state[name]
            else:
                found[name] = torch.empty(
                    () if moment == "step" else parameters[parameter].shape, device=self.ranks.device
                )
            self.ranks.spread(found[name])
        if self.ranks.rank > 0:
            trainer.reset_optimizer()
            trainer.load_moments(found)


def seed_of(seed: int, rank: int, steps: int) -> int:
    """Where the batches of a process that follows begin after so many steps: those of no other process, nor of another
    start. The first one's generator is in its checkpoint."""
    return (seed + 1_000_003 * rank + 7_368_787 * steps) & 0x7FFF_FFFF_FFFF_FFFF
