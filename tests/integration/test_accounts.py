"""Accounts at a real RabbitMQ, as `broker init` and `add-node` make them: what a node cannot do to the others, whatever
it tries, and a federation that does all it has to."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.exceptions import AMQPError, ChannelClosedByBroker

from common.brokers import open_broker
from common.errors import AccessRefused, LockHeld, UserError
from common.wire.broker import Broker, Delivery, Publication
from common.wire.topology import Topology
from deploy.broker.admin import Ctl, Management
from deploy.broker.credentials import merged, read
from deploy.commands import accounts
from deploy.commands.check_accounts import check
from deploy.commands.run import connect, topology_of
from deploy.config import load_config
from deploy.local_rabbitmq import LocalRabbitMQ
from master_service.config import MasterConfig
from master_service.decisions.settings import StopRule
from master_service.log.message_log import open_log
from master_service.service import MasterService
from node_service.config import NodeConfig
from node_service.corpus.corpus import CorpusConfig, load_corpus
from node_service.service import NodeService
from tests.integration.harness import ThreadParty, decided, eventually
from tests.integration.test_federation import lines

VHOST = "federation"
TOPOLOGY = Topology("fed", own_accounts=True)
#: An account that may do everything: what it is refused too is no matter of permissions.
ANYONE = "anyone"
EVERYTHING = {"user": ANYONE, "vhost": VHOST, "configure": ".*", "write": ".*", "read": ".*"}


@dataclass(frozen=True)
class Federation:
    """A broker with a federation's accounts: the master's, those of nodes a and b, and the operator alice's."""

    server: LocalRabbitMQ
    at: accounts.Target
    files: Path

    def file(self, party: str) -> Path:
        return self.files / f"{party}.toml"

    def connect(self, party: str, *, master: bool = False) -> Broker:
        """As the commands do with --credentials."""
        config = load_config(None, merged({}, self.file(party))[0])
        return connect(config, topology_of(config), party, master=master)

    @contextmanager
    def channel(self, party: str) -> Iterator[Any]:
        """By hand, to do what no party of ours does."""
        if party == ANYONE:
            url = self.server.url.replace("guest:guest", f"{ANYONE}:secret") + VHOST
        else:
            url = read(self.file(party)).urls[0]
        connection = pika.BlockingConnection(pika.URLParameters(url))
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            yield channel
        finally:
            if connection.is_open:
                connection.close()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    directory = tmp_path_factory.mktemp("accounts")
    # the port of its own is the management API's here
    settings = "management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = TLS_PORT\n"
    with LocalRabbitMQ(directory / "rabbitmq", settings=settings, plugins=["rabbitmq_management"]) as server:
        admin = {"name": "admin", "password": "secret", "tags": "administrator"}
        Management(f"http://guest:guest@127.0.0.1:{server.tls_port}").load({"users": [admin]})
        management = f"http://admin:secret@127.0.0.1:{server.tls_port}"
        flags = {"broker": {"url": f"amqp://127.0.0.1:{server.port}/{VHOST}", "namespace": TOPOLOGY.namespace}}
        at = accounts.target(flags, None, management=management)
        files = directory / "credentials"
        accounts.init(at, files)
        for node in "ab":
            accounts.add_node(at, node, ("text",), files)
        accounts.add_operator(at, "alice", files)
        at.admin().load({"users": [{"name": ANYONE, "password": "secret", "tags": ""}], "permissions": [EVERYTHING]})
        made = Federation(server, at, files)
        with_master = made.connect("master", master=True)
        with_master.declare(TOPOLOGY.master())
        with_master.declare(TOPOLOGY.parameters("text-1", 1))
        for party in "ab":
            with_master.declare(TOPOLOGY.shard_chunks(party, 2))
        with_master.declare(TOPOLOGY.shards(2))
        with_master.close()
        yield made


def reading(name: str) -> Callable[[Any], Any]:
    return lambda channel: channel.basic_get(name)


def publishing(exchange: str, key: str, user: str | None = None) -> Callable[[Any], Any]:
    return lambda channel: channel.basic_publish(exchange, key, b"x", pika.BasicProperties(user_id=user))


INBOX, MASTER_INBOX, MASTER_LOCK = TOPOLOGY.node_inbox("b"), TOPOLOGY.master_inbox, TOPOLOGY.master_lock
STREAM = TOPOLOGY.stream("text-1")

#: What node a tries, the code with which RabbitMQ refuses it, and a word of its reason.
ATTACKS: dict[str, tuple[Callable[[Any], Any], int, str]] = {
    "read b's inbox": (reading(INBOX), 403, "queue 'fed.node.b.inbox'"),
    "read the master's signs of life to b": (reading(TOPOLOGY.pulse_queue("b")), 403, "queue 'fed.node.b.pulse'"),
    "read b's updates": (reading(TOPOLOGY.chunk_queue("b")), 403, "queue 'fed.update.b'"),
    "read its part of b's updates": (reading(TOPOLOGY.chunk_queue("b", 0)), 403, "queue 'fed.update.b.1'"),
    "read what an aggregator is told": (reading(TOPOLOGY.shard_queue(0)), 403, "queue 'fed.shard.1'"),
    "tell an aggregator": (publishing(TOPOLOGY.shard, "to.1"), 403, "exchange 'fed.shard'"),
    "send a part as b": (publishing(TOPOLOGY.update, "b.chunk.1"), 403, "topic 'b.chunk.1'"),
    "take back what it has sent": (reading(TOPOLOGY.chunk_queue("a")), 403, "queue 'fed.update.a'"),
    "read the master's inbox": (reading(TOPOLOGY.master_inbox), 403, "queue 'fed.master.inbox'"),
    "read everybody's manifests": (reading(TOPOLOGY.master_updates), 403, "queue 'fed.master.updates'"),
    "read the dead letters": (reading(TOPOLOGY.dead_letters), 403, "queue 'fed.dead-letters'"),
    "empty b's inbox": (lambda channel: channel.queue_purge(INBOX), 403, "queue 'fed.node.b.inbox'"),
    "send an update as b": (publishing(TOPOLOGY.update, "b.ready"), 403, "topic 'b.ready'"),
    "send chunks as b": (publishing(TOPOLOGY.update, "b.chunk"), 403, "topic 'b.chunk'"),
    "let b leave": (publishing(TOPOLOGY.request, "b.leave"), 403, "topic 'b.leave'"),
    "acknowledge as b": (publishing(TOPOLOGY.ack, "b"), 403, "topic 'b'"),
    "say that it is b's account": (publishing(TOPOLOGY.request, "a.leave", "fed.b"), 406, "user_id"),
    "publish to the master's inbox by the default exchange": (publishing("", MASTER_INBOX), 403, "amq.default"),
    "publish to b's inbox by the default exchange": (publishing("", INBOX), 403, "amq.default"),
    "leave a note on the master's lock": (publishing(TOPOLOGY.lock, MASTER_LOCK), 403, "topic 'fed.master.lock'"),
    "declare a queue of its own": (lambda channel: channel.queue_declare("mine"), 403, "queue 'mine'"),
    "declare an exchange": (lambda channel: channel.exchange_declare("fed.mine", "fanout"), 403, "exchange 'fed.mine'"),
    "bind its inbox to what others say": (
        lambda channel: channel.queue_bind(TOPOLOGY.node_inbox("a"), TOPOLOGY.update, "#"),
        403,
        "queue 'fed.node.a.inbox'",
    ),
    "hear others by its lock": (
        lambda channel: (
            channel.queue_declare(TOPOLOGY.node_lock("a"), exclusive=True),
            channel.queue_bind(TOPOLOGY.node_lock("a"), TOPOLOGY.request, "#"),
        ),
        403,
        "queue 'fed.node.a.lock'",
    ),
    "pass messages on by dead-lettering": (
        lambda channel: channel.queue_declare(
            TOPOLOGY.node_lock("a"), arguments={"x-dead-letter-exchange": TOPOLOGY.request}
        ),
        403,
        "queue 'fed.node.a.lock'",
    ),
    "delete b's inbox": (lambda channel: channel.queue_delete(INBOX), 403, "queue 'fed.node.b.inbox'"),
    "delete a stream": (lambda channel: channel.queue_delete(STREAM), 403, "'fed.parameters.text-1'"),
    "delete an exchange": (lambda channel: channel.exchange_delete(TOPOLOGY.rule), 403, "exchange 'fed.rule'"),
    "hold the master's lock": (
        lambda channel: channel.queue_declare(TOPOLOGY.master_lock, exclusive=True),
        403,
        "queue 'fed.master.lock'",
    ),
    "hold b's lock": (
        lambda channel: channel.queue_declare(TOPOLOGY.node_lock("b"), exclusive=True),
        403,
        "queue 'fed.node.b.lock'",
    ),
    "stop a run": (publishing(TOPOLOGY.request, "a.stop"), 403, "topic 'a.stop'"),
    "change the rule": (publishing(TOPOLOGY.request, "a.set"), 403, "topic 'a.set'"),
    "take b out": (publishing(TOPOLOGY.request, "a.kick"), 403, "topic 'a.kick'"),
    "ask for an encoder": (publishing(TOPOLOGY.request, "a.get"), 403, "topic 'a.get'"),
    "write to the dead letters": (publishing(TOPOLOGY.dead_letters, "invalid"), 403, "exchange 'fed.dead-letters'"),
    "publish a version": (publishing(TOPOLOGY.parameter, "text-1"), 403, "exchange 'fed.parameter'"),
    "publish an asset": (publishing(TOPOLOGY.asset, "text-1"), 403, "exchange 'fed.asset'"),
    "instruct others": (publishing(TOPOLOGY.instruction, "text"), 403, "exchange 'fed.instruction'"),
    "give b a rule": (publishing(TOPOLOGY.rule, "b"), 403, "exchange 'fed.rule'"),
    "give b a receipt": (publishing(TOPOLOGY.receipt, "b"), 403, "exchange 'fed.receipt'"),
}  # fmt: skip

#: What leaves nothing behind where it succeeds: an account that may do everything is not refused it.
CONTROLLED = [name for name in ATTACKS if name.startswith(("read", "take back", "hold"))]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_node_is_refused_by_the_broker(federation: Federation, attack: str) -> None:
    act, code, words = ATTACKS[attack]
    with federation.channel("a") as channel, pytest.raises(ChannelClosedByBroker) as refused:
        act(channel)
    assert refused.value.reply_code == code and words in refused.value.reply_text
    if attack in CONTROLLED:
        with federation.channel(ANYONE) as channel:
            act(channel)  # it was the account that was refused, and nothing else


def test_a_node_has_its_lock_and_a_second_one_is_told_who_holds_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.brokers.amqp.locks.REFUSAL_SECONDS", 0.5)
    first, second = federation.connect("a"), federation.connect("a")
    try:
        first.lock(TOPOLOGY.node_lock("a"), lambda: None)
        with pytest.raises(LockHeld, match=r"held by another connection \(user fed\.a, process \d+ on "):
            second.lock(TOPOLOGY.node_lock("a"), lambda: None)
        first.close()
        with federation.channel(ANYONE) as channel:
            note = channel.queue_declare(TOPOLOGY.node_lock("a") + ".holder", passive=True)
        assert note.method.message_count == 0, "a clean end takes the note along"
        second.lock(TOPOLOGY.node_lock("a"), lambda: None)
    finally:
        first.close()
        second.close()


def test_an_aggregator_lives_by_the_masters_account_and_nodes_send_it_their_parts(federation: Federation) -> None:
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    broker, node = federation.connect("master", master=True), federation.connect("a")
    try:
        broker.lock(TOPOLOGY.shard_lock(1), lambda: None)
        broker.consume(TOPOLOGY.shard_queue(1), arrived.put, prefetch=1)
        broker.consume(TOPOLOGY.chunk_queue("a", 1), arrived.put, prefetch=1)
        broker.publish(Publication(TOPOLOGY.shard, TOPOLOGY.shard_key(1), b"order"))
        node.publish(Publication(TOPOLOGY.update, TOPOLOGY.chunk_key("a", 1), b"part"))
        found = sorted([arrived.get(timeout=10.0), arrived.get(timeout=10.0)], key=lambda delivery: delivery.body)
        assert [(each.body, each.user_id) for each in found] == [(b"order", "fed.master"), (b"part", "fed.a")]
        assert broker.status().problem == ""
    finally:
        broker.close()
        node.close()


def test_a_node_whose_queues_were_not_made_is_told_who_makes_them(federation: Federation) -> None:
    broker = federation.connect("a")
    try:
        broker.declare(TOPOLOGY.node("a", ("text",)))
        with pytest.raises(UserError, match=r"no queue 'fed\.node\.nobody\.inbox'.*broker add-node"):
            broker.declare(TOPOLOGY.node("nobody", ("text",)))
    finally:
        broker.close()


def test_a_node_sets_nothing_aside_and_goes_on(federation: Federation) -> None:
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    broker = federation.connect("a")
    try:
        broker.consume(TOPOLOGY.node_inbox("a"), arrived.put, prefetch=1)
        for body in (b"rubbish", b"next"):
            with federation.channel("master") as channel:
                channel.basic_publish(TOPOLOGY.rule, "a", body, mandatory=True)
        rubbish = arrived.get(timeout=10.0)
        broker.dead_letter(rubbish, "invalid", "it is rubbish")
        following = arrived.get(timeout=10.0)
        broker.ack(following)
        assert (rubbish.body, following.body) == (b"rubbish", b"next") and broker.status().problem == ""
    finally:
        broker.close()


def test_an_inbox_is_bounded_by_a_policy_and_the_oldest_goes_first(federation: Federation) -> None:
    accounts.init(federation.at, federation.files, inbox_length=10)
    name = TOPOLOGY.node_inbox("b")
    with federation.channel("master") as channel:
        for number in range(25):
            channel.basic_publish(TOPOLOGY.rule, "b", b"%d" % number, mandatory=True)
    with federation.channel("b") as channel:
        # quorum queues count what was dropped a moment later
        eventually(lambda: channel.queue_declare(name, passive=True).method.message_count == 10)
        assert [channel.basic_get(name, auto_ack=True)[2] for _ in range(10)] == [b"%d" % n for n in range(15, 25)]
    accounts.init(federation.at, federation.files)


def test_an_inbox_that_expires_is_made_again_when_its_node_gets_an_account(federation: Federation) -> None:
    name = TOPOLOGY.node_inbox("upgraded")
    with federation.channel(ANYONE) as channel:
        channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum", "x-expires": 3_600_000})
    accounts.add_node(federation.at, "upgraded", ("text",), federation.files)
    assert "x-expires" not in federation.at.admin().queues(VHOST)[name]
    accounts.remove_node(federation.at, "upgraded")


def test_check_finds_nothing_and_finds_a_permission_too_many(
    federation: Federation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parties = [federation.file(party) for party in ("master", "a", "b", "alice")]
    assert check(parties)
    told = capsys.readouterr().out
    assert "a: read the inbox of b: refused" in told and "alice: take the master's lock: refused" in told
    management = federation.at.admin()
    management.load({"permissions": [{**EVERYTHING, "user": "guest"}]})
    assert not check([federation.file("b")])
    assert "anybody: log in as guest with the password guest: ALLOWED" in capsys.readouterr().out
    management.delete_account("guest")
    too_much = {"user": "fed.a", "vhost": VHOST, "configure": "^fed", "write": "^(fed|amq.default)", "read": "b.inbox"}
    management.load({"permissions": [too_much]})
    monkeypatch.setattr("deploy.commands.check_accounts.REFUSED_WITHIN", 2.0)
    assert not check(parties)
    told = capsys.readouterr().out
    for allowed in (
        "read the inbox of b", "delete in the name of b", "take the lock of b", "publish by the default exchange",
        "write to the dead letters", "publish a version",
    ):  # fmt: skip
        assert f"a: {allowed}: ALLOWED" in told
    assert "a: send an update as b: refused" in told, "its topic permissions are what they were"
    assert "b: " in told and "b: read the inbox of a: ALLOWED" not in told
    accounts.add_node(federation.at, "a", ("text",), federation.files)
    assert check([federation.file("a")])


def test_a_wrong_password_at_the_management_api_is_said_without_it(federation: Federation) -> None:
    assert federation.at.management is not None
    with pytest.raises(
        AccessRefused, match=r"does not let user 'admin' do this.*RABBITMQ_MANAGEMENT_PASSWORD"
    ) as refused:
        Management(federation.at.management.replace("secret", "hidden"))
    assert "hidden" not in str(refused.value)


@pytest.mark.slow
def test_rabbitmqctl_does_the_same(federation: Federation) -> None:
    """Without the management plugin; and it says why it failed."""
    ctl = Ctl(lambda arguments, given: federation.server.ctl(*arguments, given=given))
    assert ctl.server_version() == federation.at.admin().server_version()
    ctl.load({"users": [{"name": "fed.made", "password": "x", "tags": ""}]})
    assert ctl.queues(VHOST)[TOPOLOGY.chunk_queue("a")]["x-overflow"] == "reject-publish"
    for _ in range(2):  # once more there is nothing to delete
        ctl.delete_account("fed.made")
        ctl.delete_queue(VHOST, TOPOLOGY.node_lock("a"))
    with pytest.raises(UserError, match=r"rabbitmqctl import_definitions failed: .*nowhere"):
        ctl.load({"permissions": [{"user": "fed.a", "vhost": "nowhere", "configure": "", "write": "", "read": ""}]})


class Node:
    """A real node in a thread, with its own account."""

    def __init__(self, federation: Federation, directory: Path, name: str, seed: int) -> None:
        corpus_file = directory / f"{name}.txt"
        corpus_file.write_text("\n".join(lines(seed)))
        corpus = CorpusConfig(path=(str(corpus_file),), documents="line")
        config = NodeConfig(
            corpus=[corpus],
            state_dir=directory / name,
            private={"vocabulary": 300},
            alive_every_seconds=0.2,
            exit_when_finished=True,
            max_steps_per_second=6.0,
        )
        credentials = read(federation.file(name))
        self.broker = open_broker(
            credentials.urls[0],
            client_name=name,
            dead_letters=None,
            notes=TOPOLOGY.lock,
            makes_notes=False,
            refusal_patience=2.0,
        )
        self.service = NodeService(name, config, {"text": load_corpus(corpus)}, self.broker, TOPOLOGY)
        self.party = ThreadParty(name, self.service.run)


def test_a_federation_with_accounts_trains_and_a_removed_node_is_out(
    federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accounts.add_node(federation.at, "removed", ("text",), federation.files)
    settings = decided(min_nodes=2, stop=StopRule(versions=16))
    master_broker = federation.connect("master", master=True)
    service = MasterService(
        MasterConfig(state_dir=tmp_path / "master", exit_when_finished=True), settings, master_broker, TOPOLOGY, "text"
    )
    master = ThreadParty("master", service.run)
    going_on, removed = Node(federation, tmp_path, "a", 1), Node(federation, tmp_path, "removed", 2)
    try:
        state = service.master.state
        encoder = eventually(lambda: next(iter(state.encoders.values()), None), 60)
        member = eventually(lambda: encoder.members.get("removed"), 60)
        eventually(lambda: member.returns > 0 and encoder.version > 0, 60)
        poison = service.master.live.poison
        with federation.channel("removed") as channel:  # chunks of an update whose manifest will never come
            user = pika.BasicProperties(user_id="fed.removed")
            channel.basic_publish(TOPOLOGY.update, "removed.chunk", b"half", user, mandatory=True)
            accounts.remove_node(federation.at, "removed")
            with pytest.raises(AMQPError):  # an open channel is no way in
                channel.basic_publish(TOPOLOGY.update, "removed.ready", b"and its manifest", user)
        eventually(lambda: not member.accepted, 20)
        assert "the master is told that removed has left" in capsys.readouterr().out
        with pytest.raises(AccessRefused, match=r"user 'fed\.removed'"):
            eventually(lambda: removed.party.wait(0.1), 30)
        counted = member.returns  # with what was whole when it was cut off
        with pytest.raises(AccessRefused):
            open_broker(read(federation.file("removed")).urls[0], client_name="again", dead_letters=None)
        eventually(lambda: going_on.party.wait(0.1) and master.wait(0.1), 90, "the end of the training")
        assert encoder.status == "finished" and encoder.version == 16 and encoder.members["a"].returns > counted
        assert member.returns == counted and service.master.live.poison == poison
        with federation.channel("master") as channel, pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
            channel.queue_declare(TOPOLOGY.chunk_queue("removed"), passive=True)
    finally:
        for party in (master, going_on.party, removed.party):
            party.stop()
        for broker in (going_on.broker, removed.broker, master_broker):
            broker.close()
    entries = [entry.body for entry in open_log(tmp_path / "master", read_only=True).entries()]
    said = [body.kind for body in entries if getattr(body, "node", None) == "removed"]
    assert said[-2:] == ["request.join", "request.leave"]
