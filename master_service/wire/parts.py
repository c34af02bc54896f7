"""Receiving one update by parts: each aggregator fetches its own from a queue of its own, and tells what it is; the
whole is what they say together."""

from __future__ import annotations

import math
from collections.abc import Callable

from common.wire.broker import Delivery
from common.wire.to_master import UpdateManifest
from common.wire.transfer import combined
from master_service.arithmetic.measuring import norm_of
from master_service.decisions.records import UpdateFacts
from master_service.wire import orders
from master_service.wire.intake import CompleteUpdate
from master_service.wire.shards import Shards


class PartsIntake:
    """Has the parts of one update fetched; `add` what the shards say of it."""

    def __init__(
        self,
        shards: Shards,
        manifest: UpdateManifest,
        announcement: Delivery,
        keep: Callable[[bytes], str],
    ) -> None:
        """`keep` gives bytes that are to lie in the log's payloads their digest; it raises StorageBlocked."""
        self.manifest = manifest
        self.announcement = announcement
        self.overtaken = 0
        self._shards = shards
        self._keep = keep
        self._reports: dict[int, orders.Arriving] = {}
        self._over = False
        self.take()

    def take(self, shard: int | None = None) -> None:
        """Have it fetched, by one shard that may have lost the order, or by all."""
        self._shards.tell(orders.Take, shard, manifest=self.manifest.bare())

    def add(self, report: orders.Arriving) -> CompleteUpdate | None:
        """What a shard says; the update, once all of it is durable there."""
        if (report.update, report.attempt) != (self.manifest.update_id, self.manifest.attempt) or self._over:
            return None
        self.overtaken = max(self.overtaken, report.overtaken)
        self._reports[report.shard] = report
        parts = [self._reports.get(shard) for shard in range(self._shards.count)]
        whole = [part for part in parts if part is not None and part.digest is not None]
        if len(whole) < len(parts):
            return None
        self._over = True
        return CompleteUpdate(self.manifest, _Parts(self, whole), (self.announcement,))

    @property
    def here(self) -> int:
        return sum(report.here for report in self._reports.values())

    @property
    def progress(self) -> str:
        return f"{self.here} of {self.manifest.chunks} chunks came"

    def stop(self) -> None:
        """Who has all of a part fetches nothing more."""

    def close(self) -> None:
        if not self._over:
            self._over = True
            self._shards.tell(orders.Leave, node=self.manifest.node)

    def kept(self, parts: list[orders.Arriving]) -> UpdateFacts:
        """What the parts are together. Their digests, one after the other, are the payload that the log has: its own
        digest is that of the whole."""
        digests = [part.digest for part in parts if part.digest is not None]
        digest = self._keep(bytes.fromhex("".join(digests)))
        assert digest == combined(digests), "a payload is named by its digest"
        norm = norm_of(square for part in parts for square in orders.unpacked(part.squares))
        finite = math.isfinite(norm) and all(part.fits for part in parts)
        self._shards.tell(orders.Keep, update=self.manifest.update_id, digest=digest)
        size = sum(part.size for part in parts)
        return UpdateFacts(digest=digest, size=size, finite=finite, norm=norm if finite else 0.0)


class _Parts:
    """An update that lies with the shards."""

    def __init__(self, intake: PartsIntake, parts: list[orders.Arriving]) -> None:
        self._intake, self._parts = intake, parts

    def add(self, body: bytes) -> None:
        """All of it has come."""

    def kept(self) -> UpdateFacts:
        return self._intake.kept(self._parts)

    def discard(self) -> None:
        """Whoever takes it again finds it there."""
