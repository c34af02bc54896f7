"""The command as a person types it, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.cli import app, guarded
from tests.unit.master.test_fold import Federation
from tests.unit.master.test_replay import trained

#: arguments → (exit code, what was printed, what went to stderr)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = guarded(lambda: app([str(argument) for argument in arguments], standalone_mode=False))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def run(tmp_path: Path) -> Federation:
    """Its ledger stays open for writing, as a running master's."""
    return trained(tmp_path / "state", "return-count")
