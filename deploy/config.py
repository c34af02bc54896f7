"""The whole configuration of a run: one file for master, nodes and evaluation. File < environment < flags."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from common.config import BrokerConfig, Section, explained
from common.errors import UserError
from common.wire.messages import UpdateRule
from deploy.compare_settings import CompareConfig
from master_service.config import EncoderConfig, MasterConfig, RuleConfig, given, settings
from master_service.decisions.rules.model import AggregationRule
from master_service.decisions.settings import Settings, StopRule
from node_service.config import NodeConfig

PREFIX = "SHARED_ENCODER_"


class LogConfig(Section):
    """How a service logs: plain lines, or JSON lines for machines."""

    json_lines: bool = False
    level: str = Field(default="info", pattern="^(debug|info|warning|error)$")


class Config(BaseSettings):
    """Every section has defaults: nothing needs to be configured for the first run."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
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

    def given(self) -> dict[str, Any]:
        """What of `settings()` the file, the environment or a flag says explicitly; the rest of it are defaults."""
        return self._given

    def settings(self) -> Settings:
        """What of it decides, as the master logs it."""
        try:
            return settings(self.encoder, self.rule, self.update, self.stop)
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

    unknown = [name for name in os.environ if name.startswith(PREFIX) and _section(name) not in Config.model_fields]
    if unknown:
        raise UserError(f"environment: {unknown[0]} names no section; there are: {', '.join(Config.model_fields)}")
    try:
        config, explicit = FromFile(**_given(flags)), Explicit(**_given(flags))
    except ValidationError as error:
        raise explained(error, Config, source) from None
    config._given = given(explicit.encoder, explicit.rule, explicit.update, explicit.stop)
    return config


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
    return name.removeprefix(PREFIX).lower().partition("__")[0]


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given; None means not given."""
    found: dict[str, Any] = {}
    for key, value in flags.items():
        below = _given(value) if isinstance(value, dict) else value
        if below is not None and below != {}:
            found[key] = below
    return found
