"""README says what is there: the tree's entries exist, its commands and flags are the command's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from deploy.cli import app
from deploy.config import load_config
from master_service.decisions.rules.model import PRESETS

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()


def test_the_tree_is_there() -> None:
    block = README.split("## The tree")[1].split("```")[1]
    top = ROOT
    for line in block.strip().splitlines():
        name, _, rest = line.strip().partition(" ")
        if not line.startswith("  "):
            top = ROOT / name
        folder = top / name if line.startswith("  ") else top
        assert folder.is_dir(), line
        for file in re.findall(r"[a-z_/]+\.(?:py|toml)", rest):
            assert (folder / file).exists(), f"{folder / file} is not there"


def test_the_tree_has_every_folder_with_code() -> None:
    block = README.split("## The tree")[1].split("```")[1]
    for package in ("common", "master_service", "node_service", "deploy"):
        lines = re.split(r"\n(?=\w)", block.split(f"\n{package}/")[1])[0]
        for folder in {file.parent.relative_to(ROOT / package) for file in (ROOT / package).glob("*/**/*.py")}:
            assert all(f"{name}/" in lines for name in folder.parts), f"{package}/{folder}"


def test_the_reading_order_is_short_and_on_the_walk() -> None:
    """At most twelve files, each of which is there, and of which docs/architecture.md says what happens in it."""
    order = README.split("in the order of the flow:")[1].split("back to the node")[0]
    files = re.findall(r"`([a-z_/]+\.py)`", order)
    assert 10 <= len(files) <= 12 and len(set(files)) == len(files)
    assert all((ROOT / file).exists() for file in files)
    walk = re.findall(r"^- `([\w/]+\.py): ", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert set(files) - set(walk) == {"common/wire/broker.py"}, "a protocol: nothing of it is called"


def test_commands_and_flags_exist() -> None:
    command = get_command(app)
    known = list(command.commands.values())  # type: ignore[attr-defined]
    known += [below for each in known for below in getattr(each, "commands", {}).values()]
    flags = {flag for each in known for parameter in each.params for flag in parameter.opts}
    for line in re.findall(r"shared-encoder ([a-z][^`\n]*)", README):
        words = line.split()
        assert words[0] in command.commands, line  # type: ignore[attr-defined]
        assert {word for word in words if word.startswith("--")} <= flags, line
    for preset in PRESETS:
        assert f"`{preset}`" in README


def test_every_target_that_is_named_is_in_the_makefile() -> None:
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z-]+)", README + (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert {"demo", "test", "test-slow", "faults", "lint"} <= set(named) <= made


def test_every_row_of_the_table_of_deaths_is_a_test() -> None:
    rows = README.split("## What happens when … dies")[1].split("\n## ")[0].splitlines()
    named = [re.search(r"`(test_\w+)` \|$", row) for row in rows if row.startswith("| ")][1:]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    for match in named:
        assert match is not None and f"def {match[1]}(" in tests, match


def test_every_test_that_a_page_names_is_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in sorted((ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`(test_[a-z0-9_]+)`", page.read_text()):
            assert f"def {name}(" in tests, f"{page.name} names {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "deploy/examples").glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    config = load_config(path, {})
    assert config.nodes and (config.settings().stop.updates is not None) == config.master.exit_when_finished
    for line in (line for line in path.read_text().splitlines() if line.startswith("#   shared-encoder")):
        for word in line.split():
            assert not word.endswith(".toml") or (ROOT / word).is_file(), f"{path.name} names {word}"
