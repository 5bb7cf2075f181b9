"""A model's folder in Hugging Face's layout: checked from its headers, and its content digest."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError

_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_LFS = b"version https://git-lfs"
_BLOCK = 1 << 20
_COPY_AGAIN = "copy or download the file again"
# Written by whoever saves the folder; they change no answer of the model.
_NOT_FUNCTIONAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes ``[start, end)`` of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that was found whole.

    ``weights_sha256`` covers names, dtypes, shapes and bytes of all tensors: not the file's name, sharding, metadata
    or order, so a copy under another name has the same. ``sha256`` covers that and the configuration as far as it can
    change an answer. ``vocab_size`` counts embedding rows, ``parameters`` the numbers in the files.
    """

    path: Path
    sha256: str
    weights_sha256: str
    config: dict[str, Any]
    vocab_size: int
    tokens: int | None
    parameters: int
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """The class that config.json names, as ``Qwen3ForCausalLM``."""
        names = self.config.get("architectures")
        return str(names[0] if isinstance(names, list) and names else self.config.get("model_type"))

    @property
    def quantization(self) -> str | None:
        """The method by which the weights are quantized (``gptq``, ``fp8``), None where they are plain numbers."""
        described = self.config.get("quantization_config")
        return None if described is None else str(described.get("quant_method", "unknown"))

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the configuration allows, where it says one."""
        value = self.config.get("max_position_embeddings")
        return value if isinstance(value, int) else None


def check_model_folder(path: Path, *, digest: bool = True) -> ModelFolder:
    """Check a folder before anything loads it: config, weights present, every header right, bytes all there.

    RefusedError names the file and what is wrong. ``digest=False`` skips reading the weights (both digests are then
    empty strings).
    """
    path = Path(path)
    if not path.exists():
        raise RefusedError(f"model folder {path} does not exist")
    if not path.is_dir():
        raise RefusedError(f"model {path} is a file, not a folder", next="name the folder that holds config.json")
    config = _read_config(path / "config.json")
    tensors = tuple(sorted(_all_tensors(path), key=lambda tensor: tensor.name))
    vocab_size = _embedding_rows(path, config, tensors)
    tokens = _token_count(path)
    if tokens is not None and tokens > vocab_size:
        raise RefusedError(
            f"model folder {path} has {vocab_size} embedding rows for the {tokens} tokens of its tokenizer.json",
            next="use the tokenizer that the model was trained with, or resize its embedding",
        )
    weights = _weights_sha256(tensors) if digest else ""
    functional = {name: value for name, value in config.items() if name not in _NOT_FUNCTIONAL}
    canonical = json.dumps(functional, sort_keys=True, separators=(",", ":"))
    whole = hashlib.sha256(f"{weights}\n{canonical}".encode()).hexdigest() if digest else ""
    return ModelFolder(path, whole, weights, config, vocab_size, tokens, sum(t.elements for t in tensors), tensors)


def read_safetensors_header(file: Path) -> list[TensorInfo]:
    """The tensors that a safetensors file declares; refused unless they fill the file exactly, without overlap."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        if head.startswith(_LFS[:8]):
            raise RefusedError(f"{file} is a Git LFS pointer, not the weights", next="git lfs pull")
        if len(head) < 8:
            raise RefusedError(f"{file} is truncated: {size} bytes", next=_COPY_AGAIN)
        (length,) = struct.unpack("<Q", head)
        if length > min(_MAX_HEADER, size - 8):
            raise RefusedError(
                f"{file} is truncated or no safetensors file: its header claims {length} bytes, the file has {size}",
                next=_COPY_AGAIN,
            )
        raw = stream.read(length)
    tensors = sorted(_parse_header(file, raw), key=lambda tensor: (tensor.start, tensor.end))
    at = 8 + length
    for tensor in tensors:
        bits = tensor.elements * _ITEM_BITS[tensor.dtype]
        if tensor.start != at or (tensor.end - tensor.start) * 8 != bits:
            raise RefusedError(
                f"{file}: tensor {tensor.name!r} ({tensor.dtype} {list(tensor.shape)}) claims bytes {tensor.start} to "
                f"{tensor.end}; it should begin at {at} and hold {bits / 8:g} bytes",
                next=_COPY_AGAIN,
            )
        at = tensor.end
    if at != size:
        what = "truncated" if size < at else "longer than its header says"
        raise RefusedError(f"{file} is {what}: {size} bytes, the header accounts for {at}", next=_COPY_AGAIN)
    return tensors


def _parse_header(file: Path, raw: bytes) -> Iterator[TensorInfo]:
    base = 8 + len(raw)
    try:
        header = json.loads(raw)
        declared = [(name, value) for name, value in header.items() if name != "__metadata__"]
        for name, value in declared:
            start, end = value["data_offsets"]
            shape = tuple(value["shape"])
            if value["dtype"] not in _ITEM_BITS:
                raise ValueError(f"tensor {name!r} has dtype {value['dtype']!r}")
            if any(type(number) is not int or number < 0 for number in (start, end, *shape)) or start > end:
                raise ValueError(f"tensor {name!r} has shape {list(shape)} at {start}..{end}")
            yield TensorInfo(name, value["dtype"], shape, file, base + start, base + end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(f"{file}: the safetensors header is corrupt ({error})", next=_COPY_AGAIN) from None


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise RefusedError(f"{file.parent} has no config.json: it is no model folder") from None
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{file} is not JSON: {error}", next=_COPY_AGAIN) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise RefusedError(f"{file} names no model_type: it is no model's configuration")
    for name in ("text_config", "quantization_config"):
        if not isinstance(config.get(name), dict | None):
            raise RefusedError(f"{file}: {name} is {str(config[name])[:40]!r}, not a table", next=_COPY_AGAIN)
    return config


def _all_tensors(folder: Path) -> list[TensorInfo]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        found = read_safetensors_header(single)
    elif index.is_file():
        found = _sharded(folder, index)
    else:
        other = [path.name for pattern in ("pytorch_model*.bin", "*.gguf") for path in sorted(folder.glob(pattern))]
        have = f" (it has {other[0]}, which is not read)" if other else ""
        raise RefusedError(
            f"model folder {folder} is without weights: no model.safetensors{have}",
            next="save it with save_pretrained, which writes safetensors",
        )
    if not found:
        raise RefusedError(f"model folder {folder} is without weights: model.safetensors holds no tensor")
    return found


def _sharded(folder: Path, index: Path) -> list[TensorInfo]:
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"{index} cannot be read: {error!r}", next=_COPY_AGAIN) from None
    found: dict[str, TensorInfo] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise RefusedError(f"{index} names {name!r}, which is not a file of the folder")
        shard = folder / name
        if not shard.is_file():
            raise RefusedError(f"model folder {folder} is without {name}, which its index names", next=_COPY_AGAIN)
        found.update({tensor.name: tensor for tensor in read_safetensors_header(shard)})
    for tensor, name in placed.items():
        if tensor not in found or found[tensor].file.name != name:
            raise RefusedError(f"{folder / name} does not hold tensor {tensor!r}, which the index places there")
    return list(found.values())


def _embedding_rows(folder: Path, config: dict[str, Any], tensors: tuple[TensorInfo, ...]) -> int:
    declared = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if type(declared) is not int or declared < 1:
        raise RefusedError(f"{folder / 'config.json'}: vocab_size is {declared!r}, not a count of tokens")
    for tensor in tensors:
        if tensor.name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
            if len(tensor.shape) != 2 or tensor.shape[0] != declared:
                raise RefusedError(
                    f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, config.json says vocab_size = "
                    f"{declared}"
                )
            break
    return declared


def _token_count(folder: Path) -> int | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_bytes())
        model = value["model"]["vocab"]
        # A unigram model lists its tokens in order, the others map them to ids.
        last = [len(model) - 1] if isinstance(model, list) else list(model.values())
        return int(max([*last, *(token["id"] for token in value.get("added_tokens", []))], default=-1)) + 1
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(f"{file} cannot be read: {error!r}", next=_COPY_AGAIN) from None


def _weights_sha256(tensors: tuple[TensorInfo, ...]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        content = hashlib.sha256()
        with open(tensor.file, "rb") as stream:
            stream.seek(tensor.start)
            left = tensor.end - tensor.start
            while left:
                block = stream.read(min(_BLOCK, left))
                if not block:
                    raise RefusedError(f"{tensor.file} became shorter while it was read", next=_COPY_AGAIN)
                content.update(block)
                left -= len(block)
        shape = ",".join(map(str, tensor.shape))
        whole.update(f"{tensor.name}\0{tensor.dtype}\0{shape}\0{content.hexdigest()}\n".encode())
    return whole.hexdigest()
