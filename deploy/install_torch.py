"""Installs torch as `constraints.txt` pins it, and says first which build that is and how much it downloads.

PyPI's torch for Linux is the CUDA build, gigabytes that a machine without a GPU has no use for. `make` and the
Dockerfile run this before everything else, with the Python that torch is for; it needs nothing but pip.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
#: Names of what the CUDA build brings along begin so.
_OF_CUDA = ("nvidia-", "cuda-")
_MB = 1_000_000


@dataclass(frozen=True)
class Build:
    """What pip would install: torch's version, whether it is for NVIDIA's GPUs, and the sum of all files, bytes; None
    where a server does not say."""

    version: str
    cuda: bool
    download_bytes: int | None

    def __str__(self) -> str:
        kind = "the CUDA build, for NVIDIA's GPUs" if self.cuda else "the build without CUDA"
        size = "of unknown size" if self.download_bytes is None else f"{self.download_bytes / _MB:,.0f} MB to download"
        return f"torch {self.version}: {kind}, {size}"


def build_of(report: dict[str, Any], size_of: Any) -> Build | None:
    """From `pip install --dry-run --report`; `size_of`: URL to bytes or None. None where torch is not in it."""
    found = {each["metadata"]["name"].lower().replace("_", "-"): each for each in report["install"]}
    if "torch" not in found:
        return None
    sizes = [size_of(each["download_info"]["url"]) for each in found.values()]
    return Build(
        found["torch"]["metadata"]["version"],
        cuda=any(name.startswith(_OF_CUDA) for name in found),
        download_bytes=None if None in sizes else sum(sizes),
    )


def from_index(index: str) -> list[str]:
    """pip's arguments for an index, by its URL, or for a folder of wheels; for the configured index if it is empty."""
    if not index:
        return []
    return ["--find-links", index] if Path(index).is_dir() else ["--index-url", index]


def size_of(url: str) -> int | None:
    """Bytes of a file that pip would take, without taking it."""
    if url.startswith("file:"):
        return Path(unquote(urlsplit(url).path)).stat().st_size
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:
            length = answer.headers["Content-Length"]
    except OSError:
        return None
    return int(length) if length else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--index", default="", help="URL of a package index, or a folder of wheels (default: pip's)")
    arguments = parser.parse_args()
    wanted = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:
        installed = ""
    if installed.partition("+")[0] == wanted.removeprefix("torch=="):
        return 0
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    source = [wanted, *from_index(arguments.index)]
    dry = subprocess.run([*pip, "--dry-run", "--report", "-", *source], stdout=subprocess.PIPE, text=True)
    if dry.returncode != 0:
        print(f"{wanted} is not to be had{f' from {arguments.index}' if arguments.index else ''}", file=sys.stderr)
        return dry.returncode
    build = build_of(json.loads(dry.stdout), size_of)
    print(f"installing {build}" if build else f"installing {wanted}", flush=True)
    if build and build.cuda and not arguments.index:
        print("  (no GPU here? TORCH_INDEX=… takes another build: README, Installation)", flush=True)
    return subprocess.run([*pip, *source]).returncode


if __name__ == "__main__":
    sys.exit(main())
