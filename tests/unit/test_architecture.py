"""docs/architecture.md is true: a real node and a real master are stepped by hand through one update, and traced."""

from __future__ import annotations

import re
import sys
import threading
import tomllib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from common.brokers.memory import MemoryBroker, MemoryServer
from common.clock import VirtualClock
from common.wire.broker import Delivery
from common.wire.to_node import Instruction
from common.wire.topology import Topology
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.config import MasterConfig
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule
from master_service.history.state_directory import open_journal
from master_service.master import Master
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.handover.local_state import open_local_state
from node_service.handover.outbox import Outbox
from node_service.handover.receipt_book import Ledger
from node_service.node import Node
from node_service.training.session import Session
from tests.faults.tiny import samples

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["importlinter"]["root_packages"]
CONTRACTS: list[dict[str, Any]] = PROJECT["tool"]["importlinter"]["contracts"]
TOPOLOGY = Topology("walk")
MOST_FILES = 43

#: A function, as the page writes it: file below the root, and qualified name.
Function = tuple[str, str]


# --- the page --------------------------------------------------------------------------------------------------------


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def walk() -> list[tuple[str, Function]]:
    """The lines of the walk, in order: the thread that the heading above names, and the function."""
    thread, lines = "", []
    for line in section("The walk of one update").splitlines():
        if heading := re.fullmatch(r"\*\*(.+): .+\*\*", line):
            thread = heading[1].replace("`", "")
        elif found := re.fullmatch(r"- `([\w/]+\.py): ([\w.]+)` — .+", line):
            lines.append((thread, (found[1], found[2])))
        else:
            assert not line.startswith("- "), f"not a line of the walk: {line}"
    return lines


def helpers() -> set[str]:
    return set(re.findall(r"`([\w/]+\.py)`", section("The walk of one update").split("\nHelpers ")[1]))


def exceptions() -> set[tuple[str, str]]:
    """The calls upwards that the page admits: from file to file."""
    rooms = section("Rooms, and which way imports run")
    return set(re.findall(r"^- `([\w/]+\.py)` → `([\w/]+\.py)`: ", rooms, re.MULTILINE))


# --- which way calls run ---------------------------------------------------------------------------------------------


def runs_upwards(caller: str, callee: str) -> bool:
    """Whether the import order forbids the caller's room to know the callee's: it is above, or beside in one layer.

    A room that no layer names is a leaf: it calls no room that one names.
    """
    for contract in CONTRACTS:
        if contract["type"] != "layers":
            continue
        ranks = {room.strip(): rank for rank, layer in enumerate(contract["layers"]) for room in layer.split("|")}
        for container in contract.get("containers", [""]):
            below = f"{container}/" if container else ""
            if not (caller.startswith(below) and callee.startswith(below)):
                continue
            one, other = (file.removeprefix(below).split("/")[0].removesuffix(".py") for file in (caller, callee))
            if one != other and other in ranks and ranks[other] <= ranks.get(one, len(ranks)):
                return True
    return False


# --- one update, traced ----------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """The project's functions that were called, in the order of their first calls, each with the thread that a service
    would have called it on; and who called whom."""

    first: dict[Function, str] = field(default_factory=dict)
    calls: set[tuple[Function, Function]] = field(default_factory=set)
    thread: str = ""

    @contextmanager
    def on(self, thread: str) -> Iterator[None]:
        """What happens inside happens on this thread, in a service."""
        self.thread = thread
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(None)

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.first}

    def _called(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or (function := function_of(frame)) is None:
            return
        self.first.setdefault(function, self.thread)
        caller = frame.f_back
        while caller is not None and function_of(caller) is None:
            caller = caller.f_back  # through the standard library or another package
        if caller is not None and (by := function_of(caller)) is not None:
            self.calls.add((by, function))


def function_of(frame: FrameType) -> Function | None:
    """The project's function that a frame runs; None for others, tests included."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in PACKAGES:
        return None
    return str(path.relative_to(ROOT)), frame.f_code.co_qualname


class Federation:
    """One master and one node that trains a tiny encoder, on real disks, over the embedded broker without threads."""

    def __init__(self, directory: Path) -> None:
        self.trace = Trace()
        clock = VirtualClock(1e9)
        server = MemoryServer(clock=clock.now)
        self.brokers = [
            MemoryBroker(server, user=user, dead_letters=TOPOLOGY.dead_letters, threaded=False)
            for user in ("master", "a")
        ]
        self.for_master: deque[Delivery] = deque()
        self.for_node: deque[Delivery] = deque()
        config = MasterConfig(state_dir=directory / "master")
        every_update_makes_a_version = aggregation_rule("fedasync")
        rule = UpdateRule(when=ReturnWhen(steps=2))
        settings = Settings(rule=every_update_makes_a_version, update_rule=rule, stop=StopRule(versions=1000))
        self.master = Master(
            config,
            lambda logged: settings,
            self.brokers[0],
            TOPOLOGY,
            open_journal(config, clock=clock),
            get="tiny",
            clock=clock,
            ending=threading.Event(),
            on_delivery=self.for_master.append,
        )
        self.state = open_local_state(directory / "a", "a")
        outbox = Outbox(self.brokers[1], TOPOLOGY, "a", self.state.chunk, inline_bytes=0)

        def build(instruction: Instruction, corpus: Corpus, ledger: Ledger, assets: Mapping[str, bytes]) -> Session:
            place = directory / "a/encoders" / instruction.encoder
            return Session(
                instruction, corpus.train, place, private={}, seed=0, device="cpu", ledger=ledger, assets=assets
            )

        corpora = {"tiny": Corpus("tiny", samples(seed=0), None, [], None)}
        self.node = Node("a", NodeConfig(), corpora, self.brokers[1], TOPOLOGY, self.state, build, outbox, clock=clock)

    def start(self) -> None:
        self.master.start()
        for queue, prefetch in ((TOPOLOGY.master_inbox, 64), (TOPOLOGY.master_updates, 4)):
            self.brokers[0].consume(queue, self.for_master.append, prefetch=prefetch)
        self.node.start()
        self.brokers[1].consume(TOPOLOGY.node_inbox("a"), self.for_node.append, prefetch=32)

    def until_version(self, version: int) -> None:
        """Everything but training, in the order in which an update needs it."""
        for _ in range(20):
            self._send()
            self._master()
            self._hear()
            self._read()
            if self.node.training is not None and self.node.training.version == version:
                return
        raise AssertionError(f"the node has not read version {version}")

    def work(self) -> None:
        with self.trace.on("Node, main thread"):
            self.node.work()

    def _send(self) -> None:
        with self.trace.on("Node, thread outbox-NAME"):
            while self.node.outbox.flush_one():
                pass

    def _deliver(self) -> bool:
        with self.trace.on("Broker's own thread"):
            delivered = [broker.deliver() for broker in self.brokers]
        return any(delivered)

    def _master(self) -> None:
        while self._deliver() or self.for_master:
            with self.trace.on("Master, main thread"):
                while self.for_master:
                    self.master.hear(self.for_master.popleft())
                self.master.look()

    def _hear(self) -> None:
        while self.for_node:
            with self.trace.on("Node, main thread"):
                self.node.hear(self.for_node.popleft())

    def _read(self) -> None:
        read = None
        while read is None:
            with self.trace.on("Node, thread reading-NAME"):
                read = self.node.reading.read_one()
            if read is None and not self._deliver():
                return
        with self.trace.on("Node, main thread"):
            self.node.was_read(read)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trace]:
    """Of one update, from the turn in which it is handed in until the version that counts it is adopted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests/faults/plugin"))
        federation = Federation(tmp_path_factory.mktemp("walk"))
        with closing(federation.master.journal), closing(federation.state):
            federation.start()
            federation.until_version(0)
            federation.work()
            federation.work()
            assert not federation.state.owed
            federation.trace = Trace()
            federation.work()
            assert list(federation.state.owed) == [0]
            federation.until_version(1)
            assert not federation.state.owed
            [receipt] = federation.state.ledger(federation.node.encoder or "").answered.values()
            assert receipt.accepted and receipt.version == 1
        yield federation.trace


def test_the_walk_is_the_documents(trace: Trace) -> None:
    """Every line was called, on the thread of its heading, in the order of the page; and nothing else was entered but
    the helpers, which call nothing of the walk."""
    lines = walk()
    named = [function for _, function in lines]
    assert len(named) == len(set(named)) > 40
    assert [function for function in named if function not in trace.first] == [], "never called"
    assert named == [function for function in trace.first if function in named], "in another order"
    threads = {function: thread for thread, function in lines}
    assert {function: trace.first[function] for function in named} == threads
    files = {file for file, _ in named}
    assert len(files) <= MOST_FILES
    assert trace.files - files == helpers(), "the helpers are what the walk enters besides"
    assert [call for call in trace.calls if call[0][0] in helpers() and call[1][0] in files] == []


def test_no_call_runs_upwards(trace: Trace) -> None:
    """But the exceptions of the page, each of which is one."""
    found = {(by[0], what[0]) for by, what in trace.calls if runs_upwards(by[0], what[0])}
    assert found == exceptions()


@pytest.mark.parametrize(
    ("caller", "callee", "up"),
    [
        ("common/numbers/slicing.py", "common/wire/codec.py", True),
        ("common/clock.py", "common/wire/codec.py", True),
        ("common/wire/codec.py", "common/clock.py", False),
        ("common/brokers/memory.py", "common/encoders/text.py", True),
        ("common/wire/codec.py", "node_service/node.py", True),
        ("master_service/wire/inbox.py", "node_service/agent.py", True),
        ("master_service/decisions/tally.py", "master_service/record.py", True),
        ("node_service/agent.py", "node_service/node.py", True),
        ("node_service/node.py", "node_service/handover/outbox.py", False),
        ("master_service/record.py", "common/wire/broker.py", False),
    ],
)
def test_what_runs_upwards(caller: str, callee: str, up: bool) -> None:
    assert runs_upwards(caller, callee) is up


def test_the_import_order_is_the_contracts() -> None:
    rooms = section("Rooms, and which way imports run")
    for contract in CONTRACTS:
        if contract["type"] == "layers":
            order = " > ".join(contract["layers"])
            for container in contract.get("containers", ["all packages"]):
                assert f"\n{container:<16} {order}\n" in rooms


def test_what_the_page_names_is_there() -> None:
    """Files, folders, tests, contracts, protocols, and whatever else stands in code quotes."""
    for path in re.findall(r"`((?:common|master_service|node_service|deploy|tests)/[\w/.]*)[:`]", PAGE):
        assert (ROOT / path).exists(), path
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests, name
    names = [contract["name"] for contract in CONTRACTS]
    for quoted in re.findall(r'contracts? "([^"]+)"', PAGE):
        pattern = re.escape(quoted).replace("…", ".+")
        assert any(re.fullmatch(pattern, name) for name in names), quoted
    for protocol, file in re.findall(r"^\| `(\w+)` \(`([\w/]+\.py)`\) \|", PAGE, re.MULTILINE):
        assert re.search(rf"^class {protocol}\((\w+, )?Protocol\):", (ROOT / file).read_text(), re.MULTILINE), protocol
    code = "".join(file.read_text() for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    words = set(re.findall(r"\w+", code))
    for name in re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", PAGE):
        there = (ROOT / name).exists() or name.startswith("test_") or set(name.split(".")) <= words
        assert there, f"nothing in the code is called {name}"
