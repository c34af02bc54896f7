"""A CA, a server's certificate and clients' certificates, for trials of TLS where an organisation has no CA at hand.

Their keys lie beside them in the clear: who has the folder is everybody. A federation in earnest has a CA of its own.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import UserError

#: As long as X.509 lets a common name be.
_LONGEST_NAME = 64
#: Clocks differ: certificates are good from a little earlier on.
_EARLIER = datetime.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as they lie in a folder."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    certificate_file: Path
    key_file: Path


class Authority:
    """A CA in `directory` (`ca.pem`, `ca-key.pem`), made if it is not there. What it signs lies beside it."""

    def __init__(self, directory: Path, *, days: float) -> None:
        """`days`: how long what is made is good. Raises UserError for a CA that cannot be read."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = directory
        self._days = days
        self.certificate_file, key_file = directory / "ca.pem", directory / "ca-key.pem"
        if self.certificate_file.exists():
            self._certificate, self._key = _read(self.certificate_file, key_file)
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shared-encoder trial CA")])
        made = self._builder(name, name, self._key, None).add_extension(x509.BasicConstraints(True, 0), critical=True)
        made = made.add_extension(_usage(signs=True), critical=True)
        self._certificate = made.sign(self._key, hashes.SHA256())
        _write(self._certificate, self._key, self.certificate_file, key_file)

    def server(self, hosts: Sequence[str]) -> Pair:
        """`server.pem`, for hosts by names and addresses. Raises UserError for none, or if there is one."""
        if not hosts:
            raise UserError("for which host is the server's certificate? give --host NAME, as nodes will write it")
        names = [_host(each) for each in hosts]
        return self._signed("server", hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, x509.SubjectAlternativeName(names))

    def client(self, account: str) -> Pair:
        """`ACCOUNT.pem`, whose common name is that of an account at the broker. Raises UserError if there is one."""
        return self._signed(account, account, ExtendedKeyUsageOID.CLIENT_AUTH, None)

    def _signed(
        self, file: str, name: str, purpose: x509.ObjectIdentifier, names: x509.SubjectAlternativeName | None
    ) -> Pair:
        certificate_file, key_file = self._directory / f"{file}.pem", self._directory / f"{file}-key.pem"
        if certificate_file.exists():
            raise UserError(f"{certificate_file} is there already; remove it to have another one made")
        if len(name) > _LONGEST_NAME:
            raise UserError(f"{name!r} is too long for a certificate's name: at most {_LONGEST_NAME} letters")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(subject, self._certificate.subject, key, self._key.public_key())
        made = made.add_extension(x509.BasicConstraints(False, None), critical=True)
        made = made.add_extension(_usage(signs=False), critical=True)
        made = made.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if names is not None:
            made = made.add_extension(names, critical=False)
        certificate = made.sign(self._key, hashes.SHA256())
        _write(certificate, key, certificate_file, key_file)
        return Pair(certificate, key, certificate_file, key_file)

    def _builder(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        issuers_key: ec.EllipticCurvePublicKey | None,
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        until = now + datetime.timedelta(days=self._days)
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number())
        made = made.not_valid_before(min(now, until) - _EARLIER).not_valid_after(until)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers_key or key.public_key())
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        return made.add_extension(own, critical=False).add_extension(identifier, critical=False)


def server_settings(authority: Authority, server: Pair) -> str:
    """The lines of rabbitmq.conf that use these: TLS for everybody, certificates as logins."""
    return "\n".join(
        (
            "listeners.ssl.default = 5671",
            f"ssl_options.cacertfile = {authority.certificate_file.absolute()}",
            f"ssl_options.certfile = {server.certificate_file.absolute()}",
            f"ssl_options.keyfile = {server.key_file.absolute()}",
            "ssl_options.verify = verify_peer",
            "ssl_options.fail_if_no_peer_cert = true",
            "auth_mechanisms.1 = EXTERNAL",
            "auth_mechanisms.2 = PLAIN",
            "ssl_cert_login_from = common_name",
        )
    )


def client_settings(authority: Authority, client: Pair, account: str, host: str) -> str:
    """The section of a party's file that uses these."""
    return "\n".join(
        (
            "[broker]",
            f'urls = ["amqps://{f"[{host}]" if ":" in host else host}:5671/"]',
            f'ca_file = "{authority.certificate_file.absolute()}"',
            f'cert_file = "{client.certificate_file.absolute()}"',
            f'key_file = "{client.key_file.absolute()}"',
            f'account = "{account}"',
        )
    )


def _host(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    try:
        return x509.DNSName(name)
    except ValueError:
        raise UserError(f"--host {name!r}: a host's name is written in ASCII letters, or as an address") from None


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _read(certificate_file: Path, key_file: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    except OSError as error:
        raise UserError(f"the CA that is there already: {error.filename}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise UserError(f"{certificate_file} and {key_file} are no CA of this command's") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{key_file} is no key of this command's")
    if key.public_key() != certificate.public_key():  # nobody would trust what it signs
        raise UserError(f"{key_file} is not the key of {certificate_file}")
    return certificate, key


def _write(
    certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, certificate_file: Path, key_file: Path
) -> None:
    """The key before its certificate, and never readable by others, not even for a moment."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key_file.unlink(missing_ok=True)
    with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
