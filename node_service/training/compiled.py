"""The loss of a model, compiled where that helps (torch.compile). The model stays as it is: its parameters, their names
and their memory; what is compiled is the function."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import structlog
import torch
from torch import Tensor

from common.encoders.base import Batch, EncoderModel
from common.errors import SharedEncoderError
from node_service.config import Compile

log = structlog.get_logger()


def compiles(wanted: Compile, device: str) -> bool:
    """Whether a model is to be compiled on this device. By itself only on a GPU, and if torch brought what compiles for
    it: on two cores half a minute of compiling is hardly ever earned back."""
    if wanted != "auto":
        return wanted
    return torch.device(device).type == "cuda" and find_spec("triton") is not None


class Gradients:
    """Puts the gradients of a loss into a model's parameters, and gives the loss.

    Compiling may fail in many ways, at the first batch or at a later one of another shape; this machine may just have
    no compiler. Then there is one warning, and training goes on without.
    """

    def __init__(self, model: EncoderModel, *, compiled: bool) -> None:
        self._model = model
        self._compiled: Callable[[Batch], Tensor] | None = torch.compile(model.loss) if compiled else None

    def of(self, batches: list[tuple[Batch, float]], cast: Callable[[], torch.autocast]) -> Tensor:
        """Of batches on the model's device, each with its share in the loss; `cast` is what losses are computed in."""
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
