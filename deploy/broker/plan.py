"""What each party may do at the broker, as data: one account for the master, one for each operator and each node. Pure.

RabbitMQ asks for three permissions, each a pattern over the names of exchanges and queues: `configure` to declare and
delete, `write` to publish to an exchange or to bind a queue, `read` to consume, to empty a queue, or to bind to an
exchange. On topic exchanges it also checks the routing key, if the account has a topic permission there; where it has
none, every key is allowed, so each exchange that somebody may write to and share with others has one here. To look
whether a queue is there (a passive declare) needs no permission. https://www.rabbitmq.com/docs/access-control
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.errors import UserError
from common.wire.topology import Declarations, Exchange, Topology, note_of, note_queue

#: Matches no name that an exchange, a queue or a key of ours has.
NOTHING = "^$"
#: What a node says to the master, by the second word of the routing key.
NODE_SAYS = ("join", "fetch", "assets", "words", "finished", "leave", "alive")
#: What it may say beside that where the master's configuration lets nodes ask for encoders.
ASKS = ("get", "update")
#: What an operator's commands say.
OPERATOR_SAYS = ("status", *ASKS, "stop", "set", "pause", "resume", "kick", "admit")
#: The two connections of a node, a short third one, and a second process that finds out that the first is running.
NODE_CONNECTIONS, NODE_CHANNELS = 8, 128

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
#: How the short-lived inboxes of an operator's commands are called: the operator's name, and this.
_COMMAND = r"-[0-9a-f]{8}"
#: So that the name of a command is no longer than any id.
_LONGEST_OPERATOR = 64 - len("-01234567")


@dataclass(frozen=True, slots=True)
class Topic:
    """Which routing keys an account may publish with to an exchange, and bind its queues by; both are patterns."""

    exchange: str
    write: str = NOTHING
    read: str = NOTHING


@dataclass(frozen=True, slots=True)
class Account:
    """What one party may do. `connections`, `channels`: at most so many at a time; None for no limit."""

    name: str
    configure: str
    write: str
    read: str
    topics: tuple[Topic, ...]
    connections: int | None = None
    channels: int | None = None

    def permits(self, action: str, name: str, key: str | None = None) -> bool:
        """As RabbitMQ decides it: `action` is configure, write or read, `key` a routing key at a topic exchange."""
        if re.search(getattr(self, action), name) is None:
            return False
        topic = next((each for each in self.topics if each.exchange == name), None)
        return topic is None or key is None or re.search(getattr(topic, action), key) is not None


def master_account(topology: Topology) -> Account:
    """It declares the exchanges, its own queues, the dead letters and the streams, and alone writes to the latter two;
    it reads the chunk queue of every node. Its aggregators, if it has any, share the account: they declare what they
    and the master talk by, and the queues of their parts of a node's updates."""
    exchanges, queues = _names(topology.master())
    exchanges, queues = [*exchanges, topology.shard], [*queues, topology.master_shards]
    own = (topology.master_lock, note_queue(topology.master_lock))
    speaks = (topology.instruction, topology.rule, topology.receipt, topology.parameter, topology.asset, topology.lock)
    hears = (topology.ack, topology.request, topology.update, topology.parameter, topology.asset, topology.lock)
    chunks, shards = _any_below(topology.chunk_queue("")), _numbered(topology.shard)
    lock = rf"{shards}\.lock"
    also = (*_streams(topology), shards, rf"{lock}\.holder", rf"{chunks}\.[0-9]+")
    return Account(
        topology.account("master"),
        configure=_only(*exchanges, topology.lock, *queues, *own, also=(*also, lock)),
        write=_only(*speaks, topology.shard, *queues, own[1], also=also),
        read=_only(*hears, topology.shard, *queues, own[1], also=(*also, chunks)),
        topics=(Topic(topology.lock, *2 * (_only(topology.master_lock, also=(lock,)),)),),
    )


def node_account(topology: Topology, node: str, *, may_request: bool = False) -> Account:
    """It declares its lock and nothing else; it says what a node says, with its own name in the key; and it reads its
    own queues and the streams. Raises UserError for a name that no node may have."""
    check_node(node)
    lock = topology.node_lock(node)
    says = (*NODE_SAYS, *ASKS) if may_request else NODE_SAYS
    return Account(
        topology.account(node),
        configure=_only(lock),
        write=_only(topology.ack, topology.request, topology.update, topology.lock),
        read=_only(topology.node_inbox(node), topology.pulse_queue(node), note_queue(lock), also=_streams(topology)),
        topics=(
            Topic(topology.ack, _only(node)),
            Topic(topology.request, _only(*(f"{node}.{word}" for word in says))),
            Topic(topology.update, _only(f"{node}.chunk", f"{node}.ready", also=(_numbered(f"{node}.chunk"),))),
            Topic(topology.lock, _only(lock)),
        ),
        connections=NODE_CONNECTIONS,
        channels=NODE_CHANNELS,
    )


def leaving_account(topology: Topology, node: str) -> Account:
    """What is left of a node's account while it is removed: to say that it leaves."""
    return Account(
        topology.account(node),
        configure=NOTHING,
        write=_only(topology.request),
        read=NOTHING,
        topics=(Topic(topology.request, _only(f"{node}.join", f"{node}.leave")),),
    )


def operator_account(topology: Topology, operator: str) -> Account:
    """It declares the short-lived inboxes of its commands, asks and stops, and reads the streams for what it asked for.
    Raises UserError for a name that no operator may have."""
    check_operator(operator)
    inbox = f"{_literal(topology.node_inbox(operator).removesuffix('.inbox'))}{_COMMAND}\\.inbox"
    command = f"{_literal(operator)}{_COMMAND}"
    return Account(
        topology.account(operator),
        configure=f"^{inbox}$",
        write=_only(topology.request, also=(inbox,)),
        read=_only(topology.receipt, also=(inbox, *_streams(topology))),
        topics=(
            Topic(topology.request, f"^{command}\\.({'|'.join(OPERATOR_SAYS)})$"),
            Topic(topology.receipt, NOTHING, f"^{command}$"),
        ),
    )


def federation(topology: Topology) -> Declarations:
    """What stands at the broker before anybody comes: the exchanges and the dead letters."""
    return topology.exchanges() + Declarations((Exchange(topology.lock),))


def made_for(topology: Topology, node: str, types: tuple[str, ...]) -> Declarations:
    """What stands there before a node comes, the federation's own included."""
    return federation(topology) + topology.node_queues(node, types) + note_of(topology.node_lock(node), topology.lock)


def queues_of(topology: Topology, node: str) -> list[str]:
    """What a node leaves behind, and a lock that it may have declared as a queue that stays."""
    made = topology.node_queues(node, ()) + note_of(topology.node_lock(node), topology.lock)
    return [*(queue.name for queue in made.queues), topology.node_lock(node)]


def check_node(name: str) -> None:
    """Raises UserError for a name that cannot be a node's, or that an operator's commands could have."""
    _check("node", name)
    if re.search(_COMMAND + "$", name):
        raise UserError(f"node {name!r}: a name that ends so is one of an operator's commands; use another")


def check_operator(name: str) -> None:
    """Raises UserError for a name that cannot be an operator's."""
    _check("operator", name)
    if len(name) > _LONGEST_OPERATOR:
        raise UserError(f"operator {name!r}: use at most {_LONGEST_OPERATOR} letters")


def _check(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"{what} {name!r}: use up to 64 letters, digits, - and _, starting with a letter or digit")
    if name == "master":
        raise UserError(f"{what} {name!r}: that is the master's account; use another name")


def _names(declarations: Declarations) -> tuple[list[str], list[str]]:
    return [each.name for each in declarations.exchanges], [each.name for each in declarations.queues]


def _streams(topology: Topology) -> tuple[str, str]:
    return _any_below(topology.stream("")), _any_below(topology.asset_stream(""))


def _any_below(prefix: str) -> str:
    """A pattern for the names that go on behind this with one word."""
    return f"{_literal(prefix)}[^.]+"


def _numbered(prefix: str) -> str:
    """The same where that word is a number."""
    return f"{_literal(prefix)}\\.[0-9]+"


def _only(*names: str, also: tuple[str, ...] = ()) -> str:
    """A pattern for exactly these names, and for what the patterns of `also` match."""
    each = [*dict.fromkeys(_literal(name) for name in names), *also]
    return f"^{each[0]}$" if len(each) == 1 else f"^({'|'.join(each)})$"


def _literal(name: str) -> str:
    """Names have letters, digits, - and _, which mean themselves, and dots."""
    return name.replace(".", r"\.")
