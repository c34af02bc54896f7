"""Builds log entries by hand, folds them into a coordinator, and keeps what came out."""

from __future__ import annotations

import hashlib
from typing import Any

from common.wire.base import Message
from common.wire.to_master import Get, InstructionAck, Join, UpdateManifest
from common.wire.to_node import Receipt
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Effect, Send, Step
from master_service.decisions.records import (
    Configured,
    Entry,
    Generated,
    Loggable,
    Started,
    UpdateFacts,
    Versioned,
)
from master_service.decisions.settings import Claims, Settings
from tests.builders import LAYOUT, update_manifest

DIGEST = hashlib.sha256(b"version").hexdigest()


class Scenario:
    """A coordinator with a hand-written log. Steps are answered at once by a Versioned entry, as the shell does."""

    def __init__(self, claims: Claims = "compared", **settings: Any) -> None:
        self.coordinator = Coordinator()
        self.log: list[Entry] = []
        self.effects: list[Effect] = []
        self.at = 1000.0
        self.apply(Started(epoch=1, fingerprint={}))
        self.apply(Configured(settings=Settings(**settings), claims=claims))

    def apply(self, body: Loggable, facts: UpdateFacts | None = None, payload: str | None = None) -> list[Effect]:
        """Fold one entry and everything that follows from it; gives the effects in the order of the shell."""
        entry = Entry(len(self.log), f"message-{len(self.log)}", self.at, body, facts, payload)
        self.log.append(entry)
        effects = self.coordinator.handle(entry)
        self.effects += effects
        found = list(effects)
        for effect in effects:
            if isinstance(effect, Step):
                found += self.apply(Versioned(encoder=effect.encoder, version=effect.version, digest=DIGEST))
        return found

    def generate(self, encoder_type: str = "text") -> str:
        """Get an encoder and answer its generation; gives its id."""
        [effect] = self.apply(Get(sender="operator", encoder_type=encoder_type))
        name = effect.encoder  # type: ignore[union-attr]
        self.apply(
            Generated(encoder=name, architecture={}, layout=LAYOUT.plain(), layout_digest=LAYOUT.digest, digest=DIGEST)
        )
        return str(name)

    def join(self, node: str, encoder: str, samples: int = 100, incarnation: str = "first") -> list[Effect]:
        """Join and accept the instruction."""
        effects = self.apply(Join(node=node, incarnation=incarnation, types=["text"]))
        ack = InstructionAck(node=node, incarnation=incarnation, encoder=encoder, accepted=True, samples=samples)
        return effects + self.apply(ack)

    def update(self, node: str, encoder: str, sequence: int, base: int | None = None, **changes: Any) -> list[Effect]:
        """A well-formed update, but for `changes`; `base` is the current version by default."""
        manifest = self.manifest(node, encoder, sequence, base, **changes)
        return self.apply(manifest, *self.payload(manifest))

    def manifest(
        self, node: str, encoder: str, sequence: int, base: int | None = None, **changes: Any
    ) -> UpdateManifest:
        state = self.coordinator.state.encoders.get(encoder)
        version = base if base is not None else state.version if state else 0
        return update_manifest(node, sequence, encoder=encoder, **{"base_version": version, **changes})

    @staticmethod
    def payload(manifest: UpdateManifest, finite: bool = True, norm: float = 1.0) -> tuple[UpdateFacts, str]:
        facts = UpdateFacts(digest=manifest.digest, size=manifest.size, finite=finite, norm=norm)
        return facts, manifest.digest


def sent(effects: list[Effect], kind: type[Message], to: str | None = None) -> list[Any]:
    """The messages of a kind among the effects."""
    return [
        effect.message
        for effect in effects
        if isinstance(effect, Send) and isinstance(effect.message, kind) and to in (None, effect.to)
    ]


def receipts(effects: list[Effect], to: str | None = None) -> list[Receipt]:
    return sent(effects, Receipt, to)
