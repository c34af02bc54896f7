"""The brokers. Importing this package imports no driver; `open_broker` imports the one that a URL asks for."""

from __future__ import annotations

from common.broker_url import Access, split
from common.wire.broker import Broker


def open_broker(
    access: str | Access,
    *,
    client_name: str,
    dead_letters: str | None,
    notes: str = "",
    makes_notes: bool = True,
    connect_timeout: float = 10.0,
    refusal_patience: float = 30.0,
) -> Broker:
    """Connect to the RabbitMQ of an `amqp://` or `amqps://` URL, or of the first of several that lets us in.

    `client_name` is shown in the broker's management page, `dead_letters` is the exchange for what cannot be processed;
    None for a party that may not write there: then its log alone has it. `notes` is the exchange by which the holder of
    a lock says who it is, none if empty, and `makes_notes` says whether it declares what they need.
    `refusal_patience`: seconds that something may be refused in a row before `status` calls it final.
    Raises UserError for a URL of another kind and for certificates that are not good, AccessRefused, or
    BrokerUnavailable after `connect_timeout` seconds.
    """
    access = Access((access,)) if isinstance(access, str) else access
    for url in access.urls:
        split(url)
    from common.brokers.amqp.rabbitmq import RabbitMQBroker

    return RabbitMQBroker(
        access,
        client_name=client_name,
        dead_letters=dead_letters,
        notes=notes,
        makes_notes=makes_notes,
        connect_timeout=connect_timeout,
        refusal_patience=refusal_patience,
    )
