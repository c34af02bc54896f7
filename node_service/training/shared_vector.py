"""A model's shared parameters as one vector: its own memory where that is possible, so that nothing needs to be copied
to read what was trained, or to move it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from common.encoders.base import EncoderModel
from common.numbers.layout import Layout


class SharedVector:
    """The vector of the shared parameters of a model, in their order, on the device that the model is on by now.

    Each parameter becomes a view of it, if all of them are contiguous float32 on one device and share their memory with
    nothing else. What is tied stays tied, because the parameters themselves are the same objects as before; optimisers
    and `load_state_dict` see no difference. Otherwise (two names for one parameter, another dtype) the vector is a
    copy.
    """

    def __init__(self, model: EncoderModel) -> None:
        self._parameters = list(model.shared_parameters().values())
        self.layout = Layout((name, part.shape) for name, part in model.shared_parameters().items())
        self._entries = list(self.layout)
        self._views = _may_be_views(model, self._parameters)
        self._vector = torch.empty(0)
        if self._views:
            self._become_views()

    def read(self) -> Tensor:
        """Float32 of shape (layout.size,): the parameters' own memory, or else a copy that the next call replaces."""
        if not self._views:
            if self._vector.numel() != self.layout.size:
                self._vector = torch.empty(self.layout.size, device=_device(self._parameters))
            self._gather()
        elif not self._is_live():
            self._become_views()  # somebody has given parameters other memory
        return self._vector

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Set the parameters to a float32 vector of shape (layout.size,), of any device. Raises ValueError for another
        shape or dtype."""
        if vector.dtype != torch.float32 or vector.shape != (self.layout.size,):
            size, came = self.layout.size, f"{vector.dtype} {tuple(vector.shape)}"
            raise ValueError(f"a float32 vector of {size} elements was expected, {came} came")
        if self._views:
            if (mine := self.read()) is not vector:
                mine.copy_(vector)
            return
        for parameter, entry in zip(self._parameters, self._entries, strict=True):
            parameter.copy_(vector[entry.offset : entry.offset + entry.count].view(entry.shape))

    def _become_views(self) -> None:
        self._vector = torch.empty(self.layout.size, device=_device(self._parameters))
        self._gather()
        for parameter, entry in zip(self._parameters, self._entries, strict=True):
            parameter.data = self._vector[entry.offset : entry.offset + entry.count].view(entry.shape)

    @torch.no_grad()
    def _gather(self) -> None:
        for parameter, entry in zip(self._parameters, self._entries, strict=True):
            self._vector[entry.offset : entry.offset + entry.count].view(entry.shape).copy_(parameter)

    def _is_live(self) -> bool:
        start = self._vector.data_ptr()
        return all(
            parameter.data_ptr() == start + 4 * entry.offset or entry.count == 0
            for parameter, entry in zip(self._parameters, self._entries, strict=True)
        )


def _device(parameters: list[nn.Parameter]) -> torch.device:
    return parameters[0].device if parameters else torch.device("cpu")


def _may_be_views(model: nn.Module, parameters: list[nn.Parameter]) -> bool:
    """Whether each parameter can have its place in one vector, and nobody else loses sight of it by that."""
    if not parameters or len({id(each) for each in parameters}) < len(parameters):
        return False
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    if any(id(each) not in tensors for each in parameters):
        return False  # what the model says is shared is not what it computes with
    users = Counter(each.untyped_storage().data_ptr() for each in tensors.values() if each.numel())
    return len({each.device for each in parameters}) == 1 and all(
        each.dtype == torch.float32
        and each.layout == torch.strided
        and each.is_contiguous()
        and (each.numel() == 0 or users[each.untyped_storage().data_ptr()] == 1)
        for each in parameters
    )
