"""Text from a model that writes K tokens a step: prompts of any length, a seed a request, an exact end.

What comes out for a request depends on the request alone: its seed and the place in its text key every draw, so it is
the same in a batch and by itself. The prompt is never decoded and drawn again: its whole chunks are the model's input
as they are, and what is left of it is completed by the token head, whose conditionals are those of the true prefix. The
model sees no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from latentforge.errors import FailedError, LatentForgeError, RefusedError
from latentforge.students.latent.chunks import absorbed
from latentforge.students.latent.requests import ChunkModel, Keys, Request, Sampling, Session, check_request
from latentforge.students.latent.tempered import Drawn, exact, vote

_AT_ONCE = 1024
"""Draws in memory at once, of all texts of a batch together."""

Finish = Literal["eos", "length", "failed"]


class Piece(NamedTuple):
    """What one step gave request number ``request``: ``tokens`` (an EOS is the last one), the ``draws`` computed for
    them, and how the text ended, None while it goes on. With "failed", ``error`` says why."""

    request: int
    tokens: tuple[int, ...]
    draws: int
    finish: Finish | None
    error: LatentForgeError | None = None


class Generated(NamedTuple):
    """``tokens`` after the ``prompt``, EOS included where the text ended, of ``steps`` chunks and ``draws`` draws."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    finish: Finish
    steps: int
    draws: int


class _Cut(NamedTuple):
    """The tokens that one is drawn from: the ``top_k`` likeliest, and of these the fewest whose share is ``top_p``."""

    top_k: int | None
    top_p: float | None


@dataclass
class _Text:
    """A request under way. ``begun`` is what its prompt has of the next chunk, empty after the first step."""

    number: int
    request: Request
    position: int
    begun: tuple[int, ...]
    produced: int = 0


_Waited = Callable[[list[_Text]], list[bool]]


def generate(model: ChunkModel, requests: Sequence[Request]) -> list[Generated]:
    """All texts, in the order of the requests; LatentForgeError where one failed."""
    tokens: list[list[int]] = [[] for _ in requests]
    steps, draws = [0] * len(requests), [0] * len(requests)
    ends: list[Finish] = ["length"] * len(requests)
    for piece in stream(model, requests):
        if piece.error is not None:
            raise piece.error
        tokens[piece.request].extend(piece.tokens)
        steps[piece.request] += 1
        draws[piece.request] += piece.draws
        if piece.finish is not None:
            ends[piece.request] = piece.finish
    each = zip(requests, tokens, ends, steps, draws, strict=True)
    return [Generated(one.prompt, tuple(found), end, n, made) for one, found, end, n, made in each]


def stream(model: ChunkModel, requests: Sequence[Request]) -> Iterator[Piece]:
    """The pieces of all texts as they are written, a step of all of them at a time.

    A request that fails ends with a piece that says so; the others go on. RefusedError before the first piece where a
    request cannot be served.
    """
    batch = Batch(model)
    batch.join(dict(enumerate(requests)))
    while len(batch):
        yield from batch.step()


class Batch:
    """Texts under way together, which requests join and leave between two steps.

    A step of many draws can be long: between blocks of them ``over`` says whom nobody waits for any more. Nothing more
    is drawn for these, and they leave with the step, without a piece.
    """

    def __init__(self, model: ChunkModel, over: Callable[[], Collection[int]] = frozenset) -> None:
        self._model, self._over = model, over
        self._texts: list[_Text] = []
        self._session: Session | None = None
        self._chosen: Tensor | None = None  # int64 [B, K]: what the last step chose and the session has not seen yet

    def __len__(self) -> int:
        """How many texts are under way."""
        return len(self._texts)

    @torch.no_grad()
    def join(self, requests: Mapping[int, Request]) -> None:
        """Begin texts by their numbers, which are free; RefusedError, and none of them joins, where a request cannot be
        served."""
        for number, request in requests.items():
            if any(text.number == number for text in self._texts):
                raise RefusedError(f"request {number} is under way")
            check_request(self._model, number, request)
        if not requests:
            return
        size = self._model.chunk
        texts, whole = [], []
        for number, request in requests.items():
            chunks, left = divmod(len(request.prompt), size)
            texts.append(_Text(number, request, chunks, request.prompt[len(request.prompt) - left :]))
            whole.append(torch.tensor(request.prompt[: chunks * size], dtype=torch.int64).reshape(chunks, size))
        begun = self._model.begin(whole)
        if self._session is None:
            self._session = begun
        else:
            self._advance()
            self._session.join(begun)
        self._texts += texts

    def leave(self, numbers: Collection[int]) -> None:
        """Give up the texts of these numbers, where they are under way."""
        self._keep([row for row, text in enumerate(self._texts) if text.number not in numbers])

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """A piece of each text, in the order in which they joined; those that are over leave."""
        if self._session is None:
            return []
        self._advance()
        lost: set[int] = set()

        def waited(texts: list[_Text]) -> list[bool]:
            over = self._over()
            lost.update(text.number for text in texts if text.number in over)
            return [text.number not in lost for text in texts]

        chosen = _choose(self._model, self._session, self._texts, waited)
        self._chosen = chosen.chunks
        pieces, going = [], []
        for row, text in enumerate(self._texts):
            if text.number in lost:
                continue
            piece = _piece(self._model, text, chosen.chunks[row], int(chosen.made[row]), bool(chosen.settled[row]))
            text.produced += len(piece.tokens)
            text.position, text.begun = text.position + 1, ()
            if piece.finish is None:
                going.append(row)
            pieces.append(piece)
        self._keep(going)
        return pieces

    def _advance(self) -> None:
        if self._session is not None and self._chosen is not None:
            self._session.advance(self._chosen)
            self._chosen = None

    def _keep(self, rows: list[int]) -> None:
        self._texts = [self._texts[row] for row in rows]
        if not rows:
            self._session = self._chosen = None
        elif self._session is not None:
            self._session.keep(torch.tensor(rows))
            self._chosen = None if self._chosen is None else self._chosen[rows]


def _choose(model: ChunkModel, session: Session, texts: list[_Text], waited: _Waited) -> Drawn:
    """The next chunk of each text; the texts of one way of sampling are drawn for together. That of a text which is
    not ``waited`` for at some time means nothing."""
    chunks = torch.full((len(texts), model.chunk), -1, dtype=torch.int64)
    settled, made = torch.ones(len(texts), dtype=torch.bool), torch.zeros(len(texts), dtype=torch.int64)
    groups: dict[Sampling | _Cut, list[int]] = {}
    for row, text in enumerate(texts):
        sampling = text.request.sampling
        one_by_one = bool(text.begun) or sampling.method == "tokens"
        groups.setdefault(_Cut(sampling.top_k, sampling.top_p) if one_by_one else sampling, []).append(row)
    for way, members in groups.items():
        rows = torch.tensor(members)
        keys = Keys(
            torch.tensor([texts[row].request.seed for row in members]),
            torch.tensor([texts[row].position for row in members]),
        )
        if isinstance(way, _Cut):
            chunks[rows] = _complete(model, session, rows, keys, [texts[row] for row in members], way)
        else:
            asked = [texts[row] for row in members]
            found = _draw(model, session, rows, keys, way, partial(_waited_rows, waited, asked))
            chunks[rows], settled[rows], made[rows] = found.chunks, found.settled, found.made
    return Drawn(chunks, settled, made, made)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """One tensor of the parts; a single one, which most steps have, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _waited_rows(waited: _Waited, texts: list[_Text], rows: list[int]) -> list[bool]:
    return waited([texts[row] for row in rows])


def _draw(
    model: ChunkModel,
    session: Session,
    members: Tensor,
    keys: Keys,
    sampling: Sampling,
    waited: Callable[[list[int]], list[bool]],
) -> Drawn:
    temperature = sampling.temperature if sampling.method == "head" else 1.0

    def draw(rows: Tensor, first: int, count: int) -> Tensor:
        return _joined([block(some, first, count) for some in rows.split(_AT_ONCE)], 0)

    def block(rows: Tensor, first: int, count: int) -> Tensor:
        each = max(1, _AT_ONCE // len(rows))
        starts = range(first, first + count, each)
        parts = [some(rows, at, min(each, first + count - at)) for at in starts]
        # What follows an end is no part of the text: chunks that differ there alone are one outcome.
        return absorbed(_joined(parts, 1), model.eos_id)

    def some(rows: Tensor, first: int, count: int) -> Tensor:
        there = waited(rows.tolist())
        if all(there):
            here = Keys(keys.seeds[rows], keys.positions[rows])
            return session.draw(members[rows], here, first, count, temperature).cpu()
        # Draws that are all the same settle a text that is not waited for.
        found = torch.full((len(rows), count, model.chunk), -1, dtype=torch.int64)
        if any(there):
            found[torch.tensor(there)] = some(rows[torch.tensor(there)], first, count)
        return found

    wanted, seeds, positions = sampling.temperature, keys.seeds, keys.positions
    if sampling.method == "exact":
        return exact(draw, temperature=wanted, seeds=seeds, positions=positions, limit=sampling.draws)
    if sampling.method == "vote":
        return vote(draw, temperature=wanted, seeds=seeds, positions=positions, draws=sampling.draws)
    ones = torch.ones(len(members), dtype=torch.int64)
    return Drawn(draw(torch.arange(len(members)), 0, 1)[:, 0], ones.bool(), ones, ones)


def _complete(model: ChunkModel, session: Session, rows: Tensor, keys: Keys, texts: list[_Text], cut: _Cut) -> Tensor:
    begun = torch.full((len(texts), model.chunk), model.eos_id)
    for row, text in enumerate(texts):
        begun[row, : len(text.begun)] = torch.tensor(text.begun)
    lengths = torch.tensor([len(text.begun) for text in texts])
    temperature = torch.tensor([text.request.sampling.temperature for text in texts], dtype=torch.float64)
    found = session.complete(rows, keys, begun, lengths, temperature, cut.top_k, cut.top_p)
    return absorbed(found.cpu(), model.eos_id)


def _piece(model: ChunkModel, text: _Text, chunk: Tensor, made: int, settled: bool) -> Piece:
    """The text's share of its chunk: without what its prompt had, up to an EOS, no more than was asked for."""
    error = _failure(text, chunk, made, settled)
    if error is not None:
        return Piece(text.number, (), made, "failed", error)
    tokens = chunk.tolist()[len(text.begun) :]
    finish: Finish | None = None
    if model.eos_id in tokens:
        tokens, finish = tokens[: tokens.index(model.eos_id) + 1], "eos"
    left = text.request.max_new_tokens - text.produced
    if len(tokens) > left or (len(tokens) == left and finish is None):
        tokens, finish = tokens[:left], "length"
    return Piece(text.number, tuple(tokens), made, finish)


def _failure(text: _Text, chunk: Tensor, made: int, settled: bool) -> LatentForgeError | None:
    where = f"request {text.number}, chunk {text.position}"
    if not settled:
        sampling = text.request.sampling
        return FailedError(
            f"{where}: none of {made} draws was accepted at temperature = {sampling.temperature}",
            next=f"allow more than draws = {sampling.draws}, take a higher temperature, or vote",
        )
    if bool((chunk < 0).any()):
        return FailedError(f"{where}: the model's answer is not finite", next="look at its training's last losses")
    return None
