"""Prints the requirements of pyproject.toml, one a line: the project's own, or those of the extras that are named.

So an image installs them in a layer of their own, which a change of the source leaves as it is.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
extras = sys.argv[1:]
print(
    *([each for name in extras for each in project["optional-dependencies"][name]] or project["dependencies"]), sep="\n"
)
