"""Messages of which somebody has died, as the fuzzer wrote them down; they are sent again in every run of the tests."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.wire.broker import Publication

CASES = Path(__file__).with_name("cases.jsonl")


def cases(file: Path = CASES) -> list[tuple[str, bool, list[Publication]]]:
    """(what was raised, whether each party had an account, the messages) of each."""
    if not file.exists():
        return []
    plain = [json.loads(line) for line in file.read_text().splitlines()]
    return [(case["raised"], case["accounts"], [_publication(each) for each in case["messages"]]) for case in plain]


def note(raised: str, messages: Sequence[Publication], *, accounts: bool, file: Path = CASES) -> None:
    """Write a case down."""
    with file.open("a") as lines:
        lines.write(
            json.dumps({"raised": raised, "accounts": accounts, "messages": [_plain(each) for each in messages]}) + "\n"
        )


def fewest(messages: Sequence[Publication], dies: Callable[[Sequence[Publication]], bool]) -> Sequence[Publication]:
    """The shortest end of `messages` of which somebody still dies, with nothing in it that is not needed for that; all
    of them if it takes more than an end of a few hundred."""
    count = 1
    while count < len(messages) and not dies(messages[-count:]):
        count *= 2
    found = list(messages[-count:])
    if count > 512:
        return found
    at = 0
    while at < len(found):
        without = found[:at] + found[at + 1 :]
        if without and dies(without):
            found = without
        else:
            at += 1
    return found


def _plain(each: Publication) -> dict[str, Any]:
    body = base64.b64encode(each.body).decode()
    return {
        "exchange": each.exchange,
        "key": each.routing_key,
        "body": body,
        "headers": dict(each.headers),
        "id": each.message_id,
    }


def _publication(plain: dict[str, Any]) -> Publication:
    body = base64.b64decode(plain["body"])
    return Publication(plain["exchange"], plain["key"], body, plain["headers"], plain["id"], mandatory=False)
