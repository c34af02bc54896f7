"""`replay` and `export`: the message log folded again, to prove it, to rebuild a version, or to decide it anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from common.errors import Damaged, UserError
from common.exports import check_export_directory
from deploy.commands.display import console, number, saying
from deploy.commands.progress import Counted, counting
from deploy.counterfactual import COUNTERFACTUAL, changed_rule, distance, in_words, parse_changes, refold_of
from deploy.logging import configure_logging
from master_service.decisions.records import Started, unpack
from master_service.decisions.settings import Settings
from master_service.log.jsonl import opened
from master_service.log.message_log import MessageLog
from master_service.shards.gathered import gather

if TYPE_CHECKING:
    from common.numbers.parameters import ParameterSet
    from master_service.decisions.state import EncoderState
    from master_service.history.fold import Check, Fold
    from master_service.history.replay import Refold


def run_replay(
    state: Path,
    *,
    encoder: str | None,
    version: int | None,
    out: Path | None,
    rule: str | None,
    changes: Sequence[str],
    without: Sequence[str],
    every: bool,
    aggregators: Sequence[Path] = (),
) -> None:
    """Verify every version, and write one with `out`; with a rule, changes or nodes to leave out: decide anew.
    `aggregators`: the state directories of those that the log is of.

    Raises Damaged at the first version that does not come out as it was published, UserError for what is not there.
    """
    change = changed_rule(rule, parse_changes(changes)) if rule or changes else None
    if version is not None and (change or without):
        raise UserError("--version N is of the numbering of what was published; leave it out with another rule")
    if out is not None:
        check_export_directory(out)
    with opened(state) as log:
        gather(log, aggregators)
        with saying("loading torch"):
            import torch
        configure_logging(level="warning")
        torch.set_num_threads(1)
        if change is None and not without:
            fold = _verified(log, encoder, version, every=every)
            if out is not None:
                _write(log, fold, encoder, version, out)
            return
        _decide_anew(log, change, without, encoder=encoder, out=out, how=partial(in_words, rule, changes))


def export_version(encoder: str, state: Path, version: int | None, out: Path, aggregators: Sequence[Path] = ()) -> None:
    """Rebuild a version from the message log and write it for transformers. Raises UserError if it is not there."""
    run_replay(
        state,
        encoder=encoder,
        version=version,
        out=out,
        rule=None,
        changes=(),
        without=(),
        every=False,
        aggregators=aggregators,
    )


# --- what was published --------------------------------------------------------------------------------------------


def _verified(log: MessageLog, encoder: str | None, version: int | None, *, every: bool) -> Fold[Any]:
    """Fold the log, up to a version of an encoder if one is given, and print what came of it."""
    from master_service.history.replay import origin, verify

    start = origin(log)
    fold, screen = start.fold, console()
    if start.left_out:
        screen.print(start.left_out, highlight=False)
    known = fold.coordinator.state.encoders
    reached = version is not None and encoder in known and known[encoder].version == version
    tally: dict[str, list[int]] = {}
    broken: tuple[Check, int] | None = None
    with counting("replaying", "messages", log.last_offset - fold.offset) as (counted, advance):
        for entry, check in () if reached else verify(log, fold):
            advance()
            if check is None:
                continue
            if every:
                same = "identical" if check.identical else "DIFFERENT"
                print(f"{check.encoder} version {check.version} {check.logged[:16]} {same}")
            tally.setdefault(check.encoder, []).append(check.version)
            if not check.identical:
                broken = check, entry.offset
                break
            if version is not None and check.version == version and encoder in (None, check.encoder):
                break
    _print_verified(fold, tally, broken, counted, encoder)
    if broken is not None:
        raise Damaged(_difference(log, *broken))
    if encoder is not None and encoder not in known:
        raise UserError(f"no encoder {encoder} is in the log; there are: {', '.join(known) or 'none'}")
    made = {name: state.version for name, state in known.items() if encoder in (None, name)}
    if version is not None and version not in made.values():
        newest = ", ".join(f"{name}'s newest is {made[name]}" for name in made) or "no encoder is there"
        raise UserError(f"version {version} is not in the log: {newest}")
    return fold


def _print_verified(
    fold: Fold[Any],
    tally: Mapping[str, Sequence[int]],
    broken: tuple[Check, int] | None,
    counted: Counted,
    encoder: str | None,
) -> None:
    table = Table(title="versions rebuilt from the message log", title_justify="left")
    for heading in ("encoder", "checked", "identical", "first different", "newest", "sha256 of its parameters"):
        table.add_column(heading, justify="right" if heading in ("checked", "identical", "newest") else "left")
    for name, state in fold.coordinator.state.encoders.items():
        if encoder not in (None, name):
            continue
        versions = tally.get(name, ())
        different = broken is not None and broken[0].encoder == name
        table.add_row(
            name,
            f"{len(versions):,}",
            f"{len(versions) - different:,}",
            f"version {versions[-1]}" if different else "none",
            str(state.version),
            state.digest[:32] + "…" if state.digest else f"({state.status})",
        )
    console().print(table)
    console().print(f"{counted.done:,} messages, {counted.rate:,.0f} messages/s", highlight=False)


def _difference(log: MessageLog, check: Check, offset: int) -> str:
    """The first version that is not what was published; and why that may be, if this is another kind of machine."""
    from master_service.arithmetic.generation import fingerprint

    logged: dict[str, str] = {}
    for row in log.rows(up_to=offset):
        if row.kind == "started" and isinstance(body := unpack(row.body), Started):
            logged = body.fingerprint
    here = fingerprint()
    others = [
        f"{name} {logged[name]} there, {here[name]} here" for name in here if logged.get(name, here[name]) != here[name]
    ]
    why = f"; bits may differ because of {', '.join(others)}" if others else ""
    return (
        f"version {check.version} of {check.encoder} is not what was published: "
        f"{check.logged} in row {offset}, {check.computed or 'no version'} by replay{why}"
    )


def _write(log: MessageLog, fold: Fold[Any], encoder: str | None, version: int | None, out: Path) -> None:
    """Write the version that the fold has reached."""
    state = _chosen(fold, encoder)
    if version not in (None, state.version):
        raise UserError(f"version {version} of {state.encoder} is not in the log, its newest is {state.version}")
    _export(log, state, fold.coordinator.state.settings, fold.arithmetic.targets[state.encoder].parameters, out)


def _chosen(fold: Fold[Any], encoder: str | None) -> EncoderState:
    """The encoder that is meant: named, or the only one with parameters."""
    made = {name: state for name, state in fold.coordinator.state.encoders.items() if name in fold.arithmetic.targets}
    if encoder is None and len(made) == 1:
        return next(iter(made.values()))
    if encoder is None or encoder not in made:
        known = ", ".join(made) or "none"
        raise UserError(f"say which encoder with --encoder ID; there are: {known}")
    return made[encoder]


def _export(
    log: MessageLog, state: EncoderState, settings: Settings, parameters: ParameterSet, out: Path, note: str = ""
) -> None:
    with saying("loading transformers"):
        from master_service.arithmetic.export import export_encoder

        export_encoder(out, state, settings, parameters, log.payloads, note)
    print(
        f"version {state.version} of {state.encoder} written to {out}, sha256 of its parameters "
        # as it was published: of several aggregators, of the digests of their parts
        f"{parameters.digest() if note else state.digest}"
    )


# --- what another rule makes of it -----------------------------------------------------------------------------------


def _decide_anew(
    log: MessageLog,
    change: Callable[[Settings], Settings] | None,
    without: Sequence[str],
    *,
    encoder: str | None,
    out: Path | None,
    how: Callable[[Sequence[str]], str],
) -> None:
    """`how`: in words, given what to call the nodes that are left out."""
    refold = refold_of(log, change, without)
    with counting(f"deciding {how(without)}", "messages", log.last_offset + 1) as (_, advance):
        for _entry in refold.run():
            advance()
    published = _verified(log, encoder, None, every=False)
    _print_compared(published, refold, encoder, how(without))
    console().print(COUNTERFACTUAL.format(how=how(without)), highlight=False)
    if out is not None:
        state = _chosen(refold.fold, encoder)
        members = published.coordinator.state.encoders[state.encoder].members
        # the card is for others: a node that was left out is named in it no more than one that took part
        agreed = [node if node in members and members[node].named else "a node" for node in without]
        note = COUNTERFACTUAL.format(how=how(agreed))
        decided = refold.fold.coordinator.state.settings
        _export(log, state, decided, refold.fold.arithmetic.targets[state.encoder].parameters, out, note)


def _print_compared(published: Fold[Any], refold: Refold, encoder: str | None, how: str) -> None:
    """Old next to new: each node of an encoder a row, and then all of them."""
    for name, old in published.coordinator.state.encoders.items():
        new = refold.fold.coordinator.state.encoders[name]
        if encoder not in (None, name) or name not in refold.fold.arithmetic.targets:
            continue
        table = Table(title=f"{name}: as published → {how}", title_justify="left")
        for heading in ("", "versions", "updates counted", "weight, sum", "refused", "waiting"):
            table.add_column(heading, justify="right" if heading else "left")
        for node, then in old.members.items():
            now = new.members.get(node)
            table.add_row(
                node,
                "",
                f"{then.returns} → {now.returns if now else 0}",
                f"{number(then.weight)} → {number(now.weight if now else 0.0)}",
                f"{then.refused} → {now.refused if now else 0}",
                "",
            )
        weights = [number(sum(member.weight for member in each.members.values())) for each in (old, new)]
        refused = [str(sum(member.refused for member in each.members.values())) for each in (old, new)]
        table.add_row(
            "[bold]all[/bold]",
            f"{old.version} → {new.version}",
            f"{old.updates} → {new.updates}",
            " → ".join(weights),
            " → ".join(refused),
            f"{len(old.buffer)} → {len(new.buffer)}",
        )
        console().print(table)
        mine, theirs = (fold.arithmetic.targets[name].parameters for fold in (refold.fold, published))
        console().print(
            f"‖new − published‖ / ‖published‖ = {distance(mine, theirs):.4g}; sha256 {mine.digest()[:32]}…",
            highlight=False,
        )
    if refold.uncounted:
        console().print(
            f"{refold.uncounted} updates could not be counted: they were refused then, and their payloads are gone",
            highlight=False,
        )
