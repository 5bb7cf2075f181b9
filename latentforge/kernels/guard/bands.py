"""Tensors that stand between bands of a known pattern, so that a write beside them or over an input is seen.

The pattern is all ones: not-a-number in every floating type, so that reading beside a tensor shows too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BAND_BYTES = 4096


@dataclass
class _Placed:
    buffer: Tensor  # uint8, the bands included
    kept: Tensor  # the same bytes as they were
    view: Tensor
    output: bool


class Bands:
    """A set of tensors, each in a buffer of its own."""

    def __init__(self) -> None:
        self._placed: dict[str, _Placed] = {}

    def place(self, name: str, tensor: Tensor, *, output: bool = False, gap: int = 0) -> Tensor:
        """A copy of ``tensor`` between bands; ``gap`` elements of pattern follow each row of a matrix.

        ``output`` says that the tensor itself may be written.
        """
        size = tensor.element_size()
        columns = tensor.shape[-1] if tensor.dim() == 2 else tensor.numel()
        rows = tensor.shape[0] if tensor.dim() == 2 else 1
        stride = columns + gap
        band = BAND_BYTES // size
        buffer = torch.full(((2 * band + rows * stride) * size,), 255, dtype=torch.uint8, device=tensor.device)
        typed = buffer.view(tensor.dtype)
        strides = (stride, 1) if tensor.dim() == 2 else (1,) * tensor.dim()
        view = torch.as_strided(typed, tensor.shape, strides, band)
        view.copy_(tensor)
        self._placed[name] = _Placed(buffer, buffer.clone(), view, output)
        return view

    def restore(self) -> None:
        """Put everything back as it was."""
        for one in self._placed.values():
            one.buffer.copy_(one.kept)

    def disturbed(self, *, written: bool = True) -> tuple[str, str] | None:
        """(reason, detail) where something was written that must not be; outputs count where nothing was to be written.

        What was written beside a tensor is named before what was written into an input.
        """
        inside: tuple[str, str] | None = None
        for name, one in self._placed.items():
            if torch.equal(one.buffer, one.kept):
                continue
            values = one.view.clone()
            one.view.copy_(_same(one))
            beside = not torch.equal(one.buffer, one.kept)
            one.view.copy_(values)
            if beside:
                changed = int((one.buffer != one.kept).sum())
                return "oob_write", f"bytes beside {name!r} were written ({changed} bytes of its buffer changed)"
            if not (one.output and written):
                inside = inside or ("input_modified", f"{name!r} was written over")
        return inside


def _same(one: _Placed) -> Tensor:
    """The view's region of the kept bytes."""
    return torch.as_strided(one.kept.view(one.view.dtype), one.view.shape, one.view.stride(), one.view.storage_offset())
