"""The statement as the in-toto project's own library reads it: who knows attestations needs nothing of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, Parse, ParseError
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

from latentforge.evidence.schema import PREDICATE_TYPE
from latentforge.spec.canonical import canonical_bytes
from latentforge.spec.reading import parse_json


def accepted(content: bytes) -> Statement:
    """The statement that in-toto's library reads and finds valid."""
    statement = Statement.copy_from_pb(Parse(content, StatementMessage()))
    statement.validate()
    return statement


def test_in_totos_own_library_accepts_a_manifest_and_reads_every_word_of_it(run_dir: Path) -> None:
    content = (run_dir / "manifest.json").read_bytes()
    message = accepted(content).pb
    assert message.predicate_type == PREDICATE_TYPE
    assert {one.name: one.digest["sha256"] for one in message.subject}.keys() >= {"identity.json", "events.jsonl"}
    assert canonical_bytes(MessageToDict(message)) == content


CONTROLS: list[tuple[str, Callable[[dict[str, Any]], Any], type[Exception]]] = [
    ("another type", lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), ValueError),
    ("no subject", lambda s: s.update(subject=[]), ValueError),
    ("a subject without digest", lambda s: s["subject"][0].pop("digest"), ValueError),
    ("no predicate type", lambda s: s.pop("predicateType"), ValueError),
    ("no predicate", lambda s: s.pop("predicate"), ValueError),
    ("an unknown key", lambda s: s.update(signature="x"), ParseError),
]


@pytest.mark.parametrize(("spoil", "error"), [one[1:] for one in CONTROLS], ids=[one[0] for one in CONTROLS])
def test_the_library_refuses_what_is_no_statement(
    run_dir: Path, spoil: Callable[[dict[str, Any]], Any], error: type[Exception]
) -> None:
    statement = parse_json((run_dir / "manifest.json").read_bytes())
    spoil(statement)
    with pytest.raises(error):
        accepted(canonical_bytes(statement))
