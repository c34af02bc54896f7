"""What is wrong in a configuration is said in one line that names the key and what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, SecretStr, ValidationError

from common.config import BrokerConfig, Section, explained
from common.errors import UserError


class Inner(Section):
    steps: Annotated[int, Field(ge=1)] = 1
    seconds: float | None = None


class Outer(Section):
    inner: Inner = Inner()
    maybe: Inner | None = None
    nodes: dict[str, Inner] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"iner": {}}, "run.toml: there is no setting 'iner'; did you mean 'inner'?"),
        ({"zzz": 1}, "run.toml: there is no setting 'zzz'; there are: inner, maybe, nodes"),
        ({"inner": {"stps": 1}}, "run.toml: there is no setting 'inner.stps'; did you mean 'steps'?"),
        ({"maybe": {"second": 1}}, "run.toml: there is no setting 'maybe.second'; did you mean 'seconds'?"),
        ({"nodes": {"a": {"step": 1}}}, "run.toml: there is no setting 'nodes.a.step'; did you mean 'steps'?"),
        ({"inner": {"steps": 0}}, "run.toml: inner.steps: input should be greater than or equal to 1"),
        (
            {"inner": {"steps": "many"}},
            "run.toml: inner.steps: input should be a valid integer, unable to parse string as an integer",
        ),
    ],
)
def test_one_line_names_the_key(given: dict[str, object], line: str) -> None:
    with pytest.raises(ValidationError) as error:
        Outer.model_validate(given)
    assert str(explained(error.value, Outer, "run.toml")) == line


def test_a_password_file_goes_into_the_url_and_nothing_prints_it(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("p@ss/word\n")
    config = BrokerConfig(url=SecretStr("amqps://anna:old@[::1]:5671/vhost?heartbeat=5"), password_file=file)
    assert config.resolved_url() == "amqps://anna:p%40ss%2Fword@[::1]:5671/vhost?heartbeat=5"
    assert "old" not in repr(config) and "old" not in config.model_dump_json()
    with pytest.raises(UserError, match=r"broker\.password_file .*none: No such file"):
        BrokerConfig(password_file=tmp_path / "none").resolved_url()
