"""The master's tensors: target parameter sets and outer optimiser state, moved by the steps that are ordered.

Works slice by slice from the payload files, so its memory is the target (plus momentum) whatever the number of updates.
The same steps give the same bits: fixed order of contributions, elementwise kernels without fused multiply-add.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Self

from torch import Tensor

from common.numbers.compiled import add_slice, kernels
from common.numbers.encodings import encoded_slices
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import SLICE, EncodingName, encoded_size, slices
from master_service.arithmetic import robust
from master_service.arithmetic.arithmetic import Encoded, Outcome, PayloadsLost, Stepped
from master_service.arithmetic.export import export_encoder
from master_service.arithmetic.generation import fingerprint, generated
from master_service.arithmetic.measuring import Measurement, scratch, squares_of
from master_service.arithmetic.outer import new_momentum, outer_step
from master_service.decisions.effects import Generate, Step
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState
from master_service.log.payloads import Payloads


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
        self._still = Lock()
        #: Kept, because fresh memory costs more than what is done in it: a sum, and what is added to it.
        self._sum, self._room = scratch(), scratch()

    def begin(self, encoder: str, layout: Layout, digest: str) -> None:
        if problem := self._payloads.damage(digest):
            raise PayloadsLost({digest: problem})
        self.targets[encoder] = Target(ParameterSet.from_bytes(layout, self._payloads.read(digest)))

    def hold(self) -> Callable[[], None]:
        """No step changes a target until what this gives is called, once, from whatever thread."""
        self._still.acquire()
        return self._still.release

    def step(self, step: Step) -> Stepped:
        with self._still:
            return self._step(step)

    def _step(self, step: Step) -> Stepped:
        target = self.targets[step.encoder]
        size = target.parameters.layout.size
        problems = {each.payload: self._payloads.damage(each.payload, again=False) for each in step.contributions}
        if lost := {payload: problem for payload, problem in problems.items() if problem is not None}:
            raise PayloadsLost(lost)
        if target.momentum is None:
            target.momentum = new_momentum(size, step.outer)
        total, vector = 0.0, target.parameters.vector
        gradients = robust.gradients if step.combine.robust else self._means
        with _Digest(size) as digest:
            for start, stop, gradient in gradients(step, self._payloads, size):
                for squares in squares_of(gradient.numpy()):
                    total += squares
                momentum = None if target.momentum is None else target.momentum[start:stop]
                outer_step(vector[start:stop], gradient, momentum, step.outer)
                digest.add(vector[start:stop].numpy().data)
        return Stepped(digest.hexdigest(), math.sqrt(total))

    def _means(self, step: Step, payloads: Payloads, size: int) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, Σ coefficient·Δ) of every slice; the next one is written over it."""
        body, loops = bytearray(), kernels(self._sum.device, size)
        for start, stop in slices(size):
            gradient = self._sum[: stop - start].zero_()
            for contribution in step.contributions:
                if len(body) != (length := encoded_size(stop - start, contribution.encoding)):
                    body = bytearray(length)
                # all slices before this one are whole
                payloads.read_into(contribution.payload, encoded_size(start, contribution.encoding), body)
                add_slice(gradient, body, contribution.encoding, contribution.coefficient, self._room, loops)
            yield start, stop, gradient

    def digest(self, encoder: str) -> str:
        return self.targets[encoder].parameters.digest()

    def measurement(self, size: int, encoding: EncodingName) -> Measurement:
        return Measurement(size, encoding, self._room)

    def generated(self, effect: Generate) -> list[Outcome]:
        return generated(effect)

    def encoded(self, encoder: str, encoding: EncodingName) -> Encoded:
        bodies, vector = [], self.targets[encoder].parameters.vector
        with _Digest(vector.numel()) as digest:
            for body in encoded_slices(vector, encoding):
                digest.add(body)
                bodies.append(body)
        return Encoded(bodies, digest.hexdigest())

    def export(self, directory: Path, encoder: EncoderState, settings: Settings) -> None:
        export_encoder(directory, encoder, settings, self.targets[encoder.encoder].parameters, self._payloads)

    def fingerprint(self) -> dict[str, str]:
        return fingerprint()


class _Digest:
    """sha256 of slices that are added in order; of a vector of several, beside whatever goes on. A context manager:
    `hexdigest` after it."""

    def __init__(self, size: int) -> None:
        self._sha256 = hashlib.sha256()
        self._beside = ThreadPoolExecutor(1) if size > SLICE else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._beside is not None:
            self._beside.shutdown()

    def add(self, body: memoryview | bytes) -> None:
        """The slice that comes next."""
        if self._beside is None:
            self._sha256.update(body)
        else:
            self._beside.submit(self._sha256.update, body)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()
