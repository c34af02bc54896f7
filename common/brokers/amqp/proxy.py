"""The way out through a proxy, for who may not go straight: HTTP CONNECT, or SOCKS5. Knows no driver."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from common.broker_url import split_proxy
from common.errors import BrokerUnavailable, SharedEncoderError, UserError

#: How long a proxy may take to get through to the broker, seconds.
PROXY_SECONDS = 10.0


class Proxy:
    """One proxy. Its errors name it and never its password."""

    def __init__(self, url: str) -> None:
        """Raises UserError for a URL of another kind."""
        self._parts = split_proxy(url)
        host = f"[{self._parts.hostname}]" if ":" in (self._parts.hostname or "") else self._parts.hostname
        self.where = f"{host}:{self._parts.port}"
        self._user = unquote(self._parts.username or "")
        self._password = unquote(self._parts.password or "")

    def connect(self, host: str, port: int, timeout: float = PROXY_SECONDS) -> socket.socket:
        """A connection to `host`, whose name the proxy looks up. Raises BrokerUnavailable, or UserError for what no
        waiting mends: a proxy that wants a password, or does not let us through."""
        try:
            return (self._by_connect if self._parts.scheme == "http" else self._by_socks)(host, port, timeout)
        except OSError as error:
            raise self._explained(f"{host}:{port}", error) from None

    def _by_connect(self, host: str, port: int, timeout: float) -> socket.socket:
        connection = http.client.HTTPConnection(self._parts.hostname or "", self._parts.port, timeout=timeout)
        headers = {}
        if self._user:
            basic = base64.b64encode(f"{self._user}:{self._password}".encode()).decode()
            headers["Proxy-Authorization"] = f"Basic {basic}"
        connection.set_tunnel(host, port, headers)
        try:
            connection.connect()
        except http.client.HTTPException as error:
            connection.close()
            raise OSError(f"it does not answer as a proxy does ({type(error).__name__})") from None
        except BaseException:  # whatever it was: the socket must not stay open
            connection.close()
            raise
        return connection.sock

    def _by_socks(self, host: str, port: int, timeout: float) -> socket.socket:
        from python_socks import ProxyError, ProxyType
        from python_socks.sync import Proxy as Socks

        proxy = Socks(
            ProxyType.SOCKS5,
            self._parts.hostname or "",
            self._parts.port or 0,
            self._user or None,
            self._password or None,
            rdns=True,
        )
        try:
            made: socket.socket = proxy.connect(host, port, timeout=timeout)
        except ProxyError as error:
            raise OSError(str(error)) from None
        return made

    def _explained(self, broker: str, error: OSError) -> SharedEncoderError:
        said = str(error) or repr(error)
        if "Tunnel connection failed: 407" in said or "authentication" in said.lower():
            return UserError(
                f"the proxy at {self.where} wants a user and a password, or others: broker.proxy = "
                f"{self._parts.scheme}://user:password@host:port ({said})"
            )
        if "Tunnel connection failed: 4" in said or "not allowed" in said.lower():
            return UserError(f"the proxy at {self.where} lets nobody through to {broker} ({said})")
        if isinstance(error, socket.gaierror | ConnectionRefusedError) or error.errno is not None:
            return BrokerUnavailable(f"no proxy answers at {self.where} ({said})")
        return BrokerUnavailable(f"the proxy at {self.where} does not get through to {broker} ({said})")


class Tunnelled:
    """For the driver's own I/O services, before them in the order of bases: who connects, connects through a proxy.

    The connection is made in the calling thread, which waits for it; it has nothing else to do before there is one.
    """

    proxy: Proxy
    destination: tuple[str, int]
    timeout: float = PROXY_SECONDS
    _tunnel: socket.socket | None = None

    def getaddrinfo(self, host: str, port: int, on_done: Callable[[Any], None], **others: Any) -> Any:
        """The proxy looks the name up, so there is one address, which is no address."""
        return self._soon(on_done, [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("0.0.0.0", port))])

    def connect_socket(self, sock: socket.socket, resolved_addr: Any, on_done: Callable[[Any], None]) -> Any:
        """Connect, but not the driver's socket: the proxy's library makes its own."""
        try:
            self._tunnel = self.proxy.connect(*self.destination, self.timeout)
        except SharedEncoderError as error:
            return self._soon(on_done, error)
        self._tunnel.setblocking(False)
        self._tunnel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._soon(on_done, None)

    def create_streaming_connection(
        self,
        protocol_factory: Callable[[], Any],
        sock: socket.socket,
        on_done: Callable[[Any], None],
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> Any:
        """With the connection that was made, in place of the driver's socket."""
        sock.close()
        tunnel, self._tunnel = self._tunnel, None
        services: Any = super()
        return services.create_streaming_connection(
            protocol_factory, tunnel, on_done, ssl_context=ssl_context, server_hostname=server_hostname
        )

    def _soon(self, on_done: Callable[[Any], None], result: Any) -> Any:
        """Report from the loop, as the driver expects it; what it gets can be cancelled."""
        services: Any = self
        handle = services.call_later(0, lambda: on_done(result))

        def closed() -> None:
            with contextlib.suppress(OSError):
                if self._tunnel is not None:
                    self._tunnel.close()

        return _Cancelled(handle, closed)


class _Cancelled:
    """What the driver may cancel, with the socket that nobody wants then."""

    def __init__(self, handle: Any, closed: Callable[[], None]) -> None:
        self._handle = handle
        self._closed = closed

    def cancel(self) -> bool:
        self._closed()
        return bool(self._handle.cancel())
