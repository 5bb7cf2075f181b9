"""Kernels with one fault each, as entries of variants: ``guard_stubs:wrong_second``. Imported by children too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from latentforge.kernels.cpu.kd import row_losses
from latentforge.kernels.guard.trials import reference_rows
from latentforge.kernels.targets import DenseTargets, TopKTargets

Rows = tuple[Tensor, Tensor]


def good(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """The C++ kernel: right, and faster than the reference whatever else the machine does."""
    return row_losses(student, *rest, **named)


def _calls(disturb: Callable[[int, Tensor, Rows], Rows]) -> Callable[..., Rows]:
    """A kernel whose result is disturbed, given the number of the call in this process."""
    number = count(1)

    def kernel(student: Tensor, *rest: Any, **named: Any) -> Rows:
        return disturb(next(number), student, reference_rows(student, *rest, **named))

    return kernel


def _off(student: Tensor, rows: Rows) -> Rows:
    student *= 1.1
    return rows


def wrong_first() -> Callable[..., Rows]:
    """Wrong on the first call in a process, right afterwards."""
    return _calls(lambda call, student, rows: _off(student, rows) if call == 1 else rows)


def wrong_second() -> Callable[..., Rows]:
    """Right on the first call in a process, wrong afterwards."""
    return _calls(lambda call, student, rows: _off(student, rows) if call > 1 else rows)


def wrong_third() -> Callable[..., Rows]:
    """Wrong on the third call alone."""
    return _calls(lambda call, student, rows: _off(student, rows) if call == 3 else rows)


def wrong_after_another_shape() -> Callable[..., Rows]:
    """Wrong where the call before was of another shape (state that belongs to a shape)."""
    before: list[torch.Size] = []

    def kernel(student: Tensor, *rest: Any, **named: Any) -> Rows:
        rows = reference_rows(student, *rest, **named)
        seen = student.shape in before
        other = bool(before) and before[-1] != student.shape
        before.append(student.shape)
        return _off(student, rows) if seen and other else rows

    return kernel


def writes_beside(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """One element past the end of a row."""
    rows = reference_rows(student, *rest, **named)
    torch.as_strided(student, (1,), (1,), student.storage_offset() + student.shape[1])[0] = 7.0
    return rows


def writes_before(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """One element before the first."""
    rows = reference_rows(student, *rest, **named)
    torch.as_strided(student, (1,), (1,), student.storage_offset() - 1)[0] = 0.0
    return rows


def writes_teacher(student: Tensor, targets: DenseTargets, *rest: Any, **named: Any) -> Rows:
    """The teacher's logits are used as scratch."""
    rows = reference_rows(student, targets, *rest, **named)
    targets.logits[0, 0] += 1.0
    return rows


def absent_is_a_token(student: Tensor, targets: Any, *rest: Any, **named: Any) -> Rows:
    """The first absent entry of a top-k row is taken for a token without probability."""
    if isinstance(targets, TopKTargets):
        absent = targets.ids < 0
        unlisted = next(n for n in range(student.shape[1]) if not bool((targets.ids == n).any()))
        first = absent & (absent.cumsum(dim=1) == 1)
        targets = TopKTargets(targets.ids.masked_fill(first, unlisted), targets.logprobs, targets.tail)
    return reference_rows(student, targets, *rest, **named)


def writes_without_gradient(student: Tensor, *rest: Any, write_gradient: bool = False, **named: Any) -> Rows:
    """The gradient is written where none was asked."""
    return reference_rows(student, *rest, write_gradient=True, **named)


def gives_nan(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """One entry of the gradient."""
    rows = reference_rows(student, *rest, **named)
    student[-1, 0] = torch.nan
    return rows


def all_zero(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """Nothing was computed."""
    student.zero_()
    return student.new_zeros(len(student)), student.new_zeros(len(student))


def constant_losses(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """The mean of the losses for each row: a sum of them would not tell."""
    ce, kd = reference_rows(student, *rest, **named)
    return ce.mean().expand_as(ce), kd


def nondeterministic() -> Callable[..., Rows]:
    """The last bit of an entry changes from call to call."""

    def disturb(call: int, student: Tensor, rows: Rows) -> Rows:
        rows[0][0] *= 1.0 + call * 2.0**-22
        return rows

    return _calls(disturb)


def slow(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """Right, at a tenth of the reference's speed."""
    for _ in range(10):
        reference_rows(student.clone(), *rest, **named)
    return reference_rows(student, *rest, **named)


def segfault(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """Ends its process by a signal."""
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def raises_smem(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """What Triton says where a block asks for too much."""
    raise RuntimeError("OutOfResources: out of resource: shared memory, Required: 131072, Hardware limit: 101376")


def waits(student: Tensor, *rest: Any, **named: Any) -> Rows:
    """Starts a grandchild, tells the test through a FIFO that it is there, and never ends."""
    grandchild = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    with open(os.environ["GUARD_TEST_FIFO"], "w", encoding="ascii") as fifo:
        fifo.write(f"{os.getpid()} {grandchild.pid}")
    signal.pause()
    raise AssertionError


def configured(student: Tensor, *rest: Any, tile: int = 0, **named: Any) -> Rows:
    """Right for tiles 1 and 2; tile 2 is the slower; tile 3 is wrong."""
    if tile == 2:
        slow(student.clone(), *rest, **named)
    rows = row_losses(student, *rest, **named)
    return _off(student, rows) if tile == 3 else rows


kept_second = wrong_second()
kept_nondeterministic = nondeterministic()
