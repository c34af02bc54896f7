"""Assets from the encoder type that makes them to the nodes and the exports, over brokers that lose them."""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common.brokers import open_broker
from common.brokers.memory import MemoryServer
from common.clock import SYSTEM, VirtualClock
from common.errors import BrokerUnavailable
from common.wire.assets import AssetReader, asset_entry, read_assets
from common.wire.broker import Broker
from common.wire.fields import AssetEntry
from common.wire.to_master import Stop
from common.wire.topology import Topology
from common.workers import Worker
from deploy.commands.observe import Observer, request_encoder
from deploy.commands.replay import export_version
from master_service.decisions.records import Generated, Loggable
from master_service.history.state_directory import Journal
from master_service.log.payloads import MemoryPayloads
from master_service.wire.publisher import Publisher
from node_service.config import NodeConfig
from node_service.corpus.corpus import Corpus
from node_service.handover.store import MemoryStore
from node_service.service import NodeService
from tests.faults.tiny import ASSETS, samples
from tests.integration.harness import TOPOLOGY as HARNESS
from tests.integration.harness import connection, decided, eventually, running_master
from tests.unit.stepped import TOPOLOGY, SteppedMaster, SteppedNode, together

CONTENTS = {"tokenizer.json": b"t" * (3 << 20) + b"!", "names.txt": b"alpha beta"}


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer(VirtualClock().now)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


def asset_stream(master: SteppedMaster) -> str:
    [encoder] = master.master.state.encoders
    return TOPOLOGY.asset_stream(encoder)


def written(server: MemoryServer, master: SteppedMaster) -> int:
    """How often the assets stand on their stream: four chunks and one."""
    return len(server.queue(asset_stream(master)).ready) // 5


# --- stepped, over the embedded broker -------------------------------------------------------------------------------


def test_late_joiners_and_restarts_get_what_was_written_once(server: MemoryServer, clock: VirtualClock) -> None:
    master = SteppedMaster(server, clock, assets=CONTENTS).start()
    stores = {name: MemoryStore() for name in "ab"}
    first = SteppedNode(server, clock, "a", store=stores["a"]).start()
    together(10.0, master, first)
    late = SteppedNode(server, clock, "b", store=stores["b"]).start()
    together(10.0, master, first, late)
    assert [contents for _, contents in first.built + late.built] == [CONTENTS] * 2
    assert min(first.training.version, late.training.version) > 0 and written(server, master) == 1
    first.broker.close()
    server.delete_queue(asset_stream(master))
    again = SteppedNode(server, clock, "a", store=stores["a"]).start()
    together(10.0, master, again, late)
    assert [contents for _, contents in again.built] == [CONTENTS] and again.node.figures.accepted > 0
    assert server.find(asset_stream(master)) is None, "nobody asked for them"


def test_assets_that_the_broker_has_lost_are_written_again_once_for_all_who_ask(
    server: MemoryServer, clock: VirtualClock
) -> None:
    master = SteppedMaster(server, clock, assets=CONTENTS).start()
    together(40.0, master)
    server.delete_queue(asset_stream(master))
    nodes = [SteppedNode(server, clock, name).start() for name in "abc"]
    together(40.0, master, *nodes)
    assert [node.built[0][1] for node in nodes] == [CONTENTS] * 3
    assert all(node.node.figures.accepted > 0 for node in nodes) and written(server, master) == 1
    assert master.journal.log.count("request.assets") == 3


def test_a_master_that_is_killed_between_the_rows_of_a_generation_makes_the_same_again(
    server: MemoryServer, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bang(BaseException):
        """Nothing catches it."""

    real = Journal.append

    def append(self: Journal, body: Loggable, **named: Any) -> Any:
        if isinstance(body, Generated):
            raise Bang
        return real(self, body, **{**named, "together": False})

    db, payloads = sqlite3.connect(":memory:", isolation_level=None), MemoryPayloads()
    with monkeypatch.context() as patch, pytest.raises(Bang):
        patch.setattr(Journal, "append", append)
        SteppedMaster(server, clock, db=db, payloads=payloads, assets=CONTENTS).start()
    clock.wait(1.0)  # its ids are made of the time
    master = SteppedMaster(server, clock, db=db, payloads=payloads, assets=CONTENTS)
    assert (master.journal.log.count("provided"), master.journal.log.count("generated")) == (2, 0)
    node = SteppedNode(server, clock).start()
    master.start()
    together(10.0, master, node)
    # the same Get comes again at every start: it joins the encoder that is there
    [encoder] = master.master.state.encoders.values()
    assert encoder.assets == [asset_entry(name, content) for name, content in CONTENTS.items()]
    assert [contents for _, contents in node.built] == [CONTENTS] and written(server, master) == 1


def test_a_master_that_dies_while_it_writes_them_writes_all_of_them_again(
    server: MemoryServer, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bang(BaseException):
        """Nothing catches it."""

    def publish(broker: Broker, topology: Topology, encoder: str, entry: AssetEntry, content: bytes) -> None:
        raise Bang

    db, payloads = sqlite3.connect(":memory:", isolation_level=None), MemoryPayloads()
    with monkeypatch.context() as patch, pytest.raises(Bang):
        patch.setattr("master_service.wire.publisher.publish_asset", publish)
        SteppedMaster(server, clock, db=db, payloads=payloads, assets=CONTENTS).start()
    clock.wait(1.0)  # its ids are made of the time
    master = SteppedMaster(server, clock, db=db, payloads=payloads, assets=CONTENTS).start()
    node = SteppedNode(server, clock).start()
    together(10.0, master, node)
    assert [contents for _, contents in node.built] == [CONTENTS] and written(server, master) == 1


# --- the services ----------------------------------------------------------------------------------------------------


def test_the_assets_are_in_every_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The master's own, that of `shared-encoder export`, and that of `request get --out`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "faults/plugin"))
    server = MemoryServer()
    settings = decided(architecture={})
    with running_master(server, tmp_path / "m", settings, get="tiny", export_dir=tmp_path / "own") as master:
        state = master.service.master.state
        broker = connection(server, "a")
        config = NodeConfig(state_dir=tmp_path / "a", exit_when_finished=True)
        corpus = Corpus("tiny", samples(0), None, [], None)  # type: ignore[arg-type]
        node = NodeService("a", config, {"tiny": corpus}, broker, HARNESS)
        stop, ended = threading.Event(), []
        worker = Worker("a", lambda: node.run(stop), ended.append)
        encoder = eventually(lambda: next((each for each in state.encoders.values() if each.version > 2), None), 30)
        operator = connection(server, "operator")
        observer = Observer(operator, HARNESS)
        observer.say(Stop(sender=observer.name))
        assert worker.join(20.0) and ended == []
        # what `request get` does, over this broker; it is closed by whoever opens it
        monkeypatch.setattr("deploy.commands.observe.connect", lambda *arguments: connection(server, "reader"))
        flags = {"broker": {"namespace": HARNESS.namespace}}
        request_encoder(flags, None, 20.0, encoder_type="tiny", out=tmp_path / "requested")
        broker.close()
        operator.close()
    export_version(encoder.encoder, tmp_path / "m", None, tmp_path / "exported")
    for out in ("own", "requested", "exported"):
        [(name, content)] = ASSETS.items()
        assert (tmp_path / out / name).read_bytes() == content, out


# --- RabbitMQ --------------------------------------------------------------------------------------------------------


def test_three_mebibytes_reach_three_nodes_over_rabbitmq_whenever_they_come(amqp_url: str) -> None:
    topology, payloads = Topology(f"assets-{time.time_ns()}"), MemoryPayloads()
    entries = [asset_entry(name, content) for name, content in CONTENTS.items()]
    for content in CONTENTS.values():
        payloads.write(content)
    brokers = [open_broker(amqp_url, client_name=f"assets-{n}", dead_letters=topology.dead_letters) for n in range(4)]
    brokers[0].declare(topology.master())
    master = Publisher(
        brokers[0], topology, "float32", clock=SYSTEM, ending=threading.Event(), new_id=lambda: secrets.token_hex(8)
    )
    with pytest.raises(BrokerUnavailable, match="did not come"):  # and the connection lives on
        reader = AssetReader(brokers[1], topology, "tiny-1", entries, patience=0.5)
        while True:
            reader.step(wait=0.1)
    reader.close()
    found: dict[int, Any] = {}

    def read(number: int) -> None:
        found[number] = read_assets(brokers[number], topology, "tiny-1", entries)

    def errors(error: BaseException) -> None:
        found[len(found) + 10] = error

    early = [Worker(f"early-{n}", lambda n=n: read(n), errors) for n in (1, 2)]  # type: ignore[misc]
    time.sleep(0.5)
    master.provide("tiny-1", entries, payloads)
    assert all(worker.join(20.0) for worker in early)
    read(3)
    assert found == dict.fromkeys((1, 2, 3), CONTENTS)
    # written again after somebody has deleted the stream, and let go of with that of the parameters
    brokers[3].delete_queue(topology.asset_stream("tiny-1"))
    master.provide("tiny-1", entries[1:], payloads)
    assert read_assets(brokers[3], topology, "tiny-1", entries[1:]) == {"names.txt": CONTENTS["names.txt"]}
    master.delete_stream("tiny-1", assets=True)
    for name in (topology.master_inbox, topology.master_updates, topology.dead_letters):
        brokers[0].delete_queue(name)
    for broker in brokers:
        broker.close()
