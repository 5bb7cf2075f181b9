"""``latentforge teacher serve``: a local vLLM, in the foreground, gone with its memory when this command is."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from latentforge.teachers.serving.server import VLLMServer

VARIABLES = {
    "environment": "LATENTFORGE_VLLM_ENVIRONMENT",
    "utilisation": "VLLM_GPU_MEMORY_UTIL",
    "max_model_len": "VLLM_MAX_MODEL_LEN",
    "quantization": "VLLM_QUANTIZATION",
}
"""The variable that sets each option, in the environment or in ``.env``."""
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Asked(BaseException):
    """A signal that asks to stop."""


def serve(
    folder: Annotated[Path, typer.Argument(help="The model: a folder in Hugging Face's layout.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; the folder's by default.")] = None,
    environment: Annotated[
        Path | None, typer.Option(envvar=VARIABLES["environment"], help="Folder of the environment with vLLM.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(envvar=VARIABLES["utilisation"], help="Share of all memory; what is left is the system's.")
    ] = 0.8,
    kv_cache_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes of the KV cache; what scoring needs by default, 0 for the share.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=8, envvar=VARIABLES["max_model_len"], help="Longest sequence; 16384, or the model's positions."
        ),
    ] = None,
    max_logprobs: Annotated[
        int, typer.Option(min=-1, help="Largest k that may be asked for; -1 is the whole vocabulary.")
    ] = 256,
    eager: Annotated[bool, typer.Option("--eager/--graphs", help="Scoring gains nothing from graphs.")] = True,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(envvar=VARIABLES["quantization"], help="vLLM's --quantization; the folder's by default."),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="File for what vLLM writes; below the state folder by default.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds until it must have answered.")] = 1800.0,
    memory_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that its memory may take to come back after the stop.")
    ] = 240.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines: serving, then stopped.")] = False,
) -> ExitCode:
    """Serve a teacher with vLLM on this machine, for this machine alone, until Ctrl-C or SIGTERM.

    Says where once a scoring request was answered with finite log-probabilities. However this command ends, kill -9
    included, no process of vLLM outlives it. Exit code 0: stopped when asked, its memory came back; 1: it did not; 2:
    refused, nothing was started; 5: vLLM ended by itself.
    """
    from latentforge.cli.progress import Progress
    from latentforge.errors import RefusedError
    from latentforge.teachers.folder import check_model_folder
    from latentforge.teachers.serving.processes import default_log
    from latentforge.teachers.serving.server import VLLMServer, check_port_free, free_port
    from latentforge.teachers.serving.settings import MAX_MODEL_LEN, ServingSettings, find_environment

    if not 0.0 < utilisation <= 1.0:
        raise RefusedError(f"--utilisation {utilisation:g} is no share of the memory", next="--utilisation 0.8")
    if dtype not in _DTYPES:
        raise RefusedError(f"--dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    found = check_model_folder(folder, digest=False)
    positions = found.max_positions
    if max_model_len is not None and positions is not None and max_model_len > positions:
        raise RefusedError(
            f"--max-model-len {max_model_len} is more than the {positions} positions of {folder}",
            next=f"--max-model-len {positions}",
        )
    port = free_port() if port == 0 else check_port_free(port)
    settings = ServingSettings(
        folder=folder.absolute(),
        environment=find_environment(environment, os.environ),
        name=name or folder.absolute().name,
        utilisation=utilisation,
        kv_cache_bytes=kv_cache_bytes,
        max_model_len=max_model_len or min(MAX_MODEL_LEN, positions or MAX_MODEL_LEN),
        max_logprobs=max_logprobs,
        eager=eager,
        dtype=dtype,
        quantization=quantization,
    )
    file = log or default_log(settings.name, os.environ)
    server: VLLMServer | None = None
    asked = False
    with _asked_to_stop():
        try:
            with Progress() as progress:

                def say(line: str) -> None:
                    progress.tell(line)
                    if not as_json:
                        typer.echo(line)

                server = VLLMServer.start(
                    settings, log=file, port=port, say=say, seconds=timeout, memory_seconds=memory_timeout
                )
            _announce(server, as_json)
            server.kept.wait()
        except _Asked:
            asked = True
            if not as_json:
                typer.echo("stops")
        if server is None:  # asked while it started: what there was is ended
            return ExitCode.PASS
        stopped = server.stop()
    if as_json:
        memory = stopped.memory
        _print_line(
            state="stopped",
            asked=asked,
            process=str(stopped.ended),
            memory_before=memory.before,
            memory_after=memory.after,
            memory_returned=memory.returned,
        )
    else:
        typer.echo(str(stopped.memory))
    if not asked:
        server.check_alive()
    return ExitCode.PASS if stopped.memory.returned else ExitCode.FAIL


def _announce(server: VLLMServer, as_json: bool) -> None:
    settings = server.settings
    if as_json:
        _print_line(
            state="serving",
            url=server.url,
            model=server.name,
            pid=os.getpid(),
            log=str(server.kept.log),
            seconds=round(server.seconds_to_start, 1),
            max_model_len=settings.max_model_len,
            max_logprobs=settings.max_logprobs,
            notes=list(server.notes),
        )
        return
    for note in server.notes:
        typer.echo(f"  {note}")
    k = "the whole vocabulary" if settings.max_logprobs == -1 else settings.max_logprobs
    typer.echo(
        f"serves {server.name} at {server.url}: answered after {server.seconds_to_start:.0f} s, "
        f"up to {settings.max_model_len} tokens, k up to {k}\n"
        f"  look at it:  latentforge teacher check --url {server.url} --model {server.name}\n"
        f"  score by it: teacher.backend = 'vllm-remote' and teacher.url = '{server.url}' in the pipeline\n"
        f"  stop it:     Ctrl-C here, or  kill {os.getpid()}"
    )


def _print_line(**values: Any) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False))


@contextmanager
def _asked_to_stop() -> Iterator[None]:
    """The first signal that asks to stop interrupts what is inside; those after it find it stopping already."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise _Asked

    before = {number: signal.signal(number, ask) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
