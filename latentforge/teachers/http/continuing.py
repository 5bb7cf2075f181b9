"""A server goes on with texts: one request a context, by token ids, for R chunks of K drawn tokens as ids.

Two forms of question:

- ``token_ids`` (vLLM): ids as a list, beside those of the prompt that the server read; it draws from the model's own
  distribution whatever its generation config says, and goes on behind an end of text, so that chunks are whole;
- ``logprobs`` with ``return_tokens_as_token_ids``: ids out of keys ``token_id:17``. A chunk may end where the server
  ends a text; what follows the end of a text is EOS.

Chunks given as text are refused: it need not be read as the tokens that were drawn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from latentforge.errors import RefusedError
from latentforge.targets.continued import Ids
from latentforge.teachers.continuing import Contexts, Continuing
from latentforge.teachers.failures import FailureKind, TeacherFailure
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.flow import FlowControl
from latentforge.teachers.http.probe import tried
from latentforge.teachers.protocol import Tokens

Form = Literal["token_ids", "logprobs"]
_KEY = re.compile(r"token_id:([0-9]{1,9})")
_NEXT = {
    "too-few": "set continuations.count = 1, or use a server that knows n (vLLM)",
    "collapsed": "a server that knows return_token_ids or return_tokens_as_token_ids (vLLM) is needed",
}
_MOST_BIASED = 4096
"""Ids without a token that can be forbidden by name; where there are more, a drawn one is refused."""
_EXPECTED = ("refused-request", "collapsed", "too-few")


@dataclass(frozen=True)
class Beginning:
    """One question: ``prompt`` ids, after which ``asked`` chunks are drawn at ``temperature``.

    ``seed`` is the server's, below 2^31. ``rows`` ids are known to the model, the first ``vocab_size`` are tokens.
    """

    prompt: tuple[int, ...]
    temperature: float
    seed: int
    asked: Continuing
    vocab_size: int
    rows: int

    @property
    def charged(self) -> int:
        """Tokens of the prompt and the drawn ones."""
        return len(self.prompt) + self.asked.count * self.asked.chunk


def request_body(model: str, question: Beginning, form: Form) -> dict[str, Any]:
    """The JSON body of ``POST /completions`` that asks for the chunks after a context."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(question.prompt),
        "n": question.asked.count,
        "max_tokens": question.asked.chunk,
        "temperature": question.temperature,
        "top_p": 1,
        "seed": question.seed,
    }
    padding = range(question.vocab_size, question.rows)
    if 0 < len(padding) <= _MOST_BIASED:
        body["logit_bias"] = {str(number): -100 for number in padding}
    if form == "token_ids":
        own = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "ignore_eos": True}
        return body | own | {"return_token_ids": True}
    return body | {"logprobs": 1, "return_tokens_as_token_ids": True}


def parse_answer(value: Any, question: Beginning, form: Form, *, url: str | None = None) -> npt.NDArray[np.int64]:
    """The chunks int64 [R, K] of ``value``, the JSON that a server answered with status 200.

    TeacherFailure where it holds another number of chunks, another number of tokens than were asked without an end of
    text, no ids, or ids that are no tokens; and where it says that it read another prompt than was sent.
    """

    def refuse(kind: FailureKind, what: str) -> NoReturn:
        raise TeacherFailure(kind, what, url=url, status=200, next=_NEXT.get(kind))

    asked = question.asked
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        refuse("malformed", "the answer holds no list of choices")
    if len(choices) != asked.count:
        refuse("too-few", f"{len(choices)} chunks were drawn, {asked.count} were asked (n)")
    usage = value.get("usage")
    read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if read is not None and read != len(question.prompt):
        refuse("wrong-ids", f"the server read {read!r} tokens, {len(question.prompt)} were sent")
    found = np.full((asked.count, asked.chunk), asked.eos_id, np.int64)
    for number, choice in enumerate(choices):
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != list(question.prompt):
            refuse("wrong-ids", "the prompt that the server read is not the one that was sent")
        ids = _ids(choice, form, refuse)
        if any(type(one) is not int or not 0 <= one < question.vocab_size for one in ids):
            refuse("wrong-ids", f"ids {ids[:8]} were drawn; the tokenizer has {question.vocab_size} tokens")
        ended = choice.get("finish_reason") == "stop" or asked.eos_id in ids
        if len(ids) > asked.chunk or (len(ids) < asked.chunk and not ended):
            refuse("malformed", f"a chunk of {len(ids)} tokens, {asked.chunk} were asked, and no end of a text")
        found[number, : len(ids)] = ids
    return found


def _ids(choice: dict[str, Any], form: Form, refuse: Callable[[FailureKind, str], NoReturn]) -> list[Any]:
    if form == "token_ids":
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            refuse("collapsed", "answered without token_ids: it gives drawn tokens as text alone")
        return ids
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("tokens") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list):
        refuse("collapsed", "answered without logprobs.tokens: it gives drawn tokens as text alone")
    ids = []
    for token in tokens:
        named = _KEY.fullmatch(token) if isinstance(token, str) else None
        if named is None:
            refuse("collapsed", f"drawn tokens are given as text ({str(token)[:24]!r}), not as ids")
        ids.append(int(named[1]))
    return ids


def ask(client: HttpClient, model: str, question: Beginning, form: Form) -> npt.NDArray[np.int64]:
    """One request: the chunks after one context, int64 [R, K]. Raises TeacherFailure."""
    value = client.post("/completions", request_body(model, question, form))
    with client.hiding():
        return parse_answer(value, question, form, url=client.url)


def find_form(client: HttpClient, flow: FlowControl, model: str, *, vocab_size: int, rows: int) -> Form:
    """The first form of question that the server answers with ids. TeacherFailure with what it said to the last."""
    asked = Continuing(chunk=2, count=2, temperatures=(1.0,), eos_id=0, seed=0)
    question = Beginning((0, 1 % vocab_size), 1.0, 1, asked, vocab_size, rows)
    forms: tuple[Form, ...] = get_args(Form)
    for form in forms:
        found = tried(flow, partial(ask, client, model, question, form), question.charged, _EXPECTED)
        if not isinstance(found, TeacherFailure):
            return form
    raise found


def continue_texts(
    client: HttpClient,
    flow: FlowControl,
    model: str,
    sequences: Sequence[Tokens],
    asked: Continuing,
    *,
    form: Form,
    vocab_size: int,
    rows: int,
    max_tokens: int | None,
) -> Iterator[tuple[int, dict[float, Ids]]]:
    """Yield (index, chunks) of each sequence once all of its contexts are answered (see :class:`Continuer`)."""
    contexts = [Contexts.of(tokens, asked) for tokens in sequences]
    longest = max((len(row.text) for row in contexts), default=0) + asked.chunk
    if max_tokens is not None and longest > max_tokens:
        raise RefusedError(
            f"{longest} tokens of text and continuation are more than the server's {max_tokens}",
            next=f"set data.sequence_length = {max_tokens} or less",
        )
    flow.k = flow.k_low  # nothing is asked for that a rate limit could make smaller
    sizes = {"vocab_size": vocab_size, "rows": rows}
    waiting, asks, charged, places = [], [], [], []
    drawn: list[dict[float, npt.NDArray[np.int64]]] = []
    for number, row in enumerate(contexts):
        shape = (asked.count, len(row.chunks), asked.chunk)
        drawn.append({t: np.empty(shape, np.int64) for t in asked.temperatures})
        waiting.append(len(row.chunks) * len(asked.temperatures))
        for temperature in asked.temperatures:
            key = asked.key(sequences[number], temperature)
            for place, (chunk, end) in enumerate(zip(row.chunks.tolist(), row.ends.tolist(), strict=True)):
                beginning = partial(Beginning, temperature=temperature, seed=_seed(key, chunk), asked=asked, **sizes)
                asks.append(partial(_asked, client, model, form, beginning, row.text[:end]))
                charged.append(end + asked.count * asked.chunk)
                places.append((number, temperature, place))
    for number, left in enumerate(waiting):
        if not left:
            yield number, contexts[number].spread(drawn[number], sequences[number], asked)
    for at, chunks in flow.each(asks, tokens=charged):
        number, temperature, place = places[at]
        drawn[number][temperature][:, place] = chunks
        waiting[number] -= 1
        if not waiting[number]:
            yield number, contexts[number].spread(drawn[number], sequences[number], asked)


def _asked(
    client: HttpClient, model: str, form: Form, beginning: Callable[..., Beginning], text: Tokens, _k: int
) -> npt.NDArray[np.int64]:
    # The prompt is written out when it is sent: those of all contexts of a long row take a hundred times its own bytes.
    return ask(client, model, beginning(prompt=tuple(text.tolist())), form)


def _seed(key: int, chunk: int) -> int:
    """A server's seed for one context. vLLM adds a draw's number to it: neighbours must not have neighbouring ones."""
    return int.from_bytes(hashlib.sha256(f"{key} {chunk}".encode()).digest()[:4], "little") >> 1
