"""The embedded broker: real queues, prefetch, redelivery, dead letters and streams, in this process, no install.

It carries exactly the bytes that RabbitMQ would. `MemoryServer` is the broker, `MemoryBroker` one party's connection.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from common.brokers.memory_rules import Operation, Permissions, matches
from common.brokers.problems import Problems
from common.clock import SYSTEM
from common.errors import (
    AccessRefused,
    BrokerUnavailable,
    LockHeld,
    PublishRejected,
    Unpublishable,
    Unroutable,
    UserError,
)
from common.locks import this_process
from common.wire.broker import BrokerStatus, Delivery, OnDelivery, Publication, StreamPosition, Timestamp, dead_letter
from common.wire.topology import Binding, Declarations, Exchange, Queue, not_made

#: How often it is tried to consume what the user may not read, seconds.
_RETRY_SECONDS = 0.2
#: A queue may be missing for so long before a warning: its declarer may come later. Seconds.
_QUIET_SECONDS = 5.0


@dataclass(slots=True)
class _Message:
    publication: Publication
    user_id: str
    timestamp: float
    offset: int = 0
    redelivered: bool = False

    @property
    def size(self) -> int:
        return len(self.publication.body)


@dataclass
class _Queue:
    declared: Queue
    ready: deque[_Message] = field(default_factory=deque)
    bytes: int = 0
    next_offset: int = 0
    #: It was deleted; another one may have its name.
    gone: bool = False


class _Bindings:
    """Which queues a routing key of an exchange leads to; a publish does not look at the bindings of other keys."""

    def __init__(self) -> None:
        self._queues: dict[tuple[str, str], set[str]] = {}
        #: By exchange: the patterns that more than their own words match.
        self._patterns: dict[str, set[str]] = {}

    def add(self, binding: Binding) -> None:
        self._queues.setdefault((binding.exchange, binding.routing_key), set()).add(binding.queue)
        if not {"*", "#"}.isdisjoint(binding.routing_key.split(".")):
            self._patterns.setdefault(binding.exchange, set()).add(binding.routing_key)

    def drop(self, queue: str) -> None:
        for queues in self._queues.values():
            queues.discard(queue)

    def queues(self, exchange: Exchange, routing_key: str) -> set[str]:
        patterns = (each for each in self._patterns.get(exchange.name, ()) if matches(exchange.kind, each, routing_key))
        return set().union(*(self._queues.get((exchange.name, each), ()) for each in (routing_key, *patterns)))


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock, under which name others are told of it, and whom to tell when it is lost."""

    broker: MemoryBroker
    name: str
    on_lost: Callable[[], None]


class MemoryServer:
    """Exchanges, queues and bindings. One lock guards all of it; `changed` wakes the dispatchers.

    `max_body_bytes`: larger bodies are refused, as RabbitMQ does with its `max_message_size`.
    """

    def __init__(self, clock: Callable[[], float] = SYSTEM.now, max_body_bytes: int | None = None) -> None:
        self.max_body_bytes = max_body_bytes
        self._permissions: dict[str, Permissions] = {}
        self.changed = threading.Condition(threading.RLock())
        self.clock = clock
        self.locks: dict[str, Holder] = {}
        self._exchanges: dict[str, Exchange] = {}
        self._queues: dict[str, _Queue] = {}
        self._bindings = _Bindings()

    def permit(self, user: str, permissions: Permissions) -> None:
        """What this user may do from now on; everything if nothing was said."""
        with self.changed:
            self._permissions[user] = permissions
            self.changed.notify_all()

    @property
    def open(self) -> bool:
        """Whether everybody may do everything."""
        return not self._permissions

    def forbidden(self, user: str, operation: Operation, name: str) -> str:
        """Why the user may not do this; empty if it may."""
        permissions = self._permissions.get(user)
        if permissions is None or permissions.allow(operation, name):
            return ""
        return f"ACCESS_REFUSED - {operation} access to '{name}' refused for user '{user}'"

    def permitted(self, user: str, operation: Operation, name: str) -> None:
        """Raises AccessRefused."""
        if words := self.forbidden(user, operation, name):
            raise AccessRefused(f"the broker account lacks a permission: {words}")

    def declare(self, declarations: Declarations) -> None:
        with self.changed:
            for exchange in declarations.exchanges:
                if self._exchanges.setdefault(exchange.name, exchange) != exchange:
                    raise UserError(f"exchange {exchange.name} is there with other arguments; take another namespace")
            for queue in declarations.queues:
                if self._queues.setdefault(queue.name, _Queue(queue)).declared != queue:
                    raise UserError(f"queue {queue.name} is there with other arguments; take another namespace")
            for binding in declarations.bindings:
                self._bindings.add(binding)

    def delete_queue(self, name: str) -> None:
        with self.changed:
            if (queue := self._queues.pop(name, None)) is not None:
                queue.gone = True
            self._bindings.drop(name)

    def find(self, name: str) -> _Queue | None:
        """The queue or stream of this name, if it is declared."""
        return self._queues.get(name)

    def queue(self, name: str) -> _Queue:
        """Raises BrokerUnavailable for a queue that nobody has declared."""
        found = self.find(name)
        if found is None:
            raise BrokerUnavailable(f"there is no queue {name}")
        return found

    def publish(self, publication: Publication, user: str) -> None:
        """Into every queue that a binding leads to, or into none: a full one rejects the publish as a whole."""
        with self.changed:
            self.permitted(user, "write", publication.exchange)
            if (claimed := publication.user_id) not in (None, user):
                raise Unpublishable(
                    f"the broker does not take this message: PRECONDITION_FAILED - user_id property set to '{claimed}' "
                    f"but authenticated user was '{user}'"
                )
            if self.max_body_bytes is not None and len(publication.body) > self.max_body_bytes:
                raise Unpublishable(
                    f"the broker does not take this message: its {len(publication.body)} bytes are larger than "
                    f"the configured {self.max_body_bytes}"
                )
            exchange = self._exchanges.get(publication.exchange)
            if exchange is None:
                raise Unroutable(f"there is no exchange {publication.exchange}")
            names = self._bindings.queues(exchange, publication.routing_key)
            if not names and publication.mandatory:
                raise Unroutable(f"no queue takes {publication.routing_key!r} of {publication.exchange}")
            queues = [self._queues[name] for name in sorted(names)]
            for queue in queues:
                full = queue.declared.max_bytes is not None and queue.bytes >= queue.declared.max_bytes
                if full and queue.declared.overflow == "reject-publish":
                    raise PublishRejected(f"queue {queue.declared.name} is full")
            for queue in queues:
                queue.ready.append(_Message(publication, user, self.clock(), queue.next_offset))
                queue.next_offset += 1
                queue.bytes += len(publication.body)
                self._trim(queue)
            self.changed.notify_all()

    def stream_index(self, name: str, start: StreamPosition) -> int:
        """The offset that reading from `start` begins with; one below what is kept is moved up to it, silently."""
        queue = self.queue(name)
        lowest = queue.ready[0].offset if queue.ready else queue.next_offset
        match start:
            case "first":
                return lowest
            case "last":
                return max(lowest, queue.next_offset - 1)
            case "next":
                return queue.next_offset
            case Timestamp():
                later = (message.offset for message in queue.ready if message.timestamp >= start.seconds)
                return next(later, queue.next_offset)
            case int():
                return max(lowest, start)

    def _trim(self, queue: _Queue) -> None:
        limit, drops = (
            queue.declared.max_bytes,
            queue.declared.kind == "stream" or queue.declared.overflow == "drop-head",
        )
        while drops and limit is not None and queue.bytes > limit and len(queue.ready) > 1:
            queue.bytes -= queue.ready.popleft().size


class MemoryBroker:
    """One party's connection. Its deliveries come on one thread of its own; without `threaded`, when its owner calls
    `deliver`."""

    def __init__(
        self,
        server: MemoryServer,
        *,
        user: str,
        dead_letters: str,
        threaded: bool = True,
        refusal_patience: float = 30.0,
    ) -> None:
        """`refusal_patience`: seconds that a consumer may be refused before `status` calls it final."""
        self._server = server
        self._user = user
        self._dead_letters = dead_letters
        self._subscriptions: list[MemorySubscription] = []
        self._problems = Problems(refusal_patience)
        self._closed = False
        self._bytes_out = 0
        self._bytes_in = 0
        self._status = BrokerStatus(connected=True, blocked=None, reconnects=0, bytes_out=0, bytes_in=0)
        self._thread = threading.Thread(target=self._dispatch, name=f"memory-broker-{user}", daemon=True)
        if threaded:
            self._thread.start()

    def declare(self, declarations: Declarations) -> None:
        self._problems.check()
        if declarations.made:
            for queue in declarations.queues:
                if self._server.find(queue.name) is None:
                    raise not_made(f"there is no queue {queue.name}")
            return
        for exchange in declarations.exchanges:
            self._server.permitted(self._user, "configure", exchange.name)
        for queue in declarations.queues:
            self._server.permitted(self._user, "configure", queue.name)
        self._server.declare(declarations)

    def delete_queue(self, name: str) -> None:
        self._server.delete_queue(name)

    def publish(self, *publications: Publication, timeout: float = 60.0) -> None:
        if self._closed:
            raise BrokerUnavailable("the connection is closed")
        self._problems.check()
        without_queue: Unroutable | None = None
        for publication in publications:
            try:
                self._server.publish(publication, self._user)
                self._bytes_out += len(publication.body)
            except Unroutable as error:
                without_queue = without_queue or error
        if without_queue is not None:
            raise without_queue

    def consume(self, queue: str, on_delivery: OnDelivery, *, prefetch: int) -> MemorySubscription:
        return self._subscribe(MemorySubscription(self._server, queue, on_delivery, prefetch, None))

    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, start: StreamPosition, prefetch: int = 16
    ) -> MemorySubscription:
        with self._server.changed:
            position = self._server.stream_index(stream, start)
            return self._subscribe(MemorySubscription(self._server, stream, on_delivery, prefetch, position))

    def stream_end(self, stream: str) -> int | None:
        with self._server.changed:
            found = self._server.find(stream)
            return found.next_offset if found is not None and found.ready else None

    def ack(self, *deliveries: Delivery) -> None:
        with self._server.changed:
            for delivery in deliveries:
                subscription, tag = cast(tuple[MemorySubscription, int], delivery.handle)
                subscription.unacked.pop(tag, None)
            self._server.changed.notify_all()

    def dead_letter(self, delivery: Delivery, reason: str, detail: str) -> None:
        self.publish(dead_letter(self._dead_letters, delivery, reason, detail))
        self.ack(delivery)

    def lock(self, name: str, on_lost: Callable[[], None]) -> None:
        self._problems.check()
        self._server.permitted(self._user, "configure", name)
        with self._server.changed:
            holder = self._server.locks.setdefault(name, Holder(self, f"user {self._user}, {this_process()}", on_lost))
            if holder.broker is not self:
                raise LockHeld(
                    f"{name} is held by another connection ({holder.name}): it is running already; "
                    "stop that one, or use another id or --namespace"
                )

    def lose_locks(self) -> None:
        """Lose all locks, as a connection does that was away for too long."""
        with self._server.changed:
            lost = [holder for holder in self._server.locks.values() if holder.broker is self]
            self._server.locks = {name: by for name, by in self._server.locks.items() if by.broker is not self}
        for holder in lost:
            holder.on_lost()

    def status(self) -> BrokerStatus:
        problems, before = self._problems, self._status
        quiet = not (self._closed or problems.exist or before.problem)
        if quiet and before.bytes_out == self._bytes_out and before.bytes_in == self._bytes_in:
            return before  # whoever trains looks before each step
        self._status = BrokerStatus(
            connected=not self._closed,
            blocked=None,
            reconnects=0,
            bytes_out=self._bytes_out,
            bytes_in=self._bytes_in,
            problem=problems.problem,
            refused=problems.refused,
            failed=problems.failed,
        )
        return self._status

    def close(self) -> None:
        with self._server.changed:
            self._closed = True
            for subscription in self._subscriptions:
                subscription.close()
            self._server.locks = {name: by for name, by in self._server.locks.items() if by.broker is not self}
            self._server.changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def deliver(self) -> bool:
        """Hand over one message of each subscription that has one ready; whether any had. Callbacks run outside the
        lock."""
        ready, closed = [], False
        with self._server.changed:
            is_open = self._server.open
            for each in self._subscriptions:
                closed |= each.closed
                if is_open and each.is_idle:
                    continue  # most are, and whoever has many parties asks often
                if self._is_usable(each) and (delivery := each.take()) is not None:
                    ready.append((each, delivery))
            if closed:
                self._subscriptions = [each for each in self._subscriptions if not each.closed]
        for subscription, delivery in ready:
            self._bytes_in += len(delivery.body)
            try:
                subscription.on_delivery(delivery)
            except Exception as error:  # a callback may raise anything; the other consumers have no part in it
                subscription.close()
                self._problems.fail(f"the consumer of {subscription.queue}", error)
        return bool(ready)

    def _subscribe(self, subscription: MemorySubscription) -> MemorySubscription:
        with self._server.changed:
            self._subscriptions.append(subscription)
            self._server.changed.notify_all()
        return subscription

    def _dispatch(self) -> None:
        try:
            while not self._closed:
                if not self.deliver():
                    self._wait()
        except Exception as error:  # without this thread nothing arrives any more: whatever it is, the party must know
            self._problems.fail("the embedded broker's dispatcher", error)

    def _wait(self) -> None:
        """Wait until something has changed. Returns at once if something is ready already."""
        with self._server.changed:
            usable = [each for each in self._subscriptions if self._is_usable(each)]
            if not self._closed and not any(each.has_ready() for each in usable):
                self._server.changed.wait(None if len(usable) == len(self._subscriptions) else _RETRY_SECONDS)

    def _is_usable(self, subscription: MemorySubscription) -> bool:
        """Whether there is such a queue and the user may read it; what hinders is shown in the status."""
        name = subscription.queue
        forbidden = self._server.forbidden(self._user, "read", name)
        if subscription.closed or (not forbidden and self._server.find(name) is not None):
            self._problems.over(f"queue {name}")
        elif forbidden:
            words = f"the broker account lacks a permission: {forbidden}"
            self._problems.note(f"queue {name}", words, refusal=True)
            return False
        else:
            self._problems.note(f"queue {name}", f"there is no queue {name}", quiet=_QUIET_SECONDS)
            return False
        return not subscription.closed


class MemorySubscription:
    """A consumer of a queue, or a reader of a stream from `position`."""

    def __init__(
        self, server: MemoryServer, queue: str, on_delivery: OnDelivery, prefetch: int, position: int | None
    ) -> None:
        self.queue = queue
        self.on_delivery = on_delivery
        self.closed = self._stopped = False
        self.unacked: dict[int, _Message] = {}
        self._server = server
        #: The queue as it was found last.
        self._found: _Queue | None = None
        self._prefetch = prefetch
        self._position = position
        self._tags = itertools.count()

    @property
    def is_idle(self) -> bool:
        """Whether its queue is there, as it was when it was looked at last, and nothing is in it."""
        queue = self._found
        return queue is not None and not queue.ready and not queue.gone

    def has_ready(self) -> bool:
        """Whether `take` would give one; the server's lock is held."""
        return self._with_ready() is not None

    def _with_ready(self) -> _Queue | None:
        """The queue, if there is something in it and prefetch allows one more."""
        queue = self._found = self._server.find(self.queue)
        if queue is None or not queue.ready or self.closed or self._stopped or len(self.unacked) >= self._prefetch:
            return None
        ready = self._position is None or max(self._position, queue.ready[0].offset) < queue.next_offset
        return queue if ready else None

    def take(self) -> Delivery | None:
        """The next delivery, if prefetch allows one; the server's lock is held."""
        if (queue := self._with_ready()) is None:
            return None
        message = self._next(queue)
        tag = next(self._tags)
        self.unacked[tag] = message
        publication = message.publication
        return Delivery(
            queue=self.queue,
            exchange=publication.exchange,
            routing_key=publication.routing_key,
            body=publication.body,
            headers=dict(publication.headers),
            message_id=publication.message_id,
            user_id=message.user_id,
            redelivered=message.redelivered,
            timestamp=message.timestamp,
            offset=None if self._position is None else message.offset,
            handle=(self, tag),
        )

    def stop(self) -> None:
        with self._server.changed:
            self._stopped = True

    def close(self) -> None:
        with self._server.changed:
            if not self.closed:
                self.closed = True
                self._give_back()

    def reopen(self) -> None:
        """The channel broke and is open again: what was unacked comes again."""
        with self._server.changed:
            if not self.closed:
                self._give_back()

    def move(self, server: MemoryServer) -> None:
        """To another server, one that has lost its disk: what was unacked is gone."""
        self._server, self._found = server, None
        self.unacked.clear()

    def _give_back(self) -> None:
        queue = self._server.find(self.queue)
        if self._position is None and queue is not None:
            for message in reversed(self.unacked.values()):
                message.redelivered = True
                queue.ready.appendleft(message)
                queue.bytes += message.size
        self.unacked.clear()
        self._server.changed.notify_all()

    def _next(self, queue: _Queue) -> _Message:
        if self._position is None:
            message = queue.ready.popleft()
            queue.bytes -= message.size
            return message
        message = queue.ready[max(self._position, queue.ready[0].offset) - queue.ready[0].offset]
        self._position = message.offset + 1
        return message
