"""A node of two processes, as users start it: `torchrun` around the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.local_rabbitmq import LocalRabbitMQ
from tests.benchmarks.time_lost import Setting, configuration, end, members, start, status

#: `torchrun` itself ends with 1 after a signal, and after a process of its that failed.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@contextmanager
def running(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A master and the node, which has had updates counted; and the node's log."""
    with LocalRabbitMQ(directory / "rabbitmq") as server:
        file = configuration(Setting("tiny", steps=20), server.url, directory, ["n0"])
        master = start(file, directory, "master")
        with (directory / "n0.log").open("wb") as log:
            command = [*TORCHRUN, "-m", "deploy.cli", "node", "n0", "--config", str(file), "--json"]
            path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path}
            node = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=directory, env=environment)
        try:
            deadline = time.monotonic() + 150.0
            while not members(report := status(file), ["n0"])[0].returns > 1:
                assert node.poll() is None and time.monotonic() < deadline, (directory / "n0.log").read_text()
            assert report.nodes == ("n0",)
            yield node, directory / "n0.log"
        finally:
            end({"master": master, "node": node})


def children(pid: int) -> dict[bytes, int]:
    """The processes that one has started, by their rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {each.removeprefix(b"RANK="): int(child) for each in environment if each.startswith(b"RANK=")}
    return found


@pytest.mark.slow
def test_sigterm_ends_both_and_what_was_trained_is_handed_in(tmp_path: Path) -> None:
    with running(tmp_path) as (node, log):
        assert len(children(node.pid)) == 2
        node.send_signal(signal.SIGTERM)
        node.wait(60.0)
    said = log.read_text()
    assert '"event": "left"' in said and "shared-encoder:" not in said
    assert said.rindex('"event": "update handed in"') > said.index("death signal")


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_with_one_line(tmp_path: Path) -> None:
    with running(tmp_path) as (node, log):
        subprocess.run(["kill", "-KILL", str(children(node.pid)[b"1"])], check=True)
        node.wait(60.0)
    lines = [line for line in log.read_text().splitlines() if line.startswith("shared-encoder:")]
    assert len(lines) == 1 and "another process of this node's training has ended" in lines[0]
