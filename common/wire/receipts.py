"""The chain of receipts: each carries the hash of the one that was issued before it for the same encoder.

Whoever holds one receipt and the message log can show that the update is counted in the version and with the weight
that the receipt says: the log leads to the same receipts in the same order, or to another hash.
"""

from __future__ import annotations

import hashlib

from common.wire.messages import Receipt


def receipt_hash(receipt: Receipt) -> str:
    """sha256 over the receipt's JSON, the hash of its predecessor included; hexadecimal."""
    return hashlib.sha256(receipt.model_dump_json().encode()).hexdigest()
