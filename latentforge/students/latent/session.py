"""The latent student and its codec as a model that writes text: prefill, cache, draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from latentforge.errors import RefusedError
from latentforge.kernels.decode import latent_decode
from latentforge.students.latent.backbone import StateCache, lengthened, unused
from latentforge.students.latent.beginning import begun
from latentforge.students.latent.chunks import valid
from latentforge.students.latent.codec import Codec
from latentforge.students.latent.noise import head_noise
from latentforge.students.latent.requests import Keys
from latentforge.students.latent.scoring import check_texts, token_logprobs
from latentforge.students.latent.student import LatentStudent


class LatentModel:
    """A ``ChunkModel`` (see ``requests``) of a student and the codec that it was trained with.

    Each text begins where a document does in training: after a chunk that holds an EOS and nothing else. With
    ``cache`` false the whole text is computed anew at each step, with the same result and in more time; that is there
    to be compared with.
    """

    greedy = False  # it can be drawn from; what is likeliest only many draws can say

    def __init__(
        self, student: LatentStudent, codec: Codec, *, eos_id: int, cache: bool = True, kernel_backend: str = "auto"
    ) -> None:
        for name in ("vocab_size", "chunk", "latent"):
            if getattr(student.shape, name) != getattr(codec.shape, name):
                raise RefusedError(
                    f"{name} is {getattr(student.shape, name)} of the student and {getattr(codec.shape, name)} of the "
                    "codec",
                    next="open the codec that the student was trained with",
                )
        if codec.record is not None and codec.record.eos_id != eos_id:
            raise RefusedError(f"eos_id = {eos_id}: the codec was trained on texts that end with {codec.record.eos_id}")
        self.student, self.codec = student.eval(), codec.eval()
        self.cache, self.kernel_backend = cache, kernel_backend
        self.chunk, self.vocab_size, self.eos_id = student.shape.chunk, student.shape.vocab_size, eos_id
        self.tempered, self.completes = student.shape.tempered, student.shape.token_layers > 0

    @classmethod
    def open(
        cls,
        student: Path,
        codec: Path,
        *,
        tokenizer_sha256: str | None = None,
        device: torch.device | str = "cpu",
        cache: bool = True,
        kernel_backend: str = "auto",
    ) -> LatentModel:
        """The model of two folders; RefusedError where one holds no such thing, or the student was trained with another
        codec, or either for another tokenizer than is named (None: not compared)."""
        coder = Codec.open(codec, tokenizer_sha256=tokenizer_sha256)
        assert coder.record is not None  # an opened codec has one
        writer = LatentStudent.open(
            student, codec_sha256=coder.record.digest, tokenizer_sha256=tokenizer_sha256
        ).requires_grad_(False)
        eos_id = coder.record.eos_id
        return cls(writer.to(device), coder.to(device), eos_id=eos_id, cache=cache, kernel_backend=kernel_backend)

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.table.weight.device

    def begin(self, texts: Sequence[Tensor]) -> LatentSession:
        """A session of the beginnings ``texts``, int64 [C, K] each."""
        return begun(texts, lambda some: LatentSession(self, some))

    @torch.no_grad()
    def draw_after(self, states: Tensor, keys: Keys, first: int, count: int, temperature: float) -> Tensor:
        """Chunks int64 [R, count, K] after ``states`` [R, d], number ``first`` and on of each key: a pass through head
        and codec for each. A place whose logits are not finite is -1."""
        noise = head_noise(
            keys.seeds.to(self.device), keys.positions.to(self.device), count, self.student.shape.noise, first=first
        )
        told = None if temperature == 1 else torch.full((len(states),), temperature, device=self.device)
        latents = self.student.draw_latents(states, noise, told).flatten(0, 1).to(self.codec.decoder_in.weight)
        found = self.codec.decode(latents, backend=self.kernel_backend)
        return found.unflatten(0, (len(states), count))

    @torch.no_grad()
    def score(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """See ``scoring.Scorer``: all texts in one pass of the backbone, their chunks through the token head."""
        check_texts(self, texts)
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        if not int(lengths.sum()):
            return [torch.zeros(0) for _ in texts]
        count = -(-int(lengths.max()) // self.chunk)
        tokens = torch.full((len(texts), (1 + count) * self.chunk), self.eos_id)
        for row, text in enumerate(texts):
            tokens[row, self.chunk : self.chunk + len(text)] = text
        holds = torch.arange(tokens.shape[1]) < self.chunk + lengths.unsqueeze(1)
        holds[:, 1 : self.chunk] = False  # before a text there is a chunk that holds an EOS alone
        chunks, there = (one.to(self.device).unflatten(1, (1 + count, self.chunk)) for one in (tokens, holds))
        states = self.student.states(chunks[:, :-1], there[:, :-1])
        needed = there[:, 1:].any(-1)
        hidden = self.student.token_rows(states[needed], chunks[:, 1:][needed])[there[:, 1:][needed]]
        found = token_logprobs(hidden, self.student.table.weight, chunks[:, 1:][there[:, 1:]])
        return list(found.cpu().split(lengths.tolist()))


class LatentSession:
    """Texts of unequal length end at the same place: what stands before a shorter one is padding, which is not seen."""

    @torch.no_grad()
    def __init__(self, model: LatentModel, texts: Sequence[Tensor]) -> None:
        self.model = model
        length = 1 + max(len(text) for text in texts)
        chunks = torch.full((len(texts), length, model.chunk), model.eos_id)
        for row, text in enumerate(texts):
            chunks[row, length - len(text) :] = text
        holds = valid(chunks, model.eos_id)
        for row, text in enumerate(texts):
            holds[row, : length - len(text) - 1] = False
        self._chunks, self._holds = chunks.to(model.device), holds.to(model.device)
        self._cache = StateCache() if model.cache else None
        self._state = self._states()

    def _states(self) -> Tensor:
        """The last state of each text, [B, d]: of the chunks that were not computed yet, or of all without a cache."""
        found = self.model.student.states(self._chunks, self._holds, self._cache)[:, -1]
        if self._cache is not None:
            self._chunks, self._holds = self._chunks[:, :0], self._holds[:, :0]
        return found

    def draw(self, rows: Tensor, keys: Keys, first: int, count: int, temperature: float) -> Tensor:
        """See ``requests.Session``."""
        return self.model.draw_after(self._state[rows.to(self._state.device)], keys, first, count, temperature)

    @torch.no_grad()
    def complete(
        self,
        rows: Tensor,
        keys: Keys,
        begun: Tensor,
        lengths: Tensor,
        temperature: Tensor,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """See ``requests.Session``: a position of the token head for each token."""
        device, size = self._state.device, self.model.chunk
        states, chunks, lengths = self._state[rows.to(device)], begun.to(device), lengths.to(device)
        steps, least = self.model.student.token_steps(states), int(lengths.min())
        for place in range(size):
            hidden = steps.next()
            if place < least:
                steps.add(chunks[:, place])
                continue
            chosen = torch.empty(len(rows), dtype=torch.int64, device=device)
            for one in temperature.unique().tolist():
                same = (temperature == one).nonzero().squeeze(-1)
                found = latent_decode(
                    hidden[same.to(device)],
                    self.model.student.table.weight.detach(),
                    temperature=one,
                    top_k=top_k,
                    top_p=top_p,
                    seeds=keys.seeds[same].to(device),
                    positions=(keys.positions[same] * size + place).to(device),
                    backend=self.model.kernel_backend,
                )
                chosen[same.to(device)] = found.ids
            chunks[:, place] = torch.where(place >= lengths, chosen, chunks[:, place])
            steps.add(chunks[:, place].clamp_min(0))
        return chunks

    @torch.no_grad()
    def logprobs(self, rows: Tensor, begun: Tensor, place: int) -> Tensor:
        """See ``requests.Session``."""
        device = self._state.device
        hidden = self.model.student.token_rows(self._state[rows.to(device)], begun.to(device))[:, place]
        return F.linear(hidden, self.model.student.table.weight).float().log_softmax(-1)

    def keep(self, rows: Tensor) -> None:
        """See ``requests.Session``."""
        rows = rows.to(self._state.device)
        if len(rows) == len(self._state) and bool((rows == torch.arange(len(rows), device=rows.device)).all()):
            return
        self._chunks, self._holds, self._state = self._chunks[rows], self._holds[rows], self._state[rows]
        if self._cache is not None:
            self._cache.keep(rows)
        else:
            first = unused(self._holds.any(-1))
            self._chunks, self._holds = self._chunks[:, first:], self._holds[:, first:]

    def join(self, other: LatentSession) -> None:
        """See ``requests.Session``."""
        if self._cache is not None and other._cache is not None:
            self._cache.join(other._cache)
        length = max(self._chunks.shape[1], other._chunks.shape[1])  # 0 with a cache: all of them were computed
        for name in ("_chunks", "_holds"):
            both = [lengthened(getattr(one, name), length, 1) for one in (self, other)]
            setattr(self, name, torch.cat(both))
        self._state = torch.cat([self._state, other._state])

    @torch.no_grad()
    def advance(self, chunks: Tensor) -> None:
        """See ``requests.Session``: one step of the backbone, or all of them without a cache."""
        added = chunks.to(self._state.device).unsqueeze(1)
        self._chunks = torch.cat([self._chunks, added], dim=1)
        self._holds = torch.cat([self._holds, valid(added, self.model.eos_id)], dim=1)
        self._state = self._states()
