"""What a stranger may send: every message of the protocol, good, bent in a few places or broken; and what is none.

Grammar-based: a message begins as one of which every field is good, or as one that was really sent a moment ago, so
that it gets past the door and is decided upon. The same seed gives the same messages to the same federation.
"""

from __future__ import annotations

import copy
import math
import random
from collections import deque
from collections.abc import Iterable
from typing import Any, get_args

import msgpack

from common.wire.base import Message
from common.wire.broker import Delivery, Publication
from common.wire.messages import ToMaster, ToNode
from common.wire.to_master import UpdateChunk, UpdateManifest
from common.wire.to_node import ParameterChunk
from common.wire.topology import Topology
from tests.unit.common.test_every_field import good, leaves

#: Real deliveries that are kept to be bent.
_KEPT = 200
#: Values that stand where another belongs.
_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    2**53,
    2**53 + 1,
    2**63,
    2**64 - 1,
    -(2**63),
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "7",
    "nan",
    "a",
    "b",
    ".",
    "a.b",
    "*",
    "#",
    "..",
    "../../etc",
    "\x00",
    "\ud7ff",
    "é" * 40,
    "x" * 300,
    "x" * 70_000,
    "0" * 64,
    b"",
    b"x",
    b"\xff" * 300,
    [],
    [[]],
    [None] * 3,
    [["w", [2**40, 2**40]]],
    {},
    {"a": {}},
    {"": 1},
    {"x" * 300: 1},
)
#: Names that a sender may give itself: members that are there, and a handful of strangers.
_NAMES = ("a", "b", "c", "stranger", "master", "observer-1", "x" * 64)


class Grammar:
    """`next` is the next thing that somebody sends. `saw` tells it what was really sent, `encoders` what there is."""

    def __init__(self, topology: Topology, seed: int, encoder_type: str = "text") -> None:
        """`encoder_type`: the one that the nodes have samples of."""
        self._topology = topology
        self._type = encoder_type
        self._random = random.Random(seed)
        self._seen: deque[tuple[str, str, dict[str, Any]]] = deque(maxlen=_KEPT)
        self.encoders: list[str] = [f"{encoder_type}-1"]

    def saw(self, deliveries: Iterable[Delivery]) -> None:
        """What others have really sent."""
        for delivery in deliveries:
            self._seen.append((delivery.exchange, delivery.routing_key, msgpack.unpackb(delivery.body)))

    def next(self) -> Publication:
        chosen = self._random
        kind = chosen.random()
        if kind < 0.05:
            return self._sent(*self._way(), chosen.randbytes(chosen.choice((0, 1, 5, 60, 2000))))
        if kind < 0.10:
            return self._sent(*self._way(), self._bomb())
        if kind < 0.35 and self._seen:
            exchange, key, plain = copy.deepcopy(chosen.choice(self._seen))
        else:
            exchange, key, plain = self._made()
        for _ in range(chosen.choice((0, 0, 1, 1, 1, 2, 5))):
            self._bend(plain)
        body = bytearray(_packed(plain))
        if chosen.random() < 0.15:
            self._break(body)
        if chosen.random() < 0.1:
            exchange, key = self._way()
        return self._sent(exchange, key, bytes(body))

    def _made(self) -> tuple[str, str, dict[str, Any]]:
        """A message with good fields that fit what is there: names, an encoder, small counts."""
        chosen, topology = self._random, self._topology
        model: type[Message] = chosen.choice((*get_args(ToMaster), *get_args(ToNode), UpdateChunk, ParameterChunk))
        plain = good(model)
        name = chosen.choice(_NAMES)
        fitting: dict[str, Any] = {
            "node": name,
            "sender": name,
            "incarnation": chosen.choice((f"{name}-first", "i", "other")),
            "encoder": chosen.choice((*self.encoders, f"{self._type}-{chosen.randrange(1 << 30):x}")),
            "encoder_type": chosen.choice((self._type, self._type, "image", "other", "nothing")),
            **{field: chosen.randrange(6) for field in ("sequence", "attempt", "version", "base_version", "sought")},
        }
        plain |= {field: value for field, value in fitting.items() if field in plain}
        kind = str(plain["kind"])
        if model in get_args(ToMaster) and model is not UpdateManifest:
            exchange = topology.ack if kind == "ack" else topology.request
            key = name if kind == "ack" else f"{name}.{kind.removeprefix('request.')}"
        elif model is UpdateManifest:
            exchange, key = topology.update, f"{name}.ready"
        elif model is UpdateChunk:
            exchange, key = topology.update, f"{name}.chunk"
        elif model is ParameterChunk:
            exchange, key = topology.parameter, str(plain["encoder"])
        else:
            exchange = chosen.choice((topology.rule, topology.receipt, topology.instruction))
            key = chosen.choice((self._type, topology.pulse_key)) if exchange == topology.instruction else name
        return exchange, key, plain

    def _bend(self, plain: dict[str, Any]) -> None:
        """Put something odd in one place, take something away, or add something."""
        chosen = self._random
        places = list(leaves(plain))
        if not places or chosen.random() < 0.1:
            plain[chosen.choice(("kind", "unknown", "x", "schema_version"))] = chosen.choice(_ODD)
            return
        path, _ = chosen.choice(places)
        where: Any = plain
        for key in path[:-1]:
            where = where[key]
        if isinstance(where, tuple):
            return
        if chosen.random() < 0.15:
            del where[path[-1]]
        else:
            where[path[-1]] = copy.deepcopy(chosen.choice(_ODD))

    def _break(self, body: bytearray) -> None:
        """Other bytes, fewer, or some twice."""
        chosen = self._random
        for _ in range(chosen.randrange(1, 4)):
            if not body:
                return
            at = chosen.randrange(len(body))
            what = chosen.random()
            if what < 0.5:
                body[at] = chosen.randrange(256)
            elif what < 0.75:
                del body[at : at + chosen.randrange(1, 9)]
            else:
                body[at:at] = body[at : at + chosen.randrange(1, 40)]

    def _bomb(self) -> bytes:
        """Small to send, large to build: deep, long, or with lengths that are not there."""
        chosen = self._random
        size = chosen.choice((10, 40, 1500, 20_000))
        kinds = (
            b"\x91" * size + b"\xc0",
            b"\x81\xa1k" * size + b"\xc0",
            b"\xdd" + size.to_bytes(4, "big") + b"\x90" * size,
            b"\xdf" + size.to_bytes(4, "big") + b"".join(b"\xce" + i.to_bytes(4, "big") + b"\xc0" for i in range(size)),
            b"\xdd\xff\xff\xff\xff",
            b"\xdb\x7f\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff" + b"x" * size,
            b"\xc9\x00\x00\x00\x01\xff\x00",
        )
        bomb = chosen.choice(kinds)
        if chosen.random() < 0.5:
            field = chosen.choice((b"kind", b"schema_version", b"architecture", b"layout", b"words", b"report"))
            bomb = b"\x82" + msgpack.packb("kind") + msgpack.packb("request.get") + msgpack.packb(field.decode()) + bomb
        return bomb

    def _way(self) -> tuple[str, str]:
        """Some exchange, and a key that goes somewhere."""
        chosen, topology = self._random, self._topology
        name = chosen.choice(_NAMES[:3])
        return chosen.choice(
            (
                (topology.request, f"{name}.{chosen.choice(('join', 'get', 'status', 'x'))}"),
                (topology.ack, name),
                (topology.update, f"{name}.ready"),
                (topology.update, f"{name}.chunk"),
                (topology.rule, name),
                (topology.receipt, name),
                (topology.instruction, self._type),
                (topology.instruction, topology.pulse_key),
                (topology.parameter, chosen.choice(self.encoders)),
            )
        )

    def _sent(self, exchange: str, key: str, body: bytes) -> Publication:
        chosen = self._random
        headers: dict[str, Any] = {}
        if chosen.random() < 0.1:
            headers = {
                chosen.choice(("x-stream-offset", "x-delivery-count", "x")): chosen.choice(("abc", -1, 2**40, ""))
            }
        identity = chosen.choice((None, f"{chosen.randrange(1 << 40):x}", "the-same", f"text-1/{key[:1]}/first/0/0"))
        return Publication(exchange, key, body, headers, identity, mandatory=False)


def _packed(plain: dict[str, Any]) -> bytes:
    """As msgpack, whatever it holds."""
    packed: bytes = msgpack.packb(plain, use_bin_type=True, strict_types=False, unicode_errors="surrogatepass")
    return packed
