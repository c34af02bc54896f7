"""What a proxy's library says is not taken for what its digits happen to spell."""

from __future__ import annotations

import pytest

from common.brokers.amqp.proxy import Proxy
from common.errors import BrokerUnavailable, UserError


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Tunnel connection failed: 407 Proxy Authentication Required", UserError),
        ("Username and password authentication failure", UserError),
        ("Proxy connection timed out: 0.09999833799884073", BrokerUnavailable),
        ("Tunnel connection failed: 502 Bad Gateway after 4.407 s", BrokerUnavailable),
        ("Tunnel connection failed: 403 Forbidden", UserError),
    ],
)
def test_a_number_in_it_is_no_answer(said: str, kind: type[Exception]) -> None:
    proxy = Proxy("socks5://me:secret@127.0.0.1:1080")
    error = proxy._explained("broker.example:5671", OSError(said))  # private: the words cannot be had on demand
    assert type(error) is kind
    assert ("wants a user and a password" in str(error)) == (said.endswith(("Required", "failure")))
