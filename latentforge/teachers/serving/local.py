"""The backend ``vllm-local``: a server of our own behind the client of the backend ``openai``."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from latentforge.data.tokenizer import Tokenizer
from latentforge.kernels.targets import TopKTargets
from latentforge.memory import KnownModel
from latentforge.memory.engine import EngineSetting, pinned_kv_bytes
from latentforge.spec.sections import TeacherSpec
from latentforge.targets.continued import Ids
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.continuing import Continuing
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.folder import check_model_folder
from latentforge.teachers.http.client import HttpClient
from latentforge.teachers.http.flow import Budget, FlowControl
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.protocol import Capability, Limits, TeacherIdentity, Tokens
from latentforge.teachers.serving.content import content_identity
from latentforge.teachers.serving.engine import EngineTeacher
from latentforge.teachers.serving.processes import default_log
from latentforge.teachers.serving.server import Stopped, VLLMServer, free_port
from latentforge.teachers.serving.settings import (
    ServingSettings,
    find_environment,
    fitted,
    require_pinned,
    vllm_version,
)

Say = Callable[[str], None]
T = TypeVar("T")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class ServedTeacher:
    """A server of our own, started by the first question; every question goes to it, :meth:`close` stops it.

    Where everything that is wanted is stored already, nobody asks and no server is started.
    """

    def __init__(
        self,
        server: VLLMServer | None,
        client: OpenAITeacher,
        *,
        start: Callable[[], VLLMServer] | None = None,
        expected: Limits | None = None,
        notes: tuple[str, ...] = (),
        say: Say = lambda line: None,
    ) -> None:
        assert server is not None or (start is not None and expected is not None)
        self.client = client
        self._server = server
        self._start = start
        self._expected = expected
        self._notes = notes
        self._say = say
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        settings: ServingSettings,
        *,
        log: Path,
        say: Say = lambda line: None,
        env: Mapping[str, str] = os.environ,
        flow: FlowControl | None = None,
        timeout: float = 60.0,
        memory_seconds: float = 240.0,
    ) -> ServedTeacher:
        """Make ready what :meth:`VLLMServer.start` needs; the first question starts it.

        RefusedError for a folder that is no model and an environment without vLLM.
        """
        settings, _, notes = fitted(settings)
        folder = check_model_folder(settings.folder)
        tokenizer = Tokenizer.open(settings.folder)
        notes = (*notes, f"vLLM {vllm_version(settings.environment)} of {settings.environment}")
        flow = flow or FlowControl()
        port = free_port()
        client = OpenAITeacher(
            HttpClient(f"http://127.0.0.1:{port}/v1", key=None, timeout=timeout, connections=flow.concurrency),
            settings.name,
            identity=content_identity(folder, tokenizer, settings.dtype),
            vocab_size=tokenizer.vocab_size,
            rows=folder.vocab_size,
            flow=flow,
        )

        def start() -> VLLMServer:
            return VLLMServer.start(settings, log=log, port=port, say=say, env=env, memory_seconds=memory_seconds)

        rows = folder.vocab_size
        most = rows if settings.max_logprobs in (None, -1) else min(int(settings.max_logprobs or 0), rows)
        expected = Limits(most, settings.max_model_len, (1.0,))
        return cls(None, client, start=start, expected=expected, notes=notes, say=say)

    @property
    def server(self) -> VLLMServer:
        """The server, started where it was not."""
        with self._lock:
            if self._server is None:
                assert self._start is not None
                self._server = self._start()
            return self._server

    def start(self) -> None:
        """Start the server now, for whom its first answer must not take so long."""
        _ = self.server

    @property
    def started(self) -> bool:
        """Whether anybody has asked."""
        return self._server is not None

    @property
    def stopped(self) -> Stopped | None:
        """What became of the server; None where there was none, and while it runs."""
        return None if self._server is None else self._server.stopped

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Those of the client."""
        return self.client.capabilities

    @property
    def identity(self) -> TeacherIdentity:
        """The folder's content, and that vLLM computes with it."""
        return self.client.identity

    @property
    def vocab_size(self) -> int:
        """Number of real tokens."""
        return self.client.vocab_size

    @property
    def limits(self) -> Limits:
        """As the server was found to answer; before it is started, what its settings will make it answer."""
        if self._server is None and self._expected is not None:
            return self._expected
        return self._while_it_runs(lambda: self.client.limits)

    @property
    def notes(self) -> tuple[str, ...]:
        """What gave way in the settings, and what the client says."""
        return (*(self._notes if self._server is None else self._server.notes), *self.client.notes)

    @property
    def flow(self) -> FlowControl:
        """The gate of its requests."""
        return self.client.flow

    def metrics(self) -> dict[str, Any]:
        """What asking has come to."""
        return self.client.metrics()

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """As the client's; a server that has ended meanwhile is told with its last lines."""
        if sequences:
            yield from self._each(lambda: self.client.score(sequences, k=k, temperatures=temperatures))

    def continuations(self, sequences: Sequence[Tokens], asked: Continuing) -> Iterator[tuple[int, dict[float, Ids]]]:
        """As the client's."""
        if sequences:
            yield from self._each(lambda: self.client.continuations(sequences, asked))

    def targets(self, tokens: Tensor, *, temperature: float, k: int | None = None) -> TopKTargets:
        """As the client's."""
        return self._while_it_runs(lambda: self.client.targets(tokens, temperature=temperature, k=k))

    def close(self) -> None:
        """Stop the server with its whole tree and wait for its memory; :attr:`stopped` says what came of it."""
        if self._server is None:
            self.client.close()
        elif self._server.stopped is None:
            self.client.close()
            self._say(str(self._server.stop().memory))

    def __enter__(self) -> ServedTeacher:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def _each(self, ask: Callable[[], Iterator[T]]) -> Iterator[T]:
        server = self.server
        try:
            yield from ask()
        except TeacherFailure:
            server.check_alive()
            raise

    def _while_it_runs(self, ask: Callable[[], T]) -> T:
        server = self.server
        try:
            return ask()
        except TeacherFailure:
            server.check_alive()
            raise


def settings_of(spec: TeacherSpec, folder: Path, env: Mapping[str, str]) -> ServingSettings:
    """What a spec's section asks of a vLLM of our own; ``precision = "auto"`` computes as the folder is kept.

    k has no cap there: nobody asks but the run, and it asks for its own.
    """
    kept = check_model_folder(folder, digest=False).config
    known = KnownModel.of_folder(folder)
    dtype = _DTYPES.get(spec.precision) or str(kept.get("dtype") or kept.get("torch_dtype") or "auto")
    return ServingSettings(
        folder=Path(folder).absolute(),
        environment=find_environment(spec.environment, env),
        name=spec.served_model or "teacher",
        utilisation=spec.gpu_memory_utilization,
        max_model_len=spec.max_model_len,
        max_logprobs=-1,
        dtype=dtype,
        quantization=spec.quantization,
        # As the memory plan counts it: a share of the pool would take what the plan keeps free.
        kv_cache_bytes=pinned_kv_bytes(known, EngineSetting.of(spec, known)),
    )


def open_local(
    spec: TeacherSpec, folder: Path, env: Mapping[str, str], *, log: Path | None = None, say: Say | None = None
) -> ServedTeacher | EngineTeacher:
    """The backend ``vllm-local`` or ``vllm-local-inproc`` of a spec; the caller's to close.

    The server is started by the first question, the engine at once: close either before anything else needs the
    memory. ``log`` is a file below the state folder and ``say`` writes to standard error where they are not given.
    """
    settings = settings_of(spec, folder, env)
    require_pinned(fitted(settings)[0])
    log = log or default_log(settings.name, env)
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    if spec.backend == "vllm-local-inproc":
        return EngineTeacher.open(settings, log=log, say=say, env=env)
    flow = FlowControl(spec.concurrency, budget=Budget(spec.max_requests, spec.max_tokens))
    return ServedTeacher.open(settings, log=log, say=say, env=env, flow=flow, timeout=spec.timeout)
