"""Is the log what was written, and does it lead to what a node was told? By the rows alone: no tensor is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from common.clock import SYSTEM
from common.errors import Damaged, UserError
from common.wire.to_node import Receipt
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Send
from master_service.decisions.records import Repaired, StepFailed, unpack
from master_service.decisions.state import State
from master_service.history.snapshot import read_snapshot, whole_snapshots
from master_service.log.message_log import MessageLog, sender_of

#: encoder, node, incarnation, sequence
UpdateId = tuple[str, str, str, int]


@dataclass
class Soundness:
    """`damage` says in words what is not what was written; everything is well if it is empty."""

    rows: int = 0
    payloads: int = 0
    dropped: int = 0
    asked_again: int = 0
    snapshots: int = 0
    unreferenced: int = 0
    damage: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(log: MessageLog, on_item: Callable[[str], None] = lambda what: None) -> Soundness:
    """Check every row's chain, every payload's bytes and every snapshot. `on_item` is called with "row" or "payload"
    after each."""
    found = Soundness()
    named: dict[str, int] = {}
    lost: set[str] = set()
    _examine_rows(log, found, named, lost, on_item)
    for payload, offset in named.items():
        problem = log.payloads.damage(payload)
        on_item("payload")
        if problem is None:
            found.payloads += 1
        elif problem == "missing" and log.why_dropped(payload) is not None:
            found.dropped += 1
        elif payload in lost:
            found.asked_again += 1
        else:
            found.damage.append(f"payload {payload} of row {offset} is {problem}")
    for path, manifest in whole_snapshots(log.directory / "snapshots", log.payloads):
        if isinstance(manifest, str) and not _is_going(path):
            found.damage.append(f"snapshot {path} is damaged: {manifest}")
        elif not isinstance(manifest, str):
            found.snapshots += 1
    try:
        state = read_snapshot(log.directory / "snapshots", log).coordinator.state
        _examine_assets(log, state, found, named)
    except Damaged as error:
        found.damage.append(str(error).split(";")[0])
    found.unreferenced = len(log.payloads.stored() - named.keys())
    return found


def _examine_assets(log: MessageLog, state: State, found: Soundness, named: dict[str, int]) -> None:
    """Those of a snapshot whose rows are lost: nodes and exports need them still."""
    for encoder in state.encoders.values():
        for entry in encoder.assets:
            if entry.digest in named:
                continue
            named[entry.digest] = -1
            if problem := log.payloads.damage(entry.digest):
                found.damage.append(
                    f"payload {entry.digest}, the asset {entry.name} of {encoder.encoder}, is {problem}"
                )
            else:
                found.payloads += 1


def _examine_rows(
    log: MessageLog, found: Soundness, named: dict[str, int], lost: set[str], on_item: Callable[[str], None]
) -> None:
    checksum, expected = log.before, None
    try:
        for row in log.rows():
            body = None
            try:
                body = unpack(row.body)
            except ValidationError:
                found.damage.append(f"row {row.offset}: its body is no message")
            gap = expected is not None and row.offset != expected
            if isinstance(body, Repaired):
                rows = f", rows {body.last_whole + 1} to {body.resumed_at} are lost" if gap else ""
                found.notes.append(f"row {row.offset}: the ledger was repaired ({body.problem}){rows}")
            elif gap:
                found.damage.append(f"rows {expected} to {row.offset - 1} are missing")
            if not row.follows(checksum) and not (gap and not isinstance(body, Repaired)):
                found.damage.append(f"row {row.offset} is not what was written")
            elif body is not None and (row.kind, row.sender, row.encoder) != _columns(body):
                found.damage.append(f"row {row.offset}: its columns do not say what its body says")
            if isinstance(body, StepFailed):
                lost |= set(body.lost)
            if row.payload is not None:
                named.setdefault(row.payload, row.offset)
            found.rows += 1
            checksum, expected = row.chain, row.offset + 1
            on_item("row")
    except Damaged as error:
        found.damage.append(str(error).split(";")[0])


def _is_going(snapshot: Path) -> bool:
    """Whether a running master is just removing it, because it has written a newer one."""
    deadline = SYSTEM.monotonic() + 0.5
    while snapshot.exists() and SYSTEM.monotonic() < deadline:
        SYSTEM.wait(0.05)
    return not snapshot.exists()


def _columns(body: object) -> tuple[str, str, str]:
    return str(getattr(body, "kind", "")), sender_of(body), getattr(body, "encoder", None) or ""


# --- receipts ---------------------------------------------------------------------------------------------------------


@dataclass
class Account:
    """What became of one node's receipts: how many are in the log, and what those that count are worth together."""

    receipts: int = 0
    counted: int = 0
    weight: float = 0.0
    first_version: int = 0
    last_version: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def add(self, receipt: Receipt) -> None:
        self.receipts += 1
        if not receipt.accepted:
            self.refused[receipt.reason] = self.refused.get(receipt.reason, 0) + 1
            return
        self.first_version = min(self.first_version, receipt.version) if self.counted else receipt.version
        self.last_version = max(self.last_version, receipt.version)
        self.counted += 1
        self.weight += receipt.weight


@dataclass
class Audit:
    """`accounts` by (node, encoder); `unproven` holds each receipt that the log does not lead to, and why in words."""

    accounts: dict[tuple[str, str], Account] = field(default_factory=dict)
    unproven: list[tuple[Receipt, str]] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)


def read_receipts(path: Path) -> list[Receipt]:
    """A node's `receipts.jsonl`. Raises UserError for any other file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a node's receipts.jsonl with --receipts FILE") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(Receipt.model_validate_json(line))
        except ValidationError:
            raise UserError(f"{path}: line {number} is no receipt") from None
    return found


def issued(log: MessageLog, gaps: list[str] | None = None) -> Iterator[Receipt]:
    """Every receipt that the log leads to, in order; one that was sent twice comes twice.

    Lost rows that a snapshot stands for are noted in `gaps`; their receipts are missing. Raises Damaged at a row that
    is not what was written.
    """
    coordinator, offset = Coordinator(), -1
    if (first := next((row.offset for row in log.rows()), 0)) > 0 and not log.repairs():
        raise Damaged(f"this log begins with row {first}: receipts can be shown only with all rows before it")
    for entry in log.entries():
        body = entry.body
        if entry.offset <= offset:
            continue
        if isinstance(body, Repaired) and body.resumed_at > body.last_whole:
            fold = read_snapshot(log.directory / "snapshots", log, oldest=True, at_least=body.resumed_at)
            if fold.offset < 0:
                raise Damaged(f"rows after {body.last_whole} were lost, and there is no whole snapshot to go on from")
            coordinator, offset = Coordinator(fold.coordinator.state), fold.offset
            if gaps is not None:
                gaps.append(f"rows {body.last_whole + 1} to {offset} are not shown: lost, a snapshot stands for them")
            if entry.offset <= offset:
                continue
        for effect in coordinator.handle(entry):
            if isinstance(effect, Send) and isinstance(effect.message, Receipt):
                yield effect.message


def audit(log: MessageLog, receipts: Iterable[Receipt], on_receipt: Callable[[], None] = lambda: None) -> Audit:
    """Whether the log leads to each of these receipts, bit for bit. `on_receipt` is called for each that it leads to.

    Raises Damaged at a row that is not what was written.
    """
    held: dict[UpdateId, list[Receipt]] = {}
    for receipt in receipts:
        held.setdefault(_update_id(receipt), []).append(receipt)
    found = Audit()
    there: dict[UpdateId, list[Receipt]] = {}
    for receipt in issued(log, found.gaps):
        key = _update_id(receipt)
        if key in held:
            there.setdefault(key, []).append(receipt)
        on_receipt()
    for key, mine in held.items():
        theirs = there.get(key, [])
        for receipt in mine:
            account = found.accounts.setdefault((receipt.node, receipt.encoder), Account())
            if receipt in theirs:
                account.add(receipt)
            else:
                found.unproven.append((receipt, _difference(receipt, theirs)))
    return found


def _update_id(receipt: Receipt) -> UpdateId:
    return receipt.encoder, receipt.node, receipt.incarnation, receipt.sequence


def _difference(receipt: Receipt, there: list[Receipt]) -> str:
    if not there:
        return "the log leads to no receipt for this update"
    mine, theirs = receipt.model_dump(), there[0].model_dump()
    fields = [f"{name} {mine[name]!r} (in the log {theirs[name]!r})" for name in mine if mine[name] != theirs[name]]
    return "it differs in " + ", ".join(fields)
