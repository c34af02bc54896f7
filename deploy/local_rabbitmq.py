"""A private RabbitMQ on this machine: own ports on 127.0.0.1, own directories, nothing left behind when it ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from common.errors import UserError

_START_SECONDS = 60.0
#: Where distributions keep the package's own scripts; those in sbin switch to the system's user.
_PLACES = ("/usr/lib/rabbitmq/bin", "/usr/local/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/opt/homebrew/sbin")
_HINT = (
    "no RabbitMQ server program is installed: `apt-get install rabbitmq-server` (or your system's package), "
    "or set AMQP_URL to a broker that may be used"
)


def server_program(name: str = "rabbitmq-server") -> Path:
    """The package's own script. Raises UserError with the hint how to install it."""
    for place in _PLACES:
        if (found := Path(place) / name).exists():
            return found
    raise UserError(_HINT)


class LocalRabbitMQ:
    """One server in `directory`. A context manager; `stop` and `start` keep the data, `kill` is SIGKILL."""

    def __init__(
        self,
        directory: Path,
        *,
        settings: str = "",
        plugins: Sequence[str] = (),
        together: tuple[str, int] | None = None,
    ) -> None:
        """`settings`: more lines of its configuration, in which TLS_PORT is a port of its own. `together`: the cookie
        and the port of the mapper (epmd) that it shares with the others of a cluster; whoever made them ends the
        mapper, with `end_mapper`."""
        self._program = server_program()
        self._directory = directory
        self.port = free_port()
        self.tls_port = free_port()
        self._distribution_port = free_port()
        self._own_mapper = together is None
        cookie_words, self._epmd_port = together or (secrets.token_hex(16), free_port())
        self.node = f"shared-encoder-{self.port}@localhost"
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nloopback_users = none\nlog.console = false\n"
            "vm_memory_high_watermark.absolute = 2GB\ndisk_free_limit.absolute = 50MB\n"
            + settings.replace("TLS_PORT", str(self.tls_port))
        )
        (directory / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
        # in a file, as Erlang looks for it in HOME: what stands in the arguments of a process, everybody can read
        cookie = directory / ".erlang.cookie"
        cookie.unlink(missing_ok=True)
        cookie.touch(0o600)
        cookie.write_text(cookie_words)
        cookie.chmod(0o400)
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RABBITMQ_")},
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    @property
    def running(self) -> bool:
        """Whether it was started and not ended; whatever it is doing."""
        return self._process is not None

    @property
    def url(self) -> str:
        """For the account that every fresh RabbitMQ has."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def __enter__(self) -> LocalRabbitMQ:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it takes connections. Raises UserError with its last words if it does not."""
        log = (self._directory / "console.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [str(self._program)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                words = (self._directory / "console.log").read_text(errors="replace").strip().splitlines()[-3:]
                raise UserError(f"RabbitMQ did not start: {' '.join(words)}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End cleanly (SIGTERM), with everything that it started."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End at once, as a power cut would."""
        self._end(signal.SIGKILL)

    def forget(self) -> None:
        """While it is down: lose all that it kept, as with a new disk."""
        shutil.rmtree(self._directory / "data")

    def ctl(self, *arguments: str, given: str = "") -> str:
        """Run rabbitmqctl against this server, with `given` as its input; gives what it prints. Raises
        CalledProcessError."""
        command = [str(server_program("rabbitmqctl")), "-n", self.node, *arguments]
        done = subprocess.run(command, env=self._environment, input=given, check=True, capture_output=True, text=True)
        return done.stdout

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        group = process.pid  # of a session of its own: the script, the Erlang machine and its helpers
        _signal_group(group, number)
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            _signal_group(group, signal.SIGKILL)
            process.wait()
        _signal_group(group, signal.SIGKILL)
        if self._own_mapper:
            end_mapper(self._epmd_port)

    def _answers(self) -> bool:
        """Whether it speaks AMQP: it answers a wrong greeting with the right one."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
                connection.settimeout(2.0)
                connection.sendall(b"AMQP\x00\x00\x09\x09")
                return connection.recv(4) == b"AMQP"
        except OSError:
            return False


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # all of it has ended


def end_mapper(port: int) -> None:
    """End the port mapper at this port, and whatever else was started with it."""
    for pid in _started_with(port):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _started_with(port: int) -> list[int]:
    """What is left of the server: its Erlang port mapper is a daemon outside its session; found by its own port."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"ERL_EPMD_PORT={port}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # ended meanwhile, or somebody else's
    return found


def free_port() -> int:
    """One that nobody has now. Below those that systems give to outgoing connections: while the server is down, a
    client that tries to connect to a port of theirs can be given that very port, and is then connected to itself."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
