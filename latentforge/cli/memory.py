"""``latentforge memory``: what a pipeline will hold on one host, term by term, and how teacher and student share it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentforge.verdicts import ExitCode

if TYPE_CHECKING:
    from latentforge.memory import KnownModel, ModePlan

app = typer.Typer(add_completion=False)

_MEANS = {
    "teacher": "weights of the teacher",
    "kv": "keys and values of the teacher's engine, pinned in bytes",
    "sequences": "recurrent states of the sequences that the engine works on",
    "logprobs": "log-probabilities in the engine, three copies of one chunk",
    "engine": "the engine's context, workspaces and graphs",
    "engine host": "the engine's processes: tokenizer, scheduler, API",
    "student": "weights of the student",
    "student share": "the part of the student's weights that each process has",
    "codec": "weights of the codec",
    "codec share": "the part of the codec's weights that each process has",
    "whole": "the copy that is gathered of the processes' parts, to be measured and saved",
    "start": "the student as it was before its first step, in fp32",
    "saved": "student and twin whole, each with a model that it is put into, in the first process at the end",
    "merged": "the copies that adapters are merged into at the end, beyond what training held",
    "twin": "the twin that is trained without a teacher",
    "states": "gradients, moments, and fp32 masters of a bf16 student",
    "checkpoint": "weights and moments on their way to the disk",
    "buckets": "the engine's buckets for gradients",
    "gathered": "what the engine gathers whole of the processes' parts in a pass",
    "activations": "what the forward pass keeps",
    "energy": "samples of the targets, draws of the head, and their distances",
    "logits": "rows of the vocabulary in fp32",
    "ahead": "a teacher's logits that are computed ahead of their step",
    "targets": "rows of targets: of the step, of those ahead, of the held-out text",
    "beside": "weights of the student beside it",
    "attention": "one layer's scores at the length that is run",
    "runtime": "the interpreter with torch; on a GPU its context",
}


@app.command()
def memory(
    recipe: Annotated[str, typer.Argument(metavar="SPEC", help="A recipe's name, or a .toml file.")],
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The host's memory, all of it free: 128GiB, or bytes.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; this machine's if absent.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="sequential, alternating or concurrent; the spec's if absent.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a value; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> ExitCode:
    """Show each term of each stage, the mode that runs and why; 0 it fits, 1 it does not, 3 not known."""
    from latentforge.cli.terminal import print_json
    from latentforge.contracts.machine import this_machine
    from latentforge.errors import RefusedError
    from latentforge.memory import MODES, HostMemory, choose_mode, mode_of, plan_mode
    from latentforge.spec.dotenv import Environment
    from latentforge.spec.pipeline import effective_pipeline
    from latentforge.spec.resolve import resolve_pipeline
    from latentforge.verdicts import exit_code

    if device not in (None, "cpu", "cuda"):
        raise RefusedError(f"--device {device!r} is neither cpu nor cuda")
    if mode not in (None, *MODES):
        raise RefusedError(f"--mode {mode!r} is none of {', '.join(MODES)}")
    spec, notes = effective_pipeline(resolve_pipeline(recipe, env=Environment.here(), overrides=overrides or []).spec)
    where = device or ("cuda" if this_machine().gpus else "cpu")
    size = _bytes(host_memory) if host_memory is not None else None
    host = HostMemory.read() if size is None else HostMemory(size, size)
    teacher, student = _folder(spec.teacher.model, notes), _folder(spec.distill.student.init, notes)
    rows = spec.data.train_sequences
    plans = {
        one: plan_mode(
            spec,
            one,
            host,
            device=where,
            teacher=teacher,
            student=student,
            tokens=None if rows is None else rows * spec.data.sequence_length,
        )
        for one in MODES
    }
    refusal = None
    try:
        chosen, why = choose_mode(mode_of(spec), plans)
    except RefusedError as error:
        chosen, why, refusal = mode_of(spec), str(error), error
    shown = next(plan for name, plan in plans.items() if name == (mode or chosen))
    if shown.peak.unknown:
        named = ((spec.teacher.model, teacher), (spec.distill.student.init, student))
        notes += [f"{path}: {trouble}" for path, model in named if model is not None for trouble in model.troubles]
    kv = {term.bytes for plan in plans.values() for stage in plan.stages for term in stage.terms if term.name == "kv"}
    notes += [f"pin the engine's cache: latentforge teacher serve … --kv-cache-bytes {max(kv)}"] if any(kv) else []
    if json:
        modes = {name: _as_json(plan) for name, plan in plans.items()}
        there = {"total": host.total, "available": host.available, "device": where, "limited": host.limited}
        print_json({"mode": chosen, "why": why, "shown": shown.mode, "host": there, "modes": modes, "notes": notes})
    else:
        print("\n".join(_told(shown, plans, chosen, why, notes)))
    if refusal is not None and mode is None:
        if not json:
            print(f"next: {refusal.next}")
        return ExitCode.FAIL
    return exit_code(shown.outcome)


def _folder(path: str | None, notes: list[str]) -> KnownModel | None:
    """What a named folder on this machine tells; a sentence where it is not here or not counted."""
    from latentforge.errors import RefusedError
    from latentforge.memory import KnownModel

    if path is None:
        return None
    try:
        known = KnownModel.of_folder(Path(path))
    except RefusedError as error:
        notes.append(f"{error}: what it takes is not known here; a plan asks its host")
        return KnownModel()
    return known


def _told(shown: ModePlan, plans: dict[Any, ModePlan], chosen: str, why: str, notes: list[str]) -> list[str]:
    from latentforge.cli.terminal import accent
    from latentforge.memory import ceiling, margin
    from latentforge.memory.plan import gib

    lines = []
    for stage, admitted in zip(shown.stages, shown.admissions, strict=True):
        lines.append(f"stage {accent(stage.run)}  {gib(stage.bytes)} GiB")
        lines += [
            f"  {term.name:<12} {gib(term.bytes):>7}  {_MEANS.get(term.name, '')}" for term in stage.terms if term.bytes
        ]
        if stage.load:
            lines.append(f"  {'(load)':<12} {gib(stage.load):>7}  while it is loaded, before the rest")
        for condition in admitted.conditions:
            need = "?" if condition.need is None else gib(condition.need)
            have = "?" if condition.have is None else gib(condition.have)
            word = {"PASS": "holds", "FAIL": "FAILS", "UNKNOWN": "unknown"}[condition.outcome.name]
            lines.append(f"  {condition.name}: {need} of {have} GiB free, {word} ({condition.why})")
    total = shown.host.total
    lines.append("")
    if total is not None:
        capped = ", the limit of its control group" if shown.host.limited else ""
        lines.append(f"host {gib(total)} GiB{capped}, margin {gib(margin(total))}, ceiling {gib(ceiling(total))} GiB")
    for name, plan in plans.items():
        mark = "*" if name == chosen else " "
        word = {"PASS": "fits", "FAIL": "does not fit", "UNKNOWN": "unknown"}[plan.outcome.name]
        lines.append(f"{mark} {name:<11} {word}: {plan.reason}")
    lines += [f"mode {chosen}: {why}", f"{shown.mode}: {shown.note}"]
    return lines + [f"note: {note}" for note in notes]


def _as_json(plan: ModePlan) -> dict[str, Any]:
    return {
        "outcome": plan.outcome.name.lower(),
        "reason": plan.reason,
        "peak": {"stage": plan.peak.run, "bytes": plan.peak.bytes},
        "stages": [
            {
                "stage": stage.run,
                "bytes": stage.bytes,
                "load": stage.load,
                "unknown": list(stage.unknown),
                "terms": [{"name": t.name, "bytes": t.bytes, "elsewhere": t.elsewhere} for t in stage.terms],
                "conditions": [
                    {"name": c.name, "need": c.need, "have": c.have, "outcome": c.outcome.name.lower(), "why": c.why}
                    for c in admitted.conditions
                ],
            }
            for stage, admitted in zip(plan.stages, plan.admissions, strict=True)
        ],
    }


def _bytes(text: str) -> int:
    """A size as people write it: ``128GiB``, ``96 GB``, or a number of bytes."""
    from latentforge.errors import RefusedError

    units = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "gb": 10**9, "mb": 10**6}
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        value = float(digits)
        if unit not in units or not 0 < value < 2**53:
            raise ValueError(unit)
    except ValueError:
        raise RefusedError(f"--host-memory {text!r} is no size", next="--host-memory 128GiB") from None
    return int(value * units[unit])
