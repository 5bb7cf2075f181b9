"""The backend ``vllm-local-inproc``: vLLM's engine without a server, in a process of its own environment."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import CrashedError
from latentforge.kernels.targets import TopKTargets
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.folder import check_model_folder
from latentforge.teachers.http.rows import Question, parse_answer
from latentforge.teachers.protocol import Capability, Limits, TeacherIdentity, Tokens, check_tokens
from latentforge.teachers.serving.content import content_identity
from latentforge.teachers.serving.memory import available, wait_for_return
from latentforge.teachers.serving.processes import KeptProcess, prepare_log, quoted_end
from latentforge.teachers.serving.server import Stopped
from latentforge.teachers.serving.settings import (
    ServingSettings,
    fitted,
    server_environment,
    vllm_version,
)
from latentforge.teachers.store import scored_batch

DEFAULT_K = 20
_WORKER = Path(__file__).parent / "engine_worker.py"


class EngineTeacher:
    """A model in vLLM's engine: scores given documents, T = 1. Its process tree ends with :meth:`close`."""

    def __init__(
        self,
        kept: KeptProcess,
        questions: IO[bytes],
        answers: IO[bytes],
        settings: ServingSettings,
        *,
        identity: TeacherIdentity,
        vocab_size: int,
        rows: int,
        notes: tuple[str, ...],
        before: int,
        memory_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self.kept = kept
        self.settings = settings
        self.stopped: Stopped | None = None
        self.max_logprobs = 0
        self.seconds_to_start = 0.0
        self._questions, self._answers = questions, answers
        self._identity = identity
        self._vocab_size, self._rows = vocab_size, rows
        self._notes = notes
        self._before, self.memory_seconds = before, memory_seconds
        self._padding = 0
        self._tell = say

    @classmethod
    def open(
        cls,
        settings: ServingSettings,
        *,
        log: Path,
        say: Callable[[str], None] = lambda line: None,
        env: Mapping[str, str] = os.environ,
        memory_seconds: float = 240.0,
    ) -> EngineTeacher:
        """Load the model in a new process of ``settings.environment``; ``log`` gets everything that vLLM writes.

        RefusedError, with nothing started, for a folder that is no model and an environment without vLLM; CrashedError
        with the log's last lines where the engine does not come up. Then nothing of it is left.
        """
        settings, _, notes = fitted(settings)
        folder = check_model_folder(settings.folder)
        tokenizer = Tokenizer.open(settings.folder)
        version = vllm_version(settings.environment)
        prepare_log(log)
        before, began = available(), time.monotonic()
        say(f"starts vLLM {version}'s engine for {settings.folder}; log {log}")
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        try:
            kept = KeptProcess.start(
                [str(settings.python), str(_WORKER)],
                log=log,
                environment=server_environment(env),
                stdin=theirs_in,
                stdout=theirs_out,
            )
        except BaseException:
            os.close(ours_in)
            os.close(ours_out)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        teacher = cls(
            kept,
            os.fdopen(ours_out, "wb"),
            os.fdopen(ours_in, "rb"),
            settings,
            identity=content_identity(folder, tokenizer, settings.dtype),
            vocab_size=tokenizer.vocab_size,
            rows=folder.vocab_size,
            notes=(*notes, f"vLLM {version}'s engine of {settings.environment}; rows have T = 1"),
            before=before,
            memory_seconds=memory_seconds,
            say=say,
        )
        try:
            teacher._begin()
        except BaseException:
            teacher.close()
            raise
        teacher.seconds_to_start = time.monotonic() - began
        return teacher

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Scores; an engine would sample too, and nobody asks it to."""
        return frozenset({"score"})

    @property
    def identity(self) -> TeacherIdentity:
        """The folder's content, and that vLLM computes with it in which dtype."""
        return self._identity

    @property
    def vocab_size(self) -> int:
        """Number of real tokens."""
        return self._vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        """The engine, what gave way in its settings, entries of padding ids that were left out."""
        if not self._padding:
            return self._notes
        return (*self._notes, f"{self._padding} entries of padding ids count as outside the top-k")

    @property
    def limits(self) -> Limits:
        """T = 1, k and length as the engine was started."""
        most = self._rows if self.max_logprobs == -1 else min(self.max_logprobs, self._rows)
        return Limits(most, self.settings.max_model_len, (1.0,))

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """Targets of each sequence, some at a time (see :class:`latentforge.teachers.protocol.Scorer`).

        One engine, one conversation: read it to its end, or close it, before the next question.
        """
        if not sequences:
            return
        self.limits.check(k=k, tokens=max(len(tokens) for tokens in sequences), temperatures=temperatures)
        for tokens in sequences:
            check_tokens(torch.as_tensor(tokens).unsqueeze(0), self._vocab_size)
        questions = [self._question(tokens, k) for tokens in sequences]
        self._say({"documents": [list(question.prompt) for question in questions], "k": k})
        unread = False
        try:
            while "done" not in (frame := self._hear()):
                unread = True
                answer = parse_answer(frame["answer"], questions[frame["index"]], "prompt_logprobs")
                self._padding += answer.padding
                yield int(frame["index"]), answer.targets
                unread = False
        finally:
            if unread:  # nobody wants the rest, and it must not stand before the next answers
                with suppress(TeacherFailure):
                    while "done" not in self._hear():
                        pass

    def targets(self, tokens: Tensor, *, temperature: float, k: int | None = None) -> TopKTargets:
        """Top-k rows of ``tokens`` int64 ``[B, L]`` with their rest mass, on the device of ``tokens``; T = 1 only."""
        wanted = min(DEFAULT_K, self._vocab_size) if k is None else k
        return scored_batch(self, tokens, temperature=temperature, k=wanted)

    def close(self) -> None:
        """End the engine with its whole tree and wait for its memory; :attr:`stopped` says what came of it."""
        if self.stopped is None:
            for stream in (self._questions, self._answers):
                with suppress(OSError):
                    stream.close()
            ended = self.kept.stop()
            self.stopped = Stopped(ended, wait_for_return(self._before, seconds=self.memory_seconds))
            self._tell(str(self.stopped.memory))

    def __enter__(self) -> EngineTeacher:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def _question(self, tokens: Tokens, k: int) -> Question:
        ids = tuple(int(token) for token in tokens)
        last = len(ids) >= self.settings.max_model_len
        return Question(ids, k, self._vocab_size, self._rows, last_generated=last)

    def _begin(self) -> None:
        try:
            self._say(self.settings.engine_arguments())
            frame = self._hear()
        except TeacherFailure as error:
            raise CrashedError(str(error), next=f"less {self.kept.log}") from None
        self.max_logprobs = int(frame["ready"]["max_logprobs"])

    def _say(self, value: Any) -> None:
        body = json.dumps(value).encode()
        try:
            self._questions.write(struct.pack(">I", len(body)) + body)
            self._questions.flush()
        except OSError:
            self._gone()

    def _hear(self) -> dict[str, Any]:
        head = self._answers.read(4)
        body = self._answers.read(struct.unpack(">I", head)[0]) if len(head) == 4 else b""
        if not body:
            self._gone()
        frame: dict[str, Any] = json.loads(body)
        if "error" in frame:
            refused = frame["refused"]
            raise TeacherFailure(
                "refused-request" if refused else "server-error",
                f"vLLM's engine says: {frame['error']}" + ("" if refused else f"\n{quoted_end(self.kept.log)}"),
                next=f"less {self.kept.log}",
            )
        return frame

    def _gone(self) -> NoReturn:
        ended = self.kept.wait(10.0)
        raise TeacherFailure(
            "cut",
            f"vLLM's engine {ended or 'closed its pipe'}\n{quoted_end(self.kept.log)}",
            next=f"less {self.kept.log}",
        )
