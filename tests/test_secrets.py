"""Secrets are files that are read by reference; what is wrong with one is said without its value."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import redact as module
from orchestrator import secrets
from orchestrator.errors import ConfigError
from orchestrator.redact import redact


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN", set())
    monkeypatch.setattr(secrets, "_FOR_STORES", [])


def write(path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


def refusal(purpose: str, reference: str) -> str:
    with pytest.raises(ConfigError) as caught:
        secrets.read_secret(purpose, reference)
    return str(caught.value)


def test_a_kubernetes_secret_is_a_file_of_its_purpose_and_key() -> None:
    assert secrets.path_of("tracking", "wandb/api-key") == Path("/etc/orchestrator/secrets/tracking/api-key")
    assert secrets.path_of("store", "/run/keys") == Path("/run/keys")


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440])
def test_a_secret_is_read_without_its_line_end_and_redacted_from_then_on(tmp_path: Path, mode: int) -> None:
    file = write(tmp_path / "key", "only words here\n", mode)
    assert secrets.read_secret("tracking", file) == "only words here"
    assert redact("it is only words here!") == "it is ...!"


def test_a_file_that_everybody_may_read_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    file = write(tmp_path / "key", "value-of-the-key", 0o644)
    said = refusal("tracking", file)
    assert said == (f"tracking.secret = {file}: names {file}, which every user of the machine may read (mode 0644). "
                    f"Way out: chmod 600 {file}")  # fmt: skip


def test_a_file_that_is_not_there_is_named_with_the_way_to_make_it(tmp_path: Path) -> None:
    assert "No such file" in refusal("store", f"{tmp_path}/none")
    assert "install -m 600" in refusal("store", f"{tmp_path}/none")
    said = refusal("tracking", "wandb/api-key")
    assert "/etc/orchestrator/secrets/tracking/api-key" in said
    assert "kubectl create secret generic wandb --from-file=api-key=FILE" in said


@pytest.mark.parametrize("reference", ["0123456789abcdef0123456789abcdef01234567", "./key", "a/b/c", "", "UPPER/key"])
def test_what_is_no_reference_is_refused_without_being_shown_since_it_may_be_the_secret(reference: str) -> None:
    said = refusal("tracking", reference)
    assert said.startswith("tracking.secret = (hidden): must be the NAME/KEY")
    assert not reference or reference not in said


@pytest.mark.parametrize(("content", "rule"), [("  \n", "is empty"), (b"\xff\xfe\x00", "is no text")])
def test_a_file_without_a_secret_is_named(tmp_path: Path, content: str | bytes, rule: str) -> None:
    assert rule in refusal("store", write(tmp_path / "key", content))


def test_a_folder_is_no_secret(tmp_path: Path) -> None:
    assert "Is a directory" in refusal("store", str(tmp_path))


def test_the_keys_of_a_store_are_lines_and_none_without_a_reference(tmp_path: Path) -> None:
    file = write(tmp_path / "keys", "# of the bucket\nAWS_ACCESS_KEY_ID=reader\n\nAWS_SECRET_ACCESS_KEY=a=b=canary\n")
    assert secrets.store_keys() == {}
    secrets.use_for_stores(file)
    assert secrets.store_keys() == {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "a=b=canary"}
    assert redact("with a=b=canary") == "with ..."
    secrets.use_for_stores(None)
    assert secrets.store_keys() == {}


def test_a_line_that_is_no_pair_is_named_by_its_number_and_not_shown(tmp_path: Path) -> None:
    secrets.use_for_stores(write(tmp_path / "keys", "A=1\ncanary-value\n"))
    with pytest.raises(ConfigError) as caught:
        secrets.store_keys()
    assert "line 2 is not NAME=VALUE" in str(caught.value)
    assert "canary" not in str(caught.value)


CANARY = "c4n4ryTokenOf32Letters0123456789"


@pytest.mark.parametrize(
    "config",
    [
        {"data": {"train": f"https://me:{CANARY}@host/a.tar"}},
        {"data": {"val": f"pipe:curl -H 'Authorization: Bearer {CANARY}' https://host"}},
        {"data": {"val": f"s3://b/a.tar?X-Amz-Signature={CANARY}"}},
        {"tracking": {"tags": ["x", f"ghp_{CANARY}abcd"]}},
        {"cluster": {"env": [f"STORE_TOKEN={CANARY}"]}},
    ],
)
def test_a_config_that_holds_a_secret_is_refused_by_key_without_its_value(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        secrets.require_no_secrets(config)
    ((group, keys),) = config.items()
    assert str(caught.value).startswith(f"{group}.{next(iter(keys))} = (hidden): holds a ")  # pyright: ignore
    assert CANARY not in str(caught.value)


def test_references_and_addresses_are_no_secrets() -> None:
    config = {"tracking": {"secret": "wandb-prod1/api-key"}, "cluster": {"store_secret": "/run/secret/keys-1234567"},
              "data": {"train": "https://host:8080/a-{000..146}.tar"}, "seed": 1, "init_from": None}  # fmt: skip
    secrets.require_no_secrets(config)


def test_a_file_is_checked_without_being_read(tmp_path: Path) -> None:
    file = write(tmp_path / "key", "value-of-the-key", 0o600)
    secrets.require_secret("tracking", file)
    assert redact("value-of-the-key") == "value-of-the-key"
    with pytest.raises(ConfigError, match="which cannot be read"):
        secrets.require_secret("tracking", f"{file}-absent")
