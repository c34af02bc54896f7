"""The master's tensors: target parameter sets and outer optimiser state, moved by the steps that are ordered.

Works slice by slice from the payload files, so its memory is the target (plus momentum) whatever the number of updates.
The same steps give the same bits: fixed order of contributions, elementwise kernels without fused multiply-add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.numbers.encodings import decode_slice, encode_vector
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import EncodingName, encoded_size, slices
from master_service.arithmetic import robust
from master_service.arithmetic.arithmetic import Outcome, PayloadsLost, Stepped
from master_service.arithmetic.export import export_encoder
from master_service.arithmetic.generation import fingerprint, generated
from master_service.arithmetic.outer import new_momentum, outer_step
from master_service.decisions.effects import Generate, Step
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState
from master_service.log.payloads import Payloads

#: Elements summed at once for a norm; a fixed block and a single thread give the same sum everywhere.
_NORM_BLOCK = 1 << 16


@dataclass
class Target:
    """The current target parameter set of one encoder, and the outer optimiser's momentum (None without)."""

    parameters: ParameterSet
    momentum: Tensor | None = None


class Aggregator:
    """The Arithmetic of a real master: holds a Target per encoder."""

    def __init__(self, payloads: Payloads) -> None:
        self._payloads = payloads
        self.targets: dict[str, Target] = {}

    def begin(self, encoder: str, layout: Layout, digest: str) -> None:
        if problem := self._payloads.damage(digest):
            raise PayloadsLost({digest: problem})
        self.targets[encoder] = Target(ParameterSet.from_bytes(layout, self._payloads.read(digest)))

    def step(self, step: Step) -> Stepped:
        target = self.targets[step.encoder]
        size = target.parameters.layout.size
        problems = {each.payload: self._payloads.damage(each.payload) for each in step.contributions}
        if lost := {payload: problem for payload, problem in problems.items() if problem is not None}:
            raise PayloadsLost(lost)
        if target.momentum is None:
            target.momentum = new_momentum(size, step.outer)
        total = 0.0
        gradients = robust.gradients if step.combine.robust else self._means
        for start, stop, gradient in gradients(step, self._payloads, size):
            for squares in _squares(gradient.numpy()):
                total += squares
            momentum = None if target.momentum is None else target.momentum[start:stop]
            outer_step(target.parameters.vector[start:stop], gradient, momentum, step.outer)
        return Stepped(target.parameters.digest(), math.sqrt(total))

    @staticmethod
    def _means(step: Step, payloads: Payloads, size: int) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, Σ coefficient·Δ) of every slice."""
        positions = [0] * len(step.contributions)
        for start, stop in slices(size):
            gradient = torch.zeros(stop - start)
            for index, contribution in enumerate(step.contributions):
                length = encoded_size(stop - start, contribution.encoding)
                body = payloads.read(contribution.payload, positions[index], length)
                positions[index] += length
                gradient.add_(decode_slice(body, stop - start, contribution.encoding).mul_(contribution.coefficient))
            yield start, stop, gradient

    def digest(self, encoder: str) -> str:
        return self.targets[encoder].parameters.digest()

    def measure(self, payload: bytes, size: int, encoding: EncodingName) -> tuple[bool, float]:
        return measure(payload, size, encoding)

    def generated(self, effect: Generate) -> list[Outcome]:
        return generated(effect)

    def encoded(self, encoder: str, encoding: EncodingName) -> list[bytes]:
        return encode_vector(self.targets[encoder].parameters.vector, encoding)

    def export(self, directory: Path, encoder: EncoderState, settings: Settings) -> None:
        export_encoder(directory, encoder, settings, self.targets[encoder.encoder].parameters, self._payloads)

    def fingerprint(self) -> dict[str, str]:
        return fingerprint()


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
        for squares in _squares(values):
            total += squares
    finite = math.isfinite(total) and position == len(payload)
    return finite, math.sqrt(total) if finite else 0.0


def _squares(values: NDArray[np.float32]) -> Iterator[float]:
    """The sums of squares of fixed blocks, to be added in order: the same whatever the number of threads."""
    for start in range(0, len(values), _NORM_BLOCK):
        yield float(np.square(values[start : start + _NORM_BLOCK], dtype=np.float64).sum())
