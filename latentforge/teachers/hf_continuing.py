"""A transformers model goes on after every chunk of its rows at once: a row is computed once, and its cache is shared.

All draws are one batch: each is a row of as many tokens as there are contexts, and sees of the cache the text up to its
own context and the tokens that it drew itself. K - 1 passes give K tokens of every draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.decode import latent_decode
from latentforge.memory.continuing import rows_at_once
from latentforge.targets.continued import Ids
from latentforge.teachers.continuing import Contexts, Continuing
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.loading import DTYPES
from latentforge.teachers.protocol import Tokens


def continue_rows(
    teacher: HFTeacher, sequences: Sequence[Tokens], asked: Continuing
) -> Iterator[tuple[int, dict[float, Ids]]]:
    """Yield (index, chunks int32 [C-1, R, K] by temperature) of each row of ``sequences``, in order.

    A token is the argmax of logits / T and noise of :meth:`Continuing.key` and :meth:`Continuing.positions`: it depends
    on the row, the seed, T and its place alone. Where rows that are computed together round the logits otherwise, a
    token may still be another, about as often as two tokens are equally good to the last bits.
    """
    rows = [Contexts.of(tokens, asked) for tokens in sequences]
    limit, longest = teacher.folder.max_positions, max((len(row.text) for row in rows), default=0)
    if limit is not None and longest + asked.chunk - 1 > limit:
        raise RefusedError(
            f"{longest} tokens and {asked.chunk} after them are more than the teacher's {limit} positions",
            next=f"set data.sequence_length = {limit} or less",
        )
    most = max((len(row.chunks) for row in rows), default=0)
    together = rows_at_once(most * asked.count * len(asked.temperatures), len(rows))
    for at in range(0, len(rows), together):
        part = range(at, min(at + together, len(rows)))
        keys = [[asked.key(sequences[number], t) for t in asked.temperatures] for number in part]
        drawn = _draw([rows[number] for number in part], keys, teacher, asked)
        if any((ids < 0).any() for ids in drawn):
            raise RefusedError(
                "the teacher answered with values that are not finite", next="check the teacher's weights"
            )
        for number, ids in zip(part, drawn, strict=True):
            yield number, rows[number].spread(dict(zip(asked.temperatures, ids, strict=True)), sequences[number], asked)


@torch.no_grad()
def _draw(
    rows: list[Contexts], keys: list[list[int]], teacher: HFTeacher, asked: Continuing
) -> list[npt.NDArray[np.int64]]:
    """What is drawn for each of ``rows``, int64 [temperatures, R, contexts, K]; ``keys`` by row and temperature."""
    from transformers import DynamicCache

    sizes = len(asked.temperatures), asked.count
    most, device = max(len(row.chunks) for row in rows), teacher.model.device
    if not most:
        return [np.empty((*sizes, 0, asked.chunk), np.int64)] * len(rows)
    # Behind a row that is shorter than others stand tokens that nobody sees; a context that it lacks sees one token.
    text = _filled([row.text for row in rows], 0).to(device)
    ends = _filled([row.ends for row in rows], 1).to(device)
    chunks = _filled([row.chunks for row in rows], 0).numpy()
    seeds = torch.tensor(keys, device=device)
    decoder, cache = _Decoder(teacher), DynamicCache()
    draws = sizes[0] * sizes[1]
    states = decoder.states(text, cache)
    states = states.gather(1, (ends - 1)[..., None].expand(-1, -1, states.shape[-1]))
    states = states.repeat_interleave(draws, dim=0)
    cache.batch_repeat_interleave(draws)
    # Each sees the text of its own context ...
    seen = torch.arange(text.shape[1], device=device) < ends[..., None]
    own = torch.eye(most, dtype=torch.bool, device=device).expand(len(rows), -1, -1)
    drawn = torch.empty(len(rows), *sizes, most, asked.chunk, dtype=torch.int64, device=device)
    for place in range(asked.chunk):
        if place:
            # ... and what it drew itself.
            seen = torch.cat([seen, own], dim=2)
            states = decoder.states(drawn[..., place - 1].flatten(0, 2), cache, seen, ends + place - 1)
        positions = torch.from_numpy(np.stack([asked.positions(one, place) for one in chunks])).to(device)
        for number, temperature in enumerate(asked.temperatures):
            hidden = states.unflatten(0, (len(rows), *sizes))[:, number]
            key = seeds[:, number, None, None].expand(positions.shape)
            found = decoder.draw(hidden.flatten(0, 2), temperature, key.flatten(), positions.flatten())
            drawn[:, number, ..., place] = found.view(positions.shape)
    found_all = drawn.cpu().numpy()
    return [found_all[number, :, :, : len(row.chunks)] for number, row in enumerate(rows)]


def _filled(parts: list[npt.NDArray[np.int64]], value: int) -> Tensor:
    """Rows of unequal length as one tensor int64 [B, longest], with ``value`` behind the shorter ones."""
    found = torch.full((len(parts), max(len(part) for part in parts)), value)
    for row, part in zip(found, parts, strict=True):
        row[: len(part)] = torch.from_numpy(part)
    return found


class _Decoder:
    """The model without and with its last layer."""

    def __init__(self, teacher: HFTeacher) -> None:
        self.teacher = teacher
        model = teacher.model
        self.base: Any = model.base_model
        head = model.get_output_embeddings()
        if not head.weight.is_floating_point():
            raise RefusedError(
                f"the last layer of {teacher.folder.path} is kept as {head.weight.dtype}: nothing is drawn from it",
                next="set teacher.precision = 'bf16', which expands it",
            )
        # The kernel knows bf16 and fp32; what is kept as fp16 is widened, which changes no number.
        known = head.weight.dtype in (torch.float32, torch.bfloat16)
        self.weight: Tensor = head.weight if known else head.weight.float()
        self.bias: Tensor | None = getattr(head, "bias", None)
        config = model.config.get_text_config()
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        divided = getattr(config, "logits_scaling", None) or 1.0
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(divided)

    def states(self, ids: Tensor, cache: Any, seen: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """States [S, n, H] of ``ids`` [S, n]: causal, or where ``seen`` bool [B, n, cached] says what each token of
        the S / B draws of a row sees, which stands at ``positions`` [B, n]. The cache has them then."""
        asked: dict[str, Any] = {}
        if seen is not None and positions is not None:
            dtype = DTYPES[self.teacher.dtype]
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
            each = len(ids) // len(seen)
            asked["attention_mask"] = mask[:, None].expand(-1, each, -1, -1).flatten(0, 1)[:, None]
            asked["position_ids"] = positions.repeat_interleave(each, dim=0)
        found: Tensor = self.base(input_ids=ids, past_key_values=cache, use_cache=True, **asked).last_hidden_state
        return found

    def draw(self, hidden: Tensor, temperature: float, seeds: Tensor, positions: Tensor) -> Tensor:
        """A token of each row of ``hidden`` [N, H], int64 [N]."""
        return latent_decode(
            hidden.to(self.weight.dtype).contiguous(),
            self.weight,
            temperature=temperature,
            seeds=seeds.contiguous(),
            positions=positions,
            bias=self.bias,
            logit_scale=self.scale,
            soft_cap=self.soft_cap,
            vocab=self.teacher.vocab_size,
        ).ids
