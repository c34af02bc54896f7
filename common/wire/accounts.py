"""Whose account a message came from: where every party has one of its own, nobody speaks for another.

The broker checks the user id of what is published against the connection's account, but only if there is a user id at
all: so whoever takes a message asks for the account that it must have come from.
"""

from __future__ import annotations

import re
import threading

import structlog

from common.errors import Poison
from common.wire.broker import Delivery
from common.wire.topology import Topology

log = structlog.get_logger()

#: The party that nodes listen to. No node and no operator may be called so.
MASTER = "master"
#: Characters of an operator's name: those of its commands are nine longer, and no longer than any id.
LONGEST_OPERATOR = 55
#: Accounts that are warned of by name; of further ones it is counted only how much they sent.
_WARNED_OF = 64

_COMMAND = re.compile(r"(.+)-[0-9a-f]{8}")


def party_of(topology: Topology, account: str | None) -> str | None:
    """The party whose account this is; None if it is no party's of this federation."""
    before, found, party = (account or "").partition(topology.account(""))
    return party if found and party and not before else None


def command_name(operator: str, digits: str) -> str:
    """Under which name one command of an operator asks and is answered; `digits`: eight hexadecimal ones."""
    return f"{operator}-{digits}"


def operator_of(sender: str) -> str | None:
    """The operator whose command has this name, if it is the name of one."""
    found = _COMMAND.fullmatch(sender)
    return found[1] if found else None


def expect(topology: Topology, delivery: Delivery, *parties: str | None) -> None:
    """Raises Poison unless a delivery came from the account of one of these parties. Where all share one account, all
    of it is taken."""
    if not topology.own_accounts:
        return
    came_from = party_of(topology, delivery.user_id)
    if came_from is not None and came_from in parties:
        return
    wanted = " or ".join(topology.account(party) for party in parties if party is not None)
    raise Poison("account", f"it came from the account {delivery.user_id!r}, and is taken from {wanted} alone")


class Door:
    """What comes to somebody who listens to the master alone. Used by several threads.

    `turned_away`: how much came from others so far; the account of each is warned of once.
    """

    def __init__(self, topology: Topology, **who: str) -> None:
        """`who` stands in every warning."""
        self.turned_away = 0
        self._topology = topology
        self._who = who
        self._guard = threading.Lock()
        self._warned: set[str | None] = set()

    def takes(self, delivery: Delivery) -> bool:
        """Whether a delivery is the master's, as far as accounts say; one that is not is to be acked and forgotten."""
        try:
            expect(self._topology, delivery, MASTER)
        except Poison as poison:
            with self._guard:
                self.turned_away += 1
                is_new = delivery.user_id not in self._warned and len(self._warned) < _WARNED_OF
                if is_new:
                    self._warned.add(delivery.user_id)
            if is_new:
                log.warning("dropping what is not the master's", **self._who, queue=delivery.queue, why=poison.detail)
            return False
        return True
