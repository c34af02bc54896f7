"""`make fuzz MINUTES=10 SEED=7`: strangers write to a federation, and in one line what came of it.

Exit code 1 if anybody died of it, or kept what he should not. `--rabbitmq N`: N more messages to one over a private
RabbitMQ.

What somebody dies of is cut down to the fewest messages and written to tests/fuzz/cases.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import structlog
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from common.wire.broker import Publication
from tests.fuzz.cases import fewest, note
from tests.fuzz.grammar import Grammar
from tests.fuzz.world import World, batches, resident_bytes
from tests.unit.stepped import TOPOLOGY

#: Messages after which memory is counted from: by then everything has been imported and grown to its size.
_WARM = 20_000
MOST_MEMORY = 50 << 20
#: What a message may add to the ledger, bytes, on average, with the rows of the honest nodes meanwhile.
_MOST_LEDGER = 1000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long [default: 10]")
    parser.add_argument("--messages", type=int, default=0, help="this many instead")
    parser.add_argument("--rabbitmq", type=int, default=0, metavar="N", help="then N messages over RabbitMQ")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the messages [default: the time]")
    chosen = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        well = True
        for accounts in (True, False):  # half of it each
            messages, seconds = chosen.messages // 2, chosen.minutes * 30
            well &= over_memory(Path(directory), chosen.seed, messages, seconds, accounts=accounts)
        if chosen.rabbitmq:
            from tests.fuzz.rabbitmq import over_rabbitmq

            well &= over_rabbitmq(Path(directory), chosen.seed, chosen.rabbitmq)
    return 0 if well else 1


def over_memory(directory: Path, seed: int, messages: int, seconds: float, *, accounts: bool) -> bool:
    """Over the memory broker, so many messages or so long; prints the line. Whether all is well."""
    world, grammar = World(directory / f"accounts {accounts}", accounts=accounts), Grammar(TOPOLOGY, seed)
    console, started = Console(stderr=True), time.monotonic()
    sent, before, versions, ledger = 0, 0, world.versions, world.ledger_bytes
    last: deque[Publication] = deque(maxlen=4096)
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"seed {seed}", total=None)
        endless = (grammar.next() for _ in itertools.count())
        for batch in batches(itertools.islice(endless, messages) if messages else endless):
            if not messages and time.monotonic() - started > seconds:
                break
            grammar.encoders = ["text-1", *world.encoders[-3:]]
            last.extend(batch)
            try:
                world.feed(batch)
            except Exception as error:
                _died(console, directory, error, list(last), accounts=accounts)
                return False
            grammar.saw(world.passing())
            sent += len(batch)
            if not before and sent >= _WARM:
                before = resident_bytes() - world.held_bytes
            bar.update(task, description=f"{sent} messages, {world.set_aside.total()} set aside, {world.rows} rows")
    grown = resident_bytes() - world.held_bytes - before if before else 0
    try:
        goes_on = world.goes_on()
    except Exception as error:
        _died(console, directory, error, list(last), accounts=accounts)
        return False
    ledger = world.ledger_bytes - ledger
    world.close()
    print(
        f"memory broker, accounts {'required' if accounts else 'open'}: seed={seed} messages={sent} deaths=0 "
        f"set_aside={world.set_aside.total()} ({shown(world.set_aside)}) versions={world.versions - versions} "
        f"another_after={goes_on} min rows={world.rows} ledger={ledger / max(1, sent):.0f} bytes a message "
        f"memory={grown / 2**20:+.1f} MiB after the first {_WARM}, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return goes_on is not None and grown <= MOST_MEMORY and ledger <= _MOST_LEDGER * max(sent, 1)


def shown(counted: Counter[str]) -> str:
    """Reasons and how often each, most first."""
    return ", ".join(f"{reason} {count}" for reason, count in counted.most_common())


def _died(
    console: Console, directory: Path, error: Exception, messages: Sequence[Publication], *, accounts: bool
) -> None:
    console.print(traceback.format_exc(), highlight=False)
    raised, attempts = f"{type(error).__name__}: {error}"[:300], itertools.count()

    def dies(fewer: Sequence[Publication]) -> bool:
        try:
            world = World(directory / f"again-{next(attempts)}", accounts=accounts)
            for batch in batches(fewer):
                world.feed(batch)
            world.together(10.0)
        except Exception as again:
            return type(again) is type(error)
        return False

    found = fewest(messages, dies)
    note(raised, found, accounts=accounts)
    print(f"somebody died of {len(found)} messages, which tests/fuzz/cases.jsonl has now: {raised}")


if __name__ == "__main__":
    sys.exit(main())
