"""``latentforge bench generate``: how fast a student writes, beside others, and whether that is what was asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from latentforge.spec.bench import BenchSpec
    from latentforge.writers.bench.report import Report


def generate(
    student: Annotated[
        Path, typer.Argument(metavar="LATENT", help="A latent or distill run, or its student's folder.")
    ],
    beside: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="Another student of the same data; may be repeated.")
    ] = None,
    transformers: Annotated[
        bool | None,
        typer.Option(
            "--transformers/--no-transformers", help="Also transformers' own generate, with each token-level student."
        ),
    ] = None,
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help='A prompt a line (.jsonl: {"prompt": …}); -: standard input.')
    ] = Path("prompts.txt"),
    spec: Annotated[
        str | None, typer.Option(metavar="FILE", help="A pipeline whose [bench] says how, and the gates.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens after each prompt.  [64]")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 to 1.  [1]")] = None,
    method: Annotated[
        str | None, typer.Option(help="head, exact, vote or tokens: how a chunk is chosen.  [head]")
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Of exact and vote: draws a chunk.  [200]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of tokens: the likeliest that one is drawn from.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of tokens: of these the fewest with this share.")] = None,
    batch: Annotated[int | None, typer.Option(help="Prompts written together.  [1]")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds in which everybody has a turn.  [3]")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; each next one has the next.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.  [auto]")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Whose teacher's cache counts.  [LATENT's own run]")
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What bench quality --json said; for the plot.")
    ] = None,
    min_tokens_per_second: Annotated[float | None, typer.Option(help="Gate: produced tokens/s.")] = None,
    max_p95_first_chunk_s: Annotated[float | None, typer.Option(help="Gate: seconds to the first chunk.")] = None,
    max_p95_chunk_s: Annotated[float | None, typer.Option(help="Gate: seconds from chunk to chunk.")] = None,
    min_hit_rate: Annotated[float | None, typer.Option(help="Gate: hit rate of the teacher's cache.")] = None,
    max_peak_memory_gb: Annotated[
        float | None, typer.Option(help="Gate: process and GPU together, 10^9 bytes.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where bench_<time>.json and .png go.")] = Path("results"),
    json: Annotated[bool, typer.Option("--json", help="Print the file's JSON.")] = False,
) -> ExitCode:
    """Measure how fast LATENT writes, in turns with the students beside it: produced tokens/s, p50 and p95, memory.

    Writes bench_<time>.json and a plot of quality against compute. A gate that fails ends with 1, one whose value is
    not known with 3.
    """
    from latentforge.cli.progress import Progress
    from latentforge.cli.terminal import print_json
    from latentforge.writers.bench.plot import draw
    from latentforge.writers.bench.quality import read_quality
    from latentforge.writers.bench.report import make_folder, write_report
    from latentforge.writers.bench.run import Work
    from latentforge.writers.bench.run import run as run_bench
    from latentforge.writers.opening import open_writer
    from latentforge.writers.prompts import prompts_in

    asked = _asked(
        spec,
        transformers=transformers,
        device=device,
        max_tokens=max_tokens,
        temperature=temperature,
        method=method,
        draws=draws,
        top_k=top_k,
        top_p=top_p,
        batch=batch,
        repeats=repeats,
        min_tokens_per_second=min_tokens_per_second,
        max_p95_first_chunk_s=max_p95_first_chunk_s,
        max_p95_chunk_s=max_p95_chunk_s,
        min_hit_rate=min_hit_rate,
        max_peak_memory_gb=max_peak_memory_gb,
    )
    texts = prompts_in(prompts, sys.stdin.buffer, flag="--prompts")
    hits = _hits(run, student)
    qualities = read_quality(quality) if quality is not None else {}
    make_folder(out)
    first, *others = ((str(one), open_writer(one, device=asked.device)) for one in (student, *(beside or ())))
    work = Work(first, tuple(others), texts, seed, hits, qualities)
    with Progress() as progress:
        report = run_bench(work, asked, tell=lambda line, done, total: progress.tell(line))
    file = write_report(report, out)
    picture = file.with_suffix(".png")
    draw(report, picture)
    if json:
        print_json(report.as_json())
    else:
        _show(report, file, picture)
    return report.code


def _asked(spec: str | None, **flags: Any) -> BenchSpec:
    """The pipeline's ``[bench]``, or its defaults, with the flags that were given over it."""
    from pydantic import ValidationError

    from latentforge.errors import RefusedError
    from latentforge.spec.bench import BenchSpec
    from latentforge.spec.resolve import resolve_pipeline

    base = BenchSpec()
    if spec is not None:
        resolved = resolve_pipeline(spec)
        if not any(field.startswith("bench.") for field in resolved.origins):
            raise RefusedError(f"--spec {spec} sets nothing of [bench]", next="leave --spec out, or add a [bench]")
        base = resolved.spec.bench
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return BenchSpec.model_validate(base.model_dump() | given)
    except ValidationError as error:
        told = [_told(one) for one in error.errors(include_url=False)]
        raise RefusedError("; ".join(told), next="latentforge bench generate --help") from None


def _told(error: Any) -> str:
    """One of pydantic's errors, with the flag that it is about where it is about one."""
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"--{error['loc'][0].replace('_', '-')} {error['input']}: {message}" if error["loc"] else message


def _hits(run: Path | None, student: Path) -> Any:
    """The hit rate of the run that is named, else of the student's own where it lies in a run."""
    from latentforge.spec.identity import RUN_ID
    from latentforge.writers.bench.hits import hits_of

    if run is not None:
        return hits_of(run)
    place = student.expanduser().resolve()
    mine = next((one for one in (place, *place.parents[:2]) if RUN_ID.fullmatch(one.name)), None)
    return hits_of(mine) if mine is not None and (mine / "events.jsonl").is_file() else None


def _show(report: Report, file: Path, picture: Path) -> None:
    from latentforge.writers.bench.report import table

    print("\n".join(table(report)))
    print(f"\n{file}\n{picture}")
    if report.verdicts:
        print()
    for verdict in report.verdicts:
        print(verdict.line())
