"""What the `shared-encoder log` commands do. Needs torch only to check and to repair."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.table import Table
from rich.text import Text

from common.errors import Damaged, UserError
from common.locks import DirectoryLock
from deploy.commands.display import console, number, saying, size
from deploy.commands.progress import counting
from deploy.logging import configure_logging
from master_service.log.jsonl import check_export_file, export_log, opened
from master_service.log.message_log import Row, logged_shards, open_log
from master_service.log.payload_files import payload_path

if TYPE_CHECKING:
    from master_service.history.audit import Audit


def list_rows(
    state: Path,
    *,
    kind: str | None,
    node: str | None,
    encoder: str | None,
    after: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """Print the first rows after an offset, or the newest. Raises UserError for a kind that no row has."""
    with opened(state) as log:
        if kind is not None and kind not in (known := {row.kind for row in log.rows()}):
            raise UserError(f"no row is of kind {kind!r}; there are: {', '.join(sorted(known)) or 'none'}")
        wanted = (
            row
            for row in log.rows(-1 if after is None else after)
            if kind in (None, row.kind) and node in (None, row.sender) and encoder in (None, row.encoder)
        )
        rows = list(deque(wanted, maxlen=limit) if after is None else islice(wanted, limit))
        if as_json:
            for row in rows:
                print(json.dumps(_plain(row)))
            return
        table = Table()
        for heading in ("offset", "time (UTC)", "kind", "sender", "encoder", "what"):
            table.add_column(heading, justify="right" if heading == "offset" else "left", overflow="fold")
        for row in rows:
            # as Text: what others said is not markup
            table.add_row(*map(Text, (str(row.offset), _utc(row.at), row.kind, row.sender, row.encoder, gist(row))))
        console().print(table)
        console().print(f"{len(rows)} of {log.last_offset + 1:,} rows", highlight=False)


def gist(row: Row) -> str:
    """What a row says, in a few words."""
    try:
        body = json.loads(row.body)
    except ValueError:
        return "not readable"
    match row.kind:
        case "update":
            facts = json.loads(row.facts) if row.facts else {}
            norm = f", norm {facts['norm']:.3g}" if facts else ""
            return (
                f"{body['sequence']} from version {body['base_version']}, {body['steps']} steps, "
                f"loss {number(body['loss'], 3)}{norm}, {size(body['size'])}"
            )
        case "versioned":
            return f"version {body['version']}  {body['digest'][:16]}"
        case "provided":
            return f"{body['name']}  {body['digest'][:16]}, {size(body['size'])}"
        case "request.words":
            return f"{len(body['words']):,} words of {body['documents']:,} documents" if body["words"] else "none"
        case "generated":
            return f"version 0  {body['digest'][:16]}, {len(body['layout'])} tensors"
        case "ack":
            return f"{body['samples']} samples" if body["accepted"] else f"refused: {body['reason']}"
        case "started":
            return f"epoch {body['epoch']}, torch {body['fingerprint'].get('torch', '?')}"
        case "configured":
            settings = body["settings"]
            return f"rule {settings['rule']['preset']}, stop {_short(settings['stop'])}"
        case "presence":
            return "is back" if body["present"] else "gives no sign of life"
        case _:
            told = {key: value for key, value in body.items() if key not in _TOLD_ELSEWHERE}
            return _short(told)


_TOLD_ELSEWHERE = {"kind", "schema_version", "node", "sender", "encoder", "incarnation"}


def _short(values: dict[str, Any]) -> str:
    """The values that say something, cut to a line."""
    words = ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, "", {}, []))
    return words if len(words) <= 60 else words[:59] + "…"


def show_row(state: Path, offset: int) -> None:
    """Print a row as JSON. Raises UserError if there is none."""
    with opened(state) as log:
        row = next(log.rows(offset - 1, offset), None)
        if row is None:
            raise UserError(f"no row {offset}; there are rows up to {log.last_offset}")
        plain = _plain(row)
        plain["skipped"] = offset in log.skipped()
        plain["checksum_is_right"] = row.follows(log.checksum(offset - 1) or log.before)
        if row.payload is not None:
            problem, reason = log.payloads.damage(row.payload), log.why_dropped(row.payload)
            plain["payload"] = {
                "digest": row.payload,
                "file": str(payload_path(log.directory / "payloads", row.payload)),
                "bytes": log.payloads.size(row.payload),
                "state": "here" if problem is None else f"dropped: {reason}" if reason else problem,
            }
        print(json.dumps(plain, indent=1))


def export_rows(state: Path, file: Path, *, after: int, before: int | None, payloads: bool) -> None:
    """Write an export, and say what is in it and what is not."""
    check_export_file(file)
    up_to = None if before is None else before - 1
    with opened(state) as log:
        total = (log.last_offset if up_to is None else min(up_to, log.last_offset)) - after
        with counting("exporting", "rows", total) as (_, advance):
            done = export_log(log, file, after=after, up_to=up_to, payloads=payloads, on_row=advance)
    print(
        f"{done.rows:,} rows, {done.payloads:,} payloads, {done.dropped:,} payloads dropped before: "
        f"{file}, {size(file.stat().st_size)}"
    )
    if done.lost:
        raise Damaged(f"{len(done.lost)} payloads are damaged or missing and not in {file}: {', '.join(done.lost)}")


def back_up_log(state: Path, target: Path) -> None:
    """Make the copy, and say what is in it. Raises UserError if `target` holds anything, Damaged for lost payloads."""
    try:
        taken = target.exists() and any(target.iterdir())
    except NotADirectoryError:
        taken = True
    if taken:
        raise UserError(f"{target} is not empty; give a new folder for the copy")
    with opened(state) as log:
        total = log.payload_count()
    with saying("loading torch"):
        from master_service.history.backup import back_up
    with counting("copying", "payloads", total) as (_, advance):
        done = back_up(state, target, advance)
    print(
        f"{done.rows:,} rows, {done.payloads:,} payloads ({size(done.bytes)}) and {done.snapshots} snapshots copied to "
        f"{target}; `shared-encoder log verify --state {target}` checks them"
    )
    if done.lost:
        raise Damaged(f"{len(done.lost)} payloads of {state} are damaged or missing: {', '.join(done.lost)}")


def verify_log(state: Path, receipts: Sequence[Path]) -> None:
    """Print what is sound, what is damaged, and what receipts are worth. Raises Damaged if anything is not right."""
    with opened(state) as log:
        with saying("loading torch"):
            from master_service.history.audit import audit, examine, read_receipts
        configure_logging(level="error")  # a damaged snapshot is among the findings
        held = {path: read_receipts(path) for path in receipts}
        total = log.last_offset + 1 + log.payload_count()
        with counting("checking", "rows and payloads", total) as (_, advance):
            found = examine(log, lambda what: advance())
        for line in (*found.notes, *found.damage):
            print(line)
        print(
            f"{found.rows:,} rows read, {found.payloads:,} payloads and {found.snapshots} snapshots whole; "
            f"{len(found.damage)} things damaged"
            if found.damage
            else f"{found.rows:,} rows in one chain of checksums; {found.payloads:,} payloads and {found.snapshots} "
            "snapshots whole; nothing damaged"
        )
        print(
            f"{found.dropped:,} payloads dropped, {found.asked_again:,} lost then and asked for again, "
            f"{found.unreferenced:,} payload files that no row names"
        )
        unproven = 0
        for path, mine in held.items():
            report = audit(log, mine)
            unproven += len(report.unproven)
            _print_audit(path, report, len(mine))
    if found.damage:
        raise Damaged(f"{len(found.damage)} things in {state} are not what was written; the first: {found.damage[0]}")
    if unproven:
        raise Damaged(f"{unproven} receipts are not what the log of {state} leads to")


def _print_audit(path: Path, report: Audit, total: int) -> None:
    for gap in report.gaps:
        print(f"{path}: {gap}")
    for (node, encoder), account in report.accounts.items():
        if not account.receipts:
            continue
        refused = ", ".join(f"{count} {reason}" for reason, count in account.refused.items())
        print(
            f"{account.receipts:,} receipts of node {node} for {encoder}: all of these in the log, bit for bit; "
            f"{account.counted:,} counted in versions {account.first_version}–{account.last_version} "
            f"with total weight {account.weight:.4f}; {sum(account.refused.values()):,} refused"
            + (f" ({refused})" if refused else "")
        )
    print(f"{path}: {total - len(report.unproven):,} of {total:,} receipts are what the log leads to")
    if report.unproven:
        receipt, why = report.unproven[0]
        print(f"the first that is not: update {receipt.sequence} of {receipt.node} for {receipt.encoder}: {why}")


def prune_log(state: Path, keep: str, *, dry_run: bool) -> None:
    """Apply a retention policy now. Raises LockHeld while a master runs there, UserError."""
    try:
        policy = keep if keep == "since-snapshot" else int(TypeAdapter(ByteSize).validate_python(keep))
    except ValidationError:
        raise UserError(f"--keep {keep}: give since-snapshot, or a size like 20GiB") from None
    _must_have_a_ledger(state)
    with saying("loading torch"):
        from master_service.history.retention import droppable, prune
        from master_service.history.snapshot import kept_snapshots
    lock = DirectoryLock(state)
    try:
        log = open_log(state)
        if (shards := logged_shards(log) or 1) > 1:
            raise UserError(
                f"what nodes sent lies with the {shards} aggregators of this log, which drop it when a running master "
                'tells them: set master.retention = "since-snapshot"'
            )
        kept = kept_snapshots(state / "snapshots")
        if len(kept) < 2:
            print("nothing is dropped: with fewer than two snapshots a start may need every payload")
        payloads = droppable(log, kept, policy)  # type: ignore[arg-type]
        total = sum(map(log.payloads.size, payloads))
        if not dry_run:
            total = prune(log, kept, policy, time.time())  # type: ignore[arg-type]
        print(f"{'would drop' if dry_run else 'dropped'} {len(payloads):,} payloads, {size(total)}; every row is kept")
        log.close()
    finally:
        lock.close()


def repair_log(state: Path) -> None:
    """Repair, and say what was wrong, what is kept and what is lost. Raises LockHeld, UserError."""
    _must_have_a_ledger(state)
    with saying("loading torch"):
        from master_service.history.repair import repair
    configure_logging(level="error")
    report = repair(state)
    if report is None:
        print(f"nothing is wrong with the ledger in {state}")
        return
    print(f"what was wrong: {report.problem}")
    print(f"kept: rows up to {report.last_whole}; the damaged file is {report.damaged}")
    if report.resumed_at > report.last_whole:
        print(
            f"lost: rows {report.last_whole + 1} to {report.resumed_at}, for which a snapshot of row "
            f"{report.resumed_at} stands: what was counted in them stays counted, and a replay begins with it"
        )
    if report.newest > report.resumed_at:
        print(f"kept: rows {report.resumed_at + 1} to {report.newest}, which follow that snapshot")
    print(f"lost: what came after row {report.newest}, if anything did")


def _must_have_a_ledger(state: Path) -> None:
    if not (state / "ledger.sqlite").exists():
        raise UserError(f"no message log in {state}; give the master's state directory with --state DIR")


def _plain(row: Row) -> dict[str, Any]:
    """The columns as JSON; a body that is damaged as the text that it is."""
    plain = row._asdict() | {"time": _utc(row.at)}
    for name in ("body", "facts"):
        try:
            plain[name] = json.loads(plain[name]) if plain[name] else None
        except ValueError:
            continue
    return plain


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
