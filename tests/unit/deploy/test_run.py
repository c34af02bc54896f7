"""The first seconds of a service: a broker that comes later, an end that comes at once, and whose its files are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
import structlog

import deploy.commands.run as run
from common.clock import VirtualClock
from common.errors import AccessRefused, BrokerUnavailable, UserError
from common.wire.broker import Broker, BrokerStatus
from common.wire.topology import Topology
from deploy.config import load_config


def test_a_broker_that_comes_later_is_waited_for_and_one_that_does_not_come_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Any] = [BrokerUnavailable("nobody there"), AccessRefused("no account yet"), "a broker"]
    clock = VirtualClock()

    def connect(*_: object, **__: object) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(run, "connect", connect)
    config = load_config(None, {"broker": {"wait_seconds": 30.0}})
    with structlog.testing.capture_logs() as lines:
        assert run.awaited(config, Topology("test"), "test", clock) == "a broker"
    assert [line["problem"] for line in lines] == ["nobody there"], "once, whatever follows"
    assert clock.time == 0.5 + 1.0
    answers[:] = [AccessRefused("no account")] * 100
    with pytest.raises(AccessRefused):
        run.awaited(config, Topology("test"), "test", clock)
    assert clock.time == 1.5 + 30 and len(answers) == 100 - 8, "after 0.5, 1, 2, 4, 8, 8 and 6.5 seconds, the last"
    answers[:] = [UserError("not a URL"), "a broker"]
    with pytest.raises(UserError):
        run.awaited(config, Topology("test"), "test", clock)


@pytest.mark.parametrize(("reason", "seconds"), [(None, 1.0 + 2.0), ("low on memory", 1.0)])
def test_who_was_asked_to_end_waits_for_no_broker_that_is_away_or_blocked(reason: str | None, seconds: float) -> None:
    clock, stop, closed = VirtualClock(), threading.Event(), []

    class Leaving:
        """A broker that is there for a second."""

        def status(self) -> BrokerStatus:
            away = clock.time >= 0.95
            return BrokerStatus(not away, reason if away else None, 0, 0, 0)

        def close(self) -> None:
            closed.append(round(clock.time, 2))

    stop.set()
    run.end_of_waiting(stop, cast(Broker, Leaving()), clock)
    assert closed == [pytest.approx(seconds, abs=0.3)]


@pytest.mark.parametrize("command", [["master"], ["node", "a", "--corpus", "notes.txt"]])
def test_a_service_ends_when_it_is_told_to_in_its_first_second(command: list[str], tmp_path: Path) -> None:
    """By a handler of ours: without one, process 1 of a container goes on."""
    (tmp_path / "notes.txt").write_text("\n\n".join(f"note {i}" for i in range(30)))
    program = [sys.executable, "-m", "deploy.cli", *command, "--broker", "amqp://127.0.0.1:1/"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(program, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while not _handles(process.pid, signal.SIGTERM):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said


def test_libraries_are_told_not_to_call_out_unless_the_environment_says_that_they_may(tmp_path: Path) -> None:
    program = (
        "import atexit, os; atexit.register(lambda: print(os.environ['HF_HUB_OFFLINE'])); import deploy.cli as cli; "
    )
    program += "import sys; sys.argv[1:] = ['--help']; cli.main()"
    root = str(Path(__file__).parents[3])
    for given, found in (({}, "1"), ({"HF_HUB_OFFLINE": "0"}, "0")):
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"PYTHONPATH": root, **given}
        said = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert said.stdout.splitlines()[-1] == found, said.stderr


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, as the kernel says."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


@pytest.mark.parametrize("accounts", ["open", "required"])
def test_a_master_says_once_that_everyone_is_everyone_where_accounts_are_open(
    accounts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "umask", lambda mask: None)
    monkeypatch.setattr(run, "awaited", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run_master(None, {"broker": {"accounts": accounts}, "master": {"operators": ["alice"]}})
    said = [line for line in capsys.readouterr().err.splitlines() if "who has the broker's password" in line]
    assert len(said) == (accounts == "open")
    for line in said:
        assert "shared-encoder broker init" in line and "master.operators holds nobody back" in line


def test_no_node_takes_the_masters_name() -> None:
    run.check_node_id("master-2")
    with pytest.raises(UserError, match="the master's own name"):
        run.check_node_id("master")
