"""Coordinator and aggregator together: the fold over the log that the running master, recovery and replay share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common.layout import Layout
from common.parameters import ParameterSet
from master_service.aggregator import Aggregator
from master_service.coordinator import Coordinator
from master_service.effects import Effect, Step
from master_service.entries import Entry, Generated, Versioned
from master_service.message_log import MessageLog, PayloadStore
from master_service.state import State


@dataclass(frozen=True, slots=True)
class Check:
    """A version that the log names, and whether the fold came to the same bits."""

    encoder: str
    version: int
    logged: str
    computed: str

    @property
    def identical(self) -> bool:
        return self.logged == self.computed


class Fold:
    """Applies entries. Steps are computed at once; `unlogged` holds versions whose Versioned entry is not there yet."""

    def __init__(self, payloads: PayloadStore, state: State | None = None) -> None:
        self.coordinator = Coordinator(state)
        self.aggregator = Aggregator(payloads)
        self.unlogged: dict[str, Versioned] = {}

    def apply(self, entry: Entry) -> list[Effect]:
        """Fold one entry. Of the effects that remain for the shell a Step is done: its version is to be logged."""
        if isinstance(entry.body, Generated):
            self.aggregator.begin(entry.body.encoder, Layout(entry.body.layout), entry.body.digest)
        if isinstance(entry.body, Versioned):
            self.unlogged.pop(entry.body.encoder, None)
        effects = self.coordinator.handle(entry)
        for effect in effects:
            if isinstance(effect, Step):
                digest = self.aggregator.step(effect)
                self.unlogged[effect.encoder] = Versioned(encoder=effect.encoder, version=effect.version, digest=digest)
        return effects

    def replay(self, entries: Iterable[Entry]) -> Iterator[Check]:
        """Fold a log from where this fold stands; yields every version with the digest that was logged for it."""
        for entry in entries:
            body = entry.body
            if isinstance(body, Versioned):
                mine = self.unlogged.get(body.encoder)
                computed = mine.digest if mine is not None and mine.version == body.version else ""
                yield Check(body.encoder, body.version, body.digest, computed)
            self.apply(entry)
            if isinstance(body, Generated):
                target = self.aggregator.targets[body.encoder]
                yield Check(body.encoder, 0, body.digest, target.parameters.digest())


def rebuild(log: MessageLog, encoder: str, version: int | None = None) -> ParameterSet:
    """Compute a version (the newest by default) of an encoder from the log alone.

    Raises KeyError if the log does not hold it, ValueError at the first version that is not what was published.
    """
    fold, newest = Fold(log.payloads), -1
    for check in fold.replay(log.entries()):
        if not check.identical:
            raise ValueError(f"version {check.version} of {check.encoder} is not what the log says")
        if check.encoder == encoder:
            newest = check.version
            if newest == version:
                return fold.aggregator.targets[encoder].parameters
    if newest < 0 or version is not None:
        raise KeyError(f"version {'0' if version is None else version} of {encoder} is not in the log")
    return fold.aggregator.targets[encoder].parameters
