"""Whoever may administer the broker: through its management API, or through rabbitmqctl beside it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from common.brokers.amqp.arguments import version_of
from common.errors import AccessRefused, BrokerUnavailable, UserError
from deploy.broker.definitions import Definitions, as_json
from deploy.local_rabbitmq import server_program

#: How long the management API may take for an answer, seconds.
_ANSWER_SECONDS = 30.0
#: From here the password of `--management` comes if the URL has none.
PASSWORD_VARIABLE = "RABBITMQ_MANAGEMENT_PASSWORD"

#: Run rabbitmqctl with these arguments and this input; gives what it prints. Raises CalledProcessError.
Run = Callable[[list[str], str], str]


class Admin(Protocol):
    """What the accounts of a federation need of the broker's administration. Every method raises UserError for what is
    refused, and BrokerUnavailable."""

    def server_version(self) -> tuple[int, ...]:
        """(3, 10, 8)"""

    def load(self, definitions: Definitions) -> None:
        """Make all this, or change it."""

    def queues(self, vhost: str) -> dict[str, dict[str, Any]]:
        """The arguments of every queue by its name."""

    def delete_queue(self, vhost: str, name: str) -> None:
        """With what is in it; nothing happens if there is none."""

    def close_connections(self, account: str, why: str) -> None:
        """Cut off whoever is connected with this account."""

    def delete_account(self, account: str) -> None:
        """The broker also closes its connections; nothing happens if there is none."""


class Management:
    """The HTTP API of RabbitMQ's management plugin; needs an account with the tag `administrator`."""

    def __init__(self, url: str) -> None:
        """`url`: http[s]://user[:password]@host:15672. Raises UserError, AccessRefused, BrokerUnavailable."""
        try:
            parts = urlsplit(url)
            port = f":{parts.port}" if parts.port else ""  # a port that is none raises here
        except ValueError:
            raise UserError("--management: write it as http://user@host:15672 (or https://)") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("--management: write it as http://user@host:15672 (or https://)")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self.where = f"{host}{port}"
        self._base = urlunsplit((parts.scheme, self.where, parts.path.rstrip("/") + "/api/", "", ""))
        user = unquote(parts.username or "guest")
        password = unquote(parts.password or os.environ.get(PASSWORD_VARIABLE, "guest"))
        self._authorization = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
        self._user = user
        self._overview = self._ask("GET", "overview")

    def server_version(self) -> tuple[int, ...]:
        return version_of(str(self._overview["rabbitmq_version"]))

    def load(self, definitions: Definitions) -> None:
        self._ask("POST", "definitions", definitions)

    def queues(self, vhost: str) -> dict[str, dict[str, Any]]:
        # not all that the API knows of a queue: that would be slow with many
        found = self._ask("GET", f"queues/{quote(vhost, safe='')}?disable_stats=true&enable_queue_totals=true")
        return {each["name"]: dict(each.get("arguments") or {}) for each in found}

    def delete_queue(self, vhost: str, name: str) -> None:
        self._ask("DELETE", f"queues/{quote(vhost, safe='')}/{quote(name, safe='')}")

    def close_connections(self, account: str, why: str) -> None:
        self._ask("DELETE", f"connections/username/{quote(account, safe='')}", reason=why)

    def delete_account(self, account: str) -> None:
        self._ask("DELETE", f"users/{quote(account, safe='')}")

    def _ask(self, method: str, path: str, body: object = None, reason: str = "") -> Any:
        """The answer, decoded; None if there is none, and for what is to be deleted and is not there."""
        headers = {"Authorization": self._authorization, "Content-Type": "application/json"}
        if reason:
            headers["X-Reason"] = reason
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self._base + path, data, headers, method=method), timeout=_ANSWER_SECONDS) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except HTTPError as error:
            if error.code == 404 and method == "DELETE":
                return None
            if error.code in (401, 403):
                raise AccessRefused(
                    f"the management API at {self.where} does not let user {self._user!r} do this: it needs the tag "
                    f"administrator, and its password in {PASSWORD_VARIABLE} or the URL"
                ) from None
            raise UserError(f"the management API at {self.where}: {error.code} {_words(error)}") from None
        except (URLError, OSError) as error:
            reason = str(getattr(error, "reason", error))
            raise BrokerUnavailable(f"no management API answers at {self.where}: {reason}") from None
        except ValueError:
            raise UserError(f"what answers at {self.where} is not RabbitMQ's management API") from None


class Ctl:
    """rabbitmqctl, on the broker's machine and as its user."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def server_version(self) -> tuple[int, ...]:
        return version_of(self._ctl("-q", "eval", "rabbit_misc:version().").strip().strip('"'))

    def load(self, definitions: Definitions) -> None:
        self._ctl("import_definitions", given=as_json(definitions))

    def queues(self, vhost: str) -> dict[str, dict[str, Any]]:
        listed = json.loads(self._ctl("-q", "list_queues", "-p", vhost, "name", "arguments", "--formatter", "json"))
        return {each["name"]: {name: value for name, _, value in each["arguments"]} for each in listed}

    def delete_queue(self, vhost: str, name: str) -> None:
        self._ctl("delete_queue", "-p", vhost, name, missing="not found")

    def close_connections(self, account: str, why: str) -> None:
        self._ctl("close_all_user_connections", account, why)

    def delete_account(self, account: str) -> None:
        self._ctl("delete_user", account, missing="does not exist")

    def _ctl(self, *arguments: str, given: str = "", missing: str = "") -> str:
        """`missing`: with these words it says that there is nothing to delete."""
        try:
            return self._run(list(arguments), given)
        except subprocess.CalledProcessError as error:
            said = " ".join(f"{error.stderr or ''} {error.stdout or ''}".split())
            if missing and missing in said:
                return ""
            raise UserError(f"rabbitmqctl {arguments[0]} failed: {said[:300]}") from None


def removal_commands(vhost: str, account: str, queues: list[str]) -> str:
    """What `Ctl` would run to remove an account with its queues, for a shell."""
    lines = [f"rabbitmqctl delete_user '{account}'"]
    return "\n".join([*lines, *(f"rabbitmqctl delete_queue -p '{vhost}' '{name}'" for name in queues)])


def rabbitmqctl(program: str) -> Ctl:
    """`program`: a path, or `auto` for the one that is installed here. Raises UserError."""
    if program == "auto":
        program = shutil.which("rabbitmqctl") or str(server_program("rabbitmqctl"))

    def run(arguments: list[str], given: str) -> str:
        try:
            done = subprocess.run([program, *arguments], input=given, check=True, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"--rabbitmqctl {program}: {error.strerror}") from None
        return done.stdout

    return Ctl(run)


def _words(error: HTTPError) -> str:
    """The reason in the answer's body, or that of HTTP."""
    try:
        body = json.loads(error.read())
        return str(body.get("reason") or body.get("error") or error.reason)[:300]
    except (ValueError, AttributeError, OSError):
        return str(error.reason)
