"""``latentforge bench``: measurements that need more than one part of the project."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentforge.cli.bench_data import data
from latentforge.cli.bench_generate import generate
from latentforge.cli.bench_memory import memory
from latentforge.cli.bench_quality import quality
from latentforge.cli.bench_train import train
from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from latentforge.spec.dotenv import Environment
    from latentforge.teachers.scenarios import Name, Scenario

app = typer.Typer(no_args_is_help=True, help="Measure teachers, students and data.")


@app.callback()
def _group() -> None:
    """Measure teachers, students and data."""


app.command()(data)
app.command()(generate)
app.command()(memory)
app.command()(quality)
app.command()(train)


@app.command()
def teachers(
    hosted: Annotated[str | None, typer.Option(metavar="URL", help="Hosted API; else VENICE_BASE_URL.")] = None,
    hosted_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="NAME of the variable with its key; --hosted needs it.")
    ] = None,
    hosted_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name there; else VENICE_MODEL, else --model.")
    ] = None,
    local: Annotated[
        str | None, typer.Option(metavar="FOLDER|URL", help="A model to serve here, or a server that runs here.")
    ] = None,
    remote: Annotated[str | None, typer.Option(metavar="URL", help="Remote vLLM; else VLLM_REMOTE_URL.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name on the servers; the only one if absent.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Its tokenizer and config.json; else the folder of --local.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Entries a position.")] = 20,
    documents: Annotated[int, typer.Option(min=1, max=100_000, help="Documents a scenario.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens a document.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at once.")] = 8,
    store: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the stores there.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> ExitCode:
    """Score the same documents in three scenarios: a hosted API, a local vLLM, a remote vLLM; one table.

    A scenario that fails is a row with its reason, and the others are measured all the same. Ends with 0 (all passed),
    1 (one failed), 3 (one is not configured) or 2.
    """
    import tempfile

    from latentforge.cli.terminal import Passing, ended_as_by_ctrl_c, print_json
    from latentforge.data.tokenizer import Tokenizer
    from latentforge.spec.dotenv import Environment
    from latentforge.teachers.scenarios import TITLES, Wanted, check_unused, run_scenario
    from latentforge.teachers.side_by_side import table, worst

    env = Environment.here()
    local = local or env.get("VLLM_LOCAL_MODEL") or None  # an empty one is as good as none
    folder = tokenizer if tokenizer is not None or local is None or "://" in local else Path(local).expanduser()
    if folder is not None:
        Tokenizer.open(folder)  # refused before anything is asked
    more: dict[str, object] = {"served_model": model, "concurrency": concurrency}
    scenarios = [
        _hosted(hosted, hosted_key_env, hosted_model, folder, env, more),
        _local(local, folder, env, more),
        _remote(remote, folder, env, more),
    ]
    found = []
    passing = Passing(active=not json)

    def say(title: str, line: str) -> None:
        passing.clear()
        print(f"{title}: {line}", file=sys.stderr, flush=True)

    with ended_as_by_ctrl_c(), tempfile.TemporaryDirectory(prefix="latentforge-bench-") as temporary:
        files = {one.name: (store or Path(temporary)) / f"{one.name}.sqlite" for one in scenarios}
        for one in scenarios:
            if one.teacher is not None:
                check_unused(files[one.name])
        if store is not None:
            store.mkdir(parents=True, exist_ok=True)
        for one in scenarios:
            title = TITLES[one.name]
            passing.show(f"{title} …")
            found.append(run_scenario(one, env, Wanted(k, documents, tokens), files[one.name], partial(say, title)))
        passing.clear()
    code = worst(found)
    if json:
        asked = {"k": k, "documents": documents, "tokens": tokens, "concurrency": concurrency}
        print_json({"asked": asked, "scenarios": [one.as_json() for one in found], "exit_code": int(code)})
    else:
        print(f"{documents} documents of {tokens} tokens, k = {k}, {concurrency} at once\n")
        print("\n".join(table(found)))
    return code


def _hosted(
    url: str | None,
    key_env: str | None,
    model: str | None,
    folder: Path | None,
    env: Environment,
    more: dict[str, object],
) -> Scenario:
    """A hosted API: Venice's by its own names, or any other by ``--hosted``."""
    from latentforge.errors import RefusedError
    from latentforge.spec.choice import VENICE_URL

    if url is not None:
        if key_env is None:  # Venice's key is nobody else's
            raise RefusedError(
                "--hosted names an API and no key for it", next="--hosted-key-env NAME, the variable with its key"
            )
        values = {"backend": "openai", "url": url, "api_key_env": key_env, **more}
        return _scenario("hosted", values | {"served_model": model or more["served_model"]}, folder)
    if key_env is not None or not env.get("VENICE_API_KEY"):
        return _missing("hosted", "--hosted URL --hosted-key-env NAME, or set VENICE_API_KEY")
    base = env.get("VENICE_BASE_URL") or VENICE_URL
    values = {"backend": "venice", "url": base, "api_key_env": "VENICE_API_KEY", **more}
    named = model or env.get("VENICE_MODEL") or more["served_model"]
    return _scenario("hosted", values | {"served_model": named}, folder)


def _local(where: str | None, folder: Path | None, env: Environment, more: dict[str, object]) -> Scenario:
    if where is None:
        return _missing("local", "--local FOLDER, or set VLLM_LOCAL_MODEL")
    if "://" in where:
        return _scenario("local", {"backend": "vllm-remote", "url": where, **more}, folder)
    values = {"backend": "vllm-local", "model": where, "concurrency": more["concurrency"]}
    values["environment"] = env.get("LATENTFORGE_VLLM_ENVIRONMENT")
    return _scenario("local", values, Path(where).expanduser())


def _remote(url: str | None, folder: Path | None, env: Environment, more: dict[str, object]) -> Scenario:
    url = url or env.get("VLLM_REMOTE_URL") or None
    if url is None:
        return _missing("remote", "--remote URL, or set VLLM_REMOTE_URL")
    key = "VLLM_REMOTE_API_KEY" if env.get("VLLM_REMOTE_API_KEY") else None
    return _scenario("remote", {"backend": "vllm-remote", "url": url, "api_key_env": key, **more}, folder)


def _scenario(name: Name, values: dict[str, object], folder: Path | None) -> Scenario:
    from pydantic import ValidationError

    from latentforge.errors import RefusedError
    from latentforge.spec.sections import TeacherSpec
    from latentforge.teachers.scenarios import Scenario

    if folder is None:
        return _missing(name, "--tokenizer FOLDER: the folder with the model's tokenizer and config.json")
    try:
        return Scenario(name, TeacherSpec.model_validate(values), folder)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RefusedError(f"bench teachers, {name}: {first['msg'].removeprefix('Value error, ')}") from None


def _missing(name: Name, how: str) -> Scenario:
    from latentforge.teachers.scenarios import Scenario

    return Scenario(name, None, None, how)
