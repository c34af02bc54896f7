"""Master and nodes as the processes that users start, over a real RabbitMQ."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.brokers import open_broker
from common.errors import Unroutable
from common.wire.broker import Publication
from common.wire.to_master import Change, UpdateManifest
from common.wire.topology import Topology
from deploy.commands.observe import Observer
from deploy.config import load_config
from deploy.demo.demo import LATE, SPEEDS
from deploy.demo.federation import over_rabbitmq
from master_service.decisions.records import Versioned
from master_service.history.replay import origin, verify
from master_service.log.message_log import open_log
from master_service.status import EncoderReport

ARCHITECTURE = "{ hidden_size = 16, intermediate_size = 16, num_attention_heads = 2, num_hidden_layers = 1 }"
NODES = ["a", "b", "c", "d", "e"]
#: The nodes of the demo.
EVERYBODY = set(SPEEDS)


def configuration(directory: Path, url: str, namespace: str, nodes: list[str], **master: str) -> Path:
    """A file for a master and nodes of a tiny encoder; `master`: lines of the sections encoder and stop."""
    text = [
        f'[broker]\nurl = "{url}"\nnamespace = "{namespace}"',
        f'[master]\nstate_dir = "{directory}/master"\nexport_dir = "{directory}/encoder"',
        "presence_timeout_seconds = 4.0",
        f'[encoder]\nget = "text"\narchitecture = {ARCHITECTURE}\n{master["encoder"]}',
        f"[stop]\n{master['stop']}\n[update]\nwhen = {{ steps = 5 }}\nfinish = {{ steps = 10, look_every = 5 }}",
    ]
    for node in nodes:
        corpus = directory / f"{node}.jsonl"
        corpus.write_text("\n".join(json.dumps({"text": f"{node} says {i} and {i * i}"}) for i in range(300)))
        text.append(
            f'[nodes.{node}]\nstate_dir = "{directory}/{node}"\nalive_every_seconds = 0.5\n'
            f"exit_when_finished = true\nmax_steps_per_second = 20\nprivate = {{ vocabulary = 300 }}\n"
            f'corpus = {{ path = "{corpus}" }}'
        )
    file = directory / "run.toml"
    file.write_text("\n".join(text))
    return file


class Run:
    """The processes that were started with one configuration file, and an observer of theirs in this process."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.topology = Topology(f"test-{uuid.uuid4().hex[:8]}")
        lines = {"encoder": "min_nodes = 3", "stop": "versions = 100000"}
        self.file = configuration(directory, url, self.topology.namespace, NODES, **lines)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.broker = open_broker(url, client_name="observer", dead_letters=self.topology.dead_letters)
        self.broker.declare(self.topology.master())
        self.observer = Observer(self.broker, self.topology)
        self.encoders: set[str] = set()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{arguments[-1]}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", *arguments, "--config", str(self.file)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes[arguments[-1]] = process
        return process

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def until(self, condition: Callable[[EncoderReport], bool], seconds: float = 90.0) -> EncoderReport:
        """The encoder's status once `condition` holds for it."""
        deadline = time.monotonic() + seconds
        while True:
            encoders = self.observer.status(60.0).encoders
            self.encoders |= set(encoders)
            encoder = next(iter(encoders.values()), None)
            if encoder is not None and condition(encoder):
                return encoder
            words = {name: self.log(name)[-300:] for name in self.processes}
            assert time.monotonic() < deadline, f"last status {encoder}, {words}"
            time.sleep(0.2)

    def end(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        self.observer.close()
        for queue in self.topology.queue_names(NODES, self.encoders):
            self.broker.delete_queue(queue)
        self.broker.close()


def shared_encoder(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment, "COLUMNS": "200"},
    )


@pytest.fixture
def run(tmp_path: Path, amqp_url: str) -> Iterator[Run]:
    made = Run(tmp_path, amqp_url)
    yield made
    made.end()


@pytest.mark.timeout(300)
def test_nodes_join_late_and_are_killed_and_the_others_go_on(run: Run, tmp_path: Path) -> None:
    run.start("master")
    for node in NODES[:4]:
        run.start("node", node)
    run.until(lambda e: e.version >= 3 and "d" in e.members)
    run.start("node", "e")
    killed = run.processes["d"]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    joined = run.until(lambda e: "e" in e.members and e.members["e"].returns >= 1)
    assert joined.members["e"].version >= 3, "a late node starts from the current version"
    gone = run.until(lambda e: not e.members["d"].active)
    assert gone.status == "running"
    shown = shared_encoder("status", "--json", "--config", str(run.file))
    assert shown.returncode == 0, shown.stderr
    [seen] = json.loads(shown.stdout)["encoders"].values()
    assert seen["status"] == "running" and not seen["members"]["d"]["active"] and seen["members"]["a"]["active"]
    # a clean end in the middle: what the node trained is handed in
    before = run.processes["c"]
    before.send_signal(signal.SIGTERM)
    assert before.wait(30) == 0
    run.until(lambda e: not e.members["c"].active)
    stopped = shared_encoder("request", "stop", "--config", str(run.file))
    assert stopped.returncode == 0 and "finished, version" in stopped.stdout, stopped.stderr
    finished = run.until(lambda e: e.status == "finished")
    assert finished.updates == sum(member.returns for member in finished.members.values())
    for node in "abe":
        assert run.processes[node].wait(30) == 0, run.log(node)
        assert "finishing phase ended" in run.log(node) and "held_out_after" in run.log(node)
    assert finished.best_held_out is not None, "the nodes have measured what they were given"
    asked = shared_encoder("request", "get", "text", "--config", str(run.file), "--out", str(tmp_path / "asked"))
    assert asked.returncode == 0 and "open it with transformers.AutoModel" in asked.stdout, asked.stderr
    assert (tmp_path / "asked" / "model.safetensors").exists(), "whoever asks for a finished encoder gets it"
    run.processes["master"].send_signal(signal.SIGINT)
    assert run.processes["master"].wait(30) == 0
    assert "Traceback" not in "".join(run.log(name) for name in run.processes)
    assert list((tmp_path / "master" / "snapshots").iterdir()), "a master that is asked to end writes a snapshot"

    result = shared_encoder("evaluate", "a", "e", "--config", str(run.file), "--out", str(tmp_path / "scores.json"))
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())["domains"]
    assert set(scores) == {"a", "e"} and scores["a"]["shared"]["loss"] < scores["a"]["random"]["loss"]

    [name] = [path.name for path in (tmp_path / "a" / "encoders").iterdir()]
    rebuilt = shared_encoder("export", name, "--state", str(tmp_path / "master"), "--out", str(tmp_path / "again"))
    assert rebuilt.returncode == 0, rebuilt.stderr
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "encoder" / weights).read_bytes()


def test_processes_over_rabbitmq_train_and_leave_nothing_at_the_broker(tmp_path: Path, amqp_url: str) -> None:
    """What the demo does with `--broker`, in short."""
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    file = configuration(tmp_path, amqp_url, namespace, ["a", "b"], encoder="min_nodes = 2", stop="updates = 4")
    config, topology = load_config(file, {}), Topology(namespace)
    with over_rabbitmq(config, file, tmp_path / "logs") as federation:
        federation.start_master()
        for node in config.nodes:
            federation.start_node(node)
        deadline = time.monotonic() + 90
        while True:
            federation.check()
            [*encoders] = federation.observer.status(60.0).encoders.items()
            if encoders and encoders[0][1].status == "finished":
                break
            assert time.monotonic() < deadline, encoders
            time.sleep(0.2)
        federation.wait_for_nodes()
    [(name, encoder)] = encoders
    assert encoder.updates >= 4 and set(encoder.members) == {"a", "b"}
    assert (tmp_path / "encoder" / "model.safetensors").exists()
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"master.log", "a.log", "b.log"}
    states = [config.master.state_dir, tmp_path / "encoder", *(each.state_dir for each in config.nodes.values())]
    written = [path for state in states if state is not None for path in (state, *state.rglob("*"))]
    readable = [path for path in written if path.stat().st_mode & 0o077]
    assert len(written) > 20 and not readable, "what they write is their owner's alone"
    broker = open_broker(amqp_url, client_name="looks", dead_letters=topology.dead_letters)
    for exchange, key in (
        (topology.request, "a.join"),
        (topology.update, "a.ready"),
        (topology.update, "a.chunk"),
        (topology.rule, "a"),
        (topology.parameter, name),
        (topology.dead_letters, "invalid"),
    ):
        with pytest.raises(Unroutable):  # no queue is there to take it
            broker.publish(Publication(exchange, key, b""))
    broker.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_quick_demo_over_rabbitmq(tmp_path: Path, amqp_url: str) -> None:
    result = shared_encoder("demo", "--quick", "--broker", amqp_url, "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr + result.stdout
    report = check_demo(tmp_path / "out", result.stdout)
    assert EVERYBODY - {LATE} <= set(report["domains"]), "only who began late may not get ready before the end"


@pytest.mark.timeout(300)
def test_the_quick_demo_embedded(tmp_path: Path) -> None:
    result = shared_encoder("demo", "--quick", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr + result.stdout
    report = check_demo(tmp_path / "out", result.stdout)
    assert set(report["domains"]) == EVERYBODY
    assert all(scores["finished"]["loss"] < scores["random"]["loss"] for scores in report["domains"].values())
    again = shared_encoder("demo", "--quick", "--out", str(tmp_path))
    assert again.returncode == 2 and "not from a demo" in again.stderr


def check_demo(out: Path, printed: str) -> dict[str, Any]:
    """What every demo promises, on however busy a machine; gives its report.

    Not that each node has returned: the training ends after so many updates, whoever they are from. In the row of a
    node without a return nothing is compared, as it has trained nothing.
    """
    report = json.loads((out / "report.json").read_text())
    assert set(report["domains"]) <= EVERYBODY
    for name, scores in report["domains"].items():
        for kind in ("random", "alone", "shared"):
            assert scores[kind]["loss"] > 0 and 0 <= scores[kind]["few_labels"] <= 1
        if report["nodes"][name]["returns"]:
            assert scores["shared"]["loss"] < scores["random"]["loss"]
    assert report["updates"] >= report["versions"] > 0
    for node in report["nodes"].values():
        assert (node["returns"] > 0) == (node["weight"] > 0)
        assert node["bytes_sent"] > 0 or node["returns"] == 0
    returned = [node["returns"] for node in report["nodes"].values() if node["returns"]]
    assert len(returned) >= 2 and sum(returned) == report["updates"], "one encoder, trained by several"
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "What it does not show" in printed
    from transformers import AutoModel

    assert AutoModel.from_pretrained(out / "encoder").config.model_type == "modernbert"
    return dict(report)


@pytest.mark.timeout(300)
def test_what_an_operator_sets_holds_through_a_kill_of_the_master_and_in_replay(run: Run) -> None:
    run.start("master")
    for node in NODES[:3]:
        run.start("node", node)
    run.until(lambda e: e.version >= 3)
    refused = shared_encoder("set", "encoder.architecture.hidden_size=8", "--config", str(run.file))
    assert refused.returncode == 2 and "cannot be changed while it runs" in refused.stderr, refused.stderr
    done = shared_encoder("set", "rule.outer.lr=2", "update.when.steps=7", "--config", str(run.file))
    paused = shared_encoder("pause", "--config", str(run.file))
    killed = run.processes["master"]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert done.returncode == paused.returncode == 0, done.stderr + paused.stderr
    assert done.stdout.splitlines() == ["rule.outer.lr: 1.0 → 2.0", "update.when.steps: 5 → 7"]
    log = open_log(run.directory / "master", read_only=True)
    [row] = [entry.offset for entry in log.entries() if isinstance(entry.body, Change)]
    version = sum(isinstance(entry.body, Versioned) for entry in log.entries())
    log.close()
    # with the same file, which says that updates are of 5 steps
    run.start("master")
    resting = run.until(lambda e: e.paused)
    time.sleep(3.0)
    assert run.until(lambda e: e.paused).version == resting.version
    shown = shared_encoder("status", "--config", str(run.file)).stdout
    assert "paused  version" in shown, shown
    run.until(lambda e: all(each.note == "paused by the operator" for each in e.members.values()))
    resumed = shared_encoder("resume", "--config", str(run.file))
    assert "goes on from version" in resumed.stdout, resumed.stderr
    run.until(lambda e: e.version >= version + 10)
    back = shared_encoder("unset", "rule", "--config", str(run.file))
    assert back.stdout.splitlines() == ["rule.outer.lr: 2.0 → 1.0"], back.stderr
    run.until(lambda e: e.version >= version + 15)
    out = shared_encoder("kick", "c", "--reason", "its GPU is broken", "--config", str(run.file))
    assert out.stdout.startswith("c is out"), out.stderr
    kicked = run.until(lambda e: e.members["c"].kicked and not e.members["c"].active)
    run.until(lambda e: e.version >= kicked.version + 2)
    said = "taken out by the master's operator: its GPU is broken; waiting to be let in again"
    assert said in run.log("c"), run.log("c")[-2000:]
    assert shared_encoder("admit", "c", "--config", str(run.file)).returncode == 0
    run.until(lambda e: e.members["c"].active and e.members["c"].returns > kicked.members["c"].returns)
    run.processes["master"].send_signal(signal.SIGTERM)
    assert run.processes["master"].wait(30) == 0, run.log("master")
    log = open_log(run.directory / "master", read_only=True)
    steps = [e.body.steps for e in log.entries() if isinstance(e.body, UpdateManifest) and e.offset > row]
    assert steps[-3:] == [7, 7, 7], steps
    fold = origin(log).fold
    rates = [step.outer.lr for _ in verify(log, fold) if fold.offset > row for step in fold.pending.values()]
    assert rates[0] == 2.0 and rates[-1] == 1.0
    log.close()
    replayed = shared_encoder("replay", "--state", str(run.directory / "master"))
    assert replayed.returncode == 0 and "DIFFERENT" not in replayed.stdout, replayed.stderr
    other = shared_encoder("replay", "--rule", "fedasync", "--state", str(run.directory / "master"))
    assert other.returncode == 0, other.stderr
