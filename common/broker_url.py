"""The URL of a broker, taken apart. What is wrong with it is said without a word of it: a password is in there."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from common.errors import UserError

_FORM = "write it as amqp://user:password@host:5672/vhost (or amqps://)"
_SIGNS = (
    "a sign such as # ? / [ or @ in user or password must be percent-encoded (# is %23), or the password stand in "
    "broker.password_file"
)


def split(url: str) -> SplitResult:
    """The parts of an `amqp://` or `amqps://` URL. Raises UserError for another one."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise UserError(f"the broker's URL is not readable: {_FORM}; {_SIGNS}") from None
    if parts.scheme not in ("amqp", "amqps"):
        raise UserError(f"the broker's URL is none of RabbitMQ's: {_FORM}")
    if not host or port == 0:
        raise UserError(f"the broker's URL names no host, or port 0: {_FORM}")
    if "@" in parts.path + parts.query + parts.fragment or parts.fragment:
        raise UserError(f"the broker's URL is not readable: {_FORM}; {_SIGNS}")
    return parts
