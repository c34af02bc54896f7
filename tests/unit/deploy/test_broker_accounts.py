"""Accounts at the broker, as data: what each party's permissions allow, for any names; definitions, and credentials."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.broker_url import split
from common.errors import BrokerUnavailable, UserError
from common.wire.topology import Topology, note_queue
from deploy.broker.admin import Management, rabbitmqctl
from deploy.broker.credentials import Credentials, merged, read, too_open, with_account, write
from deploy.broker.definitions import account, as_commands, declared, password_hash, surroundings, together
from deploy.broker.plan import (
    NODE_SAYS,
    Account,
    leaving_account,
    made_for,
    master_account,
    node_account,
    operator_account,
    queues_of,
)
from deploy.commands import accounts
from deploy.commands.run import node_of

NAMESPACES = st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True)
NODES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True).filter(
    lambda name: name != "master" and re.search("-[0-9a-f]{8}$", name) is None
)
#: Names that could be taken for each other, or for the master's.
AWKWARD = st.sampled_from(
    ["a", "A", "a-b", "ab", "inbox", "update", "parameters", "lock", "node", "masters", "_".join("ab")]
)
ASKED = ("get", "update", "status", "stop", "set", "pause", "resume", "kick", "admit")
SAID = (*NODE_SAYS, *ASKED, "ready", "chunk", "chunk.1", "chunk.64", "chunk.x", "chunk.1.1")


def everything(topology: Topology, *nodes: str) -> tuple[set[str], set[str]]:
    """The exchanges and the queues of a federation with these nodes and one encoder."""
    made = [topology.master(), topology.parameters("text-1", 1), topology.assets("text-1", 1)]
    made += [made_for(topology, node, ("text",)) for node in nodes]
    exchanges = {each.name for declarations in made for each in declarations.exchanges}
    queues = {each.name for declarations in made for each in declarations.queues}
    return exchanges, queues | {topology.master_lock, note_queue(topology.master_lock)}


@settings(max_examples=25)
@given(NAMESPACES, st.lists(st.one_of(NODES, AWKWARD), min_size=2, max_size=2, unique=True))
def test_a_node_reaches_its_own_and_nothing_else(namespace: str, nodes: list[str]) -> None:
    topology = Topology(namespace, own_accounts=True)
    node, other = nodes
    mine = node_account(topology, node)
    exchanges, queues = everything(topology, node, other)
    names = exchanges | queues | {topology.node_lock(other), "amq.default", "anything"}
    own = {topology.node_inbox(node), topology.pulse_queue(node), note_queue(topology.node_lock(node))}
    streams = {topology.stream("text-1"), topology.asset_stream("text-1")}
    assert {name for name in names if mine.permits("read", name)} == own | streams
    assert {name for name in names | {topology.node_lock(node)} if mine.permits("configure", name)} == {
        topology.node_lock(node)
    }
    writable = {name for name in names if mine.permits("write", name)}
    assert writable == {topology.ack, topology.request, topology.update, topology.lock}
    assert writable <= {each.exchange for each in mine.topics}, (
        "where there is no topic permission every key is allowed"
    )
    for exchange, who, word in product(writable, (node, other), SAID):
        allowed = {topology.request: NODE_SAYS, topology.update: ("ready", "chunk", "chunk.1", "chunk.64")}.get(
            exchange, ()
        )
        assert mine.permits("write", exchange, f"{who}.{word}") == (who == node and word in allowed)
    assert mine.permits("write", topology.ack, node) and not mine.permits("write", topology.ack, other)
    assert mine.permits("write", topology.lock, topology.node_lock(node))
    for lock in (topology.node_lock(other), topology.master_lock):
        assert not mine.permits("write", topology.lock, lock)


@settings(max_examples=25)
@given(NAMESPACES, st.one_of(NODES, AWKWARD))
def test_the_master_may_do_what_it_declares_and_speaks_for_no_node(namespace: str, node: str) -> None:
    topology = Topology(namespace, own_accounts=True)
    mine = master_account(topology)
    streams = (topology.parameters("text-1", 1), topology.assets("text-1", 1))
    shards = (topology.shards(64), topology.shard_chunks(node, 64))
    for declarations in (topology.master(), *streams, *shards):
        for each in (*declarations.exchanges, *declarations.queues):
            assert mine.permits("configure", each.name)
        for binding in declarations.bindings:
            assert mine.permits("write", binding.queue)
            assert mine.permits("read", binding.exchange, binding.routing_key)
    of_shards = (topology.shard_queue(0), topology.master_shards, topology.chunk_queue(node, 63))
    for name in (topology.chunk_queue(node), topology.master_inbox, topology.master_updates, *of_shards):
        assert mine.permits("read", name)
    for lock in (topology.master_lock, topology.shard_lock(11)):
        assert mine.permits("write", topology.lock, lock)
        assert all(mine.permits(action, note_queue(lock)) for action in ("configure", "write", "read"))
    assert mine.permits("write", topology.shard, topology.shard_key(3))
    for exchange in (topology.instruction, topology.rule, topology.receipt, topology.parameter, topology.asset):
        assert mine.permits("write", exchange, node)
    assert mine.permits("write", topology.dead_letters, "invalid")
    for name in (topology.ack, topology.request, topology.update, "amq.default", topology.node_inbox(node)):
        assert not mine.permits("write", name)
    for name in (topology.node_inbox(node), topology.node_lock(node), topology.pulse_queue(node)):
        assert not mine.permits("read", name) and not mine.permits("configure", name)


@settings(max_examples=25)
@given(NAMESPACES, NODES, st.from_regex(r"[0-9a-f]{8}", fullmatch=True), NODES)
def test_an_operator_asks_and_stops_by_names_that_no_node_has(
    namespace: str, operator: str, digits: str, node: str
) -> None:
    assume(len(operator) <= 55)
    topology = Topology(namespace, own_accounts=True)
    mine, command = operator_account(topology, operator), f"{operator}-{digits}"
    [inbox], [binding] = topology.observer(command).queues, topology.observer(command).bindings
    assert all(mine.permits(action, inbox.name) for action in ("configure", "write", "read"))
    assert mine.permits("read", topology.receipt, binding.routing_key)
    for word in ASKED:
        assert mine.permits("write", topology.request, f"{command}.{word}")
    for word in SAID:
        assert not mine.permits("write", topology.request, f"{node}.{word}")
    assert not mine.permits("read", topology.receipt, node)
    for name in queues_of(topology, node):
        assert not any(mine.permits(action, name) for action in ("configure", "write", "read"))
    with pytest.raises(UserError, match="operator's commands"):
        node_account(topology, command)


def test_names_and_wishes() -> None:
    topology = Topology("ns", own_accounts=True)
    for name in ("master", "a.b", "", "-a", "a" * 65, "a*", "ä"):
        with pytest.raises(UserError):
            node_account(topology, name)
        with pytest.raises(UserError):
            operator_account(topology, name)
    assert not node_account(topology, "a").permits("read", "ns-node.a.inbox"), "a dot is a dot"
    asking = node_account(topology, "a", may_request=True)
    assert asking.permits("write", topology.request, "a.get") and not asking.permits(
        "write", topology.request, "a.stop"
    )
    left = leaving_account(topology, "a")
    assert left.permits("write", topology.request, "a.leave") and not left.permits("write", topology.request, "a.alive")
    assert not left.permits("write", topology.update) and not left.permits("read", topology.node_inbox("a"))
    assert queues_of(topology, "a") == [
        "ns.node.a.inbox", "ns.update.a", "ns.node.a.pulse", "ns.node.a.lock.holder", "ns.node.a.lock",
    ]  # fmt: skip


def test_definitions_say_what_was_planned() -> None:
    topology = Topology("ns", own_accounts=True)
    found = together(
        surroundings("v", topology),
        declared("v", made_for(topology, "a", ("text",)), (3, 10, 8)),
        declared("v", made_for(topology, "b", ("text",)), (3, 10, 8)),
        account("v", node_account(topology, "a"), "hash"),
    )
    names = [each["name"] for each in found["exchanges"]]
    assert len(names) == len(set(names)) == 10, "what both nodes need is there once"
    inbox = next(each for each in found["queues"] if each["name"] == "ns.node.a.inbox")
    assert inbox["arguments"] == {"x-queue-type": "quorum"}, "nothing that expires, and no argument that is new"
    assert declared("v", made_for(topology, "a", ()), (4, 0))["queues"][1]["arguments"]["x-delivery-limit"] == -1
    [policy] = found["policies"]
    assert re.search(policy["pattern"], "ns.node.a.inbox") and not re.search(policy["pattern"], "ns.master.inbox")
    [user] = found["users"]
    assert user["tags"] == "" and user["limits"]["max-connections"] >= 4
    assert "parameters" in found and "parameters" not in surroundings("/", topology), "no limits for others' vhosts"
    salted = base64.b64decode(password_hash("secret", b"salt"))
    assert salted == b"salt" + hashlib.sha256(b"saltsecret").digest()
    first, *middle, last = as_commands(found).splitlines()
    assert first == "rabbitmqctl import_definitions <<'END'" and last == "END"
    assert json.loads("\n".join(middle)) == found


def test_printed_definitions_hold_no_password_and_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"broker": {"url": "amqp://broker.invalid/v", "namespace": "ns"}}
    at = accounts.target(flags, None, say="definitions", server_version=(3, 10))
    accounts.init(at, tmp_path)
    accounts.add_node(at, "a", ("text",), tmp_path)
    accounts.add_operator(at, "alice", tmp_path)
    accounts.remove_node(at, "a")
    out, err = capsys.readouterr()
    decoder, printed, rest = json.JSONDecoder(), [], out
    while rest.startswith("{"):
        value, end = decoder.raw_decode(rest)
        printed.append(value)
        rest = rest[end:].lstrip()
    assert [each["users"][0]["name"] for each in printed] == ["ns.master", "ns.a", "ns.alice"]
    assert "rabbitmqctl delete_user 'ns.a'" in rest and "delete_queue -p 'v' 'ns.update.a'" in rest
    for party in ("master", "a", "alice"):
        password = split(read(tmp_path / f"{party}.toml").urls[0]).password
        assert password and len(password) >= 40 and password not in out + err


def test_whose_login_is_a_certificate_has_no_password(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"broker": {"url": "amqps://guest:guest@broker.invalid/v", "namespace": "ns"}}
    files: dict[str, Path | None] = {name: tmp_path / name for name in ("ca", "cert", "key")}
    for name, path in files.items():
        assert path is not None
        path.write_text(f"-----{name}-----\n")
    at = accounts.target(flags, None, say="definitions", certificates=files, by_certificate=True)
    accounts.add_node(at, "a", ("text",), tmp_path / "a.toml")
    assert json.loads(capsys.readouterr().out)["users"][0]["password_hash"] == ""
    found = read(tmp_path / "a.toml")
    assert found.urls == ("amqps://broker.invalid/v",) and found.broker["account"] == "ns.a"
    assert found.pem == {name: f"-----{name}-----\n" for name in ("ca", "cert", "key")}
    with pytest.raises(UserError, match="--cert-file and --key-file"):
        accounts.target(flags, None, certificates={"ca": files["ca"]}, by_certificate=True)


URLS = [
    "amqp://host/",
    "amqps://host.example:5671/v%2Fw",
    "amqp://guest:guest@[::1]:5672/v?heartbeat=10",
]


@pytest.mark.parametrize("url", URLS)
def test_credentials_are_one_file_for_its_owner_alone(tmp_path: Path, url: str) -> None:
    file = tmp_path / "keys" / "a.toml"
    mine = with_account(url, "ns.a", "p/w#\"'")
    parts, before = split(mine), split(url)
    assert (parts.hostname, parts.port, parts.path, parts.query) == (
        before.hostname, before.port, before.path, before.query,
    )  # fmt: skip
    pem = {"ca": "-----BEGIN CERTIFICATE-----\nabc=\n-----END CERTIFICATE-----\n"}
    made = Credentials("node", "a", (mine,), {"namespace": "ns", "accounts": "required"}, pem)
    write(file, made)
    write(file, made)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert read(file) == made and [path.name for path in file.parent.iterdir()] == ["a.toml"]
    flags: dict[str, Any] = {"broker": {"url": None, "namespace": "other"}, "log": {}}
    found, party = merged(flags, file)
    assert party == "a" and found["broker"]["urls"] == [mine] and found["broker"]["accounts"] == "required"
    assert found["broker"]["namespace"] == "other", "a flag says it last"
    assert Path(found["broker"]["ca_file"]).read_text() == pem["ca"]
    assert merged(flags, None) == (flags, None)
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read(file)


@pytest.mark.parametrize(
    "text", ["", "node = 1\n[broker]\nurl='amqp://h'", "[broker]\nnamespace='a'", "a=1\n[broker]", "["]
)
def test_what_is_no_file_of_credentials_is_said_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(UserError, match=r"a\.toml: not a file of credentials"):
        read(file)


def test_a_nodes_name_may_come_with_its_credentials() -> None:
    assert node_of(None, "a") == node_of("a", None) == node_of("a", "a") == "a"
    with pytest.raises(UserError, match="those of 'a', not of node 'b'"):
        node_of("b", "a")
    with pytest.raises(UserError, match="give its NAME"):
        node_of(None, None)


def test_an_account_permits_as_rabbitmq_does() -> None:
    """A pattern without anchors matches anywhere, and an exchange without a topic permission takes every key."""
    loose = Account("x", configure="", write="up", read="^$", topics=())
    assert loose.permits("configure", "anything") and loose.permits("write", "ns.update", "any.key")
    assert not loose.permits("read", "ns.update")


def test_who_cannot_administer_the_broker_is_told_what_to_do() -> None:
    for url in ("127.0.0.1:15672", "amqp://127.0.0.1/", "http://127.0.0.1:port/"):
        with pytest.raises(UserError, match="write it as http://user@host:15672"):
            Management(url)
    with pytest.raises(BrokerUnavailable, match=r"no management API answers at 127\.0\.0\.1:1"):
        Management("http://admin:hidden@127.0.0.1:1")
    with pytest.raises(UserError, match="--rabbitmqctl /nowhere/rabbitmqctl: No such file"):
        rabbitmqctl("/nowhere/rabbitmqctl").queues("/")
    at = accounts.target({"broker": {"url": "amqp://broker.invalid:1/"}}, None)
    with pytest.raises(UserError, match=r"--management .*--rabbitmqctl auto.*--print commands"):
        at.admin()
    with pytest.raises(UserError, match="there are: commands, definitions"):
        accounts.target({}, None, say="everything")


@pytest.mark.parametrize(
    ("mode", "owner", "open_"),
    [
        (0o600, 1000, False),
        (0o400, 0, False),
        (0o440, 0, False),  # a secret of Kubernetes, for the group of the pod
        (0o640, 0, False),
        (0o440, 1000, True),
        (0o444, 0, True),
        (0o660, 0, True),
        (0o604, 1000, True),
    ],
)
def test_who_may_read_the_file_of_whom(mode: int, owner: int, open_: bool) -> None:
    assert too_open(mode, owner) is open_
