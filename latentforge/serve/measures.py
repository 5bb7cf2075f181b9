"""The figures of a server, as Prometheus reads them."""

from __future__ import annotations

import threading
import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    1.5,
    2,
    3,
    5,
    10,
    20,
    30,
    60,
)
_TEXTS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 256)
_WINDOW = 10.0  # seconds of which the rate of tokens is told


class Measures:
    """Counters, gauges and histograms of one server, in a registry of their own. Any thread may add to them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, to = "latentforge_", {"registry": self.registry}
        self.requests = Counter(name + "requests", "Requests answered.", ["path", "status"], **to)
        self.request_seconds = Histogram(
            name + "request_seconds", "From a request's head to its answer's end.", ["path"], buckets=_SECONDS, **to
        )
        self.prompt_tokens = Counter(name + "prompt_tokens", "Tokens of prompts that were accepted.", **to)
        self.tokens = Counter(name + "tokens", "Tokens that were produced.", **to)
        self.chunks = Counter(name + "chunks", "Chunks that were written, a step of a text each.", **to)
        self.draws = Counter(name + "draws", "Draws that were computed for chunks.", **to)
        self.texts = Counter(name + "texts", "Texts that ended, by how.", ["end"], **to)
        self.queue = Gauge(name + "queue_length", "Texts that wait for a place in the batch.", **to)
        self.batch = Gauge(name + "batch_size", "Texts in the batch.", **to)
        self.step_texts = Histogram(name + "step_texts", "Texts of a step.", buckets=_TEXTS, **to)
        self.first_chunk = Histogram(
            name + "first_chunk_seconds", "From a text's request to its first chunk.", buckets=_SECONDS, **to
        )
        self.chunk = Histogram(
            name + "chunk_seconds", "From a chunk of a text to its next one.", buckets=_SECONDS, **to
        )
        self.ready = Gauge(name + "ready", "1 while texts can be asked for.", **to)
        rate = Gauge(name + "tokens_per_second", f"Tokens produced a second, of the last {_WINDOW:g} s.", **to)
        rate.set_function(self.rate)
        self._produced: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def produced(self, tokens: int) -> None:
        """Count the tokens of a step."""
        self.tokens.inc(tokens)
        with self._lock:
            self._produced.append((time.monotonic(), tokens))
            self._forget()

    def rate(self) -> float:
        """Tokens a second, of the last 10 s."""
        with self._lock:
            self._forget()
            return sum(tokens for _, tokens in self._produced) / _WINDOW

    def _forget(self) -> None:
        since = time.monotonic() - _WINDOW
        while self._produced and self._produced[0][0] < since:
            self._produced.popleft()

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)
