"""What `shared-encoder broker certs` does: certificates for trials of TLS, and the settings that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def broker_certs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where they go; a CA that is there signs more")],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="of the broker, as nodes will write it: name or address; may be repeated"),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="a certificate for this party (master, a node); may be repeated"),
    ] = None,
    namespace: Annotated[str, typer.Option(metavar="NAME", help="of the parties' accounts")] = "shared-encoder",
    days: Annotated[float, typer.Option(metavar="N", min=0.01, help="how long what is made is good")] = 90,
) -> None:
    """Make a CA, the broker's certificate and clients' certificates, for trials; print the settings that use them."""
    from common.errors import UserError
    from common.wire.accounts import MASTER
    from common.wire.topology import Topology
    from deploy.broker.certificates import Authority, client_settings, server_settings
    from deploy.commands.run import check_node_id

    topology = Topology(namespace)
    if not host and not client:
        raise UserError("nothing to make: give --host NAME for the broker, --client NAME for who logs in there")
    for name in client or ():
        if name != MASTER:
            check_node_id(name)
    authority = Authority(directory, days=days)
    if host:
        server = authority.server(host)
        print("# at the broker: rabbitmq-plugins enable rabbitmq_auth_mechanism_ssl, and into rabbitmq.conf")
        print(f"# (its user must be able to read {server.key_file})")
        print(server_settings(authority, server))
    for name in client or ():
        account = topology.account(name)
        made = authority.client(account)
        print(f"\n# for {name}, whose account has no password: rabbitmqctl add_user {account} x")
        print(f"# rabbitmqctl clear_password {account}; rabbitmqctl set_permissions {account} '.*' '.*' '.*'")
        print(client_settings(authority, made, account, (host or ["HOST"])[0]))
