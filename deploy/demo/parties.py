"""Master and nodes of a demo as processes over RabbitMQ."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Protocol

from common.errors import SharedEncoderError


class Party(Protocol):
    """A master or a node that runs beside us."""

    name: str

    def stop(self) -> None:
        """Ask it to end cleanly; returns at once."""

    def wait(self, timeout: float) -> bool:
        """Whether it ended within `timeout` seconds. Raises SharedEncoderError if it failed."""

    def kill(self) -> None:
        """End it without asking, where that can be done; for what did not end when asked."""


class ProcessParty:
    """A `shared-encoder` process of its own; what it says goes into a file."""

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *arguments], stdout=self._file, stderr=subprocess.STDOUT
        )

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float) -> bool:
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        self._file.close()
        if code != 0:
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise SharedEncoderError(
                f"{self.name} ended with exit code {code}: {' '.join(last)} (all of it: {self._log})"
            )
        return True

    def kill(self) -> None:
        """SIGKILL."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
