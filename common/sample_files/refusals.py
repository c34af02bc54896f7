"""What a reading of samples says to their owner: all that is wrong at once, and what was left out and why."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import FilesRefused, PackageMissing, UserError

#: Names of one reason in a line; the others are counted.
_NAMES = 3


@dataclass(frozen=True)
class LeftOut:
    """Something that is no sample, although it lies among them: `name` for a line, `path` for the whole list."""

    name: str
    why: str
    path: Path


class Refusals:
    """Lines about files that cannot be read right, gathered over a whole start: an owner mends all of them at once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    @property
    def lines(self) -> list[str]:
        """What was gathered so far, in order."""
        return list(self._lines)

    def add(self, line: str) -> None:
        """A line that names the file, what is wrong and the mend; the same line counts once."""
        self._lines[line] = None

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """A UserError inside is gathered instead of raised, but for a missing package: that is no file's fault."""
        try:
            yield
        except PackageMissing:
            raise
        except FilesRefused as error:
            self._lines.update(dict.fromkeys(error.lines))
        except UserError as error:
            self.add(str(error))

    def check(self) -> None:
        """Raises FilesRefused if anything was gathered."""
        if self._lines:
            raise FilesRefused(list(self._lines))


def shown(path: Path | str) -> str:
    """A path as it can stand in one line on any terminal: names of files may hold line breaks, and need be no UTF-8."""
    return in_one_line(os.fsencode(path).decode("utf-8", "backslashreplace"))


def in_one_line(text: str) -> str:
    """The text with everything escaped that does not print."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def left_out_line(left_out: Iterable[LeftOut]) -> str:
    """What was left out, by reason, with the first names of each; empty if nothing was."""
    reasons: dict[str, list[str]] = {}
    for each in left_out:
        reasons.setdefault(each.why, []).append(each.name)
    return ", ".join(f"{why} ({_some(names)})" for why, names in reasons.items())


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {rest} more" if rest > 0 else "")
