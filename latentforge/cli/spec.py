"""``latentforge spec``: what a pipeline asks for, and where each value came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from latentforge.spec.resolve import ResolvedPipeline

app = typer.Typer(no_args_is_help=True, help="Show a pipeline's values and where each comes from.")


@app.callback()
def _group() -> None:
    """Show a pipeline's values and where each comes from."""


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .toml file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a value; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show each value with its origin: default, file, .env NAME, environment NAME or flag (the later ones win)."""
    from latentforge.cli.terminal import print_json
    from latentforge.spec.dotenv import Environment
    from latentforge.spec.pipeline import check_profile, effective_pipeline
    from latentforge.spec.resolve import resolve_pipeline

    resolved = resolve_pipeline(recipe, env=Environment.here(), overrides=overrides or [])
    check_profile(resolved.spec)
    _, notes = effective_pipeline(resolved.spec)
    if json:
        values = {field: {"value": value, "origin": str(origin)} for field, value, origin in resolved.values()}
        print_json({"name": resolved.name, "values": values, "notes": notes})
    else:
        print("\n".join(_told(resolved, notes)))


@app.command()
def explain(
    field: Annotated[str | None, typer.Argument(help="A field or a table, like latent.mse_weight or latent.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what each field of a pipeline file means, with its default: all of them, or those of one table."""
    from dataclasses import asdict

    from latentforge.cli.terminal import accent, print_json
    from latentforge.spec.explain import explained

    found = explained(field)
    if json:
        print_json([asdict(one) for one in found])
        return
    for one in found:
        print(f"{accent(one.field)} = {_toml(one.default)}" + (f"\n    {one.meaning}" if one.meaning else ""))


def _told(resolved: ResolvedPipeline, notes: list[str]) -> list[str]:
    from latentforge.cli.terminal import accent

    rows = [(field, _toml(value), str(origin)) for field, value, origin in resolved.values()]
    wide = max(len(field) for field, _, _ in rows)
    broad = min(40, max(len(value) for _, value, _ in rows))
    lines, section = [], ""
    for field, value, origin in rows:
        first = field.partition(".")[0] if "." in field else ""
        if first != section:
            lines.append("")
            section = first
        shown = origin if origin == "default" else accent(origin)
        lines.append(f"{field:<{wide}}  {value:<{broad}}  {shown}")
    return lines + ([""] if notes else []) + [f"note: {note}" for note in notes]


def _toml(value: object) -> str:
    """The value as it would be written in a pipeline file; ``–`` for one that is absent."""
    import json

    if value is None:
        return "–"
    return json.dumps(value, ensure_ascii=False)
