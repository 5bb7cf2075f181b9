"""The model that a run leaves behind: saved as a Hugging Face folder, read back, and told apart from its start."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from latentforge.data.tokenizer import copy_tokenizer
from latentforge.errors import FailedError
from latentforge.events import EventLog
from latentforge.students.adapters import frozen
from latentforge.students.causal import Student
from latentforge.train.checkpoint import tensor_sha256
from latentforge.train.engines.protocol import Optimiser


def start_digests(optimiser: Optimiser) -> dict[str, str]:
    """The digest of every tensor before the first step: of the masters where it is trained, else of the model."""
    return {name: tensor_sha256(value) for name, value in optimiser.each_weight()}


def frozen_digests(model: nn.Module) -> dict[str, str]:
    """The digest of every tensor that stands frozen beside adapters; none where there are no adapters."""
    return {name: tensor_sha256(value) for name, value in frozen(model).items()}


def save_model(
    student: Student,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    tokenizer: Path,
    start: dict[str, str],
    log: EventLog,
    step: int,
    model: str,
    **more: Any,
) -> dict[str, Any]:
    """Save ``folder`` whole, compare every tensor on disk with memory, and say in an event what moved since ``start``,
    and ``more``.

    FailedError where what is on disk is not what was trained.
    """
    from transformers.utils import logging as transformers_logging

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    transformers_logging.disable_progress_bar()
    student.model.save_pretrained(partial)
    copy_tokenizer(tokenizer, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return say_saved(student.model, weights, folder, start=start, log=log, step=step, model=model, **more)


def say_saved(
    trained: nn.Module,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    start: dict[str, str],
    log: EventLog,
    step: int,
    model: str,
    **more: Any,
) -> dict[str, Any]:
    """Compare every tensor that was saved in ``folder`` with memory, and say in an event what moved since ``start``,
    and ``more``.

    ``weights`` are the optimiser's: masters where a tensor is trained. FailedError where what is on disk is not what
    was trained.
    """
    files = sorted(folder.glob("*.safetensors"))
    saved = {name: value for file in files for name, value in load_file(file).items()}
    parameters = dict(trained.named_parameters())
    wrong = [n for n, p in parameters.items() if n not in saved or tensor_sha256(saved[n]) != tensor_sha256(p)]
    if wrong:
        raise FailedError(f"{folder}: {len(wrong)} tensor(s) on disk are not what was trained: {', '.join(wrong[:3])}")
    unmoved = [name for name, digest in start.items() if tensor_sha256(weights[name]) == digest]
    weight = {
        "bytes": sum(file.stat().st_size for file in files),
        "expected_bytes": sum(p.numel() * p.element_size() for p in parameters.values()),
        "moved": len(start) - len(unmoved),
        "tensors": len(start),
        "unmoved": unmoved,
        **more,
    }
    log.checkpoint(step, path=f"{folder.parent.name}/{folder.name}", product=True, model=model, **weight)
    return weight
