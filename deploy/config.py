"""The whole configuration of a run: one file for master, nodes and evaluation. File < environment < flags."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ByteSize, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from common.config import BrokerConfig, Section, explained, suggestion
from common.errors import UserError
from common.wire.update_rule import UpdateRule
from deploy.compare_settings import CompareConfig
from deploy.variables import CREDENTIALS, PREFIX
from master_service.config import EncoderConfig, MasterConfig, RuleConfig, given, settings
from master_service.decisions.rules.model import AggregationRule
from master_service.decisions.settings import Settings, StopRule
from node_service.config import NodeConfig

#: Between the names of sections and settings in one of the environment.
_BELOW = "__"
#: How alike a name and a setting's are, from 0 to 1, so that one may be meant for the other.
_NEAR = 0.92

log = structlog.get_logger()


class LogConfig(Section):
    """How a service logs: plain lines, or JSON lines for machines. `file`: JSON lines and all events go there beside
    that, where `{party}` is "master", a node's name or "aggregator-1-of-2"; at `max_bytes` another is begun, and `keep`
    older ones stay."""

    json_lines: bool = False
    level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    file: Path | None = None
    max_bytes: ByteSize = Field(default=ByteSize(10_000_000), ge=4096)
    keep: int = Field(default=5, ge=0, le=1000)


class Config(BaseSettings):
    """Every section has defaults: nothing needs to be configured for the first run."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=_BELOW,
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    broker: BrokerConfig = BrokerConfig()
    log: LogConfig = LogConfig()
    master: MasterConfig = MasterConfig()
    encoder: EncoderConfig = EncoderConfig()
    rule: RuleConfig = RuleConfig()
    update: UpdateRule = UpdateRule()
    stop: StopRule = StopRule()
    nodes: dict[str, NodeConfig] = Field(default_factory=dict)
    compare: CompareConfig = CompareConfig()

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)
    _ignored: list[str] = PrivateAttr(default_factory=list)

    def given(self) -> dict[str, Any]:
        """What of `settings()` the file, the environment or a flag says explicitly; the rest of it are defaults."""
        return self._given

    def ignored(self) -> list[str]:
        """The variables of the environment that have our prefix and are no setting: of a Kubernetes service that is
        called shared-encoder, or a slip of the pen."""
        return self._ignored

    def settings(self) -> Settings:
        """What of it decides, as the master logs it."""
        try:
            return settings(self.encoder, self.rule, self.update, self.stop, self.master)
        except ValidationError as error:
            raise explained(error, AggregationRule, "rule") from None


def load_config(file: Path | None, flags: dict[str, Any]) -> Config:
    """Read and validate. Paths in the file are relative to the current folder. Raises UserError: one line."""
    source = str(file) if file else "configuration"
    table = _read(file) if file else {}

    class FromFile(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources = (init_settings, env_settings)
            return (*sources, InitSettingsSource(settings_cls, table))

    class Explicit(FromFile):
        """The same without the defaults that complete a section given in part: its fields are those that were given."""

        model_config = SettingsConfigDict(nested_model_default_partial_update=False)

    known = {*Config.model_fields, _section(CREDENTIALS)}
    unknown = [name for name in os.environ if name.startswith(PREFIX) and _section(name) not in known]
    for name in unknown:
        if _BELOW in name:  # nobody but a user of ours writes names like that
            raise UserError(f"environment: {name} names no section; {suggestion(_section(name), Config.model_fields)}")
    given_flags = _one_url(_given(flags))
    try:
        config, explicit = FromFile(**given_flags), Explicit(**given_flags)
    except ValidationError as error:
        raise explained(error, Config, source) from None
    if explicit.update.when.model_fields_set:
        # bounds replace one another: who says seconds alone wants no update by the default's steps
        update = config.update.model_copy(update={"when": explicit.update.when})
        config = config.model_copy(update={"update": update})
    config._ignored = sorted(unknown)
    config._given = given(explicit.encoder, explicit.rule, explicit.update, explicit.stop, explicit.master)
    return config


def warn_of_ignored(config: Config) -> None:
    """One line about what the environment has beside our settings, with the setting that may have been meant."""
    if not (ignored := config.ignored()):
        return
    settings = [
        PREFIX + _BELOW.join((section, key)).upper()
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    ]
    meant = {name: found[0] for name in ignored if (found := difflib.get_close_matches(name, settings, 1, _NEAR))}
    hints = {"meant": "; ".join(f"{name}: {setting}?" for name, setting in meant.items())} if meant else {}
    shown = ", ".join(ignored[:3]) + (f" and {len(ignored) - 3} more" if len(ignored) > 3 else "")
    log.warning("variables of the environment that are no settings are ignored", names=shown, **hints)


def _read(file: Path) -> dict[str, Any]:
    """The tables of a TOML file, or of a pipe."""
    try:
        return tomllib.loads(file.read_bytes().decode())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the configuration with --config FILE") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the configuration with --config FILE") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as TOML: {error}") from None


def _section(name: str) -> str:
    return name.removeprefix(PREFIX).lower().partition(_BELOW)[0]


def _one_url(flags: dict[str, Any]) -> dict[str, Any]:
    """A URL of a flag or of the environment stands for all that the file has."""
    broker = flags.get("broker", {})
    url, names = f"{PREFIX}BROKER{_BELOW}URL", {name.upper() for name in os.environ}
    if "url" in broker or (url in names and f"{url}S" not in names):
        return {**flags, "broker": {"urls": (), **broker}}
    return flags


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given; None means not given."""
    found: dict[str, Any] = {}
    for key, value in flags.items():
        below = _given(value) if isinstance(value, dict) else value
        if below is not None and below != {}:
            found[key] = below
    return found
