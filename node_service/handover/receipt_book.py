"""The receipts that answered this node's updates, remembered for good: one JSON line each in `receipts.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from common.errors import UserError
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt
from node_service.handover.store import Store

#: The name of the file.
RECEIPTS = "receipts.jsonl"


@dataclass(frozen=True)
class Ledger:
    """What became of one incarnation's updates of one encoder, by number: `answered` by a receipt, or still `owed`.

    No update is in neither: it is owed before it is sent, and a receipt is remembered before it is owed no more.
    """

    incarnation: str = ""
    answered: Mapping[int, Receipt] = field(default_factory=dict)
    owed: Mapping[int, UpdateManifest] = field(default_factory=dict)

    @property
    def next_sequence(self) -> int:
        """One more than the number of the last update that was handed in."""
        return 1 + max((*self.answered, *self.owed), default=-1)

    @property
    def wait_until_version(self) -> int:
        """Under a rule that waits for the answer to an update, training goes on from a version above this one."""
        last = self.next_sequence - 1
        if last in self.owed:
            return self.owed[last].base_version
        receipt = self.answered.get(last)
        return receipt.version - 1 if receipt is not None and receipt.accepted else -1


class ReceiptBook:
    """The file of receipts. Each (encoder, incarnation, sequence) stands in it once."""

    def __init__(self, store: Store) -> None:
        """Raises UserError for a damaged line; the last one may be torn (a kill while it was written), and is cut."""
        self._store = store
        self._known: dict[tuple[str, str, int], Receipt] = {}
        raw = store.read(RECEIPTS) or b""
        whole, _, torn = raw.rpartition(b"\n")
        if torn:
            store.cut(RECEIPTS, len(raw) - len(torn))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                receipt = Receipt.model_validate_json(line)
            except ValidationError:
                # without it, steps might be handed in a second time
                raise UserError(
                    f"{store.place / RECEIPTS}: line {number} is damaged; restore it from a backup, "
                    f"or remove {store.place} to join as a new incarnation"
                ) from None
            self._known[_key(receipt)] = receipt

    def remember(self, receipt: Receipt) -> bool:
        """Append a receipt durably; False if it is here already."""
        if _key(receipt) in self._known:
            return False
        self._store.append(RECEIPTS, receipt.model_dump_json().encode() + b"\n")
        self._known[_key(receipt)] = receipt
        return True

    def of(self, incarnation: str) -> list[Receipt]:
        """Every receipt of this incarnation, in the order in which they came."""
        return [receipt for receipt in self._known.values() if receipt.incarnation == incarnation]


def _key(receipt: Receipt) -> tuple[str, str, int]:
    return receipt.encoder, receipt.incarnation, receipt.sequence
