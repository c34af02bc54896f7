"""What a node keeps on disk of the protocol: who it is, its next sequence number, what it trains, the assets of that,
the updates that it still owes, and the receipts. The one owner of all of these; one process at a time."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from common.errors import UserError
from common.locks import DirectoryLock
from common.numbers.slicing import slice_bytes
from common.wire.to_master import UpdateManifest
from common.wire.to_node import Instruction, Receipt, Rule
from node_service.handover.asset_cache import AssetCache
from node_service.handover.deadly import Guard
from node_service.handover.receipt_book import Ledger, ReceiptBook
from node_service.handover.store import DirectoryStore, Store

log = structlog.get_logger()

M = TypeVar("M", bound=BaseModel)

_IDENTITY, _CURRENT, _FINISHING, _OWED = "identity.json", "current.json", "finishing.json", "owed"
#: Orders that are noted as given out at a time, so that not each is a write to the disk.
_ORDERS = 64


class Identity(BaseModel):
    """The node's id, its incarnation (new when the state directory is), the next update's number, and a number of what
    is sent, repeats included, above all that were given out."""

    node: str
    incarnation: str
    next_sequence: int = 0
    next_order: int = 1


class Current(BaseModel):
    """What this incarnation trains: enough to go on after a restart without hearing from the master."""

    incarnation: str
    instruction: Instruction
    rule: Rule


def random_incarnation() -> str:
    """An id that no other incarnation of any node has."""
    return secrets.token_hex(6)


def open_local_state(directory: Path, node: str) -> LocalState:
    """The state directory of one node, locked until `close`.

    Raises LockHeld if another process works in it, UserError if it is another node's or damaged.
    """
    lock = DirectoryLock(directory)
    try:
        return LocalState(DirectoryStore(directory), node, on_close=lock.close)
    except BaseException:
        lock.close()  # whatever it was: who is not made must not keep the directory from the next
        raise


class LocalState:
    """The state of one node in a store. Raises UserError if it is another node's or damaged."""

    def __init__(
        self,
        store: Store,
        node: str,
        *,
        new_incarnation: Callable[[], str] = random_incarnation,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._new_incarnation = new_incarnation
        self._on_close = on_close
        self._owed: dict[int, UpdateManifest] = {}
        found = self._read(_IDENTITY, Identity)
        if found is not None and found.node != node:
            raise UserError(
                f"{store.place} belongs to node {found.node!r}, not {node!r}; give each node its own --state"
            )
        self.identity = found or Identity(node=node, incarnation=new_incarnation())
        self._next_order = self.identity.next_order
        if found is None:
            self._save()
        self.assets = AssetCache(store)
        self.guard = Guard(store)
        self._receipts = ReceiptBook(store)
        answered = {receipt.sequence: receipt for receipt in self._receipts.of(self.identity.incarnation)}
        self._sweep(set(answered))
        newest = max((*answered, *self._owed), default=-1)
        if newest >= self.identity.next_sequence:
            # the parts of a backup may be of different moments
            self.identity = self.identity.model_copy(update={"next_sequence": newest + 1})
            self._save()
        if any(receipt.reason == "conflict" for receipt in answered.values()):
            self.reincarnate()  # the last process heard of it, and died before it could do so

    def close(self) -> None:
        """Let another process work in the directory."""
        self._on_close()

    # --- identity ----------------------------------------------------------------------------------------------------

    def reincarnate(self) -> None:
        """Begin anew under another incarnation; what was owed and trained belonged to the old one."""
        self.identity = Identity(node=self.identity.node, incarnation=self._new_incarnation())
        self._next_order = self.identity.next_order
        self._save()
        self.forget_current()
        self._sweep(set())

    def next_sequence(self) -> int:
        """A number that is never given out again, even after a crash."""
        sequence = self.identity.next_sequence
        self.identity = self.identity.model_copy(update={"next_sequence": sequence + 1})
        self._save()
        return sequence

    def next_order(self, beyond: int = 0) -> int:
        """The next number of what is sent, above `beyond`; never given out again, even after a crash."""
        order = max(self._next_order, beyond + 1)
        if order >= self.identity.next_order:
            self.identity = self.identity.model_copy(update={"next_order": order + _ORDERS})
            self._save()
        self._next_order = order + 1
        return order

    # --- what its owner may read --------------------------------------------------------------------------------------

    def keep_words(self, words: str) -> Path:
        """Keep the list of words that is about to be sent, durably; gives the file. Each different list has its own:
        none that may have left is overwritten."""
        content = words.encode()
        name = f"words/{hashlib.sha256(content).hexdigest()[:16]}.txt"
        self._store.write(name, content)
        return self._store.place / name

    # --- what is trained ---------------------------------------------------------------------------------------------

    def remember_current(self, instruction: Instruction, rule: Rule) -> None:
        """This is trained from now on."""
        current = Current(incarnation=self.identity.incarnation, instruction=instruction, rule=rule)
        self._store.write(_CURRENT, current.model_dump_json().encode())

    def current(self) -> Current | None:
        """What this incarnation trained last, if it has not been forgotten."""
        current = self._known(_CURRENT, Current, "the master says again what is trained")
        return current if current is not None and current.incarnation == self.identity.incarnation else None

    def forget_current(self) -> None:
        """It is finished, or not ours to train."""
        self._store.remove(_CURRENT)

    def remember_finishing(self, instruction: Instruction) -> None:
        """The training of this encoder has ended, and its finishing phase goes on; that is no incarnation's."""
        self._store.write(_FINISHING, instruction.model_dump_json().encode())

    def finishing(self) -> Instruction | None:
        """What is in its finishing phase."""
        return self._known(_FINISHING, Instruction, "the rest of the finishing phase is left out")

    def forget_finishing(self) -> None:
        """The phase has ended."""
        self._store.remove(_FINISHING)

    # --- updates and receipts ----------------------------------------------------------------------------------------

    @property
    def owed(self) -> Mapping[int, UpdateManifest]:
        """The updates of this incarnation that no receipt has answered yet, by number, oldest first."""
        return self._owed

    def owe(self, manifest: UpdateManifest, *payload: bytes) -> None:
        """Keep a new update, whose payload may come in parts, until it is answered. Its manifest is written last: it
        says that the payload is whole."""
        self._store.write(_payload(manifest.sequence), *payload)
        self.sent_as(manifest)

    def sent_as(self, manifest: UpdateManifest) -> None:
        """Keep the manifest of an owed update's newest attempt."""
        self._store.write(_manifest(manifest.sequence), manifest.model_dump_json().encode())
        self._owed[manifest.sequence] = manifest

    def chunk(self, manifest: UpdateManifest, index: int) -> bytes | None:
        """A slice of an owed update's payload; None once it is owed no more."""
        length = slice_bytes(manifest.encoding)
        return self._store.read(_payload(manifest.sequence), index * length, length)

    def remember(self, receipt: Receipt) -> bool:
        """Keep a receipt for good; False if it is known already."""
        return self._receipts.remember(receipt)

    def answered(self, sequence: int) -> None:
        """A receipt is remembered: the update is owed no more."""
        self._owed.pop(sequence, None)
        for name in (_manifest(sequence), _payload(sequence)):
            self._store.remove(name)

    def ledger(self, encoder: str) -> Ledger:
        """What became of this incarnation's updates of an encoder."""
        incarnation = self.identity.incarnation
        return Ledger(
            incarnation,
            {receipt.sequence: receipt for receipt in self._receipts.of(incarnation) if receipt.encoder == encoder},
            {number: manifest for number, manifest in self._owed.items() if manifest.encoder == encoder},
        )

    # --- files -------------------------------------------------------------------------------------------------------

    def _sweep(self, answered: set[int]) -> None:
        """Remove what a killed process left: updates that are answered or of another incarnation, and payloads without
        a manifest, which were never sent: their numbers stay unused."""
        self._owed = {}
        names = self._store.names(_OWED)
        for name in names:
            manifest = self._read(name, UpdateManifest) if name.endswith(".json") else None
            if manifest is None or manifest.incarnation != self.identity.incarnation or manifest.sequence in answered:
                continue
            if _payload(manifest.sequence) in names:
                self._owed[manifest.sequence] = manifest
        kept = {name(sequence) for sequence in self._owed for name in (_manifest, _payload)}
        for name in names:
            if name not in kept:
                self._store.remove(name)

    def _known(self, name: str, model: type[M], otherwise: str) -> M | None:
        """A file that can be done without; `otherwise` says what happens then."""
        content = self._store.read(name)
        try:
            return None if content is None else model.model_validate_json(content)
        except ValidationError:
            log.warning(f"damaged and not used: {otherwise}", file=str(self._store.place / name))
            return None

    def _read(self, name: str, model: type[M]) -> M | None:
        content = self._store.read(name)
        try:
            return None if content is None else model.model_validate_json(content)
        except ValidationError:
            place = self._store.place
            raise UserError(f"{place / name}: damaged; remove {place} to join as a new incarnation") from None

    def _save(self) -> None:
        self._store.write(_IDENTITY, json.dumps(self.identity.model_dump()).encode())


def _manifest(sequence: int) -> str:
    return f"{_OWED}/{sequence:012d}.json"


def _payload(sequence: int) -> str:
    return f"{_OWED}/{sequence:012d}.payload"
