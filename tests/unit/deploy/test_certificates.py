"""Certificates for trials, and what is wrong with those that a party was given, before anything is connected to."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import ValidationError
from typer.testing import CliRunner

from common.broker_url import Access
from common.brokers import open_broker
from common.config import BrokerConfig
from common.errors import BrokerUnavailable, UserError
from deploy.broker.certificates import Authority
from deploy.cli import app
from deploy.config import load_config


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of two parties, one of which is out of date, and files that are none."""
    made = tmp_path_factory.mktemp("certificates")
    authority = Authority(made, days=9)
    authority.client("a")
    key = authority.client("b").key
    Authority(made, days=-2).client("old")
    Authority(made / "old-ca", days=-2)
    (made / "words").write_text("no certificate")
    passphrase = serialization.BestAvailableEncryption(b"secret")
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, passphrase
    (made / "encrypted").write_bytes(key.private_bytes(*form))
    for chain, files in {"old-chain": ("old.pem", "ca.pem"), "chain": ("a.pem", "old-ca/ca.pem", "ca.pem")}.items():
        (made / chain).write_bytes(b"".join((made / each).read_bytes() for each in files))
    (made / "bundle").write_bytes((made / "old-ca/ca.pem").read_bytes() + (made / "ca.pem").read_bytes())
    openssl("req -x509 -newkey rsa:1024 -nodes -subj /CN=weak -keyout weak-key.pem -out weak.pem", made)
    return made


def openssl(arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *arguments.split()], cwd=directory, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("none", None, None), r"^broker\.ca_file \S+/none: No such file or directory$"),
        (("", None, None), r"^broker\.ca_file \S+: Is a directory$"),
        (("words", None, None), r"^broker\.ca_file \S+/words: there is no certificate in it \(PEM\)$"),
        (("a-key.pem", None, None), r"^broker\.ca_file \S+/a-key\.pem: there is no certificate in it \(PEM\)$"),
        (("old-ca/ca.pem", None, None), r"^broker\.ca_file \S+/ca\.pem: the certificate expired on \d{4}-\d\d-\d\d "),
        (("ca.pem", "none", "a-key.pem"), r"^broker\.cert_file \S+/none: No such file or directory$"),
        (("ca.pem", "words", "a-key.pem"), r"^broker\.cert_file \S+/words: there is no certificate in it \(PEM\)$"),
        (("ca.pem", "old.pem", "old-key.pem"), r"^broker\.cert_file \S+/old\.pem: the certificate expired on \d{4}-"),
        (("ca.pem", "old-chain", "old-key.pem"), r"^broker\.cert_file \S+/old-chain: the certificate expired on "),
        (("ca.pem", "weak.pem", "weak-key.pem"), r"^broker\.ca_file, cert_file, .*: OpenSSL does not take them: "),
        (("ca.pem", "a.pem", "none"), r"^broker\.key_file \S+/none: No such file or directory$"),
        (("ca.pem", "a.pem", "ca.pem"), r"^broker\.key_file \S+/ca\.pem: there is no private key in it \(PEM\)$"),
        (
            ("ca.pem", "a.pem", None),
            r"^broker\.cert_file \S+/a\.pem: there is no private key .*broker\.key_file$",
        ),
        (("ca.pem", "a.pem", "b-key.pem"), r"b-key\.pem: that key does not belong to the certificate in \S+/a\.pem$"),
        (("ca.pem", "b.pem", "encrypted"), r"/encrypted: the key is encrypted; give one without a passphrase"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_one_line_at_once(
    directory: Path, files: tuple[str | None, ...], words: str
) -> None:
    given = [directory / each if each is not None else None for each in files]
    with pytest.raises(UserError, match=words) as refused:
        open_broker(Access(("amqps://127.0.0.1:1/",), *given), client_name="t", dead_letters="d", connect_timeout=60.0)
    assert "\n" not in str(refused.value)


def test_one_of_several_cas_may_be_out_of_date_and_a_certificate_may_have_its_chain_behind_it(directory: Path) -> None:
    given = [directory / each for each in ("bundle", "chain", "a-key.pem")]
    with pytest.raises(BrokerUnavailable, match=r"no broker answers at 127\.0\.0\.1:1: "):
        open_broker(Access(("amqps://127.0.0.1:1/",), *given), client_name="t", dead_letters="d", connect_timeout=0.1)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret@h",
        "http://me:secret@h:0",
        "http://me:secret@h:99999",
        "http://me:secret@:3128",
        "https://me:secret@h:3128",
        "socks4://me:secret@h:1080",
        "me:secret@h:3128",
        "http://me:1/secret@h:3128",
        "http://me:1#secret@h:3128",
    ],
)
def test_no_word_of_a_proxys_url_with_a_password_is_in_an_error(url: str) -> None:
    with pytest.raises(UserError, match=r"^broker\.proxy is no URL of a proxy with its port: write it as ") as refused:
        open_broker(Access(("amqp://h/",), proxy=url), client_name="t", dead_letters="d", connect_timeout=60.0)
    assert "secret" not in str(refused.value)


def test_the_command_makes_what_openssl_finds_good_and_keeps_the_keys_to_itself(tmp_path: Path) -> None:
    made = tmp_path / "certificates"
    arguments = ["broker", "certs", str(made), "--host", "::1", "--host", "broker.example", "--client", "clinic-a"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    account = "shared-encoder.clinic-a"
    for name, its_own in {"server": "sslserver", account: "sslclient"}.items():
        for purpose in ("sslserver", "sslclient"):
            command = f"verify -x509_strict -purpose {purpose} -CAfile ca.pem {name}.pem"
            assert (openssl(command, made).returncode == 0) == (purpose == its_own), (name, purpose)
    an_hour = openssl(f"verify -attime {time.time() - 3000:.0f} -CAfile ca.pem server.pem", made)
    assert an_hour.returncode == 0, "clocks of parties may be a little behind"
    for key in ("ca", "server", account):
        assert stat.S_IMODE((made / f"{key}-key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for line in ("auth_mechanisms.1 = EXTERNAL", f"ssl_options.keyfile = {made}/server-key.pem"):
        assert line in result.output.splitlines()
    section = re.search(r"\[broker\]\n(.+\n)+", result.output)
    assert section is not None
    file = tmp_path / "run.toml"
    file.write_text(section[0])
    broker = load_config(file, {}).broker
    assert broker.access() == Access(
        ("amqps://[::1]:5671/",), made / "ca.pem", made / f"{account}.pem", made / f"{account}-key.pem", account
    )
    with pytest.raises(UserError, match=r"server\.pem is there already; remove it"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    before = (made / "ca.pem").read_bytes()
    for party in ("clinic-b", "master"):
        assert CliRunner().invoke(app, ["broker", "certs", str(made), "--client", party]).exit_code == 0
        assert openssl(f"verify -CAfile ca.pem shared-encoder.{party}.pem", made).returncode == 0
    assert (made / "ca.pem").read_bytes() == before, "the CA that is there signs the next"


def test_what_was_signed_signs_nothing_and_no_ca_signs_another(tmp_path: Path) -> None:
    """Else a party's certificate would make it the broker."""
    signed = Authority(tmp_path, days=9).client("a").certificate
    # said twice, here and in the usage of its key: not everything that speaks TLS looks at both
    assert not signed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    extensions = "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"
    given = [word for each in extensions for word in ("-addext", each)]
    below = ["req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=below", *given, "-CA", "ca.pem"]
    command = [*below, "-CAkey", "ca-key.pem", "-keyout", "below-key.pem", "-out", "below.pem"]
    subprocess.run(["openssl", *command], cwd=tmp_path, check=True, capture_output=True)
    leaf = "req -x509 -newkey ed25519 -nodes -subj /CN=leaf -addext basicConstraints=CA:FALSE -keyout key -out leaf"
    for issuer, words in {"a": "invalid CA certificate", "below": "path length constraint exceeded"}.items():
        assert openssl(f"{leaf} -CA {issuer}.pem -CAkey {issuer}-key.pem", tmp_path).returncode == 0
        verified = openssl(f"verify -CAfile ca.pem -untrusted {issuer}.pem leaf", tmp_path)
        assert verified.returncode != 0 and words in verified.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "^nothing to make: give --host NAME for the broker, --client NAME"),
        (["--client", "../a"], r"^node id '\.\./a': use up to 64 letters"),
        (["--client", "a" * 64], "' is too long for a certificate's name: at most 64 letters$"),
        (["--host", "bücher.example"], "^--host 'bücher.example': a host's name is written in ASCII letters"),
    ],
)
def test_a_name_that_no_certificate_can_bear_is_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CliRunner().invoke(app, ["broker", "certs", str(tmp_path / "made"), *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (None, r"^the CA that is there already: \S+/ca-key\.pem: No such file or directory$"),
        ("words", r"/ca\.pem and \S+/ca-key\.pem are no CA of this command's$"),
        ("encrypted", r"/ca\.pem and \S+/ca-key\.pem are no CA of this command's$"),
        ("weak-key.pem", r"/ca-key\.pem is no key of this command's$"),
        ("a-key.pem", r"/ca-key\.pem is not the key of \S+/ca\.pem$"),
    ],
)
def test_a_ca_that_is_there_and_cannot_sign_is_left_as_it_is(
    directory: Path, tmp_path: Path, key: str | None, words: str
) -> None:
    shutil.copy(directory / "ca.pem", tmp_path)
    if key is not None:
        shutil.copy(directory / key, tmp_path / "ca-key.pem")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=words):
        Authority(tmp_path, days=9)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_key_needs_its_certificate_and_secrets_are_not_shown() -> None:
    with pytest.raises(ValidationError, match="give cert_file too"):
        BrokerConfig(key_file=Path("key.pem"))
    nameless = BrokerConfig.model_validate({"urls": ["amqps://h/"], "cert_file": "a.pem", "accounts": "required"})
    with pytest.raises(UserError, match=r"^broker\.account: name the account"):
        nameless.access()
    config = load_config(None, {"broker": {"urls": ["amqps://u:hush@h/"], "proxy": "http://u:hush@p:3128"}})
    assert "hush" not in repr(config) + repr(config.broker.access())


def test_a_url_of_a_flag_or_of_the_environment_stands_for_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[broker]\nurls = ["amqp://a/", "amqp://b/"]\n')

    def urls(flags: dict[str, Any]) -> tuple[str, ...]:
        return load_config(file, {"broker": flags}).broker.resolved_urls()

    assert urls({}) == ("amqp://a/", "amqp://b/")
    assert urls({"url": "amqp://c/"}) == ("amqp://c/",)
    monkeypatch.setenv("SHARED_ENCODER_BROKER__URL", "amqp://d/")
    assert urls({}) == ("amqp://d/",) and urls({"url": "amqp://c/"}) == ("amqp://c/",)
    monkeypatch.setenv("SHARED_ENCODER_BROKER__URLS", '["amqp://e/", "amqp://f/"]')
    assert urls({}) == ("amqp://e/", "amqp://f/")
