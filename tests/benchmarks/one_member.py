"""What one member that means ill costs the others: receipts a second of honest nodes, beside it and without it, on a
real RabbitMQ, in one run.

    python -m tests.benchmarks.one_member [--seconds 15] [--runs 3] [--share 0.5]

Master, honest nodes and the ill member are processes of their own. The honest nodes ask for `--share` of what the
master answers at most, which is measured first; the ill one runs at the lowest priority of the processor, because in
truth it has a machine of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console
from rich.table import Table

from common.brokers import open_broker
from common.wire.to_master import Alive, Fetch
from common.wire.to_node import Instruction, Receipt, Resend
from deploy.local_rabbitmq import LocalRabbitMQ
from master_service.config import MasterConfig
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import StopRule
from master_service.service import MasterService
from tests.integration.harness import TOPOLOGY, HandNode, decided, eventually, numbers

_NODES = 3
#: Once honest nodes have so many receipts each, they are warm.
_WARM = 5
_SPAWN = multiprocessing.get_context("spawn")


def node(url: str, name: str) -> HandNode:
    broker = open_broker(url, client_name=name, dead_letters=TOPOLOGY.dead_letters)
    return HandNode(None, name, broker=broker)


def quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))


# --- the processes ---------------------------------------------------------------------------------------------------


def serve(url: str, directory: str, ready: Event, stop: Event) -> None:
    quiet()
    broker = open_broker(url, client_name="master", dead_letters=TOPOLOGY.dead_letters)
    guards = {"max_staleness": 10**6, "norm_clip": None}
    settings = decided(rule=aggregation_rule("fedasync", {"guards": guards}), stop=StopRule(versions=10**6))
    service = MasterService(MasterConfig(state_dir=Path(directory)), settings, broker, TOPOLOGY, get="text")
    ending = threading.Event()
    threading.Thread(target=lambda: (stop.wait(), ending.set()), daemon=True).start()
    threading.Thread(target=lambda: _when_running(service, ready), daemon=True).start()
    service.run(ending)
    broker.close()


def _when_running(service: MasterService, ready: Event) -> None:
    encoders = service.master.state.encoders
    eventually(lambda: any(each.status == "running" for each in encoders.values()), 120.0)
    ready.set()


def honest(url: str, name: str, pause: Any, counted: Any, longest: Any, stop: Event) -> None:
    """Sends one update after the other, each `pause` seconds after the one before at the earliest; counts the receipts,
    and notes the longest wait for one."""
    quiet()
    party = node(url, name)
    instruction = party.enter()
    bodies, sequence = numbers(instruction), 0
    while not stop.is_set():
        begun = time.monotonic()
        party.send(party.manifest(instruction, sequence, bodies, order=sequence + 1), bodies)
        receipt = party.hear(Receipt, 240.0)
        assert receipt.accepted and receipt.sequence == sequence, receipt
        sequence += 1
        counted.value += 1
        longest.value = max(longest.value, time.monotonic() - begun)
        time.sleep(max(0.0, begun + pause.value - time.monotonic()))
    party.broker.close()


def ill(url: str, orders: Any, sent: Any, over: Event) -> None:
    """Whatever it is told to do, under a new name each time, until it is over."""
    quiet()
    os.nice(19)
    for number in itertools.count():
        attack = orders.get()
        if attack is None:
            return
        party = node(url, f"evil-{number}")
        ATTACKS[attack](party, party.enter(), sent, over)
        party.broker.close()


def silent_manifests(party: HandNode, instruction: Instruction, sent: Any, stop: Event) -> None:
    """Six manifests whose chunks do not come; when it is asked for them again, the same again."""
    bodies = numbers(instruction)
    manifests = [party.manifest(instruction, sequence, bodies, order=sequence + 1) for sequence in range(6)]
    for manifest in manifests:
        party.say(".ready", manifest, TOPOLOGY.update)
    sent.release()
    while not stop.is_set():
        with contextlib.suppress(queue.Empty):
            again = party.hear(Resend, 0.5)
            changes = {"attempt": again.attempt, "order": 10 + again.attempt}
            party.say(".ready", manifests[again.sequence].model_copy(update=changes), TOPOLOGY.update)


def refused_manifests(party: HandNode, instruction: Instruction, sent: Any, stop: Event) -> None:
    """Six hundred manifests of another layout at once, and then as many as the broker takes."""
    bodies, sequence = numbers(instruction), 0
    while not stop.is_set():
        manifest = party.manifest(instruction, sequence, bodies, layout_digest="1" * 64, order=sequence + 1)
        party.say(".ready", manifest, TOPOLOGY.update)
        sequence += 1
        if sequence == 600:
            sent.release()


def requests(party: HandNode, instruction: Instruction, sent: Any, stop: Event) -> None:
    """Signs of life and requests for versions, as many as the broker takes."""
    alive = Alive(node=party.name, incarnation="first")
    fetch = Fetch(node=party.name, incarnation="first", encoder=instruction.encoder, have_version=-1)
    sent.release()
    while not stop.is_set():
        party.say(".alive", alive)
        party.say(".fetch", fetch)


ATTACKS: dict[str, Callable[[HandNode, Instruction, Any, Event], None]] = {
    "manifests without chunks": silent_manifests,
    "refused manifests": refused_manifests,
    "requests": requests,
}


# --- the measurement -------------------------------------------------------------------------------------------------


class Federation:
    """A broker, a master, honest nodes and one that is not, each a process."""

    def __init__(self, url: str, directory: str) -> None:
        self._stop, self._over, self._sent = _SPAWN.Event(), _SPAWN.Event(), _SPAWN.Semaphore(0)
        self._orders = _SPAWN.Queue()
        self.pause = _SPAWN.Value("d", 0.0)
        self._counted = [_SPAWN.Value("q", 0) for _ in range(_NODES)]
        self._longest = [_SPAWN.Value("d", 0.0) for _ in range(_NODES)]
        ready = _SPAWN.Event()
        self._all = [_SPAWN.Process(target=serve, args=(url, directory, ready, self._stop))]
        self._all[0].start()
        assert ready.wait(300.0), "the master does not start"
        for number, (counted, longest) in enumerate(zip(self._counted, self._longest, strict=True)):
            told = (url, f"honest-{number}", self.pause, counted, longest, self._stop)
            self._all.append(_SPAWN.Process(target=honest, args=told))
        self._all.append(_SPAWN.Process(target=ill, args=(url, self._orders, self._sent, self._over)))
        for each in self._all[1:]:
            each.start()
        eventually(lambda: all(each.value >= _WARM for each in self._counted), 300.0)

    def measured(self, seconds: float, attack: str | None = None) -> tuple[float, float]:
        """Receipts a second of all honest nodes together, and the longest wait for one, seconds."""
        if attack is not None:
            self._over.clear()
            self._orders.put(attack)
            assert self._sent.acquire(timeout=300.0), "the ill member has sent nothing"
        for each in self._longest:
            each.value = 0.0
        begun, before = time.monotonic(), sum(each.value for each in self._counted)
        time.sleep(seconds)
        assert all(each.is_alive() for each in self._all), "a process has died; its own words stand above"
        rate = (sum(each.value for each in self._counted) - before) / (time.monotonic() - begun)
        longest = max(each.value for each in self._longest)
        self._over.set()
        return rate, longest

    def end(self) -> None:
        self._stop.set()
        self._over.set()
        self._orders.put(None)
        for each in reversed(self._all):
            each.join(30.0)
            if each.is_alive():
                each.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.5, help="of the master's most that honest nodes ask for")
    options = parser.parse_args()
    quiet()
    table = Table(title=f"receipts a second of {_NODES} honest nodes, longest wait", title_justify="left")
    for heading in ("run", "undisturbed", *ATTACKS):
        table.add_column(heading, justify="right")
    worst = float("inf")
    with tempfile.TemporaryDirectory() as place, LocalRabbitMQ(Path(place) / "rabbitmq") as server:
        federation = Federation(server.url, f"{place}/master")
        try:
            most, _ = federation.measured(options.seconds)
            federation.pause.value = _NODES / (options.share * most)
            print(f"at most {most:.1f} receipts a second; honest nodes ask for {options.share * most:.1f}", flush=True)
            for run in range(1, options.runs + 1):
                alone, waited = federation.measured(options.seconds)
                row = [f"{alone:.1f}/s, {waited:.2f} s"]
                for attack in ATTACKS:
                    rate, waited = federation.measured(options.seconds, attack)
                    worst = min(worst, rate / alone)
                    row.append(f"{rate:.1f}/s ({rate / alone:.0%}), {waited:.2f} s")
                    print(f"run {run}, {attack}: {row[-1]}; undisturbed {row[0]}", flush=True)
                    time.sleep(options.seconds / 2)  # what is left of it is dealt with
                table.add_row(str(run), *row)
        finally:
            federation.end()
    Console().print(table)
    sys.exit(0 if worst >= 0.8 else f"the worst of them is {worst:.0%} of the undisturbed rate, at least 80% is wanted")


if __name__ == "__main__":
    main()
