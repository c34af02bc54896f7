"""The exchanges, queues and bindings of one namespace, as data; brokers declare what stands here.

Every exchange is a topic exchange, because RabbitMQ checks permissions on routing keys for those alone; the sender or
the receiver is in the key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from common.errors import UserError

MIB = 1 << 20

#: The largest body that travels, bytes. RabbitMQ's own default limit is 16 MiB (4.x) or 128 MiB (3.x).
MAX_BODY_BYTES = 15 * MIB

#: Room for some dozens of the master's signs of life, bytes; only the newest is of interest.
PULSE_QUEUE_BYTES = 4096

QueueKind = Literal["quorum", "classic", "stream"]


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    kind: Literal["topic", "direct"] = "topic"


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue. Sizes in bytes, lengths in messages, times in seconds; `None` leaves the broker's default.
    `replicas`: on so many servers of a cluster."""

    name: str
    kind: QueueKind = "quorum"
    max_bytes: int | None = None
    max_length: int | None = None
    overflow: Literal["reject-publish", "drop-head"] | None = None
    expires: float | None = None
    segment_bytes: int | None = None
    replicas: int | None = None


@dataclass(frozen=True, slots=True)
class Binding:
    exchange: str
    queue: str
    routing_key: str


@dataclass(frozen=True, slots=True)
class Declarations:
    """A set of things to declare; declaring it again changes nothing. `made`: whoever runs the broker has made them,
    because this party may not; then its queues have to be there, and nothing else is asked of the broker."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()
    made: bool = False

    def __add__(self, other: Declarations) -> Declarations:
        return Declarations(
            self.exchanges + other.exchanges, self.queues + other.queues, self.bindings + other.bindings
        )


def not_made(words: str) -> UserError:
    """What a party is told that lacks what had to be made for it; `words` are the broker's."""
    return UserError(f"{words}; whoever runs the broker makes it: `shared-encoder broker add-node NAME`")


def note_queue(lock: str) -> str:
    """Where the holder of a lock leaves its name."""
    return f"{lock}.holder"


def note_of(lock: str, exchange: str) -> Declarations:
    """What the note of a lock's holder travels by: the lock's name is the key, so that whoever may write its notes is a
    matter of topic permissions.

    A note is the newest message of a queue without expiry: publishing does not count as use, so a queue with one would
    be deleted while its lock is held.
    """
    queue = Queue(note_queue(lock), "classic", max_length=1, overflow="drop-head")
    return Declarations((Exchange(exchange),), (queue,), (Binding(exchange, queue.name, lock),))


def _part(shard: int | None) -> str:
    """People count shards from 1 on."""
    return "" if shard is None else f".{shard + 1}"


@dataclass(frozen=True, slots=True)
class Topology:
    """Names of everything at the broker, all below one namespace, so that several federations share a vhost.

    `own_accounts`: every party has an account of its own, so that whose a message is can be told, and each may declare
    what is its own and nothing else: the master declares the exchanges, what a node has was made for it (`made`).

    `replicas`: on so many servers of a cluster every queue and stream is kept that outlives its party's connection.
    None, for a broker that is one server: then what quorum queues are not needed for is kept in classic ones, which
    cost less, and live on one server of a cluster: while that is away, whose chunk queue it has hands nothing in."""

    namespace: str = "shared-encoder"
    chunk_queue_bytes: int = 2048 * MIB
    inbox_expires: float = 7 * 24 * 3600.0
    dead_letter_bytes: int = 256 * MIB
    own_accounts: bool = False
    replicas: int | None = None
    instruction: str = field(init=False)
    rule: str = field(init=False)
    receipt: str = field(init=False)
    ack: str = field(init=False)
    request: str = field(init=False)
    update: str = field(init=False)
    parameter: str = field(init=False)
    asset: str = field(init=False)
    lock: str = field(init=False)
    shard: str = field(init=False)
    dead_letters: str = field(init=False)

    def __post_init__(self) -> None:
        to_master, to_node = ("ack", "request", "update"), ("instruction", "rule", "receipt", "parameter", "asset")
        for exchange in (*to_master, *to_node, "lock", "shard"):
            object.__setattr__(self, exchange, f"{self.namespace}.{exchange}")
        object.__setattr__(self, "dead_letters", f"{self.namespace}.dead-letters")

    def _queue(self, name: str, kind: QueueKind = "quorum", **limits: Any) -> Queue:
        """One that outlives the server it is on, if there are several."""
        replicated = kind if self.replicas is None or kind == "stream" else "quorum"
        return Queue(name, replicated, replicas=self.replicas, **limits)

    @property
    def master_inbox(self) -> str:
        return f"{self.namespace}.master.inbox"

    @property
    def master_updates(self) -> str:
        return f"{self.namespace}.master.updates"

    @property
    def master_lock(self) -> str:
        return f"{self.namespace}.master.lock"

    def account(self, party: str) -> str:
        """The broker account of a party, where each has one of its own: of a node, an operator, or `master`. Accounts
        are the whole broker's, so the federation's name is in them."""
        return f"{self.namespace}.{party}"

    def node_inbox(self, node: str) -> str:
        return f"{self.namespace}.node.{node}.inbox"

    def pulse_queue(self, node: str) -> str:
        """Where a node hears the master's signs of life. Apart from the inbox: they must not wait behind other
        messages, nor fill it while the node is away."""
        return f"{self.namespace}.node.{node}.pulse"

    @property
    def pulse_key(self) -> str:
        """The routing key of the master's signs of life on the instruction exchange; no encoder type begins so."""
        return "_pulse"

    def node_lock(self, node: str) -> str:
        return f"{self.namespace}.node.{node}.lock"

    def chunk_queue(self, node: str, shard: int | None = None) -> str:
        """Where a node's updates wait; with shards, the part that is this one's (from 0 on)."""
        return f"{self.namespace}.update.{node}{_part(shard)}"

    def chunk_key(self, node: str, shard: int | None = None) -> str:
        """The routing key of what goes into that queue."""
        return f"{node}.chunk{_part(shard)}"

    def shard_queue(self, shard: int) -> str:
        """Where an aggregator is told what to do."""
        return f"{self.namespace}.shard{_part(shard)}"

    def shard_lock(self, shard: int) -> str:
        return f"{self.shard_queue(shard)}.lock"

    def shard_key(self, shard: int) -> str:
        """The routing key of what an aggregator is told."""
        return f"to{_part(shard)}"

    @property
    def master_shards(self) -> str:
        """Where the master hears its aggregators."""
        return f"{self.namespace}.master.shards"

    def stream(self, encoder: str) -> str:
        return f"{self.namespace}.parameters.{encoder}"

    def asset_stream(self, encoder: str) -> str:
        return f"{self.namespace}.assets.{encoder}"

    def streams(self, encoders: Iterable[str]) -> list[str]:
        """The streams of encoders: of their parameters, and of what nodes need beside those."""
        return [name for encoder in encoders for name in (self.stream(encoder), self.asset_stream(encoder))]

    def queue_names(self, nodes: Iterable[str], encoders: Iterable[str], shards: int = 1) -> list[str]:
        """Every queue of this namespace: the master's, those of its aggregators if it has several, those of nodes, and
        the streams of encoders."""
        names = [self.master_inbox, self.master_updates, self.dead_letters]
        parts = range(shards) if shards > 1 else ()
        names += [self.master_shards, *map(self.shard_queue, parts)] if parts else []
        for node in nodes:
            names += [self.node_inbox(node), self.pulse_queue(node), self.chunk_queue(node)]
            names += [self.chunk_queue(node, shard) for shard in parts]
        return names + self.streams(encoders)

    def exchanges(self) -> Declarations:
        """The exchanges and the dead letters, which every party may declare where they share an account."""
        names = (self.instruction, self.rule, self.receipt, self.ack, self.request, self.update)
        streamed = (self.parameter, self.asset)
        return Declarations(
            exchanges=(*(Exchange(name) for name in (*names, *streamed)), Exchange(self.dead_letters)),
            queues=(self._queue(self.dead_letters, "classic", max_bytes=self.dead_letter_bytes, overflow="drop-head"),),
            bindings=(Binding(self.dead_letters, self.dead_letters, "#"),),
        )

    def master(self) -> Declarations:
        """What the master needs: its two FIFO queues. It also declares the exchanges."""
        return self.exchanges() + Declarations(
            queues=(self._queue(self.master_inbox), self._queue(self.master_updates)),
            bindings=(
                Binding(self.ack, self.master_inbox, "*"),
                Binding(self.request, self.master_inbox, "*.*"),
                Binding(self.update, self.master_updates, "*.ready"),
            ),
        )

    def node(self, node: str, types: tuple[str, ...]) -> Declarations:
        """What one node needs, and declares with the exchanges if it may."""
        if self.own_accounts:
            return Declarations(queues=self.node_queues(node, types).queues, made=True)
        return self.exchanges() + self.node_queues(node, types)

    def node_queues(self, node: str, types: tuple[str, ...]) -> Declarations:
        """A node's inbox, bound for its encoder types, its chunk queue, and the queue of the master's signs of life, of
        which it holds the newest few.

        The chunk queue has no expiry: a queue that is published to while nobody consumes would be deleted. Nor has any
        queue that its node could not make again.
        """
        inbox, chunks, pulses = self.node_inbox(node), self.chunk_queue(node), self.pulse_queue(node)
        expires = None if self.own_accounts else self.inbox_expires
        return Declarations(
            queues=(
                self._queue(inbox, expires=expires),
                self._queue(chunks, "classic", max_bytes=self.chunk_queue_bytes, overflow="reject-publish"),
                self._queue(pulses, "classic", max_bytes=PULSE_QUEUE_BYTES, overflow="drop-head", expires=expires),
            ),
            bindings=(
                *(Binding(self.instruction, inbox, encoder_type) for encoder_type in types),
                Binding(self.rule, inbox, node),
                Binding(self.receipt, inbox, node),
                Binding(self.update, chunks, f"{node}.chunk"),
                Binding(self.instruction, pulses, self.pulse_key),
            ),
        )

    def shards(self, shards: int) -> Declarations:
        """What the master and its aggregators talk to each other by."""
        queues = {self.shard_queue(shard): self.shard_key(shard) for shard in range(shards)}
        queues[self.master_shards] = "master"
        return Declarations(
            exchanges=(Exchange(self.shard),),
            queues=tuple(self._queue(name, "classic") for name in queues),
            bindings=tuple(Binding(self.shard, name, key) for name, key in queues.items()),
        )

    def shard_chunks(self, node: str, shards: int) -> Declarations:
        """A node's chunk queues where there are several aggregators: together they take what one would."""
        size = -(-self.chunk_queue_bytes // shards)
        queues = {self.chunk_queue(node, shard): self.chunk_key(node, shard) for shard in range(shards)}
        return Declarations(
            queues=tuple(self._queue(name, "classic", max_bytes=size, overflow="reject-publish") for name in queues),
            bindings=tuple(Binding(self.update, name, key) for name, key in queues.items()),
        )

    def observer(self, observer: str) -> Declarations:
        """What `status` and `request` need: a short-lived inbox for answers."""
        inbox = self.node_inbox(observer)
        own = Declarations(
            queues=(Queue(inbox, "classic", expires=120.0),),
            bindings=(Binding(self.receipt, inbox, observer),),
        )
        return own if self.own_accounts else self.exchanges() + own

    def parameters(self, encoder: str, version_bytes: int) -> Declarations:
        """The stream of one encoder's target parameter sets: segments of about a version, at least four versions."""
        segment = max(16 * MIB, version_bytes)
        stream = self.stream(encoder)
        return Declarations(
            queues=(self._queue(stream, "stream", max_bytes=8 * segment, segment_bytes=segment),),
            bindings=(Binding(self.parameter, stream, encoder),),
        )

    def assets(self, encoder: str, asset_bytes: int) -> Declarations:
        """The stream of what nodes need of one encoder beside its parameters, `asset_bytes` in all. It is written once
        and not trimmed: whoever joins late reads it from its beginning. Its limit is for copies that nodes ask for,
        however many: the newest few are always whole."""
        segment = max(16 * MIB, asset_bytes)
        stream = self.asset_stream(encoder)
        return Declarations(
            queues=(self._queue(stream, "stream", max_bytes=8 * segment, segment_bytes=segment),),
            bindings=(Binding(self.asset, stream, encoder),),
        )
