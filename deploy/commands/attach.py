"""`attach`: an exported encoder and somebody's texts become a whole masked language model, with its held-out losses."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.exports import check_export_directory
from deploy.commands.display import number, saying
from deploy.logging import configure_logging
from node_service.corpus.corpus import CorpusConfig, load_corpus

#: Lines about each stage where there is no terminal for a bar.
_LINES = 10


def run_attach(
    encoder: Path,
    corpus: list[str],
    out: Path,
    *,
    field: str | None,
    tokenizer: Path | None,
    vocabulary: int | None,
    steps: int,
    frozen_steps: int,
    seed: int,
    device: str,
    threads: int | None,
) -> None:
    """Read, fit, save, and print the losses. Raises UserError for what is not there or cannot be written."""
    check_export_directory(out)
    configure_logging(level="warning")
    texts = load_corpus(CorpusConfig(type="text", path=tuple(corpus), field=field, held_out=0.0)).train
    with saying("loading torch and transformers, a few seconds"):
        import torch

        from deploy.attach import ENTRIES, AttachBudget, attached
        from node_service.training.trainer import choose_device
    torch.set_num_threads(threads or 1)
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeRemainingColumn(), console=screen, disable=not screen.is_terminal) as bar:
        tasks = {
            "frozen": bar.add_task("trunk frozen", total=frozen_steps, visible=False),
            "free": bar.add_task("all free", total=steps),
        }
        if not screen.is_terminal:
            first = f"{frozen_steps} steps with the trunk frozen, if it lacks a vocabulary,"
            print(f"at most {first} and {steps} with all free", file=sys.stderr)

        def tell(stage: str, done: int, of: int) -> None:
            bar.update(tasks[stage], completed=done, visible=True)
            if not screen.is_terminal and done * _LINES // of > (done - 1) * _LINES // of:
                print(f"{bar.tasks[tasks[stage]].description}: {done} of {of} steps", file=sys.stderr, flush=True)

        found = attached(
            encoder,
            texts,
            tokenizer=tokenizer,
            entries=vocabulary or ENTRIES,
            own_vocabulary=vocabulary is not None,
            out=out,
            budget=AttachBudget(steps=steps, frozen_steps=frozen_steps, seed=seed),
            device=choose_device(device),
            progress=tell,
        )
    losses = [f"held-out loss {number(found.before, 3)}"]
    if found.lacked:
        losses.append(f"after {found.frozen_steps} steps with the trunk frozen {number(found.after_frozen, 3)}")
    if steps:
        losses.append(f"after {found.free_steps} {'more' if found.lacked else 'steps'} with all free")
        losses[-1] += f" {number(found.after_free, 3)}"
    print(", ".join(losses))
    print(f"model and tokenizer written to {out}")
