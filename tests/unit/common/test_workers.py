"""Work that is done beside whoever hands it over."""

from __future__ import annotations

import threading

import pytest

from common.workers import OneBeside


def test_one_piece_of_work_after_the_other_and_its_error_reaches_both_who_waits_and_who_is_told() -> None:
    told: list[BaseException] = []
    beside, go_on, done = OneBeside("test", told.append), threading.Event(), list[str]()
    beside.run(lambda: (go_on.wait(10), done.append(threading.current_thread().name))[0])
    assert beside.busy and done == []
    threading.Timer(0.05, go_on.set).start()
    beside.run(lambda: done.append("second"))  # waits for the first
    beside.wait()
    assert done == ["test", "second"] and not beside.busy

    def fails() -> None:
        raise OSError("no room")

    beside.run(fails)
    for again in (beside.wait, lambda: beside.run(go_on.clear)):
        with pytest.raises(OSError, match="no room"):
            again()
    assert [str(error) for error in told] == ["no room"] and go_on.is_set()
    beside.join()
