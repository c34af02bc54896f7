"""The `shared-encoder corpus` commands. Like `cli`, this imports only typer; the work is in `corpus`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.options import ConfigFile, SampleField, SampleType

corpus_app = typer.Typer(help="Look at samples before a node trains on them.", no_args_is_help=True)


@corpus_app.command("check")
def corpus_check(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="files, folders or globs; without them, the corpora of --config"),
    ] = None,
    type_: SampleType = None,
    field: SampleField = None,
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="field or array of the labels", show_default="label")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="only samples with this label; may be repeated")
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT", help="a sample of a plain text file: file, paragraph or line", show_default="auto"
        ),
    ] = None,
    image_size: Annotated[int | None, typer.Option(metavar="N", help="scale pictures to N x N pixels")] = None,
    alpha: Annotated[
        str | None, typer.Option(metavar="HOW", help="transparent pixels: white, or channel", show_default="white")
    ] = None,
    entry_point: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="the function that gives the samples")
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="held-out samples of their own; may be repeated")
    ] = None,
    held_out: Annotated[float | None, typer.Option(metavar="SHARE", help="else held out", show_default="0.1")] = None,
    validation: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="of the rest, by which training is steered", show_default="0.05"),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="at most so many samples")] = None,
    config: ConfigFile = None,
    node: Annotated[str | None, typer.Option(metavar="NAME", help="of --config", show_default="all nodes")] = None,
) -> None:
    """Show what a node would train on, with three examples, and what is left out and why. Nothing leaves this machine.

    Exit code 2 if a node would refuse to start, with every file that has to be mended.
    """
    from deploy.commands.corpus import check_corpora

    table: dict[str, Any] = {
        "path": paths,
        "type": type_,
        "field": field,
        "label": label,
        "only": only,
        "documents": documents,
        "image_size": image_size,
        "alpha": alpha,
        "entry_point": entry_point,
        "test_path": test,
        "held_out": held_out,
        "validation": validation,
        "limit": limit,
    }
    check_corpora({key: value for key, value in table.items() if value is not None}, config, node)


@corpus_app.command("example")
def corpus_example(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="where they go, a folder each")],
) -> None:
    """Write four small corpora to try things with: texts of this Python's own library, by topic."""
    from deploy.commands.corpus import write_examples

    write_examples(out)
