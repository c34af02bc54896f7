"""Where a service is looked at: what is taken, and what is one line."""

from __future__ import annotations

import pytest

from common.http_address import HttpAddress, http_address


@pytest.mark.parametrize(
    ("text", "address", "loopback", "near"),
    [
        ("127.0.0.1:9464", HttpAddress("127.0.0.1", 9464), True, "127.0.0.1:9464"),
        (":9464", HttpAddress("127.0.0.1", 9464), True, "127.0.0.1:9464"),
        ("localhost:1", HttpAddress("localhost", 1), True, "localhost:1"),
        ("127.8.8.8:1", HttpAddress("127.8.8.8", 1), True, "127.8.8.8:1"),
        ("[::1]:9464", HttpAddress("::1", 9464), True, "[::1]:9464"),
        ("0.0.0.0:9464", HttpAddress("0.0.0.0", 9464), False, "127.0.0.1:9464"),
        ("[::]:9464", HttpAddress("::", 9464), False, "[::1]:9464"),
        ("master.example:65535", HttpAddress("master.example", 65535), False, "master.example:65535"),
        ("localhost.example:1", HttpAddress("localhost.example", 1), False, "localhost.example:1"),
    ],
)
def test_an_address_is_read_and_whether_others_reach_it(
    text: str, address: HttpAddress, loopback: bool, near: str
) -> None:
    read = http_address(text)
    assert read == address and read.is_loopback is loopback and str(read.near) == near
    assert http_address(str(read)) == read


@pytest.mark.parametrize("text", ["off", "OFF", " off "])
def test_off_is_nowhere(text: str) -> None:
    assert http_address(text) is None


@pytest.mark.parametrize(
    "text", ["", "9464", "127.0.0.1", "::1:9464", "a:0", "a:65536", "a b:1", "http://a:1", "a:1/x", "[::1]", "a:-1"]
)
def test_what_is_no_address_is_one_line_that_says_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match=r"take HOST:PORT such as 127\.0\.0\.1:9464, or off") as error:
        http_address(text)
    assert "\n" not in str(error.value)
