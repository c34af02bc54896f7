"""The broker that the tests run against: a private RabbitMQ of their own, or the one that AMQP_URL names."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import torch
from hypothesis import settings

from deploy.local_rabbitmq import LocalRabbitMQ
from deploy.logging import configure_logging

# The suite says the same of the same code; FAULT_EXAMPLES=5000 (see tests/faults/test_interleavings.py) looks further.
settings.register_profile("repeatable", derandomize=True)
if "FAULT_EXAMPLES" not in os.environ:
    settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def amqp_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Started on first use, stopped at the end. Without a server program this fails and says what to install."""
    given = os.environ.get("AMQP_URL")
    if given:
        yield given
        return
    with LocalRabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server.url


@pytest.fixture
def private_rabbitmq(tmp_path: Path) -> Iterator[LocalRabbitMQ]:
    """A server of one test's own, to be killed, restarted and alarmed."""
    with LocalRabbitMQ(tmp_path / "rabbitmq") as server:
        yield server


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Small models are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_unconfigure() -> None:
    """A thread that is not a daemon would keep the interpreter from ending, without a word and without a limit."""
    others = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    for thread in others:
        thread.join(2.0)
    left = [thread.name for thread in others if thread.is_alive()]
    if left:
        print(f"threads that do not end: {', '.join(left)}", file=sys.stderr, flush=True)
        os._exit(1)


@pytest.fixture(autouse=True)
def _logging_of_its_own() -> Iterator[None]:
    """As in production, with plain tracebacks: structlog's default takes minutes to colour one long line. A command
    that a test runs sets up logging for its process, which is that of the next test too."""
    configure_logging(level="debug")
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run beside brokers and processes on two cores; the tensors are tiny."""
    import torch

    torch.set_num_threads(1)
