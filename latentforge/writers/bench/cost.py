"""What a token of a contestant's texts cost in operations, its sampler included."""

from __future__ import annotations

from collections.abc import Sequence

from latentforge.students.causal import shape_of
from latentforge.students.latent.flops import latent_inference, token_inference
from latentforge.students.latent.requests import ChunkModel
from latentforge.students.latent.session import LatentModel
from latentforge.students.token_session import TokenModel
from latentforge.writers.bench.turns import Asked, Text


def flops_per_token(model: ChunkModel, asked: Asked, texts: Sequence[Text]) -> float | None:
    """Operations for one token of ``texts``, at the positions and with the draws that they had; None where they are not
    counted: of a latent student that writes by tokens, and of models of another shape.

    Reading the prompt is not counted, and a chunk that a prompt began counts as one that was drawn.
    """
    positions = _positions(asked, texts)
    if isinstance(model, LatentModel) and asked.sampling.method == "tokens":
        return None
    if isinstance(model, LatentModel):
        draws, drawn = sum(text.draws for text in texts), sum(text.drawn for text in texts)
        each = draws / drawn if drawn else 1.0
        chunks = max(1, round(positions / model.chunk))
        return latent_inference(model.student.shape, model.codec.shape, positions=chunks, draws=each).total
    if isinstance(model, TokenModel) and (shape := shape_of(model.student.model)) is not None:
        return token_inference(shape, vocab_size=model.vocab_size, positions=max(1, round(positions))).total
    return None


def _positions(asked: Asked, texts: Sequence[Text]) -> float:
    """Tokens before the average token that was written."""
    before = sum(
        len(text.tokens) * (len(prompt) + (len(text.tokens) + 1) / 2)
        for prompt, text in zip(asked.prompts, texts, strict=True)
    )
    return before / sum(len(text.tokens) for text in texts)
