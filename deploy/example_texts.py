"""Real text that is on every machine with Python: the standard library's own source, cut into passages by topic."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

#: One node's topic each: files below the standard library's folder; what a Python version lacks is left out.
TOPICS = {
    "networking": """
        http/*.py urllib/*.py email/*.py xmlrpc/*.py wsgiref/*.py socket.py socketserver.py ssl.py smtplib.py ftplib.py
        imaplib.py poplib.py selectors.py ipaddress.py netrc.py uuid.py mailbox.py
    """,
    "concurrency": """
        asyncio/*.py concurrent/futures/*.py multiprocessing/*.py threading.py queue.py sched.py subprocess.py
        contextlib.py _threading_local.py signal.py contextvars.py weakref.py tempfile.py shutil.py
    """,
    "parsing": """
        json/*.py html/*.py xml/*/*.py re/*.py csv.py configparser.py tomllib/*.py ast.py tokenize.py string.py
        textwrap.py difflib.py argparse.py optparse.py gettext.py shlex.py plistlib.py pprint.py inspect.py dis.py
    """,
    "numeric": """
        datetime.py _pydatetime.py calendar.py statistics.py fractions.py _pydecimal.py random.py zoneinfo/*.py
        numbers.py heapq.py bisect.py _strptime.py colorsys.py timeit.py _pylong.py graphlib.py copy.py
        collections/*.py functools.py operator.py enum.py dataclasses.py typing.py hashlib.py hmac.py secrets.py
    """,
}

#: Every n-th file of a topic is held out as a whole.
_HELD_OUT_EVERY = 6
#: Characters of a passage: shorter ones say nothing, longer ones are cut.
_SHORTEST, _LONGEST = 60, 1500


def write_corpora(directory: Path) -> dict[str, tuple[Path, Path]]:
    """Write train.jsonl and test.jsonl of each topic: lines of {"text": …, "label": …}, label the kind of passage."""
    written = {}
    for topic, patterns in TOPICS.items():
        folder = directory / topic
        folder.mkdir(parents=True, exist_ok=True)
        files = _files(patterns.split())
        parts = {
            "train": [path for index, path in enumerate(files) if index % _HELD_OUT_EVERY],
            "test": [path for index, path in enumerate(files) if index % _HELD_OUT_EVERY == 0],
        }
        for part, paths in parts.items():
            lines = [
                json.dumps({"text": text[:_LONGEST], "label": label})
                for path in paths
                for label, text in passages(path.read_text(encoding="utf-8", errors="replace"))
            ]
            (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
        written[topic] = (folder / "train.jsonl", folder / "test.jsonl")
    return written


def passages(source: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of a module's passages: docstrings, and without them functions, methods, and other statements."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        documentation = ast.get_docstring(node)
        if documentation and len(documentation) >= _SHORTEST:
            yield "documentation", documentation
        inside = "method" if isinstance(node, ast.ClassDef) else "function"
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                text = _without_docstring(child, lines)
                if len(text) >= _SHORTEST and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield inside, text
            elif isinstance(child, ast.Assign | ast.If | ast.Try) and isinstance(node, ast.Module | ast.ClassDef):
                text = "\n".join(lines[child.lineno - 1 : child.end_lineno])
                if len(text) >= _SHORTEST:
                    yield "statement", text


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    skip = set(range(first.lineno, (first.end_lineno or first.lineno) + 1)) if documented else set()
    numbers = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return "\n".join(lines[number - 1] for number in numbers if number not in skip)


def _files(patterns: Sequence[str]) -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return [path for pattern in patterns for path in sorted(library.glob(pattern)) if path.stat().st_size > 500]
