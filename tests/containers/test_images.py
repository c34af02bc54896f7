"""What an image promises by itself: it runs under whatever restrictions an organisation has, and is not large."""

from __future__ import annotations

import json

import pytest

from tests.containers.docker import docker

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800), pytest.mark.usefixtures("images")]

IMAGES = ("shared-encoder-master", "shared-encoder-node")
#: As strict as it comes: nothing may be written but /tmp, no capability, no network, nobody's uid, no home.
STRICT = (
    *("run", "--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--network", "none", "--user", "4711:0", "--env", "HOME="),
)


@pytest.mark.parametrize("image", IMAGES)
def test_it_works_where_nothing_is_allowed(image: str) -> None:
    """The real master and nodes under a virtual clock: torch, numba, the message log, and the replay of it."""
    script = (
        "set -e; shared-encoder --version; cd /tmp;"
        "shared-encoder simulate --nodes 4 --returns 3 --parameters 2000000 --out run;"
        "shared-encoder replay --state run"
    )
    said = docker(*STRICT, "--entrypoint", "sh", image, "-c", script, timeout=180)
    assert "identical" in said and "Traceback" not in said, said


@pytest.mark.parametrize("image", IMAGES)
def test_it_is_nobodys_root_and_says_what_it_is(image: str) -> None:
    described = json.loads(docker("inspect", image))[0]["Config"]
    assert described["User"] == "10001:0"
    assert described["Entrypoint"] == ["shared-encoder"] and described["StopSignal"] == "SIGTERM"
    assert described["Healthcheck"]["Test"][:2] == ["CMD", "shared-encoder"]
    look = "id -u; ls /src /opt/shared-encoder/bin/pip*"
    inside = docker("run", "--rm", "--entrypoint", "sh", image, "-c", look, check=False)
    assert inside.startswith("10001\n") and inside.count("No such file") == 2, "no source, no pip"


def test_what_the_master_brings_beside_its_base_is_below_13_gb(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a build without CUDA. The layers of the base image are the base's own matter: 130 MB of python:3.11-slim."""
    sizes = {}
    for image in IMAGES:
        history = json.loads(
            "[" + ",".join(docker("history", "--format", "{{json .}}", "--human=false", image).split("\n")[:-1]) + "]"
        )
        ours = [int(layer["Size"]) for layer in history if "shared-encoder" in layer["CreatedBy"]]
        sizes[image] = sum(ours) / 1e9
    cuda = docker(
        "run",
        "--rm",
        "--entrypoint",
        "python",
        "shared-encoder-master",
        "-c",
        "import torch; print(torch.version.cuda)",
    )
    with capsys.disabled():
        print(f"\nbeside the base image: {', '.join(f'{name} {size:.2f} GB' for name, size in sizes.items())}")
    if cuda.strip() == "None":
        assert sizes["shared-encoder-master"] < 1.3
