"""The finishing phase: after the last version a node tunes its own copy by itself, and keeps its best moment.

It has a file of its own, `finishing.safetensors`, beside the checkpoint, which stays pinned to the shared version. What
came of it stays as `finished.safetensors`: the export is for transformers, this for `evaluate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from common.encoders.base import EncoderModel
from common.errors import UserError
from common.wire.update_rule import FinishRule, InnerOptimizer
from common.workers import Beside
from node_service.training.checkpoint import AT_ONCE, read_tensors, write_tensors
from node_service.training.looks import Looks
from node_service.training.trainer import Trainer

_FILE, _FINISHED = "finishing.safetensors", "finished.safetensors"


class _Facts(BaseModel):
    """What the tensors of the file are."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    version: int
    rule: FinishRule
    inner: InnerOptimizer
    looks: Looks


class _Finished(BaseModel):
    """What the tensors of a finished copy are: the shared version that it was tuned from."""

    version: int


class FinishingPhase:
    """One phase, over the trainer's model. `validation` are encoded samples; None: all of it runs, and its end counts.

    `version` is the shared version that it began with.
    """

    def __init__(
        self,
        trainer: Trainer,
        validation: Any,
        rule: FinishRule,
        looks: Looks,
        version: int,
        best: dict[str, Tensor] | None = None,
    ) -> None:
        self.looks = looks
        self.version = version
        self._trainer = trainer
        self._rule = rule
        private = trainer.model.private_parameters()
        self._model = dict(trainer.model.named_parameters())
        self._moving = private if rule.what == "private" else self._model
        #: The moving parameters at the best moment; None without a validation part.
        self._best = best
        self._validation = validation if best is not None else None
        self._let_move(False)

    @classmethod
    def begin(cls, trainer: Trainer, validation: Any, rule: FinishRule, version: int) -> FinishingPhase | None:
        """The phase that begins with the trainer's model as it is now; None if the rule leaves it out."""
        looks = Looks.planned(rule, trainer.steps)
        if looks is None or (rule.what == "private" and not trainer.model.private_parameters()):
            return None
        phase = cls(trainer, validation, rule, looks, version, None if validation is None else {})
        if validation is not None:
            looks.first(trainer.held_out_loss(validation))
            phase._keep()
        return phase

    @classmethod
    def restored(cls, directory: Path, trainer: Trainer, validation: Any) -> FinishingPhase | None:
        """The phase as it was saved here, put into the trainer and its model; None if there is none.

        Raises UserError if the file is damaged or of another model.
        """
        place = directory / _FILE
        read = read_tensors(place, _Facts, ("model", "trainer", "best"))
        if read is None:
            return None
        facts, groups = read
        parameters = dict(trainer.model.named_parameters())
        if {name: each.shape for name, each in parameters.items()} != {
            name: each.shape for name, each in groups["model"].items()
        }:
            raise UserError(f"{place} is of another model; remove it to do without the rest of the finishing phase")
        _copy(groups["model"], parameters)
        trainer.set_inner(facts.inner)
        trainer.load_state(groups["trainer"])
        return cls(trainer, validation, facts.rule, facts.looks, facts.version, groups["best"] or None)

    def step(self) -> list[float]:
        """One training step, and a look where one is due; gives the training losses that are known by now."""
        losses = self._trainer.step(self.looks.rate(self._trainer.inner))
        self.looks.steps += 1
        looked = self._validation is not None and self.looks.due
        if looked and self.looks.look(self._trainer.held_out_loss(self._validation)):
            self._keep()
        return losses

    def save(self, directory: Path, beside: Beside = AT_ONCE) -> None:
        """Write the file: after a crash it is the old one or the new one, whole. Raises as `write_tensors` does."""
        facts = _Facts(version=self.version, rule=self._rule, inner=self._trainer.inner, looks=self.looks)
        groups = {"model": _data(self._model), "trainer": self._trainer.state(), "best": self._best or {}}
        write_tensors(directory / _FILE, groups, facts, beside)

    def end(self) -> None:
        """Put the best moment into the model; without a validation part it stays as it is now."""
        if self._best is not None:
            _copy(self._best, self._moving)
        self._let_move(True)

    @staticmethod
    def forget(directory: Path) -> None:
        """Remove the file: the phase has ended, and its model is exported."""
        (directory / _FILE).unlink(missing_ok=True)

    def _keep(self) -> None:
        self._best = {name: tensor.cpu().clone() for name, tensor in _data(self._moving).items()}

    def _let_move(self, everything: bool) -> None:
        """Whether parameters that the phase leaves alone get gradients: without one an optimiser leaves them too."""
        for name, parameter in self._model.items():
            if name not in self._moving:
                parameter.requires_grad_(everything)
                parameter.grad = None
        self._trainer.changed()


def keep_finished(directory: Path, model: EncoderModel, version: int) -> None:
    """Write the whole model, as it is after a phase that began with `version`. Raises OSError."""
    write_tensors(directory / _FINISHED, {"model": _data(dict(model.named_parameters()))}, _Finished(version=version))


def load_finished(directory: Path, model: EncoderModel, version: int) -> bool:
    """Put the finished copy into a model of the same build; False where there is none that began with `version`.

    Raises UserError if the file is damaged or of another model.
    """
    read = read_tensors(directory / _FINISHED, _Finished, ("model",))
    if read is None or read[0].version != version:
        return False
    parameters = dict(model.named_parameters())
    tensors = read[1]["model"]
    if {name: each.shape for name, each in parameters.items()} != {name: each.shape for name, each in tensors.items()}:
        raise UserError(f"{directory / _FINISHED} is of another model; remove it to do without")
    _copy(tensors, parameters)
    return True


def _data(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in parameters.items()}


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], parameters: dict[str, torch.nn.Parameter]) -> None:
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
