"""Top-k rows from a server's answer to a scored document, given only where the answer proves that they are its rows.

Two forms of question, by token ids, one request a document:

- ``prompt_logprobs`` (vLLM): rows keyed by id, beside the ids that the server read;
- ``echo`` (OpenAI's older protocol) with ``return_tokens_as_token_ids``: rows keyed ``token_id:17``.

Rows keyed by the text of tokens are refused: several tokens have one text, and would have become one entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from latentforge.targets.row import SequenceTargets
from latentforge.teachers.failures import FailureKind, TeacherFailure

Form = Literal["prompt_logprobs", "echo"]
ABSENT = -1
_PREFIX = "token_id:"
_SAME = 1e-3  # one number said twice in an answer
_LEAST = -1e5  # servers write down to -9999 for what cannot be; beyond fp32 a number would become an absent entry's
_MASS = 1e-3


@dataclass(frozen=True)
class Question:
    """One document to score: ``tokens`` ids (at least 2), ``k`` entries a row.

    ``rows`` ids are known to the model, the first ``vocab_size`` are tokens; the rest is padding. ``last_generated``
    leaves the last token out of the prompt and takes its row from the one token that is generated, for documents that
    are as long as the model's positions.
    """

    tokens: tuple[int, ...]
    k: int
    vocab_size: int
    rows: int
    last_generated: bool = False

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids that are sent."""
        return self.tokens[:-1] if self.last_generated else self.tokens

    @property
    def charged(self) -> int:
        """Tokens of the prompt and the generated one."""
        return len(self.prompt) + 1


@dataclass(frozen=True)
class Answer:
    """The rows of one document, ids int32 and logprobs float32 ``[L-1, k]``, tail float32 ``[L-1]`` at T = 1.

    ``padding`` counts entries of padding ids, which were left to the outside. ``own_inside`` counts rows whose own
    token is the least likely of exactly k entries: what all rows look like where a server counts it among the k.
    """

    targets: SequenceTargets
    padding: int
    own_inside: int


def request_body(model: str, question: Question, form: Form) -> dict[str, Any]:
    """The JSON body of ``POST /completions`` that asks for the rows of a document."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(question.prompt),
        "max_tokens": 1,
        "temperature": 0,
        "return_tokens_as_token_ids": True,
    }
    if form == "prompt_logprobs":
        body |= {"prompt_logprobs": question.k, "return_token_ids": True}
        if question.last_generated:
            body["logprobs"] = question.k
        return body
    return body | {"echo": True, "logprobs": question.k}


def parse_answer(value: Any, question: Question, form: Form, *, url: str | None = None) -> Answer:
    """The rows of ``value``, the JSON that a server answered with status 200. TeacherFailure where it proves nothing.

    Proved for each row: the ids that the server read are those that were sent (where it says them), the row holds the
    document's own token of that position, and what is said twice is equal. Kept are exactly the k largest
    log-probabilities, equal ones by ascending id; tail = log(max(0, 1 - Σ p)) in float64.
    """
    return _Reading(question, form, url).read(value)


class _Reading:
    def __init__(self, question: Question, form: Form, url: str | None) -> None:
        self.question, self.form, self.url = question, form, url
        self.padding = self.own_inside = 0

    def refuse(self, kind: FailureKind, what: str) -> NoReturn:
        raise TeacherFailure(kind, what, url=self.url, status=200)

    def read(self, value: Any) -> Answer:
        choice = self._choice(value)
        if self.form == "prompt_logprobs":
            rows, own = self._prompt_rows(value, choice)
        else:
            rows, own = self._echoed_rows(choice)
        entries = [self._entries(row, at) for at, row in enumerate(rows, start=1)]
        self._check_positions(entries, own)
        k, n = self.question.k, len(entries)
        ids = np.full((n, k), ABSENT, dtype=np.int32)
        logprobs = np.full((n, k), -np.inf, dtype=np.float32)
        tail = np.empty(n, dtype=np.float32)
        for at, entry in enumerate(entries):
            tail[at] = self._keep(entry, at, ids[at], logprobs[at])
        return Answer(SequenceTargets(ids, logprobs, {1.0: tail}), self.padding, self.own_inside)

    def _choice(self, value: Any) -> dict[str, Any]:
        choices = value.get("choices") if isinstance(value, dict) else None
        if choices is None and isinstance(value, dict) and value.get("error"):
            self.refuse("malformed", f"answered with an error and status 200: {_brief(_said(value['error']))}")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            self.refuse("malformed", "the answer does not hold exactly one choice")
        return dict(choices[0])

    def _prompt_rows(self, value: dict[str, Any], choice: dict[str, Any]) -> tuple[list[Any], list[float | None]]:
        sent = self.question.prompt
        rows = choice.get("prompt_logprobs", value.get("prompt_logprobs"))
        if rows is None:
            self.refuse("no-logprobs", "answered without the log-probabilities of the prompt")
        if not isinstance(rows, list):
            self.refuse("malformed", "prompt_logprobs is not a list")
        self._check_ids(choice.get("prompt_token_ids"))
        self._check_count(len(rows), len(sent))
        self._check_first(rows)
        rows = [self._ranked(row, at) for at, row in enumerate(rows[1:], start=1)]
        own: list[float | None] = [None] * len(rows)
        if self.question.last_generated:
            generated = choice.get("logprobs")
            tokens, logprobs, tops = self._lists(generated)
            if len(tokens) != 1:
                self.refuse("malformed", f"{len(tokens)} tokens were generated, 1 was asked")
            last = {_id_of(key): value for key, value in self._keyed(tops[0], len(sent))}
            self._check_generated(tokens[0], logprobs[0], last)
            rows.append(last)
        return rows, own

    def _ranked(self, row: Any, at: int) -> dict[Any, Any]:
        """{key: log-probability} of a row of ``prompt_logprobs``; where it has ranks, 1 to k must all be there."""
        if not isinstance(row, dict) or not all(isinstance(value, dict) for value in row.values()):
            self.refuse("malformed", f"the row of position {at} is {_brief(row)}")
        ranks = [value.get("rank") for value in row.values()]
        if any(rank is not None for rank in ranks):
            if any(type(rank) is not int for rank in ranks):
                self.refuse("malformed", f"position {at} has a rank that is no number")
            missing = set(range(1, min(self.question.k, self.question.rows) + 1)).difference(ranks)
            if missing:
                self.refuse(
                    "too-few", f"position {at} has no entry of rank {min(missing)}, {self.question.k} were asked"
                )
        return {key: value.get("logprob") for key, value in row.items()}

    def _echoed_rows(self, choice: dict[str, Any]) -> tuple[list[Any], list[float | None]]:
        sent = self.question.prompt
        tokens, logprobs, tops = self._lists(choice.get("logprobs"))
        self._check_ids([self._named(token) for token in tokens[: len(sent)]])
        if len(tokens) > len(sent) + 1:
            self._check_count(len(tokens) - 1, len(sent))
        self._check_first(tops)
        rows = [{_id_of(k): v for k, v in self._keyed(top, at)} for at, top in enumerate(tops[1:], start=1)]
        own: list[float | None] = []
        for at in range(1, len(sent)):
            if not _is_number(logprobs[at]):
                self.refuse("malformed", f"token_logprobs[{at}] is {_brief(logprobs[at])}")
            own.append(float(logprobs[at]))
        kept = rows[: len(sent) - 1]
        if self.question.last_generated:
            if len(tokens) <= len(sent):
                self.refuse("too-few", "no token was generated after the document")
            kept = rows[: len(sent)]
            self._check_generated(tokens[len(sent)], logprobs[len(sent)], kept[-1])
        return kept, own

    def _lists(self, logprobs: Any) -> tuple[list[Any], list[Any], list[Any]]:
        if logprobs is None:
            self.refuse("no-logprobs", "answered without log-probabilities")
        found = [logprobs.get(name) if isinstance(logprobs, dict) else None for name in _LISTS]
        if found[2] is None and isinstance(found[0], list):
            self.refuse("no-logprobs", "answered without top_logprobs")
        tokens, values, tops = found
        if not isinstance(tokens, list) or not isinstance(values, list) or not isinstance(tops, list):
            self.refuse("malformed", "logprobs does not hold the lists " + ", ".join(_LISTS))
        if not len(tokens) == len(values) == len(tops):
            self.refuse("malformed", f"logprobs has lists of {len(tokens)}, {len(values)} and {len(tops)} entries")
        return tokens, values, tops

    def _named(self, token: Any) -> int:
        if not isinstance(token, str):
            self.refuse("malformed", f"a token is {_brief(token)}, not a text")
        number = _id_of(token.removeprefix(_PREFIX)) if token.startswith(_PREFIX) else None
        if not isinstance(number, int):
            self.refuse("collapsed", f"tokens are named by their text ({_brief(token)}), not by their ids")
        return number

    def _keyed(self, row: Any, at: int) -> list[tuple[str, Any]]:
        if not isinstance(row, dict):
            self.refuse("malformed", f"the row of position {at} is {_brief(row)}")
        for key in row:
            if not key.startswith(_PREFIX):
                self._collapsed(key, at)
        return [(key.removeprefix(_PREFIX), value) for key, value in row.items()]

    def _collapsed(self, key: Any, at: int) -> NoReturn:
        self.refuse("collapsed", f"position {at}: entries are keyed by text ({_brief(key)}); several tokens share one")

    def _check_ids(self, read: Any) -> None:
        if read is None:
            return
        sent = list(self.question.prompt)
        if not isinstance(read, list) or any(type(token) is not int for token in read):
            self.refuse("malformed", f"the ids that were read are {_brief(read)}")
        if read == sent:
            return
        if read[-len(sent) :] == sent:
            added = read[: len(read) - len(sent)]
            self.refuse("wrong-ids", f"the server put {_brief(added)} before the {len(sent)} ids that were sent")
        if len(read) != len(sent):
            self.refuse("wrong-ids", f"the server read {len(read)} ids, {len(sent)} were sent")
        at = next(at for at, (a, b) in enumerate(zip(read, sent, strict=True)) if a != b)
        self.refuse("wrong-ids", f"position {at}: the server read id {read[at]}, {sent[at]} was sent")

    def _check_count(self, have: int, sent: int) -> None:
        if have != sent:
            self.refuse("wrong-ids", f"{have} positions were answered for {sent} ids that were sent")

    def _check_first(self, rows: list[Any]) -> None:
        if not rows or rows[0] is not None:
            self.refuse("shifted", "position 0 has a row, and nothing stands before it")
        if len(rows) > 1 and rows[1] is None:
            self.refuse("shifted", "position 1 has no row: rows stand late")

    def _entries(self, row: Any, at: int) -> dict[int, float]:
        if not isinstance(row, dict):
            self.refuse("malformed", f"the row of position {at} is {_brief(row)}")
        found: dict[int, float] = {}
        for key, value in row.items():
            number = key if isinstance(key, int) else _id_of(key)
            if not isinstance(number, int):
                self._collapsed(key, at)
            if not _is_number(value):
                self.refuse("malformed", f"position {at}, id {number}: its log-probability is {_brief(value)}")
            if number >= self.question.rows:
                self.refuse("wrong-ids", f"position {at}: id {number}; the model has {self.question.rows}")
            if not _LEAST <= value <= _SAME:
                self.refuse("not-finite", f"position {at}, id {number}: its log-probability is {value}")
            found[number] = float(value)
        return found

    def _check_positions(self, entries: list[dict[int, float]], said: Sequence[float | None]) -> None:
        """Each row must hold the document's own token; a generated one need not."""
        tokens = self.question.tokens
        proved = len(entries) - self.question.last_generated
        k = min(self.question.k, self.question.rows)
        for at, row in enumerate(entries):
            if len(row) < k:
                self.refuse("too-few", f"position {at + 1} has {len(row)} entries, {k} were asked")
        for at in range(proved):
            own = entries[at].get(tokens[at + 1])
            other = said[at]
            if own is None:
                self._misplaced(entries, proved, at)
            if other is not None and not abs(own - other) <= _SAME:
                self.refuse(
                    "shifted",
                    f"position {at + 1}: its token has log-probability {other:g}, in its row {own:g}",
                )
            if len(entries[at]) == k < self.question.rows:
                self.own_inside += own == min(entries[at].values())

    def _misplaced(self, entries: list[dict[int, float]], proved: int, at: int) -> NoReturn:
        tokens = self.question.tokens
        for by in (1, -1, 2, -2):
            places = [(row, place + 1 - by) for row, place in zip(entries, range(proved), strict=False)]
            fits = [tokens[place] in row for row, place in places if 1 <= place < len(tokens)]
            if fits and all(fits):
                where = "late" if by > 0 else "early"
                self.refuse("shifted", f"rows stand {abs(by)} position(s) {where}: each holds a neighbour's token")
        self.refuse("wrong-ids", f"position {at + 1}: the row does not hold its own token, id {tokens[at + 1]}")

    def _check_generated(self, token: Any, logprob: Any, row: dict[Any, Any]) -> None:
        """At temperature 0 the generated token is the row's most likely one."""
        number = self._named(token)
        values = [v for v in row.values() if _is_number(v)]
        if not _is_number(logprob) or number not in row or not _is_number(row[number]):
            self.refuse("wrong-ids", f"the generated token {number} does not stand in its row")
        if not abs(row[number] - logprob) <= _SAME or not row[number] >= max(values) - _SAME:
            self.refuse("shifted", f"the generated token {number} is not the most likely one of its row")

    def _keep(
        self, entry: dict[int, float], at: int, ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32]
    ) -> float:
        """Write the k largest into the row; returns the log of the mass outside."""
        numbers = np.fromiter(entry.keys(), dtype=np.int64, count=len(entry))
        values = np.fromiter(entry.values(), dtype=np.float64, count=len(entry)).astype(np.float32)
        order = np.lexsort((numbers, -values))[: self.question.k]
        real = order[numbers[order] < self.question.vocab_size]
        self.padding += len(order) - len(real)
        ids[: len(real)] = numbers[real]
        logprobs[: len(real)] = np.minimum(values[real], 0.0)
        mass = float(np.exp(logprobs[: len(real)].astype(np.float64)).sum())
        if mass > 1.0 + _MASS:
            self.refuse("not-finite", f"position {at + 1}: its probabilities sum to {mass:.6g}")
        if len(real) == self.question.vocab_size:
            return -math.inf  # nothing lies outside the whole vocabulary, whatever rounding left
        rest = 1.0 - mass
        return math.log(rest) if rest > 0.0 else -math.inf


_LISTS = ("tokens", "token_logprobs", "top_logprobs")


def _id_of(key: Any) -> int | Any:
    """The id that a key spells in the one way in which numbers are spelt; else the key itself."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 9 and str(int(key)) == key:
        return int(key)
    return key


def _said(error: Any) -> Any:
    """The sentence of an error as OpenAI and vLLM write it, else all of it."""
    return error.get("message", error) if isinstance(error, dict) else error


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def padded(targets: SequenceTargets, k: int) -> SequenceTargets:
    """The same rows with absent entries (id -1, logprob minus infinity) behind them, up to ``k``."""
    have = targets.ids.shape[1]
    if have == k:
        return targets
    more = ((0, 0), (0, k - have))
    return SequenceTargets(
        np.pad(targets.ids, more, constant_values=ABSENT),
        np.pad(targets.logprobs, more, constant_values=-np.inf),
        targets.tails,
    )
