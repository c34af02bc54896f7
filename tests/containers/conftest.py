"""Images are built once for all tests of containers; what is missing for them is a failure that says so."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from deploy.local_rabbitmq import free_port
from tests.containers.docker import COMPOSE_FILE, Federation, docker, missing

#: Versions of RabbitMQ that a federation is tried over, as tags of its images say them.
RABBITMQ = os.environ.get("RABBITMQ_VERSIONS", "4").split()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rabbitmq" in metafunc.fixturenames:
        metafunc.parametrize("rabbitmq", RABBITMQ)


@pytest.fixture(scope="session")
def images() -> None:
    """Both, of this source."""
    if hint := missing():
        pytest.fail(hint, pytrace=False)
    docker("compose", "-f", str(COMPOSE_FILE), "build", timeout=1800)


@pytest.fixture
def federation(request: pytest.FixtureRequest, rabbitmq: str, images: None) -> Iterator[Federation]:
    """Not started. How many versions it trains, and limits of memory, may be said by a parameter `settings`."""
    settings = getattr(request, "param", {})
    made = Federation(f"shared-encoder-test-{rabbitmq}", rabbitmq, port=free_port(), **{"versions": 100, **settings})
    made.down()
    yield made
    made.down()
