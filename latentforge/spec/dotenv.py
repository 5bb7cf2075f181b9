"""The operator's environment: variables of the process, and beneath them those of ``.env`` in the current folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from latentforge.errors import RefusedError

FILE = ".env"
_LARGEST = 1 << 20
_NAME = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "$": "$"}


class Environment(Mapping[str, str]):
    """Variables with where each was said: the process's own win over the file's."""

    def __init__(self, process: Mapping[str, str], file: Mapping[str, str]) -> None:
        self._process = process
        self._file = dict(file)

    @classmethod
    def here(cls, folder: Path | None = None) -> Environment:
        """This process's variables, and those of ``.env`` in ``folder`` (the current one by default)."""
        return cls(os.environ, read_dotenv((folder or Path.cwd()) / FILE))

    def __getitem__(self, name: str) -> str:
        return self._process[name] if name in self._process else self._file[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._process
        yield from (name for name in self._file if name not in self._process)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Environment({len(self)} variables)"  # never their values

    def origin(self, name: str) -> str:
        """``environment NAME`` or ``.env NAME``."""
        return f"environment {name}" if name in self._process else f"{FILE} {name}"

    def export(self, names: Iterable[str]) -> None:
        """Give this process the named variables that only the file has: what looks for secrets looks there."""
        for name in names:
            if name not in self._process and name in self._file:
                os.environ[name] = self._file[name]


def origin_of(env: Mapping[str, str], name: str) -> str:
    """Where a variable was said; a plain mapping is the process's environment."""
    return env.origin(name) if isinstance(env, Environment) else f"environment {name}"


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables of a ``.env`` file; none where there is no file.

    ``NAME=value`` a line, with or without ``export``; ``'…'`` is taken as it stands, ``"…"`` knows ``\\n \\t \\" \\\\
    \\$``, both may span lines; without quotes the value ends at `` #`` and is stripped. Nothing is expanded: a value
    with ``$`` outside single quotes is refused. RefusedError names the line, never a value.
    """
    try:
        if path.is_fifo():  # nobody may ever write to it
            raise RefusedError(f"{path.name} in the current folder is a pipe, not a file", next="write a plain file")
        with open(path, "rb") as file:
            raw = file.read(_LARGEST + 1)
    except FileNotFoundError:
        if path.is_symlink():
            raise RefusedError(f"{path.name} in the current folder is a link to a file that is not there") from None
        return {}
    except OSError as error:
        raise RefusedError(f"{path.name} in the current folder cannot be read: {error.strerror}") from None
    if len(raw) > _LARGEST:
        raise RefusedError(f"{path.name} in the current folder is larger than {_LARGEST} bytes: it holds no variables")
    try:
        return parse_dotenv(raw.decode("utf-8-sig"), path.name)
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path.name} in the current folder is not UTF-8 at byte {error.start}") from None


def parse_dotenv(text: str, name: str = FILE) -> dict[str, str]:
    """The variables of the text of a ``.env`` file (see :func:`read_dotenv`)."""
    text = text.replace("\r\n", "\n")
    found: dict[str, str] = {}
    at, line = 0, 1
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if not (row := text[at:end].strip()) or row.startswith("#"):
            at, line = end + 1, line + 1
            continue
        begin = at + len(text[at:end]) - len(text[at:end].lstrip())
        head = _NAME.match(text, begin, end)
        if head is None:
            raise RefusedError(f"{name}, line {line}: this is not NAME=value", next="put a # before it, or mend it")
        variable = head[1]
        if variable in found:
            raise RefusedError(f"{name}, line {line}: {variable} is set a second time", next="take one of them out")
        value, after = _value(text, head.end(), f"{name}, line {line}: {variable}")
        if "\0" in value:
            raise RefusedError(f"{name}, line {line}: {variable} holds a NUL character")
        found[variable] = value
        line += text.count("\n", at, after) + 1
        at = after + 1
    return found


def _value(text: str, at: int, where: str) -> tuple[str, int]:
    """The value that begins at ``at``, and where its line ends."""
    quote = text[at : at + 1]
    if quote in ("'", '"'):
        value, close = (_single if quote == "'" else _double)(text, at + 1, where)
    else:
        end = text.find("\n", at)
        close = len(text) if end < 0 else end
        value = re.split(r"(?:^|[ \t])#", text[at:close], maxsplit=1)[0].strip()
        if "$" in value:
            raise _not_expanded(where)
        if "\r" in value:  # where lines end in them alone, this value is the rest of the file, keys and all
            raise RefusedError(f"{where} holds a carriage return", next="end each line in a line feed")
        return value, close
    end = text.find("\n", close)
    end = len(text) if end < 0 else end
    rest = text[close:end].strip()
    if rest and not rest.startswith("#"):
        raise RefusedError(f"{where} has something behind its closing quote", next="quote the whole value")
    return value, end


def _single(text: str, at: int, where: str) -> tuple[str, int]:
    close = text.find("'", at)
    if close < 0:
        raise _unclosed(where)
    return text[at:close], close + 1


def _double(text: str, at: int, where: str) -> tuple[str, int]:
    value = ""
    while at < len(text):
        one = text[at]
        if one == '"':
            return value, at + 1
        if one == "$":
            raise _not_expanded(where)
        if one == "\\" and text[at + 1 : at + 2] in _ESCAPES:
            one, at = _ESCAPES[text[at + 1]], at + 1
        value += one
        at += 1
    raise _unclosed(where)


def _not_expanded(where: str) -> RefusedError:
    return RefusedError(f"{where} holds a $, and nothing is expanded here", next="put the value in single quotes")


def _unclosed(where: str) -> RefusedError:
    return RefusedError(f"{where} has no closing quote")
