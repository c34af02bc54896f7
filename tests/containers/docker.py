"""The Docker engine of this machine, by its command: images, one container, and a federation as compose.yaml has it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "deploy" / "compose.yaml"
NODES = ("clinic-a", "clinic-b", "clinic-c")
#: Where a service keeps its state, in its container.
STATE = "/var/lib/shared-encoder"


def docker(*arguments: str, timeout: float = 120.0, check: bool = True, given: str | None = None) -> str:
    """What a docker command prints. Raises CalledProcessError with what it said."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout, input=given)
    if check and done.returncode != 0:
        raise AssertionError(f"docker {' '.join(arguments)}: rc {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def missing() -> str | None:
    """What has to be there before anything here can run; None if it is."""
    if shutil.which("docker") is None:
        return "the tests of containers need a Docker engine with compose: there is no command `docker`"
    try:
        docker("compose", "version")
        docker("version")
    except AssertionError as error:
        return f"the tests of containers need a Docker engine with compose: {str(error).splitlines()[-1]}"
    return None


class Federation:
    """The services of compose.yaml under a name of their own, over RabbitMQ of a major version, `3` or `4`."""

    def __init__(self, name: str, rabbitmq: str, versions: int, port: int, **environment: str) -> None:
        self.name = name
        files = min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        self._environment = {
            **os.environ,
            "RABBITMQ": rabbitmq,
            "RABBITMQ_FILES": str(files),
            "VERSIONS": str(versions),
            "AMQPS": f"127.0.0.1:{port}",
            **environment,
        }
        self._command = ["docker", "compose", "-f", str(COMPOSE_FILE), "-p", name]

    def __call__(self, *arguments: str, timeout: float = 300.0, check: bool = True, given: str | None = None) -> str:
        """What a compose command prints."""
        done = subprocess.run(
            [*self._command, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            input=given,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"compose {' '.join(arguments)}: rc {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def operator(self, *arguments: str, check: bool = True) -> str:
        """What one of the operator's commands prints."""
        done = subprocess.run(
            [*self._command, "run", "--rm", "-T", "operator", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"operator {' '.join(arguments)}: rc {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def version(self) -> int:
        """Of the encoder, as the master tells it; -1 while there is none, or nobody answers."""
        try:
            status = json.loads(self.operator("status", "--json", "--timeout", "5"))
        except (AssertionError, ValueError):
            return -1
        return max((int(each["version"]) for each in status["encoders"].values()), default=-1)

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 120.0) -> float:
        """Wait for it, and give the seconds that it took. Raises AssertionError with the services' last words."""
        started = time.monotonic()
        while not holds():
            if time.monotonic() - started > seconds:
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{self('logs', '--tail', '15', check=False)}")
            time.sleep(1.0)
        return time.monotonic() - started

    def container(self, service: str) -> str:
        """The container of a service, as Docker calls it."""
        return f"{self.name}-{service}-1"

    def state(self, service: str) -> dict[str, Any]:
        """Of its container: Status, ExitCode, Pid, OOMKilled, Health, …"""
        found = json.loads(docker("inspect", "--format", "{{json .State}}", self.container(service)))
        assert isinstance(found, dict)
        return found

    def restarts(self, service: str) -> int:
        """How often the engine has started it again."""
        return int(docker("inspect", "--format", "{{.RestartCount}}", self.container(service)))

    def kill(self, service: str) -> None:
        """SIGKILL, as the kernel does it when memory is out: not through the engine, which would take it for a wish and
        leave the container as it is."""
        os.kill(int(self.state(service)["Pid"]), signal.SIGKILL)

    def ended(self, *services: str) -> bool:
        """Whether all of them have ended by themselves, and well."""
        states = [self.state(each) for each in services]
        return all(state["Status"] == "exited" and state["ExitCode"] == 0 for state in states)

    def copy_states(self, to: Path, services: Sequence[str] = ("master", *NODES)) -> None:
        """What each keeps, into a folder of its name."""
        for service in services:
            docker("cp", f"{self.container(service)}:{STATE}", str(to / service))

    def memory(self, service: str) -> str:
        """What it takes now, of what it may, as the engine counts it."""
        return docker("stats", "--no-stream", "--format", "{{.MemUsage}}", self.container(service)).strip()

    def down(self) -> None:
        """Away with it, volumes too."""
        self("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5", check=False)
