"""Where every party has an account of its own: nobody speaks for another, and some things are for operators alone."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import msgpack
import pytest
import structlog
import torch
from pydantic import SecretStr

from common.brokers.memory import MemoryBroker, MemoryServer
from common.clock import VirtualClock
from common.config import BrokerConfig
from common.errors import Poison, UserError
from common.numbers.encodings import encode_vector
from common.wire.accounts import command_name
from common.wire.assets import asset_entry, publish_asset
from common.wire.base import Message
from common.wire.bounds import REPORT
from common.wire.broker import Delivery, Publication
from common.wire.codec import encode, received
from common.wire.messages import ToMaster
from common.wire.to_master import (
    AskStatus,
    Change,
    Continue,
    FetchAssets,
    Get,
    InstructionAck,
    Join,
    Stop,
    UpdateChunk,
    UpdateManifest,
)
from common.wire.to_node import (
    Answer,
    Finish,
    Introduce,
    Notice,
    Pulse,
    Receipt,
    Resend,
    Rule,
    StatusReport,
    WordsWanted,
)
from common.wire.topology import Topology
from common.wire.update_rule import UpdateRule
from common.wire.versions import publish_version
from deploy.commands.observe import Observer, operator
from deploy.config import Config
from master_service.config import MasterConfig
from master_service.wire.inbox import understood
from tests.builders import update_chunks, update_manifest
from tests.unit.common.test_every_field import good
from tests.unit.stepped import (
    ACCOUNTS,
    DIGEST,
    LAYOUT,
    TOPOLOGY,
    HandMaster,
    SteppedMaster,
    SteppedNode,
    account,
    connection,
    instruction,
    sent_to,
    together,
)

COMMAND = command_name("alice", "0123abcd")


@pytest.fixture
def server() -> MemoryServer:
    """With what whoever runs the broker has made for the nodes a and b, and for one command of alice's."""
    made = MemoryServer()
    administrator = connection(made, "administrator")
    administrator.declare(TOPOLOGY.master())
    for node in "a", "b":
        administrator.declare(TOPOLOGY.node(node, ("text",)))
    administrator.declare(TOPOLOGY.observer(COMMAND))
    return made


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


def master(server: MemoryServer, clock: VirtualClock, **config: Any) -> SteppedMaster:
    """Its node is let in, and the encoder that it makes runs."""
    return SteppedMaster(server, clock, broker=account(server, "master"), topology=ACCOUNTS, **config)


def say(broker: MemoryBroker, sender: str, message: Message) -> None:
    """To the master, under a routing key of this sender's."""
    kind = str(getattr(message, "kind", ""))
    exchange, key = {
        "ack": (TOPOLOGY.ack, sender),
        "update": (TOPOLOGY.update, f"{sender}.ready"),
        "chunk": (TOPOLOGY.update, f"{sender}.chunk"),
    }.get(kind, (TOPOLOGY.request, f"{sender}.{kind.removeprefix('request.')}"))
    broker.publish(Publication(exchange, key, encode(message), message_id=uuid.uuid4().hex))


def came(server: MemoryServer, queue: str) -> list[Delivery]:
    """What waits in a queue."""
    broker, found = connection(server, "looker"), list[Delivery]()
    broker.consume(queue, found.append, prefetch=1000)
    while broker.deliver():
        pass
    broker.close()
    return found


# --- the master ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in get_args(ToMaster) if kind is not UpdateChunk])
def test_whatever_one_says_in_the_name_of_another_is_set_aside(
    kind: type[Message], server: MemoryServer, clock: VirtualClock
) -> None:
    message = kind.model_validate(msgpack.unpackb(msgpack.packb(good(kind))) | {"node": "a", "sender": "a"})
    say(account(server, "b"), "a", message)
    queue = TOPOLOGY.master_updates if kind is UpdateManifest else TOPOLOGY.master_inbox
    [delivery] = came(server, queue)
    others = (None, "", "stepped", "a", "other.a", "stepped.a.b", "stepped.stepped.a", ACCOUNTS.account("a").upper())
    for user in (ACCOUNTS.account("b"), ACCOUNTS.account("master"), *others):
        with pytest.raises(Poison, match=r"taken from stepped\.a alone") as raised:
            understood(replace(delivery, user_id=user), ACCOUNTS)
        assert raised.value.reason == "account"
    assert understood(replace(delivery, user_id="stepped.a"), ACCOUNTS) == message
    assert understood(replace(delivery, user_id=None), TOPOLOGY) == message, "where accounts are open"


def test_a_name_that_looks_like_a_commands_is_nobodys_way_to_be_a_node(server: MemoryServer) -> None:
    say(account(server, "alice"), COMMAND, Join(node=COMMAND, incarnation="i", types=["text"]))
    [delivery] = came(server, TOPOLOGY.master_inbox)
    with pytest.raises(Poison, match=r"taken from stepped\.alice-0123abcd alone"):
        understood(delivery, ACCOUNTS)


def test_what_is_forged_is_set_aside_and_the_run_goes_on_without_it(server: MemoryServer, clock: VirtualClock) -> None:
    served, node = master(server, clock).start(), SteppedNode(server, clock, topology=ACCOUNTS).start()
    forger = account(server, "b")
    together(1.0, served, node)
    for message in (Join(node="a", incarnation="other", types=["text"]), Join(node="c", incarnation="i", types=[])):
        say(forger, message.node, message)
    forged = update_manifest("a", 77, of=LAYOUT, encoding="float32", encoder=next(iter(served.master.state.encoders)))
    say(forger, "a", forged)
    together(6.0, served, node)
    assert served.master.live.poison == 3 == len(came(server, TOPOLOGY.dead_letters))
    assert {each.routing_key for each in came(server, TOPOLOGY.dead_letters)} == {"account"}
    assert served.master.state.nodes.keys() == {"a"} and served.master.state.nodes["a"].incarnation == "a-first"
    assert node.node.figures.accepted >= 1 and node.node.figures.refused == 0


def test_a_chunk_of_anothers_does_not_get_into_an_update(server: MemoryServer, clock: VirtualClock) -> None:
    served, hear = master(server, clock).start(), sent_to(server, "a")
    own, forger = account(server, "a"), account(server, "b")
    say(own, "a", Join(node="a", incarnation="first", types=["text"]))
    served.turn()
    encoder = next(iter(served.master.state.encoders))
    say(own, "a", InstructionAck(node="a", incarnation="first", encoder=encoder, accepted=True, samples=10))
    served.turn()
    bodies = encode_vector(torch.ones(LAYOUT.size), "float32")
    manifest = update_manifest("a", 1, of=LAYOUT, bodies=bodies, encoding="float32", encoder=encoder)
    other = encode_vector(torch.full((LAYOUT.size,), 9.0), "float32")
    for broker, sent in (forger, other), (own, bodies):
        for chunk in update_chunks(manifest, sent):
            say(broker, "a", chunk)
    say(own, "a", manifest)
    served.run(1.0)
    assert [each.accepted for each in hear() if isinstance(each, Receipt)] == [True]
    assert [each.routing_key for each in came(server, TOPOLOGY.dead_letters)] == ["account"]


@pytest.mark.parametrize(
    ("party", "sender", "config", "refused"),
    [
        ("alice", COMMAND, {"operators": ("alice",)}, ()),
        ("alice", COMMAND, {}, (Stop, Change, Get, Continue)),
        ("alice", COMMAND, {"operators": ("bob", COMMAND)}, (Stop, Change, Get, Continue)),
        ("alice", COMMAND, {"nodes_may_request": True}, (Stop, Change)),
        ("a", "a", {"operators": ("alice",)}, (Stop, Change, Get, Continue)),
        ("a", "a", {"operators": ("alice",), "nodes_may_request": True}, (Stop, Change)),
    ],
)
def test_what_operators_may_ask_for_and_nodes_may_not(
    party: str,
    sender: str,
    config: dict[str, Any],
    refused: Sequence[type[Message]],
    server: MemoryServer,
    clock: VirtualClock,
) -> None:
    served, hear = master(server, clock, **config).start(), sent_to(server, "a")
    rows = len(list(served.journal.log.entries()))
    asked = (Get(sender=sender, encoder_type="text"), Continue(sender=sender, encoder="x"), Stop(sender=sender))
    asked = (*asked, Change(sender=sender, changes={"stop.updates": 10**6}))
    for request in (*asked, AskStatus(sender=sender)):
        say(account(server, party), sender, request)
    served.turn()
    messages = hear() if sender == "a" else [decoded(each) for each in came(server, TOPOLOGY.node_inbox(sender))]
    answers = [each for each in messages if isinstance(each, Answer)]
    words = [each.detail for each in answers if "only operators" in each.detail]
    assert len(words) == len(refused) and all(f"{party} is none" in each and "\n" not in each for each in words)
    assert any(isinstance(each, StatusReport) for each in messages), "who may ask nothing else may look"
    assert len(list(served.journal.log.entries())) == rows + 4 - len(refused), "what is refused has no row"
    stopped = [encoder.stop_requested or encoder.status == "finished" for encoder in encoders(served)]
    assert all(stopped) == (Stop not in refused)


def test_where_accounts_are_open_everyone_is_everyone(server: MemoryServer, clock: VirtualClock) -> None:
    served = SteppedMaster(server, clock, operators=("alice",)).start()
    say(connection(server, "guest"), "a", Stop(sender="a"))
    served.turn()
    assert [encoder.status for encoder in encoders(served)] == ["finished"]


def encoders(served: SteppedMaster) -> list[Any]:
    return list(served.master.state.encoders.values())


def decoded(delivery: Delivery) -> Message:
    return received(delivery, REPORT)


# --- the node --------------------------------------------------------------------------------------------------------


def to_node(exchange: str, message: Message, key: str = "a") -> Publication:
    return Publication(exchange, key, encode(message))


def forgeries(encoder: str) -> list[Publication]:
    """One of each kind that a node acts upon."""
    named: dict[str, Any] = {"encoder": encoder, "published_at": 0.0}
    receipt = {"node": "a", "incarnation": "a-first", "sequence": 0, "digest": DIGEST, "encoder": encoder}
    return [
        to_node(TOPOLOGY.instruction, instruction("text-2"), "text"),
        to_node(TOPOLOGY.instruction, WordsWanted(encoder="text-3", encoder_type="text"), "text"),
        to_node(TOPOLOGY.instruction, Pulse(at=1.0, epoch=9), TOPOLOGY.pulse_key),
        to_node(TOPOLOGY.rule, Rule(node="a", update_rule=UpdateRule(wait=True), version=9, **named)),
        to_node(TOPOLOGY.receipt, Receipt(accepted=False, reason="conflict", version=0, **receipt)),
        to_node(TOPOLOGY.receipt, Resend(encoder=encoder, node="a", incarnation="a-first", sequence=0, attempt=9)),
        to_node(TOPOLOGY.receipt, Notice(version=9, digest=DIGEST, **named)),
        to_node(TOPOLOGY.receipt, Finish(encoder_type="text", version=0, digest=DIGEST, **named)),
        to_node(TOPOLOGY.receipt, Introduce(node="a")),
        to_node(TOPOLOGY.receipt, Answer(accepted=False, detail="forged")),
        Publication(TOPOLOGY.receipt, "a", b"no message at all"),
    ]


def test_a_node_hears_the_master_alone(server: MemoryServer, clock: VirtualClock) -> None:
    hand, node = HandMaster(server, clock, account(server, "master")), SteppedNode(server, clock, topology=ACCOUNTS)
    node.start()
    hand.let_in(UpdateRule())
    node.run(2.0)
    said, forged = len(hand.heard(Message)), forgeries("text-1")
    forger = account(server, "b")
    with structlog.testing.capture_logs() as logs:
        for publication in forged * 2:
            forger.publish(publication)
        connection(server, "guest").publish(forged[0])
        node.turn()
    assert node.node.figures.turned_away == 2 * len(forged) + 1
    warnings = [each for each in logs if each["log_level"] in ("warning", "error")]
    assert [each["why"].split("'")[1] for each in warnings] == ["stepped.b", "guest"], "each account once"
    assert len(hand.heard(Message)) == said and node.built == [("text-1", {})]
    assert node.training.rule == UpdateRule() and node.node.state.identity.incarnation == "a-first"
    assert came(server, TOPOLOGY.node_inbox("a")) == [] == came(server, TOPOLOGY.dead_letters)
    hand.say(Introduce(node="a"))
    node.turn()
    assert len(hand.heard(Join)) == 2, "the master is heard"


def test_a_forged_sign_of_life_does_not_hide_that_the_master_is_away(server: MemoryServer, clock: VirtualClock) -> None:
    hand = HandMaster(server, clock, account(server, "master"))
    node = SteppedNode(server, clock, topology=ACCOUNTS, away_after_seconds=5.0).start()
    hand.let_in()
    node.run(12.0)  # two updates go unanswered: it waits, then it is away
    forger, steps = account(server, "b"), node.training.steps
    for _ in range(8):
        forger.publish(to_node(TOPOLOGY.instruction, Pulse(at=clock.now(), epoch=1), TOPOLOGY.pulse_key))
        node.run(1.0)
    assert node.training.steps > steps


def test_a_version_of_anothers_is_not_read_though_nothing_else_tells_it_apart(
    server: MemoryServer, clock: VirtualClock
) -> None:
    hand, node = HandMaster(server, clock, account(server, "master")), SteppedNode(server, clock, topology=ACCOUNTS)
    node.start()
    hand.let_in()
    node.run(1.0)
    publish_version(
        account(server, "b"),
        TOPOLOGY,
        encoder="text-1",
        epoch=1,
        version=1,
        encoding="float32",
        layout_digest=LAYOUT.digest,
        bodies=encode_vector(torch.full((LAYOUT.size,), 9.0), "float32"),
        progress=0.0,
        clock=clock,
    )
    hand.say(Notice(encoder="text-1", version=1, digest=DIGEST, published_at=0.0))
    node.run(2.0)
    assert node.training.version == 0 and node.node.figures.turned_away >= 1
    hand.publish(1)
    node.run(2.0)
    assert node.training.version == 1


def test_assets_of_anothers_are_not_read_and_the_master_is_asked(server: MemoryServer, clock: VirtualClock) -> None:
    hand, node = HandMaster(server, clock, account(server, "master")), SteppedNode(server, clock, topology=ACCOUNTS)
    node.start()
    entry = asset_entry("tokenizer.json", b"words")
    hand.broker.declare(TOPOLOGY.assets("text-1", 5))
    hand.say(instruction(assets=[entry]))
    forger = account(server, "b")
    for _ in range(20):  # what is no use to anybody does not make a node wait on either
        publish_asset(forger, TOPOLOGY, "text-1", entry, b"words")
        node.run(1.0)
    assert node.built == [] and len(hand.heard(FetchAssets)) == 1
    publish_asset(hand.broker, TOPOLOGY, "text-1", entry, b"words")
    node.run(1.0)
    assert node.built == [("text-1", {"tokenizer.json": b"words"})]


# --- who asks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "name"),
    [
        ("shared-encoder.alice", "alice"),
        ("guest", "observer"),
        ("other.alice", "observer"),
        ("shared-encoder.", "observer"),
        ("x.shared-encoder.alice", "observer"),
    ],
)
def test_a_command_names_itself_after_the_account_that_it_uses(user: str, name: str) -> None:
    assert operator(asking_as(user), Topology()) == name


def test_a_name_that_leaves_no_room_for_that_of_a_command_is_said_at_once() -> None:
    assert operator(asking_as("shared-encoder." + "a" * 55), Topology()) == "a" * 55
    with pytest.raises(UserError, match="up to 55 characters"):
        operator(asking_as("shared-encoder." + "a" * 56), Topology())


def asking_as(user: str) -> Config:
    return Config(broker=BrokerConfig(url=SecretStr(f"amqp://{user}:secret@127.0.0.1/")))


def test_a_command_shows_why_it_is_refused_and_believes_the_master_alone() -> None:
    server = MemoryServer()
    connection(server, "administrator").declare(TOPOLOGY.master())
    broker = MemoryBroker(server, user=ACCOUNTS.account("alice"), dead_letters=TOPOLOGY.dead_letters)
    observer = Observer(broker, ACCOUNTS, "alice")
    for party, words in ("b", "forged"), ("master", "only operators may"):
        answer = Answer(accepted=False, detail=words)
        account(server, party).publish(to_node(TOPOLOGY.receipt, answer, observer.name))
    with pytest.raises(UserError, match="only operators may"):
        observer.status(20.0)
    assert observer.door.turned_away == 1
    observer.close()
    broker.close()


@pytest.mark.parametrize("name", ["master", "al.ice", "", "a" * 56, "-a"])
def test_who_cannot_be_an_operator(name: str) -> None:
    with pytest.raises(ValueError, match="operators"):
        MasterConfig(operators=(name,))
