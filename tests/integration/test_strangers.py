"""F4: what answers at the broker's address is no RabbitMQ, or says nothing: one line, in time, and no trace."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.brokers import open_broker
from common.errors import BrokerUnavailable, UserError
from deploy.local_rabbitmq import LocalRabbitMQ
from tests.e2e.test_processes import shared_encoder

Peer = Callable[[socket.socket], None]
OVER = threading.Event()


def silent(client: socket.socket) -> None:
    OVER.wait(30.0)


def closes(client: socket.socket) -> None:
    pass


def web_server(client: socket.socket) -> None:
    client.recv(100)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n400 Bad Request")


def ssh_server(client: socket.socket) -> None:
    client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    OVER.wait(30.0)


def other_version(client: socket.socket) -> None:
    client.recv(8)
    client.sendall(b"AMQP\x00\x01\x00\x00")


def broken_frame(client: socket.socket) -> None:
    client.sendall(b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x0b\xce")
    OVER.wait(30.0)


def drips(client: socket.socket) -> None:
    """Never silent, and never done: a frame of 4 GB begins."""
    client.sendall(b"\x01\x00\x00\xff\xff\xff\xff")
    while not OVER.wait(0.1):
        client.sendall(b"x")


PEERS = (silent, closes, web_server, ssh_server, other_version, broken_frame, drips)


@contextmanager
def listening(peer: Peer, port: int = 0) -> Iterator[int]:
    """A port at which `peer` deals with every connection, in a thread of its own."""
    OVER.clear()

    def serve(client: socket.socket) -> None:
        with client:
            try:
                peer(client)
            except OSError:
                return  # the other side has given up

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return  # the test is over
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", port)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        OVER.set()


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)
def test_f4_a_peer_that_does_not_speak_amqp_is_one_line_in_time(peer: Peer, scheme: str) -> None:
    with listening(peer) as port:
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable, match=rf"no broker answers at 127\.0\.0\.1:{port}: ") as raised:
            open_broker(f"{scheme}://127.0.0.1:{port}/", client_name="t", dead_letters="d", connect_timeout=1.0)
        assert time.monotonic() - began < 2.0
        assert "\n" not in str(raised.value)
        # a peer that closes at once may be seen as a reset connection, before anything of TLS was said
        assert "TLS" in str(raised.value) or scheme == "amqp" or "reset" in str(raised.value)


@pytest.mark.parametrize("peer", [silent, web_server, closes], ids=lambda peer: peer.__name__)
def test_f4_the_command_ends_with_the_exit_code_of_a_broker_that_is_away(peer: Peer) -> None:
    with listening(peer) as port:
        result = shared_encoder(
            "status",
            "--broker",
            f"amqp://127.0.0.1:{port}/",
            SHARED_ENCODER_BROKER__CONNECT_TIMEOUT_SECONDS="1",
        )
    assert result.returncode == 3, result.stderr
    assert result.stderr.count("\n") == 1 and f"no broker answers at 127.0.0.1:{port}" in result.stderr
    assert "is it RabbitMQ's port" in result.stderr


def test_f4_tls_and_plain_are_told_apart(private_rabbitmq: LocalRabbitMQ, tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match=r"does it speak TLS on this port, as amqps:// says"):
        open_broker(
            private_rabbitmq.url.replace("amqp://", "amqps://"),
            client_name="t",
            dead_letters="d",
            connect_timeout=1.0,
        )
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def tls(client: socket.socket) -> None:
        with context.wrap_socket(client, server_side=True) as secured:
            secured.recv(8)

    with listening(tls) as port:
        with pytest.raises(BrokerUnavailable, match=r"does it want TLS \(amqps://\)"):
            open_broker(f"amqp://127.0.0.1:{port}/", client_name="t", dead_letters="d", connect_timeout=1.0)
        with pytest.raises(UserError, match=r"is not signed by a CA that this system trusts: put the broker's own"):
            open_broker(f"amqps://127.0.0.1:{port}/", client_name="t", dead_letters="d", connect_timeout=1.0)
