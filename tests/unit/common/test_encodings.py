"""Encoding and decoding in place and piece by piece gives the very bits that whole-slice arithmetic gave."""

from __future__ import annotations

import math
from typing import Any, get_args

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.numbers import encodings
from common.numbers.encodings import (
    EncodedVector,
    decode_into,
    decode_slice,
    decode_vector,
    encode_slice,
    encode_vector,
    is_finite,
    squares_of_slice,
)
from common.numbers.slicing import BLOCK, BLOCKS, SLICE, EncodingName, block_count, slices

ENCODINGS: tuple[EncodingName, ...] = get_args(EncodingName)


def plainly_encoded(values: Tensor, encoding: EncodingName) -> bytes:
    """As releases did it whose logs are to lead to the same bits: a slice at once, each step into new memory."""
    if encoding == "float32":
        return values.contiguous().numpy().tobytes()
    if encoding == "bfloat16":
        return values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    count, block, largest = values.numel(), BLOCKS[encoding], {"int8": 127, "int4": 7}[encoding]
    blocks = torch.zeros(block_count(count, encoding) * block)
    blocks[:count] = values
    blocks = blocks.view(-1, block)
    scales = blocks.abs().amax(dim=1, keepdim=True).div_(float(largest))
    steps = blocks.div_(torch.where(scales == 0, torch.ones_like(scales), scales)).round_().nan_to_num_(0)
    if encoding == "int8":
        return scales.numpy().tobytes() + steps.to(torch.int8).view(-1)[:count].numpy().tobytes()
    halves = steps.clamp_(-largest, largest).add_(8).int().view(-1, 2, block // 2)
    return scales.numpy().tobytes() + (halves[:, 0] + 16 * halves[:, 1]).to(torch.uint8).numpy().tobytes()


def plainly_decoded(data: bytes, count: int, encoding: EncodingName) -> Tensor:
    if encoding == "float32":
        return torch.from_numpy(np.frombuffer(data, np.float32).copy())
    if encoding == "bfloat16":
        return torch.from_numpy(np.frombuffer(data, np.int16).copy()).view(torch.bfloat16).float()
    cut = 4 * block_count(count, encoding)
    scales = torch.from_numpy(np.frombuffer(data[:cut], np.float32).copy())
    if encoding == "int8":
        steps = torch.from_numpy(np.frombuffer(data[cut:], np.int8).copy()).float()
    else:
        pairs = np.frombuffer(data[cut:], np.uint8).reshape(-1, BLOCKS[encoding] // 2)
        steps = torch.from_numpy(np.hstack([pairs % 16, pairs // 16]).reshape(-1)[:count] - np.float32(8))
    return steps.mul_(scales.repeat_interleave(BLOCKS[encoding])[:count])


def bits(values: Tensor) -> bytes:
    return values.numpy().tobytes()


#: Every pattern of bits: numbers that are not finite, subnormal ones and both zeros among them.
ANY = hnp.arrays(np.uint32, st.integers(0, 5 * BLOCK), elements=st.integers(0, 2**32 - 1))
USUAL = hnp.arrays(np.float32, st.integers(0, 5 * BLOCK), elements=st.floats(-10.0, 10.0, width=32))


@settings(max_examples=150, deadline=None)
@given(st.one_of(ANY, USUAL), st.sampled_from([BLOCK, 2 * BLOCK, 1 << 16]))
@example(np.full(BLOCK + 1, 190, np.uint32), BLOCK)  # subnormal: a step is beyond what int8 holds
@example(np.full(3, 0x80000000, np.uint32), BLOCK)
def test_the_bits_are_those_of_whole_slices_whatever_the_pieces(values: Any, piece: int) -> None:
    vector = torch.from_numpy(values.view(np.float32).copy())
    count = len(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "PIECE", piece)
        for encoding in ENCODINGS:
            body = encode_slice(vector, encoding)
            assert body == plainly_encoded(vector, encoding)
            plain = plainly_decoded(body, count, encoding)
            assert bits(decode_slice(body, count, encoding)) == bits(plain)
            assert bits(decode_into(memoryview(body), torch.full((count,), 7.0), encoding)) == bits(plain)
            assert is_finite(body, count, encoding) == bool(plain.isfinite().all())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3 * BLOCK), st.sampled_from(ENCODINGS), st.randoms(use_true_random=False))
def test_any_bytes_tell_whether_they_are_finite(count: int, encoding: Any, random: Any) -> None:
    """As decoding would tell: a large scale beside large steps included. So do the squares where there are steps. Each
    byte is read in one way: as it is by itself, whatever nobody writes."""
    body = bytearray(encodings.encoded_size(count, encoding))
    for place in random.sample(range(len(body)), min(len(body), 12)):
        body[place] = random.choice([0x7F, 0x80, 0xFF, 0x7E, 0x01, random.randrange(256)])
    plain = plainly_decoded(bytes(body), count, encoding)
    assert is_finite(body, count, encoding) == bool(plain.isfinite().all())
    assert bits(decode_slice(bytes(body), count, encoding)) == bits(plain)
    if encoding in BLOCKS:
        squares = float(plain.double().square().sum()) if is_finite(body, count, encoding) else math.inf
        assert squares_of_slice(body, count, encoding) == pytest.approx(squares, rel=1e-6, abs=0.0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_vectors_of_several_slices_and_pieces(encoding: EncodingName) -> None:
    size = SLICE + encodings.PIECE + BLOCK + 3
    vector = torch.arange(size, dtype=torch.float32).sin_()
    if encoding in BLOCKS:
        for body, (start, stop) in zip(encode_vector(vector, encoding), slices(size), strict=True):
            squares = float(plainly_decoded(body, stop - start, encoding).double().square().sum())
            assert squares_of_slice(body, stop - start, encoding) == pytest.approx(squares, rel=1e-6)
    vector[[5, SLICE - 1, size - 1]] = torch.tensor([float("nan"), float("inf"), -0.0])
    bodies = encode_vector(vector, encoding)
    assert bodies == [plainly_encoded(vector[start:stop], encoding) for start, stop in slices(size)]
    payload = b"".join(bodies)
    plain = [
        plainly_decoded(body, stop - start, encoding) for body, (start, stop) in zip(bodies, slices(size), strict=True)
    ]
    assert bits(decode_vector(payload, size, encoding)) == bits(torch.cat(plain))
    assert not is_finite(payload, size, encoding)
    read = EncodedVector(bodies, size, encoding)
    assert bits(read.read(0, 4 * BLOCK, torch.empty(BLOCK + 9))) == bits(plain[0][4 * BLOCK : 5 * BLOCK + 9])
    assert bits(read.read(1, BLOCK, torch.empty(len(plain[1]) - BLOCK))) == bits(plain[1][BLOCK:])
    for wrong in (payload[:-1], payload + b"x"):
        with pytest.raises(ValueError, match="bytes were expected"):
            is_finite(wrong, size, encoding)
