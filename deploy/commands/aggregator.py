"""Running one of several aggregators in this process."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import structlog

from common.errors import BrokerUnavailable, UserError
from common.exports import check_writable
from common.wire.fields import MAX_SHARDS
from deploy.broker.credentials import merged
from deploy.commands.display import saying
from deploy.commands.run import OWNER_ONLY, awaited, end_of_waiting, topology_of
from deploy.config import load_config, warn_of_ignored
from deploy.logging import configure_logging
from deploy.signals import stop_on_signals

log = structlog.get_logger()


def run_aggregator(
    shard: str, state: Path | None, file: Path | None, flags: dict[str, Any], *, credentials: Path | None = None
) -> None:
    """Serve until Ctrl-C or SIGTERM. `shard`: as K/N. `credentials`: the master's file from `broker init`, whose
    account its aggregators share. Raises UserError."""
    number, shards = which(shard)
    os.umask(OWNER_ONLY)
    config = load_config(file, merged(flags, credentials)[0])
    directory = state or Path("aggregator-state") / f"{number + 1}-of-{shards}"
    check_writable(directory, directory)
    configure_logging(json=config.log.json_lines, level=config.log.level)
    warn_of_ignored(config)
    topology = topology_of(config)
    broker = awaited(config, topology, f"aggregator {number + 1}/{shards}", master=True)
    try:
        with saying("loading torch", quiet=config.log.json_lines):
            from master_service.shards.service import ShardService
        stop = threading.Event()
        threading.Thread(target=end_of_waiting, args=(stop, broker), daemon=True).start()
        with stop_on_signals(stop):
            service = ShardService(
                number,
                shards,
                directory,
                broker,
                topology,
                threads=config.master.threads,
                snapshot_every_seconds=config.master.snapshot_every_seconds,
            )
            log.info(f"aggregator {number + 1}/{shards} is here", state=str(directory), encoders=service.encoders)
            service.run(stop)
    except BrokerUnavailable:
        if not stop.is_set():
            raise
        log.warning("stopped while the broker was away; the master orders again what was not done")
        return
    finally:
        broker.close()
    log.info("stopped; what it holds is in a snapshot, a start with the same --state continues")


def which(shard: str) -> tuple[int, int]:
    """(number from 0 on, shards) of K/N. Raises UserError."""
    found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", shard)
    number, shards = (int(each) for each in found.groups()) if found else (0, 0)
    if not 1 <= number <= shards <= MAX_SHARDS or shards == 1:
        raise UserError(
            f"--shard {shard}: say which it is of how many, as 1/2 or 2/2, at least 2 and at most {MAX_SHARDS}"
        )
    return number - 1, shards
