"""The arithmetic of a master whose numbers lie with aggregators: each has its slices of every parameter set, and is
told what to do with them. A version is what they say together, and has the bits that one aggregator would make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.errors import BrokerUnavailable, Unroutable, UserError
from common.numbers.layout import Layout
from common.numbers.parameters import ParameterSet
from common.numbers.slicing import SLICE, EncodingName, payload_size, shard_slices, slice_count
from common.wire.transfer import combined
from master_service.arithmetic.aggregator import Target
from master_service.arithmetic.arithmetic import Elsewhere, Head, Outcome, PayloadsLost, Stepped
from master_service.arithmetic.export import export_encoder
from master_service.arithmetic.generation import fingerprint, generated
from master_service.arithmetic.measuring import Measurement, norm_of, scratch
from master_service.decisions.effects import Generate, Step
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState, State
from master_service.history.fold import Fold
from master_service.history.snapshot import SnapshotDirectory
from master_service.log.message_log import MessageLog
from master_service.log.parts import digests_of
from master_service.log.payloads import Payloads
from master_service.wire import orders
from master_service.wire.shards import Asked, Shards

#: How long a version is waited for before the master says that it waits, seconds.
_PATIENCE_SECONDS = 3.0
#: And how long each time that it is looked for again.
_MORE_SECONDS = 0.2


@dataclass
class _Held:
    """An encoder of so many numbers, whose current version has this digest."""

    size: int
    version: int
    digest: str


class RemoteArithmetic:
    """The Arithmetic over aggregators. Where these are not `patient`, a step raises ShardsAway after a while; all else
    that is asked for is waited for."""

    elsewhere = True

    def __init__(self, payloads: Payloads, shards: Shards) -> None:
        """`payloads`: the message log's, where version 0 of an encoder lies, and of an update what its parts are."""
        #: Nothing is here.
        self.targets: dict[str, Target] = {}
        self._payloads = payloads
        self._shards = shards
        self._held: dict[str, _Held] = {}
        #: By encoder: the version that was asked for and has not come.
        self._asked: dict[str, tuple[Step, Asked]] = {}
        self._room = scratch()

    def begin(self, encoder: str, layout: Layout, digest: str) -> None:
        """Waits until every shard has its part."""
        # one that dies while it is given its part begins anew
        while lacking := self._without(encoder, layout.size):
            if problem := self._payloads.damage(digest):
                raise PayloadsLost({digest: problem})
            self._place(encoder, layout.size, digest, lacking)
        self._held[encoder] = _Held(layout.size, 0, digest)

    def _without(self, encoder: str, size: int) -> list[int]:
        """The shards that do not have an encoder, and wait for their part of version 0 now."""
        here = self._all(orders.Begin, lambda _: {"encoder": encoder, "size": size})
        return [shard for shard, answer in here.items() if answer.version < 0]

    def _place(self, encoder: str, size: int, digest: str, lacking: list[int]) -> None:
        parts = shard_slices(slice_count(size), self._shards.count)
        for turn in range(max(len(parts[shard]) for shard in lacking)):

            def slice_of(shard: int, turn: int = turn) -> dict[str, Any] | None:
                if shard not in lacking or turn >= len(parts[shard]):
                    return None
                index = parts[shard][turn]
                data = self._payloads.read(digest, 4 * SLICE * index, 4 * SLICE)
                return {"encoder": encoder, "size": size, "index": index, "data": data}

            self._all(orders.Place, slice_of)

    def restore(self, state: State) -> None:
        """Go on from a snapshot's state."""
        for name, encoder in state.encoders.items():
            if encoder.layout:
                self._held[name] = _Held(encoder.size, encoder.version, encoder.digest)

    def step(self, step: Step) -> Stepped:
        asked, patience = self._asked.get(step.encoder), _MORE_SECONDS
        if asked is None or asked[0] != step:
            if asked is not None:
                self._shards.forget(asked[1])
            asked, patience = (step, self._ask(step)), _PATIENCE_SECONDS
            self._asked[step.encoder] = asked
        answers = self._shards.answers(asked[1], None if self._shards.patient else patience)
        del self._asked[step.encoder]
        if lost := {part for answer in answers.values() for part in answer.lost}:
            wholes = [each.payload for each in step.contributions if lost & set(self._parts(each.payload))]
            raise PayloadsLost(dict.fromkeys(wholes, "damaged or missing where its aggregator keeps it"))
        digest = combined([answer.digest or "" for answer in answers.values()])
        held = self._held[step.encoder]
        held.version, held.digest = step.version, digest
        squares = [square for answer in answers.values() for square in orders.unpacked(answer.squares)]
        return Stepped(digest, norm_of(squares), squares)

    def _ask(self, step: Step) -> Asked:
        problems = {each.payload: self._payloads.damage(each.payload, again=False) for each in step.contributions}
        if lost := {payload: problem for payload, problem in problems.items() if problem is not None}:
            raise PayloadsLost(lost)
        parts = [self._parts(each.payload) for each in step.contributions]

        def of(shard: int) -> dict[str, Any]:
            contributions = [
                orders.Part(
                    payload=of_each[shard], encoding=each.encoding, coefficient=each.coefficient, part=each.part
                )
                for each, of_each in zip(step.contributions, parts, strict=True)
            ]
            return {
                "encoder": step.encoder,
                "version": step.version,
                "contributions": contributions,
                "outer": step.outer,
                "combine": step.combine,
            }

        return self._shards.ask(orders.Compute, of)

    def _parts(self, whole: str) -> list[str]:
        """The digests of the parts of an update, by shard."""
        return digests_of(self._payloads.read(whole))

    def hold(self) -> Callable[[], None]:
        """What there is to copy of the numbers, their aggregators copy."""
        return lambda: None

    def digest(self, encoder: str) -> str:
        return self._held[encoder].digest

    def measurement(self, size: int, encoding: EncodingName) -> Measurement:
        return Measurement(size, encoding, self._room)

    def generated(self, effect: Generate) -> list[Outcome]:
        return generated(effect)

    def encoded(self, encoder: str, encoding: EncodingName) -> Elsewhere:
        """Encoded by each shard as it is now, before whatever it is ordered next."""
        held = self._held[encoder]
        fields = {"encoder": encoder, "version": held.version, "encoding": encoding}
        asked = self._shards.ask(orders.Encode, lambda _: fields)
        publish = partial(self._publish, asked, held.size, encoding)
        return Elsewhere(slice_count(held.size), payload_size(held.size, encoding), publish)

    def _publish(self, asked: Asked, size: int, encoding: EncodingName, head: Head) -> str | None:
        """In the thread that serves the outbox."""
        answers = self._shards.answers(asked).values()
        digests = [answer.digest for answer in answers if answer.digest is not None]
        if len(digests) < len(answers):
            # a shard died meanwhile, and may go on from a later version: who waits for this one asks for another
            return None
        digest = combined(digests)
        fields = {
            "encoder": head.encoder,
            "version": head.version,
            "epoch": head.epoch,
            "encoding": encoding,
            "layout_digest": head.layout_digest,
            "digest": digest,
            "elements": size,
            "progress": head.progress,
        }
        issued = self._all(orders.Issue, lambda _: fields).values()
        if any(answer.unroutable for answer in issued):
            raise Unroutable(f"there is no stream of {head.encoder}")
        return None if any(answer.gone for answer in issued) else digest

    def export(self, directory: Path, encoder: EncoderState, settings: Settings) -> None:
        export_encoder(directory, encoder, settings, self._gathered(encoder), self._payloads)

    def _gathered(self, encoder: EncoderState) -> ParameterSet:
        """The whole parameter set, slice by slice from each shard. Raises UserError if one does not give it."""
        held, vector = self._held[encoder.encoder], torch.empty(encoder.size)
        parts = shard_slices(slice_count(encoder.size), self._shards.count)
        try:
            for turn in range(max(map(len, parts))):

                def wanted(shard: int, turn: int = turn) -> dict[str, Any] | None:
                    if turn >= len(parts[shard]):
                        return None
                    return {"encoder": encoder.encoder, "version": held.version, "index": parts[shard][turn]}

                for shard, answer in self._all(orders.Read, wanted).items():
                    begin = SLICE * parts[shard][turn]
                    piece = torch.frombuffer(bytearray(answer.data), dtype=torch.float32)
                    vector[begin : begin + len(piece)] = piece
        except BrokerUnavailable as error:
            raise UserError(f"its aggregators did not give it: {error}") from None
        return ParameterSet(Layout(encoder.layout), vector)

    def fingerprint(self) -> dict[str, str]:
        return fingerprint()

    def _all(self, kind: type[orders.Order], fields: Any) -> dict[int, orders.Done]:
        return self._shards.answers(self._shards.ask(kind, fields))


class RemoteSnapshots(SnapshotDirectory):
    """Snapshots of what was decided; the aggregators have their own of the numbers."""

    def __init__(self, log: MessageLog, shards: Shards) -> None:
        super().__init__(log)
        self._shards = shards

    def read(self) -> Fold[Any]:
        found, remote = super().read(), RemoteArithmetic(self._log.payloads, self._shards)
        remote.restore(found.coordinator.state)
        return Fold(remote, found.coordinator.state, found.offset)
