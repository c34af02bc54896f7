"""The wheel as somebody installs it: what is in it, that it works without the extras, and that mypy knows its types."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "master_service", "node_service", "deploy")
#: What the base of an installation has not.
EXTRAS = ("pyarrow", "PIL", "sklearn", "threadpoolctl", "matplotlib")

#: A user's file: mypy must know what these are, and must find the two mistakes in it.
USER = """
from collections.abc import Callable
from pathlib import Path

from shared_encoder import Encoder, Federated, Log, Refolded, Replayed, Row, SharedEncoderError, UserError
from shared_encoder import VersionCheck, attach, federation, load_encoder


class MyError(UserError):
    pass


def newest(path: Path) -> tuple[str, float]:
    with Log.open(path, aggregators=[]) as log:
        replayed: Replayed = log.replay()
        check: VersionCheck | None = replayed.first_different
        rows: list[Row] = list(log.rows(kind="update", after=3))
        other: Refolded = log.refold(rule="fedavg", without=["a"], changes={"outer.lr": 1})
        fifth: Encoder = log.encoder(version=5)
        fifth.features([row.sender for row in rows]).mean()
        return other.digest if check is None else check.logged, rows[0].at


def train(texts: list[str]) -> Encoder:
    found: Federated = federation({"a": texts, "b": "notes/*.txt"}, versions=3, progress=print)
    try:
        return attach(found.directory / "encoder", texts, out="mine")
    except SharedEncoderError as error:
        raise MyError(str(error)) from error


def test_a_log(message_log: Callable[[str], Log]) -> None:
    assert message_log("run.jsonl.gz").replay().identical


wrong: int = federation({"a": ["x"]}).version + "1"
load_encoder(5)
"""

#: Run with everything of the extras gone.
SCRIPT = """
import sys
sys.modules.update(dict.fromkeys({extras!r}))
import shared_encoder
from deploy.cli import app, guarded
with open("south.csv", "w") as file:
    print("text,label", *(f"a dose of {{n}} mg,{{n % 2}}" for n in range(60)), sep="\\n", file=file)
corpora = {{"north": [f"patient {{n}} was seen on day {{n % 7}}" for n in range(60)], "south": "south.csv"}}
found = shared_encoder.federation(corpora, versions=1)
print(found.encoder().features(["patient 3"]).shape, found.log().replay().identical)
state = str(found.directory / "master")
print(guarded(lambda: app(["export", found.id, "--state", state, "--out", "again"], standalone_mode=False)))
print(shared_encoder.load_encoder("again").type, sorted(name for name in {extras!r} if sys.modules[name] is not None))
"""


@dataclass(frozen=True)
class Installed:
    wheel: Path
    bin: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of this checkout in an environment of its own, beside what this process has. Needs no network."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    # a build in the checkout would find what an earlier one has left there
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(source))
    [wheel] = place.glob("*.whl")
    environment = place / "environment"
    _run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    [packages] = environment.glob("lib/python*/site-packages")
    # the folders alone: an editable install in them is a .pth file, and those are not read
    folders = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(folders))
    _run(*pip, "--python", str(environment / "bin/python"), "install", "--no-deps", "--no-index", str(wheel))
    return Installed(wheel, environment / "bin")


def test_the_wheel_has_every_file_and_the_public_package_once(installed: Installed) -> None:
    inside = {name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name}
    code = {str(file.relative_to(ROOT)) for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
    public = {name.removeprefix("deploy/") for name in code if name.startswith("deploy/shared_encoder/")}
    assert len(public) > 4
    wanted = {name for name in code if not name.startswith("deploy/shared_encoder/")} | public
    assert {name for name in inside if name.endswith(".py")} == wanted
    data = {"shared_encoder/py.typed", "common/py.typed", "common/encoders/vocabulary.json"}
    examples = {str(path.relative_to(ROOT)) for path in (ROOT / "deploy/examples").glob("*.toml")}
    watching = {f"deploy/monitoring/{name}" for name in ("alerts.yml", "dashboard.json", "prometheus.yml")}
    assert inside - wanted == data | examples | watching and len(examples) > 5


@pytest.mark.slow
def test_it_runs_without_the_extras(installed: Installed, tmp_path: Path) -> None:
    ran = _run(installed.bin / "python", "-c", SCRIPT.format(extras=EXTRAS), cwd=tmp_path)
    first, *_, code, last = ran.stdout.splitlines()
    assert (first, code, last) == ("(1, 64) True", "0", "text []") and ran.stderr.count("\n") <= 3, ran.stderr
    ran = _run(installed.bin / "shared-encoder", "--version", cwd=tmp_path)
    assert re.fullmatch(r"shared-encoder \d+\.\d+\.\d+\n", ran.stdout)
    code = "import shared_encoder, deploy, importlib.util as u; print(u.find_spec('deploy.shared_encoder'))"
    code += "; print(shared_encoder.__file__, deploy.__file__)"
    printed = _run(installed.bin / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert printed[0] == "None" and all(f"{installed.bin.parent}/" in path for path in printed[1:])


def test_mypy_strict_knows_the_types_of_who_uses_it(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--no-color-output", f"--cache-dir={tmp_path}/cache"]
    mypy += [f"--python-executable={installed.bin / 'python'}", "user.py"]
    ran = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    *errors, last = ran.stdout.splitlines()
    lines = USER.splitlines()
    assert last.startswith("Found 2 errors in 1 file"), ran.stdout + ran.stderr
    assert re.search(rf"user.py:{len(lines) - 1}: error: Unsupported operand types for \+", errors[0])
    assert 'Argument 1 to "load_encoder" has incompatible type "int"; expected "Path | str"' in errors[1]


def _run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=170)
    assert ran.returncode == 0, ran.stderr
    return ran
