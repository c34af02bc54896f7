"""How a slice of a vector becomes bytes: float32, bfloat16, or int8 in blocks of 256 with one float32 scale each.

A vector is encoded slice by slice (see `slicing`), so that every slice is a chunk of its own, fits the cache and is
decoded without its neighbours. int8 loses up to half a step per element; on the node `ErrorFeedback` carries what was
lost into the next update (Seide et al. 2014, 1-bit SGD; Karimireddy et al. 2019, EF-SGD).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.numbers.slicing import BLOCK, EncodingName, block_count, encoded_size, slices


def encode_slice(values: Tensor, encoding: EncodingName) -> bytes:
    """The bytes of a float32 slice of shape (count,). A value that is not finite survives as one that is not finite."""
    if encoding == "float32":
        return values.contiguous().numpy().tobytes()
    if encoding == "bfloat16":
        return values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    count = values.numel()
    blocks = torch.zeros(block_count(count) * BLOCK)
    blocks[:count] = values
    blocks = blocks.view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True).div_(127.0)
    # a block of zeros has scale 0: dividing by 1 instead keeps it at zero
    steps = blocks.div_(torch.where(scales == 0, torch.ones_like(scales), scales)).round_()
    return scales.numpy().tobytes() + steps.nan_to_num_(0).to(torch.int8).view(-1)[:count].numpy().tobytes()


def decode_slice(data: bytes | memoryview, count: int, encoding: EncodingName) -> Tensor:
    """A fresh float32 tensor of shape (count,). Raises ValueError if `data` is not `encoded_size(count)` long."""
    if len(data) != encoded_size(count, encoding):
        raise ValueError(f"{encoded_size(count, encoding)} bytes were expected for {count} elements, {len(data)} came")
    if encoding == "float32":
        return torch.from_numpy(np.frombuffer(data, np.float32).copy())
    if encoding == "bfloat16":
        return torch.from_numpy(np.frombuffer(data, np.int16).copy()).view(torch.bfloat16).float()
    cut = 4 * block_count(count)
    scales = torch.from_numpy(np.frombuffer(data[:cut], np.float32).copy())
    steps = torch.from_numpy(np.frombuffer(data[cut:], np.int8).copy()).float()
    return steps.mul_(scales.repeat_interleave(BLOCK)[:count])


def encode_vector(vector: Tensor, encoding: EncodingName) -> list[bytes]:
    """One body per slice."""
    return [encode_slice(vector[start:stop], encoding) for start, stop in slices(vector.numel())]


def decode_vector(payload: bytes | bytearray | memoryview, size: int, encoding: EncodingName) -> Tensor:
    """The float32 vector of shape (size,) of the concatenated slices. Raises ValueError if the length does not fit."""
    vector, position, view = torch.empty(size), 0, memoryview(payload)
    for start, stop in slices(size):
        length = encoded_size(stop - start, encoding)
        vector[start:stop] = decode_slice(view[position : position + length], stop - start, encoding)
        position += length
    if position != len(payload):
        raise ValueError(f"{position} bytes were expected for {size} elements, {len(payload)} came")
    return vector


class ErrorFeedback:
    """Carries what an encoding lost into the next update, so that over time nothing is lost.

    `residual` is float32 of shape (size,). Feedback assumes that an update was applied; `refused` takes back what it
    added for one that was not.
    """

    def __init__(self, size: int) -> None:
        self.residual = torch.zeros(size)

    def encode(self, vector: Tensor, encoding: EncodingName) -> tuple[list[bytes], Tensor]:
        """Encode `vector` plus the residual slice by slice; also gives what this update added to the residual."""
        bodies, added = [], torch.empty_like(vector)
        for start, stop in slices(vector.numel()):
            body = encode_slice(vector[start:stop] + self.residual[start:stop], encoding)
            torch.sub(vector[start:stop], decode_slice(body, stop - start, encoding), out=added[start:stop])
            bodies.append(body)
        self.residual.add_(added)
        return bodies, added

    def refused(self, added: Tensor) -> None:
        """The update that added this was not applied."""
        self.residual.sub_(added)
