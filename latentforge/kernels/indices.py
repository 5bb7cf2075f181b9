"""Labels and top-k ids that point nowhere are refused before anything is written, and rows that say nothing.

An absent entry of a row (id -1, logprob minus infinity, at the row's end) is no mistake: ``targets.TopKTargets``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.targets import Targets, TopKTargets


def refuse_bad_index(bad: tuple[str, int, int], vocab: int, ignore_index: int) -> None:
    """Raise for what a search found: (kind, row, value), kind empty for nothing.

    Kinds are ``label``, ``id``, ``duplicate``, with the label or id as the value; ``absent before present`` and
    ``absent with a logprob``, with the entry's column; ``silent``, a row that has neither entries nor a tail.
    """
    kind, row, value = bad
    if kind == "label":
        raise RefusedError(
            f"label {value} at row {row} is outside the vocabulary 0..{vocab - 1} (ignore_index is {ignore_index})",
            next="check that the data was packed with this vocabulary",
        )
    if kind == "id":
        raise RefusedError(f"top-k id {value} at row {row} is outside the vocabulary 0..{vocab - 1}")
    if kind == "duplicate":
        raise RefusedError(f"top-k id {value} is given twice at row {row}")
    absent = f"the top-k entry at row {row}, column {value} is absent (id -1)"
    if kind == "absent before present":
        raise RefusedError(f"{absent}, but a later one of its row is not: absent entries stand at the row's end")
    if kind == "absent with a logprob":
        raise RefusedError(f"{absent}, but has a logprob: that of an absent entry is minus infinity")
    if kind == "silent":
        raise RefusedError(
            f"all top-k entries at row {row} are absent, and its tail is minus infinity: the teacher says nothing",
            next="give such a row the tail 0 (log 1): its mass is somewhere, and its divergence zero",
        )


def check_indices(targets: Targets | None, labels: Tensor | None, vocab: int, ignore_index: int) -> None:
    """The search in torch, for tensors on any device."""
    if labels is not None and labels.numel():
        wrong = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            refuse_bad_index(("label", row, int(labels[row])), vocab, ignore_index)
    if isinstance(targets, TopKTargets) and targets.ids.numel():
        outside = (targets.ids < -1) | (targets.ids >= vocab)
        absent = targets.ids == -1
        ordered = targets.ids.sort(dim=-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        # One answer from the device for all of them.
        any_outside, any_twice, any_absent = torch.stack([outside.any(), twice.any(), absent.any()]).tolist()
        if any_outside:
            row, column = (int(i) for i in outside.nonzero()[0])
            refuse_bad_index(("id", row, int(targets.ids[row, column])), vocab, ignore_index)
        if any_absent:
            _check_absent(targets, absent, labels, vocab, ignore_index)
        if any_twice:
            row, column = (int(i) for i in twice.nonzero()[0])
            refuse_bad_index(("duplicate", row, int(ordered[row, column])), vocab, ignore_index)


def _check_absent(targets: TopKTargets, absent: Tensor, labels: Tensor | None, vocab: int, ignore_index: int) -> None:
    """Refuse absent entries ([N, k] bool) that stand before others or have a logprob, and rows that say nothing."""
    silent = absent[:, :1] & (targets.tail == -torch.inf)[:, None]
    if labels is not None:
        silent &= (labels != ignore_index)[:, None]
    found = {
        "absent before present": absent[:, :-1] & ~absent[:, 1:],
        "absent with a logprob": absent & (targets.logprobs != -torch.inf),
        "silent": silent,
    }
    for kind, wrong in found.items():
        if bool(wrong.any()):
            row, column = (int(i) for i in wrong.nonzero()[0])
            refuse_bad_index((kind, row, column), vocab, ignore_index)


def refuse_mass_outside_everything(targets: TopKTargets, vocab: int) -> None:
    """A tail where a row's entries are the whole vocabulary is a mistake of whoever made the targets."""
    if targets.ids.shape[1] != vocab:
        return
    wrong = (targets.tail > -torch.inf) & (targets.ids[:, -1] != -1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise RefusedError(
            f"tail {float(targets.tail[row]):.6g} at row {row}, but k = {vocab} is the whole vocabulary: "
            "the tail must be minus infinity"
        )
