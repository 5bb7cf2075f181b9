"""A causal decoder over chunks: K tokens go in as one position, its state knows all chunks so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from latentforge.errors import RefusedError
from latentforge.students.recomputing import layers_recomputed, recompute_layers


@dataclass(frozen=True)
class DecoderShape:
    """The size of a stack of decoder layers (RMSNorm, SwiGLU, RoPE, grouped queries)."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    intermediate: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise RefusedError(f"{field.name} = {getattr(self, field.name)} is less than 1")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise RefusedError(f"width = {self.width} is no even number for each of {self.heads} heads")
        if self.heads % self.kv_heads:
            raise RefusedError(f"heads = {self.heads} are no multiple of kv_heads = {self.kv_heads}")


class Decoder(nn.Module):
    """transformers' Qwen3 layers over vectors instead of tokens; causal."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        from transformers import Qwen3Config, Qwen3Model

        config = Qwen3Config(
            vocab_size=1,
            hidden_size=shape.width,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.width // shape.heads,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        self.model: Any = Qwen3Model(config)
        # Vectors come in: a table of tokens would never be used.
        self.model.embed_tokens = None
        self.model.main_input_name = "inputs_embeds"

    def forward(
        self, vectors: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """[B, C, d] of ``vectors`` [B, C, d], after the last norm. ``mask`` bool [B, past + C] is false where nothing
        is to be seen; ``positions`` int64 [B, C]; ``cache`` is one of ``stepping.growing_cache``, which is extended.
        """
        if cache is not None and vectors.shape[1] == 1 and not torch.is_grad_enabled():
            from latentforge.students.stepping import step

            return step(self.model, vectors, cache, mask, positions)
        found: Tensor = self.model(
            inputs_embeds=vectors,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return found

    def checkpoint_activations(self) -> None:
        """From now on, compute the activations inside the layers again for the gradient while training."""
        recompute_layers(self.model)

    @property
    def checkpoints_activations(self) -> bool:
        """Whether its layers do so."""
        return layers_recomputed(self.model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Casts leave the frequencies of the positions in fp32: rounded to bf16, far positions are other ones."""
        super()._apply(fn, recurse)
        rotary = self.model.rotary_emb
        exact = rotary.compute_default_rope_parameters(self.model.config)[0]
        rotary.inv_freq = exact.to(rotary.inv_freq.device)
        return self


class StateCache:
    """What the layers keep of chunks already seen, and which of those were there (bool [B, past])."""

    def __init__(self) -> None:
        from latentforge.students.stepping import growing_cache

        self.layers: Any = growing_cache()
        self.present: Tensor | None = None

    def __len__(self) -> int:
        """How many chunks were given, those of padding too."""
        return 0 if self.present is None else self.present.shape[1]

    def keep(self, rows: Tensor) -> None:
        """Keep the texts ``rows`` int64 [R] of the batch alone, in this order, and no place that none of them has."""
        if self.present is not None:
            present = self.present[rows]
            first = unused(present)
            self._set([(layer.keys[rows, :, first:], layer.values[rows, :, first:]) for layer in self.layers.layers])
            self.present = present[:, first:]

    def join(self, other: StateCache) -> None:
        """Add the texts of another cache after these; before the shorter ones there is padding, which is not seen."""
        assert self.present is not None  # a cache that has seen something
        assert other.present is not None
        length = max(len(self), len(other))
        self._set(
            [
                (
                    torch.cat([lengthened(mine.keys, length, -2), lengthened(theirs.keys, length, -2)]),
                    torch.cat([lengthened(mine.values, length, -2), lengthened(theirs.values, length, -2)]),
                )
                for mine, theirs in zip(self.layers.layers, other.layers.layers, strict=True)
            ]
        )
        self.present = torch.cat([lengthened(self.present, length, 1), lengthened(other.present, length, 1)])

    def _set(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        from latentforge.students.stepping import growing_cache

        self.layers = growing_cache(layers)

    def copy(self, rows: Tensor) -> StateCache:
        """A cache of its own of the texts ``rows`` int64 [R] of the batch; one may come more than once."""
        found = StateCache()
        if self.present is not None:
            found._set([(layer.keys[rows], layer.values[rows]) for layer in self.layers.layers])
            found.present = self.present[rows]
        return found


def unused(present: Tensor) -> int:
    """How many of the first places of ``present`` bool [B, C] no text has."""
    return int(present.any(0).long().argmax())


def lengthened(values: Tensor, length: int, dim: int) -> Tensor:
    """``values`` with zeros before them in ``dim``, up to ``length``."""
    shape = list(values.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([values.new_zeros(shape), values], dim=dim)


class Backbone(nn.Module):
    """States of chunks. The tokens of a chunk are embedded side by side and compressed to one vector: Linear 2d, SiLU,
    Linear d, LayerNorm (CALM, arXiv 2510.27688, section 3.3: discrete tokens score 4.70, their latents 3.25).
    """

    def __init__(self, shape: DecoderShape, chunk: int) -> None:
        super().__init__()
        width = shape.width
        self.chunk = chunk
        self.compress = nn.Sequential(
            nn.Linear(chunk * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width), nn.LayerNorm(width)
        )
        self.decoder = Decoder(shape)

    def forward(self, embedded: Tensor, valid: Tensor, cache: StateCache | None = None) -> Tensor:
        """States [B, C, d] of ``embedded`` tokens [B, C, K, d]; state i has seen the chunks up to i.

        ``valid`` bool [B, C, K] is false for padding, which is not seen: neither what follows a document's end in its
        chunk nor a chunk without any valid token, wherever it stands (its own state means nothing). ``cache`` holds the
        chunks before these, and is extended.
        """
        vectors = self.compress(embedded.masked_fill(~valid.unsqueeze(-1), 0.0).flatten(2))
        present = valid.any(-1)
        before, layers = 0, None
        if cache is not None:
            before, layers = len(cache), cache.layers
            cache.present = present if cache.present is None else torch.cat([cache.present, present], dim=1)
            present = cache.present
        mask = positions = None
        if bool((~present[:, :-1] & present[:, 1:]).any()):  # padding before a chunk; after all of them none is seen
            mask = present
            positions = (present.long().cumsum(1) - 1).clamp(min=0)[:, before:]
        found: Tensor = self.decoder(vectors, mask=mask, positions=positions, cache=layers)
        return found
