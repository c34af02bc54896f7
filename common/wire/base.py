"""What all messages share, and how an update is named."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from common.wire.fields import Id

SCHEMA_VERSION = 1


class Message(BaseModel):
    """What all messages share."""

    # messages are kept as JSON too (owed updates, snapshots): a loss that is NaN stays NaN there. Strict: no digits as
    # strings, which would be numbers of any length
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, ser_json_inf_nan="constants")

    schema_version: Literal[1] = 1


class NodeMessage(Message):
    """From a node. `incarnation` is a random id that changes when a node loses its state directory."""

    node: Id
    incarnation: Id


class OfUpdate(Protocol):
    """A message about one update."""

    @property
    def encoder(self) -> str: ...
    @property
    def node(self) -> str: ...
    @property
    def incarnation(self) -> str: ...
    @property
    def sequence(self) -> int: ...


def update_id(of: OfUpdate) -> str:
    """The name of an update, whichever message is about it."""
    return f"{of.encoder}/{of.node}/{of.incarnation}/{of.sequence}"
