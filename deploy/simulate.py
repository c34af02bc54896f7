"""`shared-encoder simulate`: the real master and many real nodes in one process, under a virtual clock."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.config import explained
from common.durable import write_durably
from common.errors import UserError
from common.exports import check_writable
from common.locks import DirectoryLock
from common.wire.update_rule import UpdateRule
from deploy.commands.display import console, saying
from deploy.commands.progress import counting
from deploy.counterfactual import parse_changes
from deploy.logging import configure_logging
from master_service.decisions.rules.model import AggregationRule, aggregation_rule, check_nodes

_REPORT = "report.json"
#: What a simulation writes, and the next one replaces.
_FILES = (_REPORT, "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")
_FOLDERS = ("payloads", "snapshots")
#: How seldom Python looks for what refers to itself: thousands of nodes stay, and a run makes hardly any such thing.
_COLLECTED = 200_000, 20, 20


def run_simulation(out: Path, *, rule: str, changes: Sequence[str], speeds: str, **arguments: Any) -> None:
    """Simulate, write the message log and `report.json` into `out`, and print the report.

    `changes` are of the aggregation rule, as in `replay`, and of the section `update`; `arguments` those of a Plan.
    Raises UserError for numbers that are none, and for a directory that holds anything but an earlier simulation.
    """
    check_simulation_directory(out)
    sections = parse_changes(changes)
    # nothing of a finishing phase concerns anybody but its node: it would only take time
    update = {"finish": {"what": "none"}, **sections.pop("update", {})}
    with saying("loading torch"):
        import torch

        from deploy.simulation.plan import Plan
        from deploy.simulation.report import ARGUMENTS, print_summary, summary
        from deploy.simulation.simulation import Simulation
        from master_service.log.message_log import open_log
    try:
        changed = aggregation_rule(rule, sections)
    except ValidationError as error:
        raise explained(error, AggregationRule, "--set") from None
    try:
        update_rule = UpdateRule.model_validate(update)
    except ValidationError as error:
        raise explained(error, UpdateRule, "--set update") from None
    try:
        plan = Plan(speeds=_speeds(speeds), rule=changed, update=update_rule, **arguments)
    except ValidationError as error:
        raise explained(error, Plan, "simulate") from None
    check_nodes(plan.rule, plan.nodes, "--nodes is")
    configure_logging(level="error")  # that nodes are killed and updates refused is what is simulated
    torch.set_num_threads(1)
    with closing(DirectoryLock(out, "--out")):
        _clear(out)
        # first of all: what an interrupted run leaves is a simulation too
        _write(out, {ARGUMENTS: plan.arguments()})
        run = Simulation(plan, out)
        with counting("simulating", "updates", plan.updates) as (counted, advance), _seldom_collected():

            def progress(updates: int) -> None:
                while counted.done < updates:
                    advance()

            run.run(progress)
        with closing(open_log(out, read_only=True)) as log:
            report = summary(run, log)
        report["real_seconds"] = round(counted.seconds, 3)
        _write(out, report)
    screen = console()
    print_summary(report, screen)
    screen.print(f"written to {out}/; prove it with: shared-encoder replay --state {out}", highlight=False)
    if run.given_up:
        raise UserError(
            f"the run was ended after {report['updates']} of {plan.updates} updates, because it made no headway; "
            "see the refusals above, and change the rule with --set (guards.max_staleness) or take fewer nodes"
        )


@contextmanager
def _seldom_collected() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*_COLLECTED)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def check_simulation_directory(directory: Path) -> None:
    """Whether a simulation may go there: it is not there, empty, or an earlier simulation. Raises UserError."""
    try:
        if directory.is_dir():
            if any(directory.iterdir()) and not _is_simulation(directory):
                raise UserError(f"{directory} holds something else than a simulation; give a new directory with --out")
            check_writable(directory, directory)
            return
        if directory.exists():
            raise UserError(f"{directory} is a file; give a new directory with --out")
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; give another directory with --out") from None
    check_writable(directory.absolute().parent, directory)


def _is_simulation(directory: Path) -> bool:
    """By its report."""
    from deploy.simulation.report import ARGUMENTS

    try:
        report = json.loads((directory / _REPORT).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and ARGUMENTS in report


def _clear(directory: Path) -> None:
    """Remove what an earlier simulation wrote, and nothing else; its report last, because that is what it is known
    by."""
    for name in _FOLDERS:
        if (directory / name).exists():
            shutil.rmtree(directory / name)
    for name in reversed(_FILES):
        (directory / name).unlink(missing_ok=True)


def _write(directory: Path, report: dict[str, Any]) -> None:
    write_durably(directory / _REPORT, json.dumps(report, indent=1).encode() + b"\n")


def _speeds(words: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in words.split(","))
    except ValueError:
        raise UserError(f"--speeds {words}: write numbers with commas between them, for instance 1,2,4") from None
