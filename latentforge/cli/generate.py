"""``latentforge generate``: text from a trained student, for people and for pipes."""

from __future__ import annotations

import io
import json as json_text
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentforge.errors import RefusedError
from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from latentforge.cli.terminal import Passing
    from latentforge.students.latent.requests import Sampling
    from latentforge.writers.opening import Writer
    from latentforge.writers.writing import Said, Written

app = typer.Typer()

METHODS = ("head", "exact", "vote", "tokens", "greedy")


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A latent or distill run, or its out/student.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts; none: standard input is one.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help='A prompt a line (.jsonl: {"prompt": …}); -: standard input.')
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print each chunk as soon as it is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print an object a prompt (--stream: a chunk too).")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many tokens follow.")] = 128,
    method: Annotated[
        str | None, typer.Option(help="head, exact, vote: of whole chunks; tokens, greedy: one token after the other.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="Below 1: likelier text.  [1]")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="tokens: of the N likeliest; left out: of all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="tokens: of the fewest with the share P; 1: of all.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="exact: at most so many a chunk; vote: so many.  [200]")
    ] = None,
    best_of: Annotated[int, typer.Option(min=1, metavar="N", help="Write N texts, print the likeliest.")] = 1,
    beam: Annotated[int | None, typer.Option(min=1, metavar="N", help="Search with N beginnings; no draws.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; each next one has the next.")] = 0,
    echo: Annotated[bool, typer.Option("--echo", help="Print each prompt before its text.")] = False,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts that are written together.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> ExitCode:
    """Write what follows each PROMPT. A seed gives the same text again, whatever else is written beside it.

    Prints the text alone, and --- between several. Ends with 1 where a text failed (exact: no draw was accepted).
    """
    flags = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--draws": draws}
    _check_flags(flags, method, best_of=best_of, beam=beam, stream=stream)
    if echo and json:
        raise RefusedError("--echo with --json: an object has its prompt", next="leave one of them out")
    texts = _prompts(prompts or [], file)
    from latentforge.cli.terminal import Passing
    from latentforge.writers.opening import open_writer
    from latentforge.writers.writing import Wish, Written, write

    # Text has characters of any language; a pipe in another encoding would end the command at the first of them.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    with Passing(stream=sys.stderr) as passing:
        printer: _Plain | _Json
        printer = _Json(passing, texts, stream) if json else _Plain(passing, texts, stream, echo)
        passing.show(f"opening {folder}")
        writer = open_writer(folder, device=device)
        sampling = _sampling(writer, method, temperature, top_k, top_p, draws)
        together = 1 if stream and not json else batch
        wish = Wish(max_tokens, sampling, seed, best_of, beam, together, scores=json and writer.model.completes)
        tokens = 0
        for one in write(writer, texts, wish):
            if isinstance(one, Written):
                printer.written(one)
            else:
                tokens += len(one.tokens)
                printer.said(one)
            if not stream:
                passing.show(f"{tokens} tokens, {printer.count} of {len(texts)} texts")
    return ExitCode.FAIL if printer.failed else ExitCode.PASS


def _check_flags(flags: dict[str, Any], method: str | None, *, best_of: int, beam: int | None, stream: bool) -> None:
    """Refuse what cannot go together, before anything is loaded."""
    given = {name: value for name, value in flags.items() if value is not None}
    if method is not None and method not in METHODS:
        raise RefusedError(f"--method {method} is none of {', '.join(METHODS)}", next="latentforge generate --help")
    if not 0 < given.get("--top-p", 1.0) <= 1:
        raise RefusedError(
            f"--top-p {given['--top-p']:g} is not above 0 and up to 1", next="leave it out for all tokens"
        )
    likeliest = "--beam" if beam is not None else "--method greedy" if method == "greedy" else None
    for name, value in given.items():
        if likeliest is not None and (name, value) not in (("--temperature", 0), ("--top-p", 1)):
            raise RefusedError(
                f"{name} {value:g} with {likeliest}: nothing is drawn, the likeliest is taken",
                next=f"leave {name} out, or draw:  --method tokens",
            )
    if "--draws" in given and method not in ("exact", "vote"):
        raise RefusedError(
            f"--draws {given['--draws']}: only exact and vote make several draws of a chunk",
            next="add --method vote or --method exact",
        )
    if beam is not None and method not in (None, "tokens", "greedy"):
        raise RefusedError(
            f"--beam {beam} with --method {method}: a beam goes from token to token", next="--beam alone"
        )
    several = f"--beam {beam}" if beam is not None else f"--best-of {best_of}" if best_of > 1 else None
    if several is not None and stream:
        raise RefusedError(f"{several} with --stream: which text it is, is known at its end", next="leave one out")
    if beam is not None and best_of > 1:
        raise RefusedError(f"--best-of {best_of} with --beam {beam}: a beam finds one text", next="leave one out")
    if best_of > 1 and likeliest is not None:
        raise RefusedError(f"--best-of {best_of} with {likeliest}: all of them would be the same", next="leave one out")


def _prompts(typed: Sequence[str], file: Path | None) -> tuple[str, ...]:
    from latentforge.writers.prompts import checked_arguments, piped_prompt, prompts_in

    if typed and file is not None:
        raise RefusedError(f"--file {file} and {len(typed)} prompt(s) beside it", next="give one of them")
    if file is not None:
        return prompts_in(file, sys.stdin.buffer)
    if typed:
        return checked_arguments(typed)
    if sys.stdin is None or sys.stdin.isatty():
        raise RefusedError(
            "there is no prompt",
            next="latentforge generate FOLDER 'Once upon a time'\ncat prompt.txt | latentforge generate FOLDER",
        )
    return piped_prompt(sys.stdin.buffer)


def _sampling(
    writer: Writer,
    method: str | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    draws: int | None,
) -> Sampling:
    from latentforge.students.latent.beam import GREEDY
    from latentforge.writers.writing import sampling_of

    if method == "greedy":
        return GREEDY
    wanted = 1.0 if temperature is None else temperature
    named: Any = method
    count = 200 if draws is None else draws
    return sampling_of(writer, named, temperature=wanted, draws=count, top_k=top_k, top_p=top_p)


class _Plain:
    """Texts as they are, in the order of their prompts."""

    def __init__(self, passing: Passing, prompts: tuple[str, ...], stream: bool, echo: bool) -> None:
        self._passing, self._prompts, self._stream, self._echo = passing, prompts, stream, echo
        self._kept: dict[int, Written] = {}
        self._begun: int | None = None
        self.count, self.failed = 0, False

    def said(self, part: Said) -> None:
        if self._stream:
            self._begin(part.number)
            self._print(part.text)

    def written(self, one: Written) -> None:
        self._kept[one.number] = one
        while self.count in self._kept:
            self._begin(self.count)
            done = self._kept.pop(self.count)
            self._print("\n" if self._stream else done.text + "\n")
            if done.error is not None:
                self.failed = True
                following = f"  next: {done.error.next}" if done.error.next else ""
                print(f"error: {done.error}", following, sep="\n", file=sys.stderr, flush=True)
            self.count += 1

    def _begin(self, number: int) -> None:
        if self._begun != number:
            self._begun = number
            self._print(("---\n" if number else "") + (self._prompts[number] if self._echo else ""))

    def _print(self, text: str) -> None:
        self._passing.clear()
        print(text, end="", flush=True)


class _Json:
    """A line of JSON each: a part of a text has no "finish", a whole one has."""

    def __init__(self, passing: Passing, prompts: tuple[str, ...], stream: bool) -> None:
        self._passing, self._stream = passing, stream
        self._kept: dict[int, Written] = {}
        self.count, self.failed = 0, False

    def said(self, part: Said) -> None:
        if self._stream:
            self._print({"number": part.number, "text": part.text, "tokens": part.tokens})

    def written(self, one: Written) -> None:
        self._kept[one.number] = one
        if self._stream:
            self._object(self._kept.pop(one.number))
        while self.count in self._kept:
            self._object(self._kept.pop(self.count))

    def _object(self, one: Written) -> None:
        self.count += 1
        self.failed = self.failed or one.error is not None
        content = {**one._asdict(), "score": one.score}
        error = content.pop("error")
        if error is not None:
            content |= {"error": str(error), "next": error.next}
        self._print(content)

    def _print(self, content: dict[str, Any]) -> None:
        self._passing.clear()
        print(json_text.dumps(content, ensure_ascii=False), flush=True)
