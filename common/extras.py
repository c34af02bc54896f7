"""Packages that not every party needs: where one is missing, a line says which extra of ours brings it."""

from __future__ import annotations

from importlib.util import find_spec

from common.errors import PackageMissing

#: Module → the package that holds it, and the extra in pyproject.toml that brings it.
BROUGHT_BY = {
    "pyarrow": ("pyarrow", "node"),
    "PIL": ("pillow", "node"),
    "sklearn": ("scikit-learn", "evaluate"),
    "threadpoolctl": ("threadpoolctl", "evaluate"),
    "matplotlib": ("matplotlib", "evaluate"),
}


def need(module: str, who: str) -> None:
    """To be called before `module` is imported. `who` begins the line: "Parquet files need", "the demo needs".

    Raises PackageMissing, with the command that installs it, if it is not there.
    """
    if find_spec(module) is None:
        package, extra = BROUGHT_BY[module]
        raise PackageMissing(f"{who} {package}, which is not installed; pip install 'shared-encoder[{extra}]'")
