"""``latentforge teacher check``: what a teacher says that it is, and what asking it shows.

Every request is made once: what a retry would hide is what a check is for. A failure is told by its kind, with the next
command; what cannot be asked after it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import LatentForgeError
from latentforge.teachers.failures import TeacherFailure, public_url
from latentforge.teachers.findings import Ability, Finding, Report
from latentforge.teachers.http.chat import chat_body, parse_chat
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.continuing import find_form
from latentforge.teachers.http.flow import FlowControl
from latentforge.teachers.http.probe import ServedModel, ServerFacts, ask, probe, served_models
from latentforge.teachers.http.rows import Question
from latentforge.teachers.http.vocabulary import compare_served
from latentforge.teachers.protocol import Scorer

T = TypeVar("T")
CHAT_K = 20
"""The most rows that hosted chat APIs give."""
_DOCUMENT = 64
_ROUND_TRIP = 48


class OneTry(FlowControl):
    """A gate that asks once and never waits."""

    def call(self, ask: Callable[[int], T], **more: Any) -> T:
        """``ask(k)``, once."""
        return super().call(ask, **{**more, "attempts": 1})


class Check:
    """The steps against one server; :meth:`run` makes them in their order and never raises a TeacherFailure.

    ``connect`` makes a client like ``client`` for another URL; ``wanted`` is the model's name there (None: the only
    one), ``rows`` the ids that it knows, ``requests`` how many documents are timed, ``concurrency`` at once.
    """

    def __init__(
        self,
        client: HttpClient,
        *,
        connect: Callable[[str], HttpClient],
        backend: str,
        wanted: str | None,
        k: int,
        tokenizer: Tokenizer | None,
        rows: int | None = None,
        requests: int = 16,
        concurrency: int = 8,
        chat_only: bool = False,
    ) -> None:
        self.client, self.connect, self.wanted, self.k = client, connect, wanted, k
        self.tokenizer, self.rows = tokenizer, rows
        self.requests, self.concurrency, self.chat_only = requests, concurrency, chat_only
        self.report = Report(f"{wanted or 'the only model'} at {public_url(client.url)}", backend)
        self.flow = OneTry(concurrency=concurrency)
        self.listed = False

    def run(self) -> Report:
        """Ask everything that can be asked."""
        served = self._models()
        if served is None:
            return self.report
        self.report.teacher = f"{served.name} at {public_url(self.client.url)}"
        if self.client.clear_text:
            self.report.add("key", "warn", "the key crosses the network readable", next="use https")
        facts = None if self.chat_only else self._scores(served)
        self._tokenizer(served, scores=facts is not None)
        if facts is not None:
            self._speed(facts)
        self._abilities(served, facts)
        return self.report

    # --- steps ---

    def _models(self) -> ServedModel | None:
        try:
            listed = served_models(self.client)
        except TeacherFailure as failure:
            hint = self._elsewhere(failure) or _KNOWN.get(failure.kind)
            self.report.findings.append(Finding.of("models", failure, next=hint))
            return None
        names = ", ".join(one.name for one in listed[:8]) + ("…" if len(listed) > 8 else "")
        if not listed and self.wanted is not None:
            # As transformers serve does with a model that it was started for.
            self.report.add("models", "warn", f"none is listed; {self.wanted!r} is asked for all the same")
            return ServedModel(self.wanted, None, None)
        self.report.add("models", "pass", f"{len(listed)} listed: {names or 'none'}")
        self.listed = True
        if self.wanted is None and len(listed) != 1:
            what = f"lists {len(listed)} models, and none was named"
            failure = TeacherFailure("model-not-found", what, url=self.client.url, next=_named(listed))
            self.report.findings.append(Finding.of("model", failure))
            return None
        found = next((one for one in listed if self.wanted in (None, one.name)), None)
        if found is None:
            what = f"no model {self.wanted!r} is listed; it has {names or 'none'}"
            failure = TeacherFailure("model-not-found", what, url=self.client.url, next=_named(listed))
            self.report.findings.append(Finding.of("model", failure))
            return None
        limit = f"; at most {found.max_tokens} tokens a document" if found.max_tokens else ""
        self.report.add("model", "pass", f"{found.name!r} is there{limit}")
        return found

    def _elsewhere(self, failure: TeacherFailure) -> str | None:
        """Where the list of models does lie, if it is one level deeper; else what a web page means."""
        if failure.kind not in ("malformed", "model-not-found"):
            return None
        if not self.client.url.endswith("/v1"):
            deeper = self.connect(self.client.url + "/v1")
            try:
                served_models(deeper)
                return f"the API is one level deeper:  --url {public_url(deeper.url)}"
            except LatentForgeError:
                pass
            finally:
                deeper.close()
        page = "a web page answers there, no API; " if "<html" in str(failure).lower() else ""
        return f"{page}name the URL under which /models lies, which usually ends in /v1"

    def _scores(self, served: ServedModel) -> ServerFacts | None:
        if self.tokenizer is None:
            self.report.add("score", "skip", "no folder of the tokenizer is named, so no ids are known")
            return None
        vocab = self.tokenizer.vocab_size
        try:
            if not self.listed:
                self._unlisted(served.name, vocab)
            facts = probe(self.client, self.flow, served.name, vocab_size=vocab, rows=max(vocab, self.rows or 0))
            if facts.damaged is not None:
                self.report.findings.append(Finding.of("form", facts.damaged))
            if self.k > facts.max_k:
                raise TeacherFailure(
                    "too-few",
                    f"gives at most {facts.max_k} entries a position, {self.k} are wanted",
                    url=self.client.url,
                    next=f"--k {facts.max_k}, or start the server with --max-logprobs {self.k}",
                )
            question = self._question(facts, 0)
            answer = ask(self.client, served.name, question, facts.form)
        except TeacherFailure as failure:
            told = self._by_text(failure, served.name)
            hint = None if "--k" in (told.next or "") else _KNOWN.get(told.kind)
            self.report.findings.append(Finding.of("score", told, next=hint))
            return None
        finite = int(np.isfinite(answer.targets.logprobs).sum())
        positions = len(answer.targets.ids)
        self.report.figures |= {"form": facts.form, "max_k": facts.max_k, "max_tokens": facts.max_tokens}
        self.report.figures |= {"finite": finite, "positions": positions, "proved_nats": facts.proved_nats}
        short = f" ({answer.padding} are of padding ids)" if answer.padding else ""
        self.report.add(
            "score",
            "pass" if finite == self.k * positions - answer.padding else "fail",
            f"{self.k} finite log-probabilities at each of {positions} positions by id{short}; takes k up to "
            f"{facts.max_k} ({facts.form})",
        )
        self.report.add(
            "position",
            "pass",
            f"the last row, asked again as a generated token, differs by {facts.proved_nats:.1e} nats",
        )
        return facts

    def _unlisted(self, model: str, vocab: int) -> None:
        """Ask a model that is not listed for rows; a run would refuse it even where it gives them."""
        ask(self.client, model, Question((1, 2, 3), 1, vocab, max(vocab, self.rows or 0)), "prompt_logprobs")
        self.client.failure("model-not-found", f"gives rows for {model!r}, but lists no model: a run refuses it")

    def _by_text(self, failure: TeacherFailure, model: str) -> TeacherFailure:
        """The failure to tell: a server that takes no ids may answer text with HTTP 200, and without any row."""
        if failure.kind != "refused-request":
            return failure
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": 1, "logprobs": self.k, "echo": True}
        try:
            value = self.client.post("/completions", body)
        except TeacherFailure:
            return failure
        if _text(value) is None or value["choices"][0].get("logprobs"):
            return failure
        what = "takes no token ids, and answers text without log-probabilities"
        return TeacherFailure("no-logprobs", what, url=self.client.url, status=200)

    def _question(self, facts: ServerFacts, number: int) -> Question:
        """A document of the tokenizer's ids, another one for each number."""
        assert self.tokenizer is not None
        vocab = self.tokenizer.vocab_size
        length = min(_DOCUMENT, (facts.max_tokens or _DOCUMENT + 1) - 1)
        drawn = np.random.Generator(np.random.PCG64(1000 + number)).integers(0, vocab, size=length)
        return Question(tuple(int(one) for one in drawn), self.k, vocab, max(vocab, self.rows or 0))

    def _tokenizer(self, served: ServedModel, *, scores: bool) -> None:
        if self.tokenizer is None:
            self.report.add("tokenizer", "skip", "no local folder to compare with", next="--tokenizer FOLDER")
            return
        sha256 = f"tokenizer.json {self.tokenizer.sha256[:12]}…"
        try:
            with closing(self.client.above()) as root:
                rows = max(self.tokenizer.vocab_size, self.rows or 0)
                found = compare_served(root, served.name, self.tokenizer, rows=rows, call=lambda once: once())
            if found is None and scores:
                self._round_trips(served.name, sha256)
                return
        except TeacherFailure as failure:
            self.report.findings.append(Finding.of("tokenizer", failure))
            return
        if found is None:
            self.report.add("tokenizer", "skip", "the server offers neither /tokenize nor completions: not compared")
            return
        self.report.add(
            "tokenizer",
            "pass",
            f"{found.ids} of {found.vocab_size} ids in {found.tokens} tokens of text: read as here "
            f"({sha256}; /tokenize)",
        )

    def _round_trips(self, model: str, sha256: str) -> None:
        """Ids sent as a prompt, echoed as text, compared with what they spell here."""
        assert self.tokenizer is not None
        vocab = self.tokenizer.vocab_size
        step = max(1, vocab // _ROUND_TRIP)
        spelt = {number: self.tokenizer.backend.decode([number]) for number in range(0, vocab, step)}
        # An id that is no whole character spells nothing of its own.
        tried = {number: text for number, text in spelt.items() if text and "\ufffd" not in text}
        for number, text in list(tried.items())[:_ROUND_TRIP]:
            body = {"model": model, "prompt": [number], "max_tokens": 1, "temperature": 0, "echo": True}
            value = self.client.post("/completions", body)
            echoed = _text(value)
            if echoed is None or not echoed.startswith(text):
                raise TeacherFailure(
                    "wrong-ids",
                    f"id {number} spells {text!r} here and {(echoed or '')[:24]!r} there ({sha256})",
                    url=self.client.url,
                    next="name the folder of the served model's own tokenizer",
                )
        self.report.add(
            "tokenizer", "pass", f"{min(len(tried), _ROUND_TRIP)} ids spell what they spell here ({sha256})"
        )

    def _speed(self, facts: ServerFacts) -> None:
        flow = OneTry(concurrency=self.concurrency, k=self.k)
        questions = [self._question(facts, number + 1) for number in range(self.requests)]
        asks = [lambda k, one=one: ask(self.client, facts.model, replace(one, k=k), facts.form) for one in questions]
        try:
            for _answer in flow.each(asks, tokens=[one.charged for one in questions]):
                pass
        except TeacherFailure as failure:
            self.report.findings.append(Finding.of("latency", failure, next=_KNOWN.get(failure.kind)))
            return
        found = flow.metrics()
        kept = ("requests", "p50_s", "p95_s", "tokens_per_s", "rate_limit_events")
        self.report.figures |= {name: found[name] for name in kept}
        self.report.add(
            "latency",
            "pass",
            f"{found['requests']} documents of {len(questions[0].tokens)} tokens, {self.concurrency} at once: "
            f"p50 {found['p50_s'] * 1e3:.0f} ms, p95 {found['p95_s'] * 1e3:.0f} ms, "
            f"{found['tokens_per_s']:.0f} tokens/s",
        )

    # --- capabilities ---

    def _abilities(self, served: ServedModel, facts: ServerFacts | None) -> None:
        scores = None if self.tokenizer is None or self.chat_only else facts is not None
        sampled, why = self._asked(self._samples, served.name)
        chats, rows = self._asked(self._chats, served.name)
        raw = not self.chat_only
        self.report.abilities += [
            Ability("score", raw, scores, "top-k at T = 1" if scores else ""),
            Ability("sample", raw, sampled, why),
            Ability("logits", False, False, "dense logits cross no wire: backend hf has them"),
            Ability("chat", True, chats, rows),
        ]
        if self.chat_only and not chats:
            self.report.add("chat", "fail", f"a chat API that gives no rows: {rows}", next=_KNOWN["no-logprobs"])
        elif self.chat_only:
            self.report.add("chat", "pass", rows)

    def _asked(self, step: Callable[[str], str], model: str) -> tuple[bool, str]:
        try:
            return True, step(model)
        except TeacherFailure as failure:
            return False, f"{failure.kind}{'' if failure.status is None else f', HTTP {failure.status}'}"

    def _samples(self, model: str) -> str:
        if self.tokenizer is not None:
            vocab = self.tokenizer.vocab_size
            form = find_form(self.client, self.flow, model, vocab_size=vocab, rows=max(vocab, self.rows or 0))
            return f"several chunks a prompt, as ids ({form})"
        body = {"model": model, "prompt": "Once", "max_tokens": 4, "temperature": 1.0, "seed": 7}
        if _text(self.client.post("/completions", body)) is None:
            self.client.failure("malformed", "a continuation without text", status=200)
        return "as text; whether ids come back is asked where the tokenizer's folder is named"

    def _chats(self, model: str) -> str:
        messages = [{"role": "user", "content": "Say yes."}]
        k = min(self.k, CHAT_K)
        body = chat_body(model, messages, max_tokens=4, k=k, temperature=1.0, seed=7)
        answer = parse_chat(self.client.post("/chat/completions", body), k=k, url=self.client.url)
        return f"top-{k} rows at each of {len(answer.positions)} generated tokens"


_KNOWN = {
    "connection": "start the server (latentforge teacher serve FOLDER), or name another:  --url URL",
    "rate-limited": "check again later, or ask for fewer at once:  --set teacher.concurrency=2",
    "server-error": "look at the server's log, then check again",
    "timeout": "look whether the server is busy, or wait longer:  --set teacher.timeout=300.0",
    "cut": "look at the server's log, then check again",
    "too-few": "ask for fewer (--k), or start the server with a larger --max-logprobs",
    "no-logprobs": "this server gives no log-probabilities of a prompt: serve the model with vLLM "
    "(latentforge teacher serve), or use backend hf",
    "collapsed": "this server keys rows by text: one that knows return_tokens_as_token_ids (vLLM) is needed",
    "shifted": "this server's echo is off by one position, so nothing may be trained on it: use vLLM, or backend hf",
    "wrong-ids": "name the folder of the served model's own tokenizer, or another server",
}


def check_local(teacher: Scorer, report: Report, *, k: int, requests: int = 4) -> Report:
    """The same questions to a backend in this process: finite rows, capabilities, latency."""
    generator = np.random.Generator(np.random.PCG64(7))
    length = min(_DOCUMENT, teacher.limits.max_tokens or _DOCUMENT)
    documents = [generator.integers(0, teacher.vocab_size, size=length) for _ in range(requests)]
    flow = OneTry(concurrency=1, k=k)
    scored = False
    try:
        asks = [
            lambda entries, one=one: list(teacher.score([one], k=entries, temperatures=(1.0,))) for one in documents
        ]
        rows = [rows for _number, [(_at, rows)] in flow.each(asks, tokens=[length] * requests)]
        finite = all(np.isfinite(one.logprobs).all() for one in rows)
        scored = finite
        report.add("score", "pass" if finite else "fail", f"{k} log-probabilities at each of {length - 1} positions")
        found = flow.metrics()
        report.figures |= {name: found[name] for name in ("requests", "p50_s", "p95_s", "tokens_per_s")}
        report.add("latency", "pass", f"p50 {found['p50_s'] * 1e3:.0f} ms, {found['tokens_per_s']:.0f} tokens/s")
    except LatentForgeError as error:
        report.findings.append(Finding.of("score", error))
    declared = teacher.capabilities
    report.abilities += [
        Ability("score", "score" in declared, scored),
        Ability("sample", "sample" in declared, None if "sample" in declared else False),
        Ability("logits", "logits" in declared, None if "logits" in declared else False),
        Ability("chat", False, False),
    ]
    return report


def _named(listed: Sequence[ServedModel]) -> str:
    return f"--model {listed[0].name}" if listed else "look at the server's log: it serves nothing"


def _text(value: Any) -> str | None:
    choices = value.get("choices") if isinstance(value, dict) else None
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    text = first.get("text")
    return text if isinstance(text, str) else None
