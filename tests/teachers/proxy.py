"""A proxy in front of a real OpenAI-compatible server that does to its answers what servers and networks do.

    with FaultProxy("http://127.0.0.1:8801/v1") as proxy:
        proxy.script([RateLimited(retry_after=1), Cut()])     # the first two scoring requests; those after them pass
        …  a client of proxy.url  …
        assert proxy.outcomes == ["429", "cut", "passed"]

Answers are the upstream server's own, damaged on their way: no fault invents a row. Without a script everything passes.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length", "accept-encoding", "date", "server"}


# --- what can be done to a request ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Does nothing: the request passes."""

    name = "passed"


@dataclass(frozen=True)
class Status(Fault):
    """An answer of the proxy's own, with an error body as vLLM writes it; the server is not asked."""

    status: int
    message: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        """The status code."""
        return str(self.status)


def RateLimited(retry_after: float | str | None = 1) -> Status:
    """429; ``retry_after`` in seconds, or an HTTP date as it is written, or None for none."""
    headers = () if retry_after is None else (("Retry-After", str(retry_after)),)
    return Status(429, "Rate limit reached for requests", headers)


def ServerError(status: int = 503) -> Status:
    """5xx."""
    return Status(status, "the server is overloaded")


def Unauthorized() -> Status:
    """401."""
    return Status(401, "Incorrect API key provided")


@dataclass(frozen=True)
class Slow(Fault):
    """The answer comes ``seconds`` later; closing the proxy ends the wait."""

    seconds: float
    name = "slow"


@dataclass(frozen=True)
class Hang(Fault):
    """No answer, until the proxy is closed or the client gives up."""

    name = "hung"


@dataclass(frozen=True)
class Drop(Fault):
    """The connection is closed before a byte of an answer; the server is not asked."""

    reset: bool = False
    name = "dropped"


@dataclass(frozen=True)
class Cut(Fault):
    """The connection is closed in the middle of the body, whose whole length was announced."""

    share: float = 0.5
    reset: bool = False
    name = "cut"


@dataclass(frozen=True)
class Malformed(Fault):
    """200 with a body that is no JSON: half of the answer, or ``text``."""

    text: str | None = None
    name = "malformed"


@dataclass(frozen=True)
class WrongIds(Fault):
    """Every id of every row is another token's: one higher, as after a token was inserted into the vocabulary."""

    by: int = 1
    name = "wrong-ids"


@dataclass(frozen=True)
class ShiftedEcho(Fault):
    """The rows of the prompt stand one position late, as llama-cpp's echo gives them."""

    by: int = 1
    name = "shifted"


@dataclass(frozen=True)
class FewerThanK(Fault):
    """Each row has at most ``k`` entries, the most likely ones, whatever was asked."""

    k: int
    name = "too-few"


@dataclass(frozen=True)
class CollapsedKeys(Fault):
    """Rows are keyed by the text of their tokens: those that decode to the same text become one."""

    name = "collapsed"


@dataclass(frozen=True)
class NoLogprobs(Fault):
    """200 without any log-probabilities."""

    name = "no-logprobs"


@dataclass(frozen=True)
class NotFinite(Fault):
    """One log-probability of the first row is ``value``, as JSON has no word for it but Python writes one."""

    value: float = math.nan
    name = "not-finite"


# --- the proxy --------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """One request as it came: ``body`` parsed (None without one), ``outcome`` the fault's name, ``status`` answered.

    ``status`` is 0 where no answer was given. ``key`` is what stood behind ``Bearer``.
    """

    method: str
    path: str
    body: Any
    key: str | None
    outcome: str = "passed"
    status: int = 0

    @property
    def documents(self) -> list[tuple[int, ...]]:
        """The prompts that were asked for, as token ids; none where the prompt was text."""
        prompt = self.body.get("prompt") if isinstance(self.body, dict) else None
        if not isinstance(prompt, list) or not prompt:
            return []
        lists = prompt if isinstance(prompt[0], list) else [prompt]
        return [tuple(tokens) for tokens in lists]


@dataclass
class _State:
    script: deque[Fault] = field(default_factory=deque)
    methods: tuple[str, ...] = ("POST",)
    in_flight: int = 0
    most_in_flight: int = 0


class FaultProxy:
    """A server on 127.0.0.1 that passes requests to ``upstream_url`` (``http://…/v1``), with faults on the way.

    ``key``: answers 401 to whoever does not send it, as a hosted API does, and does not pass it on. ``delay`` may be
    set at any time: seconds that each answer to a POST takes longer.
    """

    def __init__(self, upstream_url: str, *, key: str | None = None, delay: float = 0.0) -> None:
        parts = urlsplit(upstream_url)
        assert parts.hostname is not None
        self.upstream = (parts.hostname, parts.port or 80)
        self.key = key
        self.delay = delay
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._prefix = parts.path.rstrip("/")
        self._state = _State()
        self._connections: set[socket.socket] = set()
        proxy = self

        class Handler(_Handler):
            faults = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """What a client is given in the server's place."""
        return f"http://127.0.0.1:{self._server.server_address[1]}{self._prefix}"

    def script(self, faults: Iterable[Fault], *, methods: tuple[str, ...] = ("POST",)) -> None:
        """One fault for each of the next requests with these methods, in the order in which they come; then pass."""
        with self.lock:
            self._state.script = deque(faults)
            self._state.methods = methods

    @property
    def unused(self) -> int:
        """How many faults of the script no request has met yet."""
        return len(self._state.script)

    @property
    def outcomes(self) -> list[str]:
        """What became of each POST, in order of arrival."""
        return [request.outcome for request in self.requests if request.method == "POST"]

    @property
    def documents(self) -> list[tuple[int, ...]]:
        """Every prompt that was answered undamaged, in order: one that stands here twice was paid for twice."""
        return [one for request in self.requests if request.outcome in ("passed", "slow") for one in request.documents]

    @property
    def most_in_flight(self) -> int:
        """The largest number of POSTs that were open at the same time."""
        return self._state.most_in_flight

    def forget(self) -> None:
        """Clear the script and everything counted: for tests that share a proxy."""
        with self.lock:
            self.requests.clear()
            self._state = _State(in_flight=self._state.in_flight)
        self.delay = 0.0

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            connections = list(self._connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def next_fault(self, method: str) -> Fault:
        """The fault of the request that has just come."""
        with self.lock:
            state = self._state
            return state.script.popleft() if state.script and method in state.methods else Fault()

    @contextmanager
    def counted(self, request: Request) -> Iterator[None]:
        """Keep the request and count it among those that are open."""
        with self.lock:
            self.requests.append(request)
            state = self._state
            if request.method == "POST":
                state.in_flight += 1
                state.most_in_flight = max(state.most_in_flight, state.in_flight)
        try:
            yield
        finally:
            with self.lock:
                if request.method == "POST":
                    state.in_flight -= 1

    def connected(self, connection: socket.socket, *, gone: bool = False) -> None:
        """Remember what has to be closed with the proxy."""
        with self.lock:
            (self._connections.discard if gone else self._connections.add)(connection)

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """The upstream server's answer: status, headers, whole body."""
        connection = HTTPConnection(*self.upstream, timeout=120)
        try:
            connection.request(method, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in _HOP}, content
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: FaultProxy

    def setup(self) -> None:
        super().setup()
        self.faults.connected(self.connection)

    def finish(self) -> None:
        self.faults.connected(self.connection, gone=True)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the requests are kept, not printed."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client gave up, as it may
            self.close_connection = True

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        body = None
        with suppress(ValueError):
            body = json.loads(raw) if raw else None
        scheme, _, key = (self.headers.get("Authorization") or "").partition(" ")
        request = Request(method, self.path, body, key if scheme == "Bearer" else None)
        fault = self.faults.next_fault(method)
        with self.faults.counted(request):
            if self.faults.key is not None and request.key != self.faults.key:
                fault = Unauthorized()
            request.outcome = fault.name
            self._answer(request, fault, raw)

    def _answer(self, request: Request, fault: Fault, raw: bytes) -> None:
        if isinstance(fault, Status):
            error = {"message": fault.message, "type": "error", "param": None, "code": fault.status}
            self._write(request, fault.status, dict(fault.headers), json.dumps({"error": error}).encode())
            return
        if isinstance(fault, Hang):
            self.faults.closing.wait()
        if isinstance(fault, Drop | Hang):
            self._end(reset=isinstance(fault, Drop) and fault.reset)
            return
        delay = self.faults.delay if request.method == "POST" else 0.0
        if isinstance(fault, Slow):
            delay += fault.seconds
        if delay and self.faults.closing.wait(delay):
            self._end()
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        if self.faults.key is not None:
            headers.pop("Authorization", None)
        if isinstance(fault, CollapsedKeys) and isinstance(request.body, dict):
            # What a server does that does not know the wish.
            raw = json.dumps({**request.body, "return_tokens_as_token_ids": False}).encode()
        try:
            status, answered, content = self.faults.ask(request.method, self.path, raw, headers)
        except (OSError, HTTPException) as error:
            request.outcome = "upstream-gone"
            message = {"error": {"message": f"no answer from upstream: {type(error).__name__}", "code": 502}}
            self._write(request, 502, {}, json.dumps(message).encode())
            return
        damage = _DAMAGE.get(type(fault))
        if damage is not None and status == 200:
            value = json.loads(content)
            damage(fault, value)
            content = json.dumps(value).encode()
        if isinstance(fault, Malformed):
            content = fault.text.encode() if fault.text is not None else content[: len(content) // 2]
        cut = max(1, int(len(content) * fault.share)) if isinstance(fault, Cut) else None
        self._write(request, status, answered, content, cut=cut)
        if isinstance(fault, Cut):
            self._end(reset=fault.reset)

    def _write(
        self, request: Request, status: int, headers: dict[str, str], content: bytes, *, cut: int | None = None
    ) -> None:
        request.status = status
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:cut])
        self.wfile.flush()

    def _end(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


# --- damage to an answer that is whole --------------------------------------------------------------------------------
# ``prompt_logprobs`` is [None, {"17": {"logprob": …, "rank": …, "decoded_token": …}, …}, …], one entry a prompt token.
# ``logprobs`` is {"tokens": […], "token_logprobs": […], "top_logprobs": [None | {key: logprob}, …]} for completions,
# and {"content": [{"token": …, "logprob": …, "bytes": […], "top_logprobs": [{…}, …]}, …]} for chat.

_Row = dict[str, Any]


def _rows(choice: dict[str, Any]) -> Iterator[tuple[list[Any], int]]:
    """Every keyed row of a completion, as (list, index): what is assigned there replaces the row."""
    for rows in (choice.get("prompt_logprobs"), (choice.get("logprobs") or {}).get("top_logprobs")):
        for at, row in enumerate(rows or []):
            if isinstance(row, dict):
                yield rows, at


def _logprob(value: Any) -> float:
    return float(value["logprob"] if isinstance(value, dict) else value)


def _shift_ids(fault: WrongIds, answer: Any) -> None:
    def moved(key: str) -> str:
        head, _, number = key.rpartition(":")
        return f"{head}:{int(number) + fault.by}" if head else str(int(number) + fault.by)

    for choice in answer["choices"]:
        for rows, at in _rows(choice):
            if all(key.rpartition(":")[2].isdigit() for key in rows[at]):
                rows[at] = {moved(key): value for key, value in rows[at].items()}
        logprobs = choice.get("logprobs") or {}
        if all(str(token).startswith("token_id:") for token in logprobs.get("tokens") or ["-"]):
            logprobs["tokens"] = [moved(token) for token in logprobs["tokens"]]


def _shift_rows(fault: ShiftedEcho, answer: Any) -> None:
    for choice in answer["choices"]:
        logprobs = choice.get("logprobs") or {}
        for holder, name in ((choice, "prompt_logprobs"), (logprobs, "token_logprobs"), (logprobs, "top_logprobs")):
            rows = holder.get(name)
            if rows and rows[0] is None:  # of a prompt: its first token has no row
                holder[name] = [None, *rows[-fault.by :], *rows[1 : -fault.by]]


def _keep_k(fault: FewerThanK, answer: Any) -> None:
    for choice in answer["choices"]:
        for rows, at in _rows(choice):
            best = sorted(rows[at].items(), key=lambda item: -_logprob(item[1]))
            rows[at] = dict(best[: fault.k])
        for position in (choice.get("logprobs") or {}).get("content") or []:
            del position["top_logprobs"][fault.k :]


def _collapse(fault: CollapsedKeys, answer: Any) -> None:
    for choice in answer["choices"]:
        for at, row in enumerate(choice.get("prompt_logprobs") or []):
            if row:
                choice["prompt_logprobs"][at] = {value["decoded_token"]: value for value in row.values()}


def _strip(fault: NoLogprobs, answer: Any) -> None:
    answer.pop("prompt_logprobs", None)
    for choice in answer["choices"]:
        choice.pop("prompt_logprobs", None)
        choice["logprobs"] = None


def _spoil(fault: NotFinite, answer: Any) -> None:
    for choice in answer["choices"]:
        for rows, at in _rows(choice):
            key, value = next(iter(rows[at].items()))
            rows[at][key] = {**value, "logprob": fault.value} if isinstance(value, dict) else fault.value
            break
        for position in (choice.get("logprobs") or {}).get("content") or []:
            position["top_logprobs"][0]["logprob"] = fault.value
            break


_DAMAGE: dict[type[Fault], Callable[[Any, Any], None]] = {
    WrongIds: _shift_ids,
    ShiftedEcho: _shift_rows,
    FewerThanK: _keep_k,
    CollapsedKeys: _collapse,
    NoLogprobs: _strip,
    NotFinite: _spoil,
}
