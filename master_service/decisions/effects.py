"""What the coordinator wants done. The shell does it; outcomes that matter come back as log entries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.numbers.slicing import EncodingName
from common.wire.base import Message
from master_service.decisions.rules.model import CombineRule, OuterOptimizer
from master_service.decisions.settings import MAX_PARAMETERS


@dataclass(frozen=True, slots=True)
class Send:
    """A message to one node (or observer)."""

    to: str
    message: Message


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A message to every node that listens for an encoder type."""

    encoder_type: str
    message: Message


@dataclass(frozen=True, slots=True)
class Generate:
    """Make version 0 of an encoder, and its assets; answered by a Provided entry for each asset and a Generated one, by
    a GenerationFailed entry, or, as long as no words were gathered, by a Gathering one. `sources`: what the operator
    named for the assets, by name; paths and words. `gathered`: the words that nodes contributed, and in how many of
    their documents each occurs. `max_parameters`: a larger one is not made."""

    encoder: str
    encoder_type: str
    architecture: dict[str, Any]
    generation: str
    source: str | None
    seed: int
    sources: dict[str, str] = field(default_factory=dict)
    gathered: dict[str, int] | None = None
    max_parameters: int = MAX_PARAMETERS


@dataclass(frozen=True, slots=True)
class Contribution:
    """One update of a step: its payload by digest, and its weight already divided by the buffer's sample weights. For a
    robust rule updates of one `part` are of one node, and the weight is divided by how many those are."""

    payload: str
    encoding: EncodingName
    coefficient: float
    part: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Compute the next version; answered by a Versioned entry, or a StepFailed if payloads are damaged. `shards`: its
    digest is `combined` of so many parts'."""

    encoder: str
    version: int
    contributions: tuple[Contribution, ...]
    outer: OuterOptimizer
    combine: CombineRule = field(default_factory=CombineRule)
    shards: int = 1


@dataclass(frozen=True, slots=True)
class Publish:
    """Write the current version to the encoder's stream, before any message that follows it here. `again`: only for a
    node that did not find it there."""

    encoder: str
    version: int
    progress: float
    again: bool = False


@dataclass(frozen=True, slots=True)
class Provide:
    """Write the encoder's assets to their stream, before any message that follows it here. Twice does no harm: readers
    take the first whole one."""

    encoder: str


@dataclass(frozen=True, slots=True)
class DeleteStream:
    """Delete the encoder's parameter stream at the broker, with everything on it: everybody has its last version. With
    `assets`, the stream of its assets too.

    The shell deletes the queue `Topology.stream(encoder)`; one that is not there (this is carried out again after a
    crash) is no error. It forgets what it knew of the stream (that it is declared, what was written last, the time from
    which to read), because a later Publish of this encoder is to declare a new one.
    """

    encoder: str
    assets: bool = False


@dataclass(frozen=True, slots=True)
class Conclude:
    """The training has ended: export the encoder and keep it in the registry."""

    encoder: str
    version: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The update's payload is not needed (any more)."""

    payload: str


@dataclass(frozen=True, slots=True)
class SetAside:
    """The entry at `offset` is skipped: its message goes to the dead letters."""

    offset: int


Effect = Send | Broadcast | Generate | Step | Publish | Provide | DeleteStream | Conclude | Refused | SetAside
