"""TLS with real servers: a certificate that is not good is said in words and at once, and with good ones it works, as
a login too, over several URLs and through a proxy."""

from __future__ import annotations

import datetime
import queue
import re
import socket
import ssl
import subprocess
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.broker_url import Access
from common.brokers import open_broker
from common.brokers.amqp.rabbitmq import READ_BYTES
from common.errors import AccessRefused, BrokerUnavailable, Unpublishable, UserError
from common.wire.broker import Broker, Delivery, Publication
from common.wire.topology import Binding, Declarations, Exchange, Queue
from deploy.broker.certificates import Authority, Pair, server_settings
from deploy.local_rabbitmq import LocalRabbitMQ
from tests.integration.harness import eventually
from tests.integration.peers import Greet, between, http_proxy, says_nothing, socks_proxy, straight_to
from tests.integration.test_strangers import listening

DECLARED = Declarations((Exchange("x"),), (Queue("q"),), (Binding("x", "q", "#"),))


def opened(access: Access) -> Broker:
    """What waiting could mend would be waited for here, until the test's own time is over."""
    return open_broker(access, client_name="t", dead_letters="dead", connect_timeout=120.0)


# --- what is wrong with a certificate ---------------------------------------------------------------------------------


@dataclass
class Trial:
    """A CA, and a folder for what is not signed by it."""

    directory: Path
    authority: Authority

    def server(self, host: str = "127.0.0.1", *, days: float = 9, authority: Authority | None = None) -> Pair:
        """A server's certificate, each in a folder of its own, signed by the CA unless another is given."""
        directory = self.directory / f"server-{host}-{days}-{id(authority)}"
        directory.mkdir()
        for name in ("ca.pem", "ca-key.pem"):
            (directory / name).write_bytes((self.directory / "ca" / name).read_bytes())
        return (authority or Authority(directory, days=days)).server([host])


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path, Authority(tmp_path / "ca", days=9))


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are made ten days from now."""

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(days=10)

    fake = types.SimpleNamespace(datetime=Later, timedelta=datetime.timedelta, UTC=datetime.UTC)
    monkeypatch.setattr("deploy.broker.certificates.datetime", fake)


def not_signed(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    return trial.server(authority=Authority(trial.directory / "other", days=9)), {}


def trusted_by_nobody(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    return trial.server(), {"ca_file": None}


def expired(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    return trial.server(days=-3), {}


def not_yet(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    later(monkeypatch)
    return trial.server(), {}


def other_host(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    return trial.server("broker.example"), {}


def no_server(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    return trial.authority.client("somebody"), {}


def not_signed_but_trusted_here(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    other = Authority(trial.directory / "other", days=9)
    monkeypatch.setenv("SSL_CERT_FILE", str(other.certificate_file))
    return trial.server(authority=other), {}


def other_host_trusted_here(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    monkeypatch.setenv("SSL_CERT_FILE", str(trial.authority.certificate_file))
    return trial.server("broker.example"), {"ca_file": None}


def signed_by_itself(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    return made_otherwise(trial, "-addext subjectAltName=IP:127.0.0.1"), {}


def signed_by_a_party(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    """Who has a client's certificate is not the broker."""
    party = trial.authority.client("party")
    extensions = "-addext basicConstraints=CA:FALSE -addext subjectAltName=IP:127.0.0.1"
    pair = made_otherwise(trial, extensions, "-CA", party.certificate_file, "-CAkey", party.key_file)
    with pair.certificate_file.open("ab") as chain:
        chain.write(party.certificate_file.read_bytes())
    return pair, {}


def common_name_alone(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    ca = "-CA", trial.authority.certificate_file, "-CAkey", trial.directory / "ca" / "ca-key.pem"
    return made_otherwise(trial, "-addext basicConstraints=CA:FALSE", *ca), {}


def made_otherwise(trial: Trial, extensions: str, *signed_by: str | Path) -> Pair:
    """A pair that no command of ours makes, for 127.0.0.1 by its common name."""
    files = trial.directory / "otherwise.pem", trial.directory / "otherwise-key.pem"
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=127.0.0.1 {extensions}"
    named = "-out", files[0], "-keyout", files[1]
    subprocess.run([*command.split(), *signed_by, *named], check=True, capture_output=True)
    key = serialization.load_pem_private_key(files[1].read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Pair(x509.load_pem_x509_certificate(files[0].read_bytes()), key, *files)


def old_ca(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, dict[str, Any]]:
    """It is one of two in the file, the other of which is good: that is how a CA is replaced."""
    old = Authority(trial.directory / "old", days=-3)
    both = trial.directory / "both.pem"
    both.write_bytes(old.certificate_file.read_bytes() + trial.authority.certificate_file.read_bytes())
    return Authority(trial.directory / "old", days=9).server(["127.0.0.1"]), {"ca_file": both}


def validity(pair: Pair) -> dict[str, str]:
    """The two days of its certificate, as the file says them: a test that runs at midnight has no day of its own."""
    certificate = x509.load_pem_x509_certificate(pair.certificate_file.read_bytes())
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return {"begin": f"{begin:%Y-%m-%d %H:%M}", "end": f"{end:%Y-%m-%d %H:%M}"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (not_signed, "the certificate of the broker at {where} is not signed by the CA in {ca}"),
        (trusted_by_nobody, "the certificate of the broker at {where} is not signed by a CA that this system trusts: "),
        (expired, "the certificate of the broker at {where} expired on {end} UTC"),
        (not_yet, "the certificate of the broker at {where} is not valid before {begin} UTC"),
        (other_host, "the certificate of the broker at {where} is for host broker.example, not 127.0.0.1"),
        (no_server, "the certificate of the broker at {where} is not one for a server"),
        (not_signed_but_trusted_here, "the certificate of the broker at {where} is not signed by the CA in {ca}"),
        (other_host_trusted_here, "the certificate of the broker at {where} is for host broker.example, not 127.0.0.1"),
        (signed_by_itself, "the certificate of the broker at {where} is not signed by the CA in {ca}"),
        (signed_by_a_party, "the certificate of the broker at {where} is not signed by the CA in {ca}"),
        (
            common_name_alone,
            "the certificate of the broker at {where} is for host 127.0.0.1 (as its common name alone), not 127.0.0.1",
        ),
        (old_ca, "the certificate of the broker at {where} is one of a chain of which another has expired"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_brokers_certificate_that_is_not_good_is_said_in_words_and_at_once(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., tuple[Pair, dict[str, Any]]], words: str
) -> None:
    pair, changes = wrong(trial, monkeypatch)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate_file, pair.key_file)
    with listening(serving(context)) as port:
        access = Access((f"amqps://127.0.0.1:{port}/",), ca_file=trial.authority.certificate_file)
        with pytest.raises(UserError) as refused:
            opened(replace(access, **changes))
    wanted = words.format(where=f"127.0.0.1:{port}", ca=trial.authority.certificate_file, **validity(pair))
    assert str(refused.value).startswith(wanted) and "\n" not in str(refused.value)
    assert "running there" not in str(refused.value) and not isinstance(refused.value, AccessRefused)


def serving(context: ssl.SSLContext) -> Callable[[socket.socket], None]:
    def serve(client: socket.socket) -> None:
        with context.wrap_socket(client, server_side=True) as secured:
            while secured.recv(100):
                pass

    return serve


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda each: each.name)
@pytest.mark.parametrize("given", ["none", "of another CA", "a server's"])
def test_a_broker_that_asks_for_another_certificate_of_ours_is_understood(
    trial: Trial, version: ssl.TLSVersion, given: str
) -> None:
    """In 1.3 it says so only after the handshake, when the driver has begun to speak and no longer listens."""
    pair, stranger = trial.server(), Authority(trial.directory / "other", days=9).client("somebody")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(trial.authority.certificate_file))
    context.load_cert_chain(pair.certificate_file, pair.key_file)
    context.verify_mode, context.minimum_version, context.maximum_version = ssl.CERT_REQUIRED, version, version
    with listening(serving(context)) as port:
        access = Access((f"amqps://127.0.0.1:{port}/",), ca_file=trial.authority.certificate_file)
        words = "asks for a client certificate"
        if given == "of another CA":
            access = replace(access, cert_file=stranger.certificate_file, key_file=stranger.key_file)
            words = f"does not know the CA that signed the cert.* {stranger.certificate_file}"
        if given == "a server's":
            access = replace(access, cert_file=pair.certificate_file, key_file=pair.key_file)
            words = rf"does not take the certificate in broker\.cert_file {pair.certificate_file} \(.*certificate"
        with pytest.raises(UserError, match=words):
            opened(access)


def speaks_1_1(client: socket.socket) -> None:
    """As what knows nothing newer does: a ServerHello of that version, whatever it was offered."""
    client.recv(4096)
    hello = b"\x03\x02" + bytes(32) + b"\x00" + b"\xc0\x13" + b"\x00"
    body = b"\x02" + len(hello).to_bytes(3, "big") + hello
    client.sendall(b"\x16\x03\x02" + len(body).to_bytes(2, "big") + body)
    client.recv(4096)


def takes_nothing_new(client: socket.socket) -> None:
    client.recv(4096)
    client.sendall(b"\x15\x03\x03\x00\x02\x02\x46")  # a fatal alert: protocol_version


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (speaks_1_1, r"speaks no version of TLS that is safe enough \(unsupported protocol\)$"),
        (takes_nothing_new, r"takes no version of TLS that is spoken here \(.*protocol version\)$"),
    ],
)
def test_a_broker_with_no_tls_of_today_is_no_broker_that_is_away(
    trial: Trial, peer: Callable[[socket.socket], None], words: str
) -> None:
    with listening(peer) as port, pytest.raises(UserError, match=rf"^the broker at 127\.0\.0\.1:{port} {words}"):
        opened(Access((f"amqps://127.0.0.1:{port}/",), ca_file=trial.authority.certificate_file))


# --- RabbitMQ with certificates as logins -----------------------------------------------------------------------------


@dataclass
class Secured:
    """A RabbitMQ that asks for certificates and takes them for logins; `member` has an account, `stranger` has none."""

    server: LocalRabbitMQ
    authority: Authority
    pair: Pair
    member: Access
    stranger: Access

    def at(self, *urls: str, **changes: Any) -> Access:
        return replace(self.member, urls=urls, **changes)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("tls")
    authority = Authority(directory / "certificates", days=9)
    pair = authority.server(["127.0.0.1", "broker.example"])
    settings = server_settings(authority, pair)
    settings = settings.replace("listeners.ssl.default = 5671", "listeners.ssl.1 = 127.0.0.1:TLS_PORT")
    plugins = ("rabbitmq_auth_mechanism_ssl",)
    with LocalRabbitMQ(directory / "rabbitmq", settings=settings, plugins=plugins) as server:
        server.ctl("add_user", "f.member", "secret")
        server.ctl("clear_password", "f.member")
        server.ctl("set_permissions", "f.member", ".*", ".*", ".*")
        parties = {}
        for name in ("member", "stranger"):
            made = authority.client(f"f.{name}")
            parties[name] = Access(
                (f"amqps://127.0.0.1:{server.tls_port}/",),
                authority.certificate_file,
                made.certificate_file,
                made.key_file,
                f"f.{name}",
            )
        yield Secured(server, authority, pair, **parties)


def check(broker: Broker, account: str = "f.member") -> None:
    """What is published arrives, and bears the account: that of the certificate, unless another is given."""
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    broker.declare(DECLARED)
    subscription = broker.consume("q", arrived.put, prefetch=1)
    broker.publish(Publication("x", "k", b"hello"))
    delivery = arrived.get(timeout=60.0)
    broker.ack(delivery)
    subscription.close()
    assert (delivery.body, delivery.user_id) == (b"hello", account)


def test_a_certificate_is_a_login_and_its_account_stands_in_what_is_published(secured: Secured) -> None:
    broker = opened(secured.member)
    check(broker)
    broker.lock("the-lock", lambda: None)  # and over the short connection that leaves its note
    broker.close()
    broker = opened(secured.at(f"amqps://guest:guest@127.0.0.1:{secured.server.tls_port}/", account=None))
    check(broker, "guest")  # the user in a URL is the login, with a certificate too
    broker.close()
    broker = opened(replace(secured.member, account="f.other"))
    with pytest.raises(Unpublishable, match=r"'f\.member'; broker\.account must be the name that the broker knows"):
        broker.publish(Publication("x", "k", b"in another's name"))
    broker.close()


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"cert_file": None, "key_file": None}, UserError, "asks for a client certificate: set broker.cert_file"),
        (
            {"urls": ("amqp://f.member:p@127.0.0.1:TLS/",)},
            UserError,
            "are for TLS: write amqps:// in the URL of 127.0.0.1:",
        ),
        (
            {"urls": ("amqps://f.other:p@127.0.0.1:TLS/",)},
            UserError,
            "and the user in the broker's URL are not",
        ),
        (
            {"urls": ("amqps://127.0.0.1:TLS/?ssl_options={'capath': '/'}",)},
            UserError,
            "has ssl_options, and there is broker.ca_file or cert_file: keep these alone",
        ),
        (
            {
                "urls": ("amqps://127.0.0.1:TLS/?ssl_options={'cafile': 'FILE', 'server_hostname': 'other.example'}",),
                **dict.fromkeys(("ca_file", "cert_file", "key_file")),
            },
            UserError,
            "is for host .*broker.example.*, not other.example$",
        ),
        ({"urls": ("amqps://127.0.0.1:TLS/a", "amqps://127.0.0.1:TLS/b")}, UserError, "different users or vhosts"),
        ({"account": None, "stranger": True}, AccessRefused, "does not let the certificate .* in .*check certificate"),
    ],
)
def test_what_a_rabbitmq_says_of_certificates_is_one_line_at_once(
    secured: Secured, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    access = secured.stranger if changes.pop("stranger", False) else secured.member
    if "urls" in changes:
        real = {"TLS": str(secured.server.tls_port), "FILE": str(secured.authority.certificate_file)}
        changes["urls"] = tuple(re.sub("TLS|FILE", lambda found: real[found[0]], url) for url in changes["urls"])
    with pytest.raises(kind, match=words):
        opened(replace(access, **changes))


@pytest.mark.slow
def test_a_certificate_that_expires_while_a_party_runs_is_said_and_is_final_after_a_while(secured: Secured) -> None:
    """By both of its connections, whose driver is another than that of the start."""
    file = secured.pair.certificate_file
    good, spare = file.read_bytes(), secured.authority.certificate_file.parent
    broker = open_broker(secured.member, client_name="t", dead_letters="dead", refusal_patience=1.0)
    broker.declare(DECLARED)

    def show(certificate: bytes, key: bytes) -> None:
        file.write_bytes(certificate)
        secured.pair.key_file.write_bytes(key)
        secured.server.ctl("eval", "ssl:clear_pem_cache().")
        secured.server.ctl("close_all_connections", "a test")

    key = secured.pair.key_file.read_bytes()
    file.unlink()
    expired = Authority(spare, days=-3).server(["127.0.0.1"])
    try:
        with structlog.testing.capture_logs() as logs:
            show(expired.certificate_file.read_bytes(), expired.key_file.read_bytes())
            end = validity(expired)["end"]
            words = f"the certificate of the broker at 127.0.0.1:{secured.server.tls_port} expired on {end} UTC"
            assert words in eventually(lambda: broker.status().refused, 60.0)
        told = [each for each in logs if each["log_level"] == "warning" and words in each["problem"]]
        assert len(told) == 1 and told[0]["event"] == "refused by the broker"
    finally:
        show(good, key)
    eventually(lambda: broker.status().problem == "" == broker.status().refused, 60.0)
    check(broker)
    broker.close()


def test_a_broker_without_external_logins_says_so(secured: Secured) -> None:
    offer = "application:set_env(rabbit, auth_mechanisms, [{}'PLAIN'])."
    secured.server.ctl("eval", offer.format(""))
    try:
        with pytest.raises(UserError, match=r"takes no certificate as a login \(EXTERNAL\): enable rabbitmq_auth_mech"):
            opened(secured.member)
    finally:
        secured.server.ctl("eval", offer.format("'EXTERNAL', "))


def test_several_urls_are_tried_in_turn_at_the_start_and_after_each_loss(secured: Secured) -> None:
    port = secured.server.tls_port
    with between(straight_to(port)) as first, between(straight_to(port)) as second:
        wrong_host = f"amqps://localhost:{port}/"
        urls = ("amqps://127.0.0.1:1/", wrong_host, *(f"amqps://127.0.0.1:{each.port}/" for each in (first, second)))
        with structlog.testing.capture_logs() as logs:
            broker = opened(secured.at(*urls))
        told = [each["problem"] for each in logs if each["log_level"] == "warning"]
        assert "no broker answers at 127.0.0.1:1:" in told[0]
        assert f"broker at localhost:{port} is for host 127.0.0.1, broker.example, not localhost" in told[1] or (
            f"broker at localhost:{port} is for host broker.example, 127.0.0.1, not localhost" in told[1]
        )
        check(broker)
        assert first.to and not second.to
        first.gone = True
        secured.server.ctl("close_all_connections", "a test")
        eventually(lambda: broker.status().reconnects >= 1 and broker.status().connected, 60.0)
        check(broker)
        assert second.to
        # a loss is shown until the connection after it has held for a moment
        eventually(lambda: broker.status().problem == "" == broker.status().refused, 30.0, "one of four URLs is enough")
        broker.close()


def test_all_urls_that_are_refused_are_named_and_nothing_is_waited_for(secured: Secured) -> None:
    port = secured.server.tls_port
    with between(straight_to(port)) as other:
        urls = [f"amqps://localhost:{each}/" for each in (port, other.port)]
        with pytest.raises(UserError, match=rf"localhost:{port} is for host .*; .*localhost:{other.port} is for host"):
            opened(secured.at(*urls))


def test_a_secured_line_is_read_in_large_pieces_too(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of TLS holds 16 KiB; asked for less, it is read in parts."""
    asked, recv = set[int](), ssl.SSLSocket.recv

    def read(self: ssl.SSLSocket, size: int = 0, flags: int = 0) -> bytes:
        asked.add(size)
        return recv(self, size, flags)

    monkeypatch.setattr(ssl.SSLSocket, "recv", read)
    broker = opened(secured.member)
    check(broker)
    broker.close()
    assert asked == {READ_BYTES}


# --- a proxy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_a_proxy_is_the_way_out_and_it_looks_the_name_up(
    secured: Secured, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here nobody knows `broker.example`, whom the certificate is for. It is not for `localhost`, the proxy."""
    greet = http_proxy("dTpwQHNz") if scheme == "http" else socks_proxy("u:p@ss")

    def looked_up(client: socket.socket) -> tuple[str, int] | None:
        to = greet(client)
        assert to is None or to == ("broker.example", secured.server.tls_port)
        return ("127.0.0.1", to[1]) if to is not None else None

    with between(looked_up) as proxy:
        access = secured.at(
            f"amqps://broker.example:{secured.server.tls_port}/", proxy=f"{scheme}://u:p%40ss@localhost:{proxy.port}"
        )
        broker = opened(access)
        check(broker)
        broker.lock(f"lock-{scheme}", lambda: None)
        if scheme == "http":
            secured.server.ctl("close_all_connections", "a test")
            eventually(lambda: broker.status().reconnects >= 1 and broker.status().connected, 60.0)
            check(broker)
            assert len(proxy.to) >= 5, "both connections, twice, and the one that tries the address"
        broker.close()
        with pytest.raises(UserError, match="not signed by a CA that this system trusts"):
            opened(replace(access, ca_file=None))


WANTS = "the proxy at {proxy} wants a user and a password, or others: .*"
NOT_THROUGH = "the proxy at {proxy} does not get through to 127.0.0.1:9 .*"


@pytest.mark.parametrize(
    ("scheme", "greet", "kind", "words"),
    [
        ("http", http_proxy(answer=b"407 Who are you?"), UserError, WANTS + "407"),
        ("http", http_proxy(answer=b"403 Forbidden"), UserError, "{proxy} lets nobody through to 127.0.0.1:9 .*403"),
        ("http", http_proxy(answer=b"502 Bad Gateway"), BrokerUnavailable, NOT_THROUGH + "502"),
        ("http", http_proxy(answer=b""), BrokerUnavailable, NOT_THROUGH + "does not answer as a proxy does"),
        ("http", says_nothing, BrokerUnavailable, NOT_THROUGH + "timed out"),
        ("http", None, BrokerUnavailable, "no proxy answers at {proxy} .*(refused|Cannot assign)"),
        ("socks5", socks_proxy("me:other"), UserError, WANTS),
        ("socks5", socks_proxy(answer=2), UserError, "{proxy} lets nobody through to 127.0.0.1:9 .*not allowed"),
        ("socks5", socks_proxy(answer=5), BrokerUnavailable, NOT_THROUGH + "refused"),
        ("socks5", http_proxy(), BrokerUnavailable, NOT_THROUGH),
        ("socks5", says_nothing, BrokerUnavailable, NOT_THROUGH + "timed out"),
        ("socks5", None, BrokerUnavailable, "no proxy answers at {proxy} .*(refused|Cannot assign)"),
    ],
)
def test_what_a_proxy_says_is_not_taken_for_the_brokers_words(
    scheme: str, greet: Greet | None, kind: type[Exception], words: str
) -> None:
    with between(greet or says_nothing) as proxy:
        where = "[::1]:1" if greet is None else f"127.0.0.1:{proxy.port}"
        access = Access(("amqp://u:broker-secret@127.0.0.1:9/",), proxy=f"{scheme}://me:proxy-secret@{where}")
        with pytest.raises(kind, match=words.format(proxy=re.escape(where))) as refused:
            open_broker(access, client_name="t", dead_letters="dead", connect_timeout=0.1)
    assert "secret" not in str(refused.value) and "secret" not in repr(access)
