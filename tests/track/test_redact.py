"""What leaves this machine holds no credentials."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.track.redact import without_secrets


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
    ],
)
def test_addresses_lose_users_passwords_and_queries(value: Any, clean: Any):
    assert without_secrets(value) == clean
