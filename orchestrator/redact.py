"""What must never be shown: credentials in addresses, tokens by their shape, values by the name before them."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

GONE = "..."
NAMED = r"(?:pass(?:word|wd|phrase)|token|api_?key|(?<!tracking\.)(?<!store_)secret|access_?key|credential)"
"""Words in the name of a value that is a secret; `tracking.secret` and `store_secret` say only where one is."""
SHAPES = {
    "private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?P<{0}>[^-]*)",
    "password in an address": r"://(?P<{0}>[^/@\s'\"{{}}<>]*:[^/@\s'\"{{}}<>]+)@",
    "authorization header": (
        r"(?i:authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)?\s*)(?P<{0}>[\w.+/=~-]{{8,}})"
    ),
    "key of AWS": r"\b(?P<{0}>(?:AKIA|ASIA)[0-9A-Z]{{16}})\b",
    "token of GitHub": r"\b(?P<{0}>gh[pousr]_[A-Za-z0-9]{{36,}}|github_pat_\w{{40,}})\b",
    "token of Hugging Face": r"\b(?P<{0}>hf_[A-Za-z0-9]{{30,}})\b",
    "key of W&B": r"\b(?P<{0}>wandb_v1_\w{{20,}})\b",
    "API key": r"\b(?P<{0}>sk-[\w-]{{32,}}|AIza[\w-]{{35}}|xox[abprs]-[\w-]{{20,}})",
    "JSON web token": r"\b(?P<{0}>eyJ[\w-]{{8,}}\.eyJ[\w-]{{8,}}\.[\w-]+)",
    "signed address": r"(?i:[?&](?:x-amz-signature|x-goog-signature|sig)=)(?P<{0}>[\w%+/=.-]{{8,}})",
    "key of 40 hexadecimal digits": r"(?i:key|token|secret|password)\w*\W{{1,5}}(?P<{0}>[0-9a-f]{{40}})\b",
}
"""What is a secret by its looks alone, as a pattern with one group for what must go."""

HINTS = (
    "://", "?", "private key-", "authorization", "akia", "asia", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_",
    "hf_", "wandb_v1_", "sk-", "aiza", "xox", "eyj", "sig", "key", "token", "secret", "pass", "credential",
)  # fmt: skip
"""A text without any of these, in small letters, holds nothing that is known by its looks: most lines of a log."""
_SHAPES = {kind: re.compile(form.format("secret")) for kind, form in SHAPES.items()}
_NAMED = re.compile(rf"(?i:{NAMED}[\w-]*)['\"]?\s*[:=]\s*['\"]?(?P<secret>(?![/~.])[\w+/=.~-]{{12,}})")
_USER = re.compile(r"(?<=://)[^/@\s'\"]+@")
_QUERY = re.compile(r"(?<=[^\s'\"])\?[^\s'\")=]+=[^\s'\")]*")
_ENV = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_KNOWN: set[str] = set()
_LEAST = 8
"""Characters of a known secret: a shorter one would be found everywhere."""


def remember(secret: str) -> None:
    """This process has read a secret: `redact` takes it out of every text from now on."""
    if len(secret) >= _LEAST:
        _KNOWN.add(secret)


def find_secrets(text: str) -> Iterator[tuple[str, int, int]]:
    """What looks like a secret: its kind, and where it begins and ends; in order, nothing twice by its shape."""
    if not _may_hold(text):
        return
    shaped = [(*found.span("secret"), kind) for kind, form in _SHAPES.items() for found in form.finditer(text)]
    behind = 0
    for start, end, kind in sorted(shaped):
        if start >= behind:
            yield kind, start, end
        behind = max(behind, end)
    for found in _NAMED.finditer(text):
        if _is_random(found["secret"]):
            yield "value that is named a secret", *found.span("secret")


def redact(text: str) -> str:
    """The text without secrets, and without user names and queries of the addresses in it."""
    return _redact(text, _KNOWN | _named())


def redactor() -> Callable[[str], str]:
    """`redact` for many lines: what the environment names a secret is looked up once."""
    named = _named()
    return lambda text: _redact(text, _KNOWN | named)


def _redact(text: str, known: set[str]) -> str:
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, GONE)
    if not _may_hold(text):
        return text
    text = _QUERY.sub(f"?{GONE}", _USER.sub(f"{GONE}@", text))
    kept, behind = "", 0
    for _, start, end in sorted(find_secrets(text), key=lambda found: found[1]):
        kept += text[behind:start] + GONE if start >= behind else ""
        behind = max(behind, end)
    return kept + text[behind:]


def without_secrets(value: Any) -> Any:
    """The same nested value with every text in it redacted; a `pipe:` command keeps its program only."""
    if isinstance(value, dict):
        return {key: _without_secret(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    return " ".join([*value.split()[:1], GONE]) if value.startswith("pipe:") else redact(value)


def _without_secret(name: Any, value: Any) -> Any:
    clean = without_secrets(value)
    return redact(f"{name}={clean}").removeprefix(f"{name}=") if isinstance(clean, str) else clean


def _may_hold(text: str) -> bool:
    small = text.lower()
    for hint in HINTS:  # noqa: SIM110, since any() takes twice as long
        if hint in small:
            return True
    return False


def _named() -> set[str]:
    named = {value for name, value in os.environ.items() if _ENV.search(name)}
    return {value for value in named if len(value) >= _LEAST and not value.startswith(("/", "~"))}


def _is_random(text: str) -> bool:
    """Letters and digits mixed, at more than three bits a character: not a word, a path of words or a number."""
    counts = Counter(text).values()
    bits = -sum(n / len(text) * math.log2(n / len(text)) for n in counts)
    return bits > 3 and any(c.isdigit() for c in text) and any(c.isalpha() for c in text)
