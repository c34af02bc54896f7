"""What the compiled loops give is what torch gives, bit for bit; and torch does it where they are not."""

from __future__ import annotations

import sys
from typing import Any, get_args

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import common.numbers
from common.numbers import compiled
from common.numbers.compiled import LEAST, add_slice, kernels
from common.numbers.encodings import EncodedVector, decode_slice, encode_slice, encode_vector
from common.numbers.feedback import ErrorFeedback
from common.numbers.slicing import BLOCK, BLOCKS, SLICE, EncodingName, block_count, encoded_size

ENCODINGS: tuple[EncodingName, ...] = get_args(EncodingName)
COUNT = 2 * BLOCK + 9
CPU = torch.device("cpu")
#: Every pattern of bits: numbers that are not finite, subnormal ones and both zeros among them.
ANY = hnp.arrays(np.uint32, COUNT, elements=st.integers(0, 2**32 - 1))
USUAL = hnp.arrays(np.float32, COUNT, elements=st.floats(-10.0, 10.0, width=32))
VECTOR = st.one_of(USUAL, ANY).map(lambda values: torch.from_numpy(values.view(np.float32).copy()))


def bits(values: Tensor) -> bytes:
    """Whatever is no number counts as the same."""
    return torch.where(values.isnan(), torch.tensor(float("nan")), values).numpy().tobytes()


def numbers(body: bytes, encoding: EncodingName) -> bytes:
    """An encoded slice, whatever is no number in it made the same."""
    if encoding not in BLOCKS:
        return bits(decode_slice(body, COUNT, encoding))
    cut = 4 * block_count(COUNT, encoding)
    return bits(torch.from_numpy(np.frombuffer(body[:cut], np.float32).copy())) + body[cut:]


@settings(max_examples=100, deadline=None)
@given(VECTOR, VECTOR, VECTOR, st.sampled_from(ENCODINGS), st.sampled_from([None, *ENCODINGS]), st.booleans())
@example(torch.full((COUNT,), 190e-45), torch.zeros(COUNT), torch.zeros(COUNT), "int8", None, True)
@example(torch.full((COUNT,), 10e-45), torch.zeros(COUNT), torch.zeros(COUNT), "int4", None, True)
@example(torch.full((COUNT,), -0.0), torch.zeros(COUNT), torch.zeros(COUNT), "float32", None, False)
def test_handing_in(
    before: Tensor, local: Tensor, residual: Tensor, encoding: EncodingName, came_as: EncodingName | None, lost: bool
) -> None:
    point = before if came_as is None else EncodedVector([encode_slice(before, came_as)], COUNT, came_as)
    found: list[tuple[Any, ...]] = []
    for compiled_one in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "LEAST", 0 if compiled_one else 2 * COUNT)
            carrier, after = ErrorFeedback(), torch.empty(COUNT)
            carrier.residual = residual.clone() if lost else None
            [body], _ = carrier.encode(point, local, after, encoding)
            assert bits(after) == bits(local)
            found.append((numbers(body, encoding), None if carrier.residual is None else bits(carrier.residual)))
    assert found[0] == found[1]


@settings(max_examples=60, deadline=None)
@given(VECTOR, VECTOR, st.sampled_from(ENCODINGS), st.floats(-3.0, 3.0), st.booleans())
def test_adding_a_slice(
    total: Tensor, values: Tensor, encoding: EncodingName, coefficient: float, hostile: bool
) -> None:
    body, room = encode_slice(values, encoding), torch.empty(COUNT)
    if hostile:
        # steps that are never written among them, and something in the half byte that no element has
        cut = 4 * block_count(COUNT, encoding) if encoding in BLOCKS else 0
        body = body[:cut] + np.random.default_rng(cut).bytes(encoded_size(COUNT, encoding) - cut)
    for loops in (kernels(CPU, LEAST), None):
        add_slice(ours := total.clone(), body, encoding, coefficient, room, loops)
        assert bits(ours) == bits(total + decode_slice(body, COUNT, encoding).mul_(coefficient))
        with pytest.raises(ValueError, match="bytes were expected"):
            add_slice(ours, body[:-1], encoding, coefficient, room, loops)


def test_several_slices() -> None:
    size = SLICE + BLOCK + 3
    before, local = torch.arange(size).float().sin_(), torch.arange(size).float().cos_()
    found = []
    for patched in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "LEAST", 2 * size if patched else 0)
            carrier, after = ErrorFeedback(), torch.empty(size)
            for _ in range(2):
                point = EncodedVector(encode_vector(before, "bfloat16"), size, "bfloat16")
                bodies, _ = carrier.encode(point, local, after, "int8")
            assert carrier.residual is not None
            found.append((bodies, bits(carrier.residual), bits(after)))
    assert found[0] == found[1]


def test_where_numba_is_missing_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels(CPU, LEAST) is not None
    assert kernels(CPU, LEAST - 1) is kernels(torch.device("meta"), LEAST) is None
    compiled._imported.cache_clear()  # private: what was imported is kept for good
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "common.numbers.kernels")
    monkeypatch.delattr(common.numbers, "kernels")
    try:
        assert kernels(CPU, LEAST) is None
    finally:
        compiled._imported.cache_clear()  # private: as above
