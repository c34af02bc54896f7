"""The fixture `message_log`, in the pytest of somebody who has installed shared-encoder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from master_service.decisions.records import Loggable, Versioned
from master_service.log.jsonl import export_log, opened
from tests.unit.master.test_replay import rewritten

pytest_plugins = "pytester"

RECORDED = Path(__file__).parents[2] / "logs/text-diloco.jsonl.gz"

#: What the developer writes: a log beside the test's file, and one below the root.
TESTS = """
import sys

LOADED = {each for each in ("torch", "numpy", "common", "deploy") if each in sys.modules}


def test_nothing_was_loaded_before_a_test_asks_for_it():
    assert not LOADED


def test_beside(message_log):
    log = message_log("beside.jsonl.gz")
    assert log.replay().identical
    assert log.refold(rule="fedavg").version > 0


def test_below_the_root_and_by_its_whole_path(message_log, pytestconfig):
    below, whole = message_log("logs/run.jsonl.gz"), message_log(pytestconfig.rootpath / "logs" / "run.jsonl.gz")
    assert [row.offset for row in below.rows()] == [row.offset for row in whole.rows()]


def test_forged(message_log):
    assert message_log("forged.jsonl.gz").replay().identical


def test_none(message_log):
    message_log("none.jsonl.gz")
"""


def forge(source: Path, target: Path) -> None:
    """The log with another version 3 than was published, in a chain of checksums that is right."""

    def forged(body: Loggable) -> Loggable:
        if isinstance(body, Versioned) and body.version == 3:
            return body.model_copy(update={"digest": "3" * 64})
        return body

    with opened(source) as log:
        rewritten(log, target.parent / "forged", forged)
    with opened(target.parent / "forged") as log:
        export_log(log, target)


def test_a_developer_replays_recorded_logs(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytester.mkdir("tests")
    (package / "test_runs.py").write_text(TESTS)
    pytester.mkdir("logs")
    for place in (package / "beside.jsonl.gz", pytester.path / "logs/run.jsonl.gz"):
        shutil.copy(RECORDED, place)
    forge(RECORDED, tmp_path / "forged.jsonl.gz")
    shutil.copy(tmp_path / "forged.jsonl.gz", package)
    pytester.makeini("[pytest]\n")
    monkeypatch.setenv("TMPDIR", str(pytester.mkdir("temporary")))
    ran = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", "--basetemp=of-pytest", "tests")
    ran.assert_outcomes(passed=3, failed=2)
    assert list((pytester.path / "temporary").iterdir()) == [], "a log is closed after its test"
    assert (package / "beside.jsonl.gz").read_bytes() == RECORDED.read_bytes()
    said = ran.stdout.str()
    assert re.search(
        r"where False = Replayed\(13 versions, version 3 of text-\w+ published as 3{16}…, computed as", said
    )
    assert re.search(r"UserError: no message log in \S+/tests/none\.jsonl\.gz; give a master's state directory", said)
    listed = pytester.runpytest_subprocess("--fixtures", "tests").stdout.str()
    assert "message_log" in listed and "Opens a recorded message log" in listed


def test_strangers_are_not_disturbed_and_may_leave_it_out(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine="""
        import pytest

        @pytest.fixture
        def message_log():
            return "mine"

        def test_their_own_fixture_of_that_name_is_theirs(message_log):
            assert message_log == "mine"
        """,
        test_out="""
        def test_out(message_log): ...
        """,
    )
    ran = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", "-p", "no:shared_encoder")
    ran.assert_outcomes(passed=1, errors=1)
    assert "fixture 'message_log' not found" in ran.stdout.str()
    ran = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", "test_mine.py")
    ran.assert_outcomes(passed=1)
