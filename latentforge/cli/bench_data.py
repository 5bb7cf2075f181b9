"""``latentforge bench data``: how fast a corpus becomes packed rows here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode


def data(
    corpus: Annotated[
        str, typer.Argument(metavar="CORPUS", help="'stdlib', a folder, a .txt or a .jsonl file.")
    ] = "stdlib",
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A tokenizer's folder; a BPE is learnt if absent.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=260, help="Tokens of the BPE that is learnt.")] = 2048,
    megabytes: Annotated[
        int, typer.Option(min=1, help="Training text to encode, 10^6 bytes; all if there is less.")
    ] = 50,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens a packed row.")] = 1024,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> ExitCode:
    """Index, tokenise and pack a part of CORPUS on one core: MB/s, tokens/s, peak memory, beside the library alone."""
    from latentforge.cli.progress import Progress
    from latentforge.cli.terminal import print_json
    from latentforge.data.bench import measure

    with Progress() as progress:
        progress.tell("measuring")
        found = measure(
            corpus,
            tokenizer_folder=tokenizer,
            vocab_size=vocab_size,
            megabytes=megabytes,
            sequence_length=sequence_length,
        )
    if json:
        print_json(found.as_json())
    else:
        print("\n".join(found.lines()))
    return ExitCode.PASS
