"""What is wrong in a configuration is said in one line that names the key and what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, SecretStr, ValidationError

from common.config import BrokerConfig, Section, explained
from common.errors import UserError
from deploy.config import load_config
from master_service.decisions.settings import settings_of_start


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


def test_f14_what_is_given_is_known_from_file_environment_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it equals the default; and a part of a section is that part alone."""
    file = tmp_path / "run.toml"
    file.write_text(
        '[rule]\npreset = "return-count"\n[update]\nwhen = { seconds = 30 }\n[update.inner]\nlr = 0.005\n'
        '[encoder]\nsource = "there"\nreference = "a.txt"\nbase = "b"\nget = "text"\nlicense = "mit"\n'
        "[stop.plateau]\npatience = 3\n[master]\nthreads = 2\n"
    )
    monkeypatch.setenv("SHARED_ENCODER_RULE__OUTER__LR", "2")
    config = load_config(
        file, {"stop": {"versions": 400, "updates": None}, "encoder": {"min_nodes": 1, "tokenizer": "bytes"}}
    )
    assert config.given() == {
        "rule": {"preset": "return-count", "outer": {"lr": "2"}},
        "update_rule": {"when": {"seconds": 30.0}, "inner": {"lr": 0.005}},
        "stop": {"versions": 400, "plateau": {"patience": 3}},
        "min_nodes": 1,
        "source": "there",
        "tokenizer": "bytes",
        "reference": "a.txt",
        "base": "b",
        "license": "mit",
    }
    assert (config.settings().tokenizer, config.settings().reference) == ("bytes", "a.txt")
    assert config.settings().base == "b"
    assert config.settings().license == "mit" and config.settings().language is None
    monkeypatch.delenv("SHARED_ENCODER_RULE__OUTER__LR")
    assert load_config(None, {"stop": {"versions": None}, "rule": {"preset": None}}).given() == {}


def test_f14_a_first_start_and_a_start_again_with_the_same_configuration_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[rule]\npreset = "diloco"\nbuffer = { grace_seconds = 5 }\n[update]\nwhen = { samples = 9 }\n')
    config = load_config(file, {"stop": {"seconds": 5.0}})
    assert settings_of_start(config.settings(), config.settings(), config.given()) == config.settings()
