"""Beam search over the tokens that a token head gives, chunk after chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.errors import FailedError, RefusedError
from latentforge.students.latent.generate import Finish, Generated
from latentforge.students.latent.requests import ChunkModel, Request, Sampling, Session, check_request
from latentforge.students.latent.scoring import Scored

GREEDY = Sampling("tokens", 0.0)


@dataclass(frozen=True)
class _Path:
    """A beginning of an answer: its tokens with their log-probabilities, and its ``row`` of the session."""

    row: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@torch.no_grad()
def beam_search(model: ChunkModel, request: Request, width: int, *, number: int = 0) -> Scored:
    """The text with the highest mean log-probability of a token among those that a beam of ``width`` finds.

    ``width`` beginnings are kept, those of the highest log-probability so far; one that ends in EOS is put aside, and
    the search is over when ``width`` have ended, or at the length that was asked for. Nothing is drawn: the seed plays
    no part, and ``request.sampling`` is refused unless it is greedy by tokens. Width 1 is greedy.
    """
    if width < 1:
        raise RefusedError(f"beam = {width} is less than 1")
    if request.sampling != GREEDY:
        raise RefusedError(
            f"request {number}: a beam draws nothing, so there is no {request.sampling} in it",
            next="ask for the method tokens at temperature 0",
        )
    check_request(model, number, request)
    whole, left = divmod(len(request.prompt), model.chunk)
    prompt = torch.tensor(request.prompt[: whole * model.chunk], dtype=torch.int64)
    session = model.begin([prompt.reshape(whole, model.chunk)])
    begun = request.prompt[len(request.prompt) - left :]
    paths, ended, steps = [_Path(0)], list[_Path](), 0
    while True:
        steps += 1
        start = len(paths[0].tokens)
        for place in range(len(begun), model.chunk):
            paths, over = _widened(model, session, paths, begun, start, place, width, number)
            ended += over
            if not paths or len(ended) >= width or len(paths[0].tokens) == request.max_new_tokens:
                found = ended if len(ended) >= width else ended + paths
                return _answer(model, request, max(found, key=lambda path: path.total / len(path.tokens)), steps)
        session.keep(torch.tensor([path.row for path in paths]))
        session.advance(_chunks(model, begun, start, paths))
        paths = [_Path(row, path.tokens, path.logprobs) for row, path in enumerate(paths)]
        begun = ()


def _widened(
    model: ChunkModel,
    session: Session,
    paths: list[_Path],
    begun: tuple[int, ...],
    start: int,
    place: int,
    width: int,
    number: int,
) -> tuple[list[_Path], list[_Path]]:
    """The ``width`` best paths that are a token longer, and those among the best that ended with it."""
    rows = torch.tensor([path.row for path in paths])
    found = session.logprobs(rows, _chunks(model, begun, start, paths), place).cpu()
    if not bool(found.isfinite().all()):
        raise FailedError(f"request {number}: the model's answer is not finite", next="look at its training")
    totals = found.double() + torch.tensor([path.total for path in paths], dtype=torch.float64).unsqueeze(1)
    # Each path has one way to end, so twice the width holds as many as are kept that go on.
    best = totals.flatten().topk(min(2 * width, totals.numel())).indices.tolist()
    longer, over = list[_Path](), list[_Path]()
    for rank, at in enumerate(best):
        row, token = divmod(at, model.vocab_size)
        path = paths[row]
        grown = _Path(path.row, (*path.tokens, token), (*path.logprobs, float(found[row, token])))
        if token != model.eos_id:
            longer.append(grown)
        elif rank < width:
            over.append(grown)
        if len(longer) == width:
            break
    return longer, over


def _chunks(model: ChunkModel, begun: tuple[int, ...], start: int, paths: list[_Path]) -> Tensor:
    """The chunk that each path is in, int64 [R, K]; what is not known of it yet is EOS."""
    chunks = torch.full((len(paths), model.chunk), model.eos_id)
    for row, path in enumerate(paths):
        known = (*begun, *path.tokens[start:])
        chunks[row, : len(known)] = torch.tensor(known, dtype=torch.int64)
    return chunks


def _answer(model: ChunkModel, request: Request, path: _Path, steps: int) -> Scored:
    finish: Finish = "eos" if path.tokens[-1] == model.eos_id else "length"
    return Scored(Generated(request.prompt, path.tokens, finish, steps, 0), path.logprobs)
