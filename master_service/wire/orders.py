"""What the master and its aggregators say to each other: orders, and reports. Each shard (from 0 on) is told what to do
with the part of a parameter set that it holds.

Either side may die at any moment, and what was under way may be lost: an order that is not answered is given again, and
leads to the same again.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from common.numbers.slicing import EncodingName
from common.wire.accounts import MASTER, expect
from common.wire.base import Message
from common.wire.broker import Delivery
from common.wire.codec import received
from common.wire.fields import ChunkData, Count, Digest, Fraction, Id, Shards
from common.wire.to_master import UpdateManifest
from common.wire.topology import Topology
from master_service.decisions.rules.model import CombineRule, OuterOptimizer

#: float64, little-endian, whose sum in order is the square of a norm.
Squares = Annotated[bytes, Field(max_length=8 << 20)]


class Order(Message):
    """To one shard. `request` names it in the answer; `shards`: how many there are."""

    request: Id
    shards: Shards


class Begin(Order):
    """An encoder of `size` numbers. Answered with the version of it that the shard has; -1: `Place` its slices."""

    kind: Literal["order.begin"] = "order.begin"
    encoder: Id
    size: Count


class Place(Order):
    """A slice of version 0, float32, in order."""

    kind: Literal["order.place"] = "order.place"
    encoder: Id
    size: Count
    index: Count
    data: ChunkData


class Take(Order):
    """Fetch the shard's part of an update. Told of by Arriving, and not answered."""

    kind: Literal["order.take"] = "order.take"
    manifest: UpdateManifest


class Leave(Order):
    """What is fetched of a node is not wanted any more; its chunks stay where they are."""

    kind: Literal["order.leave"] = "order.leave"
    node: Id


class Discard(Order):
    """An update does not count: its chunks are thrown away, and all that its node, whose incarnation this is, has sent
    before. `logged`: the message log has a payload of its digest, so what was taken of that stays."""

    kind: Literal["order.discard"] = "order.discard"
    manifest: UpdateManifest
    incarnation: Id
    logged: bool


class Keep(Order):
    """An update that was taken is in the message log, under this digest of the whole."""

    kind: Literal["order.keep"] = "order.keep"
    update: str
    digest: Digest


class Drop(Order):
    """Nobody needs the payload of this digest of the whole."""

    kind: Literal["order.drop"] = "order.drop"
    digest: Digest


class Part(BaseModel):
    """A Contribution of a Step, by the digest of the shard's part of it."""

    model_config = ConfigDict(frozen=True, strict=True)

    payload: Digest
    encoding: EncodingName
    coefficient: float
    part: int


class Compute(Order):
    """Compute the shard's part of a version. Answered with its digest and the squares of the mean, or with what is
    `lost`; once more if it is there already. The newest is computed anew if it is another step: one that another shard
    had lost something of. `behind`: the shard has no version before it; `differs`: it made an older one otherwise."""

    kind: Literal["order.step"] = "order.step"
    encoder: Id
    version: Count
    contributions: list[Part]
    outer: OuterOptimizer
    combine: CombineRule


class Encode(Order):
    """Encode the version as it is now. Answered with the digest, and the bytes are kept until they are published;
    without it, if there is a later version already; `behind` as of Compute."""

    kind: Literal["order.encode"] = "order.encode"
    encoder: Id
    version: Count
    encoding: EncodingName


class Issue(Order):
    """Write the part of a version that was encoded to the encoder's stream. `digest`, `size`: of the whole; `elements`:
    how many numbers that has. Answered once the broker has confirmed all of it, or if that cannot be: the shard has it
    no more (`gone`), or there is no such stream (`unroutable`)."""

    kind: Literal["order.publish"] = "order.publish"
    encoder: Id
    version: Count
    epoch: Count
    encoding: EncodingName
    layout_digest: Digest
    digest: Digest
    elements: Count
    progress: Fraction


class Read(Order):
    """A slice of the current version, float32."""

    kind: Literal["order.read"] = "order.read"
    encoder: Id
    version: Count
    index: Count


class Report(Message):
    """Of one shard."""

    shard: Count


class Hello(Report):
    """A shard is here, or here again: what it was told before may be lost."""

    kind: Literal["report.hello"] = "report.hello"
    shards: Shards


class Arriving(Report):
    """How far a shard is with an update that it takes: `here` chunks, or one of a later `overtaken` order. `digest`: of
    the part, all of which is durable; `fits`: each slice was as long as it must be; `squares`: what its norm is made
    of."""

    kind: Literal["report.arriving"] = "report.arriving"
    node: Id
    update: str
    attempt: Count
    here: Count = 0
    overtaken: Count = 0
    digest: Digest | None = None
    size: Count = 0
    fits: bool = False
    squares: Squares = b""


class Done(Report):
    """The answer to an order. What of it is meant, the order says."""

    kind: Literal["report.done"] = "report.done"
    request: Id
    version: Annotated[int, Field(ge=-1)] = -1
    digest: Digest | None = None
    squares: Squares = b""
    lost: list[Digest] = Field(default_factory=list)
    behind: bool = False
    differs: bool = False
    gone: bool = False
    unroutable: bool = False
    data: ChunkData = b""


AnyOrder = Begin | Place | Take | Leave | Discard | Keep | Drop | Compute | Encode | Issue | Read
AnyReport = Hello | Arriving | Done
_ORDERS: TypeAdapter[AnyOrder] = TypeAdapter(Annotated[AnyOrder, Field(discriminator="kind")])
_REPORTS: TypeAdapter[AnyReport] = TypeAdapter(Annotated[AnyReport, Field(discriminator="kind")])


def order(delivery: Delivery, topology: Topology) -> AnyOrder:
    """What a shard is told. Raises Poison for what is none, or is not the master's."""
    expect(topology, delivery, MASTER)
    return received(delivery, adapter=_ORDERS)


def report(delivery: Delivery, topology: Topology) -> AnyReport:
    """What a shard says, by the master's account too. Raises Poison."""
    expect(topology, delivery, MASTER)
    return received(delivery, adapter=_REPORTS)


def packed(squares: list[float]) -> bytes:
    """As they travel."""
    return np.asarray(squares, "<f8").tobytes()


def unpacked(squares: bytes) -> list[float]:
    """The same numbers."""
    return [float(each) for each in np.frombuffer(squares, "<f8")]
