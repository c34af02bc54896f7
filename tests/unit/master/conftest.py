"""What tests of a master in virtual time begin with."""

from __future__ import annotations

import pytest

from common.brokers.memory import MemoryServer
from common.clock import VirtualClock


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


@pytest.fixture
def server(clock: VirtualClock) -> MemoryServer:
    return MemoryServer(clock.now)
