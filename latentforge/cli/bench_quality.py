"""``latentforge bench quality``: students beside each other on held-out text, and what each costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from latentforge.verdicts.exitcode import ExitCode


def quality(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="A run's folder, or its out/student.")],
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="The data run on which all of them were trained.")],
    beside: Annotated[
        Path | None, typer.Option(metavar="STUDENT", help="Another one, as a token-level student of this teacher.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The teacher: its run, or a Hugging Face folder.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows; contexts are after each of their chunks.")] = 32,
    draws: Annotated[int, typer.Option(min=2, max=4096, help="Continuations of a context.")] = 16,
    texts: Annotated[int, typer.Option(min=1, help="Texts that each of them writes.")] = 8,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of such a text.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Chunks of the prompt before it.")] = 8,
    method: Annotated[
        Literal["head", "exact", "vote"], typer.Option(help="How a latent student writes: head, exact or vote.")
    ] = "head",
    temperature: Annotated[float, typer.Option(help="At what temperature the texts are written.")] = 1.0,
    sampler_draws: Annotated[int, typer.Option(min=1, help="Draws of a vote, or the bound of exact.")] = 200,
    seed: Annotated[int, typer.Option(help="Keys all draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON there too.")] = None,
) -> ExitCode:
    """BrierLM, bits a byte, distance from the teacher and quality by place, of the same held-out rows and prompts.

    What a token costs counts the draws that were really made. Nothing is gated: the figures and their intervals are
    the result.
    """
    from latentforge.cli.progress import Progress
    from latentforge.cli.terminal import print_json
    from latentforge.data.shards import ShardSet
    from latentforge.errors import RefusedError
    from latentforge.spec.run import write_record
    from latentforge.students.latent.requests import Sampling
    from latentforge.writers.opening import open_writer
    from latentforge.writers.quality import Protocol, measure, teacher_folder
    from latentforge.writers.quality_report import as_json, lines

    if out is not None and not out.parent.is_dir():
        raise RefusedError(f"--out {out}: {out.parent} is no folder", next=f"mkdir -p {out.parent}")
    asked = Protocol(rows, draws, texts, chunks, prompt, seed, Sampling(method, temperature, sampler_draws))
    shards = ShardSet.open(data / "out" if (data / "out").is_dir() else data)
    shards.verify()
    with Progress() as progress:
        progress.tell("opening")
        students = [("student", open_writer(student, device=device))]
        if beside is not None:
            students.append(("beside", open_writer(beside, device=device)))
        master = None if teacher is None else open_writer(teacher_folder(teacher), device=device)
        found = measure(students, master, shards, asked, tell=progress.tell)
    content = as_json(found)
    if out is not None:
        write_record(out, content)
    if json:
        print_json(content)
    else:
        print("\n".join(lines(found)))
    return ExitCode.PASS
