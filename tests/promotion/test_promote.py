"""A student is published only where its evidence, its claims and its weights hold, and then as it was trained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from latentforge.cli import main
from latentforge.errors import FailedError, RefusedError
from latentforge.evidence.digests import file_sha256
from latentforge.promotion.checks import WEIGHTS, copy_of, cut_short, drawn_anew, seal, with_evidence, zeros
from latentforge.promotion.gate import PRODUCT, Gate, look
from latentforge.promotion.publish import publish, read_published
from latentforge.train.rehearsal import tiny_run
from latentforge.verdicts import ExitCode, Outcome
from latentforge.writers.opening import open_writer

Plant = Callable[[Path], object]


def unmet(gate: Gate) -> dict[str, tuple[Outcome, str]]:
    return {one.name: (one.outcome, one.text) for one in gate.unmet}


def reworded(change: Callable[[dict[str, object]], object], kind: str) -> Plant:
    """Changes every event of a kind."""

    def plant(run: Path) -> None:
        lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        for line in lines:
            if line["kind"] == kind:
                change(line)
        (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return plant


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Plant:
    def plant(run: Path) -> None:
        tensors = load_file(run / WEIGHTS)
        change(tensors)
        save_file(tensors, run / WEIGHTS, metadata={"format": "pt"})

    return plant


def test_a_student_whose_claims_hold_is_published_as_a_folder_that_transformers_reads(
    student: Path, tmp_path: Path
) -> None:
    gate = look(student, smoke=True)
    assert unmet(gate) == {}
    assert {
        "evidence",
        "end",
        "profile",
        "weights",
        "writes",
        "configuration",
        "F-DISTILL-SMOKE-001",
        "F-ARTEFACT-MOVED-001",
    } <= {one.name for one in gate.conditions}
    there = publish(gate, tmp_path / "published")
    model, info = AutoModelForCausalLM.from_pretrained(there, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = load_file(student / WEIGHTS)
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items() if name in ours)
    assert AutoTokenizer.from_pretrained(there).encode("def")
    card = (there / "README.md").read_text()
    assert student.name in card
    assert "library_name: transformers" in card
    assert "smoke run" in card
    assert re.search(r"\| F-DISTILL-SMOKE-001 \| val\\_loss [0-9.]+ \\< [0-9.]+ at step", card)
    assert read_published(there)["run"] == student.name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_smoke_run_is_not_promoted_unless_asked_for(student: Path, tmp_path: Path) -> None:
    gate = look(student)
    assert unmet(gate) == {"profile": (Outcome.FAIL, unmet(gate)["profile"][1])}
    with pytest.raises(FailedError, match="profile  FAIL  smoke"):
        publish(gate, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    first = sorted(tensors)[0]
    tensors[first] = tensors[first].clone()
    tensors[first].view(-1)[3] = float("nan")


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "mlp" in name)]


def _rewritten(name: str, change: Callable[[Any], object]) -> Plant:
    def plant(run: Path) -> None:
        value = json.loads((run / name).read_bytes())
        change(value)
        (run / name).write_text(json.dumps(value))

    return plant


def configured(**values: Any) -> Plant:
    return _rewritten(f"{PRODUCT}/config.json", lambda config: config.update(values))


def sampled(**values: Any) -> Plant:
    return _rewritten("out/samples.json", lambda samples: [one.update(values) for one in samples])


def pickled(run: Path) -> None:
    torch.save({}, run / PRODUCT / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("plant", "condition", "told"),
    [
        (zeros, "weights", "every element of"),
        (drawn_anew, "writes", "of 4 recorded texts"),
        (weights(not_finite), "weights", "not finite"),
        (weights(missing), "weights", "mlp"),
        (cut_short, "weights", "200 bytes"),
        (pickled, "weights", "pickle"),
        (lambda run: (run / WEIGHTS).unlink(), "weights", "no safetensors"),
        (
            lambda run: shutil.copy(run / WEIGHTS, run / PRODUCT / "more.safetensors"),
            "weights",
            "and in more.safetensors",
        ),
        (lambda run: (run / PRODUCT / "modeling.py").write_text(""), "weights", "modeling.py is no weights"),
        (configured(hidden_size="x"), "weights", "cannot be opened"),
        (configured(num_attention_heads=0), "weights", "cannot be opened"),
        (lambda run: (run / "out" / "samples.json").write_text("{}"), "writes", "recorded no text"),
        (lambda run: (run / "out" / "samples.json").write_text("[" * 100_000), "writes", "is no list of prompts"),
        (sampled(student=5), "writes", "holds what no run records"),
        (sampled(prompt=""), "writes", "holds what no run records"),
        (sampled(prompt="def " * 20_000), "writes", "holds what no run records"),
    ],
    ids=[
        "zeros",
        "not trained",
        "nan",
        "a tensor missing",
        "200 bytes",
        "pickle",
        "no weights",
        "a tensor twice",
        "a program",
        "a size that is a word",
        "no heads",
        "no samples",
        "deep samples",
        "a sample that is no text",
        "nothing before a text",
        "a book before a text",
    ],
)
def test_a_broken_model_is_refused_although_its_evidence_is_sound(
    broken: Callable[[Plant], Path], plant: Plant, condition: str, told: str, tmp_path: Path
) -> None:
    gate = look(broken(plant), smoke=True)
    assert condition in unmet(gate), unmet(gate)
    assert told in unmet(gate)[condition][1]
    with pytest.raises(FailedError, match="is not promoted"):
        publish(gate, tmp_path / "published")


def other_rate(event: dict[str, object]) -> None:
    event["learning_rate"] = 1e-9


def one_row(event: dict[str, object]) -> None:
    event["rows"] = 1


@pytest.mark.parametrize(
    ("plant", "falsifier"),
    [
        (reworded(lambda event: event.update(moved=0), "checkpoint"), "F-ARTEFACT-MOVED-001"),
        (reworded(other_rate, "step"), "F-EFFECTIVE-LR-001"),
        (reworded(one_row, "step"), "F-BATCH-ROWS-001"),
        (reworded(lambda event: event.update(value=9.0), "metric"), "F-DISTILL-SMOKE-001"),
    ],
    ids=["unchanged tensors", "another learning rate", "last row only", "loss that did not fall"],
)
def test_a_verdict_that_the_events_do_not_bear_out_does_not_promote(
    broken: Callable[[Plant], Path], plant: Plant, falsifier: str
) -> None:
    found = unmet(look(broken(plant), smoke=True))
    assert falsifier in found
    assert found[falsifier][0] is Outcome.FAIL


def other_rate_in_force(run: Path) -> None:
    record = json.loads((run / "effective.json").read_text())
    record["effective"]["distill"]["learning_rate"] = 0.5
    (run / "effective.json").write_text(json.dumps(record))


def other_rate_in_the_events(run: Path) -> None:
    """Asked for, in force and at each step, if the events alone are believed."""

    def tenfold(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            event["learning_rate"] *= 10
        elif event.get("name") == "ready":
            for side in ("requested", "effective"):
                event[side]["distill"]["learning_rate"] *= 10

    for kind in ("step", "phase"):
        reworded(tenfold, kind)(run)


def events_of(change: Callable[[list[dict[str, Any]]], object]) -> Plant:
    """Changes the list of events."""

    def plant(run: Path) -> None:
        lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        change(lines)
        (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return plant


def a_second_end(lines: list[dict[str, Any]]) -> None:
    lines.insert(-1, {**lines[-1], "seq": lines[-1]["seq"], "code": 1})
    lines[-1]["seq"] += 1


def an_event_taken_out(lines: list[dict[str, Any]]) -> None:
    del lines[1]


def a_lower_loss(event: dict[str, Any]) -> None:
    if event["name"] == "val_loss" and event["step"]:
        event["value"] /= 2


def garbled(run: Path) -> None:
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    lines[-2] = lines[-2].replace('"kind"', '"kinds"')
    (run / "events.jsonl").write_text("".join(lines))


def forget_denominators(event: dict[str, object]) -> None:
    del event["denominator"]


@pytest.mark.parametrize(
    ("plant", "condition", "outcome", "told"),
    [
        (other_rate_in_force, "configuration", Outcome.FAIL, "learning_rate = 0.003 was asked, 0.5 was in force"),
        (
            other_rate_in_the_events,
            "configuration",
            Outcome.FAIL,
            "= 0.003 was asked, 0.03 was in force (events.jsonl)",
        ),
        (lambda run: (run / "effective.json").unlink(), "configuration", Outcome.UNKNOWN, "did not record"),
        (events_of(an_event_taken_out), "events", Outcome.UNKNOWN, "event 1 is numbered 2: some were taken out"),
        (events_of(a_second_end), "end", Outcome.UNKNOWN, "tell 2 ends"),
        (reworded(a_lower_loss, "metric"), "F-DISTILL-SMOKE-001", Outcome.FAIL, "recorded with val_loss = "),
        (garbled, "events", Outcome.UNKNOWN, "is no event"),
        (reworded(forget_denominators, "step"), "events", Outcome.UNKNOWN, "cannot be judged again: KeyError"),
        (lambda run: (run / "exit.json").write_text("{}"), "end", Outcome.UNKNOWN, "no end of its process"),
        (lambda run: (run / "exit.json").write_text('{"code": false}'), "end", Outcome.UNKNOWN, "ended with unknown"),
    ],
    ids=[
        "another rate in force",
        "another rate in the events alone",
        "nothing in force",
        "an event taken out",
        "two ends",
        "a metric that the verdict did not measure",
        "a line that is no event",
        "steps without a word",
        "no exit record",
        "an exit code that is no number",
    ],
)
def test_what_is_not_known_of_a_run_does_not_promote_it(
    student: Path, plant: Plant, condition: str, outcome: Outcome, told: str
) -> None:
    plant(student)
    seal(student)
    found = unmet(look(student, smoke=True))
    assert found[condition][0] is outcome
    assert told in found[condition][1]


def test_a_latent_student_is_published_with_its_codec_and_a_broken_one_is_not(tmp_path: Path) -> None:
    from latentforge.train.rehearsal import tiny_latent_run

    run = tiny_latent_run().path
    copy = copy_of(run, tmp_path)
    gate = look(with_evidence(copy), smoke=True)
    assert unmet(gate) == {}
    there = publish(gate, tmp_path / "published")
    assert open_writer(there).kind == "latent"
    assert "library_name: latentforge" in (there / "README.md").read_text()
    drawn_anew(copy)
    assert {"weights", "writes"} & unmet(look(with_evidence(copy), smoke=True)).keys()


def test_a_file_that_was_swapped_together_with_its_digest_is_not_what_the_run_left(
    student: Path, tmp_path: Path
) -> None:
    gate, there = look(student, smoke=True), tmp_path / "published"
    publish(gate, there)
    (there / "config.json").write_text("{}")
    record = json.loads((there / "promotion.json").read_text())
    record["files"]["config.json"] = file_sha256(there / "config.json")
    (there / "promotion.json").write_text(json.dumps(record))
    with pytest.raises(FailedError, match=r"config\.json is not what distill-"):
        publish(gate, there)


def test_one_byte_changed_since_the_evidence_was_written_is_no_promotion(student: Path) -> None:
    content = bytearray((student / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (student / WEIGHTS).write_bytes(content)
    assert "sha256" in unmet(look(student, smoke=True))["evidence"][1]


def test_a_run_without_a_ledger_is_not_known_and_not_promoted(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (student.parent / "ledger.jsonl").unlink()
    assert main(["promote", str(student), "--smoke"]) == ExitCode.UNKNOWN
    assert "conditions do not hold" in capsys.readouterr().out
    assert unmet(look(student, smoke=True))["evidence"][0] is Outcome.UNKNOWN


def test_what_was_published_is_kept_and_an_altered_one_is_named(student: Path, tmp_path: Path) -> None:
    gate, there = look(student, smoke=True), tmp_path / "published"
    publish(gate, there)
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    assert publish(gate, there) == there
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before
    (there / "config.json").write_text("{}")
    with pytest.raises(FailedError, match=r"config\.json is not what was published"):
        publish(gate, there)
    (tmp_path / "mine").mkdir()
    with pytest.raises(RefusedError, match="was not made by promote"):
        publish(gate, tmp_path / "mine")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda run, folder: run / "published", "is a run, or in one"),
        (lambda run, folder: run, "is a run, or in one"),
        (lambda run, folder: run / PRODUCT / "published", "is a run, or in one"),
        (lambda run, folder: folder / "link", "is a link to nowhere"),
        (lambda run, folder: folder / ("x" * 300), "is no place for a folder"),
        (lambda run, folder: folder / "no" / "such", "is no folder"),
        (lambda run, folder: Path("/proc/published"), "cannot be made"),
        (lambda run, folder: Path("~no-such-user/x"), "is no place for a folder"),
    ],
    ids=["in the run", "the run", "in the student", "a link", "a long name", "no parent", "not writable", "no user"],
)
def test_a_place_where_nothing_can_be_published_is_refused_and_nothing_is_left_behind(
    student: Path, gate: Gate, tmp_path: Path, place: Callable[[Path, Path], Path], said: str
) -> None:
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RefusedError, match=said):
        publish(gate, place(student, tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("record", ["[]", '{"files": []}', '{"files": 5}', "[" * 100_000])
def test_a_record_of_another_shape_is_refused(tmp_path: Path, record: str) -> None:
    (tmp_path / "promotion.json").write_text(record)
    with pytest.raises(RefusedError, match="was not made by promote"):
        read_published(tmp_path)


def test_a_student_that_was_frozen_is_not_promoted(tmp_path: Path) -> None:
    found = unmet(look(with_evidence(copy_of(tiny_run(frozen=True).path, tmp_path)), smoke=True))
    assert found["F-ARTEFACT-MOVED-001"][0] is Outcome.FAIL


def test_a_run_of_another_kind_is_refused_by_name() -> None:
    teacher = next(tiny_run().path.parent.glob("teacher-*"))
    with pytest.raises(RefusedError, match="is a teacher run: students are promoted"):
        look(teacher)


def test_text_of_a_run_is_no_markup_of_its_card() -> None:
    from latentforge.promotion.card import _cell

    assert _cell("a|b <img src=x>\n# x `c` [d](e)") == r"a\|b \<img src=x\> # x \`c\` \[d\](e)"
