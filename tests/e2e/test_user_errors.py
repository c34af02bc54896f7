"""What users get wrong: one line that says what and how to mend it, exit code 2 (3 for a broker that is away)."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest

from common.brokers import open_broker
from common.errors import Unroutable
from common.wire.broker import Publication
from common.wire.to_master import Stop
from common.wire.topology import Topology
from tests.e2e.test_processes import shared_encoder
from tests.unit.master.test_fold import Federation


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(f"note {i} about the weather" for i in range(30)))
    return path


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('[broker]\nurrl = "amqp://x"', "there is no setting 'broker.urrl'; did you mean 'url'?"),
        ("[stopp]\nversions = 3", "there is no setting 'stopp'; did you mean 'stop'?"),
        ("[update.when]\nsteps = 0", "update.when.steps: input should be greater than or equal to 1"),
        ('[rule]\npreset = "fedprox"', "no aggregation rule 'fedprox'; there are: return-count"),
        ("[rule.weights]\ncoumt = 'none'", "there is no setting 'weights.coumt'; did you mean 'count'?"),
        ("[broker", "not readable as TOML"),
    ],
)
def test_wrong_configuration(tmp_path: Path, toml: str, words: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(toml)
    result = shared_encoder("master", "--config", str(file))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert words in result.stderr


def test_wrong_environment_and_missing_file(tmp_path: Path) -> None:
    result = shared_encoder("master", SHARED_ENCODER_BROKRE__URL="x")
    assert result.returncode == 2 and "SHARED_ENCODER_BROKRE__URL names no section" in result.stderr
    result = shared_encoder("master", "--config", str(tmp_path / "none.toml"))
    assert result.returncode == 2 and "no such file" in result.stderr


def test_a_broker_that_is_not_there(corpus: Path) -> None:
    url = "amqp://guest:secret-word@127.0.0.1:1/"
    environment = {"SHARED_ENCODER_BROKER__CONNECT_TIMEOUT_SECONDS": "0.5", "SHARED_ENCODER_BROKER__WAIT_SECONDS": "1"}
    for command in (["master"], ["node", "n", "--corpus", str(corpus)], ["status"], ["request", "get", "text"]):
        result = shared_encoder(*command, "--broker", url, **environment)
        assert result.returncode == 3, result.stderr
        assert "no broker answers at 127.0.0.1:1" in result.stderr and "Traceback" not in result.stderr
        assert "secret-word" not in result.stderr + result.stdout
    result = shared_encoder("status", "--broker", "http://here")
    assert result.returncode == 2 and "write it as amqp://" in result.stderr


def test_a_wrong_password(amqp_url: str) -> None:
    host = amqp_url.rpartition("@")[2]
    result = shared_encoder("status", "--broker", f"amqp://guest:secret-word@{host}")
    assert result.returncode == 2 and "does not let user 'guest' in" in result.stderr, result.stderr
    assert "secret-word" not in result.stderr


def test_no_master_in_this_namespace(amqp_url: str) -> None:
    result = shared_encoder("status", "--broker", amqp_url, "--namespace", "nobody-here")
    assert result.returncode == 2 and "no master serves the namespace 'nobody-here'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["n"], "node 'n' has no samples: give --corpus PATH"),
        (["n", "--corpus", "{dir}/none*.txt"], "no match"),
        (["n", "--corpus", "{dir}/notes.txt", "--type", "image"], "holds no samples of type image"),
        (["n/m", "--corpus", "{dir}/notes.txt"], "node id 'n/m'"),
        (["n", "--corpus", "{dir}/notes.txt", "--type", "txet"], "txet"),
    ],
)
def test_a_node_without_what_it_needs(corpus: Path, arguments: list[str], words: str) -> None:
    filled = [argument.format(dir=corpus.parent) for argument in arguments]
    result = shared_encoder("node", *filled, "--broker", "amqp://127.0.0.1:1/")
    assert (result.returncode, result.stderr.count("Traceback")) == (2, 0), result.stderr
    assert words in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1/1", "1/65", "first", "2"])
def test_an_aggregator_that_is_none_of_several(shard: str) -> None:
    result = shared_encoder("aggregator", "--shard", shard)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"--shard {shard}: say which it is of how many" in result.stderr


def test_a_wrong_flag_and_help(tmp_path: Path) -> None:
    result = shared_encoder("master", "--verions", "3")
    assert result.returncode == 2 and "--versions" in result.stderr
    assert shared_encoder("--help").returncode == shared_encoder("log", "show", "-h").returncode == 0
    assert shared_encoder("--version").stdout == f"shared-encoder {version('shared-encoder')}\n"
    # what makes it quick: none of these is imported to print the help
    code = "import deploy.cli, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pika', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    result = shared_encoder("export", "text-1", "--state", str(tmp_path / "none"))
    assert result.returncode == 2 and "no message log in" in result.stderr


@pytest.fixture
def namespace(amqp_url: str) -> Iterator[str]:
    """One of its own, whose queues go with it."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    topology = Topology(name)
    broker = open_broker(amqp_url, client_name="cleaner", dead_letters=topology.dead_letters)
    for queue in (topology.master_inbox, topology.master_updates, topology.dead_letters):
        broker.delete_queue(queue)
    broker.close()


@pytest.mark.timeout(300)
def test_f14_a_master_started_again_with_other_settings_says_so_and_changes_nothing(
    tmp_path: Path, amqp_url: str, namespace: str
) -> None:
    state, log = tmp_path / "state", tmp_path / "log"
    common = ("master", "--state", str(state), "--broker", amqp_url, "--namespace", namespace)

    def kinds() -> list[str]:
        try:
            with closing(sqlite3.connect(f"file:{state}/ledger.sqlite?mode=ro", uri=True)) as ledger:
                return [kind for (kind,) in ledger.execute("SELECT kind FROM entries ORDER BY offset")]
        except sqlite3.OperationalError:  # not there yet
            return []

    def served(*arguments: str) -> list[str]:
        """Start, wait until it serves, end it with Ctrl-C; the rows that it wrote."""
        before = kinds()
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", *common, *arguments], stdout=file, stderr=subprocess.STDOUT
            )
        try:
            deadline = time.monotonic() + 60
            while "started" not in kinds()[len(before) :]:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
        return kinds()[len(before) :]

    assert served("--versions", "200", "--min-nodes", "2") == ["configured", "started"]
    assert served() == ["started"], "without a word the logged settings stand"
    assert served("--versions", "200") == ["started"], "and to say them again is no change"
    before = kinds()
    refused = shared_encoder(*common, "--versions", "300", "--rule", "fedasync")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    told = refused.stderr[refused.stderr.index("shared-encoder: ") :].splitlines()
    assert "--change" in told[0]
    assert "  stop.versions: 200 in the log, 300 wanted" in told
    assert "  rule.preset: return-count in the log, fedasync wanted" in told
    assert kinds() == before
    assert served("--versions", "300", "--change") == ["configured", "started"]
    assert served("--versions", "300", "--min-nodes", "2") == ["started"]


def test_f8_broker_clean_deletes_what_ended_runs_left(tmp_path: Path, amqp_url: str) -> None:
    topology = Topology(f"clean-{uuid.uuid4().hex[:8]}")
    run = Federation(tmp_path, "fedavg", size=8)
    run.record(Stop(sender="operator"))
    run.log.close()
    broker = open_broker(amqp_url, client_name="left-behind", dead_letters=topology.dead_letters)
    streams = (topology.parameters(run.encoder, 1000), topology.assets(run.encoder, 1000))
    for declarations in (topology.master(), topology.node("a", ("text",)), *streams):
        broker.declare(declarations)
    command = ["broker", "clean", "--state", str(tmp_path), "--broker", amqp_url, "--namespace", topology.namespace]

    def is_there(queue: str) -> bool:
        """Whether something that is bound to nothing else takes what is published for it."""
        exchange, key = {
            topology.stream(run.encoder): (topology.parameter, run.encoder),
            topology.asset_stream(run.encoder): (topology.asset, run.encoder),
            topology.chunk_queue("a"): (topology.update, "a.chunk"),
        }[queue]
        try:
            broker.publish(Publication(exchange, key, b"x"))
        except Unroutable:
            return False
        return True

    broker.lock(topology.master_lock, lambda: None)
    refused = shared_encoder(*command)
    assert refused.returncode == 2 and "a master serves the namespace" in refused.stderr, refused.stderr
    assert is_there(topology.stream(run.encoder)) and is_there(topology.asset_stream(run.encoder))
    broker.close()
    broker = open_broker(amqp_url, client_name="looks", dead_letters=topology.dead_letters)
    cleaned = shared_encoder(*command)
    assert cleaned.returncode == 0 and topology.stream(run.encoder) in cleaned.stdout, cleaned.stderr
    assert not is_there(topology.stream(run.encoder)) and not is_there(topology.asset_stream(run.encoder))
    assert is_there(topology.chunk_queue("a"))
    assert shared_encoder(*command, "--all").returncode == 0
    assert not is_there(topology.chunk_queue("a"))
    broker.close()
