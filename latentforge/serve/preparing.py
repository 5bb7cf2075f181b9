"""From what was asked to the texts to write: prompts as tokens, seeds, the way of sampling, each within its limit."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from latentforge.errors import RefusedError
from latentforge.serve.asking import CompletionAsk, GenerateAsk, Method, Prompt
from latentforge.serve.limits import Limits
from latentforge.serve.refusing import Refusal
from latentforge.serve.texts import Choice
from latentforge.students.latent.requests import ChunkModel, Request, Sampling, check_request
from latentforge.students.latent.scoring import seed_of
from latentforge.writers.opening import Writer
from latentforge.writers.writing import sampling_of

DRAWS, COMPLETION_TOKENS, GENERATE_TOKENS = 200, 16, 128
"""Where a request names no number, or the server's limit where that is less; 16 is OpenAI's own default."""


def completion_choices(asked: CompletionAsk, writer: Writer, limits: Limits) -> list[Choice]:
    """The choices of a completion, those of a prompt one after the other; a Refusal names the field."""
    shown, count = asked.n or 1, candidates(asked)
    if count < shown:
        raise Refusal(400, f"best_of = {count} is less than n = {shown}", field="best_of")
    if len(asked.prompt) * count > limits.texts:
        field = "best_of" if asked.best_of else "n" if count > 1 else "prompt"
        raise Refusal(400, f"{len(asked.prompt)} prompts x {count} texts are more than {limits.texts}", field=field)
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "stream_options is for stream = true alone", field="stream_options")
    _check_scored(asked, writer.model, "best_of", count > shown)
    _check_scored(asked, writer.model, "logprobs", asked.logprobs is not None)
    sampling = _sampling(
        asked.method,
        1.0 if asked.temperature is None else float(asked.temperature),
        asked.draws,
        asked.top_k,
        asked.top_p,
        writer,
        limits,
    )
    if count > shown and sampling.temperature == 0 and sampling.method in ("head", "tokens"):
        raise Refusal(400, f"best_of = {count} at temperature 0: all of them would be the same text", field="best_of")
    new = ("max_tokens", asked.max_tokens or min(COMPLETION_TOKENS, limits.max_tokens))
    return _choices(writer, limits, asked.prompt, count, new=new, seed=asked.seed, sampling=sampling, stops=asked.stop)


def candidates(asked: CompletionAsk | GenerateAsk) -> int:
    """Texts that are written for each prompt."""
    return (asked.best_of or asked.n or 1) if isinstance(asked, CompletionAsk) else 1


def prompt_tokens(asked: CompletionAsk | GenerateAsk, choices: Sequence[Choice]) -> int:
    """Tokens of its prompts, of each once however many texts follow it; ``choices`` are those of all its texts."""
    return sum(len(one.request.prompt) for one in choices[:: candidates(asked)])


def _check_scored(asked: CompletionAsk, model: ChunkModel, field: str, wanted: bool) -> None:
    if wanted and not model.completes:
        raise Refusal(400, f"{field}: this student has no token head, so no probabilities of tokens", field=field)
    if wanted and asked.stream:
        raise Refusal(400, f"{field} is known once a text is written: not with stream = true", field=field)


def generate_choices(asked: GenerateAsk, writer: Writer, limits: Limits) -> list[Choice]:
    """The one text of /generate; a Refusal names the field."""
    sampling = _sampling(asked.method, float(asked.temperature), asked.draws, asked.top_k, asked.top_p, writer, limits)
    new = ("max_new_tokens", asked.max_new_tokens or min(GENERATE_TOKENS, limits.max_tokens))
    stops = asked.stop
    return _choices(writer, limits, [asked.prompt], 1, new=new, seed=asked.seed, sampling=sampling, stops=stops)


def deadline_of(asked: CompletionAsk | GenerateAsk, limits: Limits) -> float:
    """Seconds that the request has."""
    if asked.deadline is None:
        return limits.deadline
    if asked.deadline > limits.deadline:
        raise Refusal(400, f"deadline = {asked.deadline:g} is more than {limits.deadline:g} seconds", field="deadline")
    return asked.deadline


def _sampling(
    method: Method | None,
    temperature: float,
    draws: int | None,
    top_k: int | None,
    top_p: float | None,
    writer: Writer,
    limits: Limits,
) -> Sampling:
    """The asked method, else the usual one for these values."""
    draws = draws or min(DRAWS, limits.max_draws)
    if draws > limits.max_draws:
        raise Refusal(400, f"draws = {draws} is more than {limits.max_draws}", field="draws")
    try:
        return sampling_of(writer, method, temperature=temperature, draws=draws, top_k=top_k, top_p=top_p)
    except RefusedError as error:
        raise Refusal(400, _said(error), field=_field(error, "temperature")) from None


def _choices(
    writer: Writer,
    limits: Limits,
    prompts: Sequence[Prompt],
    count: int,
    *,
    new: tuple[str, int],
    seed: int | None,
    sampling: Sampling,
    stops: Sequence[str],
) -> list[Choice]:
    field, length = new
    if length > limits.max_tokens:
        raise Refusal(400, f"{field} = {length} is more than {limits.max_tokens}", field=field)
    found: list[Choice] = []
    for number, prompt in enumerate(prompts):
        ids = writer.encode(prompt) if isinstance(prompt, str) else prompt
        if len(ids) > limits.max_prompt:
            raise Refusal(
                400,
                f"prompt {number} has {len(ids)} tokens, {limits.max_prompt} are the most",
                field="prompt",
                code="context_length_exceeded",
            )
        # Without a seed, equal prompts are asked for different texts.
        own = secrets.randbits(63) if seed is None else seed
        for one in range(count):
            request = Request(ids, length, seed_of(own, one), sampling)
            if not one:
                _check(writer.model, number, request)
            text = prompt if isinstance(prompt, str) else None
            found.append(Choice(writer.tokenizer, text, request, index=len(found), stops=stops))
    return found


def _check(model: ChunkModel, number: int, request: Request) -> None:
    try:
        check_request(model, number, request)
    except RefusedError as error:
        said = RefusedError(str(error).replace(f"request {number}: ", "", 1), next=error.next)
        raise Refusal(400, _said(said), field=_field(said, "prompt")) from None


def _field(error: RefusedError, otherwise: str) -> str:
    """The field whose name begins the refusal."""
    first = str(error).partition(" ")[0]
    return first if first in ("temperature", "method", "draws", "top_k", "top_p") else otherwise


def _said(error: RefusedError) -> str:
    return f"{error}; {error.next}" if error.next else str(error)
