"""Running one master or one node in this process: configuration, broker, signals and what is shown meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from common.brokers import open_broker
from common.clock import SYSTEM, Clock
from common.errors import AccessRefused, BrokerUnavailable, SharedEncoderError, UserError
from common.exports import check_export_directory, check_writable
from common.http_address import DEFAULT_HTTP
from common.wire.accounts import MASTER
from common.wire.topology import Topology
from deploy.broker.credentials import merged
from deploy.commands.display import MasterDisplay, NodeDisplay, saying
from deploy.config import Config, load_config, warn_of_ignored
from deploy.log_file import PARTY, LogFile
from deploy.logging import Noticed, configure_logging
from deploy.monitoring.monitor import MasterMonitor, NodeMonitor
from deploy.monitoring.pages import watched
from deploy.signals import stop_on_signals
from node_service.config import NodeConfig

if TYPE_CHECKING:
    from common.wire.broker import Broker
    from master_service.decisions.settings import Settings
    from master_service.service import MasterService
    from node_service.corpus.corpus import Corpus
    from node_service.service import NodeService
    from node_service.training.ranks import Ranks

log = structlog.get_logger()

#: Between two attempts of a service to reach the broker at its start: twice as long each time.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 8.0
#: Who was asked to end waits no longer than this for a broker that is away, and looks so often, seconds.
_AWAY_SECONDS, _LOOK_SECONDS = 2.0, 0.2
#: What a service writes is its owner's alone: files 0600, folders 0700.
OWNER_ONLY = 0o077


def run_master(
    file: Path | None, flags: dict[str, Any], *, change: bool = False, credentials: Path | None = None
) -> None:
    """Serve until Ctrl-C, SIGTERM, or the last encoder is finished if so configured.

    `credentials`: the master's file from `broker init`. `change`: settings that are given and are not those of the
    message log hold from here on, instead of a UserError.
    """
    os.umask(OWNER_ONLY)
    config = load_config(file, merged(flags, credentials)[0])
    decided = config.settings()
    check_writable(config.master.state_dir, config.master.state_dir)
    if config.master.export_dir is not None:
        check_export_directory(config.master.export_dir)
    with logged(config, MASTER) as noticed:
        _run_master(config, decided, noticed, change=change)


def _run_master(config: Config, decided: Settings, noticed: Noticed, *, change: bool) -> None:
    from master_service.decisions.rules.model import warnings

    for warning in warnings(decided.rule):
        log.warning(warning)
    topology = topology_of(config)
    if not topology.own_accounts:
        warn_of_open_accounts(config)
    monitor = MasterMonitor("", config.master.state_dir, noticed, needed_bytes=config.master.min_free)
    with watched(monitor, config.master.http, by_default=DEFAULT_HTTP):
        _serve_master(config, decided, topology, monitor, change=change)


def _serve_master(
    config: Config, decided: Settings, topology: Topology, monitor: MasterMonitor, *, change: bool
) -> None:
    broker = awaited(config, topology, "master", master=True, waiting=monitor.waiting)
    monitor.connected(broker)
    try:
        with saying("loading torch", quiet=config.log.json_lines):
            from master_service.service import MasterService
        stop = threading.Event()
        threading.Thread(target=end_of_waiting, args=(stop, broker), daemon=True).start()
        with stop_on_signals(stop), MasterDisplay(quiet=config.log.json_lines) as display:

            def on_change(service: MasterService) -> None:
                monitor.update(service)
                display.update(service)

            service = MasterService(
                config.master,
                decided,
                broker,
                topology,
                get=config.encoder.get,
                given=config.given(),
                change=change,
                on_change=on_change,
            )
            monitor.made(service)
            service.run(stop)
    except BrokerUnavailable:
        if not stop.is_set():
            raise
        log.warning("stopped while the broker was away; what could not leave is sent at the next start")
        return
    finally:
        broker.close()
    if stop.is_set():
        log.info("stopped; the state is in a snapshot, a start with the same --state continues")


def end_of_waiting(stop: threading.Event, broker: Broker, clock: Clock = SYSTEM) -> None:
    """An alarm of the broker is waited out, however long, and so is a broker that is away; but not by whoever was asked
    to end. What did not leave is sent at the next start."""
    stop.wait()
    connected_at = clock.monotonic()
    while (status := broker.status()).blocked is None and clock.monotonic() - connected_at < _AWAY_SECONDS:
        if status.connected:
            connected_at = clock.monotonic()
        clock.wait(_LOOK_SECONDS)
    broker.close()


def run_node(given: str | None, file: Path | None, flags: dict[str, Any], *, credentials: Path | None = None) -> None:
    """Serve until Ctrl-C, SIGTERM, or the encoder is finished if so configured.

    `given`: the node's id, which may be left out where `credentials`, the file of `broker add-node`, has it. `flags`
    have a section `node` for it."""
    os.umask(OWNER_ONLY)
    flags, owner = merged(flags, credentials)
    name = node_of(given, owner)
    config = load_config(file, {**{key: flags[key] for key in ("broker", "log")}, "nodes": {name: flags["node"]}})
    check_node_id(name)
    follows = os.environ.get("RANK", "0") != "0"  # of `torchrun`'s processes, one that is not the node itself
    with logged(config, name, file=not follows) as noticed:
        _run_node(name, config, file, noticed, follows=follows)


@contextlib.contextmanager
def logged(config: Config, party: str, *, file: bool = True) -> Iterator[Noticed]:
    """Inside, this process logs as it is configured; into the `file`, if there is one, also what ends it. Gives what is
    noticed of it. Raises UserError for a file that cannot be written."""
    noticed, log_file = Noticed(), None
    if config.log.file is not None and file:
        path = Path(str(config.log.file).replace(PARTY, party))
        log_file = LogFile(path, config.log.max_bytes, config.log.keep)
    configure_logging(json=config.log.json_lines, level=config.log.level, noticed=noticed, file=log_file)
    warn_of_ignored(config)
    try:
        yield noticed
    except Exception as error:  # whatever it is: who reads the file wants to know why it ends there
        if log_file is not None:
            known = isinstance(error, SharedEncoderError)
            why = {"problem": str(error)} if known else {"exc_info": error}
            log_file.write("error", "ended", **why)
        raise
    finally:
        if log_file is not None:
            log_file.close()


def _run_node(name: str, config: Config, file: Path | None, noticed: Noticed, *, follows: bool) -> None:
    node_config = config.nodes.get(name) or NodeConfig()
    state_dir = node_config.state_dir or Path("node-state") / name
    if not follows:
        check_writable(state_dir, state_dir)
        if node_config.export_dir is not None:
            check_export_directory(node_config.export_dir)
    if follows:
        _follow(node_config, load_corpora(name, node_config, file))
        return
    monitor = NodeMonitor(name, state_dir, noticed)
    with watched(monitor, node_config.http):
        _serve_node(name, config, node_config, load_corpora(name, node_config, file), monitor)


def _serve_node(
    name: str, config: Config, node_config: NodeConfig, corpora: dict[str, Corpus], monitor: NodeMonitor
) -> None:
    topology = topology_of(config)
    broker = awaited(config, topology, f"node {name}", waiting=monitor.waiting)
    monitor.connected(broker)
    try:
        with saying("loading torch and transformers, a few seconds", quiet=config.log.json_lines):
            import transformers  # noqa: F401  # what takes the time, before the first instruction needs it

            from node_service.service import NodeService
        stop = threading.Event()
        threading.Thread(target=end_of_waiting, args=(stop, broker), daemon=True).start()
        with (
            stop_on_signals(stop),
            _leading(node_config) as ranks,
            NodeDisplay(name, quiet=config.log.json_lines) as display,
        ):

            def on_change(service: NodeService) -> None:
                monitor.update(service)
                display.update(service)

            service = NodeService(name, node_config, corpora, broker, topology, on_change=on_change, ranks=ranks)
            monitor.made(service)
            service.run(stop)
    finally:
        broker.close()


@contextlib.contextmanager
def _leading(config: NodeConfig) -> Iterator[Ranks | None]:
    """Inside, this process is the first of those that `torchrun` started, which end with it; None if it did not."""
    from node_service.training.following import stop
    from node_service.training.ranks import Ranks

    ranks = Ranks.started(config.device)
    try:
        yield ranks
    finally:
        if ranks is not None:
            with contextlib.suppress(UserError):  # they have ended, and why was said
                stop(ranks)
            ranks.close()


def _follow(config: NodeConfig, corpora: dict[str, Corpus]) -> None:
    """As another process of a node: train along until the first one ends, which is the one that signals are for."""
    from node_service.training.following import follow
    from node_service.training.ranks import Ranks

    ranks = Ranks.started(config.device)
    assert ranks is not None, "a rank above 0 is one of several"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        follow(ranks, config, corpora)
    finally:
        ranks.close()


def awaited(
    config: Config,
    topology: Topology,
    client_name: str,
    clock: Clock = SYSTEM,
    *,
    master: bool = False,
    waiting: Callable[[str], None] = lambda problem: None,
) -> Broker:
    """The broker of a service, which may start before it, or before its account is there: tried for
    `broker.wait_seconds`, with one warning; `waiting` is told each time why. Raises what `connect` raises the last
    time."""
    deadline, pause, warned = clock.monotonic() + config.broker.wait_seconds, _FIRST_PAUSE_SECONDS, False
    while True:
        try:
            return connect(config, topology, client_name, master=master)
        except (AccessRefused, BrokerUnavailable) as error:
            left = deadline - clock.monotonic()
            if left <= 0:
                raise
            waiting(str(error))
            if not warned:
                log.warning("waiting for the broker", problem=str(error), at_most_seconds=round(left))
                warned = True
            clock.wait(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def warn_of_open_accounts(config: Config) -> None:
    """What a federation is open to whose parties share their accounts at the broker."""
    unheld = ", and master.operators holds nobody back" if config.master.operators else ""
    log.warning(
        "who has the broker's password may speak for everybody here, master and operators included: "
        f'broker.accounts is "open"{unheld}; `shared-encoder broker init` gives each party an account of its own'
    )


def topology_of(config: Config) -> Topology:
    """The names of this federation, and whether each party declares only what is its own."""
    broker = config.broker
    return Topology(broker.namespace, own_accounts=broker.accounts == "required", replicas=broker.replicas)


def connect(config: Config, topology: Topology, client_name: str, *, master: bool = False) -> Broker:
    """`master`: the account may do what the master's may. Raises UserError, of which AccessRefused may pass, or
    BrokerUnavailable when nobody answers in time."""
    everything = master or not topology.own_accounts
    return open_broker(
        config.broker.access(),
        client_name=client_name,
        dead_letters=topology.dead_letters if everything else None,
        notes=topology.lock,
        makes_notes=everything,
        connect_timeout=config.broker.connect_timeout_seconds,
    )


def node_of(given: str | None, owner: str | None) -> str:
    """Which node is meant: that of the command line, or whose the credentials are. Raises UserError."""
    if given is not None and owner is not None and given != owner:
        raise UserError(f"the credentials are those of {owner!r}, not of node {given!r}; leave NAME out")
    if given is None and owner is None:
        raise UserError("which node is it? give its NAME, or --credentials FILE")
    return given or owner or ""


def check_node_id(name: str) -> None:
    """Raises UserError for an id that cannot be part of a queue's name."""
    import re

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise UserError(f"node id {name!r}: use up to 64 letters, digits, - and _, starting with a letter or digit")
    if name == MASTER:
        raise UserError(f"node id {name!r}: that is the master's own name at the broker; take another")


def load_corpora(name: str, config: NodeConfig, file: Path | None = None) -> dict[str, Corpus]:
    """The node's samples by encoder type, read before anything is promised; an entry point's module may lie beside the
    configuration `file`. Raises UserError, which names all broken files of all corpora at once."""
    from common.sample_files.refusals import Refusals
    from node_service.corpus.corpus import load_corpus
    from node_service.corpus.overview import first_line

    if not config.corpus:
        raise UserError(f"node {name!r} has no samples: give --corpus PATH, or [nodes.{name}.corpus] in the file")
    corpora: dict[str, Corpus] = {}
    refusals, seen = Refusals(), set[str]()
    for corpus_config in config.corpus:
        if corpus_config.type in seen:
            raise UserError(
                f"nodes.{name}.corpus: two corpora of type {corpus_config.type}; one with several paths does"
            )
        seen.add(corpus_config.type)
        started = time.monotonic()
        with refusals.gathering():
            corpora[corpus_config.type] = load_corpus(corpus_config, beside=file.parent if file is not None else None)
        corpus = corpora.get(corpus_config.type)
        if corpus is None:
            continue
        log.info(first_line(corpus), node=name)
        log.info(
            "corpus read",
            node=name,
            type=corpus.type,
            train_samples=len(corpus.train),
            held_out_samples=len(corpus.test),
            seconds=round(time.monotonic() - started, 2),
        )
    refusals.check()
    return corpora
