"""The `shared-encoder log` commands. Like `cli`, this imports only typer; the work is in `log_tools`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

log_app = typer.Typer(
    help="Look into a master's message log, check it, hand it on, or make it smaller. All but prune and repair only "
    "read, also while the master is running; each takes a state directory or a file that `log export` wrote.",
    epilog="With sqlite3 too: sqlite3 master-state/ledger.sqlite \"SELECT offset, datetime(at,'unixepoch'), kind, "
    "sender, json_extract(body,'$.sequence') FROM entries\"",
    no_args_is_help=True,
)

State = Annotated[Path, typer.Option("--state", metavar="PATH", help="the master's state directory, or an export")]
Directory = Annotated[Path, typer.Option("--state", metavar="DIR", help="the master's state directory")]
DEFAULT_STATE = Path("master-state")


@log_app.command("list")
def list_(
    state: State = DEFAULT_STATE,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="update, versioned, request.join, …")] = None,
    node: Annotated[str | None, typer.Option(metavar="NAME", help="only what this node said")] = None,
    encoder: Annotated[str | None, typer.Option(metavar="ID", help="only what is about this encoder")] = None,
    after: Annotated[int | None, typer.Option(metavar="OFFSET", help="the first N rows after this one")] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="rows to show; the newest, without --after")] = 40,
    json: Annotated[bool, typer.Option("--json", help="a JSON line per row")] = False,
) -> None:
    """The rows of the log, one line each."""
    from deploy.commands.log_tools import list_rows

    list_rows(state, kind=kind, node=node, encoder=encoder, after=after, limit=limit, as_json=json)


@log_app.command()
def show(
    offset: Annotated[int, typer.Argument(metavar="OFFSET", help="as `log list` shows it")],
    state: State = DEFAULT_STATE,
) -> None:
    """One row as a whole, with its payload's state and whether its checksum is right."""
    from deploy.commands.log_tools import show_row

    show_row(state, offset)


@log_app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a .jsonl or .jsonl.gz to write")],
    state: State = DEFAULT_STATE,
    after: Annotated[int, typer.Option(metavar="OFFSET", help="only rows after this one")] = -1,
    before: Annotated[int | None, typer.Option(metavar="OFFSET", help="only rows before this one")] = None,
    payloads: Annotated[bool, typer.Option("--payloads/--no-payloads", help="with the updates' numbers")] = True,
) -> None:
    """Write the log into one file, which can be given wherever --state is asked for."""
    from deploy.commands.log_tools import export_rows

    export_rows(state, file, after=after, before=before, payloads=payloads)


@log_app.command()
def backup(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="an empty folder, or one to make")],
    state: Directory = DEFAULT_STATE,
) -> None:
    """Copy the log, its payloads and snapshots of one moment; a master can start from the copy as its --state."""
    from deploy.commands.log_tools import back_up_log

    back_up_log(state, target)


@log_app.command()
def verify(
    state: State = DEFAULT_STATE,
    receipts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="a node's receipts.jsonl: are they what the log leads to? may be repeated"),
    ] = None,
) -> None:
    """Check every row, payload and snapshot, and receipts if given. Exit code 1 if anything is not as written."""
    from deploy.commands.log_tools import verify_log

    verify_log(state, receipts or [])


@log_app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="a master's state directory, or an export")],
    second: Annotated[Path, typer.Argument(metavar="B", help="another")],
    json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Where two logs part: the first row, decision and version that differ. Exit code 1 if anything does."""
    from deploy.commands.log_difference import show_difference

    if not show_difference(first, second, as_json=json):
        raise typer.Exit(1)


@log_app.command()
def prune(
    keep: Annotated[
        str, typer.Option(metavar="since-snapshot|SIZE", help="payloads to keep: what a start needs, or 20GiB of them")
    ],
    state: Directory = DEFAULT_STATE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be dropped")] = False,
) -> None:
    """Drop payloads of old updates. The rows stay, and so does what a start needs."""
    from deploy.commands.log_tools import prune_log

    prune_log(state, keep, dry_run=dry_run)


@log_app.command()
def repair(state: Directory = DEFAULT_STATE) -> None:
    """Keep what is whole of a damaged ledger, and say what is lost. The damaged file stays beside it."""
    from deploy.commands.log_tools import repair_log

    repair_log(state)
