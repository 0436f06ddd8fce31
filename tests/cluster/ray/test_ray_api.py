"""What a cluster must be before anything is sent to it, and how each thing that can be wrong is named."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from fake_ray import FakeRay, serving

from orchestrator.cluster.ray.api import Dashboard, RequestRefused, Token, connect, read_token, require_address
from orchestrator.cluster_config import ClusterConfig
from orchestrator.compose import Composed
from orchestrator.errors import ConfigError, TransientError

TOKEN = {"RAY_AUTH_TOKEN": "secret-token"}


@pytest.fixture
def config(composed: Composed) -> ClusterConfig:
    return composed.config.cluster


def test_a_cluster_is_probed_without_the_token_and_then_asked_with_it(ray: FakeRay, config: ClusterConfig) -> None:
    dashboard = connect(replace(config, address=ray.address), TOKEN)
    assert dashboard.version()["ray_version"] == "2.60.0"
    assert [authorization for *_, authorization in ray.requests] == [None, *["Bearer secret-token"] * 2]


def test_a_cluster_that_answers_without_a_token_is_refused_and_never_sees_one(
    ray: FakeRay, config: ClusterConfig
) -> None:
    ray.token = None
    with pytest.raises(ConfigError, match=r"cluster.address = .*answers without a token.*RAY_AUTH_MODE=token"):
        connect(replace(config, address=ray.address), TOKEN)
    assert [authorization for *_, authorization in ray.requests] == [None]


def test_a_cluster_without_tokens_is_taken_where_that_is_allowed(ray: FakeRay, config: ClusterConfig) -> None:
    ray.token = None
    dashboard = connect(replace(config, address=ray.address, insecure=True), TOKEN)
    assert dashboard.token is None
    assert {authorization for *_, authorization in ray.requests} == {None}


def test_a_wrong_token_is_named_by_where_it_came_from(ray: FakeRay, config: ClusterConfig, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("another\n")
    wrong = replace(config, address=ray.address, token_file=str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"refuses the token from cluster.token_file .*token\)") as caught:
        connect(wrong, TOKEN)
    assert "another" not in str(caught.value)
    with pytest.raises(ConfigError, match="refuses the token from RAY_AUTH_TOKEN"):
        connect(replace(config, address=ray.address), {"RAY_AUTH_TOKEN": "another"})


def test_a_missing_token_says_where_it_was_looked_for(ray: FakeRay, config: ClusterConfig, tmp_path: Path) -> None:
    missing = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere")}
    with pytest.raises(
        ConfigError, match=r"cluster.token_file = None: the cluster asks for a token, and .*nowhere: No"
    ):
        connect(replace(config, address=ray.address), missing)


def test_the_token_is_looked_for_in_the_order_of_ray_after_the_config(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("from-file\n")
    (tmp_path / "b").write_text("from-path")
    env = {"RAY_AUTH_TOKEN": "from-variable", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "b")}
    assert read_token(str(tmp_path / "a"), env).value == "from-file"
    assert read_token(None, env).value == "from-variable"
    assert read_token(None, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "b")}).value == "from-path"


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match="holds no token"):
        read_token(str(tmp_path / "token"), {})


def test_a_token_shows_in_no_representation() -> None:
    assert "secret" not in repr(Dashboard("http://127.0.0.1:1", Token("secret", "RAY_AUTH_TOKEN")))


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        (None, "is needed"),
        ("auto", "must be the http"),
        ("ray://head:10001", "must be the http"),
        ("http://127.0.0.1:port", "must be the http"),
        ("http://10.1.2.3:8265", "plain http to another machine"),
        ("http://127.0.0.1.evil.example", "plain http to another machine"),
        ("https://user:word@head:8265", "no password"),
    ],
)
def test_an_address_that_cannot_be_spoken_to_safely_is_refused(address: str | None, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        require_address(address, insecure=False)
    assert "word" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize("address", ["http://localhost:8265/", "http://[::1]:8265", "https://ray.example"])
def test_loopback_and_https_are_taken(address: str) -> None:
    assert require_address(address, insecure=False) == address.rstrip("/")


def test_http_to_another_machine_is_taken_where_that_is_allowed() -> None:
    assert require_address("http://10.1.2.3:8265", insecure=True) == "http://10.1.2.3:8265"


def test_a_dead_address_is_named_with_the_reason(config: ClusterConfig) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dead = replace(config, address=f"http://127.0.0.1:{port}")
    with pytest.raises(TransientError, match=rf"cluster.address = .*:{port}: nobody answers .*refused.*Way out"):
        connect(dead, TOKEN)


@pytest.mark.parametrize("version", ["<html>hello</html>", {"name": "another product"}, [1, 2]])
def test_another_server_is_no_dashboard(ray: FakeRay, config: ClusterConfig, version: object) -> None:
    ray.version = version
    with pytest.raises(ConfigError, match="is no Ray dashboard"):
        connect(replace(config, address=ray.address), TOKEN)


def test_a_redirect_is_not_followed(ray: FakeRay, config: ClusterConfig) -> None:
    with serving(FakeRay(token=None)) as thief:
        ray.redirect = f"{thief.address}/api/version"
        with pytest.raises(ConfigError, match="answers 302"):
            connect(replace(config, address=ray.address), TOKEN)
        assert thief.requests == []


@pytest.mark.parametrize(("version", "old"), [("2.55.1", True), ("1.13.0", True), ("2.56.0", False), ("3.0.0", False)])
def test_an_old_ray_is_refused(ray: FakeRay, config: ClusterConfig, version: str, old: bool) -> None:
    ray.version = {"ray_version": version}
    there = replace(config, address=ray.address)
    if old:
        with pytest.raises(ConfigError, match=rf"runs Ray {version}, and this version needs 2.56"):
            connect(there, TOKEN)
    else:
        assert connect(there, TOKEN).address == ray.address


def test_an_error_of_the_dashboard_keeps_its_status(ray: FakeRay) -> None:
    dashboard = Dashboard(ray.address, Token("secret-token", "test"))
    with pytest.raises(RequestRefused, match="404: Job nowhere does not exist") as caught:
        dashboard.job("nowhere")
    assert caught.value.status == 404


def test_proxies_of_the_environment_do_not_hear_of_loopback(
    ray: FakeRay, config: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert json.dumps(connect(replace(config, address=ray.address), TOKEN).version())
