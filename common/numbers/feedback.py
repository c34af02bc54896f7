"""What an encoding loses of an update is carried into the next one (Seide et al. 2014, 1-bit SGD; Karimireddy et al.
2019, EF-SGD). Everything here goes piece by piece, on the device of the tensors that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.numbers.compiled import kernels, part_of, slice_of, written_slice
from common.numbers.encodings import EncodedVector, SliceEncoder, piece_length, pieces
from common.numbers.slicing import EncodingName, encoded_size, slices

#: A parameter vector: float32 of shape (size,), or encoded and decoded where it is read.
Point = Tensor | EncodedVector


class Part(NamedTuple):
    """Elements `start` to `stop` of a vector, which stand in slice `number` from its element `inside` on."""

    number: int
    inside: int
    start: int
    stop: int


def parts(size: int, device: torch.device) -> Iterator[Part]:
    """A vector of so many elements, piece by piece."""
    length = piece_length(device)
    for number, (start, stop) in enumerate(slices(size)):
        for begin, end in pieces(start, stop, length):
            yield Part(number, begin - start, begin, end)


def scratch(count: int, device: torch.device) -> Tensor:
    """Room for so many pieces, shape (count, elements of a piece)."""
    return torch.empty((count, piece_length(device)), device=device)


def at(point: Point, part: Part, room: Tensor) -> Tensor:
    """A part of a vector: a view of it, or decoded into `room`."""
    if isinstance(point, Tensor):
        return point[part.start : part.stop]
    return point.read(part.number, part.inside, room[: part.stop - part.start])


class Left:
    """What encoding one update has left for later, as float32 of shape (size,): added to the residual when it was
    handed in, to be taken back should it not count.

    It follows from where the update began, where it ended and what was sent; so it needs no room of its own until one
    of these moves, before which `keep` is to be called.
    """

    def __init__(
        self, before: Point | None, after: Tensor, sent: EncodedVector | None, values: Tensor | None = None
    ) -> None:
        self.before = before
        self.sent = sent
        self._after = after
        self._values = values

    @classmethod
    def kept(cls, values: Tensor) -> Left:
        """What was worked out already."""
        return cls(None, values, None, values)

    @property
    def values(self) -> Tensor:
        """All of it."""
        self.keep()
        assert self._values is not None
        return self._values

    def keep(self) -> None:
        """Work it out, and depend on nothing any more."""
        if self._values is not None:
            return
        values, room = torch.empty_like(self._after), scratch(2, self._after.device)
        for part in parts(values.numel(), values.device):
            values[part.start : part.stop].copy_(self.at(part, room))
        self.before, self.sent, self._after, self._values = None, None, values, values

    def at(self, part: Part, room: Tensor) -> Tensor:
        """A part of it; `room` is scratch of two pieces."""
        if self._values is not None:
            return self._values[part.start : part.stop]
        assert self.before is not None and self.sent is not None
        update = room[0][: part.stop - part.start]
        torch.sub(at(self.before, part, room[0]), self._after[part.start : part.stop], out=update)
        return update.sub_(at(self.sent, part, room[1]))


class ErrorFeedback:
    """Carries what an encoding lost into the next update, so that over time nothing is lost.

    `residual` is float32 of shape (size,), or None while nothing was lost: float32 loses nothing. Feedback assumes that
    an update was applied; `refused` takes back what it added for one that was not.
    """

    def __init__(self) -> None:
        self.residual: Tensor | None = None

    def encode(
        self, before: Point, local: Tensor, after: Tensor, encoding: EncodingName
    ) -> tuple[list[bytes], Left | None]:
        """Encode `before` − `local` plus the residual, slice by slice, and copy `local` into `after` on the way; also
        gives what this update added to the residual, None if nothing can be lost."""
        if self.residual is None and encoding != "float32":
            self.residual = torch.zeros_like(local)
        if (loops := kernels(local.device, local.numel())) is not None:
            bodies = self._encoded(loops, before, local, after, encoding)
        else:
            bodies = self._encoded_by_torch(before, local, after, encoding)
        if self.residual is None:
            return bodies, None
        return bodies, Left(before, after, EncodedVector(bodies, local.numel(), encoding))

    def _encoded(self, loops: Any, before: Point, local: Tensor, after: Tensor, encoding: EncodingName) -> list[bytes]:
        bodies, body = [], bytearray()
        for index, (start, stop) in enumerate(slices(local.numel())):
            if len(body) != (length := encoded_size(stop - start, encoding)):
                body = bytearray(length)
            residual = part_of(after if self.residual is None else self.residual, index)
            places = part_of(local, index), part_of(after, index), self.residual is not None, residual
            loops.hand_in(*slice_of(before, index), *places, *written_slice(body, stop - start, encoding))
            bodies.append(bytes(body))
        return bodies

    def _encoded_by_torch(self, before: Point, local: Tensor, after: Tensor, encoding: EncodingName) -> list[bytes]:
        encoder, bodies, room = SliceEncoder(encoding, local.device), [], scratch(3, local.device)
        sizes = list(slices(local.numel()))
        for part in parts(local.numel(), local.device):
            if part.inside == 0:
                encoder.begin(sizes[part.number][1] - sizes[part.number][0])
            self._encode_part(encoder, part, before, local, room)
            after[part.start : part.stop].copy_(local[part.start : part.stop])
            if part.stop == sizes[part.number][1]:
                bodies.append(encoder.body())
        return bodies or [b""]

    def refused(self, left: Left | None) -> None:
        """The update that added this was not applied."""
        if left is None or self.residual is None:
            return
        room = scratch(2, self.residual.device)
        for part in parts(self.residual.numel(), self.residual.device):
            self.residual[part.start : part.stop].sub_(left.at(part, room))

    def forget(self) -> None:
        """Nothing was lost so far."""
        self.residual = None

    def _encode_part(self, encoder: SliceEncoder, part: Part, before: Point, local: Tensor, room: Tensor) -> None:
        update, carried, applied = (each[: part.stop - part.start] for each in room)
        torch.sub(at(before, part, room[0]), local[part.start : part.stop], out=update)
        if self.residual is None:
            # + 0, as if there were a residual: a negative zero is sent as a zero
            encoder.put(part.inside, update.add_(0.0))
            return
        residual = self.residual[part.start : part.stop]
        encoder.put(part.inside, torch.add(update, residual, out=carried))
        residual.add_(update.sub_(encoder.back(part.inside, applied)))
