"""What leaves the master: in order, together where it can, and how far it has left is never said too early."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from common.errors import BrokerUnavailable
from common.wire.broker import Publication
from master_service.wire.outbox import Outbox


def letter(name: str) -> Publication:
    return Publication("x", name, b"")


class Line:
    """Notes what leaves; `open` lets it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.left: list[str] = []
        self.open = threading.Event()
        self.error = error

    def publish(self, letters: Sequence[Publication]) -> None:
        assert self.open.wait(20.0)
        if self.error is not None:
            raise self.error
        self.left.append(" ".join(each.routing_key for each in letters))


def fill(outbox: Outbox, line: Line) -> None:
    for name in ("a", "b"):
        outbox.letter(lambda name=name: letter(name))  # type: ignore[misc]
    outbox.mark(4)
    outbox.action(lambda: line.left.append("version"), large=True)
    outbox.letter(lambda: letter("notice"))
    outbox.mark(7)


def test_alone_all_leaves_at_once_and_in_order() -> None:
    line = Line()
    line.open.set()
    outbox = Outbox(line.publish)
    fill(outbox, line)
    assert line.left == ["a", "b", "version", "notice"] and outbox.left == 7


def test_beside_messages_leave_together_and_a_mark_is_behind_what_it_stands_for() -> None:
    line = Line()
    outbox = Outbox(line.publish)
    outbox.beside()
    fill(outbox, line)
    thread = threading.Thread(target=outbox.serve, daemon=True)
    thread.start()
    assert outbox.left == -1 and not outbox.drain(0.01), "nothing has left"
    line.open.set()
    outbox.drain()
    assert line.left == ["a b", "version", "notice"] and outbox.left == 7
    outbox.close()
    thread.join(20.0)
    assert not thread.is_alive()


def test_what_ends_the_thread_is_raised_by_whoever_waits_and_whoever_puts() -> None:
    line = Line(BrokerUnavailable("away for good"))
    line.open.set()
    outbox = Outbox(line.publish)
    outbox.beside()
    fill(outbox, line)

    def serve() -> None:
        with pytest.raises(BrokerUnavailable):
            outbox.serve()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with pytest.raises(BrokerUnavailable, match="for good"):
        outbox.drain()
    with pytest.raises(BrokerUnavailable, match="for good"):
        outbox.letter(lambda: letter("c"))
    assert outbox.left == -1
    thread.join(20.0)
