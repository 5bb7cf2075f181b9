"""A folder whose matrices are rounded to FP8 in blocks, as released FP8 checkpoints keep them; and noise of that size.

What a quantised teacher may differ by is the noise of its own format. To know it, a small model is rounded here, and
beside it given random noise of the format's steps: the first must not be further from the original than the second.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LARGEST = 448.0
"""The largest number of float8_e4m3fn."""
_MANTISSA_BITS = 3
_SMALLEST_EXPONENT = -6


def round_folder(
    source: Path,
    target: Path,
    *,
    block: int = 16,
    change: Callable[[str, Tensor], Tensor] = lambda _name, scales: scales,
) -> list[str]:
    """Write ``source`` to ``target`` with the matrices of its layers in FP8, and return the names of those.

    One fp32 scale a block of ``block`` x ``block`` numbers; embedding, head and norms stay as they are. ``change`` may
    plant a fault: it is given each matrix's name and scales [rows, columns] and returns the scales to write.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    rounded: dict[str, Tensor] = {}
    names = []
    for file in sorted(target.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.ndim != 2 or "_proj." not in name:
                rounded[name] = tensor
                continue
            values, scales = _blocks(tensor, block)
            rounded[name] = values
            rounded[f"{name}_scale_inv"] = change(name, scales).contiguous()
            names.append(name)
        file.unlink()
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(rounded, target / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((target / "config.json").read_bytes())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return names


def noisy(weight: Tensor, generator: torch.Generator, *, block: int = 16) -> Tensor:
    """The matrix with each number moved by up to half a step of its format, by chance: what rounding alone explains."""
    scales = _scales(weight, block)[0].repeat_interleave(block, 0).repeat_interleave(block, 1)
    scales = scales[: weight.shape[0], : weight.shape[1]]
    exponent = torch.floor(torch.log2((weight.abs() / scales).clamp(min=1e-30))).clamp(min=_SMALLEST_EXPONENT)
    step = torch.exp2(exponent - _MANTISSA_BITS) * scales
    return weight + (torch.rand(weight.shape, generator=generator) - 0.5) * step


def _blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    scales, padded = _scales(weight, block)
    tiles = padded.reshape(scales.shape[0], block, scales.shape[1], block) / scales[:, None, :, None]
    values = tiles.reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return values.contiguous().to(torch.float8_e4m3fn), scales


def _scales(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The scale of each block fp32 [rows, columns], and the matrix padded to whole blocks."""
    rows, columns = (-(-size // block) for size in weight.shape)
    padded = torch.zeros(rows * block, columns * block)
    padded[: weight.shape[0], : weight.shape[1]] = weight.float()
    largest = padded.reshape(rows, block, columns, block).abs().amax(dim=(1, 3))
    return (largest / _LARGEST).clamp(min=1e-12), padded
