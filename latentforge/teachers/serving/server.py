"""A local vLLM server: started, waited for until it really answers, watched, stopped with everything below it."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentforge.errors import CrashedError, RefusedError
from latentforge.teachers.serving.memory import MemoryReturn, available, wait_for_return
from latentforge.teachers.serving.processes import Ended, KeptProcess, last_lines, prepare_log, quoted_end
from latentforge.teachers.serving.settings import ServingSettings, fitted, server_environment, vllm_version

_SECONDS_TO_START = 1800.0  # 80 B parameters took a quarter of an hour on a GB10
_ASK_EVERY = 0.25
_SAY_EVERY = 10.0
# What vLLM writes before a message: who, how grave, when, where.
_STAMP = re.compile(r"^(\([^)]*pid=\d+\) *)?([A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] *)?")
# Nothing on this machine's own address goes through a proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stopped:
    """What became of a server: how its process ended, and whether its memory came back."""

    ended: Ended
    memory: MemoryReturn


class VLLMServer:
    """A running server. A context manager: leaving it stops the server and waits for its memory, whatever happened."""

    def __init__(
        self,
        kept: KeptProcess,
        settings: ServingSettings,
        port: int,
        notes: tuple[str, ...],
        before: int,
        memory_seconds: float,
    ) -> None:
        self.kept = kept
        self.settings = settings
        self.port = port
        self.notes = notes
        self.seconds_to_start = 0.0
        self.stopped: Stopped | None = None
        self._before = before
        self.memory_seconds = memory_seconds

    @classmethod
    def start(
        cls,
        settings: ServingSettings,
        *,
        log: Path,
        port: int = 0,
        say: Say = lambda line: None,
        env: Mapping[str, str] = os.environ,
        seconds: float = _SECONDS_TO_START,
        grace: float = 20.0,
        memory_seconds: float = 240.0,
    ) -> VLLMServer:
        """Start a server on 127.0.0.1 and return when it has scored a few tokens with finite log-probabilities.

        ``port`` 0 takes a free one. ``log`` gets everything that the server writes. RefusedError, with nothing started,
        for a folder that is no model, an environment without vLLM and a port that is taken; CrashedError with the log's
        last lines for a server that ends or does not answer. Then nothing of it is left. ``grace`` is how long it may
        take to stop before it is killed, ``memory_seconds`` how long its memory is waited for after that.
        """
        settings, folder, notes = fitted(settings)
        version = vllm_version(settings.environment)
        port = free_port() if port == 0 else check_port_free(port)
        prepare_log(log)
        before, began = available(), time.monotonic()
        say(f"starts vLLM {version} for {settings.folder} ({folder.parameters / 1e6:.1f} M parameters); log {log}")
        kept = KeptProcess.start(
            settings.server_command(port), log=log, environment=server_environment(env), grace=grace
        )
        notes = (*notes, f"vLLM {version} of {settings.environment}")
        server = cls(kept, settings, port, notes, before, memory_seconds)
        try:
            server._await_answer(tokens=folder.tokens or folder.vocab_size, say=say, seconds=seconds)
        except BaseException:
            server.stop()
            raise
        server.seconds_to_start = time.monotonic() - began
        return server

    @property
    def url(self) -> str:
        """The base for clients, ``http://127.0.0.1:…/v1``."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def name(self) -> str:
        """The name of the model there."""
        return self.settings.name

    def ended(self) -> Ended | None:
        """How the server ended by itself; None while it runs."""
        return self.kept.ended()

    def check_alive(self) -> None:
        """CrashedError with the log's last lines where the server has ended."""
        if (ended := self.ended()) is not None:
            raise self._gone(ended, "")

    def stop(self) -> Stopped:
        """Stop it with its whole tree, then wait until its memory is back; the second call tells what the first did."""
        if self.stopped is None:
            ended = self.kept.stop()
            self.stopped = Stopped(ended, wait_for_return(self._before, seconds=self.memory_seconds))
        return self.stopped

    def __enter__(self) -> VLLMServer:
        return self

    def __exit__(self, *reason: object) -> None:
        self.stop()

    def _await_answer(self, *, tokens: int, say: Say, seconds: float) -> None:
        began = said = time.monotonic()
        why = "it does not listen yet"
        while True:
            if (ended := self.kept.wait(_ASK_EVERY)) is not None:
                raise self._gone(ended, " before it answered")
            try:
                why = self._ask(tokens)
            except RefusedError as error:
                raise CrashedError(f"{error}\n{quoted_end(self.kept.log)}", next=f"less {self.kept.log}") from None
            if not why and self.ended() is None:
                return
            now = time.monotonic()
            if now - began > seconds:
                raise CrashedError(
                    f"vLLM did not answer within {seconds:.0f} s: {why}\n{quoted_end(self.kept.log)}",
                    next=f"less {self.kept.log}",
                )
            if now - said >= _SAY_EVERY:
                said = now
                doing = _STAMP.sub("", (last_lines(self.kept.log, 1) or ["its log is empty"])[0]).strip()
                say(f"waits for vLLM since {now - began:.0f} s, {why}: {doing[:90]}")

    def _ask(self, tokens: int) -> str:
        """Score three tokens: an empty string where the answer is right, else why it is not there yet."""
        prompt = [1 % tokens, 2 % tokens, 3 % tokens]
        body = {"model": self.name, "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        try:
            answer = post(f"{self.url}/completions", body, timeout=60.0)
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read(2000).decode(errors="replace")
            raise RefusedError(
                f"vLLM listens and cannot score: HTTP {error.code} to a prompt of three tokens: {reason[:300]}"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            return "it does not listen yet" if isinstance(reason, ConnectionRefusedError) else f"no answer: {reason}"
        try:
            rows = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError):
            rows = None
        if not rows or len(rows) != len(prompt):
            raise RefusedError(f"vLLM gives no log-probabilities of the prompt: {json.dumps(answer)[:300]}")
        values = [entry["logprob"] for row in rows[1:] for entry in row.values()]
        if not values or not all(math.isfinite(value) for value in values):
            raise RefusedError(f"vLLM's log-probabilities are not finite: {values}")
        return ""

    def _gone(self, ended: Ended, when: str) -> CrashedError:
        return CrashedError(f"vLLM {ended}{when}\n{quoted_end(self.kept.log)}", next=f"less {self.kept.log}")


def post(url: str, body: Mapping[str, Any], *, timeout: float) -> Any:
    """POST JSON to this machine's own address; the answer, parsed."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with _OPENER.open(request, timeout=timeout) as answer:
        return json.load(answer)


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def check_port_free(port: int) -> int:
    """Refuse a port that something listens on: its answers would be taken for the teacher's."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", port))
        except OSError as error:
            raise RefusedError(
                f"port {port} of 127.0.0.1 cannot be used: {error.strerror}", next="--port 0 takes a free one"
            ) from None
    return port
