"""A Prometheus of a test's own: a port of its own on 127.0.0.1, a directory of its own, gone when it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from deploy.local_rabbitmq import free_port

_START_SECONDS = 20.0
_HINT = "no {} is installed: `apt-get install prometheus` has both prometheus and promtool (`make prometheus`)"


def program(name: str) -> str:
    """Fails the test, with what to install, where it is not there."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(_HINT.format(name))
    return found


def promtool(*arguments: str, given: bytes = b"") -> str:
    """What it says; fails the test if it finds something wrong."""
    done = subprocess.run([program("promtool"), *arguments], input=given, capture_output=True, timeout=30)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


class LocalPrometheus:
    """Scrapes every second what `targets` names by job, and evaluates `rules`, a file."""

    def __init__(self, directory: Path, targets: Mapping[str, list[str]], rules: Path) -> None:
        self._program = program("prometheus")
        self._directory = directory
        self.port = free_port()
        directory.mkdir()
        jobs = [{"job_name": job, "static_configs": [{"targets": each}]} for job, each in targets.items()]
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config = {"global": every, "rule_files": [str(rules)], "scrape_configs": jobs}
        (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML, too
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalPrometheus:
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    f"--config.file={self._directory}/prometheus.yml",
                    f"--storage.tsdb.path={self._directory}/data",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=2.0).close()
                return self
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, self.words()
                time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def words(self) -> str:
        """The end of its log."""
        return (self._directory / "log").read_text()[-2000:]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression leads to now. Raises urllib's HTTPError for one that it cannot read."""
        found: list[dict[str, Any]] = self._asked("query", query=expression)["result"]
        return found

    def rules(self) -> dict[str, str]:
        """The expressions of its alerts, by name."""
        groups = self._asked("rules")["groups"]
        return {rule["name"]: rule["query"] for group in groups for rule in group["rules"]}

    def firing(self) -> list[dict[str, str]]:
        """The labels of the alerts that fire."""
        return [alert["labels"] for alert in self._asked("alerts")["alerts"] if alert["state"] == "firing"]

    def _asked(self, what: str, **given: str) -> dict[str, Any]:
        with urlopen(f"http://127.0.0.1:{self.port}/api/v1/{what}?{urlencode(given)}", timeout=10.0) as answer:
            found: dict[str, Any] = json.load(answer)["data"]
        return found
