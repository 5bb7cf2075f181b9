"""``latentforge serve``: a student over HTTP, as OpenAI's completions and by its own names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode

app = typer.Typer(add_completion=False)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="A latent or distill run, its out, or its out/student.")],
    host: Annotated[str, typer.Option(help="Address to listen on; another than this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; the folder's by default.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds the key.")] = None,
    cors: Annotated[list[str] | None, typer.Option(help="Origin of a web page that may ask; more than once.")] = None,
    max_batch: Annotated[int, typer.Option(help="Texts written together.")] = 64,
    queue: Annotated[int, typer.Option(help="Texts that may wait; one more is answered with 429.")] = 256,
    max_prompt: Annotated[int, typer.Option(help="Tokens of a prompt, at most.")] = 4096,
    max_tokens: Annotated[int, typer.Option(help="New tokens of a text, at most.")] = 2048,
    max_draws: Annotated[int, typer.Option(help="Draws for a chunk, at most.")] = 1000,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body, at most.")] = 1 << 20,
    deadline: Annotated[float, typer.Option(help="Seconds for a text; a request may ask for less.")] = 60.0,
    grace: Annotated[float, typer.Option(help="Seconds to finish what is under way when asked to stop.")] = 20.0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads that compute; 0: all cores but one.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines: listening, ready, stopping.")] = False,
) -> ExitCode:
    """Serve a student over HTTP on this machine until Ctrl-C or SIGTERM, which finish what is under way.

    /v1/completions and /v1/models as OpenAI's clients know them, /generate with all that a student can do, /health,
    /ready, /metrics (Prometheus), /docs. Exit code 0: stopped when asked; 2: refused, nothing was served.
    """
    from latentforge.errors import RefusedError
    from latentforge.serve.limits import Limits

    limits = Limits(max_batch, queue, max_prompt, max_tokens, max_draws, max_body, deadline, grace)

    from latentforge.serve.running import Place, read_key, serve

    place = Place(host, port, read_key(api_key_env, api_key_file, os.environ), tuple(cors or ()))
    if not folder.exists():
        raise RefusedError(f"{folder} does not exist", next="name the folder of a latent or distill run")

    import torch

    from latentforge.writers.opening import Writer, open_writer

    def opening() -> Writer:
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) - 1))
        return open_writer(folder, device=device)

    serve(opening, place, limits, name=name or folder.resolve().name, say=typer.echo, as_json=as_json)
    return ExitCode.PASS
