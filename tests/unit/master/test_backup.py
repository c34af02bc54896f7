"""A copy that is made while the master writes, takes snapshots and drops payloads: a start from it is a right one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import SharedEncoderError
from master_service.history.backup import back_up
from master_service.history.replay import verify
from master_service.history.retention import prune
from master_service.history.snapshot import kept_snapshots, read_snapshot
from master_service.log.message_log import open_log
from master_service.log.payload_files import payload_path
from tests.unit.master.test_fold import Federation, snapshot
from tests.unit.master.test_replay import trained


class Busy:
    """A master that does so many things, one at each payload that is copied."""

    def __init__(self, run: Federation, does: list[str]) -> None:
        self.run, self.does = run, does
        self._sequence = 100

    def __call__(self) -> None:
        if not self.does:
            return
        doing = self.does.pop(0)
        if doing == "update":
            self._sequence += 1
            self.run.update("abc"[self._sequence % 3], self._sequence)
        elif doing == "snapshot":
            snapshot(self.run)
        else:
            prune(self.run.log, kept_snapshots(self.run.directory / "snapshots"), "since-snapshot", 0.0)


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.sampled_from(["update", "snapshot", "prune"]), max_size=3),
    st.lists(st.sampled_from(["update", "update", "snapshot", "prune"]), max_size=8),
)
def test_a_master_can_start_from_a_copy_whatever_happened_while_it_was_made(
    before: list[str], during: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = trained(Path(folder) / "state", "return-count", "abca")
        busy = Busy(run, before)
        while before:
            busy()
        target = Path(folder) / "copy"
        found = back_up(run.directory, target, Busy(run, during))
        log = open_log(target, read_only=True)
        assert found.rows == log.last_offset + 1 and not found.lost
        fold = read_snapshot(target / "snapshots", log)
        assert all(check is None or check.identical for _, check in verify(log, fold))
        assert fold.offset == log.last_offset <= run.log.last_offset
        log.close()
        run.log.close()


def test_lost_payloads_are_named_and_a_retention_that_is_faster_is_given_up_on(tmp_path: Path) -> None:
    run = trained(tmp_path / "state", "return-count")
    lost = run.log.update_payloads(run.log.last_offset)[0]
    payload_path(run.directory / "payloads", lost).unlink()
    assert back_up(run.directory, tmp_path / "copy").lost == [lost]

    busy = Busy(run, [])

    def always() -> None:
        busy.does = ["update", "snapshot", "update", "snapshot", "update", "snapshot", "prune"]
        while busy.does:
            busy()

    with pytest.raises(SharedEncoderError, match="try again"):
        back_up(run.directory, tmp_path / "other", always)
