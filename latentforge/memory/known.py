"""What is known of a model's folder without loading it: its shape, its files, how its numbers are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from latentforge.errors import RefusedError
from latentforge.memory.cache import CacheShape
from latentforge.memory.shape import ModelShape

Precision = Literal["auto", "fp32", "bf16", "quantized"]

RATES = {
    **dict.fromkeys(("fp8", "fbgemm_fp8", "ptpc_fp8"), 1.02),
    **dict.fromkeys(("nvfp4", "modelopt_fp4", "mxfp4", "fp4"), 0.56),
    **dict.fromkeys(("int4", "gptq", "gptq_marlin", "awq", "awq_marlin", "bitsandbytes", "auto-round"), 0.53),
    **dict.fromkeys(("int8", "bitsandbytes_8bit"), 1.02),
}
"""Bytes a parameter that a method leaves of the matrices it quantises, scales included (GB10 notes, section (c))."""


@dataclass(frozen=True)
class KnownModel:
    """A model as far as its ``config.json`` and the size of its files tell it.

    ``shape`` None: its parameters cannot be counted here (experts, an unknown type). ``bytes``: of its weight files;
    ``largest_file`` of the largest of them. ``quantization``: the method that config.json names. ``cache`` None: what
    it keeps a token is not known. ``vocabulary``: rows of its head;
    ``positions``: the longest sequence that it takes; ``width``: bytes of a number where they are plain. ``troubles``:
    why something is not known.
    """

    shape: ModelShape | None = None
    bytes: int | None = None
    largest_file: int | None = None
    quantization: str | None = None
    cache: CacheShape | None = None
    vocabulary: int | None = None
    positions: int | None = None
    width: int = 2
    troubles: tuple[str, ...] = ()

    @classmethod
    def of_shape(cls, shape: ModelShape) -> Self:
        """A model that the pipeline makes itself, in fp32 files."""
        cache = CacheShape(shape.layers, shape.kv_heads, shape.head_dim)
        return cls(shape, 4 * shape.parameters, 4 * shape.parameters, None, cache, shape.vocab_size, width=4)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], bytes: int | None = None) -> Self:
        """What a ``config.json`` tells of a folder whose weight files have ``bytes`` bytes (None: not known).

        RefusedError where a table of it is none.
        """
        for table in ("text_config", "quantization_config"):
            if not isinstance(config.get(table), Mapping | None):
                raise RefusedError(f"config.json: {table} = {str(config[table])[:40]!r} is not a table")
        method = config.get("quantization_config")
        name = None if not method else str(method.get("quant_method", "unknown"))
        plain = {field: value for field, value in config.items() if field != "quantization_config"}
        troubles, shape, cache = [], None, None
        try:
            shape = ModelShape.from_config(plain)
        except RefusedError as error:
            troubles.append(str(error))
        try:
            cache = CacheShape.from_config(plain)
        except RefusedError as error:
            troubles.append(str(error))
        inner = config.get("text_config") or config
        sizes = (inner.get("vocab_size"), inner.get("max_position_embeddings"))
        rows, positions = (size if type(size) is int and size > 0 else None for size in sizes)
        width = 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" and name is None else 2
        return cls(shape, bytes, bytes, name, cache, rows, positions, width, tuple(troubles))

    @classmethod
    def of_folder(cls, path: Path) -> Self:
        """What a folder on this machine tells; its weights are not read. RefusedError where it is no model folder."""
        path = Path(path)
        try:
            config = json.loads((path / "config.json").read_bytes())
        except OSError as error:
            raise RefusedError(f"{path}/config.json cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise RefusedError(f"{path}/config.json is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise RefusedError(f"{path}/config.json is not an object")
        sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
        known = cls.of_config(config, sum(sizes) or None)
        return replace(known, largest_file=max(sizes, default=None))

    def weights(self, precision: Precision, device: str) -> int | None:
        """Bytes of the weights in a process that computes at ``precision``; None where they cannot be counted.

        ``auto`` is fp32 on a CPU and bf16 on a GPU, or what the folder holds where it is quantised. A quantised folder
        is as large as its files where a GPU computes with it; on a CPU transformers expands it to bf16.
        """
        if self.quantization is not None and precision in ("auto", "quantized"):
            if device == "cuda":
                return self.bytes
            return None if self.shape is None else 2 * self.shape.parameters
        if self.shape is None:
            return None
        width = {"fp32": 4, "bf16": 2}.get(precision, 2 if device == "cuda" else 4)
        return width * self.shape.parameters

    def engine_weights(self, method: str | None, width: int = 2) -> int | None:
        """Bytes of the weights in a serving engine: ``width`` bytes a number, or quantised by ``method``.

        The embedding and the head stay in bf16 then.
        """
        if self.quantization is not None:
            return self.bytes
        if self.shape is None:
            if method is not None or self.bytes is None:
                return None
            # What is not counted is as large as its files, and more where the engine computes with wider numbers.
            return self.bytes * max(width, self.width) // self.width
        if method is None:
            return width * self.shape.parameters
        rate = RATES.get(method)
        if rate is None:
            return None
        kept = self.shape.vocab_size * self.shape.hidden * (1 if self.shape.tied else 2)
        return 2 * kept + int(rate * (self.shape.parameters - kept))
