"""The scheme of ``linear_kd_loss``: one sweep over the rows and, where memory asks for it, one over the vocabulary.

**Over the rows**, ``chunk_rows`` at a time: logits in fp32, the backend's row kernel, which puts the gradient over
them, and the products of that gradient with the weight (d_hidden, finished) and with the hidden states (d_weight). That
is all where the rows fit into one chunk, 6 N V H operations for a trained weight, and where the weight is frozen, 4.

d_weight needs its sums over all rows in fp32. Over several chunks these are kept, [V, H], where that is at most half
of what a chunk of logits may take, as on a GPU with its thousands of rows. Otherwise d_weight is left to a second sweep
**over the vocabulary**, a tile of columns for all rows at a time: the logits again, the gradient from the sums of the
rows (``linear_tiles``), and one product which finishes that tile. 8 N V H operations, and nothing of the size [V, H]
beside the result.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.kernels import backends
from latentforge.kernels.linear_products import Products, products_for
from latentforge.kernels.linear_tiles import BLOCK_ROWS, RowSums, row_sums, tile_gradient
from latentforge.kernels.reference.kd import shape_logits
from latentforge.kernels.reference.linear import LinearLosses
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, LinearTargets, Targets, TopKTargets

# fp32 tensors of a tile's size that ``tile_gradient`` holds at the same time, its argument and the teacher's included.
TILE_TEMPORARIES = 8


@dataclass(frozen=True)
class Problem:
    """Tensors of one call without its ignored rows: ``hidden`` [N, H], ``weight`` [V, H], ``labels`` [N].

    ``kept`` [N] says which of all ``rows`` these are, None where they are all. Dense targets keep all their rows: they
    are not copied whole.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Targets | LinearTargets | None
    labels: Tensor
    rows: int
    kept: Tensor | None
    settings: KDSettings

    @property
    def teacher_takes_a_chunk(self) -> bool:
        """Whether the teacher's logits of a chunk are a tensor of their own."""
        return isinstance(self.targets, LinearTargets) or (
            isinstance(self.targets, DenseTargets) and self.kept is not None
        )


@dataclass(frozen=True)
class Plan:
    """``rows`` of a chunk; ``keep_sums``: d_weight in fp32 over the chunks; ``again``: in a second sweep."""

    rows: int
    keep_sums: bool
    again: bool

    @staticmethod
    def of(problem: Problem, chunk_rows: int, want_weight: bool) -> Plan:
        """The plan whose temporaries stay within ``chunk_rows`` * V fp32 numbers."""
        count, width = problem.hidden.shape
        limit = max(1, chunk_rows // 2 if problem.teacher_takes_a_chunk else chunk_rows)
        several = want_weight and count > limit
        keep_sums = several and 2 * width <= limit
        if keep_sums:
            limit -= width
        chunks = max(1, math.ceil(count / limit))
        return Plan(math.ceil(count / chunks), keep_sums, several and not keep_sums)


def default_chunk_rows(rows: int, vocab: int, device: torch.device) -> int:
    """How many rows of logits are held at a time where the caller does not say.

    On the host a sixteenth of the rows, at least 256: the weight is read from memory a few times only, and the extra
    memory is a fixed small part of [N, V]. On a GPU at least 2048, and more where a sixteenth of its memory has room:
    a short chunk spends more time on reading the weight than on multiplying. The memory that counts is what the machine
    has, not what is free, so that the same call gives the same bits again.
    """
    if device.type == "cuda":
        return max(2048, torch.cuda.get_device_properties(device).total_memory // 16 // (4 * vocab))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(max(256, math.ceil(rows / 16)), memory // 8 // (4 * vocab)))


def without_ignored_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets | LinearTargets | None,
    labels: Tensor,
    settings: KDSettings,
) -> Problem:
    """The rows that count: what an ignored row holds must not reach a sum, and it costs no product."""
    counts = labels != settings.ignore_index
    if bool(counts.all()):
        return Problem(hidden, weight, bias, targets, labels, len(labels), None, settings)
    kept = counts.nonzero().squeeze(-1)
    if isinstance(targets, TopKTargets):
        targets = TopKTargets(targets.ids[kept], targets.logprobs[kept], targets.tail[kept])
    elif isinstance(targets, LinearTargets):
        targets = LinearTargets(
            targets.hidden[kept], targets.weight, targets.bias, targets.logit_scale, targets.soft_cap
        )
    return Problem(hidden[kept], weight, bias, targets, labels[kept], len(labels), kept, settings)


def loss_and_gradients(
    backend: str, problem: Problem, *, want_hidden: bool, want_weight: bool, want_bias: bool, chunk_rows: int
) -> LinearLosses:
    """Losses of the rows and the gradients that are wanted, by the row kernels of ``backend``.

    The gradients come in the dtypes of their tensors (that of the bias in fp32), None where not wanted.
    """
    hidden, weight, settings = problem.hidden, problem.weight, problem.settings
    count, vocab = len(hidden), len(weight)
    products = products_for(hidden, weight)
    plan = Plan.of(problem, chunk_rows, want_weight)
    losses: list[tuple[Tensor, Tensor]] = []
    sums: list[RowSums] = []
    d_hidden = hidden.new_zeros(problem.rows, hidden.shape[1]) if want_hidden else None
    d_bias = hidden.new_zeros(vocab, dtype=torch.float32) if want_bias else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32 if plan.keep_sums else None) if want_weight else None

    for rows in slices(count, plan.rows):
        part = _teacher_rows(problem, rows)
        x = products.logits(hidden[rows], weight)
        if plan.again:
            sums.append(row_sums(x, part, problem.bias, settings))
        ce, kd = backends.kd_rows(
            backend,
            x,
            part,
            problem.labels[rows],
            settings,
            bias=problem.bias,
            write_gradient=want_hidden or want_weight or want_bias,
            checked=True,
        )
        losses.append((ce, kd))
        if d_bias is not None:
            d_bias += x.sum(0)
        operand = products.operand(hidden[rows])
        total = torch.zeros_like(operand, dtype=torch.float32) if d_hidden is not None else None
        for columns in slices(vocab, products.tile) if want_hidden or (want_weight and not plan.again) else ():
            if total is not None:
                total += products.times(x[:, columns], weight[columns])
            if d_weight is not None and not plan.again:
                part_of_it = products.times(x[:, columns].T, operand)
                if plan.keep_sums:
                    part_of_it += d_weight[columns]
                d_weight[columns] = part_of_it
        if d_hidden is not None and total is not None:
            d_hidden[rows if problem.kept is None else problem.kept[rows]] = total.to(d_hidden.dtype)
        del x, part

    nothing = hidden.new_zeros(0, dtype=torch.float32)
    ce, kd = (torch.cat([*column, nothing]) for column in zip(*losses, strict=True)) if losses else (nothing, nothing)
    if plan.again and d_weight is not None:
        known = RowSums.joined(sums).judged(ce, kd, settings)
        columns_at_once = max(1, plan.rows * vocab // (TILE_TEMPORARIES * count))
        _sweep_vocabulary(problem, products, known, columns_at_once, d_weight)
    if d_weight is not None:
        d_weight = d_weight.to(weight.dtype)
    return LinearLosses(ce, kd, d_hidden, d_weight, d_bias)


def _sweep_vocabulary(problem: Problem, products: Products, sums: RowSums, width: int, d_weight: Tensor) -> None:
    """Writes d_weight [V, H], a tile of ``width`` tokens at a time."""
    operand = products.operand(problem.hidden)
    for columns in slices(len(problem.weight), width):
        x = products.logits(operand, problem.weight[columns])
        targets = _teacher_columns(problem, columns)
        gradient = tile_gradient(x, columns, targets, problem.labels, problem.bias, problem.settings, sums)
        d_weight[columns] = products.times(gradient.T, operand)


def _teacher_rows(problem: Problem, rows: slice) -> Targets | None:
    """The targets of some rows, over the whole vocabulary."""
    targets = problem.targets
    if isinstance(targets, TopKTargets):
        return TopKTargets(targets.ids[rows], targets.logprobs[rows], targets.tail[rows])
    if isinstance(targets, LinearTargets):
        logits = products_for(targets.hidden, targets.weight).logits(targets.hidden[rows], targets.weight)
        for block in slices(len(logits), BLOCK_ROWS) if _is_shaped(targets) else ():
            logits[block] = shape_logits(logits[block], targets.bias, targets.logit_scale, targets.soft_cap)
        return DenseTargets(logits)
    if isinstance(targets, DenseTargets):
        return DenseTargets(targets.logits[rows if problem.kept is None else problem.kept[rows]])
    return None


def _teacher_columns(problem: Problem, columns: slice) -> Targets | None:
    """The targets of some columns, of all rows; top-k targets whole."""
    targets = problem.targets
    if isinstance(targets, LinearTargets):
        logits = products_for(targets.hidden, targets.weight).logits(targets.hidden, targets.weight[columns])
        bias = None if targets.bias is None else targets.bias[columns]
        return DenseTargets(shape_logits(logits, bias, targets.logit_scale, targets.soft_cap))
    if isinstance(targets, DenseTargets):
        tile = targets.logits[:, columns]
        return DenseTargets(tile if problem.kept is None else tile[problem.kept])
    return targets


def _is_shaped(targets: LinearTargets) -> bool:
    return targets.bias is not None or targets.logit_scale != 1.0 or targets.soft_cap is not None


def slices(count: int, size: int) -> Iterator[slice]:
    """0..count in pieces of ``size``, the last one shorter."""
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + size, count))
