"""What a log says was counted, against what the nodes have receipts for: nothing lost, nothing doubled, equal bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.wire.to_master import UpdateManifest
from common.wire.to_node import Receipt, receipt_hash
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Send
from master_service.decisions.records import Versioned
from master_service.history.audit import UpdateId
from master_service.history.replay import Refold, origin, verify
from master_service.log.message_log import MessageLog, open_log
from master_service.shards.gathered import gather


@dataclass
class Findings:
    """`problems` says in words what is wrong; everything is well if it is empty. `again`: updates in the log that had
    to be sent more than once, as attempts of them tell."""

    sent: int = 0
    accepted: int = 0
    refused: int = 0
    duplicates: int = 0
    again: int = 0
    skipped: int = 0
    lost: int = 0
    doubled: int = 0
    versions: int = 0
    digest: str = ""
    equal: bool = True
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"sent={self.sent} accepted={self.accepted} refused={self.refused} duplicates={self.duplicates} "
            f"again={self.again} lost={self.lost} doubled={self.doubled} "
            f"digest={'equal' if self.equal else 'DIFFERENT'}"
        )


def examine(
    master: Path, nodes: Iterable[Path], aggregators: Sequence[Path] = (), *, stopped: bool = False
) -> Findings:
    """Examine the state directories of a master, of its aggregators, if any, and of nodes (present and former) after
    everything has ended. `stopped`: a training was stopped and all parties went at once; what a node handed in last,
    behind everything that was answered, came too late to be answered, and is neither sent nor lost."""
    found = Findings()
    log = open_log(master, read_only=True)
    gather(log, aggregators)
    held, owed = _held(nodes)
    if stopped:
        answered: dict[tuple[str, ...], int] = {}
        for *of, sequence in held:
            answered[tuple(of)] = max(sequence, answered.get(tuple(of), -1))
        owed = {update for update in owed if update[-1] <= answered.get(tuple(update[:-1]), -1)}
    found.sent = len(held.keys() | owed)
    found.accepted = sum(any(receipt.accepted for receipt in receipts) for receipts in held.values())
    found.refused = len(held) - found.accepted

    found.again = sum(isinstance(body, UpdateManifest) and body.attempt > 0 for body in log.bodies("update"))

    counted, issued, coordinator = _decided(log)
    doubled = [update for update, times in Counter(update for update, *_ in counted).items() if times > 1]
    found.doubled = len(doubled)
    found.problems += [f"counted twice: {update}" for update in doubled]
    where = {update: (version, weight) for update, version, weight in counted}
    for update, receipts in held.items():
        for receipt in receipts:
            if receipt.accepted and where.get(update) != (receipt.version, receipt.weight):
                found.lost += 1
                found.problems.append(f"receipted in version {receipt.version} and not there: {update}")
            elif not receipt.accepted and update in where and receipt.reason != "conflict":
                found.problems.append(f"refused ({receipt.reason}) and counted: {update}")
            if receipt_hash(receipt) not in issued:
                found.problems.append(f"a receipt that the log does not lead to: {receipt}")
    for update in owed - held.keys():
        found.lost += 1
        found.problems.append(f"sent and never answered: {update}")

    for encoder in coordinator.state.encoders.values():
        per_node = Counter(update[1] for update in where if update[0] == encoder.encoder)
        per_node.update(item.node for item in encoder.buffer)
        for node, member in encoder.members.items():
            found.duplicates += member.duplicates
            if member.returns != per_node[node]:
                found.problems.append(f"{node}: return count {member.returns}, counted {per_node[node]}")
        if encoder.updates != sum(per_node.values()):
            found.problems.append(f"{encoder.updates} updates, counted {sum(per_node.values())}")
        found.versions += encoder.version
        found.digest = encoder.digest

    for _, check in verify(log, origin(log).fold):
        if check is not None and not check.identical:
            found.problems.append(f"replay: version {check.version} is not what was published")
    refold = Refold(log)
    for entry in refold.run():
        found.skipped += entry.skipped
    for name, encoder in coordinator.state.encoders.items():
        again = refold.fold.coordinator.state.encoders[name]
        if (again.version, again.digest) != (encoder.version, encoder.digest):
            found.problems.append(f"an uninterrupted master makes {again.version} {again.digest} of {name}")
    found.equal = not any("replay" in problem or "uninterrupted" in problem for problem in found.problems)
    log.close()
    return found


def _decided(log: MessageLog) -> tuple[list[tuple[UpdateId, int, float]], set[str], Coordinator]:
    """By the rows alone: every counted update with its version and weight, every receipt's hash, the last state."""
    coordinator = Coordinator()
    counted: list[tuple[UpdateId, int, float]] = []
    issued: set[str] = set()
    for entry in log.entries():
        if entry.skipped:
            continue
        if isinstance(entry.body, Versioned):
            for weighed in coordinator.state.encoders[entry.body.encoder].stepping:
                item = weighed.item
                update = (entry.body.encoder, item.node, item.incarnation, item.sequence)
                counted.append((update, entry.body.version, weighed.weight))
        for effect in coordinator.handle(entry):
            if isinstance(effect, Send) and isinstance(effect.message, Receipt):
                issued.add(receipt_hash(effect.message))
    return counted, issued, coordinator


def _held(nodes: Iterable[Path]) -> tuple[dict[UpdateId, list[Receipt]], set[UpdateId]]:
    """The receipts that nodes hold, and the updates that living nodes still owe."""
    held: dict[UpdateId, list[Receipt]] = {}
    owed: set[UpdateId] = set()
    for directory in nodes:
        path = directory / "receipts.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines[:-1]:
            receipt = Receipt.model_validate_json(line)
            update = (receipt.encoder, receipt.node, receipt.incarnation, receipt.sequence)
            if receipt not in held.setdefault(update, []):
                held[update].append(receipt)
        if directory.suffix != ".former":
            for file in (directory / "owed").glob("*.json"):
                manifest = UpdateManifest.model_validate_json(file.read_text())
                owed.add((manifest.encoder, manifest.node, manifest.incarnation, manifest.sequence))
    return held, owed
