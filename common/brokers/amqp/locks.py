"""Locks: exclusive queues, which live as long as a link's connection, and notes of who holds them. Knows no driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from common.brokers.amqp.arguments import queue_arguments
from common.brokers.amqp.link import Link
from common.clock import SYSTEM
from common.errors import LockHeld, SharedEncoderError, UserError
from common.locks import this_process
from common.wire.topology import note_of, note_queue

log = structlog.get_logger()

#: How long to retry a lock that another connection holds: a predecessor may be closing, or writing its note.
REFUSAL_SECONDS = 3.0

#: A method of a channel with its arguments, which lacks only the `callback` for the broker's answer.
Step = Callable[..., object]
#: In the link's thread: run one step after the other on a channel of their own, then set the future.
InTurn = Callable[[Callable[[Any], Iterable[Step]], Future[None]], None]


@dataclass(frozen=True, slots=True)
class _Lock:
    """A lock that this connection holds, and what its note says of the holder."""

    on_lost: Callable[[], None]
    note: str


class Locks:
    """What one party holds. Whoever may not wait is told at once who has it; after a reconnect it is waited for."""

    def __init__(
        self,
        link: Link,
        in_turn: InTurn,
        short_connection: Callable[[], AbstractContextManager[Any]],
        properties: Callable[[], Any],
        *,
        notes: str,
        makes_notes: bool,
        patience: float,
    ) -> None:
        """`notes`: the exchange for the holders' notes, or none are left; `makes_notes`: whether their queues are this
        party's to declare. `patience`: seconds after which a lock that is not free again is another's, and lost."""
        self._link = link
        self._in_turn = in_turn
        self._short_connection = short_connection
        self._properties = properties
        self._notes = notes
        self._makes_notes = makes_notes
        self._patience = patience
        self._held: dict[str, _Lock] = {}
        self._lost_at = 0.0
        self._lost = False

    def take(self, name: str, on_lost: Callable[[], None]) -> None:
        """Raises LockHeld, which names the holder as far as is known."""
        lock = _Lock(on_lost, this_process())

        def take(taken: Future[None]) -> None:
            # kept in the link's own thread: no reconnect can come between taking it and taking it again
            taken.add_done_callback(lambda done: None if done.exception() else self._held.update({name: lock}))
            self._acquire(name, taken)

        deadline = SYSTEM.monotonic() + REFUSAL_SECONDS
        while True:
            try:
                self._link.call(take)
                break
            except LockHeld:
                if SYSTEM.monotonic() > deadline:
                    raise LockHeld(
                        f"{name} is held by another connection{self._read_note(name)}: it is running already, here or "
                        "elsewhere; stop that one, or use another id or --namespace"
                    ) from None
                SYSTEM.wait(0.3)
        self._leave_note(name, lock.note)

    def take_again(self, then: Callable[[], None]) -> None:
        """In the link's thread, after a reconnect: take every lock again, then call `then`. If another has taken one
        over while the connection was away, the lock's owner is told instead, and ends."""
        self._lost_at = SYSTEM.monotonic() + self._patience
        self._take_again(list(self._held), then)

    def release_notes(self) -> None:
        """Remove our notes. To be called before the locks are released, or it could remove a successor's note."""
        if not self._held or not self._notes or not self._link.connected:
            return

        def removing(channel: Any) -> Iterable[Step]:
            remove = channel.queue_delete if self._makes_notes else channel.queue_purge
            return (partial(remove, note_queue(name)) for name in list(self._held))

        try:
            self._link.call(partial(self._in_turn, removing), timeout=3.0)
        except SharedEncoderError as error:
            log.debug("a note of a lock stays behind", problem=str(error))

    def _take_again(self, names: list[str], then: Callable[[], None]) -> None:
        if self._lost:
            return  # until its owner has ended a further reconnect must not bring it back to work
        if not names:
            then()
            return
        name, *others = names
        taken: Future[None] = Future()

        def done(future: Future[None]) -> None:
            if not self._link.connection.is_open:
                return  # the next opening begins again
            error = future.exception()
            if error is None:
                self._link.problems.over(f"lock {name}")
                # another may have held it meanwhile and left its note; to write ours may take long
                note = self._held[name].note
                threading.Thread(target=self._leave_note, args=(name, note), name="amqp-note", daemon=True).start()
                self._take_again(others, then)
            elif isinstance(error, LockHeld) and SYSTEM.monotonic() >= self._lost_at:
                self._lose(name)
            else:
                self._link.problems.note(f"lock {name}", str(error), refusal=isinstance(error, UserError))
                self._link.connection.ioloop.call_later(1.0, lambda: self._take_again(names, then))

        self._link.after(taken, done)
        self._acquire(name, taken)

    def _lose(self, name: str) -> None:
        self._lost = True
        self._link.problems.note(f"lock {name}", f"{name} is held by another connection, which took it over")
        try:
            self._held.pop(name).on_lost()
        except Exception as error:  # a callback may raise anything; its owner must learn of it all the same
            self._link.problems.fail(f"telling of the lost lock {name}", error)

    def _acquire(self, name: str, taken: Future[None]) -> None:
        """In the link's thread: declare the exclusive queue. It lasts as long as the connection, not the channel."""
        options = {"exclusive": True, "arguments": {"x-queue-type": "classic"}}
        self._in_turn(lambda channel: [partial(channel.queue_declare, name, **options)], taken)

    # --- the notes: they help who is refused, and nothing depends on them ---------------------------------------------

    def _leave_note(self, name: str, text: str) -> None:
        """Over a connection of its own: a publish on the consuming one would stop its acks under an alarm.

        Emptied first, which an alarm does not stop: better no note than the predecessor's. The note goes by a topic
        exchange: who may write to the default one reaches every queue there is.
        """
        if not self._notes:
            return
        try:
            with self._short_connection() as connection:
                channel = connection.channel()
                channel.confirm_delivery()
                if self._makes_notes:
                    self._make_note(channel, name)
                channel.queue_purge(note_queue(name))
                channel.basic_publish(self._notes, name, text.encode(), self._properties())
        except SharedEncoderError as error:
            log.debug("no note of who holds the lock", lock=name, problem=str(error))
        except Exception:  # nothing depends on a note: neither the lock nor the thread that writes it
            log.warning("no note of who holds the lock", lock=name, exc_info=True)

    def _make_note(self, channel: Any, name: str) -> None:
        """The queue is deleted with the lock, and outlives a holder that crashed."""
        wanted = note_of(name, self._notes)
        for exchange in wanted.exchanges:
            channel.exchange_declare(exchange.name, exchange.kind, durable=True)
        for queue in wanted.queues:
            channel.queue_declare(queue.name, durable=True, arguments=queue_arguments(queue, ()))
        for binding in wanted.bindings:
            channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)

    def _read_note(self, name: str) -> str:
        """Who holds a lock, as far as is known. Not acked: the note goes back when this connection closes."""
        if not self._notes:
            return ""
        try:
            with self._short_connection() as connection:
                got, properties, body = connection.channel().basic_get(note_queue(name))
        except SharedEncoderError:
            return ""
        if got is None:
            return ""
        text = f"user {properties.user_id}, {body.decode(errors='replace')}"
        return f" ({''.join(letter for letter in text if letter.isprintable())[:200]})"
