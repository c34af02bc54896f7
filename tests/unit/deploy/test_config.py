"""What is wrong in a configuration is said in one line that names the key and what it should be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import pytest
import structlog
from pydantic import Field, SecretStr, ValidationError

from common.brokers import open_broker
from common.config import BrokerConfig, Section, explained
from common.errors import SharedEncoderError, UserError
from common.wire.update_rule import ReturnWhen
from deploy.commands.run import topology_of
from deploy.config import load_config, warn_of_ignored
from master_service.decisions.settings import Settings, settings_of_start


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
    several = config.model_copy(
        update={"urls": (SecretStr("amqps://anna:x@a/"), SecretStr("amqps://b/")), "account": "anna"}
    )
    assert several.resolved_urls() == ("amqps://anna:p%40ss%2Fword@a/", "amqps://anna:p%40ss%2Fword@b/")
    assert "old" not in repr(config) and "old" not in config.model_dump_json()
    with pytest.raises(UserError, match=r"broker\.password_file .*none: No such file"):
        BrokerConfig(password_file=tmp_path / "none").resolved_url()


@pytest.mark.parametrize(
    "url",
    [
        "amqp://u:sec#ret@h/",
        "amqp://u:12#secret@h/",
        "amqp://u:sec?ret@h/",
        "amqp://u:12?secret@h/",
        "amqp://u:sec/ret@h/",
        "amqp://u:12/secret@h/",
        "amqp://u:sec[ret@h/",
        "amqp://u:secret@h:99999/",
        "amqp://:secret@/",
        "http://u:secret@h/",
        "u:secret@h",
        "secret",
        "amqp://u@127.0.0.1:1/?heartbeat=secret",
        "amqp://u@127.0.0.1:1/?ssl_options={'password': 'secret'",
        "amqps://u@127.0.0.1:1/?ssl_options={'keyfile': 'x', 'password': 'secret'}",
        "amqps://u@127.0.0.1:1/?ssl_options={'ca_certs': 'none', 'password': 'secret'}",
        "amqp://u:secret@127.0.0.1:1/",
    ],
)
def test_no_word_of_a_url_with_a_password_is_in_an_error(url: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("secret")
    for how in (
        lambda: open_broker(url, client_name="test", dead_letters="none", connect_timeout=0.1),
        lambda: open_broker(
            BrokerConfig(url=SecretStr(url), password_file=file).resolved_url(),
            client_name="test",
            dead_letters="none",
            connect_timeout=0.1,
        ),
    ):
        with pytest.raises(SharedEncoderError) as refused:
            how()
        text = str(refused.value)
        assert "\n" not in text and not {"secret", "sec", "ret", "12", "99999"} & set(re.findall(r"\w+", text))


def test_variables_that_are_no_settings_are_ignored_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes gives every container the addresses of services; of one that is called shared-encoder they have our
    prefix."""
    for name, value in {
        "SHARED_ENCODER_SERVICE_HOST": "10.0.0.1",
        "SHARED_ENCODER_SERVICE_PORT": "5672",
        "SHARED_ENCODER_PORT": "tcp://10.0.0.1:5672",
        "SHARED_ENCODER_PORT_5672_TCP_ADDR": "10.0.0.1",
        "SHARED_ENCODER_BROKER_URL": "amqp://secret@there/",
        "SHARED_ENCODER_MASTER__THREADS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    config = load_config(None, {})
    assert config.master.threads == 3
    with structlog.testing.capture_logs() as lines:
        warn_of_ignored(config)
    (line,) = lines
    assert line["log_level"] == "warning" and "SHARED_ENCODER_BROKER_URL" in line["names"]
    assert line["names"].endswith(" and 2 more")
    assert line["meant"] == "SHARED_ENCODER_BROKER_URL: SHARED_ENCODER_BROKER__URL?"
    assert "secret" not in str(line)
    monkeypatch.setenv("SHARED_ENCODER_BROKRE__URL", "x")
    with pytest.raises(UserError, match=r"SHARED_ENCODER_BROKRE__URL names no section; did you mean 'broker'\?"):
        load_config(None, {})


def test_versions_are_not_in_an_encoding_that_only_updates_make_up_for() -> None:
    assert load_config(None, {"update": {"encoding": "int4"}}).update.encoding == "int4"
    with pytest.raises(UserError, match=r"master\.encoding: int4 is for updates, .*take bfloat16 for versions"):
        load_config(None, {"master": {"encoding": "int4"}})


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


def test_bounds_of_an_update_that_are_given_are_all_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default there is one of steps; what file, environment and flags say is put together as ever."""
    file = tmp_path / "run.toml"
    for said, bounds in (
        ("when = { seconds = 30 }", {"seconds": 30.0}),
        ("when = {}", {"steps": 25}),
        ("wait = true", {"steps": 25}),
    ):
        file.write_text(f"[update]\n{said}\n")
        config = load_config(file, {})
        assert config.settings().update_rule.when.model_dump(exclude_none=True) == bounds
        assert settings_of_start(config.settings(), Settings(), config.given()) == config.settings()
    monkeypatch.setenv("SHARED_ENCODER_UPDATE__WHEN__SECONDS", "7")
    assert load_config(file, {}).update.when == ReturnWhen(seconds=7.0)
    assert load_config(file, {}).update.wait is True
    both = load_config(None, {"update": {"when": {"samples": 9}}})
    assert both.update.when == ReturnWhen(seconds=7.0, samples=9)


def test_f14_a_first_start_and_a_start_again_with_the_same_configuration_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[rule]\npreset = "diloco"\nbuffer = { grace_seconds = 5 }\n[update]\nwhen = { samples = 9 }\n')
    config = load_config(file, {"stop": {"seconds": 5.0}})
    assert settings_of_start(config.settings(), config.settings(), config.given()) == config.settings()


@pytest.mark.parametrize("replicas", [1, 2, 4, 11])
def test_replicas_are_an_odd_number_of_servers(replicas: int) -> None:
    with pytest.raises(ValidationError):
        BrokerConfig(replicas=replicas)
    config = load_config(None, {"broker": {"replicas": 3}})
    assert topology_of(config).replicas == 3 and topology_of(load_config(None, {})).replicas is None
