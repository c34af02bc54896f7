"""Where two message logs part: the first row that is another, and what that led to. Reads rows alone, no payload."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from common.wire.to_node import Receipt
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Send
from master_service.decisions.records import Versioned
from master_service.log.message_log import MessageLog, Row

#: What differs between any two runs, though they decide the same.
_OF_A_RUN = ("offset", "message_id", "at", "checksum", "carried_out")


@dataclass(frozen=True)
class RowDifference:
    """The first offset at which the logs have other rows, None for one that has ended; `fields`: each that differs."""

    offset: int
    first: Row | None
    second: Row | None
    fields: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class DecisionDifference:
    """The first decision that is another, in words; None where a log has no more."""

    number: int
    first: str | None
    second: str | None


@dataclass(frozen=True)
class VersionDifference:
    """The first version of an encoder that has other bits, by its number among the versions of both."""

    encoder: str
    version: int
    first: str | None
    second: str | None


@dataclass
class Difference:
    """`rows`, `decisions`: how many are the same from the beginning on. Of versions each encoder has its own first."""

    rows: int = 0
    decisions: int = 0
    row: RowDifference | None = None
    decision: DecisionDifference | None = None
    versions: list[VersionDifference] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return self.row is None and self.decision is None and not self.versions


def difference(first: MessageLog, second: MessageLog) -> Difference:
    """Between two logs. Rows are compared as they stand there, times and all; decisions and versions by what was
    decided: two runs that went alike differ in their rows alone. Raises Damaged at a row that cannot be read."""
    found = Difference()
    for one, other in zip_longest(first.rows(), second.rows()):
        if one is None or other is None or _content(one) != _content(other) or one.at != other.at:
            found.row = _row_difference(found.rows, one, other)
            break
        found.rows += 1
    versions: tuple[dict[tuple[str, int], str], dict[tuple[str, int], str]] = ({}, {})
    for decided, decided_too in zip_longest(decisions(first, versions[0]), decisions(second, versions[1])):
        if found.decision is None:
            if decided == decided_too:
                found.decisions += 1
            else:
                found.decision = DecisionDifference(found.decisions, decided, decided_too)
    seen = set[str]()
    for encoder, version in sorted({**versions[0], **versions[1]}):
        one_digest, other_digest = (each.get((encoder, version)) for each in versions)
        if one_digest != other_digest and encoder not in seen:
            seen.add(encoder)
            found.versions.append(VersionDifference(encoder, version, one_digest, other_digest))
    return found


def decisions(log: MessageLog, versions: dict[tuple[str, int], str]) -> Iterator[str]:
    """What the rows lead to, in words: each update that was counted, with its version and weight, or refused, and each
    version; its digest goes into `versions`. Raises Damaged."""
    coordinator = Coordinator()
    for entry in log.entries():
        if entry.skipped:
            continue
        body = entry.body
        if isinstance(body, Versioned):
            versions[body.encoder, body.version] = body.digest
            yield f"version {body.version} of {body.encoder}"
        for effect in coordinator.handle(entry):
            if isinstance(effect, Send) and isinstance(effect.message, Receipt):
                yield _in_words(effect.message)


def _in_words(receipt: Receipt) -> str:
    update = f"update {receipt.sequence} of {receipt.node} for {receipt.encoder}"
    if receipt.accepted:
        return f"{update}: counted in version {receipt.version} with weight {receipt.weight:.6g}"
    return f"{update}: refused, {receipt.reason}"


def _content(row: Row) -> dict[str, Any]:
    found = {name: value for name, value in row._asdict().items() if name not in _OF_A_RUN}
    return {**found, "body": json.loads(row.body), "facts": json.loads(row.facts) if row.facts else None}


def _row_difference(offset: int, one: Row | None, other: Row | None) -> RowDifference:
    fields: dict[str, tuple[Any, Any]] = {}
    if one is not None and other is not None:
        for name in ("kind", "sender", "encoder", "at", "payload"):
            values = getattr(one, name), getattr(other, name)
            if values[0] != values[1]:
                fields[name] = values
        for part in ("body", "facts"):
            before, after = (json.loads(getattr(each, part) or "{}") for each in (one, other))
            fields.update(_parting(part, before, after))
    return RowDifference(offset, one, other, fields)


def _parting(name: str, before: Any, after: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The innermost values that are not the same, by their names from the outside."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield name, (before, after)
        return
    for key in sorted({*before, *after}):
        yield from _parting(f"{name}.{key}", before.get(key), after.get(key))
