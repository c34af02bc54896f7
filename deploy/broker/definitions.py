"""A federation's parts as RabbitMQ's definitions: the JSON that its management API and rabbitmqctl import. Pure.

An import makes what is not there and changes permissions, passwords, policies and limits; it leaves existing queues as
they are, and deletes nothing. https://www.rabbitmq.com/docs/definitions
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from common.brokers.amqp.arguments import queue_arguments
from common.wire.topology import MIB, Declarations, Topology
from deploy.broker.plan import Account

Definitions = dict[str, list[dict[str, Any]]]

#: What waits for a node that is away, at most. The oldest goes first: one that refused would hold up the master.
INBOX_LENGTH, INBOX_BYTES = 2000, 64 * MIB
#: Over a policy that the operator may have for everything.
_PRIORITY = 10
#: Of a vhost that is the federation's own: each node has four queues, two connections, and a short third one.
VHOST_QUEUES, VHOST_CONNECTIONS = 20_000, 10_000


def password_hash(password: str, salt: bytes) -> str:
    """As RabbitMQ keeps passwords: base64 of salt ‖ SHA-256(salt ‖ password), with a salt of 4 bytes.
    https://www.rabbitmq.com/docs/passwords"""
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def account(vhost: str, made: Account, hashed: str) -> Definitions:
    """A user without tags, and what it may do in one vhost."""
    limits = {"max-connections": made.connections, "max-channels": made.channels}
    user = {
        "name": made.name,
        "password_hash": hashed,
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": "",
        "limits": {name: limit for name, limit in limits.items() if limit is not None},
    }
    permissions = {"configure": made.configure, "write": made.write, "read": made.read}
    return {
        "users": [user],
        "permissions": [{"user": made.name, "vhost": vhost, **permissions}],
        "topic_permissions": [
            {"user": made.name, "vhost": vhost, "exchange": each.exchange, "write": each.write, "read": each.read}
            for each in made.topics
        ],
    }


def declared(vhost: str, declarations: Declarations, server_version: tuple[int, ...]) -> Definitions:
    """Exchanges, queues and bindings."""
    durable = {"vhost": vhost, "durable": True, "auto_delete": False}
    return {
        "exchanges": [
            {**durable, "name": each.name, "type": each.kind, "internal": False, "arguments": {}}
            for each in declarations.exchanges
        ],
        "queues": [
            {**durable, "name": each.name, "arguments": queue_arguments(each, server_version)}
            for each in declarations.queues
        ],
        "bindings": [
            {
                "vhost": vhost,
                "source": each.exchange,
                "destination": each.queue,
                "destination_type": "queue",
                "routing_key": each.routing_key,
                "arguments": {},
            }
            for each in declarations.bindings
        ],
    }


def surroundings(vhost: str, topology: Topology, inbox_length: int = INBOX_LENGTH) -> Definitions:
    """The vhost, its limits unless it is everybody's, and the policy for inboxes: a new argument of a queue would be
    refused (406) to those whose queues are there already."""
    namespace = topology.namespace
    inboxes = {
        "vhost": vhost,
        "name": f"{namespace}.inboxes",
        "pattern": rf"^{namespace}\.node\.[^.]+\.inbox$",
        "apply-to": "queues",
        "priority": _PRIORITY,
        "definition": {"max-length": inbox_length, "max-length-bytes": INBOX_BYTES, "overflow": "drop-head"},
    }
    found: Definitions = {"vhosts": [{"name": vhost}], "policies": [inboxes]}
    if vhost != "/":
        limits = {"max-queues": VHOST_QUEUES, "max-connections": VHOST_CONNECTIONS}
        found["parameters"] = [{"vhost": vhost, "component": "vhost-limits", "name": "limits", "value": limits}]
    return found


def together(*parts: Definitions) -> Definitions:
    """All of these in one."""
    found: Definitions = {}
    for part in parts:
        for kind, entries in part.items():
            found.setdefault(kind, []).extend(each for each in entries if each not in found.get(kind, []))
    return found


def as_json(definitions: Definitions) -> str:
    """For `rabbitmqctl import_definitions` and the management API."""
    return json.dumps(definitions, indent=1)


def as_commands(definitions: Definitions) -> str:
    """For a shell where rabbitmqctl may be used. No password is in it, only its salted hash."""
    return f"rabbitmqctl import_definitions <<'END'\n{as_json(definitions)}\nEND"
