"""What both services need of configuration: its sections are frozen models, and errors in it are one line.

The sources (a TOML file < environment `SHARED_ENCODER_…` < flags) are put together in `deploy.config`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlunsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from common.broker_url import Access, split
from common.errors import UserError
from common.http_address import http_address

#: The broker that a fresh RabbitMQ on this machine offers.
DEFAULT_URL = "amqp://guest:guest@127.0.0.1:5672/"


def _address(text: str) -> str:
    http_address(text)
    return text


#: Where a service is looked at over HTTP, as `http_address` reads it.
Http = Annotated[str, AfterValidator(_address)]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no changes after the start."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BrokerConfig(Section):
    """Where the broker is. A password is better in `password_file` or the environment than in a URL.

    `urls`: several of one broker, tried in turn at the start and after each loss; they stand before `url`.
    `password_file` holds the password for each of them. `ca_file`, `cert_file`, `key_file`, `account`, `proxy`: see
    `common.broker_url.Access`.

    `connect_timeout_seconds`: how long a command tries; `wait_seconds`: how long a master or a node does at its start,
    with pauses that grow, whether nobody answers or the account is refused. `accounts`: `required` if every party has
    an account of its own, so that what comes is taken from the account of whom it claims to be from and nobody else;
    `open` if they share one, and everyone with the password is everyone. `replicas`: where the broker is a cluster, on
    how many of its servers everything is kept, an odd number; the same for all parties, and for the whole of a
    namespace's life, because RabbitMQ changes no queue's kind."""

    url: SecretStr = SecretStr(DEFAULT_URL)
    urls: tuple[SecretStr, ...] = ()
    password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    account: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    proxy: SecretStr | None = None
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] = "shared-encoder"
    connect_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    wait_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0
    accounts: Literal["open", "required"] = "open"
    replicas: Annotated[int, Field(ge=3, le=9)] | None = None

    @field_validator("replicas")
    @classmethod
    def _odd(cls, replicas: int | None) -> int | None:
        if replicas is not None and replicas % 2 == 0:
            raise ValueError("an even number of replicas outlives no more servers than one less: take an odd one")
        return replicas

    @model_validator(mode="after")
    def _key_with_certificate(self) -> BrokerConfig:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file is the key of a certificate: give cert_file too")
        return self

    def access(self) -> Access:
        """How to get there, with the password of `password_file` in each URL. Raises UserError."""
        urls = self.resolved_urls()
        by_certificate = self.cert_file is not None and any(split(url).username is None for url in urls)
        if by_certificate and self.account is None and self.accounts == "required":
            raise UserError(
                "broker.account: name the account that the certificate stands for; what bears no account is not taken "
                'where accounts = "required"'
            )
        return Access(
            urls=urls,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
            account=self.account,
            proxy=self.proxy.get_secret_value() if self.proxy is not None else None,
        )

    def resolved_urls(self) -> tuple[str, ...]:
        """`urls`, or `url`, with the password from `password_file`, if there is one. Raises UserError."""
        urls = tuple(url.get_secret_value() for url in self.urls or (self.url,))
        if self.password_file is None:
            return urls
        try:
            password = self.password_file.read_text().strip()
        except OSError as error:
            raise UserError(f"broker.password_file {self.password_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"broker.password_file {self.password_file}: not UTF-8 text") from None
        return tuple(_with_password(url, self.account, password) for url in urls)

    def resolved_url(self) -> str:
        """The first of `resolved_urls`, for who wants one. Raises UserError."""
        return self.resolved_urls()[0]


def _with_password(url: str, account: str | None, password: str) -> str:
    """Where a URL names no user, it is the account's."""
    parts = split(url)
    user, host = parts.username or quote(account or "guest", safe=""), parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def explained(error: ValidationError, model: type[BaseModel], source: str) -> UserError:
    """The first validation error in one line that names the key, and suggests one for a key that is unknown.

    An error of several keys together has no key of its own: its text names them.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = [str(part) for part in first["loc"]]
    key = ".".join(where)
    if first["type"] == "extra_forbidden":
        hint = suggestion(where[-1], _keys_beside(model, where))
        return UserError(f"{source}: there is no setting {key!r}; {hint}")
    message = first["msg"].removeprefix("Value error, ")
    return UserError(": ".join([source, *([key] if key else []), message[0].lower() + message[1:]]))


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """What an error offers instead of a wrong word: the nearest known one, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}"


def _keys_beside(model: type[BaseModel], where: Sequence[str]) -> list[str]:
    """The keys that are known in the table that holds `where`."""
    current: Any = model
    for part in where[:-1]:
        annotation = (
            current.model_fields[part].annotation if _is_model(current) and part in current.model_fields else None
        )
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next((candidate for candidate in candidates if _is_model(candidate)), current)
    return sorted(current.model_fields)


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
