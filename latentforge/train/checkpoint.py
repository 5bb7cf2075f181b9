"""Checkpoints: written whole or not at all, read back, and refused where a byte is missing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.digests import file_sha256

SCHEMA = 1
_STEP = re.compile(r"step-(\d{6,})")
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next step depends on, after ``step`` steps.

    ``weights`` are all tensors of the model by name (trained ones as fp32 masters), ``moments`` the optimiser's,
    ``rng`` torch's generator state; ``threads`` says under how many threads the sums were made.
    """

    model: str
    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    rng: Tensor
    threads: int


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk: what it should weigh, what it weighs, and how many trained tensors left their start."""

    path: Path
    step: int
    bytes: int
    expected_bytes: int
    moved: int
    trained: int
    unmoved: tuple[str, ...]


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 (hex) of a tensor's bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, start: dict[str, str]) -> Written:
    """Write ``folder/step-NNNNNN``, read it back and compare; older ones but the newest two are removed.

    ``start`` maps each trained tensor to its digest before step 1. FailedError where what is on disk is smaller than
    its tensors or not what was in memory: a checkpoint that cannot be used is a failure, not a warning.
    """
    final = step_folder(folder, checkpoint.step)
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_plain(checkpoint.weights), partial / "model.safetensors")
    save_file(_plain({**checkpoint.moments, "rng": checkpoint.rng}), partial / "optimizer.safetensors")
    expected = sum(_bytes(tensors) for tensors in (checkpoint.weights, checkpoint.moments))
    files = {f: file_sha256(partial / f) for f in ("model.safetensors", "optimizer.safetensors")}
    record = {
        "schema": SCHEMA,
        "model": checkpoint.model,
        "step": checkpoint.step,
        "threads": checkpoint.threads,
        "expected_bytes": expected,
        "files": files,
    }
    (partial / "state.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    for path in sorted(partial.iterdir()):
        _sync(path)
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _sync(folder)

    found = load_checkpoint(final)
    size = sum(path.stat().st_size for path in final.iterdir())
    if size < expected:
        raise FailedError(f"checkpoint {final} has {size} bytes, its tensors alone need {expected}")
    for part in ("weights", "moments"):
        for tensor, value in getattr(checkpoint, part).items():
            if tensor_sha256(getattr(found, part)[tensor]) != tensor_sha256(value):
                raise FailedError(f"checkpoint {final}: {tensor} on disk is not what was in memory")
    unmoved = tuple(name for name, digest in start.items() if tensor_sha256(found.weights[name]) == digest)
    for old in sorted(_steps(folder), key=lambda path: _number(path))[:-_KEPT]:
        shutil.rmtree(old)
    return Written(final, checkpoint.step, size, expected, len(start) - len(unmoved), len(start), unmoved)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below ``folder``."""
    return folder / f"step-{step:06d}"


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; RefusedError where it is torn, altered or of another format."""
    try:
        record: dict[str, Any] = json.loads((path / "state.json").read_bytes())
        if record["schema"] != SCHEMA:
            raise RefusedError(f"checkpoint {path} has schema {record['schema']!r}; {SCHEMA} is read here")
        for name, recorded in record["files"].items():
            found = file_sha256(path / name)
            if found != recorded:
                raise RefusedError(f"checkpoint {path}: {name} is sha256 {found[:12]}…, {recorded[:12]}… was written")
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        return Checkpoint(
            record["model"], record["step"], weights, moments, rng=moments.pop("rng"), threads=record["threads"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise RefusedError(f"checkpoint {path} cannot be read: {type(error).__name__}: {error}") from None


def newest_checkpoint(folder: Path, *, until: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a folder, of at most ``until`` steps, that is whole, and a sentence for each newer one
    that is not."""
    said = [f"checkpoint {path.name} was left unfinished and is skipped" for path in folder.glob(".partial-step-*")]
    for path in sorted(_steps(folder), key=_number, reverse=True):
        if until is not None and _number(path) > until:
            continue
        try:
            return load_checkpoint(path), said
        except RefusedError as error:
            said.append(f"skipped: {error}")
    return None, said


def _steps(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share storage; a copy on the CPU never does.
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
