"""Weights into this process: any dtype, quantised folders where transformers can, and by name why it cannot."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from latentforge.errors import RefusedError
from latentforge.teachers.folder import ModelFolder

Dtype = Literal["float32", "bfloat16", "float16"]
Kept = Literal["plain", "packed", "expanded"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_EXPANDABLE = ("fp8",)
"""Methods of which transformers expands the weights when it is asked to."""


@dataclass(frozen=True)
class Loaded:
    """A model, and how its weights are kept: ``plain`` numbers, ``packed`` as the folder holds them, or ``expanded``
    from what the folder holds to plain numbers, since nothing here computes with them packed."""

    model: Any
    kept: Kept


def load_model(folder: ModelFolder, *, device: str, dtype: Dtype, expand: bool = False) -> Loaded:
    """Load a folder from disk alone; no code from it is run, nothing is fetched.

    ``expand`` asks for plain numbers of a quantised folder. RefusedError names the method and what is missing here.
    """
    # Imported here: transformers takes seconds, and checking a folder must not wait for it.
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils import logging as transformers_logging

    method = folder.quantization
    transformers_logging.disable_progress_bar()
    arguments: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if method is not None:
        # A method that it does not know transformers would pass over with a line in the log, and load the rest.
        if not AutoHfQuantizer.supports_quant_method(folder.config["quantization_config"]):
            raise _refused(folder.path, method, ValueError("it is none of the methods that transformers knows"))
        # What is expanded comes in bf16, whatever is asked; it is widened below, and then all of it.
        arguments["dtype"] = torch.bfloat16
        if expand:
            arguments["quantization_config"] = _expansion(folder)
        if device != "cpu":
            arguments["device_map"] = {"": device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder.path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    except ImportError as error:
        raise _refused(folder.path, method, error) from error
    except Exception as error:  # transformers raises what its parts raise of a config.json that cannot be meant
        if method is not None:
            raise _refused(folder.path, method, error) from error
        raise RefusedError(f"transformers cannot load teacher {folder.path}: {_first_line(error)}") from error
    model, report = loaded
    # A tensor that is missing would be random numbers, and the teacher would teach them.
    wrong = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in report.get(kind, ()))
    if wrong:
        raise RefusedError(
            f"teacher {folder.path} lacks {len(wrong)} tensor(s) of {folder.architecture}: {', '.join(wrong[:3])}",
            next="copy the model folder again, or correct its config.json",
        )
    kept: Kept = "plain" if method is None else "packed" if _packed(model) else "expanded"
    if kept == "expanded":
        model.to(DTYPES[dtype])
    model.requires_grad_(False).eval()
    if kept != "packed":
        model.to(device)
    return Loaded(model, kept)


def stored_dtype(folder: ModelFolder) -> str | None:
    """The dtype that most of the folder's numbers have (``F32``, ``BF16``); None where there are none."""
    counts: dict[str, int] = {}
    for tensor in folder.tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.elements
    return max(counts, key=lambda name: counts[name]) if counts else None


def _packed(model: Any) -> bool:
    """Whether a matrix is still in another form than floating point of 16 or 32 bits."""
    tensors = [*model.parameters(), *model.buffers()]
    return any(tensor.ndim >= 2 and tensor.dtype not in DTYPES.values() for tensor in tensors)


def _expansion(folder: ModelFolder) -> Any:
    method = folder.quantization
    if method not in _EXPANDABLE:
        raise RefusedError(
            f"teacher {folder.path} is quantised by {method!r}, which is not expanded here "
            f"(those that are: {', '.join(_EXPANDABLE)})",
            next="set teacher.precision = 'quantized' or 'auto'",
        )
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(dequantize=True)


def _refused(path: Path, method: str | None, error: BaseException) -> RefusedError:
    said = _first_line(error)
    wanted = re.search(r"pip install (?:--upgrade |-U )?([A-Za-z0-9_.-]+)", str(error))
    return RefusedError(
        f"teacher {path} is quantised by {method!r}, which transformers does not load here: {said}",
        next=f"pip install {wanted[1]}" if wanted else "serve it with vLLM: teacher.backend = 'vllm-local'",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
