"""Why TLS with a broker did not come about, in words that say what is wrong. Asks the broker once more: the driver has
lost most of it by the time that it reports, and what a broker says after the handshake it often loses altogether."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from socket import socket

from cryptography import x509

from common.brokers.amqp.certificates import hosts_of, out_of_date
from common.errors import BrokerUnavailable, SharedEncoderError, UserError

#: How long a broker may take to say that it does not like our certificate, seconds: it says so after the handshake.
_VERDICT_SECONDS = 2.0

# what OpenSSL found in a certificate (X509_V_ERR_…)
_NOT_YET, _EXPIRED, _PURPOSE = 9, 10, 26
_OTHER_NAME = frozenset((62, 64))
_NOT_SIGNED = frozenset((2, 7, 18, 19, 20, 21, 24, 79))


class Tls:
    """TLS as one party speaks it with one host."""

    def __init__(
        self, context: ssl.SSLContext, host: str, where: str, *, ca_file: Path | None, cert_file: Path | None
    ) -> None:
        """`host`: who the broker's certificate must be for. `where`: host and port, for the words."""
        self._context = context
        self._host = host
        self._where = where
        self._ca_file = ca_file
        self._cert_file = cert_file

    def diagnosis(self, connect: Callable[[], socket]) -> SharedEncoderError | None:
        """What is wrong between us and the broker, by a connection that `connect` makes; None if nothing of TLS is.

        A UserError is what no waiting mends.
        """
        try:
            with closing(connect()) as plain, closing(self._shaken(self._context, plain)) as secured:
                secured.settimeout(_VERDICT_SECONDS)
                secured.recv(1)
        except ssl.SSLCertVerificationError as error:
            return self._not_trusted(error, self._shown(connect))
        except ssl.SSLError as error:
            return self._not_taken(error.reason or str(error))
        except OSError:  # no connection, or nothing more was said: that is not about TLS
            return None
        return None

    def _shaken(self, context: ssl.SSLContext, plain: socket) -> ssl.SSLSocket:
        return context.wrap_socket(plain, server_hostname=self._host)

    def _shown(self, connect: Callable[[], socket]) -> x509.Certificate | None:
        """The certificate that the broker shows, trusted or not; nothing is sent to who shows it."""
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        try:
            with closing(connect()) as plain, closing(self._shaken(trusting, plain)) as secured:
                found = secured.getpeercert(binary_form=True)
            return x509.load_der_x509_certificate(found) if found is not None else None
        except (OSError, ValueError):
            return None

    def _not_trusted(self, error: ssl.SSLCertVerificationError, shown: x509.Certificate | None) -> UserError:
        """What we do not like of the broker's certificate."""
        theirs, code = f"the certificate of the broker at {self._where}", error.verify_code
        if code in _OTHER_NAME:
            names = ", ".join(hosts_of(shown)[:5]) if shown is not None else ""
            return UserError(f"{theirs} is for host {names or '(none)'}, not {self._host}")
        if code in (_EXPIRED, _NOT_YET):
            when = out_of_date(shown) if shown is not None else ""
            other = "is one of a chain of which another " + ("has expired" if code == _EXPIRED else "is not valid yet")
            return UserError(f"{theirs} {when or other}")
        if code in _NOT_SIGNED:
            if self._ca_file is not None:
                return UserError(f"{theirs} is not signed by the CA in {self._ca_file}")
            return UserError(
                f"{theirs} is not signed by a CA that this system trusts: put the broker's own into broker.ca_file"
            )
        if code == _PURPOSE:
            return UserError(f"{theirs} is not one for a server")
        return UserError(f"{theirs} is not good: {error.verify_message}")

    def _not_taken(self, reason: str) -> SharedEncoderError | None:
        """What the broker does not like, by the alert that it sent; `reason` is OpenSSL's name for it."""
        broker, words = f"the broker at {self._where}", reason.lower().replace("_", " ")
        if "ALERT" not in reason:
            if reason in ("UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE", "WRONG_SSL_VERSION"):
                return UserError(f"{broker} speaks no version of TLS that is safe enough ({words})")
            return None  # no TLS at all
        if "PROTOCOL_VERSION" in reason:
            return UserError(f"{broker} takes no version of TLS that is spoken here ({words})")
        ours = self._cert_file
        if ours is None and ("CERTIFICATE" in reason or "HANDSHAKE_FAILURE" in reason):
            return UserError(
                f"{broker} asks for a client certificate: set broker.cert_file and broker.key_file ({words})"
            )
        if ours is not None and "UNKNOWN_CA" in reason:
            return UserError(f"{broker} does not know the CA that signed the certificate in broker.cert_file {ours}")
        if ours is not None and ("CERTIFICATE" in reason or "ACCESS_DENIED" in reason):
            return UserError(f"{broker} does not take the certificate in broker.cert_file {ours} ({words})")
        return BrokerUnavailable(f"{broker} ended the TLS handshake ({words})")
