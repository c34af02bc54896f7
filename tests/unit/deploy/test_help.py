"""F17: what a command's help says in its source is what a person reads on the screen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from deploy.cli import app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group below, with the words that call it."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


COMMANDS = list(commands(get_command(app)))


def rendered(path: tuple[str, ...]) -> list[str]:
    """The lines of `--help` on a terminal wide enough that nothing wraps."""
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "500", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    return [" ".join(re.sub(r"\x1b\[[\d;]*m", "", line).split()) for line in result.output.splitlines()]


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[" ".join(path) or "top" for path, _ in COMMANDS])
def test_f17_every_help_text_and_every_default_is_on_the_screen(path: tuple[str, ...], command: Any) -> None:
    lines = rendered(path)
    for parameter in command.params:
        option = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
        [row] = [line for line in lines if re.match(rf"│ (\* )?{re.escape(option)}( |$)", line)]
        text = str(parameter.help).replace("\\[", "[")
        assert text in row, f"{path}: {option} says {text!r}, and on the screen: {row}"
        if isinstance(parameter.show_default, str):
            assert f"[default: ({parameter.show_default})]" in row, row
        assert row.count("[default:") <= 1, row


def test_f17_every_value_that_is_taken_by_default_is_said() -> None:
    """An option that is not required, takes a value and has a default of its own shows it."""
    said = 0
    for path, command in COMMANDS:
        lines = rendered(path)
        for parameter in command.params:
            default = parameter.default
            if parameter.param_type_name != "option" or isinstance(default, bool) or callable(default):
                continue
            row = next(line for line in lines if re.match(rf"│ (\* )?{re.escape(parameter.opts[0])} ", line))
            if default is not None:
                assert f"[default: {default}]" in row, row
            said += "[default:" in row
    assert said >= 30, "the walk has met the options that it is about"
