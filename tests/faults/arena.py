"""The fault harness: real master and nodes over a private RabbitMQ, killed at labelled steps at random under a seed."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

from common.broker_url import Access
from common.brokers import open_broker
from common.errors import EXIT_BROKER, SharedEncoderError
from common.wire.to_master import Stop
from common.wire.topology import Topology
from deploy.commands.observe import Observer
from deploy.local_rabbitmq import LocalRabbitMQ
from master_service.log.message_log import open_log
from tests.faults.audit import Findings, examine
from tests.faults.cluster import LocalCluster
from tests.faults.victim import Victim, live

#: Where a master dies, and how often the step is reached before it does, at most.
MASTER_STEPS = {
    "before append": 30,
    "after append": 30,
    "before commit": 30,
    "after commit": 30,
    "during fold": 30,
    "payload before rename": 12,
    "before send": 30,
    "after send": 30,
    "before publish": 8,
    "after publish": 8,
    "before provide": 1,
    "after provide": 1,
    "before snapshot": 2,
    "during snapshot": 2,
    "after snapshot": 2,
    "before ack": 6,
    "after ack": 6,
    "before ack of an update": 12,
    "after ack of an update": 12,
}
NODE_STEPS = {
    "node before asset": 1,
    "node after asset": 1,
    "node before owe": 12,
    "node after owe": 12,
    "node before checkpoint": 4,
    "node during checkpoint": 4,
    "node after checkpoint": 4,
    "node before receipt": 12,
    "node after receipt": 12,
    "node before ack": 25,
    "node after send": 25,
    "node after ack": 25,
}
#: Of an aggregator; it writes payloads as a master does.
SHARD_STEPS = {
    "shard after place": 2,
    "shard before begun": 1,
    "shard before taken": 6,
    "shard after take": 6,
    "shard after ack": 6,
    "shard after discard": 2,
    "shard after taking back": 1,
    "shard before stepped": 6,
    "shard after step": 6,
    "shard before issue": 3,
    "shard after issue": 3,
    "shard during snapshot": 2,
    "shard after snapshot": 2,
}
#: While version 0 comes, which is at the very beginning alone.
_FIRST_STEPS = ("shard after place", "shard before begun")
#: A step that is not reached within so many seconds is not waited for: the process is killed where it is. With
#: aggregators an update is the work of more processes, all of which must be there.
_PATIENCE_SECONDS, _WIDE_PATIENCE_SECONDS = 6.0, 12.0
#: How fast a node trains: the updates of an encoder of three slices have megabytes.
_STEPS_PER_SECOND, _WIDE_STEPS_PER_SECOND = 40.0, 5.0
#: RabbitMQ 3 writes a fresh queue's declaration to disk a moment later; killed within it, the queue is broken.
_SETTLED_SECONDS = 8.0
#: After a restart of the broker a process that was just starting may have ended for want of it.
_AWAY_SECONDS = 60.0


class Arena:
    """One broker, one master, some nodes. Ends with `finish`, which gives what the examination found."""

    def __init__(
        self,
        directory: Path,
        seed: int,
        *,
        nodes: int = 3,
        preset: str = "return-count",
        steps_per_second: float | None = None,
        cluster: bool = False,
        shards: int = 1,
    ) -> None:
        """`cluster`: over three servers instead of one, all of which keep everything. `shards`: so many aggregators
        have the numbers, of an encoder of three slices."""
        self.random = random.Random(seed)
        self.directory = directory
        self.namespace = f"faults-{seed}"
        self.topology = Topology(self.namespace, replicas=3 if cluster else None)
        self.rabbitmq = LocalRabbitMQ(directory / "rabbitmq")
        self.cluster = LocalCluster(directory / "cluster")
        self._broker: LocalRabbitMQ | LocalCluster = self.cluster if cluster else self.rabbitmq
        self.urls = self.cluster.urls if cluster else (self.rabbitmq.url,)
        self.nodes = [chr(ord("a") + index) for index in range(nodes)]
        self.aggregators = [f"aggregator-{number + 1}" for number in range(shards)] if shards > 1 else []
        self.kills = 0
        self.restarts = 0
        self.by_step: dict[str, int] = {}
        self._preset = preset
        self._patience = _WIDE_PATIENCE_SECONDS if shards > 1 else _PATIENCE_SECONDS
        self._steps_per_second = steps_per_second or (_WIDE_STEPS_PER_SECOND if shards > 1 else _STEPS_PER_SECOND)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.victim"])
        self._processes: dict[str, ForkServerProcess] = {}
        self._plans: dict[str, tuple[str, int] | None] = {}
        self._since: dict[str, float] = {}
        self._broker_since = 0.0
        self._former = 0

    def __enter__(self) -> Arena:
        self._broker.__enter__()
        self._broker_since = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()
        self._broker.__exit__(None, None, None)

    def run(self, faults: int, on_fault: Callable[[Arena, str], None] = lambda arena, what: None) -> None:
        """Start everybody and inject so many faults."""
        for role in ["master", *self.aggregators]:
            self._start(role, self._plan(role, first=True))
        begun = False
        while self.kills + self.restarts < faults:
            time.sleep(0.02)
            if not begun and (not self.aggregators or self.logged("generated")):
                # who dies again and again while it waits for an encoder to begin, takes that for the reason
                begun = True
                for role in self.nodes:
                    self._start(role, self._plan(role))
            for role, process in list(self._processes.items()):
                if process.exitcode is not None:
                    what = self._died(role, process)
                elif self._plans[role] is not None and time.monotonic() - self._since[role] > self._patience:
                    process.kill()
                    process.join()
                    what = self._died(role, process, anywhere=True)
                else:
                    continue
                on_fault(self, what)
                if role in self.nodes:
                    what = self._maltreat(role)
                self._start(role, self._plan(role))
            if self.random.random() < 0.0015 and time.monotonic() - self._broker_since > _SETTLED_SECONDS:
                on_fault(self, self.mistreat_broker())

    def finish(self, seconds: float = 60.0, *, updates: int = 0) -> Findings:
        """No more faults: everybody is there, the training ends, what is owed is answered; then all is examined.

        `updates`: so many are accepted first; how many came through between the faults is the machine's speed.
        """
        for role in [*self.nodes, *self.aggregators, "master"]:
            self._end(role)
        self._start("master", self.random.choice([None, ("before export", 1)]))
        for role in [*self.aggregators, *self.nodes]:
            self._start(role, None)
        time.sleep(2.0)
        self._wait(lambda: self.logged("update") >= updates, seconds, f"{updates} accepted updates")
        broker = open_broker(
            Access(self.urls), client_name="arena", dead_letters=self.topology.dead_letters, connect_timeout=30.0
        )
        observer = Observer(broker, self.topology)
        observer.say(Stop(sender=observer.name))
        exports = self.directory / "master" / "encoders"
        self._wait(lambda: bool(list(exports.glob("*/model.safetensors"))), seconds, "the export")
        self._wait(lambda: not any(self._unsettled()), seconds, "the end, and an answer to every update, at each node")
        for role in [*self.nodes, "master", *self.aggregators]:
            self._end(role)
        observer.close()
        broker.close()
        nodes = [self.directory / "nodes" / name for name in self._states()]
        return examine(self.directory / "master", nodes, [self.directory / role for role in self.aggregators])

    def start(self, role: str) -> None:
        """Start a process that is not to die by itself."""
        self._start(role, None)

    def kill(self, role: str) -> None:
        """SIGKILL, wherever it is."""
        process = self._processes.pop(role)
        process.kill()
        process.join()
        self._died(role, process)

    def leave(self, role: str) -> None:
        """SIGTERM: a node hands in and says goodbye, a master writes a snapshot."""
        self._end(role)

    def running(self, role: str) -> bool:
        """Whether it is there. Raises AssertionError if it ended by itself."""
        process = self._processes.get(role)
        if process is not None and process.exitcode is not None:
            self._died(role, process)
        return process is not None

    def pid(self, role: str) -> int:
        return self._processes[role].pid or 0

    def logged(self, kind: str) -> int:
        """How many entries of a kind the master's log has."""
        if not any((self.directory / "master" / "payloads").glob("??/*")):
            return 0  # the ledger is being made
        with closing(open_log(self.directory / "master", read_only=True)) as log:
            return log.count(kind)

    # --- processes ---------------------------------------------------------------------------------------------------

    def _plan(self, role: str, *, first: bool = False) -> tuple[str, int]:
        steps = NODE_STEPS
        if role == "master":
            steps = MASTER_STEPS
        elif role in self.aggregators:
            steps = {label: SHARD_STEPS[label] for label in _FIRST_STEPS} if first else SHARD_STEPS
        label = self.random.choice(list(steps))
        return label, self.random.randint(1, steps[label])

    def _start(self, role: str, plan: tuple[str, int] | None) -> None:
        directory = self.directory / "nodes" / role if role in self.nodes else self.directory / role
        directory.mkdir(parents=True, exist_ok=True)
        victim = Victim(
            role,
            self.urls,
            self.topology,
            directory,
            self.directory / f"{role}.log",
            plan,
            self._preset,
            self._steps_per_second,
            shards=max(1, len(self.aggregators)),
        )
        process = self._context.Process(target=live, args=(victim,), name=role)
        process.start()
        self._processes[role], self._plans[role], self._since[role] = process, plan, time.monotonic()

    def _died(self, role: str, process: ForkServerProcess, *, anywhere: bool = False) -> str:
        """Count the death. Raises AssertionError if it is not the one that was planned."""
        if process.exitcode == -9:
            self.kills += 1
            plan = self._plans[role]
            step = "anywhere" if anywhere or plan is None else plan[0]
            self.by_step[step] = self.by_step.get(step, 0) + 1
            return f"{role} killed: {step}"
        if self._found_no_broker(process):
            return f"{role} found no broker"  # a supervisor starts it again
        words = (self.directory / f"{role}.log").read_text(errors="replace")[-3000:]
        raise AssertionError(f"{role} ended by itself with {process.exitcode}:\n{words}")

    def _maltreat(self, role: str) -> str:
        """Now and then a node loses its state directory, or gets one back from a backup."""
        state, backup = self.directory / "nodes" / role, self.directory / "backups" / role
        chance = self.random.random()
        if chance < 0.05:
            self._former += 1
            state.rename(state.with_name(f"{role}-{self._former}.former"))
            return f"{role} lost its state"
        if chance < 0.10 and backup.exists():
            self._former += 1
            state.rename(state.with_name(f"{role}-{self._former}.former"))
            shutil.copytree(backup, state)
            return f"{role} restored from a backup"
        if chance < 0.25:
            shutil.rmtree(backup, ignore_errors=True)
            shutil.copytree(state, backup)
        return f"{role} as it was"

    def restart_broker(self, how: Literal["kill", "stop"], *, forget: bool = False) -> str:
        """`forget`: it comes back with an empty disk."""
        self.restarts += 1
        if how == "kill":
            self.rabbitmq.kill()
        else:
            self.rabbitmq.stop()
        if forget:
            self.rabbitmq.forget()
        self.rabbitmq.start()
        self._broker_since = time.monotonic()
        return "broker lost its disk" if forget else "broker restarted"

    def mistreat_server(self, how: Literal["kill", "cut off", "restore"], number: int) -> None:
        """Of a cluster: kill one server or cut it off from the others, or make it one of them again."""
        self._broker_since = time.monotonic()
        if how == "kill":
            self.restarts += 1
            self.cluster.kill(number)
        elif how == "cut off":
            self.restarts += 1
            self.cluster.cut_off(number)
        elif self.cluster.is_alive(number):
            self.cluster.join(number)
        else:
            self.cluster.start(number)

    def mistreat_broker(self) -> str:
        """Kill or stop it; one time in five it loses its disk."""
        return self.restart_broker(self.random.choice(("kill", "stop")), forget=self.random.random() < 0.2)

    def _end(self, role: str) -> None:
        """Ask it to end; it may have been killed by its plan meanwhile."""
        process = self._processes.pop(role, None)
        if process is None:
            return
        process.terminate()
        process.join(40.0)
        if process.exitcode == -9:
            self.kills += 1
        elif process.exitcode not in (0, -15) and not self._found_no_broker(process):  # -15: it did not listen yet
            words = (self.directory / f"{role}.log").read_text(errors="replace")[-3000:]
            raise AssertionError(f"{role} did not end cleanly ({process.exitcode}):\n{words}")

    def _found_no_broker(self, process: ForkServerProcess) -> bool:
        """Whether it ended because the broker was being restarted while it began, or while it was asked to end."""
        return process.exitcode == EXIT_BROKER and time.monotonic() - self._broker_since < _AWAY_SECONDS

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            for role, process in list(self._processes.items()):
                if process.exitcode is not None:
                    self._died(role, process)
                    self._start(role, None)
            if time.monotonic() > deadline:
                raise SharedEncoderError(f"{what} did not come within {seconds:.0f} s; see {self.directory}")
            time.sleep(0.05)

    # --- state -------------------------------------------------------------------------------------------------------

    def _states(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "nodes").iterdir())

    def _unsettled(self) -> list[Path]:
        """What a node trains still (it may hand in once more as it ends), and the updates that have no answer."""
        states = [self.directory / "nodes" / role for role in self.nodes]
        training = [path for state in states for path in state.glob("current.json")]
        return training + [path for state in states for path in (state / "owed").glob("*.json")]
