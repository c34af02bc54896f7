"""Training one encoder on one node: private encoder + shared encoder + private decoder together, step by step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.encoders.base import Batch, EncoderModel
from common.errors import UserError
from common.numbers.parameters import ParameterSet
from common.wire.update_rule import InnerOptimizer
from node_service.config import Precision
from node_service.training.ahead import Ahead
from node_service.training.compiled import Gradients
from node_service.training.held_out import masked_loss
from node_service.training.pieces import in_pieces
from node_service.training.shared_vector import SharedVector
from node_service.training.together import Together

#: Batches of a measurement: a forward pass is about a third of a training step, so it takes about as long as five.
_MEASURED_BATCHES = 15


class Trainer:
    """A model, its encoded corpus and the inner optimiser (AdamW). Deterministic given seed, device and threads.

    `trained`: the names of the model's parameters that are trained (None: all); the others stay as they are.
    `precision` bfloat16: the loss and its gradients are computed by autocast (Micikevicius et al. 2018, without a loss
    scale, which bfloat16's range makes needless); what is kept, sent and measured is float32. `compiled`: the loss is
    (see `compiled`). `micro_batch`: at most so many samples of a batch go through the model at once (None: all); the
    gradient is that of the whole batch, up to rounding. `together`: other processes train the same model, and this
    one's steps are theirs.
    """

    def __init__(
        self,
        model: EncoderModel,
        encoded: Any,
        inner: InnerOptimizer,
        *,
        seed: int,
        device: str,
        precision: Precision = "float32",
        compiled: bool = False,
        micro_batch: int | None = None,
        trained: Collection[str] | None = None,
        together: Together | None = None,
    ) -> None:
        self.model = model.to(device)
        self.encoded = encoded
        self.steps = 0
        self.progress = 0.0
        self._vector = SharedVector(self.model)
        self.layout = self._vector.layout
        named = dict(model.named_parameters())
        self._all = [parameter for name, parameter in named.items() if trained is None or name in trained]
        self._frozen = [named[name] for name in named if trained is not None and name not in trained]
        self._device = device
        self._on_gpu = torch.device(device).type == "cuda"
        self._ahead = Ahead(device)
        self._micro_batch = micro_batch
        self._together = together
        self._gradients = Gradients(model, compiled=compiled, together=together)
        self._generator = torch.Generator().manual_seed(seed)
        self._drops = any(getattr(module, "p", 0) for module in model.modules() if "Dropout" in type(module).__name__)
        self._cast = partial(
            torch.autocast, torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bfloat16"
        )
        self.set_inner(inner)

    def set_inner(self, inner: InnerOptimizer) -> None:
        """Take another inner rule; the optimiser's moments stay."""
        before = getattr(self, "optimizer", None)
        self.inner = inner
        self.changed()
        self.optimizer = self.optimizer_for(self._all)
        if before is not None:
            self.optimizer.state.update(before.state)

    def optimizer_for(self, parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
        """AdamW by the inner rule; norms and biases are not decayed, as in the recipes of BERT and ViT."""
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        decay = self.inner.weight_decay
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.inner.lr,
            betas=self.inner.betas,
            # one pass over each tensor, not a dozen: a quarter of the time at 23 million parameters on one core
            fused=True,
        )

    def reset_optimizer(self) -> None:
        """Forget the moments."""
        self.changed()
        self.optimizer.state.clear()

    @property
    def warm_up(self) -> float:
        """The share of the rate that the next step has by the linear warm-up over this trainer's steps, 0 to 1."""
        return min(1.0, (self.steps + 1) / self.inner.warmup_steps) if self.inner.warmup_steps else 1.0

    def learning_rate(self) -> float:
        """Linear warm-up over this node's steps, then a cosine over the announced progress (Loshchilov & Hutter)."""
        inner, warm = self.inner, self.warm_up
        if inner.schedule == "constant":
            return inner.lr * warm
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, self.progress)))
        return inner.lr * warm * (inner.final_fraction + (1.0 - inner.final_fraction) * cosine)

    def step(self, rate: float | None = None) -> list[float]:
        """One optimiser step at this learning rate, or at the one that the progress says.

        Gives the losses that are known since the last call, in order: that of this step, or on a GPU, which takes it
        while the next is launched, that of an earlier one. `settle` gives the rest.
        """
        rate = self.learning_rate() if rate is None else rate
        if self._together is not None:
            self._together.begin(self, rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._without_frozen(), self._seeded():
            pieces, count = self._drawn()
            loss = self._gradients.of(pieces, count, self._cast)
        torch.nn.utils.clip_grad_norm_(self._all, self.inner.gradient_clip)
        self.optimizer.step()
        self.steps += 1
        return self._ahead.begun(loss)

    def settle(self) -> list[float]:
        """Wait until every step that was begun is taken; gives the losses that `step` has not."""
        return self._ahead.settle()

    def held_out_loss(self, encoded: Any) -> float:
        """The masked loss on `encoded` samples; the same ones, masked alike, at every call under one batch size."""
        batches, size = _MEASURED_BATCHES, self.inner.batch_size
        return masked_loss(self.model, encoded, batches=batches, size=size)

    def _drawn(self) -> tuple[list[tuple[Batch, float]], int]:
        """The next batch in pieces, each with its share in the loss, which is a mean over so many positions (0 where
        nobody asks)."""
        batch = self.model.batch(self.encoded, self.inner.batch_size, self._generator)
        pieces = in_pieces(self.model, batch, self.inner.batch_size, self._micro_batch)
        count = self.model.counted(batch) if self._together is not None else 0
        return [(self._placed(self.model.prepared(piece)), share) for piece, share in pieces], count

    def _placed(self, batch: Batch) -> Batch:
        if not self._on_gpu:
            return {name: tensor.to(self._device) for name, tensor in batch.items()}
        # from pinned memory a GPU reads by itself, and nobody waits for it
        return {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in batch.items()}

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Inside, what a model with dropout leaves out follows from this trainer's generator, as its batches do: torch
        has no other generator for that than the process's own."""
        if not self._drops:
            yield
            return
        from common.encoders.hugging_face import seeded  # imports transformers, whose models alone drop anything here

        with seeded(int(torch.randint(1 << 62, (), generator=self._generator))):
            yield

    @contextmanager
    def _without_frozen(self) -> Iterator[None]:
        """Inside, no gradient is computed for what stays as it is; outside, the model is as it was given."""
        kept = [parameter for parameter in self._frozen if parameter.requires_grad]
        try:
            for parameter in kept:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in kept:
                parameter.requires_grad_(True)

    def vector(self) -> Tensor:
        """The shared parameters, float32 of shape (layout.size,), on the model's device. What is written to it counts
        once it was given to `set_shared`; it may be the model's own memory, or a copy that the next call replaces."""
        return self._vector.read()

    def shared(self) -> ParameterSet:
        """A copy of the shared parameters, on the CPU."""
        return ParameterSet(self.layout, self.vector().to("cpu", copy=True))

    def set_shared(self, vector: Tensor) -> None:
        """Replace the shared parameters; private ones and the optimiser's state stay."""
        self._vector.write(vector)
        self.changed(everything=False)

    def changed(self, *, everything: bool = True) -> None:
        """The shared parameters, or anything else of the model, were changed by something else than a step."""
        if self._together is not None:
            self._together.changed(everything=everything)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the parameters: optimiser moments, generator, step count; tensors only, and
        not copied."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        found = {"generator": self._generator.get_state(), "steps": torch.tensor(self.steps)}
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                found[f"optimizer/{key}/{names[id(parameter)]}"] = torch.as_tensor(value).detach()
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` gave. Raises UserError if it is of another model."""
        self._generator.set_state(state["generator"])
        self.steps = int(state["steps"])
        self.load_moments(state)

    def go_on_from(self, steps: int, seed: int) -> None:
        """As if so many steps had been taken; batches follow from this seed."""
        self.steps = steps
        self._generator.manual_seed(seed)

    def load_moments(self, state: dict[str, Tensor]) -> None:
        """The optimiser's moments out of a state. Raises UserError if it is of another model."""
        parameters = dict(self.model.named_parameters())
        self.changed()
        for key, value in state.items():
            if not key.startswith("optimizer/"):
                continue
            _, moment, name = key.split("/", 2)
            if name not in parameters:
                raise UserError(
                    f"the node's checkpoint is of another model: it has {name!r}; remove its state directory"
                )
            # the count of steps too: the fused optimiser reads it where it computes
            self.optimizer.state[parameters[name]][moment] = value.to(self._device)


def choose_device(wanted: str) -> str:
    """`auto` takes a GPU where there is one. Raises UserError for a device that is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {wanted!r} cannot be used: {str(error).splitlines()[0]}; try --device cpu") from None
    return wanted
