"""The master's tensors: target parameter sets and outer optimiser state, moved by the steps that are ordered.

Works slice by slice from the payload files, so its memory is the target (plus momentum) whatever the number of updates.
The same steps give the same bits: fixed order of contributions, elementwise kernels without fused multiply-add.
"""

from __future__ import annotations

import hashlib
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
from common.numbers.slicing import SLICE, EncodingName, encoded_size, shard_slices, slice_count, slices
from common.wire.transfer import combined
from master_service.arithmetic import robust
from master_service.arithmetic.arithmetic import Encoded, Outcome, PayloadsLost, Stepped
from master_service.arithmetic.export import export_encoder
from master_service.arithmetic.generation import fingerprint, generated
from master_service.arithmetic.measuring import Measurement, norm_of, scratch, squares_of
from master_service.arithmetic.outer import new_momentum, outer_step
from master_service.decisions.effects import Generate, Step
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState
from master_service.log.payloads import Payloads, ReadablePayloads


@dataclass
class Target:
    """The current target parameter set of one encoder, and the outer optimiser's momentum (None without)."""

    parameters: ParameterSet
    momentum: Tensor | None = None


class Aggregator:
    """The Arithmetic of a real master: holds a Target per encoder."""

    elsewhere = False

    def __init__(self, payloads: Payloads, updates: ReadablePayloads | None = None) -> None:
        """`updates`: where those of updates are, if not with the others."""
        self._payloads = payloads
        self._updates = updates or payloads
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
        problems = {each.payload: self._updates.damage(each.payload, again=False) for each in step.contributions}
        if lost := {payload: problem for payload, problem in problems.items() if problem is not None}:
            raise PayloadsLost(lost)
        if target.momentum is None:
            target.momentum = new_momentum(size, step.outer)
        squares: list[float] = []
        vector = target.parameters.vector
        gradients = robust.gradients if step.combine.robust else self._means
        with _Digest(size, step.shards) as digest:
            for start, stop, gradient in gradients(step, self._updates, size):
                squares += squares_of(gradient.numpy())
                momentum = None if target.momentum is None else target.momentum[start:stop]
                outer_step(vector[start:stop], gradient, momentum, step.outer)
                digest.add(vector[start:stop].numpy().data)
        return Stepped(digest.hexdigest(), norm_of(squares), squares)

    def _means(self, step: Step, payloads: ReadablePayloads, size: int) -> Iterator[tuple[int, int, Tensor]]:
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
    """sha256 of slices that are added in order, `combined` of several shards' parts; of a vector of several slices,
    beside whatever goes on. A context manager: `hexdigest` after it."""

    def __init__(self, size: int, shards: int = 1) -> None:
        parts = shard_slices(slice_count(size), shards)
        self._parts = [hashlib.sha256() for _ in parts]
        self._next = (sha256 for part, sha256 in zip(parts, self._parts, strict=True) for _ in part)
        self._beside = ThreadPoolExecutor(1) if size > SLICE else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._beside is not None:
            self._beside.shutdown()

    def add(self, body: memoryview | bytes) -> None:
        """The slice that comes next."""
        sha256 = next(self._next)
        if self._beside is None:
            sha256.update(body)
        else:
            self._beside.submit(sha256.update, body)

    def hexdigest(self) -> str:
        return combined([sha256.hexdigest() for sha256 in self._parts])
