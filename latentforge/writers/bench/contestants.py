"""Who takes part: a student in this engine, and transformers' own ``generate`` with a token-level student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentforge.students.causal import model_from_folder
from latentforge.students.latent.generate import stream
from latentforge.students.latent.requests import ChunkModel, Request, simplest
from latentforge.writers.bench.turns import Asked, Clock, Text


@dataclass(frozen=True)
class Engine:
    """A student in the engine of ``generate.stream``: latent or token-level.

    A token-level one draws once where the latent one rejects or votes: its one draw is exact at every temperature.
    """

    name: str
    model: ChunkModel

    def write(self, asked: Asked, clock: Clock) -> list[Text]:
        """The texts of all prompts; the error of one that fails."""
        return [text for numbers in asked.batches() for text in self._batch(asked, numbers, clock)]

    def _batch(self, asked: Asked, numbers: range, clock: Clock) -> list[Text]:
        sampling = simplest(self.model, asked.sampling)
        requests = [Request(asked.prompts[n], asked.max_tokens, asked.seed + n, sampling) for n in numbers]
        tokens: list[list[int]] = [[] for _ in requests]
        arrivals: list[list[float]] = [[] for _ in requests]
        draws, drawn = [0] * len(requests), [0] * len(requests)
        start = clock()
        for piece in stream(self.model, requests):
            if piece.error is not None:
                raise piece.error
            arrivals[piece.request].append(clock() - start)
            tokens[piece.request].extend(piece.tokens)
            draws[piece.request] += piece.draws
            drawn[piece.request] += piece.draws > 0
        each = zip(tokens, arrivals, draws, drawn, strict=True)
        return [Text(tuple(one), tuple(when), made, steps) for one, when, made, steps in each]


class TransformersGenerate:
    """``generate`` of transformers with the model of a Hugging Face folder, in fp32 and with its cache.

    Each text begins after an EOS, as in the engine; shorter prompts of a batch are padded on their left. At temperature
    0 it is greedy, else it draws, from the whole distribution or what ``top_k`` and ``top_p`` leave of it, with
    transformers' own random numbers.
    """

    def __init__(self, name: str, folder: Path, eos_id: int, device: torch.device) -> None:
        from transformers import GenerationConfig

        self.name = name
        self._model: Any = model_from_folder(folder).to(device).eval()
        # What a folder suggests would fill in all that is not asked here: another way of writing.
        self._model.generation_config = GenerationConfig()
        self._eos_id = eos_id
        self._device = device

    def write(self, asked: Asked, clock: Clock) -> list[Text]:
        """The texts of all prompts; what was computed for a text after its EOS is no part of it."""
        return [text for numbers in asked.batches() for text in self._batch(asked, numbers, clock)]

    def _batch(self, asked: Asked, numbers: range, clock: Clock) -> list[Text]:
        from transformers import GenerationConfig

        devices = [self._device] if self._device.type == "cuda" else []
        start = clock()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(asked.seed + numbers.start)
            ids, mask = self._padded([asked.prompts[n] for n in numbers])
            arrivals = _Arrivals(clock, start)
            sampling, draws = asked.sampling, dict[str, Any](do_sample=False)
            if sampling.temperature > 0:
                draws = {"do_sample": True, "temperature": sampling.temperature}
                draws |= {"top_k": sampling.top_k or 0, "top_p": 1.0 if sampling.top_p is None else sampling.top_p}
            settings = GenerationConfig(
                max_new_tokens=asked.max_tokens, eos_token_id=self._eos_id, pad_token_id=self._eos_id, **draws
            )
            found = self._model.generate(
                ids.to(self._device),
                attention_mask=mask.to(self._device),
                generation_config=settings,
                streamer=arrivals,
            )
        return [self._text(row, arrivals.seconds) for row in found[:, ids.shape[1] :].tolist()]

    def _padded(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        length = 1 + max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), length), self._eos_id)
        mask = torch.zeros(len(prompts), length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
            mask[row, length - len(prompt) - 1 :] = 1
        return ids, mask

    def _text(self, row: list[int], seconds: Sequence[float]) -> Text:
        count = row.index(self._eos_id) + 1 if self._eos_id in row else len(row)
        return Text(tuple(row[:count]), tuple(seconds[:count]), count, count)


class _Arrivals:
    """A streamer of ``generate`` that keeps when each step's tokens came; the first call hands over the prompt."""

    def __init__(self, clock: Clock, start: float) -> None:
        self._clock, self._start = clock, start
        self._prompt = True
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self.seconds.append(self._clock() - self._start)
        self._prompt = False

    def end(self) -> None:
        pass
