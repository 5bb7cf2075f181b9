"""``latent_decode`` on one shape: greedy and drawn tokens, and their log-probabilities.

A token counts as right where its score is within rounding of the best: two products of bf16 that are summed in another
order may swap equals, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.guard.bands import Bands
from latentforge.kernels.guard.trials import DTYPES, Wanted
from latentforge.kernels.guard.variants import Variant
from latentforge.kernels.noise import gumbel
from latentforge.kernels.reference import decode as reference
from latentforge.kernels.weights import Int8Weight, quantize_int8

SCORE = 1e-3
"""By how much a chosen token's score may be below the best, and a log-probability may be off."""


@dataclass(frozen=True)
class WantedIds(Wanted):
    """Ids [N], right where their ``scores`` [N, V] are within the tolerance of the best."""

    scores: Tensor | None = None

    def off(self, found: Tensor) -> float:
        """How far the worst row's choice is below the best; infinite for an id that is none."""
        assert self.scores is not None
        if found.dtype != torch.int64 or bool(((found < 0) | (found >= self.scores.shape[1])).any()):
            return float("inf")
        taken = self.scores.gather(1, found[:, None]).squeeze(1)
        return float((self.scores.amax(dim=1) - taken).max())


class DecodeTrial:
    """A vocabulary matrix (``float`` or ``int8``) with a bias; one greedy call and one with noise, top-k and top-p."""

    def __init__(self, variant: Variant, shape: tuple[int, ...], device: torch.device, seed: int) -> None:
        rows, width, vocab = shape
        dtype = DTYPES[variant.dtype]
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.bands = Bands()
        self.hidden = self.bands.place("hidden", normal(rows, width).to(dtype))
        matrix = (normal(vocab, width) * 4 / width**0.5).to(dtype)
        self.weight: Tensor | Int8Weight
        if variant.targets == "int8":
            small = quantize_int8(matrix)
            self.weight = Int8Weight(self.bands.place("weight", small.values), self.bands.place("scales", small.scales))
        else:
            self.weight = self.bands.place("weight", matrix)
        self.bias = self.bands.place("bias", normal(vocab).to(dtype))
        self.seeds = self.bands.place("seeds", torch.arange(rows, device=device) + 2**40)
        self.positions = self.bands.place("positions", torch.arange(rows, device=device) * 7)
        cut = {"top_k": min(50, vocab), "top_p": 0.95}
        self.settings = {"greedy": DecodeSettings(vocab), "drawn": DecodeSettings(vocab, 0.8, **cut)}  # type: ignore[arg-type]
        self.exact: dict[str, Tensor] = {}
        self.wanted: dict[str, Wanted] = {}
        z = reference.logits(self.hidden, self.weight, self.settings["greedy"], self.bias)
        for name, settings in self.settings.items():
            scaled = z / (settings.temperature or 1.0)
            scores = scaled.double()
            if not settings.greedy:
                everyone = torch.arange(vocab, device=device)
                scores = scores + gumbel(self.seeds[:, None], self.positions[:, None], everyone[None, :])
            scores = scores.masked_fill(~reference.allowed(z, settings), -torch.inf)
            ids = scores.argmax(dim=1)
            self.exact[name] = torch.log_softmax(scaled.double(), dim=1)
            self.wanted[f"{name} ids"] = WantedIds(ids, SCORE, scores=scores)
            self.wanted[f"{name} logprobs"] = Wanted(self.exact[name].gather(1, ids[:, None]).squeeze(1), SCORE)

    def run(self, entry: Callable[..., Any], **options: Any) -> Any:
        """Both calls: {name: (ids, logprobs)}."""
        return {
            name: entry(
                self.hidden,
                self.weight,
                settings,
                None if settings.greedy else self.seeds,
                None if settings.greedy else self.positions,
                self.bias,
                **options,
            )
            for name, settings in self.settings.items()
        }

    def call(self, entry: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
        """Ids, and log-probabilities; those of an equal that was chosen instead stand for the wanted one's."""
        self.bands.restore()
        found: dict[str, Tensor] = {}
        for name, (ids, logprobs) in self.run(entry, **options).items():
            wanted = self.wanted[f"{name} logprobs"].value
            valid = ids.clamp(0, self.exact[name].shape[1] - 1)
            own = self.exact[name].gather(1, valid[:, None]).squeeze(1)
            found[f"{name} ids"] = ids.clone()
            found[f"{name} logprobs"] = logprobs.double() - own + wanted
        return found

    def read_only(self, entry: Callable[..., Any], **options: Any) -> None:
        """Decoding never writes its arguments: each call is read-only."""
        return
