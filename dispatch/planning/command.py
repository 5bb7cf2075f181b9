"""A command in typed pieces: values are quoted where a shell would read them, secrets are shown by name alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from latentforge.evidence.secrets import secret_values


@dataclass(frozen=True)
class Secret:
    """A part of a word that is the value of an environment variable which holds a secret."""

    name: str
    value: str = field(repr=False)


@dataclass(frozen=True)
class Word:
    """One word of a command: literal text and secrets, in order."""

    parts: tuple[str | Secret, ...]

    @classmethod
    def of(cls, text: str, secrets: Mapping[str, str]) -> Word:
        """The word with every value of ``secrets`` (by name) found in it; the longest first, so that none hides one."""
        parts: list[str | Secret] = [text]
        for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
            parts = [piece for part in parts for piece in _split(part, Secret(name, value))]
        return cls(tuple(parts))

    @property
    def raw(self) -> str:
        """The word as a program gets it."""
        return "".join(part.value if isinstance(part, Secret) else part for part in self.parts)

    def __str__(self) -> str:
        """The word as it is shown: to be copied into a shell that has the same environment, and safe to print."""
        if not any(isinstance(part, Secret) for part in self.parts):
            return shlex.quote(self.raw)
        return "".join(f'"${part.name}"' if isinstance(part, Secret) else shlex.quote(part) for part in self.parts)


def _split(part: str | Secret, secret: Secret) -> list[str | Secret]:
    if isinstance(part, Secret) or secret.value not in part:
        return [part]
    pieces: list[str | Secret] = []
    for number, text in enumerate(part.split(secret.value)):
        pieces += [secret] if number else []
        pieces += [text] if text else []
    return pieces


@dataclass(frozen=True)
class Command:
    """Variables and words, as typed pieces; ``str`` is what may be shown."""

    variables: tuple[tuple[str, Word], ...]
    words: tuple[Word, ...]

    @classmethod
    def of(cls, words: Sequence[str], variables: Mapping[str, str], environ: Mapping[str, str]) -> Command:
        """The command with what is secret in this environment found in its words and variables."""
        secrets = secret_values(environ)
        return cls(
            tuple((name, Word.of(value, secrets)) for name, value in sorted(variables.items())),
            tuple(Word.of(word, secrets) for word in words),
        )

    def __str__(self) -> str:
        before = [f"{name}={word}" for name, word in self.variables]
        return " ".join([*before, *map(str, self.words)])
