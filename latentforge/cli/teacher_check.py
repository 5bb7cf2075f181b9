"""``latentforge teacher check``: ask a teacher what it can do, and tell every way of failing apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode


def check(
    spec: Annotated[str | None, typer.Argument(metavar="[SPEC]", help="A recipe or file; else what is set.")] = None,
    url: Annotated[str | None, typer.Option(help="Base of the server: http://host:8000/v1.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name there; the only one if absent.")] = None,
    backend: Annotated[str | None, typer.Option(help="Backend, as in TEACHER_BACKEND.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Its tokenizer and config.json (teacher.model).")
    ] = None,
    key_env: Annotated[str | None, typer.Option(metavar="NAME", help="NAME of the variable with the key.")] = None,
    k: Annotated[int, typer.Option(min=1, max=262_144, help="Entries a position that are wanted.")] = 20,
    requests: Annotated[int, typer.Option(min=1, max=10_000, help="Documents to time.")] = 16,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field; repeatable.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> ExitCode:
    """List models, ask for k finite log-probabilities, compare tokenizers, measure, and show what it can do.

    Ends with 0 (all passed), 1 (an answer is refused), 2 (the question was) or 6 (nothing could be sent).
    """
    from latentforge.cli import explained
    from latentforge.cli.terminal import print_json
    from latentforge.spec.dotenv import Environment
    from latentforge.spec.resolve import resolve_teacher
    from latentforge.teachers.checking import check_teacher

    if url is not None and backend is None and not any(one.startswith("teacher.backend=") for one in set_ or ()):
        backend = "openai"
    typed = {"url": url, "served_model": model, "backend": backend, "model": tokenizer, "api_key_env": key_env}
    flags = [*(set_ or ()), *(f"teacher.{name}={value}" for name, value in typed.items() if value is not None)]
    try:
        env = Environment.here()
        section, origins = resolve_teacher(spec, env=env, overrides=flags)
        folder = Path(section.model).expanduser() if section.model is not None else None
        report = check_teacher(section, folder, env, k=k, requests=requests)
    except Exception as error:
        if json:  # on standard output too, where a script reads: what was refused, or broke, before there is a report
            told = explained(error)
            shown = {"ok": False, "exit_code": int(told.code), "error": str(told), "next": told.next}
            print_json({**shown, "steps": [], "capabilities": {}, "figures": {}})
        raise
    chosen = str(origins.get("teacher.backend", "default"))
    if json:
        print_json({**report.as_json(), "chosen": chosen})
    else:
        print("\n".join([*report.lines(), "", f"backend {section.backend}: {chosen}"]))
    return report.code
