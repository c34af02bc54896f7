"""Without the packages of an extra: one line says which, and what needs none of them goes on."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from common.errors import PackageMissing
from common.extras import BROUGHT_BY
from node_service.corpus.corpus import CorpusConfig, load_corpus
from node_service.evaluation.probe import knn_probe, linear_probe
from node_service.evaluation.tfidf import tfidf_accuracy
from tests.unit.deploy.conftest import Command

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with samples of each kind; they were made while everything was there."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):  # a line for each file would be one too many
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), f"texts{number}.parquet")
        Image.new("L", (4, 4), number).save(f"picture{number}.png")
    Path("compare.toml").write_text("[compare.transfer]\n")
    return tmp_path


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda module: monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("module", "arguments", "begins"),
    [
        ("pyarrow", "corpus check *.parquet", "Parquet files need pyarrow"),
        ("pyarrow", "node a --corpus *.parquet --broker amqp://127.0.0.1:1/", "Parquet files need pyarrow"),
        ("pyarrow", "attach nothing --corpus *.parquet", "Parquet files need pyarrow"),
        ("PIL", "corpus check --type image *.png", "pictures need pillow"),
        ("PIL", "node a --type image --corpus *.png --broker amqp://127.0.0.1:1/", "pictures need pillow"),
        ("matplotlib", "demo --out demo-out", "the demo draws its report with matplotlib"),
        ("sklearn", "demo --out demo-out", "the demo measures with scikit-learn"),
        ("matplotlib", "compare --out compared", "a comparison draws its report with matplotlib"),
        ("sklearn", "compare --out compared --config compare.toml", "compare.transfer probes with scikit-learn"),
        ("threadpoolctl", "compare --out compared --config compare.toml", "compare.transfer probes with threadpoolctl"),
    ],
)
def test_a_command_says_in_one_line_which_extra_it_lacks(
    folder: Path, without: Callable[[str], None], command: Command, module: str, arguments: str, begins: str
) -> None:
    without(module)
    code, _, err = command(*arguments.split())
    package, extra = BROUGHT_BY[module]
    [line] = [line for line in err.splitlines() if not line.startswith("reading ")]
    assert line == f"shared-encoder: {begins}, which is not installed; pip install 'shared-encoder[{extra}]'"
    assert code == 2 and begins.endswith(f" {package}")
    assert not Path("demo-out").exists() and not Path("compared").exists(), "nothing was begun"


@pytest.mark.parametrize(
    "measure",
    [
        lambda: linear_probe(np.eye(2), ["a", "b"], np.eye(2), ["a", "b"]),
        lambda: knn_probe(np.eye(2), ["a", "b"], np.eye(2), ["a", "b"]),
        lambda: tfidf_accuracy((["one", "two"], ["a", "b"]), (["one"], ["a"])),
    ],
    ids=["linear", "knn", "tfidf"],
)
def test_a_measure_says_so_too(without: Callable[[str], None], measure: Callable[[], object]) -> None:
    without("sklearn")
    with pytest.raises(PackageMissing, match=r"scikit-learn.*shared-encoder\[evaluate\]"):
        measure()


def test_an_entry_point_that_gives_arrays_needs_no_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("arrays_only.py").write_text(
        "import numpy\ndef load():\n    return [numpy.full((4, 4), n, numpy.uint8) for n in range(9)]\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    corpus = load_corpus(CorpusConfig(type="image", entry_point="arrays_only:load"))
    assert len(corpus.train) + len(corpus.test) == 9


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, its first part, and whether it does so when a function is called, or not at
    all: under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0], inside
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        yield from imports(node, inside or checking or isinstance(node, ast.FunctionDef))


def test_nothing_imports_them_before_it_must() -> None:
    found = set()
    for package in ("common", "master_service", "node_service", "deploy"):
        for file in (ROOT / package).rglob("*.py"):
            for module, late in imports(ast.parse(file.read_text())):
                if module in BROUGHT_BY:
                    found.add(module)
                    assert late, f"{file} imports {module} as soon as it is imported itself"
    assert found == set(BROUGHT_BY)


def test_the_extras_are_the_projects() -> None:
    base = " ".join(PROJECT["dependencies"])
    for package, extra in BROUGHT_BY.values():
        assert package not in base
        assert any(each.startswith(f"{package}>=") for each in PROJECT["optional-dependencies"][extra]), package
    assert "shared-encoder[node,evaluate]" in PROJECT["optional-dependencies"]["dev"]
    assert "-e '.[node,evaluate]'" in (ROOT / "Makefile").read_text(), "make demo installs all that it needs"
