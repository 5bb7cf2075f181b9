"""A token-level causal LM as a model that writes text: chunks of one token, beside the latent student in one engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.decode import latent_decode
from latentforge.students.causal import Student, model_from_folder
from latentforge.students.latent.backbone import lengthened, unused
from latentforge.students.latent.beginning import begun
from latentforge.students.latent.requests import Keys
from latentforge.students.latent.scoring import check_texts, token_logprobs

_APART = 1 << 40
"""Between the positions of two draws of one place: beyond any text's length, so that no draw shares its noise."""


class TokenModel:
    """A ``ChunkModel`` (see ``latent.requests``) of a transformers causal LM: a chunk is one token.

    Its head knows every temperature: a draw by ``latent_decode`` is exact at any T in (0, 1] and the likeliest token at
    0, so rejection and voting work but are of no use. Each text begins after an EOS, where a document does in training.
    With ``cache`` false the whole text is computed anew at each step, with the same tokens and in more time; that is
    there to be compared with.
    """

    chunk, tempered, completes, greedy = 1, True, True, True

    def __init__(
        self, model: Any, vocab_size: int, eos_id: int, kernel_backend: str = "auto", *, cache: bool = True
    ) -> None:
        if not 0 <= eos_id < vocab_size:
            raise RefusedError(f"eos_id = {eos_id} is no id below {vocab_size}")
        self.student = Student(model, vocab_size).requires_grad_(False).eval()
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.cache, self.kernel_backend = cache, kernel_backend
        _refuse_unmasked(self.student.model)
        from latentforge.students.stepping import can_step

        self.steps = can_step(self.student.model.base_model)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        vocab_size: int | None = None,
        eos_id: int | None = None,
        device: str = "cpu",
        cache: bool = True,
        kernel_backend: str = "auto",
    ) -> TokenModel:
        """The fp32 model of a Hugging Face folder, from its safetensors alone. ``vocab_size`` and ``eos_id`` are the
        tokenizer's; None takes what its config.json says. RefusedError where a tensor is missing, or nothing says which
        token ends a text."""
        model = model_from_folder(folder)
        ends = model.config.eos_token_id if eos_id is None else eos_id
        if type(ends) is not int:
            raise RefusedError(
                f"{folder / 'config.json'}: eos_token_id = {ends} does not say which token ends a text",
                next="name the tokenizer's as eos_id",
            )
        rows = int(model.config.vocab_size) if vocab_size is None else vocab_size
        return cls(model.to(device), rows, ends, kernel_backend, cache=cache)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self.student.model.get_output_embeddings().weight.device
        return found

    def begin(self, texts: Sequence[Tensor]) -> TokenSession:
        """A session of the beginnings ``texts``, int64 [C, 1] each."""
        return begun(texts, lambda some: TokenSession(self, some))

    @torch.no_grad()
    def tokens_after(
        self, states: Tensor, keys: Keys, temperature: float, top_k: int | None = None, top_p: float | None = None
    ) -> Tensor:
        """A token int64 [N] after each of ``states`` [N, d]; -1 where the logits are not finite."""
        head = self.student.model.get_output_embeddings()
        return latent_decode(
            states,
            head.weight,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=keys.seeds.to(self.device),
            positions=keys.positions.to(self.device),
            bias=head.bias,
            vocab=self.vocab_size,
            backend=self.kernel_backend,
        ).ids

    @torch.no_grad()
    def score(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """See ``latent.scoring.Scorer``: all texts in one pass of the layers, after an EOS each."""
        check_texts(self, texts)
        lengths = [len(text) for text in texts]
        if not sum(lengths):
            return [torch.zeros(0) for _ in texts]
        tokens = torch.full((len(texts), 1 + max(lengths)), self.eos_id)
        for row, text in enumerate(texts):
            tokens[row, 1 : 1 + len(text)] = text
        tokens = tokens.to(self.device)
        states = self.student.model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        there = (torch.arange(tokens.shape[1] - 1) < torch.tensor(lengths).unsqueeze(1)).to(self.device)
        head = self.student.model.get_output_embeddings()
        bias = None if head.bias is None else head.bias[: self.vocab_size]
        found = token_logprobs(states[there], head.weight[: self.vocab_size], tokens[:, 1:][there], bias)
        return list(found.cpu().split(lengths))


class TokenSession:
    """Texts of unequal length end at the same place: what stands before a shorter one is padding, which is not seen."""

    @torch.no_grad()
    def __init__(self, model: TokenModel, texts: Sequence[Tensor]) -> None:
        self.model = model
        length = 1 + max(len(text) for text in texts)
        tokens = torch.full((len(texts), length), model.eos_id)
        present = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens[row, length - len(text) :] = text[:, 0]
            present[row, length - len(text) - 1 :] = True
        self._tokens, self._present = tokens.to(model.device), present.to(model.device)
        self._layers: Any = None
        if model.cache:
            from latentforge.students.stepping import growing_cache

            # Of layers with a window too: what each sees of it is in their mask, so that texts of any length join.
            self._layers = growing_cache()
        self._state = self._states()

    def _states(self) -> Tensor:
        """The last state of each text, [B, d]: of the tokens that were not computed yet, or of all without a cache."""
        base, tokens = self.model.student.model.base_model, self._tokens
        mask = positions = None
        if not bool(self._present.all()):
            mask = self._present
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        if self.model.cache and self.model.steps and tokens.shape[1] == 1:
            from latentforge.students.stepping import step

            self._tokens = tokens[:, :0]
            return step(base, base.embed_tokens(tokens), self._layers, mask, positions)[:, 0]
        found = base(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._layers,
            use_cache=self.model.cache,
        )
        if self.model.cache:
            self._layers, self._tokens = found.past_key_values, self._tokens[:, :0]
        states: Tensor = found.last_hidden_state[:, -1].contiguous()
        return states

    def draw(self, rows: Tensor, keys: Keys, first: int, count: int, temperature: float) -> Tensor:
        """See ``latent.requests.Session``: the first draw of a place is that of its seed and position."""
        numbers = torch.arange(first, first + count) * _APART
        each = Keys(
            keys.seeds.unsqueeze(1).expand(-1, count).flatten(),
            (keys.positions.unsqueeze(1) + numbers.to(keys.positions.device)).flatten(),
        )
        states = self._state[rows.to(self._state.device)].repeat_interleave(count, 0)
        return self.model.tokens_after(states, each, temperature).reshape(len(rows), count, 1)

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
        """See ``latent.requests.Session``: a chunk that is begun is one that is there, the others are drawn."""
        chosen = begun.to(self._state.device)
        for one in temperature.unique().tolist():
            same = ((temperature == one) & (lengths == 0)).nonzero().squeeze(-1)
            if len(same):
                states = self._state[rows[same].to(self._state.device)]
                some = Keys(keys.seeds[same], keys.positions[same])
                drawn = self.model.tokens_after(states, some, one, top_k, top_p)
                chosen[same.to(chosen.device)] = drawn.unsqueeze(1)
        return chosen

    @torch.no_grad()
    def logprobs(self, rows: Tensor, begun: Tensor, place: int) -> Tensor:
        """See ``latent.requests.Session``: the one place of a chunk follows from the text alone."""
        return self.model.student.head(self._state[rows.to(self._state.device)]).float().log_softmax(-1)

    def keep(self, rows: Tensor) -> None:
        """See ``latent.requests.Session``."""
        rows = rows.to(self._state.device)
        if len(rows) == len(self._state) and bool((rows == torch.arange(len(rows), device=rows.device)).all()):
            return
        self._tokens, self._present, self._state = self._tokens[rows], self._present[rows], self._state[rows]
        if self._layers is not None:
            self._layers.batch_select_indices(rows)
        first = unused(self._present)
        self._present, self._tokens = self._present[:, first:], self._tokens[:, first:]
        for layer in [] if self._layers is None else self._layers.layers:
            layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]

    def join(self, other: TokenSession) -> None:
        """See ``latent.requests.Session``: before the shorter texts there is padding, which is not seen."""
        length = max(self._present.shape[1], other._present.shape[1])
        self._present = torch.cat([lengthened(one._present, length, 1) for one in (self, other)])
        self._state = torch.cat([self._state, other._state])
        if self._layers is None:
            self._tokens = torch.cat([lengthened(one._tokens, length, 1) for one in (self, other)])
            return
        self._tokens = self._tokens.new_empty(len(self._state), 0)
        for mine, theirs in zip(self._layers.layers, other._layers.layers, strict=True):
            mine.keys = torch.cat([lengthened(one.keys, length, -2) for one in (mine, theirs)])
            mine.values = torch.cat([lengthened(one.values, length, -2) for one in (mine, theirs)])

    @torch.no_grad()
    def advance(self, chunks: Tensor) -> None:
        """See ``latent.requests.Session``: one step of the model, or all of them without a cache."""
        added = chunks.to(self._state.device)
        self._tokens = torch.cat([self._tokens, added], dim=1)
        self._present = torch.cat([self._present, torch.ones_like(added, dtype=torch.bool)], dim=1)
        self._state = self._states()


def _refuse_unmasked(model: Any) -> None:
    """Refuse layers that keep something else of a text than keys and values by place: padding beside it would be
    seen, and texts of unequal length could be no batch."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    if other or getattr(model, "_is_stateful", False):
        raise RefusedError(
            f"a {type(model).__name__} keeps a state of its own of a text ({', '.join(other) or 'no attention'}), and "
            "texts are written by attention alone",
            next="take a student whose layers are full_attention or sliding_attention",
        )
