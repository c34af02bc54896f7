"""Where a broker may be: its addresses, which are tried in turn, and what each of them said. Knows no driver.

What the driver's parameters must have: `host`, `port`, `virtual_host`, `credentials`, `ssl_options`, time-outs.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import structlog

from common.broker_url import Access
from common.brokers.amqp.proxy import PROXY_SECONDS, Proxy
from common.brokers.amqp.refusals import not_connected, refused_by, went_away
from common.brokers.amqp.tls import Tls
from common.clock import SYSTEM
from common.errors import AccessRefused, BrokerUnavailable, SharedEncoderError, UserError

log = structlog.get_logger()
T = TypeVar("T")

#: Between two rounds of attempts to connect at the start, seconds.
_AGAIN_SECONDS = 0.3
#: A connection that only asks what is wrong with TLS may take so long, seconds.
_DIAGNOSIS_SECONDS = 3.0

#: What the driver says of a peer that does not speak, or does not speak TLS; it would be the same once more.
_NOT_WORTH_ASKING = ("Timeout", "WRONG_VERSION_NUMBER")

#: Begin to connect to an address: called with what is to be called when the connection is open, and when it is gone.
Connecting = Callable[["Address", Callable[[Any], None], Callable[[Any, BaseException], None]], Any]


class Address:
    """One URL of a broker, as the driver's parameters, and who we are there."""

    def __init__(self, parameters: Any, access: Access, *, named: bool, proxy: Proxy | None = None) -> None:
        """`named`: the URL has a user. Raises UserError if that is not the account that was given."""
        self.parameters = parameters
        self.proxy = proxy
        self.host: str = parameters.host
        self.port: int = parameters.port
        self.vhost: str = parameters.virtual_host
        self._access = access
        #: The certificate is the login: the URL has none.
        self.by_certificate = access.cert_file is not None and not named
        user = None if self.by_certificate else str(parameters.credentials.username)
        if named and access.account is not None and user != access.account:
            raise UserError("broker.account and the user in the broker's URL are not the same: leave one of them out")
        #: As which account we publish; None where only the broker knows, from our certificate.
        self.account = access.account if self.by_certificate else user

    @property
    def where(self) -> str:
        return f"{self.host}:{self.port}"

    def check_tls(self, *, given_otherwise: bool) -> None:
        """For an address that certificates were given for. Raises UserError if it would not use them."""
        if self.parameters.ssl_options is None:
            raise UserError(f"broker.ca_file and cert_file are for TLS: write amqps:// in the URL of {self.where}")
        if given_otherwise:
            raise UserError(
                "the broker's URL has ssl_options, and there is broker.ca_file or cert_file: keep these alone"
            )

    def for_a_moment(self, timeout: float, blocked_timeout: float) -> Any:
        """Parameters of a connection that is to be open within `timeout` seconds. Raises OSError for unknown names."""
        parameters = copy.copy(self.parameters)
        parameters.blocked_connection_timeout = blocked_timeout
        timeout = max(timeout, _AGAIN_SECONDS)
        if self.proxy is None:
            # the driver tries each address of a name in turn, with the whole of its timeouts
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
            timeout /= len(found)
        parameters.socket_timeout = parameters.stack_timeout = timeout
        return parameters

    def not_connected(self, error: BaseException) -> SharedEncoderError:
        """Why no connection could be made: a UserError for what no waiting mends, AccessRefused, BrokerUnavailable."""
        tls = self.parameters.ssl_options is not None
        who = f"user {self.account!r}" if self.account else f"the certificate {self._access.cert_file}"
        refused = refused_by(self.where, who, self.vhost, error, by_certificate=self.by_certificate)
        if refused is not None:
            return refused
        if tls and not any(words in repr(error) for words in _NOT_WORTH_ASKING):
            found = self._tls().diagnosis(self._plain)
            if found is not None:
                return found
        return not_connected(self.where, error, tls=tls)

    def _tls(self) -> Tls:
        options = self.parameters.ssl_options
        host = options.server_hostname or self.host
        return Tls(options.context, host, self.where, ca_file=self._access.ca_file, cert_file=self._access.cert_file)

    def _plain(self) -> socket.socket:
        """A connection without TLS on it yet. Raises OSError."""
        if self.proxy is None:
            return socket.create_connection((self.host, self.port), _DIAGNOSIS_SECONDS)
        try:
            return self.proxy.connect(self.host, self.port, min(_DIAGNOSIS_SECONDS, PROXY_SECONDS))
        except SharedEncoderError as error:
            raise OSError(str(error)) from None


class Route:
    """The way of one connection that is kept open: after each attempt that failed, and each loss, the next address."""

    def __init__(self, addresses: Sequence[Address], at: int, connecting: Connecting) -> None:
        """`at`: the index of the address to begin with."""
        self._addresses = addresses
        self._at = at
        self._connecting = connecting
        self._said: dict[int, SharedEncoderError] = {}

    @property
    def address(self) -> Address:
        """The one that is connected, or tried."""
        return self._addresses[self._at]

    def connect(self, opened: Callable[[Any], None], gone: Callable[[Any, BaseException], None]) -> Any:
        return self._connecting(self.address, opened, gone)

    def explained(self, error: BaseException, was_open: bool) -> SharedEncoderError:
        """What ended the connection, as an error of ours; of several addresses, what all have said since the loss."""
        at, self._at = self._at, (self._at + 1) % len(self._addresses)
        if was_open:
            self._said.clear()
            return went_away(error)
        self._said[at] = self._addresses[at].not_connected(error)
        return together([self._said[each] for each in sorted(self._said)], of=len(self._addresses))


def together(errors: Sequence[SharedEncoderError], *, of: int) -> SharedEncoderError:
    """What `of` addresses have said, as one error. As long as one of them may yet come right, waiting may help."""
    if len(errors) == of == 1:
        return errors[0]
    words = "; ".join(dict.fromkeys(map(str, errors)))
    if len(errors) < of or not all(isinstance(error, UserError) for error in errors):
        return BrokerUnavailable(words)
    return AccessRefused(words) if any(isinstance(error, AccessRefused) for error in errors) else UserError(words)


def first_that_answers(
    addresses: Sequence[Address], ask: Callable[[Address, float], T], timeout: float
) -> tuple[int, T]:
    """The index of the first address that lets us in, and its answer; they are asked in turn for `timeout` seconds.

    `ask` is given the seconds it may take. Raises at once what cannot get better by waiting, else BrokerUnavailable.
    """
    deadline = SYSTEM.monotonic() + timeout
    while True:
        errors: list[SharedEncoderError] = []
        for at, address in enumerate(addresses):
            try:
                answer = ask(address, (deadline - SYSTEM.monotonic()) / (len(addresses) - at))
            except (BrokerUnavailable, UserError) as error:
                errors.append(error)
                continue
            for each in errors:
                log.warning("one of the broker's addresses does not work", problem=str(each), instead=address.where)
            return at, answer
        failed = together(errors, of=len(addresses))
        if isinstance(failed, UserError) or SYSTEM.monotonic() + _AGAIN_SECONDS > deadline:
            raise failed
        SYSTEM.wait(_AGAIN_SECONDS)
