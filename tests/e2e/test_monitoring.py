"""A master and two nodes as processes, watched by a real Prometheus: alerts and dashboard are tried on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local_rabbitmq import LocalRabbitMQ, free_port
from deploy.monitoring.table import METRICS
from tests.e2e.prometheus import LocalPrometheus, promtool
from tests.e2e.test_processes import configuration, shared_encoder

FILES = Path(__file__).parents[2] / "deploy/monitoring"
#: An aggregator's, which is not here, and what is there only once something went wrong.
NOT_HERE = {"aggregator_version", "last_error_timestamp_seconds"}


def dashboard_queries() -> dict[str, str]:
    """By panel and letter, as Grafana would send them with everything chosen."""
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", "10s")
        .replace("$encoder", ".*")
        for panel in panels
        for target in panel.get("targets", [])
    }


class Federation:
    """A master and nodes, each with a port."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.ports = {name: free_port() for name in ("master", "a", "b", "1-of-2", "2-of-2")}
        namespace, lines = f"test-{uuid.uuid4().hex[:8]}", {"encoder": "min_nodes = 2", "stop": "versions = 100000"}
        self.file = configuration(directory, url, namespace, ["a", "b"], **lines)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *more: str) -> None:
        """The master, a node by its name, or an aggregator by its number and theirs; with `more` flags."""
        arguments = ["master"] if name == "master" else ["node", name]
        if "-of-" in name:
            arguments = ["aggregator", "--shard", name.replace("-of-", "/"), "--state", str(self.directory / name)]
        with (self.directory / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "deploy.cli", *arguments),
                    *("--http", f"127.0.0.1:{self.ports[name]}", "--config", str(self.file), *more),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def words(self) -> dict[str, str]:
        return {name: (self.directory / f"{name}.log").read_text()[-1000:] for name in self.processes}

    def asked(self, name: str, path: str) -> bytes:
        with urlopen(f"http://127.0.0.1:{self.ports[name]}/{path}", timeout=5.0) as answer:
            body: bytes = answer.read()
        return body

    def parts(self, name: str) -> dict[str, str]:
        """What /readyz says; nothing before there is anybody."""
        try:
            body = self.asked(name, "readyz")
        except HTTPError as error:
            assert error.code == 503
            body = error.read()
        except OSError:
            return {}
        found: dict[str, str] = json.loads(body)["parts"]
        return found

    def health(self, name: str) -> tuple[int, str]:
        done = shared_encoder("health", "--http", f":{self.ports[name]}")
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def until(condition: Callable[[], object], what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.3)


@pytest.mark.timeout(240)
def test_every_query_has_data_and_alerts_fire_when_they_should(
    tmp_path: Path, private_rabbitmq: LocalRabbitMQ, stack: ExitStack
) -> None:
    rules = tmp_path / "alerts.yml"
    rules.write_text(re.sub(r"for: \d+m", "for: 1s", (FILES / "alerts.yml").read_text()))
    federation = Federation(tmp_path, private_rabbitmq.url)
    stack.callback(federation.end)
    ports = {name: f"127.0.0.1:{port}" for name, port in federation.ports.items()}
    targets = {"shared-encoder-master": [ports["master"]], "shared-encoder-node": [ports["a"], ports["b"]]}
    for name in ("master", "a", "b"):
        federation.start(name)
    prometheus = stack.enter_context(LocalPrometheus(tmp_path / "prometheus", targets, rules))

    # every query of the dashboard, and every series that an alert is about
    wanted = dashboard_queries()
    assert len(wanted) > 40
    alerts = prometheus.rules()
    assert len(alerts) == (FILES / "alerts.yml").read_text().count("- alert: ")
    for alert, expression in alerts.items():
        prometheus.query(expression)
        series = set(re.findall(r"\b(?:shared_encoder_\w+|up)\b", expression))
        assert series, f"{alert} is about nothing"
        wanted |= {f"{alert}: {name}": name for name in series}
    lacking = dict(wanted)

    def all_there() -> bool:
        for name, expression in list(lacking.items()):
            if prometheus.query(expression):
                del lacking[name]
        return not lacking

    until(all_there, lambda: (lacking, federation.words()), 120.0)
    assert federation.health("master") == (0, "master is ready\n")
    assert federation.health("a") == (0, "node a is ready\n")

    # what is there is the table's, and as Prometheus wants it
    names = set()
    for name in ("master", "a"):
        body = federation.asked(name, "metrics")
        promtool("check", "metrics", given=body)
        families = list(text_string_to_metric_families(body.decode()))
        names |= {family.name.removeprefix("shared_encoder_") for family in families}
    named = {metric.name.removesuffix("_total") for metric in METRICS}
    assert named - names == NOT_HERE and {name for name in names - named if not name.startswith("process_")} == set()

    # nothing is wrong yet; a node that is killed, and a broker that is away
    assert not fires(prometheus, "SharedEncoderNotReady") and not fires(prometheus, "SharedEncoderNodeVanished")
    federation.processes["b"].kill()
    until(lambda: fires(prometheus, "SharedEncoderNodeVanished", node="b"), prometheus.firing, 30.0)
    private_rabbitmq.kill()
    until(lambda: fires(prometheus, "SharedEncoderNotReady", role="master", part="broker"), prometheus.firing, 30.0)
    code, line = federation.health("master")
    assert code == 1 and line.startswith("master is not ready: broker: away"), line
    assert federation.asked("master", "healthz") == b"ok\n", "nobody is to kill it for that"


@pytest.mark.slow
def test_who_waits_for_the_broker_or_for_aggregators_is_alive_and_says_so(tmp_path: Path, stack: ExitStack) -> None:
    server = LocalRabbitMQ(tmp_path / "rabbitmq")
    federation = Federation(tmp_path, server.url)
    quickly = federation.file.read_text().replace("[broker]", "[broker]\nconnect_timeout_seconds = 1.0", 1)
    federation.file.write_text(quickly)
    stack.callback(server.stop)
    stack.callback(federation.end)
    federation.start("master", "--shards", "2")
    until(lambda: federation.parts("master").get("broker", "").startswith("waiting for it: "), federation.words)
    assert federation.asked("master", "healthz") == b"ok\n"
    assert b'shared_encoder_ready{part="broker",role="master"} 0.0' in federation.asked("master", "metrics")
    server.start()
    both = "waiting for aggregator 1/2, aggregator 2/2"
    until(lambda: federation.parts("master").get("log") == both, federation.words)
    assert federation.parts("master")["broker"] == federation.parts("master")["lock"] == "ok"
    assert federation.asked("master", "healthz") == b"ok\n"
    federation.start("1-of-2")
    federation.start("2-of-2")
    until(lambda: set(federation.parts("master").values()) == {"ok"}, federation.words)
    assert federation.health("1-of-2") == (0, "aggregator 1/2 is ready\n")
    body = federation.asked("1-of-2", "metrics")
    promtool("check", "metrics", given=body)
    families = text_string_to_metric_families(body.decode())
    [versions] = [family.samples for family in families if family.name == "shared_encoder_aggregator_version"]
    assert [sample.value for sample in versions] == [0.0]


def fires(prometheus: LocalPrometheus, alert: str, **labels: str) -> bool:
    return any({"alertname": alert, **labels}.items() <= each.items() for each in prometheus.firing())


def test_promtool_finds_nothing_wrong_with_rules_and_configuration() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(FILES / "alerts.yml"))
    assert "1 rule files found" in promtool("check", "config", str(FILES / "prometheus.yml"))
