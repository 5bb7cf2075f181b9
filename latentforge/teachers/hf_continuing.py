"""A transformers model goes on after every chunk of a row at once: the row is computed once, and its cache is shared.

All draws are one batch: each is a row of as many tokens as there are contexts, and sees of the cache the text up to its
own context and the tokens that it drew itself. K - 1 passes give K tokens of every draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.decode import latent_decode
from latentforge.targets.continued import Ids
from latentforge.teachers.continuing import Contexts, Continuing
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.loading import DTYPES
from latentforge.teachers.protocol import Tokens


@torch.no_grad()
def continue_row(teacher: HFTeacher, tokens: Tokens, asked: Continuing) -> dict[float, Ids]:
    """The chunks that ``teacher`` draws after each chunk of ``tokens`` int64 [C * K], int32 [C-1, R, K] by temperature.

    A token is the argmax of logits / T and noise of :meth:`Continuing.key` and :meth:`Continuing.positions`: it depends
    on the row, the seed, T and its place alone, so no other row and no earlier stop changes it.
    """
    row = Contexts.of(tokens, asked)
    many, temperatures = len(row.chunks), asked.temperatures
    if not many:
        nothing = np.empty((asked.count, 0, asked.chunk), np.int64)
        return row.spread(dict.fromkeys(temperatures, nothing), tokens, asked)
    limit = teacher.folder.max_positions
    if limit is not None and len(row.text) + asked.chunk - 1 > limit:
        raise RefusedError(
            f"{len(row.text)} tokens and {asked.chunk} after them are more than the teacher's {limit} positions",
            next=f"set data.sequence_length = {limit} or less",
        )
    from transformers import DynamicCache

    decoder, device = _Decoder(teacher), teacher.model.device
    ends, text = torch.from_numpy(row.ends).to(device), torch.from_numpy(row.text).to(device)
    keys = torch.tensor([asked.key(tokens, t) for t in temperatures], device=device)
    draws = asked.count * len(temperatures)
    cache = DynamicCache()
    states = decoder.states(text[None], cache)[0, ends - 1].expand(draws, -1, -1)
    cache.batch_repeat_interleave(draws)
    # Each sees the text of its own context ...
    seen = torch.arange(len(text), device=device) < ends[:, None]
    own = torch.eye(many, dtype=torch.bool, device=device)
    drawn = torch.empty(draws, many, asked.chunk, dtype=torch.int64, device=device)
    for place in range(asked.chunk):
        if place:
            # ... and what it drew itself.
            seen = torch.cat([seen, own], dim=1)
            states = decoder.states(drawn[:, :, place - 1], cache, seen, ends + place - 1)
        positions = torch.from_numpy(asked.positions(row.chunks, place)).to(device).flatten()
        for number, temperature in enumerate(temperatures):
            part = slice(number * asked.count, (number + 1) * asked.count)
            hidden = states[part].flatten(0, 1)
            drawn[part, :, place] = decoder.draw(hidden, temperature, keys[number].expand(len(hidden)), positions).view(
                asked.count, many
            )
    ids = drawn.cpu().numpy()
    if (ids < 0).any():
        raise RefusedError("the teacher answered with values that are not finite", next="check the teacher's weights")
    parts = {t: ids[n * asked.count : (n + 1) * asked.count] for n, t in enumerate(temperatures)}
    return row.spread(parts, tokens, asked)


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
        """States [S, n, H] of ``ids`` [S, n]: causal, or where ``seen`` bool [n, cached] says what each token sees,
        which stands at ``positions`` [n]. The cache has them then."""
        asked: dict[str, Any] = {}
        if seen is not None and positions is not None:
            dtype = DTYPES[self.teacher.dtype]
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
            asked["attention_mask"] = mask.expand(len(ids), 1, -1, -1)
            asked["position_ids"] = positions.expand(len(ids), -1)
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
