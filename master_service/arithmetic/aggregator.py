"""The master's tensors: target parameter sets and outer optimiser state, moved by the steps that are ordered.

Works slice by slice from the payload files, so its memory is the target (plus momentum) whatever the number of updates.
The same steps give the same bits: fixed order of contributions, elementwise kernels without fused multiply-add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import SharedEncoderError
from common.numbers.encodings import decode_slice
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import EncodingName, encoded_size, slices
from master_service.arithmetic.outer import new_momentum, outer_step
from master_service.decisions.effects import Step
from master_service.log.payloads import PayloadStore

#: Elements summed at once for a norm; a fixed block and a single thread give the same sum everywhere.
_NORM_BLOCK = 1 << 16


class PayloadsLost(SharedEncoderError):
    """Payloads that a step needs are damaged or missing; `lost` holds their digests."""

    def __init__(self, lost: dict[str, str]) -> None:
        super().__init__(", ".join(f"payload {digest} is {problem}" for digest, problem in lost.items()))
        self.lost = list(lost)


@dataclass
class Target:
    """The current target parameter set of one encoder, and the outer optimiser's momentum (None without)."""

    parameters: ParameterSet
    momentum: Tensor | None = None


class Aggregator:
    """Holds a Target per encoder."""

    def __init__(self, payloads: PayloadStore) -> None:
        self._payloads = payloads
        self.targets: dict[str, Target] = {}

    def begin(self, encoder: str, layout: Layout, digest: str) -> None:
        """Load version 0 from its payload. Raises PayloadsLost."""
        if problem := self._payloads.damage(digest):
            raise PayloadsLost({digest: problem})
        self.targets[encoder] = Target(ParameterSet.from_bytes(layout, self._payloads.read(digest)))

    def step(self, step: Step) -> str:
        """Compute the next version in place; gives its digest. Raises PayloadsLost before anything is changed."""
        target = self.targets[step.encoder]
        size = target.parameters.layout.size
        problems = {each.payload: self._payloads.damage(each.payload) for each in step.contributions}
        if lost := {payload: problem for payload, problem in problems.items() if problem is not None}:
            raise PayloadsLost(lost)
        if target.momentum is None:
            target.momentum = new_momentum(size, step.outer)
        positions = [0] * len(step.contributions)
        for start, stop in slices(size):
            gradient = torch.zeros(stop - start)
            for index, contribution in enumerate(step.contributions):
                length = encoded_size(stop - start, contribution.encoding)
                body = self._payloads.read(contribution.payload, positions[index], length)
                positions[index] += length
                gradient.add_(decode_slice(body, stop - start, contribution.encoding).mul_(contribution.coefficient))
            momentum = None if target.momentum is None else target.momentum[start:stop]
            outer_step(target.parameters.vector[start:stop], gradient, momentum, step.outer)
        return target.parameters.digest()


def measure(payload: bytes, size: int, encoding: EncodingName) -> tuple[bool, float]:
    """(finite, L2 norm) of an encoded vector; (False, 0) if the payload's length does not fit."""
    total, position, view = 0.0, 0, memoryview(payload)
    for start, stop in slices(size):
        length = encoded_size(stop - start, encoding)
        try:
            values = decode_slice(view[position : position + length], stop - start, encoding).numpy()
        except ValueError:
            return False, 0.0
        position += length
        for block in range(0, len(values), _NORM_BLOCK):
            total += float(np.square(values[block : block + _NORM_BLOCK], dtype=np.float64).sum())
    finite = math.isfinite(total) and position == len(payload)
    return finite, math.sqrt(total) if finite else 0.0
