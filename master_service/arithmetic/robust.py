"""Robust rules: what a version is made of where some of the nodes may send anything.

u_k, k = 1 … n, are the distinct nodes' vectors: each the mean of the node's own weighted updates. Of at most
f ≤ (n−3)/2 of them nothing is known. With all u_k equal each of these rules gives that vector.

median: by coordinate, the mean of the two in the middle for even n (Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-
robust distributed learning: towards optimal statistical rates", definition 1).

trimmed-mean: by coordinate, the mean of what is left without the f largest and the f smallest (ibid., definition 2).

geometric-median: argmin_z Σ ‖z − u_k‖ by the smoothed Weiszfeld iteration of RFA (Pillutla, Kakade, Harchaoui 2019,
"Robust aggregation for federated learning"): z ← Σ β_k u_k / Σ β_k with β_k = 1 / max(ν, ‖z − u_k‖), from the mean on.
It is within 2(n−f)/(n−2f) times the radius of the honest ones of their centre.

centered-clip: v ← v + (1/n) Σ (u_k − v) · min(1, τ / ‖u_k − v‖) (Karimireddy, He, Jaggi 2021, "Learning from history
for Byzantine robust optimization"), from the coordinate-wise median on and not from the last version's, so that a
version follows from its own updates; τ is the median distance where no radius is set.

The first two need the vectors once, coordinate by coordinate. The points of the others are combinations Σ λ_k u_k, so
that all distances follow from the scalar products ⟨u_j, u_k⟩: one pass for these, one for the sum. Vectors come slice
by slice from the payloads, in parts that are smaller the more nodes there are: the memory does not grow with them. Sums
are over fixed blocks in fixed order, so they do not depend on the size of the parts, nor on threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.numbers.encodings import decode_slice
from common.numbers.slicing import BLOCK, encoded_size, part_ranges, slices
from master_service.decisions.effects import Contribution, Step
from master_service.decisions.rules.model import CombineRule
from master_service.log.payloads import ReadablePayloads

#: Numbers of all nodes together that are looked at at once: 16 MiB of float32.
AT_ONCE = 1 << 22
_ITERATIONS = {"geometric-median": 32, "centered-clip": 3}

Matrix = NDArray[np.float64]


def gradients(
    step: Step, payloads: ReadablePayloads, size: int, at_once: int = AT_ONCE
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, combined float32 values of shape (stop − start,)) of every slice. The payloads are whole."""
    vectors, combine = _Vectors(step.contributions, payloads, size, at_once), step.combine
    shares = None
    if combine.how in _ITERATIONS:
        with_start = combine.how == "centered-clip"
        shares = shares_of(combine, vectors.products(with_median=with_start))
    for start, stop in slices(size):
        gradient = torch.empty(stop - start)
        for begin, end, part in vectors.parts(start, stop):
            gradient[begin:end] = combined(part, combine, shares)
        yield start, stop, gradient


def combined(vectors: Tensor, combine: CombineRule, shares: Sequence[float] | None = None) -> Tensor:
    """Of the nodes' values, shape (nodes, count), those of the version, shape (count,). `shares`: see `shares_of`."""
    if combine.how == "median":
        return _median(vectors)
    if combine.how == "trimmed-mean":
        ordered, left = _ordered(vectors), len(vectors) - 2 * combine.liars
        return _sum(ordered[combine.liars : combine.liars + left], [1.0] * left).mul_(1.0 / left)
    assert shares is not None, "the others are combinations"
    return _sum(_with_median(vectors) if len(shares) > len(vectors) else vectors, shares)


def shares_of(combine: CombineRule, products: Matrix) -> list[float]:
    """The λ of the point that an iterating rule comes to, which add up to 1. `products`: ⟨u_j, u_k⟩, and for
    centred clipping those with its starting point in the last row and column."""
    iterations = combine.iterations or _ITERATIONS[combine.how]
    if combine.how == "geometric-median":
        return [float(each) for each in _geometric_median(products, iterations, combine.smoothing)]
    return [float(each) for each in _centered_clip(products, iterations, combine.radius)]


def _geometric_median(products: Matrix, iterations: int, smoothing: float) -> Matrix:
    count = len(products)
    least = smoothing * float(np.median(np.sqrt(np.diagonal(products))))
    shares = np.full(count, 1.0 / count)
    if least == 0.0:
        least = smoothing  # most have sent nothing at all
    for _ in range(iterations):
        weights = 1.0 / np.maximum(_distances(shares, products), least)
        shares = weights / weights.sum()
    return shares


def _centered_clip(products: Matrix, iterations: int, radius: float | None) -> Matrix:
    nodes = len(products) - 1
    shares = np.zeros(nodes + 1)
    shares[nodes] = 1.0
    for _ in range(iterations):
        apart = _distances(shares, products)[:nodes]
        most = float(np.median(apart)) if radius is None else radius
        kept = np.where(apart > most, most / np.where(apart > 0, apart, 1.0), 1.0)
        shares = shares * (1.0 - kept.sum() / nodes)
        shares[:nodes] += kept / nodes
    return shares


def _distances(shares: Matrix, products: Matrix) -> Matrix:
    """‖z − u_k‖ for z = Σ shares·u, from the scalar products; elementwise, so that no library's order comes in."""
    with_z = (products * shares).sum(axis=1)
    squares = (shares * with_z).sum() - 2.0 * with_z + np.diagonal(products)
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _ordered(vectors: Tensor) -> Tensor:
    """By coordinate; adding 0 makes one zero of both, whose order would be anybody's."""
    return torch.sort(vectors, dim=0, stable=True).values.add_(0.0)


def _median(vectors: Tensor) -> Tensor:
    ordered, count = _ordered(vectors), len(vectors)
    if count % 2:
        return ordered[count // 2].clone()
    return ordered[count // 2 - 1].mul(0.5).add_(ordered[count // 2].mul(0.5))  # half each: a sum could overflow


def _with_median(vectors: Tensor) -> Tensor:
    return torch.cat([vectors, _median(vectors).unsqueeze(0)])


def _sum(vectors: Tensor, shares: Sequence[float]) -> Tensor:
    """In the order of the rows; a mul and an add each, so that no kernel fuses them."""
    total = torch.zeros(vectors.shape[1])
    for row, share in zip(vectors, shares, strict=True):
        total.add_(row.mul(share))
    return total


class _Vectors:
    """The nodes' vectors, read in parts."""

    def __init__(
        self, contributions: Sequence[Contribution], payloads: ReadablePayloads, size: int, at_once: int
    ) -> None:
        """`contributions` of one part stand together."""
        self._nodes = [list(each) for _, each in groupby(contributions, key=lambda each: each.part)]
        self._payloads = payloads
        self._size = size
        self._part = max(1, at_once // len(self._nodes) // BLOCK) * BLOCK

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """(begin, end, values of shape (nodes, end − begin)) of the parts of a slice; begin and end count from its
        start."""
        for begin in range(0, max(stop - start, 1), self._part):
            end = min(begin + self._part, stop - start)
            vectors = torch.zeros(len(self._nodes), end - begin)
            for vector, contributions in zip(vectors, self._nodes, strict=True):
                for each in contributions:
                    vector.add_(self._read(each, start, stop, begin, end).mul_(each.coefficient))
            yield begin, end, vectors

    def products(self, *, with_median: bool) -> Matrix:
        """⟨u_j, u_k⟩ of all nodes, and of their coordinate-wise median as the last."""
        count = len(self._nodes) + with_median
        found = np.zeros((count, count))
        for start, stop in slices(self._size):
            for _, _, part in self.parts(start, stop):
                _add_products(found, _with_median(part) if with_median else part)
        return found

    def _read(self, each: Contribution, start: int, stop: int, begin: int, end: int) -> Tensor:
        # all slices before this one are whole
        before = encoded_size(start, each.encoding)
        pieces = [
            self._payloads.read(each.payload, before + offset, length)
            for offset, length in part_ranges(stop - start, each.encoding, begin, end)
        ]
        return decode_slice(b"".join(pieces), end - begin, each.encoding)


def _add_products(found: Matrix, part: Tensor) -> None:
    """Add a part's scalar products: exact products of float32, summed by blocks, and block after block."""
    count = part.shape[1]
    blocks = -(-count // BLOCK)
    rows = np.zeros((len(part), blocks * BLOCK))
    rows[:, :count] = part.numpy()
    for one, row in enumerate(rows):
        for other in range(one, len(rows)):
            sums = (row * rows[other]).reshape(blocks, BLOCK).sum(axis=1)
            total = np.cumsum(np.concatenate([found[one, other : other + 1], sums]))[-1]
            found[one, other] = found[other, one] = total
