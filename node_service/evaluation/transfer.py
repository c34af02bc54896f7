"""What an encoder gives to somebody who did not train it: the loss in a domain after a fixed budget of steps.

Rows are encoders of one architecture (each owner's alone, shared, pooled, random, a public start), columns are domains,
those that took part and those that did not. Every row has the same budget and the same grid of rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from common.encoders.base import Architecture, EncoderModel, EncoderType, PrivateSpec, Samples
from common.encoders.hugging_face import fill
from common.wire.update_rule import InnerOptimizer
from node_service.config import Precision
from node_service.evaluation.probe import masked_loss
from node_service.training.trainer import Trainer

#: frozen: the shared parameters stay as they came, and the private ones are trained; free: all are.
Mode = Literal["frozen", "free"]

#: An encoder's shared tensors by name; None: a random one, by the seed.
Row = Mapping[str, Tensor] | None

#: Called after each step.
Advance = Callable[[], None]


@dataclass(frozen=True)
class TransferBudget:
    """What every row gets: so many steps at each of the rates, of which the one counts that did best on the validation
    part. `inner` says the rest of the optimiser; its cosine runs over these steps."""

    steps: int = 300
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    inner: InnerOptimizer = field(default_factory=lambda: InnerOptimizer(warmup_steps=20))
    validation_batches: int = 5
    test_batches: int = 10
    batch_windows: int = 128


@dataclass(frozen=True)
class Column:
    """One domain. `spec` is what private parts depend on; it was fitted once, and serves every row."""

    name: str
    train: Samples
    validation: Samples
    test: Samples
    spec: PrivateSpec


@dataclass(frozen=True)
class Fitted:
    """A model after the budget's steps at a rate, and its loss on the validation part."""

    rate: float
    validation: float
    model: EncoderModel


class Prepared:
    """What is the same for every row of a column. What samples are encoded to depends on the spec alone."""

    def __init__(
        self,
        encoder_type: EncoderType,
        architecture: Architecture,
        column: Column,
        budget: TransferBudget,
        *,
        device: str = "cpu",
        precision: Precision = "float32",
        advance: Advance = lambda: None,
    ) -> None:
        self._type, self._architecture, self._device, self._advance = encoder_type, architecture, device, advance
        self._precision = precision
        self.column, self.budget = column, budget

    @cached_property
    def _any(self) -> EncoderModel:
        """One model of the column, to encode samples."""
        return self._type.build(self._architecture, self.column.spec, 0)

    @cached_property
    def _train(self) -> Any:
        return self._any.encode(self.column.train)

    @cached_property
    def _validation(self) -> Any:
        return self._any.encode(self.column.validation)

    @cached_property
    def _test(self) -> Any:
        """Not read before a model is to be tested: until then everything is chosen."""
        return self._any.encode(self.column.test)

    def best(self, row: Row, mode: Mode, seed: int) -> Fitted:
        """The model at the rate that does best on the validation part, the first of equals. Reads no test part."""
        return min((self._at(row, mode, rate, seed) for rate in self.budget.rates), key=lambda each: each.validation)

    def _at(self, row: Row, mode: Mode, rate: float, seed: int) -> Fitted:
        model = self.fitted(row, mode, rate, seed)
        return Fitted(rate, self.validated(model), model)

    def model(self, row: Row, seed: int) -> EncoderModel:
        """Fresh private parts around a row's shared tensors, which begin alike in every row of a seed. Raises
        ValueError for a row of another architecture."""
        model = self._type.build(self._architecture, self.column.spec, seed)
        fill(model.shared_parameters(), self._type.initial(self._architecture, seed) if row is None else row)
        return model.to(self._device)

    def fitted(self, row: Row, mode: Mode, rate: float, seed: int) -> EncoderModel:
        """`model` after the budget's steps; as it is if there is nothing to train."""
        model = self.model(row, seed)
        trained = None if mode == "free" else set(model.private_parameters())
        if trained == set():
            return model
        inner = self.budget.inner.model_copy(update={"lr": rate})
        trainer = Trainer(
            model, self._train, inner, seed=seed, device=self._device, precision=self._precision, trained=trained
        )
        for step in range(self.budget.steps):
            trainer.progress = step / self.budget.steps
            trainer.step()
            self._advance()
        return model

    def validated(self, model: EncoderModel) -> float:
        """Loss on the validation part; infinite for a model that diverged, so that it is never chosen."""
        loss = self._measured(model, self._validation, self.budget.validation_batches)
        return loss if math.isfinite(loss) else math.inf

    def tested(self, model: EncoderModel) -> float:
        """Loss on the test part."""
        return self._measured(model, self._test, self.budget.test_batches)

    def _measured(self, model: EncoderModel, encoded: Any, batches: int) -> float:
        return masked_loss(model, encoded, batches=batches, size=self.budget.batch_windows)
