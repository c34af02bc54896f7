"""What a message log gives: its rows, and what replaying it has found."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ._encoder import Encoder, load_encoder


@dataclass(frozen=True)
class Row:
    """One row of a log: what a node or an operator said, or what the master recorded.

    `offset` counts from 0. `at` is seconds since 1970 (of a simulated run: of its clock, which began at 0). `sender` is
    a node, an operator or "master"; `encoder` is empty where a row is of none. `body` is the message, as JSON has it;
    `facts` is what the master measured of an update (its size, norm, whether it is finite), None in other rows.
    `payload` is the sha256 of the bytes that belong to the row, None without.

    >>> from collections import Counter
    >>> with Log.open("run.jsonl.gz") as log:
    ...     counted = Counter(row.sender for row in log.rows(kind="update"))
    >>> sorted(counted)
    ['north', 'south']
    """

    offset: int
    at: float
    kind: str
    sender: str
    encoder: str
    body: Mapping[str, Any]
    facts: Mapping[str, Any] | None
    payload: str | None

    @property
    def time(self) -> datetime:
        """`at` as a time in UTC."""
        return datetime.fromtimestamp(self.at, UTC)


@dataclass(frozen=True)
class VersionCheck:
    """A version as it was published and as replay computes it: two sha256 of its parameters, hexadecimal.

    >>> check = Log.open("run.jsonl.gz").replay().checks[-1]
    >>> check.version, check.identical, check.logged == check.computed
    (6, True, True)
    """

    encoder: str
    version: int
    logged: str
    computed: str

    @property
    def identical(self) -> bool:
        """Whether the bits are the same."""
        return self.logged == self.computed


@dataclass(frozen=True)
class Replayed:
    """What a replay has found: a check for each version, in order. `left_out` says what the log could not show and why
    (payloads were dropped, rows lost); empty if it showed everything.

    >>> replayed = Log.open("run.jsonl.gz").replay()
    >>> assert replayed.identical, replayed.first_different
    """

    checks: tuple[VersionCheck, ...]
    left_out: str

    @property
    def identical(self) -> bool:
        """Whether every version is what was published; False as well where there is no version."""
        return bool(self.checks) and self.first_different is None

    @property
    def first_different(self) -> VersionCheck | None:
        """The first version that is not what was published."""
        return next((check for check in self.checks if not check.identical), None)

    def __repr__(self) -> str:
        """In a few words: it is what a failed assertion shows."""
        found = "none there" if not self.checks else "all identical"
        if (wrong := self.first_different) is not None:
            found = f"version {wrong.version} of {wrong.encoder} published as {wrong.logged[:16]}…, computed as "
            found += f"{wrong.computed[:16]}…" if wrong.computed else "none"
        return f"Replayed({len(self.checks)} versions, {found}{'; ' if self.left_out else ''}{self.left_out})"


@dataclass(frozen=True)
class Refolded:
    """Another encoder out of the same messages: what another rule, or fewer nodes, make of them. It is not what a run
    that was decided so would have made, because the nodes trained on what was really published.

    `version` and `updates` count what it took in; `counted` and `weights` are updates and sums of weights by node.
    `distance` is ‖this − published‖ / ‖published‖, of the parameters. `uncounted` updates have no payload any more.

    >>> other = Log.open("run.jsonl.gz").refold(rule="fedavg")
    >>> other.version > 0, other.distance > 0
    (True, True)
    """

    id: str
    version: int
    updates: int
    digest: str
    counted: Mapping[str, int]
    weights: Mapping[str, float]
    distance: float
    uncounted: int
    _export: Callable[[Path], None] = field(repr=False)

    def encoder(self, *, out: Path | str | None = None) -> Encoder:
        """It, open; written into `out` for transformers, if given. Raises UserError for an `out` that holds something
        else, and once the log is closed.

        >>> Log.open("run.jsonl.gz").refold(without=["north"], rule="fedasync").encoder().type
        'text'
        """
        return exported(self._export, out)


def exported(export: Callable[[Path], None], out: Path | str | None) -> Encoder:
    """What `export` writes, open: from `out`, or from a folder that goes again."""
    if out is not None:
        from master_service.arithmetic.export import check_export_directory

        check_export_directory(Path(out))  # before the long work
        export(Path(out))
        return load_encoder(out)
    with tempfile.TemporaryDirectory(prefix="shared-encoder-") as folder:
        export(Path(folder) / "encoder")
        return load_encoder(Path(folder) / "encoder")
