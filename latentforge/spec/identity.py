"""The identity of a run: the canonical JSON of what it means, and the id that follows from it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from latentforge.errors import RefusedError
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.reading import parse_json

Kind = Literal["data", "teacher", "score", "continuations", "autoencoder", "distill", "latent", "bench", "follow"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RUN_ID = re.compile(r"([a-z]+)-([0-9a-f]{20})")
SCHEMA = 1


@dataclass(frozen=True)
class RunIdentity:
    """What a run means: everything that may change its result, and nothing else (no host, no time, no path).

    ``inputs`` name other runs (``run:<id>``) or content (``sha256:<hex>``); ``code`` and ``lock`` are sha256 hex;
    ``secrets`` are names only; ``attempt`` counts explicit reruns from 1.
    """

    kind: Kind
    spec: dict[str, Any]
    inputs: dict[str, str]
    code: str
    lock: str
    secrets: tuple[str, ...] = ()
    attempt: int = 1

    def as_json(self) -> dict[str, Any]:
        """The JSON value whose canonical bytes are hashed."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "spec": self.spec,
            "inputs": self.inputs,
            "code": self.code,
            "lock": self.lock,
            "secrets": sorted(self.secrets),
            "attempt": self.attempt,
        }

    @cached_property
    def canonical(self) -> bytes:
        """The canonical bytes: the content of ``identity.json``."""
        return canonical_bytes(self.as_json())

    @property
    def run_id(self) -> str:
        """``<kind>-<first 20 hex digits of the sha256 of the canonical bytes>``."""
        return f"{self.kind}-{hashlib.sha256(self.canonical).hexdigest()[:20]}"

    @property
    def is_canary(self) -> bool:
        """Whether it is the short run before a full one, for whose training it stands."""
        return "stands_for" in self.inputs

    def at_attempt(self, attempt: int) -> RunIdentity:
        """The same meaning, run for the ``attempt``-th time."""
        other = replace(self, attempt=attempt)
        # Sorted keys begin with the attempt: a plan asks for dozens of attempts, and need not write each one anew.
        rest = self.canonical.removeprefix(b'{"attempt":%d,' % self.attempt)
        other.__dict__["canonical"] = b'{"attempt":%d,' % attempt + rest
        return other

    @classmethod
    def from_bytes(cls, content: bytes, *, run_id: str | None = None) -> RunIdentity:
        """Read ``identity.json``; refused where it is not canonical, not of this schema, or not the named run's."""
        try:
            value = parse_json(content)
            identity = cls(
                kind=value["kind"],
                spec=value["spec"],
                inputs=value["inputs"],
                code=value["code"],
                lock=value["lock"],
                secrets=tuple(value["secrets"]),
                attempt=value["attempt"],
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RefusedError(f"identity of {run_id or 'a run'} cannot be read: {error!r}") from error
        texts = [identity.code, identity.lock, *identity.secrets]
        if not isinstance(identity.spec, dict) or not isinstance(identity.inputs, dict):
            raise RefusedError(f"identity of {run_id or 'a run'}: spec and inputs have to be objects")
        if not all(isinstance(one, str) for one in (*texts, *identity.inputs.values())):
            raise RefusedError(f"identity of {run_id or 'a run'}: code, lock, secrets and inputs have to be texts")
        if value.get("schema") != SCHEMA or identity.kind not in KINDS:
            raise RefusedError(f"identity has schema {value.get('schema')!r}, kind {identity.kind!r}: not known here")
        if type(identity.attempt) is not int or identity.attempt < 1:
            raise RefusedError(f"identity of {run_id or 'a run'}: attempt {identity.attempt!r} is no number from 1")
        if identity.canonical != content:
            raise RefusedError(f"identity of {run_id or identity.run_id} is not in canonical form")
        if run_id is not None and identity.run_id != run_id:
            raise RefusedError(f"identity of {run_id} hashes to {identity.run_id}: it was altered")
        return identity


def check_run_id(text: str) -> str:
    """The run id itself, refused where it is not one."""
    if not RUN_ID.fullmatch(text):
        raise RefusedError(f"{text!r} is not a run id (<kind>-<20 hex digits>)")
    return text
