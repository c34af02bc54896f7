"""What `shared-encoder broker init`, `add-node`, `add-operator` and `remove-node` do: an account for each party, its
queues, and its file of credentials. What is made is computed in `deploy.broker`; here it is carried out."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import SecretStr

from common.broker_url import split
from common.errors import AccessRefused, BrokerUnavailable, SharedEncoderError, UserError
from common.wire.broker import Publication
from common.wire.codec import encode
from common.wire.to_master import Join, Leave
from common.wire.topology import Topology
from deploy.broker import definitions as parts
from deploy.broker.admin import Admin, Management, rabbitmqctl, removal_commands
from deploy.broker.credentials import PEM, Credentials, Role, with_account, without_account, write
from deploy.broker.plan import (
    Account,
    check_node,
    federation,
    leaving_account,
    made_for,
    master_account,
    node_account,
    operator_account,
    queues_of,
)
from deploy.commands.run import connect
from deploy.config import Config, load_config

#: Where a management API is looked for if none is named: at the broker's host.
_MANAGEMENT_PORT = 15672
#: How long the master's queue may take to take the word that a node has left, seconds.
_TOLD_SECONDS = 10.0


@dataclass(frozen=True)
class Target:
    """A federation at the broker of `config`, and how that is administered. `say`: print `commands` or `definitions`
    instead of carrying anything out; `server_version`: of the broker that this is then for. `pem`: the texts of
    certificates for every party's file; `by_certificate`: they are the login, and the account has no password."""

    config: Config
    management: str | None = None
    program: str | None = None
    say: str | None = None
    server_version: tuple[int, ...] = (4,)
    pem: dict[str, str] = field(default_factory=dict)
    by_certificate: bool = False

    @property
    def topology(self) -> Topology:
        return Topology(self.config.broker.namespace, own_accounts=True, replicas=self.config.broker.replicas)

    @property
    def urls(self) -> tuple[str, ...]:
        """Where the broker is; whose account is in them is of no account here."""
        broker = self.config.broker
        return tuple(url.get_secret_value() for url in broker.urls or (broker.url,))

    @property
    def vhost(self) -> str:
        return unquote(split(self.urls[0]).path.removeprefix("/")) or "/"

    def admin(self) -> Admin:
        """Through what was asked for, else the management API at the broker's host, else rabbitmqctl if that is here.
        Raises UserError, BrokerUnavailable."""
        if self.program is not None:
            return rabbitmqctl(self.program)
        if self.management is not None:
            return Management(self.management)
        host = split(self.urls[0]).hostname or ""
        try:
            return Management(f"http://{f'[{host}]' if ':' in host else host}:{_MANAGEMENT_PORT}")
        except (AccessRefused, BrokerUnavailable) as error:
            try:
                if host not in ("localhost", "127.0.0.1", "::1"):
                    raise UserError("rabbitmqctl works on the broker's machine alone")
                return rabbitmqctl("auto")
            except UserError:
                raise UserError(
                    f"{error}; name it with --management http://USER@HOST:15672, or run this where rabbitmqctl works "
                    "(--rabbitmqctl auto), or give --print commands to whoever runs the broker"
                ) from None


def target(
    flags: dict[str, Any],
    file: Path | None,
    *,
    management: str | None = None,
    program: str | None = None,
    say: str | None = None,
    server_version: tuple[int, ...] = (4,),
    certificates: dict[str, Path | None] | None = None,
    by_certificate: bool = False,
) -> Target:
    """From the configuration. `certificates`: files for `PEM`, whose contents every party's file is given. Raises
    UserError."""
    if say not in (None, "commands", "definitions"):
        raise UserError(f"--print {say}: there are: commands, definitions")
    pem = {}
    for name in PEM:
        path = (certificates or {}).get(name)
        if path is not None:
            try:
                pem[name] = path.read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not a PEM file'}") from None
    if by_certificate and not {"cert", "key"} <= pem.keys():
        raise UserError("--by-certificate needs the party's certificate: give --cert-file and --key-file")
    return Target(load_config(file, flags), management, program, say, server_version, pem, by_certificate)


def init(at: Target, out: Path, *, inbox_length: int = parts.INBOX_LENGTH) -> None:
    """The vhost, its limits and policies, the exchanges, and the master's account with its file. Again: nothing but a
    new password. Raises UserError, BrokerUnavailable."""
    surroundings = parts.surroundings(at.vhost, at.topology, inbox_length)

    def made(version: tuple[int, ...]) -> parts.Definitions:
        return parts.together(surroundings, parts.declared(at.vhost, federation(at.topology), version))

    _add(at, "master", "master", master_account(at.topology), out, made)


def add_node(at: Target, node: str, types: tuple[str, ...], out: Path, *, may_request: bool = False) -> None:
    """A node's account, its queues bound for its encoder types, and its file. Raises UserError, BrokerUnavailable."""
    account = node_account(at.topology, node, may_request=may_request)

    def made(version: tuple[int, ...]) -> parts.Definitions:
        return parts.declared(at.vhost, made_for(at.topology, node, types), version)

    if at.say is None:
        _replace_what_expires(at, node)
    _add(at, "node", node, account, out, made)


def add_operator(at: Target, operator: str, out: Path) -> None:
    """An operator's account and its file. Raises UserError, BrokerUnavailable."""
    account = operator_account(at.topology, operator)
    _add(at, "operator", operator, account, out, lambda version: {})
    _note(at, f'the master obeys it once its configuration has it: [master] operators = ["{operator}", …]')


def remove_node(at: Target, node: str, *, keep_queues: bool = False) -> None:
    """Nobody gets in with its account any more, whoever is in is cut off, and the master is told that it has left.

    First the account gets a password that nobody knows and may only say that it leaves; with it that is said; then it
    is deleted, which closes its connections again, and its queues. Raises UserError, BrokerUnavailable.
    """
    check_node(node)
    account, queues = at.topology.account(node), [] if keep_queues else queues_of(at.topology, node)
    if at.say is not None:
        print(removal_commands(at.vhost, account, queues))
        _note(at, "the master takes the node for absent once it has heard nothing of it for presence_timeout_seconds")
        return
    admin, password = at.admin(), secrets.token_urlsafe(32)
    admin.load(_account(at, leaving_account(at.topology, node), password))
    admin.close_connections(account, "removed from the federation")
    try:
        _leave(at, node, account, password)
        print(f"the master is told that {node} has left")
    except SharedEncoderError as error:
        print(f"the master could not be told ({error}); it takes {node} for absent after presence_timeout_seconds")
    admin.delete_account(account)
    for name in queues:
        admin.delete_queue(at.vhost, name)
    print(f"removed the account {account}" + (f" and {len(queues)} queues" if queues else "; its queues are kept"))


def _add(at: Target, role: Role, party: str, account: Account, out: Path, made: Any) -> None:
    """Load what is made for the party and its account, and write its file: first the file, because a password that
    stands nowhere is of no use to anybody."""
    password = "" if at.by_certificate else secrets.token_urlsafe(32)
    loads = _account(at, account, password)
    admin = None if at.say is not None else at.admin()
    version = at.server_version if admin is None else admin.server_version()
    wanted = parts.together(made(version), loads)
    section: dict[str, Any] = {"namespace": at.topology.namespace, "accounts": "required"}
    if at.topology.replicas is not None:
        section["replicas"] = at.topology.replicas
    if at.by_certificate:
        urls = tuple(without_account(url) for url in at.urls)
        section["account"] = account.name
    else:
        urls = tuple(with_account(url, account.name, password) for url in at.urls)
    file = out if out.suffix == ".toml" else out / f"{party}.toml"
    write(file, Credentials(role, party, urls, section, at.pem))
    if admin is None:
        print(parts.as_json(wanted) if at.say == "definitions" else parts.as_commands(wanted))
    else:
        admin.load(wanted)
    _note(at, f"account {account.name}; its credentials are in {file}, for nobody else to read")


def _account(at: Target, account: Account, password: str) -> parts.Definitions:
    """Without a password nobody gets in with one."""
    hashed = parts.password_hash(password, os.urandom(4)) if password else ""
    return parts.account(at.vhost, account, hashed)


def _replace_what_expires(at: Target, node: str) -> None:
    """Queues that the node made while accounts were shared, and that expire: it could not make them again. What is in
    them is said again when it joins."""
    admin = at.admin()
    there = admin.queues(at.vhost)
    for name in queues_of(at.topology, node):
        if "x-expires" in there.get(name, {}):
            admin.delete_queue(at.vhost, name)


def _leave(at: Target, node: str, account: str, password: str) -> None:
    """Say with the node's own account that it is here and goes. Its incarnation is a new one, because the one that the
    master knows is in the node's state alone. Raises what the broker says against it."""
    incarnation = secrets.token_hex(8)
    words = (Join(node=node, incarnation=incarnation), Leave(node=node, incarnation=incarnation))
    url = SecretStr(with_account(at.urls[0], account, password))
    section = at.config.broker.model_copy(update={"url": url, "urls": (), "account": None, "password_file": None})
    broker = connect(at.config.model_copy(update={"broker": section}), at.topology, f"remove-node {node}")
    try:
        for message in words:
            key = f"{node}.{message.kind.removeprefix('request.')}"
            said = Publication(at.topology.request, key, encode(message), message_id=secrets.token_hex(16))
            broker.publish(said, timeout=_TOLD_SECONDS)
    finally:
        broker.close()


def _note(at: Target, words: str) -> None:
    """For people; where definitions or commands are printed, beside them."""
    import sys

    print(words, file=sys.stderr if at.say is not None else sys.stdout)
