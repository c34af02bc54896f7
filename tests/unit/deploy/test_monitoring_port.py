"""The HTTP port itself: who may ask for what, who holds up nobody, and where it cannot be had."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.http_address import HttpAddress
from deploy.commands.health import look
from deploy.local_rabbitmq import free_port
from deploy.logging import Noticed
from deploy.monitoring.monitor import MasterMonitor, NodeMonitor
from deploy.monitoring.pages import watched
from deploy.monitoring.port import Answer, Page, Port
from tests.e2e.test_processes import shared_encoder


@contextmanager
def served(pages: dict[str, Page], host: str = "127.0.0.1") -> Iterator[HttpAddress]:
    address = HttpAddress(host, free_port())
    port = Port(address, pages)
    try:
        yield address
    finally:
        port.close()


def asked(address: HttpAddress, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=10.0)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


@pytest.fixture
def hello() -> dict[str, Page]:
    return {"/hello": lambda accept: Answer(HTTPStatus.OK, f"hello {accept}".encode())}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_page_is_given_and_says_nothing_of_the_machine(hello: dict[str, Page], host: str) -> None:
    with served(hello, host) as address:
        status, body, headers = asked(address, "/hello?x=1", Accept="text/plain")
        assert (status, body) == (200, b"hello text/plain")
        assert "Python" not in headers["Server"] and headers["Cache-Control"] == "no-store"
        assert asked(address, "/hello", "HEAD")[:2] == (200, b"")


def test_what_is_not_there_and_what_is_not_asked_is_refused(hello: dict[str, Page]) -> None:
    with served(hello) as address:
        assert asked(address, "/../etc/passwd")[:2] == (404, b"there are:\n/hello\n")
        for method in ("POST", "PUT", "DELETE"):
            assert asked(address, "/hello", method)[0] == 501


def test_a_bug_in_a_page_is_told_and_the_port_goes_on(
    hello: dict[str, Page], capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(accept: str) -> Answer:
        raise KeyError("no such metric")

    with served({"/broken": broken, **hello}) as address:
        assert asked(address, "/broken")[0] == 500
        assert "no such metric" in capsys.readouterr().err
        assert asked(address, "/hello")[0] == 200


def test_clients_that_say_nothing_keep_nobody_waiting(hello: dict[str, Page]) -> None:
    with served(hello) as address, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection((address.host, address.port)))
        begun = time.monotonic()
        assert asked(address, "/hello")[0] == 200
        assert time.monotonic() - begun < 4.5, "less than one of them may take"


def test_however_many_connect_there_are_few_threads(hello: dict[str, Page]) -> None:
    with served(hello) as address, ExitStack() as stack:
        before = threading.active_count()
        for _ in range(60):
            stack.enter_context(socket.create_connection((address.host, address.port)))
        time.sleep(0.5)
        assert threading.active_count() - before <= 16


def monitor(place: Path, node: str = "") -> Any:
    return NodeMonitor(node, place, Noticed()) if node else MasterMonitor("", place, Noticed())


def test_a_port_that_is_taken_is_an_error_for_who_asked_for_it_and_a_line_for_who_did_not(
    tmp_path: Path, hello: dict[str, Page], capsys: pytest.CaptureFixture[str]
) -> None:
    with served(hello) as address:
        with pytest.raises(UserError, match=f"at {address}: somebody else listens there; give another --http, or off"):
            watched(monitor(tmp_path), str(address)).__enter__()
        with watched(monitor(tmp_path), None, by_default=str(address)):
            lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert len(lines) == 1 and f"no health and metrics over HTTP at {address}" in lines[0]
        assert asked(address, "/hello")[0] == 200


def test_an_address_of_another_machine_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be looked at over HTTP at 192\.0\.2\.1:9464: .+ give another --http"):
        watched(monitor(tmp_path), "192.0.2.1:9464").__enter__()


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("", False), ("0.0.0.0", True)])
def test_who_opens_it_to_others_is_warned_that_there_is_no_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str, warned: bool
) -> None:
    port = free_port()
    with watched(monitor(tmp_path), f"{host}:{port}"):
        assert ("without a password" in capsys.readouterr().err) is warned
        assert asked(HttpAddress("127.0.0.1", port), "/healthz")[:2] == (200, b"ok\n")
    with pytest.raises(ConnectionRefusedError):
        asked(HttpAddress("127.0.0.1", port), "/healthz")


@pytest.mark.parametrize("http", ["off", None])
def test_off_is_off(tmp_path: Path, http: str | None) -> None:
    before = set(threading.enumerate())
    with watched(monitor(tmp_path), http):
        assert set(threading.enumerate()) <= before


def test_the_health_command_asks_this_machine_and_says_it_in_one_line(tmp_path: Path, hello: dict[str, Page]) -> None:
    port = free_port()
    assert look(f":{port}") == (False, f"nobody answers at 127.0.0.1:{port}: connection refused")
    made = monitor(tmp_path, "clinic-a")
    with watched(made, f"0.0.0.0:{port}"):
        assert look(f"0.0.0.0:{port}") == (
            False,
            "node clinic-a is not ready: broker: not connected yet; lock: not taken yet",
        )
        assert look(f":{port}", alive=True) == (True, "alive")
        done = shared_encoder("health", "--http", f":{port}")
        assert done.returncode == 1 and done.stdout.startswith("node clinic-a is not ready") and done.stderr == ""
        assert done.stdout.count("\n") == 1
    with served({"/readyz": hello["/hello"]}) as address:
        assert look(str(address)) == (False, "what answers is no service of shared-encoder")
    with served({"/readyz": lambda accept: Answer(HTTPStatus.OK, json.dumps([]).encode())}) as address:
        assert look(str(address)) == (False, "what answers is no service of shared-encoder")


@pytest.mark.parametrize("http", ["off", "9464", "a:b"])
def test_the_health_command_says_what_is_wrong_with_an_address(http: str) -> None:
    done = shared_encoder("health", "--http", http)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--http" in done.stderr


def test_the_health_command_imports_nothing_that_takes_time() -> None:
    code = "import sys; from deploy.commands.health import look; look(':1'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "structlog", "http.client", "numpy", "torch", "rich", "msgpack"} & set(loaded)


@pytest.mark.parametrize("arguments", [("master",), ("node", "a", "--corpus", "x"), ("aggregator", "--shard", "1/2")])
def test_a_wrong_address_is_one_line_before_anything_begins(arguments: tuple[str, ...]) -> None:
    done = shared_encoder(*arguments, "--http", "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "'nowhere' is no address to listen at" in done.stderr and "http" in done.stderr
