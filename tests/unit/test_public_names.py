"""Tests use public names, so that what is private can change. Where there is none, a comment says why not.

`# private: <reason>` excuses its own line, and stands there, or in the comment above it; at the head of a block (a
function with its decorators, a `with`, an `if`) it excuses the block.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MARK = "# private: "
#: Documented parts of the standard library, whatever they look like.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}
#: These take names as strings.
BY_NAME = {"delattr", "getattr", "hasattr", "setattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in DOCUMENTED


def private_name(node: ast.AST) -> str | None:
    """The private name of something else that this very node uses, if it does."""
    names: list[str] = []
    if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
        names = [node.attr]
    elif isinstance(node, ast.Import | ast.ImportFrom):
        module = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
        names = [*module, *(part for alias in node.names for part in alias.name.split("."))]
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        strings = (each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str))
        names = [string.rpartition(".")[2] for string in strings] if called in BY_NAME else []
    return next(filter(is_private, names), None)


def private_uses(source: str) -> list[tuple[int, str]]:
    """(line, name) of every private name that is used without an excuse."""
    lines, found = source.splitlines(), []

    def is_excused(line: int) -> bool:
        if MARK in lines[line - 1]:
            return True
        while line > 1 and lines[line - 2].lstrip().startswith("#"):
            line -= 1
            if lines[line - 1].lstrip().startswith(MARK):
                return True
        return False

    def look(node: ast.AST, excused: bool) -> None:
        if isinstance(node, ast.stmt):
            decorators = [each.lineno for each in getattr(node, "decorator_list", ())]
            excused = excused or is_excused(min([node.lineno, *decorators]))
        name = private_name(node)
        if name is not None and not excused and not is_excused(node.lineno):  # type: ignore[attr-defined]
            found.append((node.lineno, name))  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            look(child, excused)

    look(ast.parse(source), False)
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_private_names_are_left_alone_or_the_reason_is_said(path: Path) -> None:
    assert private_uses(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "broker._queues",
        "self.broker._queues",
        "from common.brokers import _memory",
        "from common._brokers import memory",
        "import common._brokers",
        "monkeypatch.setattr(Recorder, '_send_out', other)",
        "monkeypatch.setattr('common.locks._SECONDS', 1)",
        "getattr(broker, '_queues')",
        "a = 1  # private: of another line\nbroker._queues",
        "# private: of another block\ndef f(): ...\nbroker._queues",
        "broker._queues  # private:",
    ],
)
def test_a_private_use_is_found(source: str) -> None:
    assert len(private_uses(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "self._queues",
        "_helper()",
        "row._replace(at=1).__class__",
        "from __future__ import annotations",
        "print('_queues')",
        "broker._queues  # private: the reason",
        "# private: the reason, which\n# is long\nbroker._queues",
        "# private: the reason\n@decorator\ndef f():\n    if True:\n        broker._queues",
        "with broker:  # private: the reason\n    broker._queues",
    ],
)
def test_what_is_public_or_excused_is_not(source: str) -> None:
    assert private_uses(source) == []
