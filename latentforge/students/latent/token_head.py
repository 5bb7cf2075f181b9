"""The token head: the tokens of a chunk one after the other, each from the state and those before it in the chunk."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from latentforge.students.latent.backbone import Decoder, DecoderShape


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
        first = self.start.expand(len(states), 1, -1)
        before = torch.cat([first.to(embedded.dtype), embedded[:, :-1]], dim=1)
        found: Tensor = self.decoder(before + self.state_norm(self.from_state(states)).unsqueeze(1))
        return found
