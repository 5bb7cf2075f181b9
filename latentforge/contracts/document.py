"""A YAML file as values, each with the line on which it stands; what YAML could mean in two ways is an error."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from latentforge.errors import RefusedError

Location = tuple[str | int, ...]
"""Where a value stands: the keys and list positions that lead to it, ``("falsifiers", 0, "check")``."""

LARGEST = 256 * 1024
"""Characters of a file: more than any contract has, little enough to be read in seconds."""
_DEEPEST = 32
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_PLAIN = {
    "tag:yaml.org,2002:bool": (re.compile("true|false"), "true or false"),
    "tag:yaml.org,2002:int": (re.compile(r"[-+]?(0|[1-9][0-9]*)"), "a decimal number"),
    "tag:yaml.org,2002:float": (re.compile(r"[-+]?[0-9]+\.?[0-9]*([eE][-+]?[0-9]+)?"), "a finite decimal number"),
    "tag:yaml.org,2002:null": (re.compile("|~|null"), "null"),
}
"""How what is no text is written: of ``010``, ``1:30``, ``yes`` or ``2020-01-01`` YAML makes something else."""


@dataclass
class Document:
    """A parsed file. ``lines`` maps each location (a key's own line for mappings) to its line, counted from 1."""

    name: str
    value: Any
    lines: dict[Location, int] = field(default_factory=dict)

    def line(self, location: Location) -> int:
        """The line of a location, or of the nearest thing around it that is written in the file."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)

    def problem(self, location: Location, message: str) -> str:
        """``file:line: message``."""
        return f"{self.name}:{self.line(location)}: {message}"


def parse_document(text: str, name: str) -> Document:
    """Parse YAML text; RefusedError with file and line for anything that is not plain, unambiguous YAML."""
    if len(text) > LARGEST:
        raise RefusedError(f"{name}:1: {len(text)} characters are more than the {LARGEST} that a contract may have")
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RefusedError(f"{name}:{line}: not YAML: unacceptable character {error.character!r}") from None
    try:
        _refuse_what_is_not_plain(text, name)
        node = loader.get_single_node()
        if node is None:
            raise RefusedError(f"{name}:1: the file is empty")
        document = Document(name, None)
        document.value = _build(loader, node, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise RefusedError(f"{name}:{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise RefusedError(f"{name}:1: not YAML: {first}") from None
    finally:
        loader.dispose()
    return document


def _refuse_what_is_not_plain(text: str, name: str) -> None:
    """Before anything is built of it: what one reads of a line is what it means, and it is no deeper than one can read.

    An alias makes one line mean two things, so that an error could not name the line to change; a tag another type.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if getattr(event, "anchor", None) is not None:  # of an alias too
            raise RefusedError(f"{name}:{line}: anchors and aliases are not used in contracts")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise RefusedError(f"{name}:{line}: tags are not used in contracts: {tag!r}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise RefusedError(f"{name}:{line}: more than {_DEEPEST} lists and mappings within each other")


def _build(loader: yaml.SafeLoader, node: yaml.Node, location: Location, document: Document) -> Any:
    document.lines.setdefault(location, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RefusedError(f"{document.name}:{line}: a key is not text but a list or a mapping")
            key = key_node.value
            if key_node.tag == _MERGE:
                raise RefusedError(f"{document.name}:{line}: merges ('<<') are not used: nothing is inherited unseen")
            if key_node.tag != _TEXT:
                raise RefusedError(f"{document.name}:{line}: key {_short(key)} is not text")
            if key in mapping:
                first = document.lines[(*location, key)]
                raise RefusedError(f"{document.name}:{line}: key {key!r} is written twice (first on line {first})")
            document.lines[(*location, key)] = line
            mapping[key] = _build(loader, value_node, (*location, key), document)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*location, index), document) for index, item in enumerate(node.value)]
    said, line = node.value, node.start_mark.line + 1
    if node.tag == _TEXT:
        hidden = next((one for one in said if not one.isprintable() and one not in "\n\t"), None)
        if hidden is not None:
            raise RefusedError(
                f"{document.name}:{line}: {_short(said)} holds the character {hidden!r}, which no one sees"
            )
        return said
    written, how = _PLAIN.get(node.tag, (None, None))
    if written is None or not written.fullmatch(said):
        kind = node.tag.rpartition(":")[2]
        wanted = "in quotes, which make it text" if how is None else f"as {how}, or in quotes, which make it text"
        raise RefusedError(f"{document.name}:{line}: YAML reads {_short(said)} as {kind}: write it {wanted}")
    try:
        value = loader.construct_object(node)
        finite = not isinstance(value, float) or math.isfinite(value)
    except ValueError:  # more digits than Python reads
        finite = False
    if not finite:
        raise RefusedError(f"{document.name}:{line}: {_short(said)} is larger than any number that is read here")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
