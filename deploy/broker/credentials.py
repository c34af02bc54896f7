"""A party's credentials: one file, for its owner alone, that is all it needs to come to the broker.

TOML: whose it is (`node = "clinic-a"`, `operator = "alice"`, or neither for the master), and a section `broker` as in a
configuration, with the contents of certificates in place of paths.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import stat
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlunsplit

from common.broker_url import split
from common.errors import UserError

#: What of TLS may stand in the file as text, each for the setting of that name with `_file` behind.
PEM = ("ca", "cert", "key")

Role = Literal["node", "operator", "master"]
_ROLES: tuple[Role, ...] = ("node", "operator")


@dataclass(frozen=True, slots=True)
class Credentials:
    """`urls` with account and password in them; `broker`: what else the section has, `pem`: texts by their names."""

    role: Role
    party: str
    urls: tuple[str, ...]
    broker: dict[str, Any]
    pem: dict[str, str]


def with_account(url: str, account: str, password: str) -> str:
    """The broker's URL for another account. Raises UserError for what is no URL of a broker."""
    parts = split(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(account, safe='')}:{quote(password, safe='')}@{host}"))


def without_account(url: str) -> str:
    """The broker's URL for a party whose certificate says who it is. Raises UserError for what is no broker's URL."""
    parts = split(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def as_toml(credentials: Credentials) -> str:
    """What stands in the file. Pure."""
    lines = ["# the account of one party at the broker: whoever has this file is that party"]
    if credentials.role != "master":
        lines.append(f"{credentials.role} = {json.dumps(credentials.party)}")
    lines += ["", "[broker]"]
    # JSON's strings and lists of strings are TOML's
    lines += [
        f"{name} = {json.dumps(value)}" for name, value in {"urls": credentials.urls, **credentials.broker}.items()
    ]
    lines += [f"{name} = {json.dumps(text)}" for name, text in credentials.pem.items()]
    return "\n".join(lines) + "\n"


def write(path: Path, credentials: Credentials) -> None:
    """Written beside, for nobody else to read at any time, then renamed. Raises UserError."""
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(as_toml(credentials))
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read(path: Path) -> Credentials:
    """Raises UserError: for what is no such file, and for one that is `too_open`."""
    try:
        status, text = path.stat(), path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `shared-encoder broker add-node` writes such a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a file of credentials") from None
    if stat.S_ISREG(status.st_mode) and too_open(status.st_mode, status.st_uid):
        raise UserError(f"{path} can be read by others, who could then act as its party: chmod 600 {path}")
    try:
        table = tomllib.loads(text)
        section = dict(table.pop("broker"))
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a file of credentials: it has no readable section broker") from None
    role: Role = next((each for each in _ROLES if each in table), "master")
    party = table.pop(role, "master")
    if table or not isinstance(party, str):
        raise UserError(f"{path}: not a file of credentials: beside the section broker it names one party")
    urls = section.pop("urls", None) or [section.pop("url", None)]
    if not all(isinstance(url, str) for url in urls):
        raise UserError(f"{path}: not a file of credentials: its section broker has no url")
    pem = {name: str(section.pop(name)) for name in PEM if name in section}
    return Credentials(role, party, tuple(urls), section, pem)


def too_open(mode: int, owner: int) -> bool:
    """Whether others than the party could read a file of this mode and owner's uid. One of root's may be readable for
    its group: that is how Kubernetes mounts a secret for the user of a pod. (The rule is libpq's, for keys.)"""
    return bool(mode & (0o037 if owner == 0 else 0o077))


def settings(credentials: Credentials) -> dict[str, Any]:
    """The section broker of a configuration. Certificates are put into files, which go when this process ends."""
    # before any URL of a configuration file, where `urls` stand before `url`
    found: dict[str, Any] = {**credentials.broker, "urls": list(credentials.urls)}
    if credentials.pem:
        directory = Path(tempfile.mkdtemp(prefix="shared-encoder-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        for name, text in credentials.pem.items():
            file = directory / f"{name}.pem"
            file.touch(0o600)
            file.write_text(text)
            found[f"{name}_file"] = file
    return found


def merged(flags: dict[str, Any], file: Path | None) -> tuple[dict[str, Any], str | None]:
    """The flags of a command with what the file has for the section broker, where no flag says otherwise; and the name
    of the node or operator whose file it is. Raises UserError."""
    if file is None:
        return flags, None
    credentials = read(file)
    given = {name: value for name, value in flags.get("broker", {}).items() if value is not None}
    party = credentials.party if credentials.role != "master" else None
    return {**flags, "broker": {**settings(credentials), **given}}, party
