"""What the broker said, and what answered in its place, as errors of ours. Knows AMQP's codes, not the driver."""

from __future__ import annotations

from collections.abc import Iterable

from common.errors import (
    AccessRefused,
    BrokerUnavailable,
    LockHeld,
    SharedEncoderError,
    Unpublishable,
    Unroutable,
    UserError,
)

#: Codes with which a broker ends a connection for what it was sent: a frame or a method that it cannot take.
MALFORMED = frozenset((501, 502, 503, 505, 540))


def explained(code: int, text: str) -> SharedEncoderError:
    """Why the broker closed a channel on which something was asked of it."""
    if code == 403:
        return AccessRefused(f"the broker account lacks a permission: {text}")
    if code == 404 and "down or inaccessible" not in text:
        return Unroutable(text)  # else the queue is still coming up after a restart of the broker
    if code == 405:
        return LockHeld(text)
    if code == 406 and "limit" in text:
        return UserError(f"{text}; have that limit raised, or delete what is left there of ended runs")
    if code == 406:
        return UserError(f"{text}; delete what is there with the same name, or use another --namespace")
    return BrokerUnavailable(text)


def unpublished(code: int, text: str) -> SharedEncoderError:
    """Why the broker closed a channel, or with one of `MALFORMED` the connection, on which a message was published."""
    if code == 406 or code in MALFORMED:
        hint = "; raise max_message_size at the broker" if "larger than" in text else ""
        if "user_id" in text:
            hint = "; broker.account must be the name that the broker knows the certificate by"
        return Unpublishable(f"the broker does not take this message: {text}{hint}")
    return explained(code, text)


def refused_by(
    where: str, who: str, vhost: str, error: BaseException, *, by_certificate: bool
) -> SharedEncoderError | None:
    """What a broker that answers said against us, when no connection could be made; None if it said nothing.

    `where`: host and port; `who`: the user or the certificate, in words. The driver reports every connection that ends
    while it opens as a refusal, even if the broker was just stopped or killed; only its text tells them apart.
    """
    said, words = repr(error), first_line(error)
    if isinstance(inner := _cause(error), SharedEncoderError):
        return inner  # of our own on the way there, such as a proxy's
    if "(403)" in said or "(530)" in said:
        if "limit" in said:
            # no refusal of the account: connections that broke are counted until the broker misses their heartbeats
            return BrokerUnavailable(f"the broker at {where} takes no more connections of {who} now: {words}")
        what = "certificate, account" if by_certificate else "user, password"
        return AccessRefused(
            f"the broker at {where} does not let {who} in to vhost {vhost!r}: "
            f"check {what} and vhost of the URL ({words})"
        )
    if by_certificate and "AuthenticationError" in said:
        return UserError(
            f"the broker at {where} takes no certificate as a login (EXTERNAL): enable rabbitmq_auth_mechanism_ssl "
            "there, with auth_mechanisms.1 = EXTERNAL, or put user and password into the URL"
        )
    return None


def not_connected(where: str, error: BaseException, *, tls: bool) -> BrokerUnavailable:
    """Why no connection could be made, where nobody said so."""
    said = repr(error)
    asked = "is RabbitMQ running there, and the port open?"
    if _any_of(said, ("SSL", "ssl=True", "certificate")):
        asked = "does it speak TLS on this port, as amqps:// says?"
    elif _any_of(said, ("IncompatibleProtocol", "Timeout during AMQP", "ProtocolVersion")):
        wanted = "is it amqp:// that is meant?" if tls else "does it want TLS (amqps://)?"
        asked = f"something is there that does not speak AMQP as RabbitMQ does; is it RabbitMQ's port, and {wanted}"
    return BrokerUnavailable(f"no broker answers at {where}: {asked} ({first_line(error)})")


def went_away(error: BaseException) -> BrokerUnavailable:
    """The error for a connection that was open and is lost."""
    return BrokerUnavailable(f"the broker went away: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The innermost cause of an error, as one line of at most 200 characters."""
    cause = _cause(error)
    return next(iter((str(cause) or repr(cause)).splitlines()))[:200]


def _cause(error: BaseException) -> BaseException:
    """The driver wraps an error once for each of its stages; the innermost says what happened."""
    inner = getattr(error, "exception", None) or (getattr(error, "exceptions", None) or error.args or (None,))[-1]
    return _cause(inner) if isinstance(inner, BaseException) else error


def _any_of(text: str, words: Iterable[str]) -> bool:
    return any(word in text for word in words)
