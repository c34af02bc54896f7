"""The units: systemd takes each line of them, they leave little open, and what they start are commands of ours."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from deploy.cli import app

pytestmark = pytest.mark.containers

UNITS = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))
PROGRAM = "/opt/shared-encoder/bin/shared-encoder"


@pytest.fixture(params=UNITS, ids=lambda unit: unit.stem)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit where systemd-analyze finds it, with a program that is there; an instance, if it is for several."""
    assert shutil.which("systemd-analyze"), "the units are tried by systemd-analyze: apt-get install systemd"
    program = tmp_path / "shared-encoder"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    there: Path = tmp_path / request.param.name.replace("@.", "@clinic-a.")
    there.write_text(request.param.read_text().replace(PROGRAM, str(program)))
    return there


def test_systemd_takes_every_line(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_little_is_left_open(unit: Path) -> None:
    """On systemd's own scale, on which 0 is nothing and 10 is everything; a unit without any of it has 9.6."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("path", UNITS, ids=lambda unit: unit.stem)
def test_what_it_starts_is_a_command_with_flags_that_it_has(path: Path) -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    found = re.search(rf"^ExecStart={re.escape(PROGRAM)} (.*)$", path.read_text(), re.MULTILINE)
    assert found
    name, *words = found[1].split()
    known = {flag for parameter in commands[name].params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
