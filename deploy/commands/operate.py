"""What an operator does while it runs: asked of the master over the broker, decided and logged there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.config import explained
from common.errors import BrokerUnavailable, UserError
from common.wire.to_master import Admit, Change, Kick, Operation, Pause, Resume
from deploy.commands.observe import await_answer, observing
from deploy.commands.run import check_node_id
from deploy.counterfactual import parsed_value

#: How long the master is waited for, seconds.
_PATIENCE = 10.0


def change_settings(
    flags: dict[str, Any], file: Path | None, settings: Sequence[str], back: Sequence[str], node: str | None
) -> None:
    """Change settings, or take changes back, and print old and new values. Raises as `operate`."""
    changes = changes_of(settings)
    if node is not None:
        check_node_id(node)
    operate(flags, file, Change, "set" if settings else "unset", changes=changes, back=list(back), member=node)


def changes_of(settings: Sequence[str]) -> dict[str, Any]:
    """`rule.outer.lr=2` and the like, by name. Raises UserError."""
    found: dict[str, Any] = {}
    for each in settings:
        name, is_there, value = each.partition("=")
        if not (is_there and name.strip()):
            raise UserError(f"set {each}: write it as NAME=VALUE, for instance rule.outer.lr=2")
        if name.strip() in found:
            raise UserError(f"set {each}: {name.strip()} is there twice")
        found[name.strip()] = parsed_value(value)
    return found


def pause_training(flags: dict[str, Any], file: Path | None, encoder: str | None) -> None:
    """Pause the training of an encoder, or of all. Raises as `operate`."""
    operate(flags, file, Pause, "pause", encoder=encoder)


def resume_training(flags: dict[str, Any], file: Path | None, encoder: str | None) -> None:
    """Let it go on. Raises as `operate`."""
    operate(flags, file, Resume, "resume", encoder=encoder)


def kick_node(flags: dict[str, Any], file: Path | None, node: str, reason: str) -> None:
    """Take a node out. Raises as `operate`."""
    if len(reason) > 500 or not reason.isprintable():
        raise UserError("--reason: at most 500 characters, in one line")
    check_node_id(node)
    operate(flags, file, Kick, "kick", member=node, reason=reason)


def admit_node(flags: dict[str, Any], file: Path | None, node: str) -> None:
    """Let a node in again. Raises as `operate`."""
    check_node_id(node)
    operate(flags, file, Admit, "admit", member=node)


def operate(flags: dict[str, Any], file: Path | None, kind: type[Operation], command: str, **fields: Any) -> None:
    """Ask, and print what came of it. It is not asked of a master that is not there: it would do it whenever it starts.

    Raises UserError with the reason if it is refused, BrokerUnavailable if no master is there.
    """
    with observing(flags, file) as (observer, _, _):
        try:
            operation = kind(sender=observer.name, **fields)
        except ValidationError as error:
            raise explained(error, kind, command) from None
        observer.status(_PATIENCE)
        observer.say(operation)
        try:
            print(await_answer(observer, _PATIENCE).detail)
        except BrokerUnavailable:
            print("the master has been told, and is still busy with something else: `status` shows when it has done it")
