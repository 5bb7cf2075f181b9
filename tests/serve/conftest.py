"""Real servers of tiny students, on the loopback, and a model that does what a test wants of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from latentforge.students.latent.requests import Keys

from ..latent_folders import Folders

TYPE = {"Content-Type": "application/json"}
STRICT = [
    *("--api-key-env", "SERVE_KEY", "--cors", "https://pages.example", "--max-batch", "4", "--queue", "4"),
    *("--max-prompt", "40", "--max-tokens", "24", "--max-draws", "30", "--max-body", "4096"),
]
KEY = "a-key-of-the-tests"


@dataclass
class Running:
    """A server in a process of its own, ready."""

    process: subprocess.Popen[str]
    url: str
    model: str
    client: httpx2.Client
    said: list[dict[str, Any]] = field(default_factory=list)

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=content, headers={**TYPE, **headers})

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.client.get(path, headers=headers)

    def completion(self, **words: Any) -> Any:
        answer = self.post("/v1/completions", {"model": self.model, "prompt": "def main(", **words})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def figures(self, **headers: str) -> dict[str, float]:
        """Each sample of /metrics, by its name; those of several labels are summed."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics", **headers).text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def until(self, check: Callable[[dict[str, float]], bool], **headers: str) -> dict[str, float]:
        """The figures once they are so; the test's own time limit ends a wait in vain."""
        while True:
            found = self.figures(**headers)
            if check(found):
                return found

    def wait(self) -> int:
        """The exit code; what it said since is in ``said``."""
        assert self.process.stdout is not None
        self.said += [json.loads(line) for line in self.process.stdout]
        return self.process.wait()


def _as_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Whoever runs the tests may ignore Ctrl-C: a shell does so for what it starts in the background.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(folder: Path, *options: str, log: Path) -> Iterator[Running]:
    """A server of ``folder`` on a free port; killed at the end if it is still there."""
    command = [sys.executable, "-m", "latentforge", "serve", str(folder), "--port", "0", "--json", *options]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SERVE_KEY": KEY},
            preexec_fn=_as_under_nohup,
        )
    try:
        assert process.stdout is not None
        listening, ready = process.stdout.readline(), process.stdout.readline()
        assert ready, log.read_text()
        said = [json.loads(listening), json.loads(ready)]
        with httpx2.Client(base_url=said[1]["url"], timeout=120) as client:
            yield Running(process, said[1]["url"], said[1]["model"], client, said)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="session")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The latent student, with the limits that a server has by itself."""
    log = tmp_path_factory.mktemp("serve") / "errors.txt"
    with running(folders.latent, "--name", "tiny", log=log) as found:
        yield found
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session")
def strict(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The latent student with a key, one foreign origin and small limits."""
    log = tmp_path_factory.mktemp("strict") / "errors.txt"
    with running(folders.latent, "--name", "tiny", *STRICT, log=log) as found:
        yield found
    assert "Traceback" not in log.read_text()
    assert KEY not in log.read_text()


@dataclass
class Gated:
    """A model of chunks of two tokens that writes one when it is let: ``let`` is released for each step."""

    chunk: int = 2
    eos_id: int = 0
    vocab_size: int = 50
    tempered: bool = True
    completes: bool = True
    greedy: bool = True
    let: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    drawing: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    rows: list[int] = field(default_factory=list)  # texts of each step

    def begin(self, texts: Sequence[Tensor]) -> GatedSession:
        if any(13 in text for text in texts):
            raise RuntimeError("this prompt cannot be begun: /a/path")
        return GatedSession(self, len(texts))

    def score(self, texts: Sequence[Tensor]) -> list[Tensor]:
        return [-torch.arange(len(text)).float() for text in texts]


@dataclass
class GatedSession:
    model: Gated
    count: int

    def draw(self, rows: Tensor, keys: Keys, first: int, count: int, temperature: float) -> Tensor:
        self.model.drawing.release()
        self.model.let.acquire()
        self.model.rows.append(len(rows))
        if 66 in keys.seeds:
            raise RuntimeError("this text breaks the step: /a/path")
        return (1 + keys.seeds % 40).reshape(-1, 1, 1).expand(-1, count, 2)

    def complete(self, *_: Any) -> Tensor:
        raise NotImplementedError

    def logprobs(self, *_: Any) -> Tensor:
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        self.count = len(rows)

    def advance(self, chunks: Tensor) -> None:
        assert len(chunks) == self.count

    def join(self, other: GatedSession) -> None:
        self.count += other.count
