"""``effective.json``: what a run really ran with, beside what was asked."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from latentforge.errors import FailedError, LatentForgeError
from latentforge.evidence.configuration import compare_configuration
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import RunDir
from latentforge.train.engines.world import World

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "zstandard", "latentforge")


def record(run: RunDir, **parts: Any) -> None:
    """Merge ``parts`` into the run's ``effective.json``, whole or not at all."""
    content = read(run)
    for name, value in parts.items():
        known = content.get(name)
        content[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, Mapping) else value
    temporary = run.effective_file.with_name("effective.json.partial")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, run.effective_file)


def read(run: RunDir) -> dict[str, Any]:
    """The content of ``effective.json``; empty where there is none yet."""
    if not run.effective_file.is_file():
        return {}
    content: dict[str, Any] = json.loads(run.effective_file.read_bytes())
    return content


def differences(kind: str, requested: Mapping[str, Any], effective: Mapping[str, Any]) -> list[str]:
    """A sentence for each requested value that is not the effective one."""
    compared = compare_configuration(kind, requested, {"requested": requested, "effective": effective})
    return [f"{d['field']} = {d['requested']!r} asked, {d['effective']!r} in force" for d in compared["differences"]]


def require_same(kind: str, requested: Mapping[str, Any], effective: Mapping[str, Any]) -> None:
    """FailedError where a value that was asked for is not in force: said before the first step, not after the last."""
    found = differences(kind, requested, effective)
    if found:
        raise FailedError("the configuration in force is not the one asked for: " + "; ".join(found))


def settle(
    run: RunDir,
    identity: RunIdentity,
    in_force: Mapping[str, Any],
    *,
    device: torch.device,
    kernel: str,
    tokenizer_sha256: str,
    flops: Mapping[str, float],
) -> None:
    """Record what a training holds now that it is set up, as the first of its processes does for all; FailedError where
    it is not what was asked for."""
    if World.here().first:
        record(
            run,
            effective=in_force,
            device=device_record(device),
            kernel_backend=kernel,
            tokenizer_sha256=tokenizer_sha256,
            flops=flops,
        )
    require_same(identity.kind, identity.spec, in_force)


def versions() -> dict[str, str]:
    """Python and the packages whose version can change a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def extension() -> dict[str, Any]:
    """What is known of the built extension, or why it cannot be used."""
    try:
        from latentforge.kernels.native import extension_identity

        return dict(extension_identity())
    except LatentForgeError as error:
        return {"unavailable": str(error)}


def device_record(device: torch.device) -> dict[str, Any]:
    """The device by name, with its threads or its driver."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {"type": "cuda", "name": found.name, "memory_bytes": found.total_memory, "cuda": torch.version.cuda}
    return {"type": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
