"""Labels and top-k ids that point nowhere are refused before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.targets import Targets, TopKTargets


def refuse_bad_index(bad: tuple[str, int, int], vocab: int, ignore_index: int) -> None:
    """Raise for what a search found: (kind, row, value), kind ``label``, ``id``, ``duplicate`` or empty for nothing."""
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


def check_indices(targets: Targets | None, labels: Tensor | None, vocab: int, ignore_index: int) -> None:
    """The search in torch, for tensors on any device."""
    if labels is not None and labels.numel():
        wrong = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            refuse_bad_index(("label", row, int(labels[row])), vocab, ignore_index)
    if isinstance(targets, TopKTargets) and targets.ids.numel():
        outside = (targets.ids < 0) | (targets.ids >= vocab)
        if bool(outside.any()):
            row, column = (int(i) for i in outside.nonzero()[0])
            refuse_bad_index(("id", row, int(targets.ids[row, column])), vocab, ignore_index)
        ordered = targets.ids.sort(dim=-1).values
        twice = ordered[:, 1:] == ordered[:, :-1]
        if bool(twice.any()):
            row, column = (int(i) for i in twice.nonzero()[0])
            refuse_bad_index(("duplicate", row, int(ordered[row, column])), vocab, ignore_index)


def refuse_mass_outside_everything(targets: TopKTargets, vocab: int) -> None:
    """A tail where k is the whole vocabulary is a mistake of whoever made the targets."""
    if targets.ids.shape[1] == vocab and bool((targets.tail > -torch.inf).any()):
        row = int((targets.tail > -torch.inf).nonzero()[0, 0])
        raise RefusedError(
            f"tail {float(targets.tail[row]):.6g} at row {row}, but k = {vocab} is the whole vocabulary: "
            "the tail must be minus infinity"
        )
