"""The shape of the evidence statement (in-toto Statement v1 with our predicate) and of a ledger line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from latentforge.spec.identity import RUN_ID
from latentforge.verdicts import FALSIFIER_ID

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:latentforge:evidence:run:v1"

SINCE_2 = frozenset({"tensors", "data_files"})
"""The identities that a predicate of schema 2 states and one of schema 1 did not know."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RunId = Annotated[str, Field(pattern=rf"^{RUN_ID.pattern}$")]
OutcomeName = Literal["pass", "unknown", "fail"]


class Shape(BaseModel):
    """A JSON object of the statement; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Digest(Shape):
    """A digest set of in-toto, of which this project uses SHA-256."""

    sha256: Sha256


class Subject(Shape):
    """One file of the run folder, by its relative path."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[^/]")]
    digest: Digest


class RunPart(Shape):
    """Which run this is; ``identity_sha256`` is that of ``identity.json``, and begins with the id's digits."""

    id: RunId
    kind: str
    attempt: Annotated[int, Field(ge=1)]
    identity_sha256: Sha256


class Difference(Shape):
    """A field whose value in force is not the one that was asked for."""

    field: str
    requested: JsonValue
    effective: JsonValue


class Configuration(Shape):
    """What was asked (from the identity) and what the trainer really held (``effective.json``; null: not recorded).

    ``unreported`` names requested fields for which the trainer stated no value in force.
    """

    requested: dict[str, JsonValue]
    effective: dict[str, JsonValue] | None
    differences: list[Difference]
    unreported: list[str]


class VerdictPart(Shape):
    """What a falsifier said, as the trainer's events state it."""

    falsifier: Annotated[str, Field(pattern=rf"^{FALSIFIER_ID.pattern}$")]
    outcome: OutcomeName
    text: str
    measured: dict[str, JsonValue]


class Observation(Shape):
    """Something that was seen, and where it is written."""

    what: str
    value: JsonValue
    source: str


class Conclusion(Shape):
    """What is read out of the observations: ``checked`` by the falsifier named, otherwise a ``claim``."""

    text: str
    check: str | None
    status: Literal["checked", "claim"]


class Tensor(Shape):
    """A tensor of a weights file: its type and shape as the file names them, sha256 of its bytes (little-endian)."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    sha256: Sha256


class DataFiles(Shape):
    """The files of the corpus that rows were made of, in the order of reading: ``out/corpus.jsonl`` and its lines."""

    files: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Identities(Shape):
    """By digest, what took part: code, lock file, extension, inputs, tokenizer; products; driver and kernel by version.

    ``extension`` holds the ``sha256`` of the native library's file and the digest of its sources (``source_digest``),
    or ``unavailable`` with the reason.

    ``code`` is what the run asked for, ``code_effective`` what the trainer found itself running. ``tensors`` holds each
    weights file (``.safetensors``) of the run, tensor by tensor (null: a file that is not of this format), and
    ``data_files`` what a data run read (null: it read none); neither stands in a predicate of schema 1.
    """

    code: Sha256
    code_effective: str | None
    lock: Sha256
    extension: JsonValue
    inputs: dict[str, JsonValue]
    tokenizer: str | None
    products: dict[str, Sha256]
    tensors: dict[str, dict[str, Tensor] | None] | None = None
    data_files: DataFiles | None = None
    driver: str | None
    kernel: str | None


class End(Shape):
    """How the run ended: the outcome over its verdicts, the exit code that its events state, the host's own record."""

    outcome: OutcomeName
    code: int | None
    record: dict[str, JsonValue] | None


class NotCollected(Shape):
    """A product that stayed on the host, with the digest that the host recorded."""

    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


def _identities(schema: int, wanted: JsonValue) -> JsonValue:
    """In JSON Schema: identities that fit ``wanted``, where the predicate is of that schema."""
    asked: JsonValue = {"properties": {"schema": {"const": schema}}, "required": ["schema"]}
    return {"if": asked, "then": {"properties": {"identities": wanted}}}


_SINCE_2: list[JsonValue] = [*sorted(SINCE_2)]
_BY_SCHEMA: list[JsonValue] = [
    _identities(1, {"not": {"anyOf": [{"required": [name]} for name in _SINCE_2]}}),
    _identities(2, {"required": _SINCE_2}),
]
"""What :meth:`Predicate._of_its_schema` holds, for validators of other people."""


class Predicate(Shape):
    """What LatentForge states about a run; schema 1 is that of manifests without ``tensors`` and ``data_files``."""

    model_config = ConfigDict(json_schema_extra={"allOf": _BY_SCHEMA})

    schema_: Literal[1, 2] = Field(alias="schema")
    run: RunPart
    configuration: Configuration
    verdicts: list[VerdictPart]
    observations: list[Observation]
    conclusions: list[Conclusion]
    identities: Identities
    environment: dict[str, JsonValue]
    seeds: dict[str, JsonValue]
    timings: dict[str, JsonValue]
    peak_memory_bytes: int | None
    flops: JsonValue
    end: End
    not_collected: list[NotCollected]
    secret_names: list[str]
    plan: JsonValue
    host: dict[str, JsonValue]
    dispatched: dict[str, JsonValue]

    @model_validator(mode="after")
    def _of_its_schema(self) -> Self:
        stated = self.identities.model_fields_set & SINCE_2
        if stated != (SINCE_2 if self.schema_ == 2 else set()):
            raise ValueError(
                f"identities of schema {self.schema_} with {sorted(stated) or 'neither'} of {sorted(SINCE_2)}"
            )
        return self


class Statement(Shape):
    """The content of ``manifest.json``."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: Annotated[list[Subject], Field(min_length=1)]
    predicateType: Literal["urn:latentforge:evidence:run:v1"]
    predicate: Predicate


class LedgerLine(Shape):
    """One line of ``ledger.jsonl``: ``prev`` is the sha256 of the line before (with its line end), ``sha256`` that of
    this line's canonical bytes without the field itself."""

    entry: Annotated[int, Field(ge=1)]
    prev: Sha256
    run: RunId
    manifest: Sha256
    wall: str
    sha256: Sha256


def json_schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schemas of ``evidence/schema``, by file name."""
    schemas: dict[str, dict[str, Any]] = {}
    for name, model in (("statement", Statement), ("ledger", LedgerLine)):
        schema = model.model_json_schema(by_alias=True)
        schemas[f"{name}.schema.json"] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return schemas


def write_json_schemas(folder: Path) -> None:
    """Write the schemas into a folder (``python -m latentforge.evidence.schema evidence/schema``)."""
    for name, schema in json_schemas().items():
        (folder / name).write_text(json.dumps(schema, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    import sys

    write_json_schemas(Path(sys.argv[1]))
