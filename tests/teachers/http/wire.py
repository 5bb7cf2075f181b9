"""Answers as servers write them, made from known logits: what a reader must get out of them is known exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from latentforge.targets.row import SequenceTargets
from latentforge.targets.topk import sequence_rows, topk_rows
from latentforge.teachers.http.rows import Form, Question

VOCABULARY = 40
FORMS: tuple[Form, ...] = ("prompt_logprobs", "echo")


def logits_of(length: int, *, seed: int = 3, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """One row of logits for each token of a document but its first."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(3.0 * generator.standard_normal((length - 1, vocabulary))).float()


def truth(logits: torch.Tensor, k: int) -> SequenceTargets:
    """The rows that the project's own code makes of the same logits."""
    return sequence_rows(*topk_rows(logits, k, [1.0]), sequences=1)[0]


def question(tokens: tuple[int, ...], k: int, **changed: Any) -> Question:
    """A question to the model of these answers."""
    return Question(**{"tokens": tokens, "k": k, "vocab_size": VOCABULARY, "rows": VOCABULARY, **changed})


def answer(asked: Question, logits: torch.Tensor, form: Form) -> dict[str, Any]:
    """What a right server answers: k entries a row, and the document's own token where it is not among them."""
    logprobs = torch.log_softmax(logits, dim=-1)
    rows: list[dict[int, float] | None] = [None]
    for token, row in zip(asked.tokens[1:], logprobs, strict=True):
        best = torch.topk(row, min(asked.k, len(row))).indices.tolist()
        rows.append({number: float(row[number]) for number in dict.fromkeys([token, *best])})
    generated: dict[int, float] | None = None
    if asked.last_generated:
        last = rows.pop()
        assert last is not None
        generated = dict(sorted(last.items(), key=lambda item: -item[1])[: asked.k])
    sent = list(asked.prompt)
    if form == "echo":
        generated = generated or {number: -3.7 - 0.01 * number for number in range(min(asked.k, logits.shape[1]))}
        first = next(iter(generated))
        listed = [*rows, generated]
        own = [None, *[row[token] for token, row in zip(sent[1:], rows[1:], strict=True) if row], generated[first]]
        keyed = [row and {f"token_id:{number}": value for number, value in row.items()} for row in listed]
        tokens = [f"token_id:{token}" for token in [*sent, first]]
        return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": own, "top_logprobs": keyed}}]}
    prompt = [row and _ranked(row) for row in rows]
    choice: dict[str, Any] = {"prompt_logprobs": prompt, "prompt_token_ids": sent, "logprobs": None}
    if generated is not None:
        first = next(iter(generated))
        keyed = [{f"token_id:{number}": value for number, value in generated.items()}]
        choice["logprobs"] = {
            "tokens": [f"token_id:{first}"],
            "token_logprobs": [generated[first]],
            "top_logprobs": keyed,
        }
    return {"id": "cmpl-1", "choices": [choice], "usage": {"prompt_tokens": len(sent)}}


def _ranked(row: dict[int, float]) -> dict[str, Any]:
    order = sorted(row, key=lambda number: -row[number])
    return {str(n): {"logprob": v, "rank": order.index(n) + 1, "decoded_token": "x"} for n, v in row.items()}
