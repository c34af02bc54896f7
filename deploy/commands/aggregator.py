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
from common.http_address import OFF, http_address
from common.wire.fields import MAX_SHARDS
from deploy.broker.credentials import merged
from deploy.commands.display import saying
from deploy.commands.run import OWNER_ONLY, awaited, end_of_waiting, logged, topology_of
from deploy.config import Config, load_config
from deploy.monitoring.monitor import AggregatorMonitor
from deploy.monitoring.pages import watched
from deploy.signals import stop_on_signals

log = structlog.get_logger()


def run_aggregator(
    shard: str,
    state: Path | None,
    file: Path | None,
    flags: dict[str, Any],
    *,
    credentials: Path | None = None,
    http: str | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM. `shard`: as K/N. `credentials`: the master's file from `broker init`, whose
    account its aggregators share. `http`: where it is looked at; the file has none, because several share it. Raises
    UserError."""
    number, shards = which(shard)
    _check_http(http)
    os.umask(OWNER_ONLY)
    config = load_config(file, merged(flags, credentials)[0])
    directory = state or Path("aggregator-state") / f"{number + 1}-of-{shards}"
    check_writable(directory, directory)
    with logged(config, f"aggregator-{number + 1}-of-{shards}") as noticed:
        monitor = AggregatorMonitor(f"{number + 1}/{shards}", directory, noticed)
        with watched(monitor, http):
            _serve(number, shards, directory, config, monitor)


def _serve(number: int, shards: int, directory: Path, config: Config, monitor: AggregatorMonitor) -> None:
    topology = topology_of(config)
    broker = awaited(config, topology, f"aggregator {number + 1}/{shards}", master=True, waiting=monitor.waiting)
    monitor.connected(broker)
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
                on_change=monitor.update,
            )
            monitor.made(service)
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


def _check_http(http: str | None) -> None:
    """Raises UserError for what is no address."""
    try:
        http_address(http or OFF)
    except ValueError as error:
        raise UserError(f"--http: {error}") from None


def which(shard: str) -> tuple[int, int]:
    """(number from 0 on, shards) of K/N. Raises UserError."""
    found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", shard)
    number, shards = (int(each) for each in found.groups()) if found else (0, 0)
    if not 1 <= number <= shards <= MAX_SHARDS or shards == 1:
        raise UserError(
            f"--shard {shard}: say which it is of how many, as 1/2 or 2/2, at least 2 and at most {MAX_SHARDS}"
        )
    return number - 1, shards
