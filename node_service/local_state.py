"""What a node keeps on disk of the protocol: who it is, its next sequence number, and the updates it still owes."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from common.durable import write_durably
from common.errors import UserError
from common.messages import UpdateManifest
from common.slicing import SLICE, encoded_size


class Identity(BaseModel):
    """The node's id, its incarnation (new when the state directory is), and the next update's number."""

    node: str
    incarnation: str
    next_sequence: int = 0


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
    """The state directory of one node."""

    def __init__(self, directory: Path, node: str) -> None:
        self.directory = directory
        self._owed = directory / "owed"
        self._owed.mkdir(parents=True, exist_ok=True)
        path = directory / "identity.json"
        if path.exists():
            try:
                self.identity = Identity.model_validate_json(path.read_text())
            except ValidationError:
                raise UserError(f"{path}: damaged; remove {directory} to join as a new incarnation") from None
            if self.identity.node != node:
                raise UserError(
                    f"{directory} belongs to node {self.identity.node!r}, not {node!r}; give each node its own --state"
                )
        else:
            self.identity = Identity(node=node, incarnation=_new_incarnation())
            self._save()

    def reincarnate(self) -> None:
        """Begin anew under another incarnation; what was owed belonged to the old one."""
        self.identity = Identity(node=self.identity.node, incarnation=_new_incarnation())
        self._save()
        for path in self._owed.iterdir():
            path.unlink()

    def next_sequence(self) -> int:
        """A number that is never given out again, even after a crash."""
        sequence = self.identity.next_sequence
        self.identity = self.identity.model_copy(update={"next_sequence": sequence + 1})
        self._save()
        return sequence

    def owe(self, manifest: UpdateManifest, payload: bytes) -> None:
        """Keep an update until it is settled; the manifest last, because it says that the payload is whole."""
        write_durably(self._owed / f"{manifest.sequence:012d}.payload", payload)
        write_durably(self._owed / f"{manifest.sequence:012d}.json", manifest.model_dump_json().encode())

    def owed(self) -> list[Owed]:
        """Every unanswered update of this incarnation, oldest first."""
        found = []
        for path in sorted(self._owed.glob("*.json")):
            manifest = UpdateManifest.model_validate_json(path.read_text())
            if manifest.incarnation == self.identity.incarnation:
                found.append(Owed(manifest, path.with_suffix(".payload").read_bytes()))
        return found

    def find(self, sequence: int) -> Owed | None:
        """The owed update of this number."""
        return next((owed for owed in self.owed() if owed.manifest.sequence == sequence), None)

    def settle(self, sequence: int) -> None:
        """A receipt came: forget the update."""
        for suffix in ("json", "payload"):
            (self._owed / f"{sequence:012d}.{suffix}").unlink(missing_ok=True)

    def private(self, encoder: str) -> Path:
        """Where the private parts for one encoder are."""
        return self.directory / "encoders" / encoder

    def _save(self) -> None:
        write_durably(self.directory / "identity.json", json.dumps(self.identity.model_dump()).encode())


def _new_incarnation() -> str:
    return secrets.token_hex(6)
