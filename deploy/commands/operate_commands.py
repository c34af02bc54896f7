"""The commands that change how a running master goes on. Like `cli`, this imports only typer; the work is in
`operate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.options import BrokerUrl, ConfigFile, Credentials, Namespace

OneNode = Annotated[str | None, typer.Option("--node", metavar="NAME", help="of this node alone: update.… settings")]

Encoder = Annotated[
    str | None, typer.Argument(metavar="ENCODER", help="its id, as `status` shows it", show_default="all of them")
]


def register(app: typer.Typer) -> None:
    """Add these commands to the one command."""
    app.command("set")(set_)
    app.command("unset")(unset)
    app.command("pause")(pause)
    app.command("resume")(resume)


def set_(
    settings: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE…", help="for instance rule.outer.lr=2 or update.when.steps=20")
    ],
    node: OneNode = None,
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Change settings of rule, update and stop while the master runs: from the next decision on, and in the log.

    A value is JSON or a word; null takes a limit away. Each name changes that setting alone. They hold until they are
    set again or taken back by `unset`, also when the master starts again with its old configuration file.
    """
    from deploy.commands.operate import change_settings

    change_settings(_flags(broker, namespace, credentials), config, settings, (), node)


def unset(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="for instance rule.outer.lr, or rule for all")],
    node: OneNode = None,
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Take back what `set` has changed: what the master was started with holds again."""
    from deploy.commands.operate import change_settings

    change_settings(_flags(broker, namespace, credentials), config, (), names, node)


def pause(
    encoder: Encoder = None,
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Let the training of an encoder rest: no version is made, no time runs out, and nodes take no step.

    What they have sent is kept and counts after `resume`; what they have not handed in stays with them. It rests until
    then, also when master and nodes start again.
    """
    from deploy.commands.operate import pause_training

    pause_training(_flags(broker, namespace, credentials), config, encoder)


def resume(
    encoder: Encoder = None,
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Let a training go on that was paused, as if no time had passed."""
    from deploy.commands.operate import resume_training

    resume_training(_flags(broker, namespace, credentials), config, encoder)


def _flags(broker: str | None, namespace: str | None, credentials: Path | None) -> dict[str, Any]:
    from deploy.broker.credentials import merged

    return merged({"broker": {"url": broker, "namespace": namespace}}, credentials)[0]
