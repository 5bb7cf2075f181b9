"""The token head: the tokens of a chunk one after the other, each from the state and those before it in the chunk."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from latentforge.students.latent.backbone import Decoder, DecoderShape, StateCache


class TokenHead(nn.Module):
    """A small causal decoder over the K tokens of a chunk, given the state before it.

    Its conditionals are exact: those of the true prefix, which is what a teacher's rows are (a product of K rows, each
    from its own prefix, is the chunk's probability). Its hidden states meet the table of the embedding.
    """

    def __init__(self, shape: DecoderShape, layers: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(shape.width) * 0.02)
        self.from_state, self.state_norm = nn.Linear(shape.width, shape.width), nn.LayerNorm(shape.width)
        self.decoder = Decoder(replace(shape, layers=layers))

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Hidden states [N, K, d] of ``states`` [N, d] and the chunk's ``embedded`` tokens [N, K, d]; row k predicts
        token k and has seen the tokens before it, so what stands at k and after changes nothing in it.
        """
        before = torch.cat([self.first(states).to(embedded.dtype), embedded[:, :-1]], dim=1)
        found: Tensor = self.decoder(before + self.context(states))
        return found

    def first(self, states: Tensor) -> Tensor:
        """What stands before the first token, [N, 1, d]."""
        return self.start.expand(len(states), 1, -1)

    def context(self, states: Tensor) -> Tensor:
        """What each position is told of the text before the chunk, [N, 1, d] of ``states`` [N, d]."""
        found: Tensor = self.state_norm(self.from_state(states))
        return found.unsqueeze(1)


class TokenSteps:
    """The token head over one chunk after ``states`` [N, d], a token at a time: each position is computed once."""

    def __init__(self, head: TokenHead, table: nn.Embedding, states: Tensor) -> None:
        self._head, self._table = head, table
        self._context, self._before = head.context(states), head.first(states)
        self._cache = StateCache().layers

    def next(self) -> Tensor:
        """The hidden states [N, d] that predict the token after those that are there."""
        found: Tensor = self._head.decoder(self._before.to(self._context.dtype) + self._context, cache=self._cache)
        return found[:, 0]

    def add(self, tokens: Tensor) -> None:
        """Say what the token is that ``next`` predicted, int64 [N]."""
        self._before = self._table(tokens).unsqueeze(1)
