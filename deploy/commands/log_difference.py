"""What `shared-encoder log diff` prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.commands.display import console
from master_service.log.jsonl import opened
from master_service.log.message_log import Row

#: Fields of a row that are shown, and characters of each value.
_FIELDS, _LONGEST = 12, 60


def show_difference(first: Path, second: Path, *, as_json: bool) -> bool:
    """Print where they part; whether they do not. Raises UserError for what is no log, Damaged for one that is not
    whole."""
    from master_service.history.difference import difference

    with opened(first) as one, opened(second) as other:
        found = difference(one, other)
    if as_json:
        print(json.dumps({"same": found.same, **asdict(found)}))
        return found.same
    if found.same:
        _say(f"the same: {found.rows:,} rows, {found.decisions:,} decisions")
        return True
    if found.row is None:
        _say(f"rows: all {found.rows:,} are the same")
    else:
        _say(f"rows: {found.rows:,} are the same; then, at offset {found.row.offset:,},")
        _say(f"  A has {_row(found.row.first)}")
        _say(f"  B has {_row(found.row.second)}")
        for name, (before, after) in list(found.row.fields.items())[:_FIELDS]:
            _say(f"    {name}: {_short(before)} | {_short(after)}")
        if (more := len(found.row.fields) - _FIELDS) > 0:
            _say(f"    and {more} more fields")
    if found.decision is None:
        _say(f"decisions: all {found.decisions:,} are the same")
    else:
        _say(f"decisions: {found.decisions:,} are the same; then")
        _say(f"  A: {found.decision.first or 'no more'}")
        _say(f"  B: {found.decision.second or 'no more'}")
    if not found.versions:
        _say("versions: all have the same bits")
    for version in found.versions:
        _say(f"versions: of {version.encoder} the first with other bits is {version.version}")
        _say(f"  A: {version.first or 'has none of that number'}")
        _say(f"  B: {version.second or 'has none of that number'}")
    return False


def _row(row: Row | None) -> str:
    return "no more rows" if row is None else f"{row.kind} of {row.sender or 'the master'}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _say(line: str) -> None:
    console().print(line, highlight=False, markup=False, soft_wrap=True)
