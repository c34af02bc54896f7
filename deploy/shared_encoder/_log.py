"""The message log for who reads, proves or asks it: a master's state directory, or an exported file."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import Damaged, UserError
from master_service.decisions.records import check_kind
from master_service.log.jsonl import check_export_file, export_log, opened
from master_service.log.ledger import LEDGER
from master_service.shards.gathered import gather

from ._found import Refolded, Replayed, Row, VersionCheck, exported

if TYPE_CHECKING:
    from types import TracebackType

    from master_service.history.fold import Fold
    from master_service.log.message_log import MessageLog

    from ._encoder import Encoder

#: Rows that are read at once: between two of these nothing is held that a running master could mind.
_PAGE = 500


class Log:
    """A message log, open to be read: nothing is written to it, and a master may run on it meanwhile.

    >>> with Log.open("run.jsonl.gz") as log:
    ...     print(log.replay().identical, log.encoders)
    True ('text-...',)
    """

    def __init__(self, log: MessageLog, closing: ExitStack) -> None:
        """For `open`, which is how one is made."""
        self._opened = log
        #: Whatever its files are there as long as.
        self._keeps: object = None
        # at the end of the process too, before the modules go that an ExitStack needs
        self._close = weakref.finalize(self, closing.close)

    @classmethod
    def open(cls, path: Path | str, *, aggregators: Sequence[Path | str] = ()) -> Log:
        """The log in a master's state directory, or in a file that `shared-encoder log export` wrote.

        `aggregators` are the state directories of those that hold the parts of its encoders, if it has several: all of
        them, in any order. It is closed by `close`, by the end of a `with` block, or with the object.

        Raises UserError if there is no log, and for aggregators that are not its own; SharedEncoderError for a file
        that is not what was exported.

        >>> log = Log.open("run.jsonl.gz")
        >>> log.encoders
        ('text-...',)
        >>> log.close()
        """
        place = Path(path)
        if not place.is_file() and not (place / LEDGER).exists():
            raise UserError(
                f"no message log in {place}; give a master's state directory, or a file of `shared-encoder log export`"
            )
        with ExitStack() as closing:
            log = closing.enter_context(opened(place))
            gather(log, [Path(each) for each in aggregators])
            return cls(log, closing.pop_all())
        raise AssertionError("an ExitStack swallows nothing")

    def close(self) -> None:
        """Let go of it; afterwards it cannot be read."""
        self._close()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def encoders(self) -> tuple[str, ...]:
        """The ids of the encoders that were made in it, in order."""
        return tuple(dict.fromkeys(row.encoder for row in self.rows(kind="generated")))

    def rows(
        self,
        *,
        kind: str | None = None,
        sender: str | None = None,
        encoder: str | None = None,
        after: int = -1,
        before: int | None = None,
    ) -> Iterator[Row]:
        """The rows in order, those alone that fit what is given: of one `kind` ("update", "versioned", "request.join"),
        `sender` or `encoder`, with an offset above `after` and below `before`. Rows that a master writes meanwhile are
        among them up to the last one at the time of the call.

        Raises UserError for a kind that no row can have; SharedEncoderError where the log is damaged.

        >>> [row.body["version"] for row in Log.open("run.jsonl.gz").rows(kind="versioned")]
        [1, 2, 3, 4, 5, 6]
        """
        if kind is not None:
            check_kind(kind)
        last = self._log.last_offset if before is None else min(self._log.last_offset, before - 1)
        return self._rows(kind, sender, encoder, after, last)

    def replay(self, encoder: str | None = None) -> Replayed:
        """Compute every version again from what nodes sent, and compare its bits with what was published; of one
        `encoder`, or of all. Takes about as long as the master's own arithmetic did.

        Raises UserError for an encoder that is not in the log; SharedEncoderError where rows or payloads are damaged,
        or missing without a snapshot to begin from.

        >>> Log.open("run.jsonl.gz").replay().identical
        True
        """
        from deploy.undisturbed import undisturbed
        from master_service.history.replay import origin, verify

        if encoder is not None:
            self._chosen(encoder)
        checks = []
        with undisturbed():
            start = origin(self._log)
            for _, check in verify(self._log, start.fold):
                if check is not None and encoder in (None, check.encoder):
                    checks.append(VersionCheck(check.encoder, check.version, check.logged, check.computed))
        return Replayed(tuple(checks), start.left_out)

    def refold(
        self,
        encoder: str | None = None,
        *,
        rule: str | None = None,
        changes: Mapping[str, Any] | None = None,
        without: Sequence[str] = (),
    ) -> Refolded:
        """Decide the same messages anew: by another preset `rule`, with `changes` to its numbers ({"outer.lr": 0.5}),
        or without what some nodes said. Of the only encoder, or the one that is named.

        Raises UserError for an encoder, a node, a rule or a number that is not there, SharedEncoderError if payloads
        were dropped or rows lost: it needs all of them.

        >>> log = Log.open("run.jsonl.gz")
        >>> log.refold(without=["south"], rule="fedasync").counted
        {'north': 6, 'south': 0}
        """
        from deploy.counterfactual import COUNTERFACTUAL, changed_rule, distance, in_words, refold_of
        from deploy.undisturbed import undisturbed

        id = self._chosen(encoder)
        change = changed_rule(rule, _by_section(changes or {}), "changes") if rule or changes else None
        refold = refold_of(self._log, change, without)
        with undisturbed():
            for _ in refold.run():
                pass
            published = self._reached(id, None)
            mine, theirs = (fold.arithmetic.targets[id].parameters for fold in (refold.fold, published))
            apart = distance(mine, theirs)
        old, new = (fold.coordinator.state.encoders[id] for fold in (published, refold.fold))
        named = [node if node in old.members and old.members[node].named else "a node" for node in without]
        words = in_words(rule, [f"{key}={value}" for key, value in (changes or {}).items()], named)
        note = COUNTERFACTUAL.format(how=words) if words else ""

        def export(out: Path) -> None:
            self._export(refold.fold, id, out, note)

        members = {node: new.members.get(node) for node in old.members}
        return Refolded(
            id,
            new.version,
            new.updates,
            mine.digest(),
            {node: member.returns if member else 0 for node, member in members.items()},
            {node: member.weight if member else 0.0 for node, member in members.items()},
            apart,
            refold.uncounted,
            export,
        )

    def encoder(self, id: str | None = None, *, version: int | None = None, out: Path | str | None = None) -> Encoder:
        """Any version (the newest, if none is said) of an encoder (of the only one, if none is named), computed from
        the log and open; written into `out` for transformers too, if given.

        Raises UserError for one that is not in the log and an `out` that holds something else; SharedEncoderError if a
        version on the way is not what was published.

        >>> Log.open("run.jsonl.gz").encoder(version=5, out="fifth").type
        'text'
        """
        from deploy.undisturbed import undisturbed

        chosen = self._chosen(id)

        def export(out: Path) -> None:
            with undisturbed():
                self._export(self._reached(chosen, version), chosen, out)

        return exported(export, out)

    def export(self, file: Path | str) -> None:
        """Write all of it into one file of JSON lines, gzipped if its name ends with .gz: to keep as a test's recorded
        log, or for an auditor. What `shared-encoder log export` does.

        Raises UserError for a file that is there and is no exported log; SharedEncoderError if the log is damaged, or
        lacks payloads that nobody dropped.

        >>> Log.open("run.jsonl.gz").export("copy.jsonl")
        """
        check_export_file(Path(file))
        done = export_log(self._log, Path(file))
        if done.lost:
            raise Damaged(f"{len(done.lost)} payloads are damaged or missing and not in {file}: {', '.join(done.lost)}")

    @property
    def _log(self) -> MessageLog:
        if not self._close.alive:
            raise UserError("this log is closed; open it again with Log.open")
        return self._opened

    def _rows(self, kind: str | None, sender: str | None, encoder: str | None, after: int, last: int) -> Iterator[Row]:
        while after < last:
            page = list(self._log.rows(after, min(after + _PAGE, last)))
            after = min(after + _PAGE, last)
            for row in page:
                if kind in (None, row.kind) and sender in (None, row.sender) and encoder in (None, row.encoder):
                    body, facts = _parsed(row.offset, row.body), _parsed(row.offset, row.facts)
                    yield Row(row.offset, row.at, row.kind, row.sender, row.encoder, body or {}, facts, row.payload)

    def _chosen(self, id: str | None) -> str:
        known = self.encoders
        if id is None and len(known) == 1:
            return known[0]
        if id is None or id not in known:
            begins = "say which encoder" if id is None else f"no encoder {id} is in the log"
            raise UserError(f"{begins}; there are: {', '.join(known) or 'none'}")
        return id

    def _reached(self, id: str, version: int | None) -> Fold[Any]:
        from master_service.history.replay import reach

        try:
            return reach(self._log, id, version)
        except KeyError as error:
            raise UserError(str(error.args[0])) from None

    def _export(self, fold: Fold[Any], id: str, out: Path, note: str = "") -> None:
        from master_service.arithmetic.export import export_encoder

        state = fold.coordinator.state
        parameters = fold.arithmetic.targets[id].parameters
        export_encoder(out, state.encoders[id], state.settings, parameters, self._log.payloads, note)


def _parsed(offset: int, text: str | None) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        raise Damaged(
            f"row {offset} of the message log is not readable; `shared-encoder log verify` says more"
        ) from None
    return found


def _by_section(changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"outer.lr": 2} as {"outer": {"lr": 2}}."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, dot, name = key.partition(".")
        if not (dot and name):
            raise UserError(f'changes: {key!r} is no number of a rule; write it as in {{"outer.lr": 0.5}}')
        found.setdefault(section, {})[name] = value
    return found
