"""Prints the requirements of pyproject.toml, one a line: the project's own, or those of the extras that are named.

So an image installs them in a layer of their own, which a change of the source leaves as it is.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(project: dict[str, Any], extras: list[str]) -> Iterator[str]:
    """Those of `extras`, or the project's own if there are none; an extra of its own among them is taken apart."""
    if not extras:
        yield from project["dependencies"]
    for extra in extras:
        for each in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[([\w,]+)\]", each)
            if own:
                yield from requirements(project, own[1].split(","))
            else:
                yield each


if __name__ == "__main__":
    print(*requirements(tomllib.loads(PROJECT.read_text())["project"], sys.argv[1:]), sep="\n")
