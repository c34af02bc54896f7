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

Node = Annotated[str, typer.Argument(metavar="NODE", help="its name, as `status` shows it")]


def register(app: typer.Typer) -> None:
    """Add these commands to the one command."""
    app.command("set")(set_)
    app.command("unset")(unset)
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("kick")(kick)
    app.command("admit")(admit)


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


def kick(
    node: Node,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="for its owner and the log")] = None,
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Take a node out of every training until `admit`: nobody waits for it, and its updates are refused.

    What was counted of it stays counted. It is told, and waits; its account at the broker is another matter.
    """
    from deploy.commands.operate import kick_node

    kick_node(_flags(broker, namespace, credentials), config, node, reason or "")


def admit(
    node: Node,
    config: ConfigFile = None,
    credentials: Credentials = None,
    broker: BrokerUrl = None,
    namespace: Namespace = None,
) -> None:
    """Let a node in again that was taken out by `kick`."""
    from deploy.commands.operate import admit_node

    admit_node(_flags(broker, namespace, credentials), config, node)


def _flags(broker: str | None, namespace: str | None, credentials: Path | None) -> dict[str, Any]:
    from deploy.broker.credentials import merged

    return merged({"broker": {"url": broker, "namespace": namespace}}, credentials)[0]
