"""What runs is what was proven here, the best of it; what was not tried is never taken for what failed."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from latentforge.errors import FailedError, RefusedError
from latentforge.kernels.guard import ladder
from latentforge.kernels.guard.key import key_of
from latentforge.kernels.guard.ladder import choose
from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.records import Record, Records
from latentforge.kernels.guard.report import Report, choices_of, render
from latentforge.kernels.guard.table import table
from latentforge.kernels.guard.variants import Variant, select
from latentforge.kernels.guard.warmup import Line
from latentforge.verdicts import ExitCode

GB10 = Machine((12, 1), 48, "580.142", "13.0", "13.0", "2.13.0", "3.9.0", "13.4.59", "6.17.0", device_name="GB10")
OURS = [v for v in table(GB10) if (v.op, v.dtype) == ("kd_loss", "bf16")]
BAD = {"failed": "mismatch_later_call", "crashed": "host_crash", "degraded": "slow"}


def states(**of_rungs: str) -> dict[str, Record]:
    """A record for each variant: its rung's state, ``ok`` where none is said."""
    found = {}
    for variant in OURS:
        state = of_rungs.get(variant.rung.replace(":", "_"), "ok")
        if state != "none":
            finished = {} if state == "pending" else {"finished": time.time(), "reason": BAD.get(state)}
            found[variant.name] = Record(variant.name, key_of(variant, GB10).digest, state, **finished)  # type: ignore[arg-type]
    return found


CASES: list[tuple[dict[str, str], str | None]] = [
    ({}, "cuda"),
    ({"cuda": "failed"}, "triton"),
    ({"cuda": "crashed"}, "triton"),
    ({"cuda": "failed", "triton": "failed"}, "reference"),
    ({"cuda": "degraded"}, "triton"),
    ({"cuda": "degraded", "triton": "failed"}, "reference"),
    # Right but slow is better than nothing that is right.
    ({"cuda": "degraded", "triton": "failed", "reference": "failed"}, "cuda"),
    ({"cuda": "failed", "triton": "degraded", "reference": "failed"}, "triton"),
    ({"cuda": "failed", "triton": "failed", "reference": "failed"}, None),
    # A rung below the one that is taken needs no record.
    ({"triton": "none", "reference": "none"}, "cuda"),
]


@pytest.mark.parametrize(("of_rungs", "wanted"), CASES, ids=range(len(CASES)))
def test_the_best_rung_that_was_proven_is_taken(of_rungs: dict[str, str], wanted: str | None) -> None:
    found = choose("kd_loss", "bf16", OURS, states(**of_rungs))
    assert found.rung == wanted
    assert found.native is (not of_rungs or "cuda" not in of_rungs)
    for name, reason, _ in found.passed_over:
        assert reason in BAD.values()
        assert name in {v.name for v in OURS}


@pytest.mark.parametrize("of_rungs", [{"cuda": "none"}, {"cuda": "pending"}, {"cuda": "failed", "triton": "none"}])
def test_what_was_not_tried_is_refused_and_not_passed_over(of_rungs: dict[str, str]) -> None:
    with pytest.raises(RefusedError, match="no record of") as error:
        choose("kd_loss", "bf16", OURS, states(**of_rungs))
    assert error.value.next == "latentforge kernels warmup"


@pytest.mark.parametrize("number", range(len([v for v in OURS if v.rung == "cuda"])))
def test_one_bad_variant_takes_its_rung_away(number: int) -> None:
    found = states()
    bad = [v for v in OURS if v.rung == "cuda"][number].name
    found[bad] = replace(found[bad], state="failed", reason="nan")
    choice = choose("kd_loss", "bf16", OURS, found)
    assert (choice.rung, [name for name, _, _ in choice.passed_over]) == ("triton", [bad])


@pytest.fixture
def on_gb10(monkeypatch: pytest.MonkeyPatch) -> Records:
    """A process that sees a GB10, and the records that it reads."""
    monkeypatch.setattr(ladder, "look", lambda device_index: GB10)
    ladder._chosen.cache_clear()
    records = Records()
    records.prepare()
    return records


def test_auto_on_a_gpu_without_a_record_names_the_warm_up(on_gb10: Records) -> None:
    with pytest.raises(RefusedError, match="no record") as error:
        ladder.chosen("kd_loss", torch.bfloat16, 0)
    assert error.value.next == "latentforge kernels warmup"


def test_auto_on_a_gpu_takes_what_the_records_allow(on_gb10: Records) -> None:
    for record in states(cuda="failed").values():
        on_gb10.write(record)
    assert ladder.chosen("kd_loss", torch.bfloat16, 0) == "triton"
    (choice,) = ladder.require_fit(["kd_loss"], torch.bfloat16)
    assert "kd_loss bf16 runs on triton" in choice.text


def test_a_record_of_another_driver_is_none(on_gb10: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    for record in states().values():
        on_gb10.write(record)
    assert ladder.chosen("kd_loss", torch.bfloat16, 0) == "cuda"
    ladder._chosen.cache_clear()
    monkeypatch.setattr(ladder, "look", lambda device_index: replace(GB10, driver="580.143"))
    with pytest.raises(RefusedError, match="no record"):
        ladder.chosen("kd_loss", torch.bfloat16, 0)


def test_a_damaged_record_is_none(on_gb10: Records) -> None:
    for record in states().values():
        on_gb10.write(record)
    path = on_gb10.path(key_of(OURS[0], GB10).digest)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RefusedError, match="no record"):
        ladder.chosen("kd_loss", torch.bfloat16, 0)


def test_an_unfit_host_is_said_before_step_0(on_gb10: Records) -> None:
    for record in states(cuda="failed", triton="failed", reference="failed").values():
        on_gb10.write(record)
    with pytest.raises(FailedError, match="unfit") as error:
        ladder.require_fit(["kd_loss"], torch.bfloat16)
    assert error.value.code is ExitCode.FAIL


def test_other_precisions_are_refused_on_a_gpu() -> None:
    with pytest.raises(RefusedError, match="float16"):
        ladder.chosen("kd_loss", torch.float16, 0)


def lines(records: dict[str, Record], **fields: Any) -> list[Line]:
    by_name = {v.name: v for v in OURS}
    return [Line(by_name[name], replace(record, **fields), "proven") for name, record in records.items()]


def report(records: Records, found: list[Line]) -> Report:
    return Report(GB10, found, choices_of(found, GB10, records, table(GB10)))


def test_the_exit_code_says_whether_training_may_start(records: Records) -> None:
    assert report(records, lines(states())).code is ExitCode.PASS
    assert report(records, lines(states(cuda="failed"))).code is ExitCode.PASS
    assert report(records, lines(states(cuda="crashed"))).code is ExitCode.UNKNOWN
    assert report(records, lines(states(cuda="crashed"), accepted=True)).code is ExitCode.PASS
    unfit = report(records, lines(states(cuda="crashed", triton="failed", reference="failed")))
    assert unfit.code is ExitCode.FAIL
    assert "unfit: kd_loss bf16" in render(unfit)


def test_a_report_shows_what_was_passed_over_and_what_a_person_can_do(records: Records) -> None:
    text = render(report(records, lines(states(cuda="crashed"))))
    assert "kd_loss bf16 runs on triton" in text
    assert "the host went down while this was tried" in text
    assert "latentforge kernels warmup --again --only cuda/kd_loss.bf16.dense.forward" in text
    assert "0 of 1 native, 1 fallbacks" in text
    as_json = report(records, lines(states(cuda="crashed"))).as_json()
    assert (as_json["exit_code"], as_json["choices"][0]["rung"]) == (3, "triton")
    assert {one["reason"] for one in as_json["variants"]} == {"host_crash", None}


def test_a_part_of_a_ladder_says_nothing_of_the_whole_without_records(records: Records) -> None:
    found = [line for line in lines(states()) if line.variant.rung == "triton"]
    assert report(records, found).choices == []
    for record in states().values():
        records.write(record)
    assert [choice.rung for choice in report(records, found).choices] == ["cuda"]


def test_names_are_unique_and_words_select() -> None:
    for machine in (GB10, replace(GB10, capability=None)):
        names = [v.name for v in table(machine)]
        assert len(names) == len(set(names))
    assert {v.rung for v in select(["triton"], table(GB10))} == {"triton"}
    assert {v.op for v in select(["latent_decode", "kd_loss"], table(GB10))} == {"latent_decode", "kd_loss"}
    with pytest.raises(RefusedError, match="'tritn'"):
        select(["tritn"], table(GB10))


def test_each_rung_of_a_gpu_ends_with_the_reference() -> None:
    for op in ("kd_loss", "linear_kd_loss", "latent_decode"):
        for dtype in ("bf16", "fp32"):
            rungs = [v.rung for v in table(GB10) if (v.op, v.dtype) == (op, dtype)]
            assert "cuda" in rungs
            assert rungs[-1] == "reference"


def test_a_variant_survives_the_way_to_its_child() -> None:
    import json

    for variant in table(GB10):
        assert Variant.from_json(json.loads(json.dumps(variant.as_json()))) == variant


def composite_record(on_gb10: Records, state: str, **fields: Any) -> None:
    """All rungs proven in bf16, and the micro-step of the chosen ones in ``state``."""
    from latentforge.kernels.guard.composite import OPS, composites
    from latentforge.kernels.guard.ladder import Choice

    for variant in table(GB10):
        if variant.dtype == "bf16":
            on_gb10.write(Record(variant.name, key_of(variant, GB10).digest, "ok", finished=time.time()))
    (variant,) = composites(GB10, [Choice(op, "bf16", "cuda") for op in OPS])
    on_gb10.write(Record(variant.name, key_of(variant, GB10).digest, state, finished=time.time(), **fields))


@pytest.mark.parametrize("state", ["failed", "crashed"])
def test_training_is_refused_where_the_kernels_fail_together(on_gb10: Records, state: str) -> None:
    composite_record(on_gb10, state, reason="nan")
    with pytest.raises(FailedError, match="fail together"):
        ladder.require_fit(["kd_loss"], torch.bfloat16)


def test_a_micro_step_that_did_not_come_back_refuses_training(on_gb10: Records) -> None:
    composite_record(on_gb10, "pending")
    with pytest.raises(RefusedError, match="composite"):
        ladder.require_fit(["kd_loss"], torch.bfloat16)


def test_a_micro_step_that_passed_or_was_of_other_choices_lets_training_start(on_gb10: Records) -> None:
    composite_record(on_gb10, "ok")
    assert [choice.rung for choice in ladder.require_fit(["kd_loss"], torch.bfloat16)] == ["cuda"]
    composite_record(on_gb10, "failed", reason="nan")
    bad = next(v for v in table(GB10) if v.name == "cuda/kd_loss.bf16.dense.forward")
    on_gb10.write(Record(bad.name, key_of(bad, GB10).digest, "failed", reason="nan", finished=time.time()))
    assert [choice.rung for choice in ladder.require_fit(["kd_loss"], torch.bfloat16)] == ["triton"]
