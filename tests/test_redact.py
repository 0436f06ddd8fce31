"""What leaves this machine holds no credentials, and what is no credential stays as it is."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import redact as module
from orchestrator.redact import SHAPES, find_secrets, redact, remember, without_secrets

TOKEN = "c4n4ryTokenOf32Letters0123456789"
PLANTED = {
    "key of AWS": "AKIA" + "IOSFODNN7CANARY1",
    "token of GitHub": "ghp_" + TOKEN + "abcd",
    "token of Hugging Face": "hf_" + TOKEN,
    "key of W&B": "wandb_v1_" + TOKEN,
    "API key": "sk-" + TOKEN,
    "JSON web token": f"eyJ{TOKEN}.eyJ{TOKEN}.{TOKEN}",
    "private key": f"-----BEGIN RSA PRIVATE KEY-----{TOKEN}",
    "password in an address": f"https://user:{TOKEN}@host/x",
    "authorization header": f"curl -H 'Authorization: Bearer {TOKEN}'",
    "signed address": f"https://host/x?X-Amz-Signature={TOKEN}",
    "key of 40 hexadecimal digits": "key: " + "0123456789" * 4,
    "value that is named a secret": f'"api_key": "{TOKEN}"',
}
HARMLESS = [
    "tracking.secret = wandb-prod1/api-key: must be read",
    "cluster.store_secret = s3-keys2/credentials.txt",
    "token_file=/home/me1/.ray/auth_token",
    "max_tokens=1234567890123456",
    "did you mean 'x'? Way out: ask",
    "weights_sha256 " + "0123456789abcdef" * 4,
    "s3://bucket/key/a.tar, step 120",
    "s3://bucket/a-{000..009}.tar and https://host:8080/x@2x.png",
]


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("https://user:word@host/a.tar", "https://...@host/a.tar"),
        ("https://host/a-{000..009}.tar?X-Signature=abc&b=1", "https://host/a-{000..009}.tar?..."),
        ("s3://key:secret@bucket/x?endpoint_override=h", "s3://...@bucket/x?..."),
        ("pipe:curl -H 'Authorization: token' https://host", "pipe:curl ..."),
        ("data/digits/train", "data/digits/train"),
        ("what? me@home", "what? me@home"),
        ({"a": ["https://u@h/x", 1, None], "b": True}, {"a": ["https://...@h/x", 1, None], "b": True}),
        ({"api_key": TOKEN, "lr": 0.1}, {"api_key": "...", "lr": 0.1}),
    ],
)
def test_nested_values_lose_what_may_open_a_door(value: Any, clean: Any):
    assert without_secrets(value) == clean


@pytest.mark.parametrize("kind", PLANTED)
def test_each_kind_of_secret_is_known_by_its_shape_and_taken_out(kind: str) -> None:
    text = f"before {PLANTED[kind]} after"
    assert kind in {found for found, _, _ in find_secrets(text)}
    clean = redact(text)
    assert TOKEN not in clean
    assert PLANTED[kind] not in clean
    assert clean.startswith("before ")


def test_every_shape_has_its_example() -> None:
    """A new one needs a hint as well, without which no text is looked at."""
    assert {*SHAPES, "value that is named a secret"} == set(PLANTED)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert not list(find_secrets(text))
    assert redact(text) == text


def test_a_secret_that_was_read_or_stands_in_the_environment_is_taken_out_whatever_it_looks_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_KNOWN", set())
    monkeypatch.setenv("STORE_PASSWORD", "correct horse battery")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token-file")
    remember("plain words only")
    remember("short")
    text = "plain words only, correct horse battery, short, /home/me/token-file"
    assert redact(text) == "..., ..., short, /home/me/token-file"


def test_secrets_that_overlap_leave_nothing_of_either() -> None:
    text = f"x https://me:{PLANTED['key of AWS']}@h token={PLANTED['key of AWS']} y"
    assert PLANTED["key of AWS"] not in redact(text)
    assert redact(text).endswith(" y")
