"""A batch in pieces that a small memory holds: their gradients, added up by their shares, are those of the batch."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from common.encoders.base import Batch, EncoderModel
from common.errors import UserError


def in_pieces(model: EncoderModel, batch: Batch, size: int, most: int | None) -> Iterator[tuple[Batch, float]]:
    """A batch of `size` samples in pieces of at most `most` samples (None: all), each with the share that its loss has
    in the loss of the batch: that is a mean over positions, and the pieces need not have equally many.

    Raises UserError for a batch that is not so many samples one after the other.
    """
    if most is None or most >= size:
        yield batch, 1.0
        return
    if any(tensor.ndim and len(tensor) != size for tensor in batch.values()):
        raise UserError(
            f"micro_batch {most}: batches of this encoder type are not cut, since their tensors do not have the "
            f"{size} samples as rows; leave it out"
        )
    pieces = [
        {name: _rows(tensor, start, start + most) for name, tensor in batch.items()} for start in range(0, size, most)
    ]
    counts = [model.counted(piece) for piece in pieces]
    whole = sum(counts)
    for piece, count in zip(pieces, counts, strict=True):
        yield piece, count / whole if whole else 1.0 / len(pieces)


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """What of a tensor belongs to these samples; one number belongs to all."""
    return tensor[start:stop] if tensor.ndim else tensor
