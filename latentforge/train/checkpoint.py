"""Checkpoints: written whole or not at all, compared with memory, and refused where a byte is missing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.train.generators import Generators

SCHEMA = 2
_STEP = re.compile(r"step-(\d{6,})")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Position:
    """What, beside the number of steps, says which rows come next: the training rows by the sha256 of their file, and
    the seed and the size of the batches that are drawn from them."""

    rows_sha256: str
    seed: int
    batch_size: int

    def __str__(self) -> str:
        return f"rows {self.rows_sha256[:12]}… in batches of {self.batch_size} by seed {self.seed}"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a folder stay: the ``newest`` so many, and those of steps that ``forever`` divides."""

    newest: int = 2
    forever: int | None = None

    def outlived(self, steps: Sequence[int], *, spare: int | None = None) -> list[int]:
        """Those of ``steps`` whose checkpoints go; the newest of at most ``spare`` steps is to stay as well."""
        ordered = sorted(steps)
        kept = set(ordered[-self.newest :])
        kept |= {step for step in ordered if self.forever is not None and step % self.forever == 0}
        if spare is not None:
            kept |= set([step for step in ordered if step <= spare][-1:])
        return [step for step in ordered if step not in kept]


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next step depends on, after ``step`` steps.

    ``weights`` are all tensors of the model by name (trained ones as fp32 masters), ``moments`` the optimiser's,
    ``rng`` the states of torch's generators, ``position`` where the data goes on; ``threads`` says under how many
    threads the sums were made.
    """

    model: str
    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    rng: Generators
    threads: int
    position: Position

    @property
    def bytes(self) -> int:
        """The bytes of its tensors."""
        return _bytes(self.weights) + _bytes(self.moments)


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


def snapshot(
    model: str,
    step: int,
    weights: Iterable[tuple[str, Tensor]],
    moments: Iterable[tuple[str, Tensor]],
    position: Position,
) -> Checkpoint:
    """A checkpoint of its own memory on the CPU: the steps that follow do not change it. Each tensor is let go before
    the next one comes."""
    rng, threads = Generators.now(), torch.get_num_threads()
    return Checkpoint(model, step, _copied(weights), _copied(moments), rng, threads, position)


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    start: dict[str, str],
    retention: Retention | None = None,
    spare: int | None = None,
) -> Written:
    """Write ``folder/step-NNNNNN``, compare what is on disk with what was in memory, and only then give it its name;
    older ones that ``retention`` does not keep (``spare`` is as of :meth:`Retention.outlived`) are removed.

    Tensors share no memory (:func:`snapshot`). ``start`` maps each trained tensor to its digest before step 1.
    FailedError where what is on disk is smaller than its tensors or not what was in memory: a checkpoint that cannot
    be used is a failure, not a warning.
    """
    final = step_folder(folder, checkpoint.step)
    partial = _partial(final)
    try:
        partial.mkdir(parents=True)
        size = _write(partial, final, checkpoint)
        _give_name(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # what a full disk took of it is room for the end of the run
        raise FailedError(
            f"checkpoint {final} could not be written: {error}",
            next="make room or mend the disk, then go on from the last whole one:  "
            "latentforge dispatch go --attempt next",
        ) from error
    unmoved = tuple(name for name, digest in start.items() if tensor_sha256(checkpoint.weights[name]) == digest)
    retain(folder, retention or Retention(), spare=spare)
    return Written(final, checkpoint.step, size, checkpoint.bytes, len(start) - len(unmoved), len(start), unmoved)


def retain(folder: Path, retention: Retention, *, spare: int | None = None) -> None:
    """Remove the checkpoints of a folder that are not to stay; FailedError where the disk refuses."""
    for step in retention.outlived(steps_in(folder), spare=spare):
        _discard(step_folder(folder, step))


def copy_checkpoint(path: Path, folder: Path) -> None:
    """Bring the checkpoint at ``path`` below another ``folder``, whole or not at all; one of its step that lies there
    gives way. FailedError where the disk refuses."""
    final = folder / path.name
    partial = _partial(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, partial)
        for copied in (*partial.iterdir(), partial):
            _sync(copied)
        _give_name(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise FailedError(
            f"checkpoint {path} could not be copied to {folder}: {error}",
            next="make room or mend the disk, then:  latentforge dispatch go --attempt next",
        ) from error


def _partial(final: Path) -> Path:
    """Where a checkpoint is made before it has its name; what was left there is removed."""
    partial = final.with_name(f".partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def _give_name(partial: Path, final: Path) -> None:
    if final.exists():
        _discard(final)
    os.replace(partial, final)
    _sync(final.parent)


def _discard(path: Path) -> None:
    """Take a checkpoint's name first: what has one is whole, also where this is interrupted."""
    aside = path.with_name(f".removed-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.replace(path, aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise FailedError(f"checkpoint {path} could not be removed: {error}", next="mend the disk") from error


def _write(partial: Path, final: Path, checkpoint: Checkpoint) -> int:
    """The files of a checkpoint, on the disk and compared with memory; how many bytes they have."""
    drawn = {"rng": checkpoint.rng.cpu} | ({} if checkpoint.rng.cuda is None else {"cuda_rng": checkpoint.rng.cuda})
    parts = {"model.safetensors": checkpoint.weights, "optimizer.safetensors": checkpoint.moments | drawn}
    for name, tensors in parts.items():
        save_file(tensors, partial / name)
    record = {
        "schema": SCHEMA,
        "model": checkpoint.model,
        "step": checkpoint.step,
        "threads": checkpoint.threads,
        "position": asdict(checkpoint.position),
        "expected_bytes": checkpoint.bytes,
        "files": {name: file_sha256(partial / name) for name in parts},
    }
    (partial / "state.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    for path in sorted(partial.iterdir()):
        _sync(path)
    _sync(partial)
    size = sum(path.stat().st_size for path in partial.iterdir())
    if size < checkpoint.bytes:
        raise FailedError(f"checkpoint {final} has {size} bytes, its tensors alone need {checkpoint.bytes}")
    for name, tensors in parts.items():
        with safe_open(partial / name, framework="pt") as found:
            # One tensor at a time: read back whole, it would take its memory a second time.
            for tensor, value in tensors.items():
                if not torch.equal(_raw(found.get_tensor(tensor)), _raw(value)):
                    raise FailedError(f"checkpoint {final}: {tensor} on disk is not what was in memory")
    return size


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below ``folder``."""
    return folder / f"step-{step:06d}"


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; RefusedError where it is torn, altered or of another format."""
    try:
        record = _record(path)
        for name, recorded in record["files"].items():
            found = file_sha256(path / name)
            if found != recorded:
                raise RefusedError(f"checkpoint {path}: {name} is sha256 {found[:12]}…, {recorded[:12]}… was written")
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        return Checkpoint(
            record["model"],
            record["step"],
            weights,
            moments,
            rng=Generators(moments.pop("rng"), moments.pop("cuda_rng", None)),
            threads=record["threads"],
            position=Position(**record["position"]),
        )
    except (*_UNREADABLE, SafetensorError) as error:
        raise RefusedError(f"checkpoint {path} cannot be read: {type(error).__name__}: {error}") from None


def is_whole(path: Path, digests: Mapping[str, str]) -> bool:
    """Whether :func:`load_checkpoint` would take a checkpoint whose files have these sha256: none of them is read."""
    try:
        return bool(_record(path)["files"].items() <= digests.items())
    except (*_UNREADABLE, RefusedError):
        return False


def _record(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; RefusedError for another format, else whatever a torn one raises."""
    record: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    if record["schema"] != SCHEMA:
        raise RefusedError(f"checkpoint {path} has schema {record['schema']!r}; {SCHEMA} is read here")
    return record


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


def steps_in(folder: Path) -> list[int]:
    """The steps of a folder's checkpoints, ordered."""
    return sorted(_number(path) for path in _steps(folder))


def _steps(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of a folder of more than ``step`` steps, which are made again, and unfinished ones."""
    for path in (*folder.glob(".partial-step-*"), *folder.glob(".removed-step-*")):
        shutil.rmtree(path)
    for path in _steps(folder):
        if _number(path) > step:
            _discard(path)


def _raw(tensor: Tensor) -> Tensor:
    """A tensor's bytes: NaN is what NaN is."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _copied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share storage; a copy on the CPU never does.
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors}


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
