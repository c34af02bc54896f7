"""Updates on their way to the master: owed on disk before they are sent, sent again until a receipt answers them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from common.clock import Clock
from common.crash_points import reached
from common.wire.bounds import MAX_WHOLE
from common.wire.fields import MAX_ATTEMPT
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt
from node_service.handover.local_state import LocalState
from node_service.handover.outbox import Outbox


class Handover:
    """Sends what the state directory says is owed, and knows when each of it was sent."""

    def __init__(self, state: LocalState, outbox: Outbox, clock: Clock) -> None:
        self._state = state
        self._outbox = outbox
        self._clock = clock
        self._sent_at: dict[int, float] = {}
        self._times: Counter[int] = Counter()

    def hand_over(self, manifest: UpdateManifest, bodies: Sequence[bytes]) -> None:
        """A new update. Once this returns, or was killed after the first half of it, the update will be answered."""
        reached("node before owe")
        numbered = manifest.model_copy(update={"order": self._state.next_order()})
        self._state.owe(numbered, *bodies)
        reached("node after owe")
        self._send(numbered)

    def send_owed(self) -> None:
        """Send everything that is owed as its next attempt: after a start, or to a master that has not looked at it."""
        for sequence in list(self._state.owed):
            self.send_again(sequence)

    def send_unanswered(self, after: float) -> None:
        """Send again what was sent `after` seconds ago or earlier, but not while nothing can leave here. The wait
        doubles each time, up to sixteen times `after`: more of the same does not help a master with a backlog.
        """
        now = self._clock.monotonic()
        for sequence, at in list(self._sent_at.items()):
            if self._outbox.problem:
                self._sent_at[sequence] = now
            elif now - at >= after * 2 ** min(self._times[sequence], 4):
                self._times[sequence] += 1
                self.send_again(sequence)

    def send_again(self, sequence: int, attempt: int | None = None, beyond: int = 0) -> UpdateManifest | None:
        """The same update as another attempt, the next by default, of an order above `beyond`.

        Not as one that it was sent as already: that one is on its way, and each stale answer would beget another. None,
        and nothing happens, for that and for an update that is owed no more.
        """
        owed = self._state.owed.get(sequence)
        if owed is None or (attempt is not None and attempt <= owed.attempt):
            return None
        number = owed.attempt + 1 if attempt is None else attempt
        manifest = owed.model_copy(update={"attempt": number, "order": self._state.next_order(beyond)})
        self._state.sent_as(manifest)
        self._send(manifest)
        return manifest

    def mistaken(self, receipt: Receipt) -> bool:
        """Whether a receipt answers another update under the number of one that is owed. The encoder does not matter:
        an incarnation gives each number once."""
        owed = self._state.owed.get(receipt.sequence)
        return owed is not None and owed.incarnation == receipt.incarnation and owed.digest != receipt.digest

    def answered(self, receipt: Receipt) -> bool:
        """Remember the receipt, then forget the update that it answers. False for a receipt that came before."""
        reached("node before receipt")
        new = self._state.remember(receipt)
        reached("node after receipt")
        self._state.answered(receipt.sequence)
        self._sent_at.pop(receipt.sequence, None)
        self._times.pop(receipt.sequence, None)
        return new

    @property
    def numbers_used_up(self) -> bool:
        """Whether what is sent next would have a number that no master reads. Whoever counts alone does not live so
        long, but a message may say which number to go on from."""
        if self._state.identity.next_order > MAX_WHOLE:
            return True
        owed = self._state.owed
        return bool(owed) and max(manifest.attempt for manifest in owed.values()) >= MAX_ATTEMPT

    def forget(self) -> None:
        """What was sent belongs to another incarnation."""
        self._sent_at.clear()
        self._times.clear()

    def _send(self, manifest: UpdateManifest) -> None:
        self._sent_at[manifest.sequence] = self._clock.monotonic()
        self._outbox.update(manifest)
