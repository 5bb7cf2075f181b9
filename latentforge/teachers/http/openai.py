"""The backend ``openai``: any OpenAI-compatible server, asked by token ids, one request a document."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.kernels.targets import TopKTargets
from latentforge.targets.continued import Ids
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.continuing import Continuing
from latentforge.teachers.failures import public_url
from latentforge.teachers.http.chat import ChatAnswer, chat_body, parse_chat
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.continuing import continue_texts, find_form
from latentforge.teachers.http.flow import FlowControl
from latentforge.teachers.http.probe import ServerFacts, ask, attempt, find_model, probe
from latentforge.teachers.http.rows import Question, padded
from latentforge.teachers.http.vocabulary import compare_served
from latentforge.teachers.protocol import Capability, Limits, TeacherIdentity, Tokens, check_tokens
from latentforge.teachers.store import scored_batch

DEFAULT_K = 20


class OpenAITeacher:
    """A served model. Nothing is sent before the first question: then a few short ones find out what it can do.

    ``vocab_size`` tokens of its tokenizer, ``rows`` ids of the model (padding included), ``identity`` who answers,
    ``k`` what :meth:`targets` asks for where it is not told. ``chat_only`` for an API without raw completions.
    ``tokenizer`` is compared with the server's before the first document; None where both read the same folder.
    """

    def __init__(
        self,
        client: HttpClient,
        model: str,
        *,
        identity: TeacherIdentity,
        vocab_size: int,
        rows: int | None = None,
        flow: FlowControl | None = None,
        k: int = DEFAULT_K,
        chat_only: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.client = client
        self.model = model
        self.flow = flow or FlowControl()
        self.chat_only = chat_only
        self._tokenizer = tokenizer
        self._identity = identity
        self._vocab_size = vocab_size
        self._rows = max(vocab_size, rows or 0)
        self._k = k
        self._facts: ServerFacts | None = None
        self._continues: Callable[..., Iterator[tuple[int, dict[float, Ids]]]] | None = None
        self._lock = threading.Lock()
        self._padding = 0

    @classmethod
    def open(
        cls,
        url: str,
        model: str,
        folder: Path,
        *,
        revision: str | None = None,
        api_key_env: str | None = None,
        env: Mapping[str, str] | None = None,
        rows: int | None = None,
        flow: FlowControl | None = None,
        timeout: float = 60.0,
        k: int = DEFAULT_K,
        chat_only: bool = False,
    ) -> OpenAITeacher:
        """The model ``model`` at ``url`` (``http://host:8000/v1``), whose tokenizer lies in ``folder``.

        The key is the value in ``env`` of the variable that ``api_key_env`` names, refused where that is not set.
        """
        flow = flow or FlowControl()
        key = None
        if api_key_env is not None:
            key = (env or {}).get(api_key_env)
            if not key:
                raise RefusedError(
                    f"teacher.api_key_env = {api_key_env!r}, and that variable is not set",
                    next=f"read -rs {api_key_env} && export {api_key_env}",
                )
        tokenizer = Tokenizer.open(Path(folder))
        return cls(
            HttpClient(url, key=key, timeout=timeout, connections=flow.concurrency),
            model,
            identity=served_identity(model, revision=revision, tokenizer_sha256=tokenizer.sha256),
            vocab_size=tokenizer.vocab_size,
            rows=rows,
            flow=flow,
            k=k,
            chat_only=chat_only,
            tokenizer=tokenizer,
        )

    @property
    def facts(self) -> ServerFacts:
        """What the server was found to do; asked for once.

        TeacherFailure where it cannot score documents, or where its tokens are not those of the tokenizer.
        """
        with self._lock:
            if self._facts is None:
                facts = probe(self.client, self.flow, self.model, vocab_size=self._vocab_size, rows=self._rows)
                self._compare()
                self._facts = facts
            return self._facts

    def _compare(self) -> None:
        if self._tokenizer is None:
            return
        with closing(self.client.above()) as root:
            ask_once = partial(attempt, self.flow)
            found = compare_served(root, self.model, self._tokenizer, rows=self._rows, call=ask_once)
        if found is None:
            self.flow.tell(
                f"{public_url(self.client.url)} does not say how it reads text: that its ids are those of the "
                "tokenizer in teacher.model is taken on trust (latentforge teacher check compares a sample)"
            )

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Declared: *score*, *sample* and *chat*, or *chat* alone; :attr:`facts` proves the first."""
        return frozenset({"chat"}) if self.chat_only else frozenset({"score", "sample", "chat"})

    @property
    def identity(self) -> TeacherIdentity:
        """The served name, the revision that the spec gives it, and the tokenizer."""
        return self._identity

    @property
    def vocab_size(self) -> int:
        """Number of real tokens."""
        return self._vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        """Where it is asked; that a key crosses the network readable; entries of padding ids that were left out."""
        found = [f"teacher {self.model!r} is asked at {public_url(self.client.url)}; rows have T = 1"]
        if self.client.clear_text:
            found.append(
                f"the key goes to {public_url(self.client.url)} unencrypted: use https outside a network you trust"
            )
        if self._padding:
            found.append(
                f"{self._padding} entries of padding ids (from {self._vocab_size} on) count as outside the top-k"
            )
        return tuple(found)

    @property
    def limits(self) -> Limits:
        """T = 1, and what the server was found to take."""
        if self.chat_only:
            raise RefusedError(
                f"teacher {self.model!r} only answers chats: it cannot score given documents",
                next='set data.documents = "chat", or use a teacher that scores (vllm-remote, hf)',
            )
        facts = self.facts
        return Limits(facts.max_k, facts.max_tokens, (1.0,))

    def metrics(self) -> dict[str, Any]:
        """What asking has come to (see :meth:`FlowControl.metrics`)."""
        return self.flow.metrics()

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """Targets of each sequence as it is answered; after a rate limit rows end in absent entries."""
        if not sequences:
            return
        longest = max(len(tokens) for tokens in sequences)
        for tokens in sequences:
            check_tokens(torch.from_numpy(np.asarray(tokens)).unsqueeze(0), self._vocab_size)
        self.limits.check(k=k, tokens=longest, temperatures=temperatures)
        self.flow.k = k
        questions = [self._question(tokens, k) for tokens in sequences]
        asks: list[Callable[[int], SequenceTargets]] = [partial(self._ask, question, k) for question in questions]
        yield from self.flow.each(asks, tokens=[question.charged for question in questions])

    def continuations(self, sequences: Sequence[Tokens], asked: Continuing) -> Iterator[tuple[int, dict[float, Ids]]]:
        """The chunks drawn after each chunk of each sequence (see :class:`Continuer`): a request a context, several at
        a time. The server draws by seeds of ours, with a noise of its own."""
        with self._lock:
            if self._continues is None:
                served = attempt(self.flow, partial(find_model, self.client, self.model))
                sizes = {"vocab_size": self._vocab_size, "rows": self._rows}
                form = find_form(self.client, self.flow, self.model, **sizes)
                self._compare()
                self._continues = partial(continue_texts, form=form, max_tokens=served.max_tokens, **sizes)
        yield from self._continues(self.client, self.flow, self.model, sequences, asked)

    def targets(self, tokens: Tensor, *, temperature: float, k: int | None = None) -> TopKTargets:
        """Top-k rows of ``tokens`` int64 ``[B, L]`` with their rest mass, on the device of ``tokens``; T = 1 only."""
        wanted = min(self._k, self._vocab_size) if k is None else k
        return scored_batch(self, tokens, temperature=temperature, k=wanted)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, k: int, temperature: float, seed: int | None
    ) -> ChatAnswer:
        """One answer of the chat API with its top-``k`` rows (``k`` is lowered while the server limits the rate)."""
        self.flow.k = k
        # Characters are at least as many as the tokens that they make.
        charged = max_tokens + sum(len(message.get("content", "").encode()) for message in messages)

        def once(entries: int) -> ChatAnswer:
            body = chat_body(self.model, messages, max_tokens=max_tokens, k=entries, temperature=temperature, seed=seed)
            value = self.client.post("/chat/completions", body)
            with self.client.hiding():
                return parse_chat(value, k=entries, url=self.client.url)

        return self.flow.call(once, tokens=charged)

    def close(self) -> None:
        """Close the connections; what another thread is asking or waiting to ask is given up."""
        self.flow.give_up()
        self.client.close()

    def _question(self, tokens: Tokens, k: int) -> Question:
        ids = tuple(int(token) for token in tokens)
        limit = self.facts.max_tokens
        return Question(ids, k, self._vocab_size, self._rows, last_generated=limit is not None and len(ids) >= limit)

    def _ask(self, question: Question, k: int, entries: int) -> SequenceTargets:
        asked = question if entries >= k else Question(**{**vars(question), "k": entries})
        answer = ask(self.client, self.model, asked, self.facts.form)
        with self._lock:
            self._padding += answer.padding
        return padded(answer.targets, k)


def served_identity(model: str, *, revision: str | None, tokenizer_sha256: str) -> TeacherIdentity:
    """Who answers under a served name: its files are not seen, so the revision that the spec states stands for them."""
    return TeacherIdentity(f"served:{model}", revision or "unstated", "served", tokenizer_sha256)
