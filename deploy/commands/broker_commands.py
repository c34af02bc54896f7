"""The `shared-encoder broker` commands. Like `cli`, this imports only typer; the work is in `broker` and `accounts`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.commands.log_commands import DEFAULT_STATE, State
from deploy.commands.options import ConfigFile, Credentials, Namespace

if TYPE_CHECKING:
    from deploy.commands.accounts import Target

broker_app = typer.Typer(
    help="What a federation has at the broker: an account for each party, with its queues; and what ended runs left.",
    epilog="init and add-… go through RabbitMQ's management API (--management), through rabbitmqctl (--rabbitmqctl), "
    "or print what has to be done (--print); without any of these, through whichever is at the broker's host.",
    no_args_is_help=True,
)

BrokerUrl = Annotated[
    str | None,
    typer.Option("--broker", metavar="URL", help="where parties come to: amqp\\[s]://host:port/vhost"),
]
ManagementUrl = Annotated[
    str | None,
    typer.Option(
        "--management",
        metavar="URL",
        help="http\\[s]://administrator@host:15672, the password in RABBITMQ_MANAGEMENT_PASSWORD",
    ),
]
Program = Annotated[str | None, typer.Option("--rabbitmqctl", metavar="PATH", help="run it: a path, or auto")]
Printed = Annotated[
    str | None, typer.Option("--print", metavar="WHAT", help="change nothing, print commands or definitions")
]
ServerVersion = Annotated[
    str, typer.Option("--server", metavar="VERSION", help="the RabbitMQ that --print is for, such as 3.13")
]
Certificate = Annotated[Path | None, typer.Option(metavar="FILE", help="PEM, to be put into the credentials")]
ByCertificate = Annotated[
    bool, typer.Option("--by-certificate", help="the certificate is the login, without a password (EXTERNAL)")
]
Out = Annotated[Path, typer.Option(metavar="PATH", help="folder or .toml file for the credentials")]
Node = Annotated[str, typer.Argument(metavar="NAME", help="the node's id")]
DEFAULT_OUT = Path("credentials")


@broker_app.command("init")
def init(
    out: Out = DEFAULT_OUT,
    inbox_length: Annotated[
        int | None, typer.Option(metavar="N", min=10, help="messages that wait for a node at most", show_default="2000")
    ] = None,
    ca_file: Certificate = None,
    cert_file: Certificate = None,
    key_file: Certificate = None,
    by_certificate: ByCertificate = False,
    management: ManagementUrl = None,
    program: Program = None,
    printed: Printed = None,
    server: ServerVersion = "4",
    config: ConfigFile = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Make the vhost, its limits and policies, the exchanges, and the master's account with its credentials."""
    from deploy.broker.definitions import INBOX_LENGTH
    from deploy.commands import accounts

    at = _target(
        broker, namespace, config, management, program, printed, server, (ca_file, cert_file, key_file, by_certificate)
    )
    accounts.init(at, out, inbox_length=inbox_length or INBOX_LENGTH)


@broker_app.command("add-node")
def add_node(
    name: Node,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="TYPE", help="encoder type that it hears of; repeats", show_default="all"),
    ] = None,
    may_request: Annotated[bool, typer.Option("--may-request", help="it may ask for encoders")] = False,
    out: Out = DEFAULT_OUT,
    ca_file: Certificate = None,
    cert_file: Certificate = None,
    key_file: Certificate = None,
    by_certificate: ByCertificate = False,
    management: ManagementUrl = None,
    program: Program = None,
    printed: Printed = None,
    server: ServerVersion = "4",
    config: ConfigFile = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Make a node's account and its queues; write its credentials, for `shared-encoder node --credentials FILE`.

    For a node that is there already: a new password, and the permissions of today.
    """
    from common.encoders import encoder_type_names
    from deploy.commands import accounts

    at = _target(
        broker, namespace, config, management, program, printed, server, (ca_file, cert_file, key_file, by_certificate)
    )
    accounts.add_node(at, name, tuple(types or encoder_type_names()), out, may_request=may_request)


@broker_app.command("add-operator")
def add_operator(
    name: Annotated[str, typer.Argument(metavar="NAME", help="who gives the commands")],
    out: Out = DEFAULT_OUT,
    ca_file: Certificate = None,
    cert_file: Certificate = None,
    key_file: Certificate = None,
    by_certificate: ByCertificate = False,
    management: ManagementUrl = None,
    program: Program = None,
    printed: Printed = None,
    server: ServerVersion = "4",
    config: ConfigFile = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Make an operator's account; write its credentials, for `status` and `request` with --credentials FILE."""
    from deploy.commands import accounts

    at = _target(
        broker, namespace, config, management, program, printed, server, (ca_file, cert_file, key_file, by_certificate)
    )
    accounts.add_operator(at, name, out)


@broker_app.command("remove-node")
def remove_node(
    name: Node,
    keep_queues: Annotated[bool, typer.Option("--keep-queues", help="with what the node has sent already")] = False,
    management: ManagementUrl = None,
    program: Program = None,
    printed: Printed = None,
    config: ConfigFile = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Delete a node's account and queues, cut off whoever is in with it, and tell the master that it has left.

    What of its updates is counted stays; one that was sent in part is never counted.
    """
    from deploy.commands import accounts

    at = _target(broker, namespace, config, management, program, printed, "4", (None, None, None, False))
    accounts.remove_node(at, name, keep_queues=keep_queues)


@broker_app.command("check")
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="credentials of the parties to try, best of all")],
) -> None:
    """Log in as each party and try what must fail: one line a try, exit code 1 if something succeeds."""
    from deploy.commands.check_accounts import check as check_accounts

    if not check_accounts(files):
        raise typer.Exit(1)


@broker_app.command("clean")
def broker_clean(
    state: State = DEFAULT_STATE,
    everything: Annotated[
        bool, typer.Option("--all", help="also the queues of the master and of every node in its log")
    ] = False,
    credentials: Credentials = None,
    config: ConfigFile = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Delete the streams that ended runs have left at the broker. Not while a master serves the namespace."""
    from deploy.broker.credentials import merged
    from deploy.commands.broker import clean

    flags, _ = merged({"broker": {"url": broker, "namespace": namespace}}, credentials)
    clean(flags, config, state, everything=everything)


def _target(
    broker: str | None,
    namespace: str | None,
    config: Path | None,
    management: str | None,
    program: str | None,
    printed: str | None,
    server: str,
    login: tuple[Path | None, Path | None, Path | None, bool],
) -> Target:
    from common.brokers.amqp.arguments import version_of
    from deploy.broker.credentials import PEM
    from deploy.commands.accounts import target

    flags: dict[str, Any] = {"broker": {"url": broker, "namespace": namespace}}
    return target(
        flags,
        config,
        management=management,
        program=program,
        say=printed,
        server_version=version_of(server),
        certificates=dict(zip(PEM, login[:3], strict=True)),
        by_certificate=login[3],
    )
