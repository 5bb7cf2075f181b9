"""How far ``latent_decode`` is from fp64: the token that it takes and the log-probability that it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.noise import gumbel
from latentforge.kernels.parity import where
from latentforge.kernels.parity.finding import Parity, disagreements
from latentforge.kernels.parity.kd import NAMES
from latentforge.kernels.reference import decode as reference
from latentforge.kernels.weights import Int8Weight, quantize_int8

# What a log-probability may be off, in natural logarithms, and what a chosen token may fall short of the best: sums of
# a thousand fp32 products are good to some 1e-5 of logits of this size. torch's own are a hundred times further off.
LOGPROB_ALLOWED = 1e-4
BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8


@dataclass(frozen=True)
class Case:
    """One comparison; ``weight`` is the precision of the weight (int8: with scales), ``edge`` what is odd."""

    rows: int
    hidden: int
    vocab: int
    weight: torch.dtype
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    bias: bool = False
    logit_scale: float = 1.0
    soft_cap: float | None = None
    padding: int = 0
    hidden_dtype: torch.dtype = BF16
    edge: str | None = None

    def __str__(self) -> str:
        said = [f"N={self.rows} H={self.hidden} V={self.vocab} {NAMES[self.hidden_dtype]}/{NAMES[self.weight]}"]
        said += ["greedy" if self.temperature == 0 else f"T={self.temperature:g}"]
        said += [f"top-k {self.top_k}"] if self.top_k is not None else []
        said += [f"top-p {self.top_p:g}"] if self.top_p is not None else []
        said += ["bias"] if self.bias else []
        said += [f"scale {self.logit_scale:g}"] if self.logit_scale != 1.0 else []
        said += [f"cap {self.soft_cap:g}"] if self.soft_cap is not None else []
        said += [f"padding {self.padding}"] if self.padding else []
        said += [self.edge] if self.edge else []
        return ", ".join(said)

    @property
    def settings(self) -> DecodeSettings:
        """What a backend is asked to compute."""
        return DecodeSettings(
            self.vocab - self.padding, self.temperature, self.top_k, self.top_p, self.logit_scale, self.soft_cap
        )

    def tensors(self) -> tuple[Tensor, Tensor | Int8Weight, Tensor | None, Tensor | None, Tensor | None]:
        """Hidden rows, weight, bias, seeds and positions."""
        generator = torch.Generator().manual_seed(8)
        hidden = torch.randn(self.rows, self.hidden, generator=generator)
        weight = torch.randn(self.vocab, self.hidden, generator=generator) * (4.0 / self.hidden**0.5)
        bias = torch.randn(self.vocab, generator=generator) if self.bias else None
        if self.padding:
            weight[-self.padding :] *= 50.0  # what lies there must not be looked at
        if self.edge == "rows" and self.rows > 3:
            hidden[1, 0] = torch.nan
            hidden[2] = 0.0  # every logit equal: the lowest id where greedy
        elif self.edge == "excluded":
            bias = torch.zeros(self.vocab)
            bias[::2] = -torch.inf
        elif self.edge == "nothing left":
            bias = torch.full((self.vocab,), -torch.inf)
        seeds = torch.randint(-(2**62), 2**62, (self.rows,), generator=generator)
        positions = torch.randint(0, 2**40, (self.rows,), generator=generator)
        keys = (None, None) if self.temperature == 0 else (seeds, positions)
        some = quantize_int8(weight) if self.weight == INT8 else weight.to(self.weight)
        return hidden.to(self.hidden_dtype), some, bias, *keys


def grid(*, quick: bool = False) -> Iterator[tuple[str, Case]]:
    """(group, case): each precision, greedy and drawn, top-k and top-p, shaped logits, padding, odd rows."""
    for weight in (BF16, FP32, INT8):
        hidden_dtype = FP32 if weight == FP32 else BF16
        for rows in (1, 5) if quick else (1, 4, 5, 8, 16, 17):
            for temperature in (0.0, 0.7) if quick else (0.0, 0.7, 1.0, 2.0):
                group = "greedy" if temperature == 0 else "drawn"
                yield group, Case(rows, 96, 1003, weight, temperature, hidden_dtype=hidden_dtype)
        yield "odd widths", Case(3, 61, 517, weight, 1.0, hidden_dtype=hidden_dtype)
        yield "odd widths", Case(3, 1, 33, weight, 1.0, hidden_dtype=hidden_dtype)
        yield "mixed precision", Case(6, 96, 1003, weight, 1.0, hidden_dtype=FP32)
        yield "top-k, top-p", Case(24, 96, 1003, weight, 1.0, top_k=5, hidden_dtype=hidden_dtype)
        yield "top-k, top-p", Case(24, 96, 1003, weight, 0.8, top_p=0.7, hidden_dtype=hidden_dtype)
        yield "top-k, top-p", Case(24, 96, 1003, weight, 1.3, top_k=40, top_p=0.8, hidden_dtype=hidden_dtype)
        yield "top-k, top-p", Case(4, 96, 1003, weight, 1.0, top_k=1, hidden_dtype=hidden_dtype)
        yield "top-k, top-p", Case(4, 96, 1003, weight, 1.0, top_k=5000, top_p=1.0, hidden_dtype=hidden_dtype)
        yield "bias, scale, cap", Case(7, 96, 1003, weight, 1.0, bias=True, hidden_dtype=hidden_dtype)
        yield "bias, scale, cap", Case(7, 96, 1003, weight, 0.0, bias=True, logit_scale=0.3, hidden_dtype=hidden_dtype)
        yield "bias, scale, cap", Case(7, 96, 1003, weight, 1.0, soft_cap=9.0, hidden_dtype=hidden_dtype)
        yield "padding", Case(6, 96, 1003, weight, 0.0, padding=37, hidden_dtype=hidden_dtype)
        yield "padding", Case(6, 96, 1003, weight, 1.0, padding=37, bias=True, hidden_dtype=hidden_dtype)
        for edge in ("rows", "excluded", "nothing left"):
            yield "edges", Case(6, 96, 503, weight, 0.0, edge=edge, hidden_dtype=hidden_dtype)
            yield "edges", Case(6, 96, 503, weight, 1.0, edge=edge, hidden_dtype=hidden_dtype)
        yield "edges", Case(0, 96, 503, weight, 1.0, hidden_dtype=hidden_dtype)
    if not quick:
        for vocab, weight in ((151936, BF16), (50257, FP32), (128256, INT8), (262144, BF16)):
            yield "ragged vocabulary", Case(2, 64, vocab, weight, 0.9)
            yield "ragged vocabulary", Case(2, 64, vocab, weight, 1.0, top_k=50, top_p=0.95)


def compare(
    case: Case,
    backend: str = "cpu",
    *,
    isa: str | None = None,
    disturb: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Parity:
    """The larger of two errors over what is allowed: of the log-probability, and of the chosen token's score.

    The score is z / T plus the noise, in fp64, among the tokens that top-k and top-p leave there; a token that they do
    not leave is one at the border, or wrong. ``disturb`` changes (ids, logprobs) before they are judged.
    """
    hidden, weight, bias, seeds, positions = case.tensors()
    device, settings = where.device_of(backend), case.settings
    own = {"isa": isa} if isa is not None else {}
    decode = where.room("latent_decode", backend).decode
    moved = [None if tensor is None else tensor.to(device) for tensor in (seeds, positions, bias)]
    ids, logprobs = decode(hidden.to(device), _moved(weight, device), settings, *moved, **own)
    ids, logprobs = ids.cpu(), logprobs.double().cpu()
    if disturb is not None:
        ids, logprobs = disturb(ids, logprobs)

    exact_ids, exact_logprobs = reference.decode(hidden.double(), weight, settings, seeds, positions, bias)
    torch_logprobs = _as_torch(hidden, weight, settings, bias)
    # Of the token that was taken: whether it is the right one is asked separately.
    z = reference.logits(hidden.double(), weight, settings, bias)
    temperature = settings.temperature or 1.0
    everything = torch.log_softmax(z / temperature, 1)
    answered = exact_ids >= 0
    wrong = int(((ids >= 0) != answered).sum()) + disagreements(logprobs, exact_logprobs)
    wrong += int((ids >= settings.vocab).sum())
    error = torch_error = shortfall = 0.0
    if wrong == 0 and bool(answered.any()):
        taken = ids[answered, None]
        exact = everything[answered].gather(1, taken).squeeze(1)
        error = float((logprobs[answered] - exact).abs().max())
        torch_error = float((torch_logprobs[answered].gather(1, taken).squeeze(1).double() - exact).abs().max())
        shortfall = _shortfall(
            z[answered],
            settings,
            ids[answered],
            exact_ids[answered],
            _rows(seeds, answered),
            _rows(positions, answered),
        )
    worst = max(error, shortfall)
    return Parity(str(case), worst, torch_error, worst / LOGPROB_ALLOWED, disagreements=wrong)


def _rows(tensor: Tensor | None, which: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[which]


def _shortfall(
    z: Tensor, settings: DecodeSettings, ids: Tensor, right: Tensor, seeds: Tensor | None, positions: Tensor | None
) -> float:
    """By how much the taken token's score is below the best's; where it was cut off, its distance from the border."""
    temperature = settings.temperature or 1.0
    score = z / temperature
    if seeds is not None and positions is not None:
        columns = torch.arange(z.shape[1])
        score = score + gumbel(seeds[:, None], positions[:, None], columns[None, :])
    short = score.gather(1, right[:, None]) - score.gather(1, ids[:, None])
    # A token that the cut took away in fp64 may have a higher score: then its logit must be that of the border.
    keep = reference.allowed(z, settings)
    border = z.masked_fill(~keep, torch.inf).amin(1, keepdim=True) / temperature
    outside = ~keep.gather(1, ids[:, None])
    short = torch.where(outside, border - z.gather(1, ids[:, None]) / temperature, short)
    # And one that it took away here, for the same reason, leaves the second best: then the right one is at the border.
    at_border = (z.gather(1, right[:, None]) / temperature - border).abs() <= LOGPROB_ALLOWED
    return float(torch.where(at_border & ~outside, short.clamp_max(0.0), short).max())


def _as_torch(hidden: Tensor, weight: Tensor | Int8Weight, settings: DecodeSettings, bias: Tensor | None) -> Tensor:
    """Log-probabilities as torch users get them: logits in the precision of the hidden states."""
    if isinstance(weight, Int8Weight):
        z = (hidden @ weight.values.to(hidden.dtype).T).float() * weight.scales
    else:
        z = (hidden @ weight.to(hidden.dtype).T).float()
    from latentforge.kernels.reference.kd import shape_logits

    z = shape_logits(z, bias, settings.logit_scale, settings.soft_cap)[:, : settings.vocab]
    return torch.log_softmax(z / (settings.temperature or 1.0), 1)


def _moved(weight: Tensor | Int8Weight, device: torch.device) -> Tensor | Int8Weight:
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values.to(device), weight.scales.to(device))
    return weight.to(device)
