"""What a model says of rows of text, as they stand in the data: the log-probability of each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.causal import Student
from latentforge.students.latent.chunks import valid
from latentforge.students.latent.scoring import token_logprobs
from latentforge.students.latent.student import LatentStudent


@torch.no_grad()
def row_logprobs(student: Student, tokens: Tensor, *, window: int | None = None) -> Tensor:
    """fp32 [B, L - 1]: log-probability of each token but the first of rows int64 [B, L], given all before it.

    Rows longer than ``window`` inputs are read by windows of that size, each half of the one before further on: no
    token of theirs is given less than half a window, nor more than one.
    """
    length = tokens.shape[1]
    if length < 2:
        raise RefusedError(f"rows of {length} tokens: the first one is not predicted")
    size = length - 1 if window is None else window
    if size < 2:
        raise RefusedError(f"window = {window}: at least two tokens are read at a time")
    weight, bias = output_layer(student)
    parts, done, start = [], 0, 0
    while done < length - 1:
        end = min(start + size, length - 1)
        states = student.hidden(tokens[:, start:end]).unflatten(0, (len(tokens), -1))[:, done - start :]
        labels = tokens[:, done + 1 : end + 1]
        parts.append(token_logprobs(states.flatten(0, 1), weight, labels.flatten(), bias).reshape(labels.shape))
        done, start = end, start + max(1, size // 2)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def chunk_logprobs(student: LatentStudent, chunks: Tensor, eos_id: int) -> Tensor:
    """fp32 [B, C - 1, K]: what the token head says of each token of chunks int64 [B, C, K] but of a row's first chunk,
    given all before it. Refused where the student has no token head."""
    if chunks.shape[1] < 2:
        raise RefusedError(f"rows of {chunks.shape[1]} chunks: the first one is not predicted")
    states = student.states(chunks[:, :-1], valid(chunks[:, :-1], eos_id)).flatten(0, 1)
    later = chunks[:, 1:].flatten(0, 1)
    hidden = student.token_rows(states, later).flatten(0, 1)
    return token_logprobs(hidden, student.table.weight, later.flatten()).reshape(chunks[:, 1:].shape)


def output_layer(student: Student) -> tuple[Tensor, Tensor | None]:
    """Weight [V, H] and bias of a causal LM's last layer, of its real tokens alone."""
    head: Any = student.model.get_output_embeddings()
    bias = None if head.bias is None else head.bias[: student.vocab_size]
    return head.weight[: student.vocab_size], bias
