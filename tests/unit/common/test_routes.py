"""Which of several addresses is next, and what all of them together are: away, or refused for good."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.brokers.amqp.routes import Route
from common.errors import AccessRefused, BrokerUnavailable, SharedEncoderError, UserError


class FakeAddress:
    """Says of every attempt what it is told to say."""

    def __init__(self, says: SharedEncoderError) -> None:
        self.says = says

    def not_connected(self, error: BaseException) -> SharedEncoderError:
        return self.says


AWAY, REFUSED, WRONG = BrokerUnavailable("away"), AccessRefused("refused"), UserError("wrong certificate")


@given(st.lists(st.sampled_from([AWAY, REFUSED, WRONG]), min_size=1, max_size=5), st.data())
def test_all_are_tried_in_turn_and_only_if_all_refuse_waiting_is_no_help(
    says: list[SharedEncoderError], data: st.DataObject
) -> None:
    addresses: Any = [FakeAddress(each) for each in says]
    at, tried = data.draw(st.integers(0, len(says) - 1)), []
    route = Route(addresses, at, lambda address, opened, gone: tried.append(address))
    for number in range(2 * len(says)):
        route.connect(lambda _: None, lambda *_: None)
        told = route.explained(ConnectionError(), was_open=False)
        all_were_asked = number + 1 >= len(says)
        assert isinstance(told, UserError) == (all_were_asked and AWAY not in says)
        asked = [says[(at + each) % len(says)] for each in range(min(number + 1, len(says)))]
        assert all(str(each) in str(told) for each in asked), "each of them is named"
    assert tried == [addresses[(at + each) % len(says)] for each in range(2 * len(says))]
    assert isinstance(route.explained(ConnectionError(), was_open=True), BrokerUnavailable)
    assert isinstance(route.explained(ConnectionError(), was_open=False), UserError) == (
        len(says) == 1 and says != [AWAY]
    ), "what they said before the connection was open counts no more"
