"""A RabbitMQ of three servers on this machine, of which any one can be killed or cut off from the others."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deploy.local_rabbitmq import LocalRabbitMQ, end_mapper, free_port

_SERVERS = 3
#: Who is with a minority stops taking anything (and its clients go elsewhere) until it is with a majority again.
#: Whoever does not answer for so many seconds is away.
_SETTINGS = "cluster_partition_handling = pause_minority\nnet_ticktime = 8\n"
_PATIENCE_SECONDS = 60.0


class LocalCluster:
    """Servers with `urls`, in order. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._cookie, self._mapper = secrets.token_hex(16), free_port()
        together = (self._cookie, self._mapper)
        self.servers = [
            LocalRabbitMQ(directory / f"server-{number}", settings=_SETTINGS, together=together)
            for number in range(_SERVERS)
        ]

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(server.url for server in self.servers)

    def __enter__(self) -> LocalCluster:
        try:
            with ThreadPoolExecutor(_SERVERS) as threads:
                list(threads.map(LocalRabbitMQ.start, self.servers))
            first, *others = self.servers
            for server in others:
                for command in (("stop_app",), ("reset",), ("join_cluster", first.node), ("start_app",)):
                    server.ctl(*command)
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor(_SERVERS) as threads:
            list(threads.map(LocalRabbitMQ.kill, self.servers))
        end_mapper(self._mapper)

    def is_alive(self, number: int) -> bool:
        """Whether its process is there, though it may be cut off."""
        return self.servers[number].running

    def kill(self, number: int) -> None:
        """SIGKILL one of them."""
        self.servers[number].kill()

    def start(self, number: int) -> None:
        """Start it again, and wait until all see each other."""
        self.servers[number].start()
        self.wait()

    def cut_off(self, number: int) -> None:
        """No distribution between this server and the others: it refuses their cookie, and they its. It pauses; its
        clients see their connections end."""
        self.servers[number].ctl("eval", "[{erlang:set_cookie(N, apart), erlang:disconnect_node(N)} || N <- nodes()].")
        self._eventually(lambda: self._up(number) is None, "a server that is alone to pause")

    def join(self, number: int) -> None:
        """The end of `cut_off`."""
        others = ", ".join(f"'{server.node}'" for server in self.servers if server is not self.servers[number])
        self.servers[number].ctl("eval", f"[erlang:set_cookie(N, '{self._cookie}') || N <- [{others}]].")
        self.wait()

    def wait(self) -> None:
        """Until all of them are up and see each other."""
        self._eventually(
            lambda: all(self._up(number) == _SERVERS for number in range(_SERVERS)), "the servers to see each other"
        )

    def members(self, queue: str, *, at: int = 0) -> int:
        """On how many servers a quorum queue or a stream is kept, as server `at` knows it."""
        listed = self.servers[at].ctl("-q", "list_queues", "name", "members", "--no-table-headers")
        found = next(line for line in listed.splitlines() if line.split("\t")[0] == queue)
        return found.count("@")

    def _up(self, number: int) -> int | None:
        """How many servers this one sees, itself included; None if it takes nothing itself."""
        program = "case rabbit:is_running() of true -> length(rabbit_nodes:all_running()); false -> none end."
        with contextlib.suppress(subprocess.CalledProcessError, ValueError):
            return int(self.servers[number].ctl("eval", program))
        return None

    def _eventually(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited {_PATIENCE_SECONDS:.0f} s for {what}"
            time.sleep(0.5)
