"""A run of kind ``latent``: what it leaves, that it resumes as if it had not stopped, and what judges it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.events import read_events
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.spec.sections import PipelineSpec
from latentforge.students.latent.codec import Codec
from latentforge.students.latent.flops import latent_training
from latentforge.students.latent.student import LatentStudent
from latentforge.train import latent, latent_lessons
from latentforge.train.checkpoint import load_checkpoint
from latentforge.train.inprocess import execute_pipeline, plan
from latentforge.train.latent_trainer import LatentTrainer
from latentforge.train.run import execute
from latentforge.train.stopping import Interrupted
from latentforge.verdicts import ExitCode
from latentforge.writers.opening import open_writer

STEPS = 6
MakeRun = Callable[..., RunDir]


def short_spec(*changes: str) -> PipelineSpec:
    """``tiny-latent`` for a few steps, on little text, without a gate on what is learnt."""
    short = [
        "data.train_sequences=64",
        "data.heldout_sequences=8",
        "teacher.steps=4",
        "continuations.rows=32",
        "autoencoder.steps=20",
        "autoencoder.require=[]",
        f"latent.steps={STEPS}",
        "latent.checkpoint_every=4",
        "latent.batch_size=8",
        "latent.require=[]",
    ]
    return resolve_pipeline("tiny-latent", env={}, overrides=[*short, *changes]).spec


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs that a student is made from, made once."""
    root = tmp_path_factory.mktemp("prepared")
    execute_pipeline(short_spec(), root, through="autoencoder", text=io.StringIO())
    return root / "runs"


@pytest.fixture
def make_run(prepared: Path, tmp_path: Path) -> MakeRun:
    runs = tmp_path / "runs"
    shutil.copytree(prepared, runs)

    def make(*changes: str, attempt: int = 1, predecessor: RunDir | None = None) -> RunDir:
        planned = plan(short_spec(*changes))[-1]
        identity = planned.identity.at_attempt(attempt)
        before = predecessor.run if predecessor else None
        return RunDir.create(
            runs, identity, LaunchRecord(identity.run_id, planned.kin, planned.resolved, predecessor=before)
        )

    return make


def run_here(folder: RunDir) -> tuple[ExitCode, str]:
    text = io.StringIO()
    return execute(folder.path, text=text), text.getvalue()


def steps(run: RunDir) -> dict[int, dict[str, Any]]:
    return {e.fields["step"]: e.fields for e in read_events(run.events_file) if e.kind == "step"}


def metrics(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [e.fields for e in read_events(run.events_file) if e.kind == "metric" and e.fields["name"] == name]


def test_it_leaves_a_folder_that_writes_each_signal_measured_and_every_value_in_force(make_run: MakeRun) -> None:
    run = make_run()
    code, text = run_here(run)
    assert code is ExitCode.PASS, text
    writer = open_writer(run.path)
    assert (writer.kind, writer.model.chunk, writer.model.tempered, writer.model.completes) == ("latent", 2, True, True)
    copied, trained = run.out / "student" / "codec", run.input_path("codec") / "codec"
    assert (copied / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()

    requested = run.load_identity().spec["latent"]
    effective = json.loads(run.effective_file.read_text())["effective"]["latent"]
    assert effective.keys() == requested.keys()
    open_to_choice = {"device": "auto", "micro_batch_size": None, "sample_continuations": None}
    assert {**effective, **open_to_choice} == requested

    for name in ("val_loss", "val_text", "val_sample", "val_tempered", "val_token_ce", "val_token_kd"):
        first, last = metrics(run, name)
        assert (first["step"], last["step"], first["rows_sha256"]) == (0, STEPS, last["rows_sha256"])
    (causal,) = metrics(run, "change_before_a_chunk")
    assert causal["value"] == 0 < causal["after"]
    for made in steps(run).values():
        assert made["rows"] + made["padding"] == 8 * 30
        assert made["rows"] == made["denominator"]
        assert made["text_chunks"] == 8 * 15
    # Half of the rows were continued, of which some end inside.
    assert 0 < sum(made["sample_chunks"] for made in steps(run).values()) < STEPS * 8 * 15 * 0.7
    peaks = [e.fields for e in read_events(run.events_file) if e.kind == "memory" and "epoch" in e.fields]
    assert peaks
    assert all(made["epoch_peak_bytes"] > 50 << 20 for made in peaks)
    record = json.loads((run.out / "metrics.json").read_text())
    assert record["heldout"]["final"]["parts"].keys() >= {"text", "sample", "tempered", "token_ce", "token_kd"}
    # Half of the rows were continued, four times at each of two temperatures.
    cost = latent_training(
        LatentStudent.open(run.out / "student").shape,
        Codec.open(copied).shape,
        positions=16,
        draws=4 * (1 + 2 / 2),
        encoded=1 + 4 * 2 / 2,
        token_head=True,
    )
    assert record["flops"]["latent"] == pytest.approx(cost.total * STEPS * 8 * 30)
    told = json.loads((run.out / "samples.json").read_text())
    assert all(one.keys() == {"prompt", "text", "latent"} and one["latent"] for one in told)
    assert "F-ARTEFACT-MOVED-001 PASS" in text


def kill_at(run: RunDir, step: int) -> None:
    """Run a folder in a process of its own, and kill that once its events say that ``step`` was made."""
    command = [sys.executable, "-m", "latentforge", "run", str(run.path)]
    with open(run.log_file, "ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 120
            while not (run.events_file.is_file() and step in steps(run)):
                assert process.poll() is None, run.log_file.read_text()
                assert time.monotonic() < deadline, run.log_file.read_text()
                time.sleep(0.005)
        finally:
            process.kill()


@pytest.mark.slow
def test_two_processes_under_zero_2_make_the_student_that_one_makes_and_one_goes_on_with_it(make_run: MakeRun) -> None:
    asked = ("latent.batch_size=5", "latent.micro_batch_size=1")
    alone, together = make_run(*asked), make_run(*asked, "latent.distributed='deepspeed-zero2'", "latent.processes=2")
    for run in (alone, together):
        code, text = run_here(run)
        assert code is ExitCode.PASS, text
    ours, theirs = steps(together), steps(alone)
    assert ours.keys() == theirs.keys() == set(range(1, STEPS + 1))
    for step, said in theirs.items():
        for name in ("loss", "ce", "text", "sample", "grad_norm"):
            assert ours[step][name] == pytest.approx(said[name], rel=2e-6), (step, name)
        same = ("rows", "sequences", "batch_sha256", "learning_rate", "text_chunks", "sample_chunks", "padding")
        assert [ours[step][name] for name in same] == [said[name] for name in same]
    wrapped = json.loads(together.effective_file.read_text())["effective"]["engine"]
    assert (wrapped["engine"], wrapped["processes"]) == ("deepspeed-zero2", 2)
    assert wrapped["weights"] == wrapped["parameters"] > 1.9 * wrapped["states"]

    shutil.rmtree(together.checkpoints / f"step-{STEPS:06d}")
    resumed = make_run(*asked, attempt=2, predecessor=together)
    code, text = run_here(resumed)
    assert code is ExitCode.PASS, text
    assert f"resumes from step 4 of {together.run}" in text
    ends = [load_checkpoint(run.checkpoints / f"step-{STEPS:06d}") for run in (alone, resumed)]
    for wanted, found in ((ends[0].weights, ends[1].weights), (ends[0].moments, ends[1].moments)):
        assert wanted.keys() == found.keys()
        assert max(float((found[name] - value).abs().max()) for name, value in wanted.items()) < 1e-5
    assert read_events(together.events_file)[-1].fields["code"] == 0


def test_a_run_that_is_stopped_then_killed_and_resumed_ends_with_the_same_bits(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run()
    assert run_here(whole)[0] is ExitCode.PASS

    # Stopped by a signal after step 3, which is no multiple of checkpoint_every.
    stopped = make_run(attempt=2)
    asked = iter([None] * 2 + ["SIGTERM"])
    monkeypatch.setattr(latent, "stop_requested", lambda: next(asked))
    assert run_here(stopped)[0] is ExitCode.UNKNOWN
    monkeypatch.undo()
    killed = make_run(attempt=3, predecessor=stopped)
    kill_at(killed, 4)
    assert "resumes from step 3" in killed.log_file.read_text()
    resumed = make_run(attempt=4, predecessor=killed)
    code, text = run_here(resumed)
    assert code is ExitCode.PASS, text
    assert f"of {killed.run}" in text
    weights = [(run.out / "student" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]
    ends = [load_checkpoint(run.checkpoints / f"step-{STEPS:06d}") for run in (whole, resumed)]
    assert all(torch.equal(ends[0].moments[name], ends[1].moments[name]) for name in ends[0].moments)
    losses = [{step: made["loss"] for step, made in steps(run).items()} for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert [found["step"] for found in metrics(resumed, "val_text")] == [0, STEPS]


def planted_losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Each measure of held-out text says the next of these losses."""
    planted, measured = iter(losses), LatentTrainer.held_out
    monkeypatch.setattr(LatentTrainer, "held_out", lambda *all_: replace(measured(*all_), loss=next(planted)))


def kept_weights(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(run.checkpoints / "best" / f"step-{step:06d}").weights


BEST = ("latent.validate_every=2", "latent.keep='best'")


@pytest.mark.parametrize(("losses", "best"), [((9, 5, 3, 4, 3), 4), ((9, 5, 5, 4), 6), ((9, 2, 2, float("nan"), 2), 2)])
def test_the_step_of_the_lowest_held_out_loss_is_kept_the_first_of_equals(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, losses: tuple[float, ...], best: int
) -> None:
    planted_losses(monkeypatch, *losses)
    run = make_run(*BEST)
    code, text = run_here(run)
    assert code is ExitCode.PASS, text
    assert f"kept: step {best}, held-out loss {min(losses[1:4]):.4f}" in text
    student = LatentStudent.open(run.out / "student")
    ours = kept_weights(run, best)
    assert all(torch.equal(ours[name], value) for name, value in student.state_dict().items() if name in ours)
    assert [(found["step"], found["value"]) for found in metrics(run, "val_loss")][:3] == [
        (0, losses[0]),
        (2, losses[1]),
        (4, losses[2]),
    ]
    assert json.loads((run.out / "metrics.json").read_text())["kept_step"] == best
    assert [(found["value"], found["step"]) for found in metrics(run, "kept_step")] == [(best, STEPS)]


@pytest.mark.parametrize(("stop", "best"), [(3, 2), (5, 4)])
def test_a_best_step_before_a_stop_is_kept_by_the_run_that_goes_on(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, stop: int, best: int
) -> None:
    planted_losses(monkeypatch, 9, *((3,) if best == 2 else (4, 3)))
    stopped = make_run(*BEST)
    asked = iter([None] * (stop - 1) + ["SIGTERM"])
    monkeypatch.setattr(latent, "stop_requested", lambda: next(asked))
    assert run_here(stopped)[0] is ExitCode.UNKNOWN
    monkeypatch.undo()
    planted_losses(monkeypatch, *([5.0] * (3 - best // 2)), 3)
    resumed = make_run(*BEST, attempt=2, predecessor=stopped)
    code, text = run_here(resumed)
    assert code is ExitCode.PASS, text
    assert f"kept: step {best}, held-out loss 3.0000; that of step {STEPS}, the last, is 5.0000" in text
    ours, theirs = kept_weights(resumed, best), kept_weights(stopped, best)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("losses", [(9, 5, 4, 3), (9, 5, 3, 4)], ids=["the last", "one before"])
def test_a_run_that_is_stopped_while_it_measures_its_end_goes_on_with_its_best(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, losses: tuple[float, ...]
) -> None:
    def interrupted(*_: object) -> None:
        raise Interrupted("interrupted by SIGTERM")

    planted_losses(monkeypatch, *losses, 3)
    monkeypatch.setattr(latent, "changes", interrupted)
    stopped = make_run(*BEST)
    assert run_here(stopped)[0] is ExitCode.UNKNOWN
    monkeypatch.undo()
    planted_losses(monkeypatch, losses[-1], 3)
    code, text = run_here(make_run(*BEST, attempt=2, predecessor=stopped))
    assert code is ExitCode.PASS, text
    assert f"kept: step {6 if losses[-1] == 3 else 4}, held-out loss 3.0000" in text


def test_an_older_best_is_kept_where_the_newer_one_lies_after_the_last_checkpoint(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ("latent.validate_every=1", "latent.keep='best'")
    planted_losses(monkeypatch, 9, 8, 3, 7, 7, 2)
    stopped = make_run(*every)
    asked = iter([None] * 4 + ["SIGTERM"])
    monkeypatch.setattr(latent, "stop_requested", lambda: next(asked))
    assert run_here(stopped)[0] is ExitCode.UNKNOWN
    monkeypatch.undo()
    shutil.rmtree(stopped.checkpoints / "step-000005")  # as if it had been killed before that was whole: 4 is the last
    planted_losses(monkeypatch, 7, 7, 3)
    code, text = run_here(make_run(*every, attempt=2, predecessor=stopped))
    assert code is ExitCode.PASS, text
    assert "kept: step 2, held-out loss 3.0000; that of step 6, the last, is 7.0000" in text


def test_a_best_that_was_altered_on_disk_is_said_to_be_that(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    planted_losses(monkeypatch, 9, 3, 4, 5)
    measured, run = LatentTrainer.held_out, make_run(*BEST)

    def altered(*all_: Any) -> Any:
        weights = run.checkpoints / "best" / "step-000002" / "model.safetensors"
        if weights.is_file() and not weights.stat().st_size % 2:
            with open(weights, "ab") as file:
                file.write(b"x")
        return measured(*all_)

    monkeypatch.setattr(LatentTrainer, "held_out", altered)
    code, text = run_here(run)
    assert code is not ExitCode.PASS
    assert "step-000002: model.safetensors is sha256" in text


def test_without_a_loss_that_is_a_number_no_step_is_the_best(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted_losses(monkeypatch, 9, *([float("nan")] * 3))
    code, text = run_here(make_run(*BEST))
    assert code is ExitCode.FAIL
    assert "no held-out loss of the latent was a number" in text


@pytest.mark.parametrize("section", ["latent", "autoencoder"])
def test_the_best_of_one_step_is_refused(section: str) -> None:
    with pytest.raises(RefusedError, match=f"set {section}.validate_every below {section}.steps"):
        short_spec(f"{section}.keep='best'")


def test_micro_batches_and_activations_computed_again_change_nothing_but_memory(make_run: MakeRun) -> None:
    found = []
    for changes in ((), ("latent.micro_batch_size=3", "latent.activation_checkpointing=true")):
        run = make_run(*changes, "latent.steps=2")
        code, text = run_here(run)
        assert code is ExitCode.PASS, text
        found.append([(made["loss"], made["text"], made["sample"], made["kd"]) for made in steps(run).values()])
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_student_in_bf16_has_fp32_masters_and_is_saved_as_it_was_trained(make_run: MakeRun) -> None:
    run = make_run("latent.precision=bf16")
    code, text = run_here(run)
    assert code is ExitCode.PASS, text
    checkpoint = load_checkpoint(run.checkpoints / f"step-{STEPS:06d}")
    assert {weight.dtype for weight in checkpoint.weights.values()} == {torch.float32}
    student = LatentStudent.open(run.out / "student")
    for name, weight in student.state_dict().items():
        if name in checkpoint.weights:
            assert torch.equal(weight, checkpoint.weights[name].bfloat16().float()), name


def test_the_first_latentforges_losses_are_there_and_are_trained_alone_where_they_are_asked_for(
    make_run: MakeRun,
) -> None:
    alone = ["text", "sample", "tempered", "token_ce", "token_kd"]
    off = [f"latent.{name}_weight=0" for name in alone]
    of_old = ["latent.mse_weight=1", "latent.ce_weight=1", "latent.kl_weight=1", "latent.student.token_layers=0"]
    run = make_run(*off, *of_old, "latent.steps=30", "latent.require=['F-LATENT-KD-001', 'F-LATENT-CAUSAL-001']")
    code, text = run_here(run)
    assert code is ExitCode.PASS, text
    assert "F-LATENT-KD-001 PASS" in text
    for name in ("val_mse", "val_ce", "val_kl"):
        first, last = metrics(run, name)
        assert last["value"] < first["value"]
    assert not metrics(run, "val_text")


@pytest.mark.parametrize("signal", ["text_signal", "continuation_signal", "TokenSignal"])
def test_a_signal_that_is_left_out_of_the_loss_fails_though_others_lower_its_own(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    real = getattr(latent_lessons, signal)

    def without(*given: Any, **named: Any) -> Any:
        made = real(*given, **named)
        return replace(made, kd_weight=0.0) if signal == "TokenSignal" else replace(made, weight=0.0)

    monkeypatch.setattr(latent_lessons, signal, without)
    run = make_run("latent.steps=6", "latent.require=['F-LATENT-KD-001']")
    code, text = run_here(run)
    assert code is ExitCode.FAIL
    assert "F-LATENT-KD-001 FAIL" in text
    assert "the loss" in text.partition("F-LATENT-KD-001 FAIL")[2]


def test_a_frozen_student_fails_what_it_is_judged_by(make_run: MakeRun) -> None:
    run = make_run("latent.student.frozen=true", "latent.steps=2", "latent.require=['F-LATENT-KD-001']")
    code, text = run_here(run)
    assert code is ExitCode.FAIL
    assert "F-LATENT-KD-001 FAIL" in text


def test_a_loss_that_is_not_finite_ends_the_run_with_nothing_updated(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = latent.LatentTrainer._pass

    def planted(self: Any, lesson: Any) -> Any:
        found = real(self, lesson)
        return found._replace(loss=found.loss * float("nan")) if self.student.training else found

    monkeypatch.setattr(latent.LatentTrainer, "_pass", planted)
    code, text = run_here(make_run())
    assert code is ExitCode.FAIL
    assert "loss is nan at step 1; nothing was updated" in text


def test_a_signal_that_was_not_computed_refuses_the_step(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    real = latent.Teaching.lesson

    def forgets(self: Any, *arguments: Any, **settings: Any) -> Any:
        found = real(self, *arguments, **settings)
        found.energy.pop("sample", None)
        return found

    monkeypatch.setattr(latent.Teaching, "lesson", forgets)
    code, text = run_here(make_run("latent.steps=2"))
    assert code is ExitCode.FAIL
    assert "were trained; the step is refused" in text


def test_continuations_of_other_rows_are_refused_before_the_first_step(make_run: MakeRun) -> None:
    run = make_run("latent.steps=2")
    source = run.input_run("continuations")
    assert source is not None
    import sqlite3

    connection = sqlite3.connect(source.out / "continuations.sqlite")
    with connection:
        connection.execute("DELETE FROM rows WHERE rowid = 3")
    connection.close()
    (source.artifacts_file).unlink()
    code, text = run_here(run)
    assert code is ExitCode.REFUSED
    assert "continuations.sqlite holds continuations of" in text
    assert not steps(run)
