"""Bytes to text: UTF-8, or what a mark at the beginning says. Nothing is guessed: what has no mark and is no UTF-8 is
refused."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from common.errors import UserError
from common.sample_files.refusals import shown

#: Bytes at the beginning by which an encoding is told.
HEAD = 4096
#: Marks and what they say; that of UTF-32 begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Control characters that a text has none of between its letters; 4 to 6 are the high bytes of Cyrillic and Arabic.
_CONTROLS = bytes({*range(32)} - {7, 8, 9, 10, 11, 12, 13, 27})
#: A share of control characters at every second byte that is two bytes a letter, and one that is none.
_WIDE, _NONE = 0.4, 0.1
#: A share of control characters over all bytes that is no text.
_BINARY = 0.3


def encoding(head: bytes, where: str) -> str:
    """The encoding of a text that begins with `head`. Raises UserError for two bytes a letter without a mark, which
    would decode as UTF-8 with a NUL between the letters, and for bytes that are no text."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    even, odd = _controls(head[::2]), _controls(head[1::2])
    if len(head) >= 4 and max(even, odd) > _WIDE and min(even, odd) < _NONE:
        name = "UTF-16LE" if odd > even else "UTF-16BE"
        raise UserError(f"{where} is {name} text without a mark; convert it: iconv -f {name} -t UTF-8")
    if (even + odd) / 2 > _BINARY:
        raise UserError(f"{where} holds bytes that are no text; convert it or leave it out")
    return "utf-8-sig"


def is_text(head: bytes) -> bool:
    """Whether these first bytes of a file are text, in an encoding that is read or not: its reader says that."""
    if any(head.startswith(mark) for mark, _ in _MARKS):
        return True
    shares = _controls(head[::2]), _controls(head[1::2])
    if sum(shares) / 2 > _BINARY and min(shares) >= _NONE:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _controls(part: bytes) -> float:
    """The share of control characters."""
    return 1 - len(part.translate(None, _CONTROLS)) / len(part) if part else 0.0


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked if it is called .gz."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever keeps `path` from being read inside is a UserError that names it and the mend."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{shown(path)} is not UTF-8 text, nor UTF-16 with a mark ({first_line(error)}); convert it or leave it out"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{shown(path)} is not a whole gzip file ({first_line(error)}); copy it again") from error
    except OSError as error:
        raise UserError(
            f"{shown(path)} cannot be read ({error.strerror or first_line(error)}); correct its permissions"
        ) from error


def check_unicode(text: str, where: str) -> None:
    """Raise UserError for half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UserError(
            f"{where}: character {error.start} of the text is {half!r}, half of a surrogate pair, which is no valid "
            "text; mend or remove it"
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's words, or its name if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
