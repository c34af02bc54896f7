"""`init` writes a file that is right as it stands, and with whatever of it is switched on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import UserError
from deploy.cli import app
from deploy.commands.init import OFF, write_configuration, written
from deploy.config import Config, load_config


def load(path: Path, text: str) -> Config:
    path.write_text(text)
    config = load_config(path, {})
    config.settings()
    return config


@pytest.mark.parametrize("encoder_type", ["text", "image"])
@pytest.mark.parametrize("nodes", [1, 3])
def test_it_is_right_and_has_a_section_for_each_node(tmp_path: Path, nodes: int, encoder_type: str) -> None:
    config = load(tmp_path / "run.toml", written(nodes, encoder_type, "run.toml"))
    assert list(config.nodes) == [f"node-{index + 1}" for index in range(nodes)]
    assert config.encoder.get == encoder_type and config.encoder.min_nodes == nodes
    assert all(node.corpus[0].type == encoder_type for node in config.nodes.values())


@pytest.mark.parametrize("line", [line for line in written(1, "text", "run.toml").splitlines() if line.startswith(OFF)])
def test_each_line_that_is_off_is_a_setting(tmp_path: Path, line: str) -> None:
    text = written(1, "text", "run.toml")
    assert load(tmp_path / "run.toml", text.replace(line, line.removeprefix(OFF))) != load(tmp_path / "run.toml", text)


def test_comments_stand_below_each_other_and_lines_are_short() -> None:
    lines = written(3, "text", "run.toml").splitlines()
    assert all(len(line) <= 120 for line in lines)
    columns = {line.index("# ", 3) for line in lines if re.search(r"\S.* # ", line) and not line.startswith("# ")}
    assert columns == {47}


def test_the_command_writes_once_and_says_what_comes_next(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    done = CliRunner().invoke(app, ["init", str(file), "--nodes", "2"])
    assert done.exit_code == 0 and f"shared-encoder master --config {file}" in done.output
    before = file.read_text()
    for wrong, words in ((file, "is there already"), (tmp_path, "is a folder"), (tmp_path / "a" / "b", "No such file")):
        with pytest.raises(UserError, match=words):
            write_configuration(wrong, 2, "text")
    with pytest.raises(UserError, match="there are: text, image"):
        write_configuration(tmp_path / "other.toml", 2, "sound")
    assert file.read_text() == before
