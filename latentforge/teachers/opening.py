"""The one place where a teacher's section of a spec becomes something that answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from latentforge.errors import RefusedError
from latentforge.spec.choice import auto_of
from latentforge.spec.fields import HTTP_BACKENDS
from latentforge.spec.sections import TeacherSpec

if TYPE_CHECKING:
    from latentforge.teachers.http.client import HttpClient
    from latentforge.teachers.http.openai import OpenAITeacher
    from latentforge.teachers.protocol import Scorer

CHAT_ONLY = ("venice",)
"""Backends that answer chats and score no given documents."""


def open_teacher(
    spec: TeacherSpec,
    folder: Path | None,
    device: str,
    env: Mapping[str, str],
    *,
    say: Callable[[str], None] = lambda sentence: None,
    k: int | None = None,
    temperatures: tuple[float, ...] = (1.0,),
    rounding: Literal["fine", "none"] | None = None,
) -> Scorer:
    """Open the backend that ``spec`` names, or that ``auto`` comes to; it is the caller's to close.

    ``folder`` holds the tokenizer and config.json, and the weights where the backend computes in this process;
    ``device`` is torch's name for where it does; ``env`` holds the key under the name that ``spec.api_key_env`` says;
    ``k`` entries a row at ``temperatures`` are what will be asked: with them ``spec.cache`` stands before the teacher,
    and must be rounded as ``rounding`` says (None: as it is; a new one in steps).
    ``say`` is told what a reader of the run should know: what ``auto`` came to, and changes of the rate. A server is
    asked for nothing here but, where ``served_model`` is absent, for the one model that it lists. RefusedError where
    the section or the folder cannot be meant, TeacherFailure where the server does not list one model.
    """
    teacher = _opened(spec, folder, device, env, say)
    if spec.cache is None or k is None or spec.backend == "store":
        return teacher
    from latentforge.teachers.cached import CachedTeacher

    try:
        cached = CachedTeacher.open(
            Path(spec.cache),
            teacher,
            k=k,
            temperatures=temperatures,
            readonly=spec.cache_readonly,
            rounding=rounding,
        )
    except BaseException:
        teacher.close()
        raise
    say(f"answers are kept in {Path(spec.cache).name}" + (", read only" if spec.cache_readonly else ""))
    return cached


def _opened(
    spec: TeacherSpec, folder: Path | None, device: str, env: Mapping[str, str], say: Callable[[str], None]
) -> Scorer:
    backend: str = spec.backend
    if backend == "auto":
        backend, why = auto_of(spec)
        say(f"teacher.backend = auto: {backend}, since {why}")
    if backend == "store":
        from latentforge.teachers.store import StoreTeacher

        if spec.store is None:
            raise RefusedError("teacher.backend = 'store' reads a file of targets, and teacher.store names none")
        return StoreTeacher.open(Path(spec.store))
    if folder is None:
        raise RefusedError(f"teacher.backend = {backend!r} needs its tokenizer's folder", next="name teacher.model")
    if backend == "hf":
        from latentforge.teachers.precision import open_hf

        return open_hf(folder, spec.precision, device)
    if backend == "fixture":
        from latentforge.data.tokenizer import Tokenizer
        from latentforge.teachers.fixture import FixtureTeacher

        tokenizer = Tokenizer.open(folder)
        return FixtureTeacher(tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
    if backend in HTTP_BACKENDS:
        return _served(spec, backend, folder, env, say)
    # What is left is a vLLM of our own: started here, and stopped with its memory when the teacher is closed.
    from latentforge.teachers.serving.local import open_local

    return open_local(spec.model_copy(update={"backend": backend}), folder, env, say=say)


def _served(
    spec: TeacherSpec, backend: str, folder: Path, env: Mapping[str, str], say: Callable[[str], None]
) -> OpenAITeacher:
    from latentforge.teachers.alignment import embedding_rows
    from latentforge.teachers.http.flow import Budget, FlowControl
    from latentforge.teachers.http.openai import OpenAITeacher

    if spec.url is None:
        raise RefusedError(f"teacher.backend = {backend!r} is a server, and teacher.url names none")
    key_of(spec, env)  # before anything is sent
    return OpenAITeacher.open(
        spec.url,
        spec.served_model or only_model(spec, env),
        folder,
        revision=spec.revision,
        api_key_env=spec.api_key_env,
        env=env,
        rows=embedding_rows(folder),
        flow=FlowControl(spec.concurrency, budget=Budget(spec.max_requests, spec.max_tokens), say=say),
        timeout=spec.timeout,
        chat_only=backend in CHAT_ONLY,
    )


def connect(spec: TeacherSpec, env: Mapping[str, str], url: str | None = None) -> HttpClient:
    """A client of the server that the section names, with its key; at another ``url`` of it where one is given."""
    from latentforge.teachers.http.client import HttpClient

    if spec.url is None:
        raise RefusedError("no server is named", next="--url http://host:8000/v1, or VLLM_REMOTE_URL")
    return HttpClient(url or spec.url, key=key_of(spec, env), timeout=spec.timeout, connections=spec.concurrency)


def only_model(spec: TeacherSpec, env: Mapping[str, str]) -> str:
    """The name of the one model that the server lists; TeacherFailure with the names where there are more or none."""
    from latentforge.teachers.http.probe import served_models

    client = connect(spec, env)
    try:
        names = [model.name for model in served_models(client)]
        if len(names) != 1:
            said = ", ".join(map(repr, names[:8])) or "none"
            client.failure(
                "model-not-found",
                f"teacher.served_model names none of its models: {said}",
                next=f"set teacher.served_model = {names[0]!r}" if names else "look at the server's log",
            )
        return names[0]
    finally:
        client.close()


def key_of(spec: TeacherSpec, env: Mapping[str, str]) -> str | None:
    """The value of the key that the section names; None where it names none. Refused by its name where it is empty."""
    if spec.api_key_env is None:
        return None
    value = env.get(spec.api_key_env, "")
    if not value:
        raise RefusedError(
            f"teacher.api_key_env = {spec.api_key_env!r}, and that variable is not set",
            next=f"read -rs {spec.api_key_env} && export {spec.api_key_env}",
        )
    return value
