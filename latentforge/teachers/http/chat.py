"""The wire format of chat completions with log-probabilities: what is asked, and what an answer must hold.

The text becomes training documents elsewhere; here only what the server said is read, token by token, as bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from latentforge.teachers.failures import FailureKind, TeacherFailure

_MASS = 1e-3
_SAME = 1e-3


@dataclass(frozen=True)
class ChatEntry:
    """One token that the server names: its text, its bytes (None where the server gives none), its log-probability."""

    token: str
    bytes: bytes | None
    logprob: float


@dataclass(frozen=True)
class ChatPosition:
    """One generated token, and the entries of its row, most likely first; ``rest`` is the log of the mass outside."""

    own: ChatEntry
    top: tuple[ChatEntry, ...]
    rest: float


@dataclass(frozen=True)
class ChatAnswer:
    """What a chat API answered: its text, one position a generated token, and why it ended (``stop``, ``length``)."""

    text: str
    positions: tuple[ChatPosition, ...]
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


def chat_body(
    model: str,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int,
    k: int,
    temperature: float,
    seed: int | None = None,
) -> dict[str, Any]:
    """The JSON body of ``POST /chat/completions``."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [dict(message) for message in messages],
        "max_tokens": max_tokens,
        "temperature": temperature,
        # Said, since a server takes a model's own defaults where it is not: the text would be another draw than asked.
        "top_p": 1.0,
        "logprobs": True,
        "top_logprobs": k,
    }
    return body if seed is None else body | {"seed": seed}


def parse_chat(value: Any, *, k: int, url: str | None = None) -> ChatAnswer:
    """Read an answer; TeacherFailure where it lacks rows, has fewer than ``k`` entries, or is no such answer at all."""
    return _Reading(k, url).read(value)


@dataclass(frozen=True)
class _Reading:
    k: int
    url: str | None

    def refuse(self, kind: FailureKind, what: str) -> NoReturn:
        raise TeacherFailure(kind, what, url=self.url, status=200)

    def read(self, value: Any) -> ChatAnswer:
        choices = value.get("choices") if isinstance(value, dict) else None
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
        message = choice.get("message") if isinstance(choice, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if choice is None or not isinstance(text, str):
            self.refuse("malformed", "the answer does not hold exactly one message with text")
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        if content is None:
            self.refuse("no-logprobs", "answered a chat without log-probabilities")
        if not isinstance(content, list):
            self.refuse("malformed", "logprobs.content is not a list")
        if text and not content:
            self.refuse("no-logprobs", "answered a chat with a text and no log-probabilities")
        positions = tuple(self._position(one, at) for at, one in enumerate(content))
        reason, usage = choice.get("finish_reason"), value.get("usage")
        counts = [
            usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        prompt, completion = (count if type(count) is int and count >= 0 else None for count in counts)
        return ChatAnswer(text, positions, reason if isinstance(reason, str) else "unknown", prompt, completion)

    def _position(self, value: Any, at: int) -> ChatPosition:
        own = self._entry(value, at)
        listed = value.get("top_logprobs")
        if not isinstance(listed, list):
            self.refuse("no-logprobs", f"position {at} has no top_logprobs")
        top = sorted((self._entry(one, at) for one in listed), key=lambda entry: -entry.logprob)
        if len(top) < self.k:
            self.refuse("too-few", f"position {at} has {len(top)} entries, {self.k} were asked")
        kept = tuple(top[: self.k])
        for entry in kept:
            same = entry.bytes == own.bytes if own.bytes is not None else entry.token == own.token
            if same and abs(entry.logprob - own.logprob) > _SAME:
                self.refuse("shifted", f"position {at}: its token has two log-probabilities in one answer")
        mass = sum(math.exp(entry.logprob) for entry in kept)
        if mass > 1.0 + _MASS:
            self.refuse("not-finite", f"position {at}: its probabilities sum to {mass:.6g}")
        rest = 1.0 - mass
        return ChatPosition(own, kept, math.log(rest) if rest > 0.0 else -math.inf)

    def _entry(self, value: Any, at: int) -> ChatEntry:
        token = value.get("token") if isinstance(value, dict) else None
        if not isinstance(token, str):
            self.refuse("malformed", f"position {at} holds an entry without a token")
        logprob, raw = value.get("logprob"), value.get("bytes")
        if not (type(logprob) is float or (type(logprob) is int and abs(logprob) < 2**53)):
            self.refuse("malformed", f"position {at}: a log-probability is {str(logprob)[:40]}")
        if not -math.inf < logprob <= _SAME:
            self.refuse("not-finite", f"position {at}: a log-probability is {logprob}")
        if raw is not None and (
            not isinstance(raw, list) or any(type(byte) is not int or not 0 <= byte <= 255 for byte in raw)
        ):
            self.refuse("malformed", f"position {at}: the bytes of {token[:20]!r} are none")
        return ChatEntry(token, None if raw is None else bytes(raw), min(float(logprob), 0.0))
