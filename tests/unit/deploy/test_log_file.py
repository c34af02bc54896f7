"""A log file: bounded, whole lines in order, everything in it, and no reason for anybody to end."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from common.clock import VirtualClock
from common.errors import UserError
from common.events import happened
from deploy.log_file import LogFile
from deploy.logging import configure_logging
from tests.e2e.test_processes import shared_encoder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(path: Path) -> list[Path]:
    """The oldest first."""
    found = path.parent.glob(f"{path.name}*")
    return sorted(found, key=lambda each: int(each.suffix[1:]) if each.suffix[1:].isdigit() else 0, reverse=True)


@given(st.lists(st.integers(0, 900), max_size=80), st.integers(0, 3), st.integers(0, 80))
def test_files_are_bounded_and_together_are_the_newest_lines_in_order(
    sizes: list[int], keep: int, reopened_at: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path, most = Path(directory) / "new/log.jsonl", 2_000
        log = LogFile(path, most, keep, VirtualClock(1e9))
        for number, size in enumerate(sizes):
            if number == reopened_at:
                log.close()
                log = LogFile(path, most, keep, VirtualClock(1e9))
            log.write("info", "x" * size, number=number)
        log.close()
        found = files(path)
        assert len(found) <= keep + 1 and all(each.stat().st_size <= most for each in found)
        numbers = [line["number"] for each in found for line in lines(each)]
        assert numbers == list(range(len(sizes)))[len(sizes) - len(numbers) :]
        assert bool(numbers) == bool(sizes) and path.stat().st_mode & 0o077 == 0
        # no more goes than must: with the oldest line that is gone, one file more would be needed
        if len(numbers) < len(sizes):
            assert len(found) == keep + 1


def test_a_line_that_is_longer_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = LogFile(path, 4096, 5)
    for event in ("a", "b" * 10_000, "c"):
        log.write("info", event)
    assert [[line["event"][0] for line in lines(each)] for each in files(path)] == [["a"], ["b"], ["c"]]


def test_lines_of_many_threads_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = LogFile(path, 5_000, 100)
    threads = [
        threading.Thread(target=lambda who=who: [log.write("info", "said", who=who, n=n) for n in range(200)])
        for who in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [line for each in files(path) for line in lines(each)]
    assert len(found) == 800
    assert all([line["n"] for line in found if line["who"] == who] == list(range(200)) for who in range(4))


def test_a_second_process_is_told_to_take_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = LogFile(path, 5_000, 5)
    with pytest.raises(UserError, match=r"another process logs there.*logs/\{party\}\.jsonl"):
        LogFile(path, 5_000, 5)
    first.close()
    LogFile(path, 5_000, 5).close()


def test_where_nothing_can_be_written_it_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file/log"):
        with pytest.raises(UserError, match="give another file with --log-file"):
            LogFile(place, 5_000, 5)


def test_a_full_disk_loses_lines_and_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    log = LogFile(path, 50_000, 5)
    log.write("info", "before")
    real = os.write

    def full(handle: int, body: bytes) -> int:
        return real(handle, body[:7])

    def none(handle: int, body: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for write in (full, none, none):
        monkeypatch.setattr(os, "write", write)
        log.write("info", "lost")
    monkeypatch.setattr(os, "write", real)
    log.write("info", "after")
    assert [line["event"] for line in lines(path)] == ["before", "lines are lost", "after"]
    assert lines(path)[1]["count"] == 3
    assert capsys.readouterr().err.count("\n") == 1, "said once"


def test_the_file_has_what_happens_and_tracebacks_and_the_terminal_what_people_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    configure_logging(file=LogFile(path, 50_000, 5, VirtualClock(1e9)))
    happened("update counted", node="a", bytes=5)
    structlog.get_logger().info("shown", where=tmp_path)
    try:
        raise ValueError("why")
    except ValueError:
        structlog.get_logger().exception("broken")
    shown = capsys.readouterr().err
    assert "update counted" not in shown and "shown" in shown and "ValueError: why" in shown
    counted, info, broken = lines(path)
    assert counted == {
        "at": "2001-09-09T01:46:40.000+00:00",
        "level": "info",
        "event": "update counted",
        "node": "a",
        "bytes": 5,
    }
    assert info["event"] == "shown" and str(tmp_path) in info["where"]
    assert broken["level"] == "error" and "ValueError: why" in broken["exception"]


def test_what_ends_a_service_is_in_its_file(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'[broker]\nurl = "amqp://127.0.0.1:1/"\nwait_seconds = 0\n[log]\nfile = "{tmp_path}/logs/{{party}}.jsonl"\n'
        f'[nodes.clinic-a]\nstate_dir = "{tmp_path}/a"\ncorpus = {{ path = "{tmp_path}/x.txt" }}\n'
    )
    (tmp_path / "x.txt").write_text("words and words\n\nand more of them\n")
    done = shared_encoder("master", "--config", str(config), "--state", str(tmp_path / "m"), "--http", "off")
    assert done.returncode == 3
    assert shared_encoder("node", "clinic-a", "--config", str(config)).returncode == 3
    assert {each.name for each in (tmp_path / "logs").iterdir()} == {"master.jsonl", "clinic-a.jsonl"}
    ended = lines(tmp_path / "logs/clinic-a.jsonl")[-1]
    assert ended["event"] == "ended" and "no broker answers at 127.0.0.1:1" in ended["problem"]
    assert f"shared-encoder: {ended['problem']}" in shared_encoder("node", "clinic-a", "--config", str(config)).stderr
