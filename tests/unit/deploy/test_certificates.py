"""Certificates for trials, and what is wrong with those that a party was given, before anything is connected to."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from pydantic import ValidationError
from typer.testing import CliRunner

from common.broker_url import Access
from common.brokers import open_broker
from common.config import BrokerConfig
from common.errors import UserError
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
    return made


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


def test_the_command_makes_what_openssl_finds_good_and_keeps_the_keys_to_itself(tmp_path: Path) -> None:
    made = tmp_path / "certificates"
    arguments = ["broker", "certs", str(made), "--host", "broker.example", "--host", "10.0.0.7", "--client", "clinic-a"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    certificates = {"server.pem": "sslserver", "shared-encoder.clinic-a.pem": "sslclient"}
    for name, purpose in certificates.items():
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(made / "ca.pem")]
        assert subprocess.run([*command, str(made / name)], capture_output=True).returncode == 0
        key = made / name.replace(".pem", "-key.pem")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((made / "ca-key.pem").stat().st_mode) == 0o600
    for line in ("auth_mechanisms.1 = EXTERNAL", f"ssl_options.keyfile = {made}/server-key.pem"):
        assert line in result.output.splitlines()
    section = re.search(r"\[broker\]\n(.+\n)+", result.output)
    assert section is not None
    file = tmp_path / "run.toml"
    file.write_text(section[0])
    broker = load_config(file, {}).broker
    assert broker.account == "shared-encoder.clinic-a" and broker.ca_file == made / "ca.pem"
    with pytest.raises(UserError, match=r"server\.pem is there already; remove it"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    before = (made / "ca.pem").read_bytes()
    assert CliRunner().invoke(app, ["broker", "certs", str(made), "--client", "clinic-b"]).exit_code == 0
    assert (made / "ca.pem").read_bytes() == before, "the CA that is there signs the next"


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
