"""Public incidents, replayed by their shape: each is caught on the way, and by something that was not fooled then."""

from __future__ import annotations

from typing import Any

import pytest

from dispatch.following.activity import classify
from dispatch.following.checks import ACTIVITIES, OTHER, RUN, Story
from dispatch.following.limits import Limits
from dispatch.following.lines import Lines
from dispatch.following.pace import too_slow
from dispatch.following.watcher import Watcher
from latentforge.events import Event
from latentforge.verdicts import ExitCode


def test_d17_a_success_told_one_line_after_skipping_is_a_contradiction_and_never_green() -> None:
    story = Story()
    story.begin()
    shown = story.watcher.log(
        Lines.of(
            [
                "[warmup] Skipping GEMM backward kernel pre-warm (cuBLAS active)",
                "[warmup] GEMM backward kernels pre-warmed ✓",
            ]
        )
    )
    story.steps(0.1, 1, 10, 10)
    record = story.end()
    assert len(shown) == 2
    assert any("contradiction" in one and "pre-warmed" in one for one in record.warnings)
    assert record.mismatches[0]["what"] == "a success is told of what was skipped"
    quiet = Story()
    quiet.watcher.log(Lines.of(["Skipping download: all files are there", "GEMM backward kernels pre-warmed ✓"]))
    assert not quiet.end().mismatches


def test_d21_a_live_process_that_loads_for_longer_than_ten_seconds_is_neither_training_nor_dead() -> None:
    story = Story()
    story.event("phase", name="load", state="begin")
    story.wait(12.5)
    assert story.ended is None
    assert story.watcher.progress.first_step is None
    story.event("phase", name="load", state="end", seconds=12.5)
    dead = Story()
    dead.event("phase", name="load", state="begin")
    record = dead.wait(3600)
    assert record is not None
    assert record.ending == "deadline"
    assert "loading for 601 s (deadline 600 s)" in record.reason


def test_d22_an_hour_and_a_half_at_step_0_with_1320_percent_cpu_is_told_within_its_deadline() -> None:
    story = Story(Limits(first_step=120.0), telemetry=ACTIVITIES["CPU-bound"])
    story.begin()
    record = story.wait(5400)
    assert record is not None
    assert record.code is ExitCode.STALLED
    assert "ready, and no first step for 121 s" in record.reason
    assert "GPU 0 % at 4 W, CPU 1320 %, I/O 0.0 MB/s: CPU-bound" in record.reason
    assert story.clock - story.begun < 140


def test_d23_a_run_that_tells_no_steps_is_not_waited_for() -> None:
    story = Story(Limits(other=300.0, first_step=300.0))
    story.begin()
    record = None
    for number in range(60):
        story.event("memory", rss=number)  # signs of life, none of progress
        if (record := story.wait(20)) is not None:
            break
    assert record is not None
    assert "no first step" in record.reason


def test_d24_a_stub_is_too_fast_and_a_week_is_too_slow() -> None:
    story = Story()
    story.begin()
    story.steps(0.0001, 1, 500, 500)
    effective = {"flops": {"student": 2e15}, "device": {"type": "cuda", "name": "NVIDIA GB10"}}
    record = story.end(effective)
    assert record.ending == "fail"
    assert record.code is ExitCode.FAIL
    assert record.verdicts[0].falsifier == "F-DISTILL-LIVENESS-003"
    assert "faster than their 2e+03 TFLOP allow" in record.reason
    slow = too_slow(170 * 3600.0, 3600.0, 100 * 3600.0)
    assert slow is not None
    assert slow.colour == "warning"
    assert "171 h, beyond its deadline of 100 h" in slow.text
    assert too_slow(40 * 3600.0, 3600.0, 100 * 3600.0) is None


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"bytes": 200, "expected_bytes": 2_000_000}, "has 200 bytes, its tensors need 2000000"),
        ({"bytes": 9, "expected_bytes": 9, "moved": 0, "tensors": 12}, "no tensor"),
    ],
)
def test_d25_a_checkpoint_of_200_bytes_or_of_unmoved_tensors_fails_the_run(fields: dict[str, Any], word: str) -> None:
    story = Story()
    story.begin()
    story.steps(0.1, 1, 10, 10)
    story.event("checkpoint", step=10, path="checkpoints/10", **fields)
    record = story.end()
    assert record.code is ExitCode.FAIL
    assert word in record.verdicts[0].text


def test_d25_a_failed_checkpoint_in_the_text_is_red_until_a_whole_one_comes() -> None:
    story = Story()
    story.begin()
    story.watcher.log(Lines.of(["error: failed to write checkpoint: No space left on device; training continues"]))
    assert story.end().code is ExitCode.FAIL
    mended = Story()
    mended.begin()
    mended.watcher.log(Lines.of(["error: failed to write checkpoint: No space left on device; training continues"]))
    mended.event("checkpoint", step=10, bytes=10, expected_bytes=10)
    record = mended.end()
    assert record.code is ExitCode.PASS
    assert "failed checkpoint" in record.warnings[0]


def test_d26_the_raw_loss_counts_and_not_the_best_of_an_epoch() -> None:
    story = Story()
    story.begin()
    story.watcher.log(Lines.of(["epoch 1 done: best loss 2.41 ✓"]))
    story.steps(0.1, 1, 100, 100, loss=lambda step: 5.0 if step < 40 else 9.0)
    assert any("diverged" in line for line in story.watcher.news())
    assert story.end().verdicts[0].falsifier == "F-DISTILL-LIVENESS-004"


@pytest.mark.parametrize("wording", ["step {} of 10: loss={}", "Schritt {}: Verlust {}", "step {}/10 loss {}"])
def test_d37_a_reworded_log_changes_no_verdict_and_silences_no_rule(wording: str) -> None:
    good, bad = Story(), Story()
    for story, loss in ((good, 4.0), (bad, float("nan"))):
        story.begin()
        for step in range(1, 11):
            story.steps(0.1, step, step, 10, loss=lambda _step, loss=loss: loss if loss == loss else "nan")
            story.watcher.log(Lines.of([wording.format(step, "4.0000")]))
    assert good.end().code is ExitCode.PASS
    assert bad.end().code is ExitCode.FAIL


def test_an_event_of_another_run_is_no_event_of_this_one() -> None:
    watcher = Watcher(RUN)
    forged = Event(0, 1.0, "", OTHER, "end", {"code": 0})
    assert watcher.events([forged]) == []
    assert any(OTHER in line for line in watcher.news())


@pytest.mark.parametrize("name", ["cpu", "io"])
def test_a_figure_that_is_not_known_is_never_taken_for_zero(name: str) -> None:
    first = {"clock": 0.0, "cpu": 0.0, "io": 0, "gpu": None}
    last = {"clock": 10.0, "cpu": 0.0, "io": 0, "gpu": None}
    assert classify(first, last).kind == "idle"
    assert classify(first, {**last, "gpu": {"util": 97, "watts": None}}).kind == "GPU-bound", "no watts, no low power"
    if name == "cpu":
        assert classify({**first, "cpu": None}, last).kind == "unknown"
