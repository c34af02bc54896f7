"""What can go wrong, by what happens next.

SharedEncoderError
├── Poison             bytes that no retry mends: dead-lettered with the reason, the service goes on
├── Transient          worth trying again
│   ├── BrokerUnavailable   no connection, or no confirm in time
│   ├── PublishRejected     a bounded queue is full
│   └── StorageBlocked      what must be durable cannot be written now
│       ├── StorageFull     no room on the disk
│       └── LedgerHeld      another process holds a lock on the message log
├── Unroutable         a mandatory publish that no queue took
├── Unpublishable      a message that the broker will never take: too large, or not to be written as AMQP
├── InternalError      a bug that has ended a thread of ours: the log has the trace, the party ends
├── LockHeld           somebody else holds the name
├── Damaged            what is on disk is not what was written there
├── WordsNeeded        an encoder type makes its assets of words that nodes contribute
├── NotProbed          these samples and this model allow no probe
└── UserError          wrong configuration, missing file, no samples: one line, exit code 2
    ├── CannotBuild         an encoder type fails on what an instruction asks for
    ├── AccessRefused       wrong account or password, or no permission at the broker
    ├── FilesRefused        files of a corpus that cannot be read right: one line, or one for each
    ├── PackageMissing      what was asked for needs a package that is not installed: the line says how to get it
    └── OwnersCodeError     code of the owner or of another package raised
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_BROKER = 3

#: Characters of an error that is not ours in a line of ours.
_WORDS = 300
#: Files that an error names; the others are counted.
_FILES = 10


#: Why a message is poison: the routing keys of the dead letters.
PoisonReason = Literal[
    "account",
    "checksum",
    "digest",
    "headers",
    "invalid",
    "kills",
    "layout",
    "not-msgpack",
    "oversize",
    "schema-version",
    "sender",
    "size",
    "unexpected-kind",
    "unknown-kind",
]


class SharedEncoderError(Exception):
    """Root of every error that this system raises on purpose."""


class Poison(SharedEncoderError):
    """A message that can never be processed. `reason` becomes the dead letter's routing key."""

    def __init__(self, reason: PoisonReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: PoisonReason = reason
        self.detail = detail


class Transient(SharedEncoderError):
    """Worth trying again after a while."""


class BrokerUnavailable(Transient):
    """No connection to the broker, or no publisher confirm in time."""


class PublishRejected(Transient):
    """The broker refused a message because its queue is full (`reject-publish`)."""


class StorageBlocked(Transient):
    """What must be durable cannot be written now; nothing is acked until it can."""


class StorageFull(StorageBlocked):
    """There is no room on the disk for what must be durable."""


class ShardsAway(StorageBlocked):
    """Aggregators that hold a part of what is to be computed do not answer."""


class LedgerHeld(StorageBlocked):
    """Another process holds a lock on the message log, such as a person's `sqlite3` or a backup tool."""


class Damaged(SharedEncoderError):
    """A file or a row does not match its checksum, or is gone; the text names it and says what can be done."""


class Unroutable(SharedEncoderError):
    """A mandatory publish matched no queue: the receiver has not declared its queue, or the key is wrong."""


class Unpublishable(SharedEncoderError):
    """The broker does not take this message, however often it is sent; the text has its reason."""


class InternalError(SharedEncoderError):
    """A bug in this program has ended something that others wait for. A user cannot mend it."""


class LockHeld(SharedEncoderError):
    """Another process holds the lock of this name at the broker."""


class WordsNeeded(SharedEncoderError):
    """An encoder type can make its assets once it has the words that nodes contribute: the source `words`."""


class NotProbed(SharedEncoderError, ValueError):
    """These samples and this model allow no such measure; the text says why. Other measures go on."""


class UserError(SharedEncoderError):
    """Something that the user can mend; the text is one line that says what is wrong and how to mend it."""

    @property
    def public(self) -> str:
        """What others may be told of it over the broker: nothing that could be out of a sample."""
        return str(self)


class CannotBuild(UserError):
    """What an instruction asks for cannot be built here; what was raised may be out of a sample, and is for the log."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"what the instruction asks for cannot be built: {type(error).__name__}: {error}"[:_WORDS])
        self._kind = type(error).__name__

    @property
    def public(self) -> str:
        return f"what the instruction asks for cannot be built ({self._kind})"


class AccessRefused(UserError):
    """The broker does not accept the account, the password or the virtual host, or forbids what was asked."""


class FilesRefused(UserError):
    """Files of a corpus that cannot be read right. `lines` has one line for each, which names it and the mend.

    One file is one line, as every error; of several, the first ten have a line each below the one that counts them.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        rest = len(self.lines) - _FILES
        shown = [*self.lines[:_FILES], *([f"and {rest} more"] if rest > 0 else [])]
        several = "\n  ".join([f"{len(self.lines)} things are wrong with the samples:", *shown])
        super().__init__(self.lines[0] if len(self.lines) == 1 else several)


class PackageMissing(UserError):
    """A package that not everybody needs is not installed; the text has the command that installs it."""


class OwnersCodeError(UserError):
    """Code that is not ours raised `error`: an encoder type of another package, an owner's way of loading samples.

    `whose` names it, `where` the function that was called. The error's own words may quote a sample, so they are for
    this machine alone.
    """

    def __init__(self, whose: str, error: BaseException, where: str = "") -> None:
        kind = type(error).__name__
        words = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:_WORDS]
        place = f"in its {where}; " if where else ""
        super().__init__(f'{whose} raised {kind}: {words} ({place}log.level = "debug" shows the traceback)')
        self._public = f"{whose} raised {kind}" + (f" in its {where}" if where else "")

    @property
    def public(self) -> str:
        """Without the words of the error that was raised."""
        return self._public
