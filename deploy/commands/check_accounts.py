"""What `shared-encoder broker check` does: logs in as each party and tries what must fail. Nothing that it tries does
harm where it succeeds: what it publishes cannot be decoded, what it deletes is not there, what it reads goes back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from common.errors import AccessRefused, BrokerUnavailable, LockHeld, PublishRejected, Unroutable, UserError
from common.wire.broker import Broker, Delivery, Publication
from common.wire.topology import Declarations, Queue, Topology
from deploy.broker.credentials import Credentials, read, settings, with_account
from deploy.commands.run import connect, topology_of
from deploy.config import load_config
from deploy.logging import configure_logging

#: How long a consumer may take to be refused, seconds.
REFUSED_WITHIN = 5.0
#: Of whom no credentials are given there may be none; what is tried on them is refused all the same.
_SOMEBODY = "somebody-else"

Act = Callable[[Broker], None]


@dataclass(frozen=True, slots=True)
class Try:
    """Something that must be refused. `act` raises AccessRefused if it is."""

    what: str
    act: Act


def check(files: list[Path]) -> bool:
    """Print a line for each try; whether all were refused. Raises UserError, BrokerUnavailable, AccessRefused for a
    party that does not get in at all."""
    configure_logging(level="error")  # of what is refused each line of ours says it
    parties = [read(file) for file in files]
    nodes = [each.party for each in parties if each.role == "node"]
    allowed = 0
    for whose, name, refused, words in _all_tried(parties, nodes):
        allowed += not refused
        print(f"{whose}: {name}: {'refused' if refused else 'ALLOWED'}{f' ({words})' if words else ''}")
    print("nothing is allowed that must not be" if not allowed else f"{allowed} of these must not be allowed")
    return not allowed


def _all_tried(parties: list[Credentials], nodes: list[str]) -> Iterator[tuple[str, str, bool, str]]:
    for credentials in parties:
        for what, refused, words in _tried(credentials, nodes):
            yield credentials.party, what, refused, words
    brokers = {with_account(each.urls[0], "guest", "guest"): each for each in parties}
    for url, each in brokers.items():
        # the account of who logs in by certificate is not in its URL
        section = {name: value for name, value in each.broker.items() if name != "account"}
        yield "anybody", "log in as guest with the password guest", *_guest(replace(each, urls=(url,), broker=section))


def _tried(credentials: Credentials, nodes: list[str]) -> Iterator[tuple[str, bool, str]]:
    config = load_config(None, {"broker": settings(credentials)})
    topology = topology_of(config)
    others = [node for node in nodes if node != credentials.party] or [_SOMEBODY]
    broker = connect(config, topology, "check")
    try:
        for each in tries(credentials, topology, others):
            yield each.what, *_refused(each, broker)
    finally:
        broker.close()


def _refused(each: Try, broker: Broker) -> tuple[bool, str]:
    try:
        each.act(broker)
    except AccessRefused:
        return True, ""
    except (LockHeld, PublishRejected, Unroutable, BrokerUnavailable, UserError) as error:
        return False, str(error)  # let through by its permissions, and stopped by something else
    return False, ""


def _guest(credentials: Credentials) -> tuple[bool, str]:
    config = load_config(None, {"broker": settings(credentials)})
    try:
        connect(config, topology_of(config), "check").close()
    except AccessRefused:
        return True, ""
    return False, "everyone can be everyone: rabbitmqctl delete_user guest"


def tries(credentials: Credentials, topology: Topology, others: list[str]) -> list[Try]:
    """What this party must not be able to do. `others`: nodes whose queues and keys are tried."""
    me = credentials.party if credentials.role == "node" else f"{credentials.party}-{secrets.token_hex(4)}"
    found: list[Try] = []
    for other in others:
        found += [
            *_reading(
                {"the inbox": topology.node_inbox(other), "the signs of life": topology.pulse_queue(other)}, other
            ),
            _publishing(f"send an update as {other}", topology.update, f"{other}.ready"),
            _publishing(f"send a request as {other}", topology.request, f"{other}.leave"),
            _publishing(f"acknowledge as {other}", topology.ack, other),
            _locking(f"take the lock of {other}", topology.node_lock(other)),
            _declaring(f"declare in the name of {other}", f"{topology.node_inbox(other)}.check"),
            _deleting(f"delete in the name of {other}", f"{topology.node_inbox(other)}.check"),
        ]
        if credentials.role != "master":
            found += _reading({"the chunks": topology.chunk_queue(other)}, other)
    found += [
        _publishing("publish by the default exchange", "", topology.master_inbox),
        _declaring("declare what is nobody's", "check-of-permissions"),
    ]
    if credentials.role != "master":
        inboxes = {"the inbox": topology.master_inbox, "the updates": topology.master_updates}
        found += [
            *_reading({**inboxes, "the dead letters": topology.dead_letters}, "the master"),
            _publishing("write to the dead letters", topology.dead_letters, "invalid"),
            _publishing("publish a version", topology.parameter, "text-1"),
            _publishing("publish an asset", topology.asset, "text-1"),
            _publishing("give an instruction", topology.instruction, "text"),
            _publishing("give a rule", topology.rule, others[0]),
            _publishing("give a receipt", topology.receipt, others[0]),
            _locking("take the master's lock", topology.master_lock),
            _deleting("delete a stream", topology.stream("check-of-permissions")),
        ]
    if credentials.role == "node":
        found += [_publishing("stop a training", topology.request, f"{me}.stop")]
    return found


def _nothing() -> None:
    """A lock that was taken by mistake goes with its connection."""


def _publishing(what: str, exchange: str, key: str) -> Try:
    return Try(what, lambda broker: broker.publish(Publication(exchange, key, b"", mandatory=False), timeout=10.0))


def _locking(what: str, name: str) -> Try:
    return Try(what, lambda broker: broker.lock(name, _nothing))


def _declaring(what: str, name: str) -> Try:
    declarations = Declarations(queues=(Queue(name, "classic", expires=10.0),))
    return Try(what, lambda broker: broker.declare(declarations))


def _deleting(what: str, name: str) -> Try:
    return Try(what, lambda broker: broker.delete_queue(name))


def _reading(queues: dict[str, str], whose: str) -> list[Try]:
    return [Try(f"read {what} of {whose}", partial(_read, queue=name)) for what, name in queues.items()]


def _read(broker: Broker, queue: str) -> None:
    """Raises AccessRefused; returns if messages could be taken. They go back when the consumer closes."""
    taken: list[Delivery] = []
    subscription = broker.consume(queue, taken.append, prefetch=1)
    deadline = time.monotonic() + REFUSED_WITHIN
    try:
        while not taken and time.monotonic() < deadline:
            if "refused for user" in (problem := broker.status().problem):
                raise AccessRefused(problem)
            time.sleep(0.05)
    finally:
        subscription.close()
