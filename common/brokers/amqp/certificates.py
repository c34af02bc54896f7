"""Certificates that a party is given for its broker, read and checked at the start: what is wrong is one line."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from common.broker_url import Access
from common.clock import SYSTEM
from common.errors import UserError


def context_of(access: Access) -> ssl.SSLContext | None:
    """How TLS is spoken with `access.ca_file`, `cert_file` and `key_file`; None if there are none, and the driver's own
    way does. Raises UserError for a file that is not there, is not what it should be, or is out of date."""
    if access.ca_file is None and access.cert_file is None:
        return None
    if access.ca_file is not None:
        _check_dates("broker.ca_file", access.ca_file, _certificates("broker.ca_file", access.ca_file))
    try:
        context = ssl.create_default_context(cafile=str(access.ca_file) if access.ca_file is not None else None)
        if access.cert_file is not None:
            key_file = _checked_pair(access.cert_file, access.key_file)
            context.load_cert_chain(access.cert_file, key_file, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        # what was read a moment ago, and is no good to OpenSSL: a key that is too short, a signature that is too weak
        raise UserError(f"broker.ca_file, cert_file, key_file: OpenSSL does not take them: {error}") from None
    return context


def _checked_pair(cert_file: Path, key_file: Path | None) -> Path:
    """The key's file, which may be the certificate's own. Raises UserError if they are no pair."""
    certificates = _certificates("broker.cert_file", cert_file)
    name, file = ("broker.key_file", key_file) if key_file is not None else ("broker.cert_file", cert_file)
    where = f"{name} {file}"
    pem = _read(name, file)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise UserError(
            f"{where}: the key is encrypted; give one without a passphrase, readable by you alone"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        hint = "" if key_file is not None else "; put it into broker.key_file"
        raise UserError(f"{where}: there is no private key in it (PEM){hint}") from None
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*form) != certificates[0].public_key().public_bytes(*form):
        raise UserError(f"{where}: that key does not belong to the certificate in {cert_file}")
    _check_dates("broker.cert_file", cert_file, certificates[:1])
    return file


def _certificates(name: str, file: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(name, file))
    except ValueError:
        raise UserError(f"{name} {file}: there is no certificate in it (PEM)") from None


def _read(name: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{name} {file}: {error.strerror}") from None


def _check_dates(name: str, file: Path, certificates: list[x509.Certificate]) -> None:
    """Raises UserError if none of them is good now."""
    wrong = [out_of_date(each) for each in certificates]
    if all(wrong):
        raise UserError(f"{name} {file}: the certificate {wrong[0]}")


def out_of_date(certificate: x509.Certificate) -> str:
    """`expired on …`, or `is not valid before …`, if that is so by this machine's clock; else nothing."""
    now = datetime.datetime.fromtimestamp(SYSTEM.now(), datetime.UTC)
    if now > certificate.not_valid_after_utc:
        return f"expired on {_shown(certificate.not_valid_after_utc)}"
    if now < certificate.not_valid_before_utc:
        return f"is not valid before {_shown(certificate.not_valid_before_utc)} (here it is {_shown(now)})"
    return ""


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses of hosts that a certificate is for: what TLS goes by, else the name it bears."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        bare = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return [f"{each.value!s} (as its common name alone)" for each in bare]
    addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address | ipaddress.IPv4Network | ipaddress.IPv6Network]
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def _shown(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
