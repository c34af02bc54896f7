"""What a node keeps on disk of the protocol: who it is, its next sequence number, what it trains, the updates that it
still owes, and the receipts. One process at a time."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from common.durable import write_durably
from common.errors import UserError
from common.locks import DirectoryLock
from common.numbers.slicing import SLICE, encoded_size
from common.wire.messages import Instruction, Receipt, Rule, UpdateManifest
from node_service.handover.receipt_book import Ledger, ReceiptBook

log = structlog.get_logger()

M = TypeVar("M", bound=BaseModel)


class Identity(BaseModel):
    """The node's id, its incarnation (new when the state directory is), and the next update's number."""

    node: str
    incarnation: str
    next_sequence: int = 0


class Current(BaseModel):
    """What this incarnation trains: enough to go on after a restart without hearing from the master."""

    incarnation: str
    instruction: Instruction
    rule: Rule


@dataclass(frozen=True)
class Owed:
    """An update that no receipt has answered yet, as it was encoded."""

    manifest: UpdateManifest
    payload: bytes

    def bodies(self) -> list[bytes]:
        """The payload cut into its chunks again: all are as long as a whole slice, but for the last."""
        length = encoded_size(SLICE, self.manifest.encoding)
        return [self.payload[start : start + length] for start in range(0, max(len(self.payload), 1), length)]


class LocalState:
    """The state directory of one node, locked until `close`."""

    def __init__(self, directory: Path, node: str) -> None:
        """Raises LockHeld if another process works in it, UserError if it is another node's or damaged."""
        self.directory = directory
        self._owed = directory / "owed"
        self._current = directory / "current.json"
        self._lock = DirectoryLock(directory)
        try:
            self._open(node)
        except BaseException:
            self._lock.close()  # whatever it was: who is not made must not keep the directory from the next
            raise

    def close(self) -> None:
        """Let another process work in the directory."""
        self._lock.close()

    def _open(self, node: str) -> None:
        self._owed.mkdir(exist_ok=True)
        path = self.directory / "identity.json"
        if path.exists():
            self.identity = self._read(path, Identity)
            if self.identity.node != node:
                raise UserError(
                    f"{self.directory} belongs to node {self.identity.node!r}, not {node!r}; "
                    "give each node its own --state"
                )
        else:
            self.identity = Identity(node=node, incarnation=_new_incarnation())
            self._save()
        self._receipts = ReceiptBook(self.directory / "receipts.jsonl")
        answered = {receipt.sequence: receipt for receipt in self._receipts.of(self.identity.incarnation)}
        self._sweep(set(answered))
        newest = max((*answered, *(manifest.sequence for manifest in self._manifests())), default=-1)
        if newest >= self.identity.next_sequence:
            # the parts of a backup may be of different moments
            self.identity = self.identity.model_copy(update={"next_sequence": newest + 1})
            self._save()
        if any(receipt.reason == "conflict" for receipt in answered.values()):
            self.reincarnate()  # the last process heard of it, and died before it could do so

    # --- identity ----------------------------------------------------------------------------------------------------

    def reincarnate(self) -> None:
        """Begin anew under another incarnation; what was owed and trained belonged to the old one."""
        self.identity = Identity(node=self.identity.node, incarnation=_new_incarnation())
        self._save()
        self.forget_current()
        self._sweep(set())

    def next_sequence(self) -> int:
        """A number that is never given out again, even after a crash."""
        sequence = self.identity.next_sequence
        self.identity = self.identity.model_copy(update={"next_sequence": sequence + 1})
        self._save()
        return sequence

    # --- what is trained ---------------------------------------------------------------------------------------------

    def remember_current(self, instruction: Instruction, rule: Rule) -> None:
        """This is trained from now on."""
        current = Current(incarnation=self.identity.incarnation, instruction=instruction, rule=rule)
        write_durably(self._current, current.model_dump_json().encode())

    def current(self) -> Current | None:
        """What this incarnation trained last, if it has not been forgotten."""
        if not self._current.exists():
            return None
        try:
            current = Current.model_validate_json(self._current.read_bytes())
        except ValidationError:
            log.warning("damaged and not used: the master says again what is trained", file=str(self._current))
            return None
        return current if current.incarnation == self.identity.incarnation else None

    def forget_current(self) -> None:
        """It is finished, or not ours to train."""
        self._current.unlink(missing_ok=True)

    # --- updates and receipts ----------------------------------------------------------------------------------------

    def owe(self, manifest: UpdateManifest, payload: bytes) -> None:
        """Keep an update, or its next attempt, until it is settled.

        The manifest comes last, because it says that the payload is whole; a payload is written once.
        """
        json_file, payload_file = self._files(manifest.sequence)
        if not payload_file.exists():
            write_durably(payload_file, payload)
        write_durably(json_file, manifest.model_dump_json().encode())

    def owed(self) -> list[Owed]:
        """Every unanswered update of this incarnation, oldest first."""
        return [owed for manifest in self._manifests() if (owed := self.find(manifest.sequence)) is not None]

    def find(self, sequence: int) -> Owed | None:
        """The owed update of this number."""
        manifest = self.manifest(sequence)
        return None if manifest is None else Owed(manifest, self._files(sequence)[1].read_bytes())

    def manifest(self, sequence: int) -> UpdateManifest | None:
        """The manifest of the owed update of this number."""
        json_file, _ = self._files(sequence)
        return self._read(json_file, UpdateManifest) if json_file.exists() else None

    def remember(self, receipt: Receipt) -> bool:
        """Keep a receipt for good; False if it is known already."""
        return self._receipts.remember(receipt)

    def settle(self, sequence: int) -> None:
        """A receipt is remembered: the update is owed no more."""
        for path in self._files(sequence):
            path.unlink(missing_ok=True)

    def ledger(self, encoder: str) -> Ledger:
        """What became of this incarnation's updates of an encoder."""
        incarnation = self.identity.incarnation
        return Ledger(
            incarnation,
            {receipt.sequence: receipt for receipt in self._receipts.of(incarnation) if receipt.encoder == encoder},
            {manifest.sequence: manifest for manifest in self._manifests() if manifest.encoder == encoder},
        )

    def private(self, encoder: str) -> Path:
        """Where the private parts for one encoder are."""
        return self.directory / "encoders" / encoder

    # --- files -------------------------------------------------------------------------------------------------------

    def _manifests(self) -> list[UpdateManifest]:
        return [self._read(path, UpdateManifest) for path in sorted(self._owed.glob("*.json"))]

    def _files(self, sequence: int) -> tuple[Path, Path]:
        """Manifest and payload of an owed update; the manifest goes first and comes last."""
        return self._owed / f"{sequence:012d}.json", self._owed / f"{sequence:012d}.payload"

    def _sweep(self, answered: set[int]) -> None:
        """Remove what a killed process left: updates that are answered or of another incarnation, halves of pairs."""
        kept = set()
        for path in sorted(self._owed.glob("*.json")):
            manifest = self._read(path, UpdateManifest)
            ours = manifest.incarnation == self.identity.incarnation and manifest.sequence not in answered
            if ours and path.with_suffix(".payload").exists():
                kept.add(path.stem)
            else:
                path.unlink()
        for path in sorted(self._owed.iterdir()):
            if path.suffix not in (".json", ".payload") or path.stem not in kept:
                path.unlink()  # a payload alone was never sent: its number stays unused

    def _read(self, path: Path, model: type[M]) -> M:
        try:
            return model.model_validate_json(path.read_bytes())
        except ValidationError:
            raise UserError(f"{path}: damaged; remove {self.directory} to join as a new incarnation") from None

    def _save(self) -> None:
        write_durably(self.directory / "identity.json", json.dumps(self.identity.model_dump()).encode())


def _new_incarnation() -> str:
    return secrets.token_hex(6)
