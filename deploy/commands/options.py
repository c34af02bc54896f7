"""Options that commands of several files have in common: one name, one meaning, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.variables import CREDENTIALS

BrokerUrl = Annotated[
    str | None,
    typer.Option(
        "--broker", metavar="URL", help="amqp\\[s]://user:password@host:port/vhost", show_default="a local RabbitMQ"
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="TOML file with the sections broker, master, …")
]
Credentials = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="account at the broker, as `broker add-…` wrote it",
        envvar=CREDENTIALS,
        show_envvar=False,
    ),
]
SampleType = Annotated[str | None, typer.Option("--type", metavar="TYPE", help="text or image", show_default="text")]
SampleField = Annotated[
    str | None, typer.Option(metavar="NAME", help="field or array of the samples", show_default="text")
]
Namespace = Annotated[
    str | None, typer.Option(metavar="NAME", help="prefix of all names at the broker", show_default="shared-encoder")
]
