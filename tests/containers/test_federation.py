"""A federation in containers, as `docker compose up` makes it, and what it survives: every update is counted once."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.containers.docker import NODES, STATE, Federation, docker
from tests.faults.audit import examine

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("federation", [{"versions": 15}], indirect=True)
def test_up_trains_the_example_and_ends(federation: Federation, tmp_path: Path) -> None:
    """In the foreground, from nothing; what came of it opens as a reader would open it, and no memory ran out."""
    said = federation("up", timeout=600)
    assert federation.ended("master", *NODES), said
    assert not any(federation.state(each)["OOMKilled"] for each in ("rabbitmq", "master", *NODES))
    federation("cp", f"master:{STATE}/encoder", str(tmp_path / "encoder"))
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder")
    assert model(**tokenizer("def open(path):", return_tensors="pt")).logits.isfinite().all()


def _killed(federation: Federation, service: str) -> None:
    before = federation.restarts(service)
    federation.kill(service)
    federation.until(lambda: federation.restarts(service) > before, f"{service} is started again")


def _pause(federation: Federation, service: str) -> None:
    """An engine may fail to freeze many threads at once on a busy machine, and says so; then again."""

    def frozen() -> bool:
        docker("pause", federation.container(service), check=False)
        return bool(federation.state(service)["Paused"])

    federation.until(frozen, f"{service} is paused", 30)


def _paused(federation: Federation, service: str) -> None:
    _pause(federation, service)
    time.sleep(10.0)
    docker("unpause", federation.container(service))


def _disconnected(federation: Federation, service: str) -> None:
    network = f"{federation.name}_federation"
    docker("network", "disconnect", network, federation.container(service))
    time.sleep(15.0)
    docker("network", "connect", "--alias", service, network, federation.container(service))


def _restarted(federation: Federation, service: str) -> None:
    federation("restart", service)


FAULTS: dict[str, Callable[[Federation, str], None]] = {
    "killed": _killed,
    "paused": _paused,
    "disconnected": _disconnected,
    "restarted": _restarted,
}


@pytest.mark.parametrize("federation", [{"versions": 100_000}], indirect=True)
def test_nothing_is_lost_whatever_happens_to_a_container(
    federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fault on a node, on the master and on the broker; a second container of a node, which waits for the first to
    go; everything stopped and started. Then the log and the nodes' receipts say that each update was counted once."""

    def say(words: str) -> None:
        with capsys.disabled():
            print(f"  {words}", flush=True)

    federation("up", "-d", timeout=600)
    federation.until(lambda: federation.version() >= 2, "the first versions")
    say(f"RabbitMQ {federation('exec', '-T', 'rabbitmq', 'rabbitmqctl', '-q', 'version').strip()}")
    for fault, happens in FAULTS.items():
        for service in ("clinic-a", "master", "rabbitmq"):
            before = federation.version()
            happens(federation, service)
            seconds = federation.until(
                lambda above=before: federation.version() > above + 1, f"training after {fault} {service}"
            )  # type: ignore[misc]
            say(f"{service} {fault}: training again after {seconds:.0f} s, version {federation.version()}")

    federation("up", "-d", "--no-recreate", "--scale", "clinic-b=2")
    before = federation.version()
    federation.until(lambda: federation.version() > before + 1, "training beside a second clinic-b")
    say("clinic-b twice: the second waits, the first trains")

    federation("stop", timeout=120)
    stopped = {each: federation.state(each)["ExitCode"] for each in ("master", *NODES)}
    assert set(stopped.values()) == {0}, f"told to end, and had to be killed: {stopped}"
    federation("up", "-d", "--no-recreate", "--scale", "clinic-b=1")
    federation.until(lambda: federation.version() > before + 3, "training after everything was stopped")
    say("all stopped and started: training again")
    say(", ".join(f"{each} {federation.memory(each)}" for each in ("rabbitmq", "master", "clinic-a")))

    federation.operator("request", "stop")
    federation.until(lambda: federation.ended("master", *NODES), "everybody has finished", 900)
    federation.copy_states(tmp_path)
    states = [tmp_path / node / "node-state" / node for node in NODES]
    found = examine(tmp_path / "master" / "master-state", states, stopped=True)
    say(f"versions={found.versions} {found}")
    assert not found.problems
    assert found.accepted > 30


@pytest.mark.parametrize("federation", [{"versions": 100_000}], indirect=True)
@pytest.mark.parametrize("service", ["master", "clinic-a"])
def test_told_to_end_it_does_within_five_seconds(federation: Federation, service: str) -> None:
    """SIGTERM to process 1: in its first second, while it loads, and while it trains."""
    federation("up", "-d", timeout=600)
    for wait in (0.5, 3.0, 20.0):
        federation("up", "-d", "--no-recreate", service)
        time.sleep(wait)
        started = time.monotonic()
        docker("stop", "--time", "15", federation.container(service))
        took, code = time.monotonic() - started, federation.state(service)["ExitCode"]
        assert code != 137 and took < 5.0, f"{took:.1f} s, exit code {code}, told after {wait} s"


@pytest.mark.parametrize("federation", [{"versions": 100_000}], indirect=True)
def test_an_organisation_elsewhere_joins_by_one_file(federation: Federation, tmp_path: Path) -> None:
    """The commands of docs/deployment.md: an account, its file carried over, a node from the image alone over TLS."""
    federation("up", "-d", timeout=600)
    federation.until(lambda: federation.version() >= 1, "the first version")
    port = docker("port", federation.container("rabbitmq"), "5671").strip().rpartition(":")[2]
    url = f"amqps://localhost:{port}/"
    tmp_path.chmod(0o755)
    said = federation("run", "--rm", "-T", "-v", f"{tmp_path}:/out", "setup", "add-node", "org-b", url)
    assert "import_definitions /definitions/2-org-b.json" in said
    federation("exec", "-T", "rabbitmq", "rabbitmqctl", "import_definitions", "/definitions/2-org-b.json")
    assert (tmp_path / "org-b.toml").stat().st_mode & 0o777 == 0o600

    corpus = tmp_path / "notes"
    corpus.mkdir()
    corpus.chmod(0o755)
    for index in range(60):
        (corpus / f"{index}.txt").write_text(
            f"Note {index}: the patient slept well and asked for water {index} times. " * 8
        )
    name = f"{federation.name}-org-b"
    docker("rm", "--force", name, check=False)
    try:
        docker(
            *("run", "--detach", "--name", name, "--network", "host", "--read-only", "--tmpfs", "/tmp"),
            *("--user", f"{os.getuid()}:0", "--volume", f"{tmp_path}/org-b.toml:/credentials/org-b.toml:ro"),
            *("--volume", f"{corpus}:/corpus:ro", "--tmpfs", STATE),
            *("shared-encoder-node", "node", "--credentials", "/credentials/org-b.toml", "--corpus", "/corpus"),
        )

        def counted() -> bool:
            status = json.loads(federation.operator("status", "--json"))
            members = [encoder["members"] for encoder in status["encoders"].values()]
            return any(int(each["org-b"]["returns"]) >= 1 for each in members if "org-b" in each)

        federation.until(counted, f"an update of org-b counts\n{docker('logs', name)}", 120)
    finally:
        docker("rm", "--force", name, check=False)


@pytest.mark.parametrize("federation", [{"versions": 100_000, "PROMETHEUS": "127.0.0.1:19090"}], indirect=True)
def test_every_service_says_that_it_is_well_and_prometheus_hears_it(federation: Federation) -> None:
    federation("--profile", "monitoring", "up", "-d", "master", *NODES, "prometheus", timeout=600)
    services = ("rabbitmq", "master", *NODES)

    def healthy() -> bool:
        return all(federation.state(each)["Health"]["Status"] == "healthy" for each in services)

    federation.until(healthy, "every service is healthy")

    def scraped() -> bool:
        with urllib.request.urlopen("http://127.0.0.1:19090/api/v1/query?query=up", timeout=10) as answer:
            found = {each["metric"]["instance"]: each["value"][1] for each in json.load(answer)["data"]["result"]}
        wanted = {"rabbitmq:15692", "master:9464", *(f"{node}:9464" for node in NODES)}
        return found.keys() == wanted and set(found.values()) == {"1"}

    federation.until(scraped, "Prometheus reaches all of them")
    _pause(federation, "rabbitmq")
    federation.until(lambda: federation.state("master")["Health"]["Status"] == "unhealthy", "that is said", 180)
    said = federation("exec", "-T", "master", "shared-encoder", "health", check=False)
    assert "master is not ready: broker" in said, said
    docker("unpause", federation.container("rabbitmq"))
    federation.until(healthy, "every service is healthy again", 180)
