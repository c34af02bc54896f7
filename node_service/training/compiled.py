"""The loss of a model, compiled where a node's owner asks for it (torch.compile). The model stays as it is: its
parameters, their names and their memory; what is compiled is the function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import structlog
import torch
from torch import Tensor

from common.encoders.base import Batch, EncoderModel
from common.errors import SharedEncoderError
from node_service.training.ranks import one_line
from node_service.training.together import Together

log = structlog.get_logger()


class Gradients:
    """Puts the gradients of a loss into a model's parameters, and gives the loss.

    Compiling may fail in many ways, at the first batch or at a later one of another shape; this machine may just have
    no compiler. Then there is one warning, and training goes on without.
    """

    def __init__(self, model: EncoderModel, *, compiled: bool, together: Together | None = None) -> None:
        self._model = model
        self._together = together
        self._compiled: Callable[[Batch], Tensor] | None = torch.compile(model.loss) if compiled else None

    def of(self, batches: list[tuple[Batch, float]], count: int, cast: Callable[[], torch.autocast]) -> Tensor:
        """Of batches on the model's device, each with its share in the loss, a mean over `count` positions; `cast` is
        what losses are computed in. With others together they are those of all batches of all, and so is the loss."""
        if self._together is not None:
            return self._with_others(self._together, batches, count, cast)
        if self._compiled is not None:
            try:
                return self._of(self._compiled, batches, cast)
            except SharedEncoderError:
                raise
            except Exception as error:  # whatever the compiler raises: the model says the same by itself, or works
                problem = str(error).strip().partition("\n")[0][:200]
                log.warning("the model is trained as it is: compiling it failed", problem=problem)
                self._compiled = None
                self._model.zero_grad(set_to_none=True)
        return self._of(self._model.loss, batches, cast)

    def _with_others(
        self,
        together: Together,
        batches: list[tuple[Batch, float]],
        count: int,
        cast: Callable[[], torch.autocast],
    ) -> Tensor:
        """What is compiled is not tried here: where it fails for one of the processes, the others would wait."""
        everybodys = together.wrapped(self._model, self._compiled or self._model.loss)
        ours = together.share(count)
        whole = torch.zeros((), device=together.ranks.device)
        for number, (batch, share) in enumerate(batches, 1):
            # what is added up here crosses once, with the last piece
            with one_line(), nullcontext() if number == len(batches) else everybodys.no_sync():
                with cast():
                    loss = everybodys(batch)
                loss = loss * (ours * share)
                self._model.backward(loss)
            whole += loss.detach()
        return together.ranks.summed(whole) / together.ranks.size

    def _of(
        self,
        loss_of: Callable[[Batch], Tensor],
        batches: list[tuple[Batch, float]],
        cast: Callable[[], torch.autocast],
    ) -> Tensor:
        whole: Tensor | None = None
        for batch, share in batches:
            with cast():
                loss = loss_of(batch)
            if len(batches) > 1:
                loss = loss * share
            self._model.backward(loss)
            whole = loss.detach() if whole is None else whole + loss.detach()
        assert whole is not None
        return whole
