"""The embedded broker's rules, as RabbitMQ has them: which binding takes a routing key, and who may do what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Operation = Literal["configure", "write", "read"]


@dataclass(frozen=True, slots=True)
class Permissions:
    """What a user may do, as RabbitMQ has it: patterns of the names to declare or lock, to publish to, to consume."""

    configure: str = ".*"
    write: str = ".*"
    read: str = ".*"

    def allow(self, operation: Operation, name: str) -> bool:
        pattern = {"configure": self.configure, "write": self.write, "read": self.read}[operation]
        return re.search(pattern or "^$", name) is not None


def matches(kind: str, pattern: str, key: str) -> bool:
    """Whether a binding's pattern takes a routing key: equal for direct; `*` one word, `#` any number for topic."""
    if kind == "direct":
        return pattern == key
    return _matches(pattern.split("."), key.split("."))


def _matches(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches(pattern[1:], words[start:]) for start in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _matches(pattern[1:], words[1:])
