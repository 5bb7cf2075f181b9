"""What a run's statement says, and what it refuses to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.checks import planted_run
from latentforge.evidence.digests import file_sha256, tree_sha256
from latentforge.evidence.manifest import record, write_manifest
from latentforge.evidence.schema import Statement, json_schemas
from latentforge.evidence.statement import Claim, build_statement, derive, digest_files


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return planted_run(tmp_path)


def state(run_dir: Path, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"plan": None, "host": {}, "dispatched": {}, "environ": {}, **more}
    return build_statement(run_dir, **given)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_every_file_of_the_run_is_a_subject(run_dir: Path) -> None:
    subjects = {one["name"]: one["digest"]["sha256"] for one in state(run_dir)["subject"]}
    files = {path.relative_to(run_dir).as_posix(): file_sha256(path) for path in run_dir.rglob("*") if path.is_file()}
    assert subjects == files
    assert "out/student/model.safetensors" in subjects


def test_two_statements_of_the_same_files_are_the_same(run_dir: Path) -> None:
    assert state(run_dir) == state(run_dir)


def test_the_products_digest_is_the_folders_content_digest(run_dir: Path) -> None:
    products = state(run_dir)["predicate"]["identities"]["products"]
    assert products == {"student": tree_sha256(run_dir / "out" / "student")}


def test_requested_and_effective_stand_apart_with_their_differences(run_dir: Path) -> None:
    edit(run_dir / "effective.json", lambda value: value["effective"]["distill"].update(learning_rate=1e-4))
    configuration = state(run_dir)["predicate"]["configuration"]
    assert configuration["requested"]["learning_rate"] == 1e-3
    assert configuration["effective"]["learning_rate"] == 1e-4
    assert configuration["differences"] == [{"field": "learning_rate", "requested": 1e-3, "effective": 1e-4}]


def test_a_trainer_that_read_another_request_is_a_difference(run_dir: Path) -> None:
    edit(run_dir / "effective.json", lambda value: value["requested"]["distill"].update(steps=3))
    (difference,) = state(run_dir)["predicate"]["configuration"]["differences"]
    assert difference == {"field": "steps (as read)", "requested": 2, "effective": 3}


def test_a_requested_value_without_an_effective_one_is_named(run_dir: Path) -> None:
    edit(run_dir / "effective.json", lambda value: value["effective"]["distill"].pop("steps"))
    assert state(run_dir)["predicate"]["configuration"]["unreported"] == ["steps"]


def test_a_choice_left_open_is_no_difference(run_dir: Path) -> None:
    configuration = state(run_dir)["predicate"]["configuration"]
    assert (configuration["requested"]["device"], configuration["effective"]["device"]) == ("auto", "cpu")
    assert configuration["differences"] == []


def test_a_run_without_effective_configuration_says_so(run_dir: Path) -> None:
    (run_dir / "effective.json").unlink()
    configuration = state(run_dir)["predicate"]["configuration"]
    assert configuration["effective"] is None
    assert configuration["unreported"] == sorted(configuration["requested"])


def test_observations_name_the_event_that_states_them(run_dir: Path) -> None:
    observations = state(run_dir)["predicate"]["observations"]
    assert [(one["what"], one["value"]) for one in observations] == [
        ("student val_loss heldout at step 0", 4.91),
        ("student val_loss heldout at step 2", 3.04),
    ]
    assert all(one["source"].startswith("events.jsonl seq ") for one in observations)


def test_a_verdict_of_another_run_is_seen_and_is_no_verdict_of_this_one(run_dir: Path) -> None:
    own = derive(run_dir, digest_files(run_dir))["verdicts"]
    with (run_dir / "events.jsonl").open("a") as stream:
        forged = {
            "seq": 9999,
            "t": 1e9,
            "wall": "2026-11-21T00:00:00Z",
            "run": "distill-" + "0" * 20,
            "kind": "verdict",
        }
        stream.write(json.dumps({**forged, "falsifier": "F-DISTILL-SMOKE-001", "outcome": "pass", "text": "x"}) + "\n")
    derived = derive(run_dir, digest_files(run_dir))
    assert derived["verdicts"] == own
    assert {"what": "event of another run", "value": forged["run"], "source": "events.jsonl seq 9999"} in derived[
        "observations"
    ]


def test_an_interpretation_without_a_check_is_marked_a_claim(run_dir: Path) -> None:
    claims = [
        Claim("it was the OOM killer"),
        Claim("it learned", check="F-DISTILL-SMOKE-001"),
        Claim("KD helped", check="F-DISTILL-SMOKE-002"),
    ]
    conclusions = state(run_dir, claims=claims)["predicate"]["conclusions"]
    assert [one["status"] for one in conclusions] == ["checked", "claim", "checked", "claim"]


@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        ({"code": 0, "outcome": "pass"}, "pass"),
        ({"code": None, "signal": 9, "outcome": "killed"}, "unknown"),
        ({"code": 139}, "unknown"),
        ({"code": 0, "outcome": "cancelled"}, "unknown"),
    ],
)
def test_a_run_that_did_not_end_as_its_events_say_is_not_a_pass(
    run_dir: Path, record: dict[str, Any], outcome: str
) -> None:
    (run_dir / "exit.json").write_text(json.dumps(record))
    assert state(run_dir)["predicate"]["end"]["outcome"] == outcome


def test_a_run_without_its_last_event_is_not_a_pass(run_dir: Path) -> None:
    events = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "events.jsonl").write_text("".join(events[:-1]))
    assert state(run_dir)["predicate"]["end"]["outcome"] == "unknown"


def test_a_file_that_changed_between_host_and_here_is_refused(run_dir: Path) -> None:
    weights = "out/student/model.safetensors"
    files = [{"path": weights, "bytes": 2048, "sha256": "0" * 64}]
    (run_dir / "artifacts.json").write_text(json.dumps({"files": files}))
    with pytest.raises(FailedError, match=r"model\.safetensors was altered on its way"):
        state(run_dir)


def test_an_inventory_that_is_not_the_exit_records_is_refused(run_dir: Path) -> None:
    (run_dir / "artifacts.json").write_text(json.dumps({"files": []}))
    (run_dir / "exit.json").write_text(json.dumps({"code": 0, "artifacts": "0" * 64}))
    with pytest.raises(FailedError, match=r"artifacts\.json was altered"):
        state(run_dir)


def test_what_stayed_on_the_host_is_listed_with_its_digest(run_dir: Path) -> None:
    absent = {"path": "out/samples.json", "bytes": 7, "sha256": "3" * 64}
    (run_dir / "artifacts.json").write_text(json.dumps({"files": [absent]}))
    assert state(run_dir)["predicate"]["not_collected"] == [absent]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "distill-00000000000000000000").mkdir()
    with pytest.raises(RefusedError, match="no run folder"):
        state(tmp_path / "distill-00000000000000000000")


def test_an_altered_identity_is_refused(run_dir: Path) -> None:
    text = (run_dir / "identity.json").read_text()
    (run_dir / "identity.json").write_text(text.replace('"seed":7', '"seed":8'))
    with pytest.raises(RefusedError, match="altered"):
        state(run_dir)


def test_a_second_manifest_is_refused_and_the_first_stays(run_dir: Path) -> None:
    statement = state(run_dir)
    write_manifest(run_dir, statement)
    before = (run_dir / "manifest.json").read_bytes()
    with pytest.raises(RefusedError, match="written once"):
        write_manifest(run_dir, {**statement, "extra": 1})
    assert (run_dir / "manifest.json").read_bytes() == before
    assert [path.name for path in run_dir.parent.iterdir()] == [run_dir.name]


def test_a_manifest_that_a_crash_left_out_of_the_ledger_is_entered(run_dir: Path) -> None:
    write_manifest(run_dir, state(run_dir, dispatched={"first": True}))
    before = (run_dir / "manifest.json").read_bytes()
    assert record(run_dir, state(run_dir)).entry == 1
    assert (run_dir / "manifest.json").read_bytes() == before
    with pytest.raises(RefusedError, match="written once"):
        record(run_dir, state(run_dir))


def test_a_manifest_over_other_files_is_not_entered(run_dir: Path) -> None:
    write_manifest(run_dir, state(run_dir))
    (run_dir / "launch.log").write_text("another story\n")
    with pytest.raises(RefusedError, match="written once"):
        record(run_dir, state(run_dir))
    assert not (run_dir.parent / "ledger.jsonl").exists()


def test_an_unknown_key_is_not_a_statement(run_dir: Path) -> None:
    statement = state(run_dir)
    Statement.model_validate(statement)
    statement["predicate"]["verdict"] = "pass"
    with pytest.raises(ValidationError):
        Statement.model_validate(statement)


def test_the_committed_schemas_are_those_of_the_code() -> None:
    folder = Path(__file__).resolve().parents[2] / "evidence" / "schema"
    committed = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert committed == json_schemas(), "python -m latentforge.evidence.schema evidence/schema"


@pytest.mark.parametrize(
    ("schema", "left_out", "fits"),
    [
        (2, (), True),
        (1, ("tensors", "data_files"), True),
        (1, (), False),
        (1, ("tensors",), False),
        (1, ("data_files",), False),
        (2, ("tensors",), False),
        (2, ("data_files",), False),
        (2, ("tensors", "data_files"), False),
    ],
)
def test_the_json_schema_ties_identities_to_the_schema_as_the_model_does(
    run_dir: Path, schema: int, left_out: tuple[str, ...], fits: bool
) -> None:
    statement = state(run_dir)
    statement["predicate"]["schema"] = schema
    for name in left_out:
        del statement["predicate"]["identities"][name]
    assert Draft202012Validator(json_schemas()["statement.schema.json"]).is_valid(statement) is fits
    with nullcontext() if fits else pytest.raises(ValidationError):
        Statement.model_validate(statement)
