"""What `shared-encoder broker` does: looks after what a federation has at the broker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import LockHeld
from deploy.commands.run import connect, topology_of
from deploy.config import load_config
from deploy.logging import configure_logging
from master_service.decisions.coordinator import Coordinator
from master_service.log.jsonl import opened


def clean(flags: dict[str, Any], file: Path | None, state: Path, *, everything: bool) -> None:
    """Delete what ended runs have left at the broker, by the log of the master that ran them, and say what that was.

    The streams of encoders that have ended; with `everything` all queues of the namespace that the log knows
    of. Raises LockHeld while a master serves the namespace: that one cleans up by itself. UserError, BrokerUnavailable.
    """
    config = load_config(file, flags)
    configure_logging(level="warning")
    coordinator = Coordinator()
    with opened(state) as log:
        for entry in log.entries():
            coordinator.handle(entry)
    topology = topology_of(config)
    encoders, shards = coordinator.state.encoders, coordinator.state.settings.shards
    ended = [name for name, encoder in encoders.items() if encoder.status in ("finished", "failed")]
    names = topology.queue_names(coordinator.state.nodes, encoders, shards) if everything else topology.streams(ended)
    broker = connect(config, topology, "clean", master=True)
    try:
        broker.lock(topology.master_lock, lambda: None)
        count = 0
        for name in names:
            broker.delete_queue(name)
            print(f"deleted {name}, if it was there")
            count += 1
    except LockHeld:
        raise LockHeld(
            f"a master serves the namespace {topology.namespace!r}: it lets go of ended streams by itself; "
            "stop it first to clean up behind it"
        ) from None
    finally:
        broker.close()
    going_on = [name for name in encoders if name not in ended]
    if not everything and going_on:
        print(f"kept: the streams of {', '.join(going_on)}, whose training has not ended; --all deletes them too")
    if not count:
        print("nothing to delete: no encoder of this log has ended")
