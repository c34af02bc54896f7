"""How a party gets to its broker: the URLs, taken apart, and what goes with them. What is wrong with a URL is said
without a word of it: a password is in there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from common.errors import UserError

_FORM = "write it as amqp://user:password@host:5672/vhost (or amqps://)"
_SIGNS = (
    "a sign such as # ? / [ or @ in user or password must be percent-encoded (# is %23), or the password stand in "
    "broker.password_file"
)
_PROXY_FORM = "write it as http://host:3128 or socks5://host:1080, with user:password@ before the host where it asks"
_PROXY_SCHEMES = ("http", "socks5")


@dataclass(frozen=True, slots=True)
class Access:
    """How a party gets to its broker: `urls` are tried in turn, and the rest holds for each of them.

    `ca_file`: who must have signed the broker's certificate; None: whom this system trusts. `cert_file`, `key_file`:
    who the party is, for a broker that asks; they are the login too (EXTERNAL) where a URL names no user. `account`:
    the account's name at the broker, which a login by certificate does not tell. `proxy`: the way out.
    """

    urls: tuple[str, ...] = field(repr=False)
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    account: str | None = None
    proxy: str | None = field(default=None, repr=False)


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


def split_proxy(url: str) -> SplitResult:
    """The parts of a proxy's URL, which has a port. Raises UserError for another one."""
    try:
        parts = urlsplit(url)
        readable = parts.scheme in _PROXY_SCHEMES and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        readable = False
    if not readable or "@" in parts.path + parts.query + parts.fragment or parts.fragment:
        raise UserError(f"broker.proxy is no URL of a proxy with its port: {_PROXY_FORM}")
    return parts
