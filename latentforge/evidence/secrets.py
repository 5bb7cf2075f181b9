"""Keeping secrets out: what may not stand in evidence, found by the names of environment variables."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError

_WORDS = (
    "TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|COOKIES?|BEARER|PAT|"
    "API_?KEYS?|ACCESS_?KEYS?|PRIVATE_?KEYS?|SECRET_?KEYS?|AUTH_?KEYS?"
)
DENIED_NAME = re.compile(rf"(?:^|_)(?:{_WORDS})(?:_|$)|_KEY$")
"""Names of environment variables whose values are taken for secrets (``HF_TOKEN``, ``VENICE_API_KEY``)."""

_ENVIRONMENT_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_SHORTEST = 8  # a shorter value would be found in innocent text
_TEXT = (".json", ".jsonl", ".log", ".txt", ".csv", ".toml", ".md")
_BLOCK = 1 << 20


def secret_values(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment's secrets, by name: values of denied names that are long enough to be told from other text."""
    environ = os.environ if environ is None else environ
    return {name: value for name, value in environ.items() if DENIED_NAME.search(name) and len(value) >= _SHORTEST}


def refuse_secrets(value: Any, where: str, environ: Mapping[str, str] | None = None) -> None:
    """Refuse a JSON value that holds a denied variable with its value, or the value of one anywhere in its text.

    The message names the variable and the place, never the value.
    """
    secrets = secret_values(environ)
    for place, key, item in _strings(value, where):
        if key is not None and _ENVIRONMENT_NAME.fullmatch(key) and DENIED_NAME.search(key) and item:
            raise _refusal(key, place)
        for name, secret in secrets.items():
            if secret in item:
                raise _refusal(name, place)


def refuse_secret_files(folder: Path, names: list[str], environ: Mapping[str, str] | None = None) -> None:
    """Refuse text files (logs, events, JSON) that hold a secret of the environment; streamed, any size."""
    # As it is, and as JSON writes it: with quotes, backslashes and perhaps what is not ASCII escaped.
    secrets = {
        (name, form.encode(errors="surrogateescape"))
        for name, value in secret_values(environ).items()
        for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    }
    if not secrets:
        return
    overlap = max(len(secret) for _, secret in secrets) - 1
    for relative in names:
        if not relative.endswith(_TEXT):
            continue
        with open(folder / relative, "rb") as stream:
            tail = b""
            while block := stream.read(_BLOCK):
                window = tail + block
                for name, secret in secrets:
                    if secret in window:
                        raise _refusal(name, relative)
                tail = window[-overlap:] if overlap else b""


def _refusal(name: str, place: str) -> RefusedError:
    return RefusedError(
        f"the value of {name} stands in {place}: secrets do not enter evidence",
        next=f"remove it there, and replace the credential if {place} has left this machine",
    )


def _strings(value: Any, place: str, key: str | None = None) -> Iterator[tuple[str, str | None, str]]:
    """Every string of a JSON value (keys too) as (place, the key it stands under, text)."""
    if isinstance(value, str):
        yield place, key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield place, None, str(name)
            yield from _strings(item, f"{place}.{name}", str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _strings(item, f"{place}[{index}]", key)
