"""Layouts, parameter sets and encodings."""

from __future__ import annotations

from typing import get_args

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numbers.encodings import decode_vector, encode_vector
from common.numbers.feedback import ErrorFeedback
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import BLOCK, SLICE, EncodingName, payload_size, slice_count

BASE = [("a", (2, 3)), ("b", (4,)), ("c", ())]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (BASE, None),
        ([("a", (2, 3)), ("b", (5,)), ("c", ())], "'b' has shape [5] instead of [4]"),
        ([("a", (2, 3)), ("x", (4,)), ("c", ())], "'x' stands where 'b' belongs"),
        (BASE[:2], "'c' [] is missing"),
        ([*BASE, ("d", (1,))], "'d' [1] is too many"),
    ],
)
def test_a_difference_names_the_first_tensor(other: list[tuple[str, tuple[int, ...]]], words: str | None) -> None:
    difference = Layout(BASE).difference(Layout(other))
    assert difference == words if words is None else words in str(difference)
    assert (Layout(BASE).digest == Layout(other).digest) == (words is None)


def test_gather_and_scatter_are_inverse_and_any_bit_changes_the_digest() -> None:
    tensors = {"w": torch.randn(3, 4), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "b": torch.randn(5)}
    made = ParameterSet.from_tensors(tensors)
    back = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    made.scatter(back)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    again = ParameterSet.from_bytes(made.layout, made.to_bytes())
    assert again.digest() == made.digest()
    again.vector.view(torch.int32)[3] ^= 1
    assert again.digest() != made.digest()
    with pytest.raises(ValueError, match="bytes were expected"):
        ParameterSet.from_bytes(made.layout, b"123")
    with pytest.raises(ValueError, match="float32 vector of 18 elements"):
        ParameterSet(made.layout, torch.zeros(17))


VECTORS = hnp.arrays(
    np.float32,
    st.integers(0, 3 * BLOCK),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)


@settings(max_examples=100, deadline=None)
@given(VECTORS)
def test_encodings_lose_no_more_than_they_promise(values: np.ndarray) -> None:
    vector = torch.from_numpy(values.copy())
    for encoding in get_args(EncodingName):
        payload = b"".join(encode_vector(vector, encoding))
        assert len(payload) == payload_size(len(values), encoding)
        back = decode_vector(payload, len(values), encoding).double()
        lost = (back - vector.double()).abs()
        if encoding == "float32":
            assert lost.eq(0).all()
        elif encoding == "bfloat16":
            assert (lost <= vector.double().abs() * 2.0**-8).all()
        else:
            block, largest = {"int8": (256, 127), "int4": (128, 7)}[encoding]
            for start in range(0, len(values), block):
                step = vector[start : start + block].abs().max().double() / largest
                assert (lost[start : start + block] <= step * 0.5001 + 1e-37).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("encoding", get_args(EncodingName))
def test_what_is_not_finite_stays_so(bad: float, encoding: EncodingName) -> None:
    vector = torch.ones(BLOCK + 1)
    vector[3] = bad
    back = decode_vector(b"".join(encode_vector(vector, encoding)), len(vector), encoding)
    assert not back.isfinite().all() and back[BLOCK] == 1.0


@pytest.mark.parametrize("size", [SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + BLOCK + 3])
@pytest.mark.parametrize(("encoding", "steps"), [("int8", 127), ("int4", 7)])
def test_slices_around_their_border(size: int, encoding: EncodingName, steps: int) -> None:
    vector = torch.arange(size, dtype=torch.float32).sin_()
    bodies = encode_vector(vector, encoding)
    assert len(bodies) == slice_count(size)
    assert sum(map(len, bodies)) == payload_size(size, encoding)
    assert torch.allclose(decode_vector(b"".join(bodies), size, encoding), vector, atol=0.5 / steps + 1e-6)
    with pytest.raises(ValueError):
        decode_vector(b"".join(bodies)[:-1], size, encoding)
    with pytest.raises(ValueError):
        decode_vector(b"".join(bodies) + b"x", size, encoding)


@pytest.mark.parametrize(("encoding", "steps"), [("int8", 127), ("int4", 7)])
def test_error_feedback_loses_nothing_over_time_and_takes_back_what_was_refused(
    encoding: EncodingName, steps: int
) -> None:
    torch.manual_seed(0)
    feedback, applied, wanted = ErrorFeedback(), torch.zeros(1000), torch.zeros(1000)
    for step in range(50):
        update = torch.randn(1000) * 10.0 ** (step % 5 - 4)
        bodies, left = feedback.encode(update, torch.zeros(1000), torch.empty(1000), encoding)
        if step % 7 == 3:
            feedback.refused(left)
            continue
        wanted += update
        applied += decode_vector(b"".join(bodies), 1000, encoding)
        # what was applied is what was wanted, but for the residual that the next update carries
        assert feedback.residual is not None
        assert torch.allclose(applied + feedback.residual, wanted, atol=1e-4)
    assert feedback.residual is not None and feedback.residual.abs().max() < 5 * 0.5 / steps
