"""A YAML file as values, each with the line on which it stands; duplicate keys, anchors and merges are errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from latentforge.errors import RefusedError

Location = tuple[str | int, ...]
"""Where a value stands: the keys and list positions that lead to it, ``("falsifiers", 0, "check")``."""


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
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RefusedError(f"{name}:{line}: not YAML: unacceptable character {error.character!r}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            raise RefusedError(f"{name}:1: the file is empty")
        document = Document(name, None)
        _refuse_aliases(text, name)
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


def _refuse_aliases(text: str, name: str) -> None:
    """An alias makes one line mean two things, so that an error could not name the line to change."""
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
            raise RefusedError(f"{name}:{token.start_mark.line + 1}: anchors and aliases are not used in contracts")


def _build(loader: yaml.SafeLoader, node: yaml.Node, location: Location, document: Document) -> Any:
    document.lines.setdefault(location, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            # The merge key is an ordinary (unknown) key here: nothing is inherited invisibly.
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (
                "tag:yaml.org,2002:str",
                "tag:yaml.org,2002:merge",
            ):
                raise RefusedError(f"{document.name}:{line}: key {key!r} is not text")
            if key in mapping:
                first = document.lines[(*location, key)]
                raise RefusedError(f"{document.name}:{line}: key {key!r} is written twice (first on line {first})")
            document.lines[(*location, key)] = line
            mapping[key] = _build(loader, value_node, (*location, key), document)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*location, index), document) for index, item in enumerate(node.value)]
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, yaml.constructor.ConstructorError):
        line = node.start_mark.line + 1
        raise RefusedError(f"{document.name}:{line}: {node.value!r} cannot be read as {node.tag}") from None
