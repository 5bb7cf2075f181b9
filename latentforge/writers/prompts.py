"""Prompts from where people keep them: arguments, standard input, a file."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from latentforge.errors import RefusedError


def checked_arguments(prompts: Sequence[str]) -> tuple[str, ...]:
    """Prompts that were typed; RefusedError where one is not UTF-8 (Python hands on such bytes as surrogates)."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise RefusedError(
                f"prompt {prompt!r} is not UTF-8", next="write it to a file and:  iconv -t UTF-8 FILE"
            ) from None
    return tuple(prompts)


def piped_prompt(stream: BinaryIO) -> tuple[str, ...]:
    """All of a stream as one prompt, without the newline at its end that echo and editors put there."""
    text = _text(stream.read(), "standard input")
    return (text.removesuffix("\n"),)


def prompts_in(path: Path, stream: BinaryIO, *, flag: str = "--file") -> tuple[str, ...]:
    """A prompt of each line of a file, or of ``stream`` where the path is ``-``; empty lines hold none.

    Lines of a .jsonl file are objects with the prompt as "prompt". RefusedError names the file, the ``flag`` that gave
    it, and the line.
    """
    one_a_line = f"{flag} FILE with a prompt in each line, {flag} - for standard input"
    if str(path) == "-":
        name, content = "standard input", stream.read()
    else:
        name = str(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RefusedError(f"{flag} {name} cannot be read: {error.strerror}", next=one_a_line) from None
    # Not splitlines(): other characters that end a line somewhere are part of a prompt.
    lines = [line.removesuffix("\r") for line in _text(content, name).split("\n")]
    found = [
        _of_json(line, f"{name}, line {number}") if path.suffix == ".jsonl" else line
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise RefusedError(f"{flag} {name} holds no prompt", next=one_a_line)
    return tuple(found)


def _text(content: bytes, name: str) -> str:
    try:
        return content.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise RefusedError(f"{name} is not UTF-8 at byte {error.start}", next="iconv -t UTF-8 FILE") from None


def _of_json(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise RefusedError(f'{where} is no object with a text as "prompt"', next='{"prompt": "Once upon a time"}')
    return checked_arguments([prompt])[0]
