"""A folder of one model: safetensors, and a description that says by digest what they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256

SCHEMA = 1
WEIGHTS = "model.safetensors"


def write_folder(folder: Path, description: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    """Write ``tensors`` and, as ``description``, ``content`` with schema and digest into a fresh ``folder``, whole or
    not at all; returns the digest, the sha256 (hex) of the weights' file.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}, partial / WEIGHTS)
    digest = file_sha256(partial / WEIGHTS)
    whole = {"schema": SCHEMA, **content, "digest": digest}
    (partial / description).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return digest


def read_description(path: Path, *, what: str, next: str = "") -> dict[str, Any]:
    """The content of a description; RefusedError where there is none of this schema, so no ``what`` in its folder."""
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise RefusedError(
            f"{path} cannot be read ({error.strerror}): {path.parent} holds no {what}", next=next
        ) from None
    except ValueError as error:
        raise RefusedError(f"{path} is not JSON: {error}") from None
    schema = content.get("schema") if isinstance(content, Mapping) else None
    if schema != SCHEMA:
        raise RefusedError(f"{path} has schema {schema!r}; {SCHEMA} is read here")
    return dict(content)


def read_weights(folder: Path, description: str, digest: str) -> dict[str, Tensor]:
    """The tensors of a folder; RefusedError where they are not those whose ``digest`` its description says."""
    path = folder / WEIGHTS
    found = file_sha256(path)
    if found != digest:
        raise RefusedError(f"{path} is sha256 {found[:12]}…, {description} says {str(digest)[:12]}…")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RefusedError(f"{path} cannot be read: {error}") from None
