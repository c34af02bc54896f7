"""Which torch is installed is said before it is: the build, and how much of it comes over the line."""

from __future__ import annotations

import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.install_torch import CONSTRAINTS

PROGRAM = CONSTRAINTS.parent / "deploy" / "install_torch.py"
VERSION = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")).split("==")[1]


def wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = (), megabytes: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    inside = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {each}\n" for each in needs)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{inside}/METADATA", metadata)
        file.writestr(f"{inside}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{inside}/RECORD", "")
        file.writestr(f"{name}/data", bytes(1_000_000 * megabytes))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A package index over `tmp_path`/simple."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *args: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}/simple"
        serving.shutdown()


def install(python: Path, index: str) -> subprocess.CompletedProcess[str]:
    # no index and no folder of this machine's own, and nothing that an earlier test has left
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torch", "nvidia-cublas"], capture_output=True)
    environment = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1", "PATH": "/usr/bin:/bin"}
    if Path(index).is_dir():
        environment["PIP_NO_INDEX"] = "1"
    command = [str(python), str(PROGRAM), "--index", index]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_folder_of_wheels_is_taken_and_its_build_is_named(python: Path, tmp_path: Path) -> None:
    wheel(tmp_path, "torch", f"{VERSION}+cpu", megabytes=3)
    done = install(python, str(tmp_path))
    assert (done.returncode, done.stdout) == (
        0,
        f"installing torch {VERSION}+cpu: the build without CUDA, 3 MB to download\n",
    ), done.stderr
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert f"{VERSION}+cpu" in listed
    again = subprocess.run([python, PROGRAM], capture_output=True, text=True, env={"PIP_NO_INDEX": "1"})
    assert (again.returncode, again.stdout) == (0, ""), "what is there is neither asked for nor said again"


def test_an_index_is_taken_and_what_cuda_brings_along_counts(python: Path, server: str, tmp_path: Path) -> None:
    simple = tmp_path / "simple"
    wheel(simple / "torch", "torch", VERSION, ("nvidia-cublas",), megabytes=2)
    wheel(simple / "nvidia-cublas", "nvidia_cublas", "13.1", megabytes=5)
    done = install(python, server)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"installing torch {VERSION}: the CUDA build, for NVIDIA's GPUs, 7 MB to download\n"


def test_an_index_without_it_is_named(python: Path, tmp_path: Path) -> None:
    wheel(tmp_path, "torch", "0.1")
    done = install(python, str(tmp_path))
    assert done.returncode == 1
    assert f"torch=={VERSION} is not to be had from {tmp_path}" in done.stderr
