"""Canonical JSON (RFC 8785) and its sha256: the one way in which this project turns meaning into an address."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

from latentforge.errors import RefusedError


def canonical_bytes(value: Any) -> bytes:
    """The RFC 8785 serialization of a JSON value; integers of 2**53 and above are refused, as are NaN and infinity."""
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise RefusedError(f"no canonical JSON: {error}") from error


def canonical_sha256(value: Any) -> str:
    """sha256 (hex) of the canonical bytes of a JSON value."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()
