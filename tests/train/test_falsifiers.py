"""Verdicts follow from the events alone: each can pass, each can fail, and none passes on nothing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest

from latentforge.events import Event
from latentforge.spec.fields import RUN_FALSIFIERS
from latentforge.train.falsifiers import REQUIRABLE, judge
from latentforge.train.optimiser import warmup_cosine
from latentforge.train.reading import ready_of
from latentforge.train.tally import percent
from latentforge.verdicts import Outcome, parse_line

RUN = "distill-" + "a" * 20
ASKED = {"batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "steps": 6}


def good_events() -> list[Event]:
    """The events of a run with which nothing is wrong."""
    schedule = warmup_cosine(2, 6)
    told: list[tuple[str, dict[str, Any]]] = [
        (
            "phase",
            {
                "name": "ready",
                "state": "end",
                "requested": {
                    "distill": dict(ASKED),
                    "autoencoder": {"steps": 6},
                    "latent": {
                        "steps": 6,
                        "text_weight": 1.0,
                        "token_kd_weight": 0.5,
                        "sample_weight": 0.0,
                        "tempered_weight": 0.5,
                    },
                },
                "effective": {"distill": dict(ASKED), "predictions_per_sequence": 7},
            },
        )
    ]
    for model, last in (("student", 0.5), ("twin", 0.8)):
        told += [("metric", _metric(model, "val_loss", 0, 5.0)), ("metric", _metric(model, "val_kl", 0, 2.0))]
        for step in range(1, 7):
            rate = 1e-3 * schedule(step - 1)
            rows = {"rows": 28, "denominator": 28, "sequences": 4, "batch_sha256": f"{step}", "compiles": 0, "kd": 2.0}
            taught = {"kd_rows": 28, "target_rows": 28} if model == "student" else {}
            told.append(("step", {"model": model, "step": step, "steps": 6, "learning_rate": rate, **rows, **taught}))
        told += [("metric", _metric(model, "val_loss", 6, 3.0)), ("metric", _metric(model, "val_kl", 6, last))]
    covered = {"step": 6, "split": "train", "rows": 168, "target_rows": 168}
    told.append(("metric", {"name": "kd_coverage", "value": 1.0, "model": "student", **covered}))
    codec = {"model": "autoencoder", "step": 6, "split": "heldout"}
    accuracy = {"name": "token_accuracy", "value": 0.9961, "tokens": 95, "padding": 5, "places": 100}
    told += [("metric", {**codec, **accuracy})]
    told += [("metric", {**codec, "name": "latent_kl", "value": 0.6, "by_dimension": [0.6, 0.7]})]
    causal = {"name": "change_before_a_chunk", "value": 0.0, "after": 0.4, "places": 5}
    told += [("metric", {"model": "latent", "step": 6, "split": "heldout", **causal})]
    tempered = [("val_tempered_0.5", 4.0, 3.5), ("val_tempered_0.7", 4.0, 3.0), ("val_tempered", 4.0, 3.25)]
    for name, start, end in (("val_text", 5.0, 3.0), ("val_token_kd", 2.0, 1.5), *tempered):
        told += [("metric", _metric("latent", name, 0, start)), ("metric", _metric("latent", name, 6, end))]
    parts = {"text": 5.0, "tempered_0.5": 4.0, "tempered_0.7": 4.0, "kd": 2.0, "ce": None}
    for step in range(1, 7):
        lesson = {**rows, **parts, "loss": 5.0 + 0.25 * (4.0 + 4.0) + 0.5 * 2.0, "batch_sha256": f"{step}"}
        told.append(("step", {"model": "latent", "step": step, "steps": 6, "learning_rate": 1e-3, **lesson}))
    weight = {"path": "out/student", "bytes": 900, "expected_bytes": 800, "moved": 9, "tensors": 9, "unmoved": []}
    told.append(("checkpoint", {"step": 3, **weight}))
    told.append(("checkpoint", {"step": 6, "product": True, **weight, "frozen": 5, "frozen_changed": []}))
    return [Event(seq, float(seq), "", RUN, kind, fields) for seq, (kind, fields) in enumerate(told)]


def _metric(model: str, name: str, step: int, value: float) -> dict[str, Any]:
    where = {"model": model, "name": name, "step": step, "split": "heldout"}
    return {**where, "value": value, "rows_sha256": "the held-out rows"}


def change(events: list[Event], kind: str, where: dict[str, Any], **values: Any) -> list[Event]:
    """The events with ``values`` put into those of ``kind`` that match ``where``."""
    changed = copy.deepcopy(events)
    hit = [e for e in changed if e.kind == kind and where.items() <= e.fields.items()]
    assert hit
    for event in hit:
        event.fields.update(values)
    return changed


def test_all_that_a_pipeline_may_require_is_judged_by_the_run() -> None:
    assert set(RUN_FALSIFIERS) == set(REQUIRABLE)


@pytest.mark.parametrize("name", sorted(REQUIRABLE))
def test_a_good_run_passes_and_no_events_are_unknown(name: str) -> None:
    found = REQUIRABLE[name](good_events())
    assert (found.falsifier, found.outcome, found.run) == (name, Outcome.PASS, RUN)
    assert REQUIRABLE[name]([]).outcome is Outcome.UNKNOWN
    parsed = parse_line(found.line())
    assert parsed is not None
    assert parsed.text == found.text


FAULTS: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    (
        "F-LATENT-AE-001",
        "metric",
        {"name": "token_accuracy"},
        {"value": 0.9949},
        "99.4900% < 99.5% of 95 held-out tokens",
    ),
    (
        "F-LATENT-AE-001",
        "metric",
        {"name": "token_accuracy"},
        {"tokens": 100},
        "which with 5 places of padding are not the 100 places of the held-out rows",
    ),
    ("F-LATENT-AE-001", "metric", {"name": "token_accuracy"}, {"tokens": 0, "padding": 100}, "of 0 held-out tokens"),
    ("F-LATENT-AE-001", "metric", {"name": "token_accuracy"}, {"value": float("nan")}, "nan% < 99.5%"),
    ("F-LATENT-CAUSAL-001", "metric", {"name": "change_before_a_chunk"}, {"value": 1e-9}, "before by 1e-09"),
    ("F-LATENT-CAUSAL-001", "metric", {"name": "change_before_a_chunk"}, {"value": float("nan")}, "before by nan"),
    ("F-LATENT-KD-001", "metric", {"name": "val_text", "step": 6}, {"value": 5.0}, "text 5.0000 <= 5.0000"),
    ("F-LATENT-KD-001", "metric", {"name": "val_token_kd", "step": 6}, {"value": float("nan")}, "2.0000 <= nan"),
    (
        "F-LATENT-KD-001",
        "step",
        {"model": "latent", "step": 3},
        {"loss": 7.0},
        "step 3: the loss 7 is not 1 text + 0.5 token_kd + 0.25 tempered_0.5 + 0.25 tempered_0.7 = 8",
    ),
    ("F-LATENT-KD-001", "step", {"model": "latent"}, {"kd": None}, "token_kd: in the loss of no step"),
    ("F-LATENT-KD-001", "step", {"model": "latent", "step": 2}, {"loss": float("nan")}, "step 2: the loss nan is not"),
    # One temperature that rose is not hidden by the mean of all.
    ("F-LATENT-KD-001", "metric", {"name": "val_tempered_0.5", "step": 6}, {"value": 4.5}, "0.5 4.0000 <= 4.5000"),
    (
        "F-LATENT-KD-001",
        "metric",
        {"name": "val_text", "step": 6},
        {"rows_sha256": "easier rows"},
        "measured on 2 different sets of held-out rows",
    ),
    (
        "F-LATENT-AE-002",
        "metric",
        {"name": "latent_kl"},
        {"by_dimension": [0.6, 0.009]},
        "1 of 2 dimensions collapsed, the least KL is 0.009 nats",
    ),
    (
        "F-BATCH-ROWS-001",
        "step",
        {"model": "student", "step": 3},
        {"rows": 20, "denominator": 20, "padding": 7},
        "step 3: 20 rows over 20, 28 were asked",
    ),
    (
        "F-DISTILL-SMOKE-001",
        "metric",
        {"name": "val_loss", "model": "student", "step": 6},
        {"value": 5.0},
        "val_loss 5.0000 >= 5.0000 at step 6",
    ),
    ("F-DISTILL-SMOKE-001", "metric", {"name": "val_loss", "model": "student", "step": 6}, {"value": "nan"}, "nan >="),
    ("F-DISTILL-PIPELINE-001", "metric", {"name": "val_loss", "model": "student", "step": 6}, {"value": 5.1}, ">="),
    (
        "F-DISTILL-SMOKE-002",
        "metric",
        {"name": "val_kl", "model": "student", "step": 6},
        {"value": 0.8},
        "val_kl 0.8000 >= 0.8000 of its twin without KD",
    ),
    ("F-DISTILL-SMOKE-002", "metric", {"name": "val_kl", "model": "twin", "step": 6}, {"value": "inf"}, "not finite"),
    (
        "F-DISTILL-SMOKE-001",
        "metric",
        {"model": "student", "step": 6},
        {"rows_sha256": "easier rows"},
        "measured on 2 different sets of held-out rows",
    ),
    (
        "F-DISTILL-SMOKE-002",
        "metric",
        {"model": "twin", "step": 6},
        {"rows_sha256": "harder rows"},
        "measured on 2 different sets of held-out rows",
    ),
    (
        "F-DISTILL-SMOKE-002",
        "step",
        {"model": "twin", "step": 4},
        {"batch_sha256": "another"},
        "step 4: student and twin were trained on different batches",
    ),
    (
        "F-DISTILL-SMOKE-002",
        "metric",
        {"model": "twin", "step": 0, "name": "val_loss"},
        {"value": 5.1},
        "student and twin started apart: val_loss 5.0000 and 5.1000 at step 0",
    ),
    ("F-BATCH-ROWS-001", "step", {"step": 3}, {"rows": 7}, "step 3: 7 rows over 28, 28 were asked"),
    ("F-BATCH-ROWS-001", "step", {"step": 3}, {"denominator": 7}, "step 3"),
    ("F-BATCH-ROWS-001", "step", {"step": 3}, {"sequences": 1}, "step 3"),
    ("F-EFFECTIVE-LR-001", "step", {"step": 4, "model": "student"}, {"learning_rate": 1e-5}, "at step 4"),
    ("F-EFFECTIVE-LR-001", "step", {"step": 3, "model": "student"}, {"learning_rate": "nan"}, "at step 3"),
    ("F-EFFECTIVE-LR-001", "step", {"step": 3, "model": "student"}, {"learning_rate": math.nan}, "at step 3"),
    ("F-ARTEFACT-SIZE-001", "checkpoint", {}, {"bytes": 200}, "200 bytes, its tensors need 800"),
    (
        "F-ARTEFACT-MOVED-001",
        "checkpoint",
        {},
        {"moved": 8, "unmoved": ["embed"]},
        "8 of 9 tensors moved; unmoved: embed",
    ),
    ("F-KERNEL-NOJIT-001", "step", {"step": 3, "model": "student"}, {"compiles": 2}, "2 compiles since ready"),
    ("F-ARTEFACT-MOVED-001", "checkpoint", {}, {"moved": 0, "tensors": 0}, "0 of 0"),
    ("F-ARTEFACT-FROZEN-001", "checkpoint", {}, {"frozen_changed": ["embed"]}, "4 of 5 frozen tensors"),
    ("F-ARTEFACT-FROZEN-001", "checkpoint", {}, {"frozen": 0}, "0 of 0"),
    ("F-DISTILL-CANARY-001", "checkpoint", {"step": 3}, {"bytes": 200}, "200 bytes, its tensors need 800"),
    ("F-DISTILL-CANARY-001", "checkpoint", {"step": 3}, {"moved": 8}, "8 of 9 tensors moved by step 3"),
    ("F-DISTILL-CANARY-001", "metric", {"name": "val_kl", "step": 0}, {"value": 1e-9}, "held-out KL 1.00e-09"),
    ("F-DISTILL-CANARY-001", "metric", {"name": "val_kl", "step": 0}, {"value": "nan"}, "held-out KL nan"),
    ("F-DISTILL-CANARY-001", "metric", {"name": "val_kl", "step": 0}, {"value": "inf"}, "held-out KL inf"),
    ("F-DISTILL-CANARY-001", "step", {"step": 1, "model": "student"}, {"kd": 3e-8}, "KD term 3.00e-08"),
    ("F-LATENT-CANARY-001", "checkpoint", {"step": 3}, {"bytes": 200}, "200 bytes, its tensors need 800"),
    ("F-LATENT-CANARY-001", "checkpoint", {"step": 3}, {"moved": 8, "unmoved": ["head"]}, "by step 3; unmoved: head"),
    ("F-LATENT-CANARY-001", "metric", {"name": "val_text", "step": 0}, {"value": 0.0}, "held-out text 0.00e+00"),
    ("F-LATENT-CANARY-001", "metric", {"name": "val_text", "step": 0}, {"value": "nan"}, "held-out text nan"),
    ("F-LATENT-CANARY-001", "metric", {"name": "val_token_kd", "step": 0}, {"value": 1e-9}, "token_kd 1.00e-09"),
    # One temperature that has nothing to teach is not hidden by the mean of all.
    ("F-LATENT-CANARY-001", "metric", {"name": "val_tempered_0.5", "step": 0}, {"value": 0.0}, "tempered_0.5 0.00e+00"),
    ("F-LATENT-CANARY-001", "step", {"model": "latent"}, {"kd": None}, "token_kd: in the loss of no step"),
    ("F-LATENT-CANARY-001", "step", {"model": "latent", "step": 3}, {"loss": 7.0}, "step 3: the loss 7 is not"),
    (
        "F-TEACHER-COVERAGE-001",
        "step",
        {"model": "student", "step": 4},
        {"kd_rows": 7},
        "KD coverage 87.5 %: 147 of 168 rows had targets; 168 of 168 were reported (100.0 %)",
    ),
    (
        "F-TEACHER-COVERAGE-001",
        "metric",
        {"name": "kd_coverage"},
        {"value": 0.99, "target_rows": 166},
        "KD coverage 100.0 %: 168 of 168 rows had targets; 166 of 168 were reported (99.0 %)",
    ),
    (
        "F-EFFECTIVE-CONFIG-001",
        "phase",
        {"name": "ready"},
        {"effective": {"distill": {**ASKED, "batch_size": 1}, "predictions_per_sequence": 7}},
        "batch_size = 4 asked, 1 in force",
    ),
]


@pytest.mark.parametrize(("name", "kind", "where", "values", "text"), FAULTS)
def test_a_planted_fault_fails(name: str, kind: str, where: dict[str, Any], values: dict[str, Any], text: str) -> None:
    found = REQUIRABLE[name](change(good_events(), kind, where, **values))
    assert found.outcome is Outcome.FAIL
    assert text in found.text


KEPT = [
    ("F-DISTILL-SMOKE-001", "student", "val_loss", {"value": 9.0}),
    ("F-DISTILL-PIPELINE-001", "student", "val_loss", {"value": 9.0}),
    ("F-DISTILL-SMOKE-002", "student", "val_kl", {"value": 9.0}),
    ("F-LATENT-KD-001", "latent", "val_text", {"value": 9.0}),
    ("F-LATENT-CAUSAL-001", "latent", "change_before_a_chunk", {"value": 0.1}),
    ("F-LATENT-AE-001", "autoencoder", "token_accuracy", {"value": 0.5}),
    ("F-LATENT-AE-002", "autoencoder", "latent_kl", {"by_dimension": [0.6, 0.0]}),
]


@pytest.mark.parametrize(("name", "model", "metric", "bad"), KEPT)
def test_a_check_judges_the_weights_that_were_kept_and_no_other_steps(
    name: str, model: str, metric: str, bad: dict[str, Any]
) -> None:
    asked = ready_of(good_events())["requested"]
    asked = {section: {**fields, "keep": "best"} for section, fields in asked.items()}
    unsaid = change(good_events(), "phase", {"name": "ready"}, requested=asked)
    assert REQUIRABLE[name](unsaid).outcome is Outcome.UNKNOWN  # which step was put back
    for one in ("student", "twin", "latent", "autoencoder"):
        at = 4 if one == model else 6
        unsaid.append(Event(900, 900.0, "", RUN, "metric", {"name": "kept_step", "value": at, "model": one, "step": 6}))
    assert REQUIRABLE[name](unsaid).outcome is Outcome.UNKNOWN  # what the weights of step 4 answer
    last = [e for e in unsaid if e.fields.get("model") == model and e.fields.get("split") == "heldout"]
    put_back = [replace(e, fields={**e.fields, "step": 4, "kept": True}) for e in last if e.fields["step"] == 6]
    said = [*unsaid, *put_back]
    at = {"model": model, "name": metric}
    for events, outcome in (
        (said, Outcome.PASS),
        (change(said, "metric", {**at, "step": 6}, **bad), Outcome.PASS),
        (change(said, "metric", {**at, "step": 4}, **bad), Outcome.FAIL),
    ):
        found = REQUIRABLE[name](events)
        assert found.outcome is outcome, found.text


def covered(rows: int, on_loss: str) -> list[Event]:
    """A run whose step 4 lacked targets for all but ``rows`` of its 28 rows, as it reports itself."""
    events = change(good_events(), "step", {"model": "student", "step": 4}, kd_rows=rows, target_rows=rows)
    taught = 140 + rows
    events = change(events, "metric", {"name": "kd_coverage"}, value=taught / 168, target_rows=taught)
    asked = {"distill": {**ASKED, "on_teacher_loss": on_loss}}
    return change(events, "phase", {"name": "ready"}, requested=asked)


@pytest.mark.parametrize(("on_loss", "outcome"), [("degrade", Outcome.PASS), ("stop", Outcome.FAIL)])
def test_a_gap_that_is_reported_passes_where_the_run_was_to_go_on(on_loss: str, outcome: Outcome) -> None:
    found = REQUIRABLE["F-TEACHER-COVERAGE-001"](covered(0, on_loss))
    assert found.outcome is outcome
    assert "KD coverage 83.3 %: 140 of 168 rows had targets" in found.text
    assert found.measured["coverage"] == 140 / 168


def test_a_teacher_that_answers_every_row_with_nothing_does_not_pass() -> None:
    silent = {"kd_rows": 0, "target_rows": 0, "silent_rows": 28}
    events = change(good_events(), "step", {"model": "student"}, **silent)
    events = change(events, "metric", {"name": "kd_coverage"}, value=0.0, target_rows=0)
    found = REQUIRABLE["F-TEACHER-COVERAGE-001"](events)
    assert found.outcome is Outcome.FAIL
    assert "0 of 168 rows had targets" in found.text
    assert "taught nothing" in found.text


def test_coverage_is_never_rounded_up_to_a_whole() -> None:
    assert [percent(share) for share in (0.99999, 1.0, 0.873, 0.0)] == ["99.9 %", "100.0 %", "87.3 %", "0.0 %"]


def test_a_run_that_does_not_say_which_rows_had_targets_is_unknown() -> None:
    name = "F-TEACHER-COVERAGE-001"
    unsaid = [e for e in good_events() if e.fields.get("name") != "kd_coverage"]
    assert REQUIRABLE[name](unsaid).outcome is Outcome.UNKNOWN
    events = good_events()
    for event in events:
        event.fields.pop("kd_rows", None)
    assert REQUIRABLE[name](events).outcome is Outcome.UNKNOWN


def test_a_run_without_its_last_metric_is_unknown_not_pass() -> None:
    events = [e for e in good_events() if not (e.kind == "metric" and e.fields["step"] == 6)]
    assert REQUIRABLE["F-DISTILL-SMOKE-001"](events).outcome is Outcome.UNKNOWN
    assert REQUIRABLE["F-DISTILL-SMOKE-002"](events).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("name", ["F-DISTILL-CANARY-001", "F-LATENT-CANARY-001"])
def test_a_canary_without_an_early_checkpoint_is_unknown_not_pass(name: str) -> None:
    events = [e for e in good_events() if not (e.kind == "checkpoint" and e.fields["step"] == 3)]
    found = REQUIRABLE[name](events)
    assert (found.outcome, "before the last step" in found.text) == (Outcome.UNKNOWN, True)


def test_a_latent_canary_that_passes_says_how_much_each_signal_had_to_teach() -> None:
    told = REQUIRABLE["F-LATENT-CANARY-001"](good_events()).text
    start = "text 5, token_kd 2, tempered_0.5 4, tempered_0.7 4"
    assert told == f"checkpoint of step 3 whole, 9 of 9 tensors moved; before step 1 {start}"


def test_a_latent_canary_that_does_not_say_what_there_was_to_learn_is_unknown_not_pass() -> None:
    events = [e for e in good_events() if (e.fields.get("name"), e.fields.get("step")) != ("val_token_kd", 0)]
    found = REQUIRABLE["F-LATENT-CANARY-001"](events)
    assert (found.outcome, found.text) == (Outcome.UNKNOWN, "val_token_kd before step 1 is not in the events")


def test_a_latent_canary_in_whose_few_steps_no_continued_row_came_is_unknown_and_says_so() -> None:
    none = {"tempered_0.5": None, "tempered_0.5_chunks": 0, "loss": 5.0 + 0.25 * 4.0 + 0.5 * 2.0}
    events = change(good_events(), "step", {"model": "latent"}, **none)
    found = REQUIRABLE["F-LATENT-CANARY-001"](events)
    assert found.outcome is Outcome.UNKNOWN
    assert found.text.startswith("tempered_0.5: no row that was continued came in 6 steps")
    once = change(events, "step", {"model": "latent", "step": 6}, **{"tempered_0.5_chunks": 3})
    assert REQUIRABLE["F-LATENT-CANARY-001"](once).outcome is Outcome.FAIL


@pytest.mark.parametrize("name", ["F-DISTILL-SMOKE-001", "F-DISTILL-SMOKE-002"])
def test_values_of_rows_that_nobody_named_are_unknown_not_compared(name: str) -> None:
    events = good_events()
    for event in events:
        event.fields.pop("rows_sha256", None)
    assert REQUIRABLE[name](events).outcome is Outcome.UNKNOWN


def test_a_twin_whose_batches_nobody_named_is_unknown() -> None:
    events = good_events()
    for event in events:
        event.fields.pop("batch_sha256", None)
    assert REQUIRABLE["F-DISTILL-SMOKE-002"](events).outcome is Outcome.UNKNOWN


def test_a_run_that_lacks_a_step_is_unknown() -> None:
    events = [e for e in good_events() if not (e.kind == "step" and e.fields["step"] == 5)]
    assert REQUIRABLE["F-DISTILL-PIPELINE-001"](events).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("model", ["student", "twin"])
def test_a_model_that_made_fewer_steps_than_asked_fails(model: str) -> None:
    last = {"model": model, "step": 6}
    events = [e for e in good_events() if not (e.kind == "step" and last.items() <= e.fields.items())]
    found = REQUIRABLE["F-BATCH-ROWS-001"](events)
    assert found.outcome is Outcome.FAIL
    assert found.text == f"{model} made 5 of 6 steps: step 6 is missing"


def test_a_compile_after_ready_fails_and_one_before_does_not() -> None:
    events = good_events()
    fields = {"compiler": "triton", "count": 1, "what": ["kd_dense"], "step": 2, "model": "student"}
    compiled = Event(0, 0.0, "", RUN, "compile", fields)
    assert REQUIRABLE["F-KERNEL-NOJIT-001"]([compiled, *events]).outcome is Outcome.PASS
    found = REQUIRABLE["F-KERNEL-NOJIT-001"]([*events, compiled])
    assert found.outcome is Outcome.FAIL
    assert found.text == "1 compiles since ready, the first by step 2 (triton)"


def test_steps_that_nobody_watched_are_unknown_not_free_of_compiles() -> None:
    events = good_events()
    for event in events:
        event.fields.pop("compiles", None)
    assert REQUIRABLE["F-KERNEL-NOJIT-001"](events).outcome is Outcome.UNKNOWN


def test_required_verdicts_come_last_and_none_comes_twice() -> None:
    names = [v.falsifier for v in judge(good_events(), ["F-DISTILL-SMOKE-002", "F-BATCH-ROWS-001"])]
    assert names[-2:] == ["F-DISTILL-SMOKE-002", "F-BATCH-ROWS-001"]
    assert len(set(names)) == len(names)
